"""What the pictures of runs share: which runs to draw, the figure, its colours and its labels.

matplotlib is imported where it is used: only pictures need it.
"""

import os
from pathlib import Path

from system import files
from system.errors import fail

COLOURS = ['#1f5fa8', '#d1602c', '#3a8a4d', '#8a4fa3', '#a8842c', '#3f98a0', '#b0476a', '#666666']


def split_command_line(words):
    """Return (folders, settings): the words that name runs, and all others, in their order.

    A word that is neither a folder nor a setting counts as a run, so that an error names it.
    """
    folders = []
    settings = []
    for word in words:
        is_setting = '=' in word or word.startswith('-')
        if os.path.isdir(word) or not is_setting:
            folders.append(word)
        else:
            settings.append(word)
    return folders, [word for word in settings if word not in folders]


def label_runs(folders, names):
    """Return {label: folder as a Path}, labelled by `names`, or by the folders if that is empty.

    Raises ValueError unless every run has a label of its own.
    """
    labels = names or [folder.rstrip('/') for folder in folders]
    # A folder's name need not be valid text.
    labels = [label.encode(errors='replace').decode() for label in labels]
    n_labels = len(set(labels))
    if not folders or n_labels != len(folders):
        raise ValueError(
            f"{len(folders)} runs, {n_labels} names: give the out_dir of at least one run, and "
            "with --names a different name for each"
        )
    return {label: Path(folder) for label, folder in zip(labels, folders)}


def new_figure(width, height, style):
    """Return an empty matplotlib figure, in inches; style: matplotlib's rcParams by name."""
    try:
        import matplotlib.figure  # without pyplot, which would look for a display
    except ImportError as error:
        fail(f"{error}: pip install matplotlib")
    matplotlib.rcParams.update({'font.size': 12, 'axes.grid': True, 'grid.color': '#e4e4e4'})
    matplotlib.rcParams.update(style)
    return matplotlib.figure.Figure(figsize=(width, height), dpi=150, layout='constrained')


def add_label(axes, text, point, offset, colour, **options):
    """Return `text` written beside `point`, `offset` to the right of it, in units of 1/72 inch."""
    return axes.annotate(
        text,
        point,
        (offset, 0),
        textcoords='offset points',
        color=colour,
        va='center',
        parse_math=False,
        in_layout=False,
        **options,
    )


def spread_labels(labels, offset, heights, box_of, is_free, taken):
    """Move labels up or down, as little as possible, until they don't overlap.

    offset: how far to the right of its point each label stays. heights: the shifts to try.
    box_of(label) -> its bounding box. is_free(label, box): whether the label may lie there.
    taken: boxes that no label may overlap; those of the labels are added.
    """
    for label in labels:
        for height in sorted(heights, key=abs):
            label.set_position((offset, height))
            box = box_of(label)
            overlaps = any(box.overlaps(other) for other in taken)
            if not overlaps and is_free(label, box):
                break
        taken.append(box)


def save(figure, path):
    """Write the figure in the format that the ending of `path` names, PNG if it has none."""
    with files.replacing(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:] or 'png')
    print(f"picture: {path}")
