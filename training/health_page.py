"""The page health.png that train.py --watch=True draws: updates, gradients, dead units, clipped
steps."""

import math

import numpy as np

RED = '#c23b22'
# left, bottom, width, height: fixed, because matplotlib takes seconds to work a layout out
PANELS = {
    'update': (0.04, 0.76, 0.23, 0.18),
    'norm': (0.04, 0.525, 0.23, 0.18),
    'dead': (0.04, 0.29, 0.23, 0.18),
    'clip': (0.04, 0.055, 0.23, 0.18),
    'shares': (0.35, 0.085, 0.64, 0.15),
    'activations': (0.45, 0.29, 0.2, 0.65),
    'gradients': (0.79, 0.29, 0.2, 0.65),
}


def draw(title, history, samples, matrices, grad_clip):
    """The figure: `history` are lines of metrics.jsonl, samples {activations/… or gradients/…:
    values}."""
    import matplotlib
    import matplotlib.figure  # without pyplot, which would look for a display

    style = {
        'font.size': 10,
        'axes.grid': True,
        'grid.color': '#e4e4e4',
        'axes.spines.top': False,
        'axes.axisbelow': True,
        'axes.spines.right': False,
        'axes.titlelocation': 'left',
        'axes.titlesize': 11,
    }
    with matplotlib.rc_context(style):
        figure = matplotlib.figure.Figure(figsize=(20, 13), dpi=100)
        figure.text(
            0.04,
            0.975,
            f"{title}     colours: from the input (dark) to the output (light)",
            fontsize=13,
            parse_math=False,
        )
        at = {name: figure.add_axes(place) for name, place in PANELS.items()}
        _lines(at['update'], history, 'update_ratio', matrices)
        at['update'].axhline(-3, color=RED, lw=1.2, ls='--')
        at['update'].set_title("size of updates, log10(std(change) / std(matrix)): -3 is healthy")
        _lines(at['norm'], history, 'grad_norm')
        at['norm'].set(yscale='log', title="length of the gradient, by layer")
        _lines(at['dead'], history, 'saturated', lw=0.8, ls=':')
        _lines(at['dead'], history, 'dead')
        at['dead'].set(
            ylim=(-0.02, 1.02),
            title="share of dead units (flat for all examples); dotted: of flat activations",
        )
        _clipping(at['clip'], history, grad_clip)
        _shares(at['shares'], history, grad_clip)
        for kind in ('activations', 'gradients'):
            found = {
                name.split('/', 1)[1]: values
                for name, values in samples.items()
                if name.startswith(kind)
            }
            _ridges(
                at[kind],
                {
                    name: values
                    for name, values in found.items()
                    if kind[0] == 'a' or name in matrices
                },
                kind,
            )
        for key in ('update', 'norm', 'dead'):
            _name_ends(at[key])
    return figure


def _colours(n):
    import matplotlib

    return matplotlib.colormaps['viridis'](np.linspace(0, 0.82, max(1, n)))


def _series(history, key):
    """(steps, values) of what has been logged as `key`; smoothed a little where there are many."""
    values = np.array([line.get(key, math.nan) for line in history], float)
    good, near = np.isfinite(values), np.ones(1 + 2 * (len(values) // 200))
    with np.errstate(invalid='ignore'):  # 0 / 0 where nothing near was finite
        means = np.convolve(np.where(good, values, 0), near, 'same') / np.convolve(
            good, near, 'same'
        )
    return np.array([line['iter'] for line in history]), means


def _lines(axes, history, key, names=None, **style):
    """A line for each KEY/NAME, coloured by depth."""
    names = names or list(
        dict.fromkeys(
            k.split('/', 1)[1] for line in history for k in line if k.startswith(f'{key}/')
        )
    )
    for name, colour in zip(names, _colours(len(names))):
        style = (
            dict(lw=1.6 if len(names) < 12 else 1.0, marker='o' if len(history) < 3 else '', ms=4)
            | style
        )
        axes.plot(
            *_series(history, f'{key}/{name}'),
            color=colour,
            label=name if key != 'saturated' else '_',
            **style,
        )
    if not names and key == 'dead':
        axes.text(0.5, 0.5, "no nonlinearity was seen", transform=axes.transAxes, ha='center')
    axes.margins(x=0.01)


def _name_ends(axes, most=8):
    """Name a few lines at their right end, the highest and the lowest where there are many; no two
    in one place."""
    ends = [
        (line.get_ydata(), line.get_label(), line.get_color())
        for line in axes.lines
        if line.get_label()[0] != '_'
    ]
    ends = [
        (values[np.isfinite(values)][-1], *rest)
        for values, *rest in ends
        if np.isfinite(values).any()
    ]
    ends = sorted(ends, key=lambda end: end[0])
    if len(ends) > most:
        ends = ends[: most // 2] + ends[-most // 2 :]
    axes.get_ylim()  # works the limits out
    up = -math.inf
    for i, (value, name, colour) in enumerate(ends):
        place = axes.transAxes.inverted().transform(axes.transData.transform((0, value)))[1]
        up = max(min(place, 1 - 0.085 * (len(ends) - 1 - i)), up + 0.085)
        axes.text(1.01, up, name, transform=axes.transAxes, color=colour, va='center', fontsize=9)


def _clipping(axes, history, grad_clip):
    """The length of the gradient, and how many steps it was too long in."""
    axes.plot(*_series(history, 'grad_norm'), color='#1f5fa8', lw=1.2)
    axes.set(
        yscale='log',
        xlabel='step',
        title="length of the gradient, which is never cut (grad_clip=0)",
    )
    axes.margins(x=0.01)
    counted = [line for line in history if 'clipped' in line]
    if not grad_clip or not counted:
        return
    axes.axhline(grad_clip, color=RED, lw=1.2, ls='--')
    right = axes.twinx()
    steps = [line['iter'] - counted[0]['iter'] + 1 for line in counted]
    right.fill_between(
        [line['iter'] for line in counted],
        [line['clipped'] / n for line, n in zip(counted, steps)],
        color=RED,
        alpha=0.12,
        lw=0,
    )
    right.set(ylim=(0, 1), yticks=[0, 0.5, 1], yticklabels=['0', '50 %', '100 %'])
    right.grid(False)
    axes.set_title(
        f"gradient longer than {grad_clip:g} in {counted[-1]['clipped']} of {steps[-1]} steps (red: share)"
    )


def _shares(axes, history, grad_clip):
    """Whose gradient it is that is cut."""
    cut = [line for line in history if 0 < grad_clip < line['grad_norm'] < math.inf]
    lines = cut or [line for line in history if 0 < line['grad_norm'] < math.inf]
    layers = [key for key in (lines[-1] if lines else {}) if key.startswith('grad_norm/')]
    shares = [
        np.nanmean([(line.get(key, math.nan) / line['grad_norm']) ** 2 for line in lines])
        for key in layers
    ]
    axes.bar(range(len(layers)), shares, color=_colours(len(layers)), width=0.75)
    axes.set_xticks(
        range(len(layers)),
        [key.split('/', 1)[1] for key in layers],
        rotation=90 if len(layers) > 14 else 0,
        fontsize=9 if len(layers) < 40 else 6,
    )
    axes.grid(False, axis='x')
    axes.set_title(
        f"share of the gradient's square, by layer: mean of {len(lines)} logged steps"
        + (" that were cut" if cut else "; none was cut")
    )


def _ridges(axes, samples, kind):
    """A histogram in each row, the input's on top: of activations, or of how large gradients
    are."""
    names = {
        name: f"{name}   {values.mean():.2g} ± {values.std():.2g}"
        for name, values in samples.items()
    }
    if kind == 'gradients':
        samples = {name: np.log10(np.abs(values[values != 0])) for name, values in samples.items()}
        samples = {name: values for name, values in samples.items() if len(values)}
    axes.set_title("activations" if kind == 'activations' else "gradients: log10 of their sizes")
    axes.text(-0.02, 1.02, "mean ± standard deviation", transform=axes.transAxes, ha='right')
    axes.set_yticks([])
    if not samples:
        axes.text(0.5, 0.5, "none was seen", transform=axes.transAxes, ha='center')
        return
    spans = np.array([np.percentile(values, (0.1, 99.9)) for values in samples.values()])
    low, high = spans[:, 0].min(), spans[:, 1].max()
    edges = np.linspace(low, high + (high - low or 1) * 1e-6, 61)
    middles, n = (edges[1:] + edges[:-1]) / 2, len(samples)
    for row, (values, colour) in enumerate(zip(samples.values(), _colours(n))):
        # the root: tails stay visible
        counts = np.sqrt(np.histogram(values, edges)[0] / len(values))
        axes.fill_between(
            middles,
            -row,
            -row + 0.95 * counts / max(counts.max(), 1e-9),
            color=colour,
            alpha=0.85,
            lw=0,
            zorder=row + 2,
        )
    rows = range(0, n, -(-n // 60))
    axes.set_yticks(
        [-row for row in rows],
        [names[list(samples)[row]] for row in rows],
        fontsize=9 if n < 40 else 7,
    )
    axes.set_ylim(1 - 1.02 * n, 1.05)
    axes.grid(False, axis='y')
