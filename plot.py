"""Loss curves of one or several runs, or whatever else they logged, over wall time and over tokens,
as a picture.

    python plot.py out-shakespeare-char                                     # makes out-shakespeare-char/loss.png
    python plot.py out-a out-b --names="small, large" --out=compared.svg    # without --out: ./loss.png
    python plot.py out-a --y=loss,lr,grad_norm,tokens_per_second            # one below the other

It needs metrics.jsonl and config.json, no more. Points are evaluations, thin lines steps: each
value the mean of 2 % of the logged ones around it, but lr's. The log has the wall time of
evaluations, and how much of it went into steps: those between two are spread evenly over that time
from the first on, the rest is the second's; those after the last take what was logged.
"""

from system.errors import begin_script

begin_script()  # before the imports, which take seconds

import json
import os
import sys
import textwrap
from pathlib import Path

from configurator import Texts, configure, divided
from system import files
from system.errors import fail, user_errors

# ---- settings ------------------------------------------------------------------------------------
y = 'loss'  # what to draw: loss (training and validation), or names in metrics.jsonl with commas
out = ''  # the picture: .png, .svg or .pdf; default: named after y, in the run's folder
names = Texts()  # labels of the runs, with commas between, or as a list; default: folder names
# --------------------------------------------------------------------------------------------------

COLOURS = '#1f5fa8', '#d1602c', '#3a8a4d', '#8a4fa3', '#a8842c', '#3f98a0', '#b0476a', '#666666'
UNITS = (
    [(1, 'wall time (seconds)'), (60, 'wall time (minutes)'), (3600, 'wall time (hours)')],
    [
        (1, 'tokens'),
        (1e3, 'tokens (thousands)'),
        (1e6, 'tokens (millions)'),
        (1e9, 'tokens (billions)'),
    ],
)


def read(folder, wanted):
    """What a run logged, {name in wanted: (of steps, of evaluations)}, each a list of (wall
    seconds, tokens, value)."""
    path, steps, evaluations = folder / 'metrics.jsonl', {}, {}
    try:
        tokens = json.loads((folder / 'config.json').read_text(encoding='utf-8'))['resolved'][
            'tokens_per_step'
        ]
        lines = path.read_text(encoding='utf-8', errors='replace').splitlines()
        records = [json.loads(line) for line in lines if line.endswith('}')]
        if len(records) < len(lines):
            print(f"{path}: a line that is only half written is left out", file=sys.stderr)
        ahead = [record for record in records if 'val_loss' in record]
        # what comes before the first step
        wall = ahead[0]['wall_seconds'] - ahead[0]['train_seconds'] if ahead else 0.0
        done, trained = records[0]['iter'] if records else 0, 0.0
        for record in records:
            now, step = wall, record['iter']
            if ahead and record is ahead[0]:
                done, trained, now = step, record['train_seconds'], record['wall_seconds']
                wall = ahead.pop(0)['wall_seconds']
            elif ahead:
                now += (
                    (step - done)
                    / max(1, ahead[0]['iter'] - done)
                    * (ahead[0]['train_seconds'] - trained)
                )
            else:
                now = wall = wall + (step + 1 - done) * record['ms'] / 1e3
                done = step + 1
            # null: it was not finite
            for key in {key for key, value in record.items() if value is not None}:
                points = (evaluations if 'val_loss' in record else steps).setdefault(key, [])
                points.append((now, tokens * step, float(record[key])))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"{folder} holds no run of train.py: metrics.jsonl or config.json is missing or damaged"
        ) from None
    evaluations['loss'], found = evaluations.get('val_loss', []), {}
    for name in wanted:
        raw, reach = (
            steps.get(name, []),
            max(1, len(steps.get(name, [])) // 100) if name != 'lr' else 0,
        )
        # as many behind as before
        near = [raw[i - min(i, reach) : i + min(i, reach) + 1] for i in range(len(raw))]
        found[name] = (
            [
                (*point[:2], sum(p[2] for p in points) / len(points))
                for point, points in zip(raw, near)
            ],
            evaluations.get(name, []),
        )
        if not any(found[name]):
            there = sorted({key.split('/')[0] for key in steps | evaluations})  # layers' once
            raise ValueError(
                f"{path} has no "
                + (f"{name} (y=), but {', '.join(there)}" if records else "losses yet")
            )
    return found


def draw(runs):
    """The figure of runs, {run: what `read` found}: a row for each quantity."""
    import matplotlib.figure  # without pyplot, which would look for a display

    matplotlib.rcParams.update(
        {'font.size': 12, 'axes.grid': True, 'axes.grid.axis': 'y', 'grid.color': '#e4e4e4'}
    )
    wanted = list(next(iter(runs.values())))
    figure = matplotlib.figure.Figure(
        figsize=(12, 2 + 3 * len(wanted)), dpi=150, layout='constrained'
    )
    grid = figure.subplots(len(wanted), 2, sharex='col', sharey='row', squeeze=False)
    for column, units in enumerate(UNITS):
        most = max(
            point[column]
            for run in runs.values()
            for found in run.values()
            for points in found
            for point in points
        )
        size, unit = [unit for unit in units if unit is units[0] or most >= 3 * unit[0]][-1]
        grid[-1, column].set_xlabel(unit)
        for quantity, axes in zip(wanted, grid[:, column]):
            heights = []
            for (name, run), colour in zip(runs.items(), COLOURS * len(runs)):
                for points, style in zip(
                    run[quantity], (dict(lw=0.8, alpha=0.7), dict(lw=1.8, marker='o', ms=4.5))
                ):
                    if points:
                        x, y = (
                            [point[column] / size for point in points],
                            [point[2] for point in points],
                        )
                        axes.plot(x, y, color=colour, **style)
                        # the first would press the rest
                        heights += y[(quantity != 'lr') * (len(y) // 12 + (len(y) > 2)) :]
                last = (
                    f"{y[-1]:,.0f}"
                    if abs(y[-1]) >= 100
                    else f"{y[-1]:.3f}"
                    if abs(y[-1]) >= 0.1
                    else f"{y[-1]:.3g}"
                )
                axes.annotate(
                    f"{textwrap.fill(name, 20)} {last}",
                    (x[-1], y[-1]),
                    (9, 0),
                    textcoords='offset points',
                    color=colour,
                    va='center',
                    parse_math=False,
                    in_layout=False,
                )
            margin = 0.08 * (max(heights) - min(heights)) or 0.1 * abs(max(heights)) or 0.1
            axes.set_ylim(min(heights) - margin, max(heights) + margin)
            axes.spines[['top', 'right']].set_visible(False)
            axes.set_ylabel(
                ''
                if column
                else quantity.replace('_', ' ').replace('loss', 'loss (nats per token)')
            )
    grid[0, 0].set_title(
        "points: validation, thin line: training, smoothed",
        fontsize=11,
        loc='left',
        color='#666666',
    )
    figure.align_ylabels()
    figure.draw_without_rendering()  # now the texts have a size
    for axes in figure.axes:
        width = axes.bbox.width
        ends = [
            text.xy[0] * width / max(width - text.get_window_extent().width - 40, width / 3)
            for text in axes.texts
        ]
        axes.set_xlim(0, max(*ends, axes.get_xlim()[1]))  # which the rows share
    for axes in figure.axes:
        taken, curves = (
            [],
            [line.get_transform().transform_path(line.get_path()) for line in axes.lines],
        )
        for text in axes.texts:  # as near to the curve's end as there is no curve and no other text
            for up in sorted(range(-100, 101, 2), key=abs):
                text.set_position((9, up))
                box = text.get_window_extent()
                if (
                    box.y0 > axes.bbox.y0
                    and not any(map(box.overlaps, taken))
                    and not any(curve.intersects_bbox(box, filled=False) for curve in curves)
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
    wanted = list(dict.fromkeys(name.strip() for name in y.split(',') if name.strip())) or ['loss']
    labels = divided(names, ',') or [folder.rstrip('/') for folder in folders]
    # a folder's name may be no text
    labels = [label.encode(errors='replace').decode() for label in labels]
    if len(set(labels)) != len(folders) or not folders:
        raise ValueError(
            f"{len(folders)} runs, {len(set(labels))} names: give the out_dir of each run, and --names of as "
            "many, or none"
        )
    path = Path(
        out
        or Path(
            folders[0] if len(folders) == 1 else '', f"{'-'.join(wanted)}.png".replace('/', '-')
        )
    )
    runs = {label: read(Path(folder), wanted) for label, folder in zip(labels, folders)}
    try:
        figure = draw(runs)
    except ImportError as error:
        fail(f"{error}: pip install matplotlib")
    with files.replacing(path) as file:
        figure.savefig(file, format=path.suffix[1:] or 'png')
    print(f"picture: {path}")
