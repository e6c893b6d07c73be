"""Draw what one or several runs logged, such as their losses, over wall time and over tokens.

    python plot.py out-shakespeare-char                   # writes out-shakespeare-char/loss.png
    python plot.py out-a out-b --names="small, large" --out=compared.svg
    python plot.py out-a --y=loss,lr,grad_norm,tokens_per_second     # one below the other

Only metrics.jsonl and config.json are needed. Points are evaluations and thin lines are training
steps, smoothed: each value is the mean of the nearest 2 % of the logged ones, except for lr.
Several runs without --out are drawn to ./loss.png.

Only evaluations log the wall time, and how much of it went into steps. Steps between two
evaluations are spread evenly over that time, from the first evaluation on; the rest is the second
evaluation's own. Steps after the last evaluation last as long as they were logged to.
"""

from system.errors import begin_script

begin_script()  # before the imports, which take seconds

import json
import sys
import textwrap
from pathlib import Path

from configurator import Texts, configure, divided
from system.errors import user_errors
from training import figures

# ---- settings ------------------------------------------------------------------------------------
y = 'loss'  # what to draw: loss (training and validation), or names in metrics.jsonl with commas
out = ''  # the picture: .png, .svg or .pdf; default: named after y, in the run's folder
names = Texts()  # labels of the runs, with commas between, or as a list; default: folder names
# --------------------------------------------------------------------------------------------------

TIME_UNITS = [(1, 'wall time (seconds)'), (60, 'wall time (minutes)'), (3600, 'wall time (hours)')]
TOKEN_UNITS = [
    (1, 'tokens'),
    (1e3, 'tokens (thousands)'),
    (1e6, 'tokens (millions)'),
    (1e9, 'tokens (billions)'),
]
STEP_STYLE = {'lw': 0.8, 'alpha': 0.7}
EVALUATION_STYLE = {'lw': 1.8, 'marker': 'o', 'ms': 4.5}


# ---- reading a run's log -------------------------------------------------------------------------


def read(folder, wanted):
    """Return {name: (points of steps, points of evaluations)} for the names in `wanted`.

    A point is (wall seconds, tokens, value). Raises ValueError if `folder` is not a run, or has not
    logged one of the names.
    """
    path = folder / 'metrics.jsonl'
    try:
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        tokens_per_step = config['resolved']['tokens_per_step']
        records = read_records(path)
        steps, evaluations = collect_points(records, tokens_per_step)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"{folder} holds no run of train.py: metrics.jsonl or config.json is missing or damaged"
        ) from None

    logged = steps.keys() | evaluations.keys() | {'loss'}
    evaluations['loss'] = evaluations.get('val_loss', [])
    result = {}
    for name in wanted:
        of_steps = steps.get(name, [])
        if name != 'lr':
            of_steps = smoothed(of_steps)
        of_evaluations = evaluations.get(name, [])
        if not of_steps and not of_evaluations:
            if not records:
                raise ValueError(f"{path} has no losses yet")
            groups = sorted({key.split('/')[0] for key in logged})  # update_ratio/* only once
            raise ValueError(f"{path} has no {name} (y=), but {', '.join(groups)}")
        result[name] = (of_steps, of_evaluations)
    return result


def read_records(path):
    """Return the lines of metrics.jsonl as dicts, without one that is still being written."""
    lines = path.read_text(encoding='utf-8', errors='replace').splitlines()
    records = [json.loads(line) for line in lines if line.endswith('}')]
    if len(records) < len(lines):
        print(f"{path}: a line that is only half written is left out", file=sys.stderr)
    return records


def collect_points(records, tokens_per_step):
    """Return (of steps, of evaluations), each {name: [(wall seconds, tokens, value)]}."""
    steps = {}
    evaluations = {}
    for record, time in zip(records, wall_times(records)):
        points = steps
        if 'val_loss' in record:
            points = evaluations
        for key, value in record.items():
            if value is not None:  # null stands for a value that was not finite
                point = (time, tokens_per_step * record['iter'], float(value))
                points.setdefault(key, []).append(point)
    return steps, evaluations


def wall_times(records):
    """Return the wall time in seconds of each record; see the top of this file."""
    if not records:
        return []
    evaluations = [record for record in records if 'val_loss' in record]
    last_step = records[0]['iter']  # up to which `wall` and `trained` have counted
    trained = 0.0  # seconds in steps
    wall = 0.0
    if evaluations:  # start-up comes before the first step
        wall = evaluations[0]['wall_seconds'] - evaluations[0]['train_seconds']

    times = []
    n_passed = 0  # evaluations
    for record in records:
        step = record['iter']
        if 'val_loss' in record:
            n_passed += 1
            last_step = step
            trained = record['train_seconds']
            wall = record['wall_seconds']
            times.append(wall)
        elif n_passed < len(evaluations):
            upcoming = evaluations[n_passed]
            share = (step - last_step) / max(1, upcoming['iter'] - last_step)
            times.append(wall + share * (upcoming['train_seconds'] - trained))
        else:
            if 'ms' in record:  # a step, not a skipped update or a rollback
                wall += (step + 1 - last_step) * record['ms'] / 1e3
                last_step = step + 1
            times.append(wall)
    return times


def smoothed(points):
    """Return the points with each value replaced by the mean of the nearest 2 %."""
    half_width = max(1, len(points) // 100)
    result = []
    for i, (time, tokens, _) in enumerate(points):
        reach = min(i, half_width)  # near the start: as many after as before
        near = points[i - reach : i + reach + 1]
        mean = sum(value for _, _, value in near) / len(near)
        result.append((time, tokens, mean))
    return result


# ---- drawing -------------------------------------------------------------------------------------


def draw(runs):
    """Return the figure of runs, {label: what `read` returned}: a row for each quantity."""
    quantities = list(next(iter(runs.values())))
    figure = figures.new_figure(
        width=12, height=2 + 3 * len(quantities), style={'axes.grid.axis': 'y'}
    )
    grid = figure.subplots(len(quantities), 2, sharex='col', sharey='row', squeeze=False)
    for column, units in enumerate([TIME_UNITS, TOKEN_UNITS]):
        size, unit = choose_unit(units, furthest(runs, column))
        grid[-1, column].set_xlabel(unit)
        for quantity, axes in zip(quantities, grid[:, column]):
            draw_quantity(axes, quantity, runs, column, size)
    for quantity, axes in zip(quantities, grid[:, 0]):
        axes.set_ylabel(quantity.replace('_', ' ').replace('loss', 'loss (nats per token)'))
    grid[0, 0].set_title(
        "points: validation, thin line: training, smoothed",
        fontsize=11,
        loc='left',
        color='#666666',
    )
    figure.align_ylabels()

    figure.draw_without_rendering()  # from here on the labels have a size
    for axes in figure.axes:
        make_room_for_labels(axes)
    for axes in figure.axes:
        place_labels(axes)
    return figure


def furthest(runs, column):
    """Return the largest wall time (column 0) or number of tokens (column 1) of all points."""
    largest = []
    for run in runs.values():
        for of_steps, of_evaluations in run.values():
            largest += [point[column] for point in of_steps + of_evaluations]
    return max(largest)


def choose_unit(units, largest):
    """Return the largest (size, label) of which `largest` is at least three, else the smallest."""
    chosen = units[0]
    for unit in units[1:]:
        if largest >= 3 * unit[0]:
            chosen = unit
    return chosen


def draw_quantity(axes, quantity, runs, column, size):
    """Draw one quantity of all runs over wall time or tokens, in units of `size`."""
    shown = []  # values that the y axis must include
    for i, (label, run) in enumerate(runs.items()):
        colour = figures.COLOURS[i % len(figures.COLOURS)]
        for points, style in zip(run[quantity], [STEP_STYLE, EVALUATION_STYLE]):
            if not points:
                continue
            xs = [point[column] / size for point in points]
            ys = [point[2] for point in points]
            axes.plot(xs, ys, color=colour, **style)
            n_skipped = 0
            if quantity != 'lr':  # high values of the first steps would flatten the rest
                n_skipped = len(ys) // 12
                if len(ys) > 2:
                    n_skipped += 1
            shown += ys[n_skipped:]
        text = f"{textwrap.fill(label, 20)} {short_value(ys[-1])}"
        figures.add_label(axes, text, point=(xs[-1], ys[-1]), offset=9, colour=colour)

    margin = 0.08 * (max(shown) - min(shown)) or 0.1 * abs(max(shown)) or 0.1
    axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.spines[['top', 'right']].set_visible(False)


def short_value(value):
    """Return a value as text of three or more digits."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 0.1:
        return f"{value:.3f}"
    return f"{value:.3g}"


def make_room_for_labels(axes):
    """Extend the x axis, which the rows share, so that labels at the curves' ends fit beside it."""
    width = axes.bbox.width
    ends = []
    for text in axes.texts:
        room = max(width - text.get_window_extent().width - 40, width / 3)
        ends.append(text.xy[0] * width / room)
    axes.set_xlim(0, max(*ends, axes.get_xlim()[1]))


def place_labels(axes):
    """Move each label as near to its curve's end as no curve and no other label lies."""
    curves = [line.get_transform().transform_path(line.get_path()) for line in axes.lines]

    def is_free(label, box):
        crosses = any(curve.intersects_bbox(box, filled=False) for curve in curves)
        return box.y0 > axes.bbox.y0 and not crosses

    figures.spread_labels(
        axes.texts,
        offset=9,
        heights=range(-100, 101, 2),
        box_of=lambda label: label.get_window_extent(),
        is_free=is_free,
        taken=[],
    )


def default_path(folders, quantities):
    """Return where to write the picture: the only run's folder, else the current one."""
    name = f"{'-'.join(quantities)}.png".replace('/', '-')
    if len(folders) == 1:
        return Path(folders[0], name)
    return Path(name)


with user_errors():
    folders, words = figures.split_command_line(sys.argv[1:])
    configure(globals(), words)
    quantities = [name.strip() for name in y.split(',') if name.strip()] or ['loss']
    quantities = list(dict.fromkeys(quantities))  # each once
    labelled = figures.label_runs(folders, divided(names, ','))

    runs = {label: read(folder, quantities) for label, folder in labelled.items()}
    figure = draw(runs)
    figures.save(figure, Path(out) if out else default_path(folders, quantities))
