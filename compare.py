"""Finished runs side by side: a table, and a picture of their validation loss against parameters
and training time.

    python compare.py out-zoo-*                                         # the table, as Markdown, and ./compare.png
    python compare.py out-a out-b --names="small, large" --out=two.svg

It needs each run's metrics.jsonl and config.json, no more. The loss is that of the last
evaluation, which a finished run makes over the whole validation split; time is what the steps took,
without start-up and evaluations.
"""

from system.errors import begin_script

begin_script()  # before the imports, which take seconds

import json
import os
import sys
from pathlib import Path

from configurator import Texts, configure, divided
from system import files
from system.errors import fail, user_errors
from training.console import seconds, short

# ---- settings ------------------------------------------------------------------------------------
out = 'compare.png'  # the picture, .png, .svg or .pdf
names = Texts()  # labels of the runs, with commas between, or as a list; default: folder names
# --------------------------------------------------------------------------------------------------

COLOURS = '#1f5fa8', '#d1602c', '#3a8a4d', '#8a4fa3', '#a8842c', '#3f98a0', '#b0476a', '#666666'


def read(folder):
    """What a run came to: its settings, and {parameters, tokens, seconds, loss, bpb}. Raises
    ValueError."""
    try:
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        lines = (
            (folder / 'metrics.jsonl').read_text(encoding='utf-8', errors='replace').splitlines()
        )
        last = json.loads(
            [line for line in lines if '"val_loss"' in line and line.endswith('}')][-1]
        )
        return config, dict(
            parameters=config['resolved']['n_params'],
            tokens=last['tokens'],
            seconds=last['train_seconds'],
            loss=float(last['val_loss']),
            bpb=last['val_bpb'],
        )
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(
            f"{folder} holds no evaluated run of train.py: metrics.jsonl or config.json is missing, damaged "
            "or has no validation loss"
        ) from None


def table(runs):
    """Markdown: a row for each of {name: what `read` found}, the lowest loss last."""
    rows = [
        "| run | model | parameters | tokens | time | tokens/s | validation loss | bits per byte |",
        '|---' * 8 + '|',
    ]
    for name, (config, found) in sorted(runs.items(), key=lambda item: -item[1][1]['loss']):
        bpb = f"{found['bpb']:.4f}" if found['bpb'] else ''
        rows.append(
            f"| {name} | {config['model']} | {short(found['parameters'])} | {short(found['tokens'])} | "
            f"{seconds(found['seconds'])} | {short(found['tokens'] / max(found['seconds'], 1e-9))} | "
            f"{found['loss']:.4f} | {bpb} |"
        )
    return '\n'.join(rows)


def draw(runs):
    """The figure: a point for each run, twice."""
    import matplotlib.figure  # without pyplot, which would look for a display
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    matplotlib.rcParams.update({'font.size': 12, 'axes.grid': True, 'grid.color': '#e4e4e4'})
    figure = matplotlib.figure.Figure(figsize=(14, 7), dpi=150, layout='constrained')
    models = list(dict.fromkeys(config['model'] for config, _ in runs.values()))
    labels, least = (
        [],
        min((found['parameters'] for _, found in runs.values() if found['parameters']), default=4)
        / 4,
    )
    for axes, key, label in zip(
        figure.subplots(1, 2, sharey=True),
        ('parameters', 'seconds'),
        ('parameters (counted models have none: at the left edge)', 'training time (seconds)'),
    ):
        for name, (config, found) in runs.items():
            x, colour = (
                max(found[key], least if key == 'parameters' else 0.1),
                COLOURS[models.index(config['model']) % 8],
            )
            axes.plot(x, found['loss'], 'o', color=colour, ms=7)
            labels.append(
                axes.annotate(
                    name,
                    (x, found['loss']),
                    (8, 0),
                    textcoords='offset points',
                    color=colour,
                    arrowprops=dict(arrowstyle='-', color=colour, lw=0.6, shrinkA=0, shrinkB=4),
                    fontsize=10,
                    va='center',
                    parse_math=False,
                    in_layout=False,
                )
            )
        axes.set(xscale='log', xlabel=label)
        axes.spines[['top', 'right']].set_visible(False)
        low, high = axes.get_xlim()
        axes.set_xlim(low, high * (high / low) ** 0.25)  # room for the names
    figure.axes[0].set_ylabel('validation loss (nats per token)')
    figure.draw_without_rendering()  # now the texts have a size
    renderer = FigureCanvasAgg(figure).get_renderer()
    points = [text.axes.transData.transform(text.xy) for text in labels]
    taken = [matplotlib.transforms.Bbox([point - 10, point + 10]) for point in points]
    for text in labels:  # as near to its point as there is no other text and no point
        for up in sorted(range(-150, 151, 3), key=abs):
            text.set_position((14, up))
            text.update_positions(renderer)
            box = matplotlib.text.Text.get_window_extent(text, renderer)  # without its line
            if (
                not any(map(box.overlaps, taken))
                and text.axes.bbox.y0 < box.y0
                and box.y1 < text.axes.bbox.y1
            ):
                break
        taken.append(box)
    return figure


with user_errors():
    folders = [
        word
        for word in sys.argv[1:]
        if os.path.isdir(word) or ('=' not in word and word[:1] != '-')
    ]
    configure(globals(), [word for word in sys.argv[1:] if word not in folders])
    labels = divided(names, ',') or [folder.rstrip('/') for folder in folders]
    # a folder's name may be no text
    labels = [label.encode(errors='replace').decode() for label in labels]
    if len(set(labels)) != len(folders) or not folders:
        raise ValueError(
            "give the out_dir of at least one run"
            if not folders
            else f"{len(folders)} runs, {len(set(labels))} names: names= takes one for each, with commas between"
        )
    runs = {label: read(Path(folder)) for label, folder in zip(labels, folders)}
    print(table(runs))
    try:
        figure = draw(runs)
    except ImportError as error:
        fail(f"{error}: pip install matplotlib")
    with files.replacing(out) as file:
        figure.savefig(file, format=Path(out).suffix[1:] or 'png')
    print(f"picture: {out}")
