"""Finished runs side by side: a table, and a picture of validation loss over parameters and time.

    python compare.py out-zoo-*              # prints a Markdown table and writes ./compare.png
    python compare.py out-a out-b --names="small, large" --out=two.svg

Only metrics.jsonl and config.json of each run are needed. The loss is that of the last evaluation,
which a finished run makes over the whole validation split. The time is that of the steps, without
start-up and evaluations.
"""

from system.errors import begin_script

begin_script()  # before the imports, which take seconds

import json
import sys

from configurator import Texts, configure, divided
from system.errors import user_errors
from training import figures
from training.console import seconds, short

# ---- settings ------------------------------------------------------------------------------------
out = 'compare.png'  # the picture, .png, .svg or .pdf
names = Texts()  # labels of the runs, with commas between, or as a list; default: folder names
# --------------------------------------------------------------------------------------------------


def read(folder):
    """Return (config, result) of a run: its config.json, and what its last evaluation logged.

    result: {parameters, tokens, seconds, loss, bpb}. Raises ValueError if there is no evaluation.
    """
    try:
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        log = (folder / 'metrics.jsonl').read_text(encoding='utf-8', errors='replace')
        evaluations = [
            line for line in log.splitlines() if '"val_loss"' in line and line.endswith('}')
        ]
        last = json.loads(evaluations[-1])
        result = {
            'parameters': config['resolved']['n_params'],
            'tokens': last['tokens'],
            'seconds': last['train_seconds'],
            'loss': float(last['val_loss']),
            'bpb': last['val_bpb'],
        }
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(
            f"{folder} holds no evaluated run of train.py: metrics.jsonl or config.json is "
            "missing, damaged or has no validation loss"
        ) from None
    return config, result


def table(runs):
    """Return a Markdown table of runs, {label: what `read` returned}, the lowest loss last."""
    rows = [
        "| run | model | parameters | tokens | time | tokens/s | validation loss | bits per byte |",
        '|---' * 8 + '|',
    ]
    for label, (config, result) in sorted(runs.items(), key=lambda item: -item[1][1]['loss']):
        bpb = ''
        if result['bpb']:
            bpb = f"{result['bpb']:.4f}"
        cells = [
            label,
            config['model'],
            short(result['parameters']),
            short(result['tokens']),
            seconds(result['seconds']),
            short(result['tokens'] / max(result['seconds'], 1e-9)),
            f"{result['loss']:.4f}",
            bpb,
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return '\n'.join(rows)


def draw(runs):
    """Return the figure: each run is a point over its parameters, and one over its time."""
    figure = figures.new_figure(width=14, height=7, style={'axes.grid.axis': 'both'})
    by_size, by_time = figure.subplots(1, 2, sharey=True)
    n_params = [result['parameters'] for _, result in runs.values() if result['parameters']]
    labels = draw_points(by_size, runs, 'parameters', least=min(n_params, default=4) / 4)
    labels += draw_points(by_time, runs, 'seconds', least=0.1)
    by_size.set_xlabel('parameters (counted models have none: at the left edge)')
    by_size.set_ylabel('validation loss (nats per token)')
    by_time.set_xlabel('training time (seconds)')
    place_labels(figure, labels)
    return figure


def draw_points(axes, runs, key, least):
    """Draw each run's loss over result[key], or over `least` where that is less.

    Runs of one model have one colour. Returns the labels of the points.
    """
    models = list(dict.fromkeys(config['model'] for config, _ in runs.values()))
    labels = []
    for name, (config, result) in runs.items():
        colour = figures.COLOURS[models.index(config['model']) % len(figures.COLOURS)]
        point = (max(result[key], least), result['loss'])
        axes.plot(*point, 'o', color=colour, ms=7)
        leader = {'arrowstyle': '-', 'color': colour, 'lw': 0.6, 'shrinkA': 0, 'shrinkB': 4}
        labels.append(
            figures.add_label(
                axes, name, point=point, offset=8, colour=colour, arrowprops=leader, fontsize=10
            )
        )
    axes.set_xscale('log')
    axes.spines[['top', 'right']].set_visible(False)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.25)  # room for the labels
    return labels


def place_labels(figure, labels):
    """Move each label as near to its point as no point and no other label lies."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # from here on the labels have a size
    renderer = FigureCanvasAgg(figure).get_renderer()
    points = [label.axes.transData.transform(label.xy) for label in labels]

    def box_of(label):
        label.update_positions(renderer)
        return Text.get_window_extent(label, renderer)  # without the line to its point

    def is_free(label, box):
        axes_box = label.axes.bbox
        return axes_box.y0 < box.y0 and box.y1 < axes_box.y1

    figures.spread_labels(
        labels,
        offset=14,
        heights=range(-150, 151, 3),
        box_of=box_of,
        is_free=is_free,
        taken=[Bbox([point - 10, point + 10]) for point in points],
    )


with user_errors():
    folders, words = figures.split_command_line(sys.argv[1:])
    configure(globals(), words)
    labelled = figures.label_runs(folders, divided(names, ','))

    runs = {label: read(folder) for label, folder in labelled.items()}
    print(table(runs))
    figures.save(draw(runs), out)
