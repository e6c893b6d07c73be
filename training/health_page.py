"""The page health.png that train.py --watch=True draws: updates, gradients, dead units, clipped
steps."""

import math

import numpy as np

RED = '#c23b22'
# left, bottom, width, height: fixed, because matplotlib takes seconds to compute a layout
PANELS = {
    'update': (0.04, 0.76, 0.23, 0.18),
    'norm': (0.04, 0.525, 0.23, 0.18),
    'dead': (0.04, 0.29, 0.23, 0.18),
    'clip': (0.04, 0.055, 0.23, 0.18),
    'shares': (0.35, 0.085, 0.64, 0.15),
    'activations': (0.45, 0.29, 0.2, 0.65),
    'gradients': (0.79, 0.29, 0.2, 0.65),
}
STYLE = {
    'font.size': 10,
    'axes.grid': True,
    'grid.color': '#e4e4e4',
    'axes.spines.top': False,
    'axes.axisbelow': True,
    'axes.spines.right': False,
    'axes.titlelocation': 'left',
    'axes.titlesize': 11,
}
LABEL_HEIGHT = 0.085  # of a line's name at its end, as a share of the panel's height


def draw(title, history, samples, matrices, grad_clip):
    """The page as a matplotlib figure.

    history: records of metrics.jsonl with what watch.py adds. samples: {activations/NAME or
    gradients/NAME: array of values}, for the histograms. matrices: names of parameters that have
    more than one dimension. grad_clip: the longest gradient, or 0.
    """
    import matplotlib
    import matplotlib.figure  # without pyplot, which would look for a display

    activations = _of_kind(samples, 'activations')
    gradients = _of_kind(samples, 'gradients')
    gradients = {name: values for name, values in gradients.items() if name in matrices}

    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(20, 13), dpi=100)
        figure.text(
            0.04,
            0.975,
            f"{title}     colours: from the input (dark) to the output (light)",
            fontsize=13,
            parse_math=False,
        )
        panels = {name: figure.add_axes(place) for name, place in PANELS.items()}

        _lines(panels['update'], history, 'update_ratio', matrices)
        panels['update'].axhline(-3, color=RED, lw=1.2, ls='--')
        panels['update'].set_title(
            "size of updates, log10(std(change) / std(matrix)): -3 is healthy"
        )

        _lines(panels['norm'], history, 'grad_norm')
        panels['norm'].set(yscale='log', title="length of the gradient, by layer")

        _lines(panels['dead'], history, 'saturated', lw=0.8, ls=':')
        _lines(panels['dead'], history, 'dead')
        panels['dead'].set(
            ylim=(-0.02, 1.02),
            title="share of dead units (flat for all examples); dotted: of flat activations",
        )

        _clipping(panels['clip'], history, grad_clip)
        _shares(panels['shares'], history, grad_clip)
        _activations(panels['activations'], activations)
        _gradients(panels['gradients'], gradients)
        for key in ('update', 'norm', 'dead'):
            _name_ends(panels[key])
    return figure


def _of_kind(samples, kind):
    """{name: values} of the samples called KIND/NAME."""
    prefix = f'{kind}/'
    return {
        name.removeprefix(prefix): values
        for name, values in samples.items()
        if name.startswith(prefix)
    }


def _colours(n):
    """n colours from dark to light."""
    import matplotlib

    return matplotlib.colormaps['viridis'](np.linspace(0, 0.82, max(1, n)))


# ---- values over steps ---------------------------------------------------------------------------


def _series(history, key):
    """(steps, values) of what was logged as `key`, smoothed a little where there are many.

    Each value becomes the mean of the finite ones near it.
    """
    steps = np.array([record['iter'] for record in history])
    values = np.array([record.get(key, math.nan) for record in history], float)
    is_finite = np.isfinite(values)
    window = np.ones(1 + 2 * (len(values) // 200))
    sums = np.convolve(np.where(is_finite, values, 0), window, 'same')
    counts = np.convolve(is_finite, window, 'same')
    with np.errstate(invalid='ignore'):  # 0 / 0 where nothing near is finite
        return steps, sums / counts


def _names(history, key):
    """The names NAME of what was logged as KEY/NAME, in the order in which they appear."""
    prefix = f'{key}/'
    names = {}  # a dict keeps the order
    for record in history:
        for logged in record:
            if logged.startswith(prefix):
                names[logged.removeprefix(prefix)] = None
    return list(names)


def _lines(axes, history, key, names=None, **style):
    """A line for each KEY/NAME, coloured by depth; names: which, or None for all."""
    if not names:
        names = _names(history, key)
    width = 1.6 if len(names) < 12 else 1.0
    marker = 'o' if len(history) < 3 else ''
    style = dict(lw=width, marker=marker, ms=4) | style
    for name, colour in zip(names, _colours(len(names))):
        steps, values = _series(history, f'{key}/{name}')
        label = name
        if key == 'saturated':  # dotted, and named by the line of the dead units
            label = '_'
        axes.plot(steps, values, color=colour, label=label, **style)
    if not names and key == 'dead':
        _say(axes, "there is no nonlinearity")
    axes.margins(x=0.01)


def _say(axes, text):
    """Text in the middle of a panel."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha='center')


def _name_ends(axes, most=8):
    """Name lines at their right end without overlap; of more than `most` the highest and lowest."""
    ends = []  # (last finite value, name, colour)
    for line in axes.lines:
        if line.get_label().startswith('_'):  # without a name
            continue
        values = line.get_ydata()
        values = values[np.isfinite(values)]
        if len(values):
            ends.append((values[-1], line.get_label(), line.get_color()))
    ends.sort(key=lambda end: end[0])
    if len(ends) > most:
        ends = ends[: most // 2] + ends[-most // 2 :]

    axes.get_ylim()  # computes the limits, which the transforms need
    height = -math.inf  # of the name below
    for i, (value, name, colour) in enumerate(ends):
        place = axes.transAxes.inverted().transform(axes.transData.transform((0, value)))[1]
        # low enough to leave room for the names above, and above the one below
        highest = 1 - LABEL_HEIGHT * (len(ends) - 1 - i)
        height = max(min(place, highest), height + LABEL_HEIGHT)
        axes.text(
            1.01, height, name, transform=axes.transAxes, color=colour, va='center', fontsize=9
        )


# ---- clipping ------------------------------------------------------------------------------------


def _clipping(axes, history, grad_clip):
    """The length of the gradient, and in how many steps it was longer than grad_clip."""
    steps, norms = _series(history, 'grad_norm')
    axes.plot(steps, norms, color='#1f5fa8', lw=1.2)
    axes.set(
        yscale='log',
        xlabel='step',
        title="length of the gradient, which is never clipped (grad_clip=0)",
    )
    axes.margins(x=0.01)
    counted = [record for record in history if 'clipped' in record]
    if not grad_clip or not counted:
        return

    axes.axhline(grad_clip, color=RED, lw=1.2, ls='--')
    right = axes.twinx()
    steps = [record['iter'] for record in counted]
    counts = [step - steps[0] + 1 for step in steps]
    shares = [record['clipped'] / n for record, n in zip(counted, counts)]
    right.fill_between(steps, shares, color=RED, alpha=0.12, lw=0)
    right.set(ylim=(0, 1), yticks=[0, 0.5, 1], yticklabels=['0', '50 %', '100 %'])
    right.grid(False)
    axes.set_title(
        f"gradient longer than {grad_clip:g} in {counted[-1]['clipped']} of {counts[-1]} steps "
        "(red: share)"
    )


def _shares(axes, history, grad_clip):
    """Which layers the clipped gradients are from, or all gradients where none was clipped."""
    records = [record for record in history if 0 < grad_clip < record['grad_norm'] < math.inf]
    which = " that were clipped"
    if not records:
        records = [record for record in history if 0 < record['grad_norm'] < math.inf]
        which = "; none was clipped"

    layers = _names(records[-1:], 'grad_norm')
    shares = []
    for layer in layers:
        norms = [record.get(f'grad_norm/{layer}', math.nan) for record in records]
        squares = [(norm / record['grad_norm']) ** 2 for norm, record in zip(norms, records)]
        shares.append(np.nanmean(squares))
    axes.bar(range(len(layers)), shares, color=_colours(len(layers)), width=0.75)
    axes.set_xticks(
        range(len(layers)),
        layers,
        rotation=90 if len(layers) > 14 else 0,
        fontsize=9 if len(layers) < 40 else 6,
    )
    axes.grid(False, axis='x')
    axes.set_title(
        f"share of the gradient's square, by layer: mean of {len(records)} logged steps{which}"
    )


# ---- histograms ----------------------------------------------------------------------------------


def _activations(axes, samples):
    """The histograms of activations."""
    axes.set_title("activations")
    _ridges(axes, samples, {name: _described(name, values) for name, values in samples.items()})


def _gradients(axes, samples):
    """The histograms of how large gradients are, on a logarithmic scale."""
    axes.set_title("gradients: log10 of their sizes")
    labels = {name: _described(name, values) for name, values in samples.items()}
    sizes = {}
    for name, values in samples.items():
        values = values[values != 0]
        if len(values):
            sizes[name] = np.log10(np.abs(values))
    _ridges(axes, sizes, labels)


def _described(name, values):
    return f"{name}   {values.mean():.2g} ± {values.std():.2g}"


def _ridges(axes, samples, labels):
    """A histogram of each of the samples {name: values} in a row, the first on top."""
    axes.text(-0.02, 1.02, "mean ± standard deviation", transform=axes.transAxes, ha='right')
    axes.set_yticks([])
    if not samples:
        _say(axes, "there are none")
        return

    spans = np.array([np.percentile(values, (0.1, 99.9)) for values in samples.values()])
    low = spans[:, 0].min()
    high = spans[:, 1].max()
    edges = np.linspace(low, high + (high - low or 1) * 1e-6, 61)
    middles = (edges[1:] + edges[:-1]) / 2
    n = len(samples)
    for row, (values, colour) in enumerate(zip(samples.values(), _colours(n))):
        # the square root: tails stay visible
        heights = np.sqrt(np.histogram(values, edges)[0] / len(values))
        axes.fill_between(
            middles,
            -row,
            -row + 0.95 * heights / max(heights.max(), 1e-9),
            color=colour,
            alpha=0.85,
            lw=0,
            zorder=row + 2,
        )

    # Of more than 60 rows only some are named.
    names = list(samples)
    rows = range(0, n, -(-n // 60))
    axes.set_yticks(
        [-row for row in rows], [labels[names[row]] for row in rows], fontsize=9 if n < 40 else 7
    )
    axes.set_ylim(1 - 1.02 * n, 1.05)
    axes.grid(False, axis='y')
