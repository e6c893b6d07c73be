"""Network health while training (train.py --watch=True): dead units, gradients, the size of
updates, clipped steps.

At each logged step it adds to the record in metrics.jsonl and the loggers:

    update_ratio/PARAMETER   log10(std(the step's change) / std(the parameter)): about -3 is
                             healthy, -1 too fast
    grad_norm/LAYER          length of the layer's gradient before clipping
    dead/ACTIVATION          share of units where the nonlinearity is flat for all examples: they
                             learn nothing
    saturated/ACTIVATION     share of single activations where it is flat
    clipped                  steps so far whose gradient was longer than grad_clip

and the same without the slash for the whole model: the median over matrices, the mean over
activations. At each evaluation it draws health.png, and writes histograms of activations and
gradients to health.jsonl and the loggers.

Activations are recorded below the model, where torch dispatches the operators of a forward pass
with one batch in eval mode. So no model needs code for it, also if it is compiled, distributed or
recomputed, and weights, buffers and random numbers stay as they are. The pages follow A. Karpathy's
lectures "Neural Networks: Zero to Hero", part 4.
"""

import importlib.util
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from system import files
from training import health_page

EXAMPLES = 512  # tokens per look at activations: enough to tell a dead unit from a rare one
SAMPLE = 10_000  # values of each tensor that go into its histogram
POINTS = 2000  # logged steps that the page keeps; above that every second one is dropped

# Where a nonlinearity y = f(x) is flat, so that hardly any gradient passes.
FLAT = {
    'relu': lambda x, y: y == 0,
    'tanh': lambda x, y: y.abs() > 0.97,
    'sigmoid': lambda x, y: (2 * y - 1).abs() > 0.97,  # a tanh, of half the input
    'gelu': lambda x, y: (x < -1) & (y > -0.01),  # below x = -2.7
    'silu': lambda x, y: (x < -1) & (y > -0.01),  # below x = -6.5
}


class Watch:
    """Observes a model as train.py trains it; with `is_on` false every method does nothing.

    out_dir: where it writes, and reads what a resumed run has logged before. ctx: the forward
    pass's autocast. data: a dataset.Dataset, whose first training batch shows the activations.
    clipped: the count of clipped steps of a resumed run. Raises ValueError without matplotlib.
    """

    def __init__(self, is_on, model, out_dir, grad_clip, ctx, data, clipped=0):
        self.clipped = clipped
        has_gradients = not model.fit and any(p.requires_grad for p in model.parameters())
        self.is_on = is_on and has_gradients
        if is_on and not has_gradients:
            print("watch: this model is counted, it has no gradients to watch", flush=True)
        if not self.is_on:
            return
        if not importlib.util.find_spec('matplotlib'):
            raise ValueError("watch=True draws its page with matplotlib: pip install matplotlib")

        self.model = model
        self.folder = Path(out_dir)
        self.grad_clip = grad_clip
        self.ctx = ctx
        self.parameters = {}
        for name, p in zip(_short_names(model), model.parameters()):
            if p.requires_grad:
                self.parameters[name] = p
        self.matrices = [name for name, p in self.parameters.items() if p.dim() > 1]
        if not self.matrices:
            self.matrices = list(self.parameters)

        self.idx = self._examples(data.train_batch(0, 0)[0])
        self.samples = {}  # {gradients/… or activations/…: values of the last logged step}
        self.history = []  # records of logged steps
        for record in _read(self.folder / 'metrics.jsonl'):
            if 'update_ratio' in record:
                self._remember(record)

    def _examples(self, idx):
        """The part of idx (B, T) to look at activations with, on the model's device.

        It has at most EXAMPLES tokens, and a T that differs from every width of the model, so that
        the recorder can tell a tensor's dimensions apart.
        """
        widths = set()
        for p in self.parameters.values():
            widths.update(p.shape)
        T = idx.shape[1]
        while T > 0 and T in widths:
            T -= 1
        if T == 0:
            T = idx.shape[1]
        rows = max(1, EXAMPLES // T)
        return torch.tensor(idx[:rows, :T], device=next(self.model.parameters()).device)

    def _remember(self, record):
        self.history.append(
            {key: math.nan if value is None else value for key, value in record.items()}
        )
        if len(self.history) > POINTS:
            del self.history[1::2]

    def before_step(self, is_logged):
        """Keep the parameters, and measure the gradients, which are whole and not yet clipped."""
        if not self.is_on or not is_logged:
            return
        self.before = [p.detach().clone() for p in self.parameters.values()]
        grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(grads.values()))).tolist()
        squares = {}  # of each layer's gradient
        for name, norm in zip(grads, norms):
            layer = _layer(name)
            squares[layer] = squares.get(layer, 0.0) + norm * norm
        self.norms = {layer: math.sqrt(square) for layer, square in squares.items()}
        for name, grad in grads.items():
            self.samples[f'gradients/{name}'] = _sample(grad)

    def count_clipped(self, grad_norm):
        """Count a step that is clipped, by its gradient's length (a 0-dimensional tensor).

        It does not wait for the device: `clipped` is a tensor then.
        """
        if self.is_on and self.grad_clip:
            is_clipped = (grad_norm > self.grad_clip) & (grad_norm < math.inf)
            self.clipped = self.clipped + is_clipped

    @torch.no_grad()
    def after_step(self, record):
        """What the optimizer did and the activations after it: {key: number}, to be logged.

        record: the step's record so far, with iter and grad_norm.
        """
        if not self.is_on:
            return {}
        ratios = []
        for p, before in zip(self.parameters.values(), self.before):
            change = p.float() - before.float()
            ratios.append(change.std(correction=0) / before.float().std(correction=0))
        ratios = dict(zip(self.parameters, torch.stack(ratios).log10().tolist()))
        del self.before

        health = {'update_ratio': _median([ratios[name] for name in self.matrices])}
        health |= {f'update_ratio/{name}': ratio for name, ratio in ratios.items()}
        health |= {f'grad_norm/{layer}': norm for layer, norm in self.norms.items()}
        if self.grad_clip:
            self.clipped = int(self.clipped)
            health['clipped'] = self.clipped

        stats = activation_stats(self.model, self.idx, self.ctx)
        if stats:
            for key in ('dead', 'saturated'):
                shares = torch.stack([getattr(one, key) for one in stats.values()]).tolist()
                health[key] = sum(shares) / len(shares)
                health |= {f'{key}/{name}': share for name, share in zip(stats, shares)}
        for name, one in stats.items():
            self.samples[f'activations/{name}'] = one.values

        for key, value in health.items():
            if isinstance(value, float):
                health[key] = float(f'{value:.4g}')
        finite = {key: value if math.isfinite(value) else None for key, value in health.items()}
        self._remember(finite | {'iter': record['iter'], 'grad_norm': record['grad_norm']})
        return health

    def draw(self, step):
        """Draw health.png, and add the histograms of `step` to health.jsonl.

        Returns {gradients/… or activations/…: array of the values in the histogram}.
        """
        if not self.is_on or not self.samples:
            return {}
        samples = {}
        for name, tensor in self.samples.items():
            values = tensor.float().cpu().numpy().astype(float)
            values = values[np.isfinite(values)]
            if len(values):
                samples[name] = values

        # Later lines are of a part of the run that was lost, before it was resumed.
        lines = [line for line in _read(self.folder / 'health.jsonl') if line['iter'] < step]
        lines.append(
            {'iter': step} | {name: _histogram(values) for name, values in samples.items()}
        )
        with files.replacing(self.folder / 'health.jsonl') as file:
            file.writelines(json.dumps(line).encode() + b'\n' for line in lines)

        folder = self.folder.name.encode(errors='replace').decode()  # a name may not be text
        figure = health_page.draw(
            title=f"{folder}: {type(self.model).__name__}, step {self.history[-1]['iter']}",
            history=self.history,
            samples=samples,
            matrices=self.matrices,
            grad_clip=self.grad_clip,
        )
        with files.replacing(self.folder / 'health.png') as file:
            figure.savefig(file, format='png')
        return samples


# ---- activations ---------------------------------------------------------------------------------


class ActivationStats(NamedTuple):
    """What one nonlinearity did, as tensors on the model's device."""

    dead: torch.Tensor  # share of units that are flat for all examples
    saturated: torch.Tensor  # share of activations that are flat
    values: torch.Tensor  # some activations


@torch.no_grad()
def activation_stats(model, idx, ctx):
    """{name: ActivationStats} of each nonlinearity in a forward pass of idx (B, T), in order.

    The model runs in eval mode, under the context manager ctx (autocast).
    """
    was_training = model.training
    recorder = _Recorder(model, idx.size(1))

    def enter(name):
        def hook(module, inputs):
            recorder.modules.append(name)

        return hook

    def leave(module, inputs, output):
        recorder.modules.pop()

    hooks = []
    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(enter(name)))
            hooks.append(module.register_forward_hook(leave))
    try:
        model.eval()
        with ctx, recorder:
            model.forward(idx, idx)  # not the compiled call
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return recorder.stats()


class _Recorder(TorchDispatchMode):
    """Sees every operator of a forward pass, and records those of FLAT by the module that they are
    in.

    model: for the width of its logits. T: the length of the examples.
    """

    def __init__(self, model, T):
        super().__init__()
        self.V = model.config.vocab_size
        self.T = T
        self.modules = ['']  # the names of the modules being called, the innermost last
        # {name: [(which units are dead, share of flat activations, some values) of each call]}
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        op = name.removesuffix('_')
        is_flat = FLAT.get(op)
        if is_flat is None:
            return func(*args, **(kwargs or {}))
        x = args[0]
        if name.endswith('_'):  # in place
            x = x.clone()
        y = func(*args, **(kwargs or {}))
        self._record(op, y, is_flat(x, y))
        return y

    def _record(self, op, y, flat):
        """Record the output y of an operator, and where it is flat; not if y has no units."""
        if y.dim() == 3 and y.size(-1) == self.T != y.size(1):  # (B, C, T), of a convolution
            y = y.mT
            flat = flat.mT
        if y.dim() < 2:
            return
        is_attention = y.size(-1) == self.T  # scores (…, T, T)
        is_logits = self.modules == [''] and y.size(-1) == self.V  # soft-capped, outside modules
        if is_attention or is_logits:
            return
        module = self.modules[-1].removesuffix(op).rstrip('.')
        name = _short(f'{module}.{op}').lstrip('.')
        flat = flat.flatten(0, -2)  # (examples, units)
        call = flat.all(0), flat.float().mean(), _sample(y)
        self.calls.setdefault(name, []).append(call)

    def stats(self):
        """{name: ActivationStats}; calls of one module after the first get numbers."""
        stats = {}
        for name, calls in self.calls.items():
            if len(calls) >= self.T > 1:  # a recurrence: the calls are examples of the same units
                dead, saturated, values = zip(*calls)
                calls = [(torch.stack(dead).all(0), torch.stack(saturated).mean(), values[-1])]
            for i, (dead, saturated, values) in enumerate(calls, 1):
                numbered = name if i == 1 else f'{name}_{i}'
                stats[numbered] = ActivationStats(dead.float().mean(), saturated, values)
        return stats


# ---- names and numbers ---------------------------------------------------------------------------


def _short(name):
    """A parameter's or module's name without the parts that all have."""
    return name.removeprefix('transformer.').removesuffix('.weight')


def _short_names(model):
    """The short names of the model's parameters, or the full ones where two would be the same."""
    names = [name for name, _ in model.named_parameters()]
    short = [_short(name) for name in names]
    if len(set(short)) < len(names):
        return names
    return short


def _layer(name):
    """The layer that a parameter belongs to: h.0 of h.0.attn.c_attn, ln_f of ln_f.bias."""
    parts = name.split('.')
    for i, part in enumerate(parts):
        if part.isdigit():
            return '.'.join(parts[: i + 1])
    return parts[0]


def _median(values):
    """The median of the finite values; NaN if there are none."""
    values = [value for value in values if math.isfinite(value)]
    return float(np.median(values)) if values else math.nan


def _sample(tensor):
    """Up to SAMPLE values of a tensor, evenly spread."""
    flat = tensor.detach().flatten()
    stride = -(-len(flat) // SAMPLE)
    stride |= 1  # odd, so that the values are from all columns
    return flat[::stride].clone()


def _histogram(values, bins=40):
    """The histogram of an array of values as plain types for JSON."""
    counts, edges = np.histogram(values, bins)
    return dict(
        mean=float(f'{values.mean():.4g}'),
        std=float(f'{values.std():.4g}'),
        low=edges[0],
        high=edges[-1],
        counts=counts.tolist(),
    )


def _read(path):
    """The records in a file of JSON lines, without damaged ones."""
    if not path.exists():
        return
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and 'iter' in record:
            yield record
