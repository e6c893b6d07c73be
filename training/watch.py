"""Network health while training (train.py --watch=True): dead units, gradients, the size of
updates, clipped steps.

At each logged step, into metrics.jsonl and to the loggers:
    update_ratio/PARAMETER   log10(std(what the step changed) / std(the parameter)); about -3 is healthy, -1 too fast
    grad_norm/LAYER          length of the layer's gradient before clipping
    dead/ACTIVATION          share of units where the nonlinearity is flat for all examples: they learn nothing
    saturated/ACTIVATION     share of single activations where it is
    clipped                  steps so far whose gradient was longer than grad_clip
and without the slash the whole model: the median of matrices, the means over activations. At each
evaluation also the page health.png, and histograms of activations and gradients: a line in
health.jsonl, and to the loggers.

Activations are looked at from outside, with one batch in eval mode, under the operators of the
forward pass: so no model needs a word for it, compiled, distributed and recomputed ones included,
and neither weights, buffers nor random numbers know that somebody looks. Idea of the pages: A.
Karpathy's lectures "Neural Networks: Zero to Hero", part 4.
"""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from system import files
from training import health_page

EXAMPLES = 512  # tokens to look at activations with: enough to tell a dead unit from a rare one
SAMPLE = 10_000  # values of each tensor that go into its histogram
POINTS = 2000  # logged steps that the page keeps; above that every second one is left out

# Where a nonlinearity y = f(x) is flat, so that hardly any gradient comes through.
FLAT = {
    'relu': lambda x, y: y == 0,
    'tanh': lambda x, y: y.abs() > 0.97,
    'sigmoid': lambda x, y: (2 * y - 1).abs() > 0.97,  # a tanh, of half the input
    'gelu': lambda x, y: (x < -1) & (y > -0.01),  # below x = -2.7
    'silu': lambda x, y: (x < -1) & (y > -0.01),  # below x = -6.5
}


class Watch:
    """What train.py asks at each step. With `on` false every method does nothing.

    ctx: the forward pass's autocast; data: a dataset.Dataset, with whose first training batch
    activations are looked at. What the run has logged in out_dir before, if it is resumed, is gone
    on with; clipped: its count so far. Raises ValueError.
    """

    def __init__(self, on, model, out_dir, grad_clip, ctx, data, clipped=0):
        self.clipped = clipped
        self.on = on and not model.fit and any(p.requires_grad for p in model.parameters())
        if not self.on:
            if on:
                print("watch: this model is counted, there are no gradients to watch", flush=True)
            return
        if not importlib.util.find_spec('matplotlib'):
            raise ValueError("watch=True draws its page with matplotlib: pip install matplotlib")
        self.model, self.folder, self.grad_clip, self.ctx = model, Path(out_dir), grad_clip, ctx
        self.parameters = {
            name: p for name, p in zip(_short_names(model), model.parameters()) if p.requires_grad
        }
        self.matrices = [name for name, p in self.parameters.items() if p.dim() > 1] or list(
            self.parameters
        )
        self.idx = self._examples(data.train_batch(0, 0)[0])
        self.history, self.samples = [], {}
        for line in _read(self.folder / 'metrics.jsonl'):
            if 'update_ratio' in line:
                self._remember(line)

    def _examples(self, idx):
        """Of idx (B, T) as many rows as EXAMPLES allows, and a T that is no width of the model: so
        dimensions differ."""
        widths = {n for p in self.parameters.values() for n in p.shape}
        T = next((T for T in range(idx.shape[1], 0, -1) if T not in widths), idx.shape[1])
        return torch.tensor(
            idx[: max(1, EXAMPLES // T), :T], device=next(self.model.parameters()).device
        )

    def _remember(self, line):
        self.history.append({k: math.nan if v is None else v for k, v in line.items()})
        if len(self.history) > POINTS:
            del self.history[1::2]

    def before_step(self, is_logged):
        """Keep the parameters and what there is to know of the gradients, once these are whole,
        before clipping."""
        if not self.on or not is_logged:
            return
        self.before = [p.detach().clone() for p in self.parameters.values()]
        grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        norms = torch.stack(torch._foreach_norm(list(grads.values()))).tolist()
        layers = {}
        for name, norm in zip(grads, norms):
            layers[_layer(name)] = layers.get(_layer(name), 0.0) + norm * norm
        self.norms = {layer: math.sqrt(square) for layer, square in layers.items()}
        self.samples |= {f'gradients/{name}': _sample(grad) for name, grad in grads.items()}

    def count(self, grad_norm):
        """Count a step whose gradient was so long; returns that. Without waiting for the device."""
        if self.on and self.grad_clip:
            self.clipped = self.clipped + ((grad_norm > self.grad_clip) & (grad_norm < math.inf))
        return grad_norm

    @torch.no_grad()
    def after_step(self, line):
        """What the optimizer did, and the activations after it, to go into this step's `line` of
        the log."""
        if not self.on:
            return {}
        ratios = [
            (p.float() - old.float()).std(correction=0) / old.float().std(correction=0)
            for p, old in zip(self.parameters.values(), self.before)
        ]
        ratios = dict(zip(self.parameters, torch.stack(ratios).log10().tolist()))
        del self.before
        health = {'update_ratio': _middle([ratios[name] for name in self.matrices])}
        health |= {f'update_ratio/{name}': ratio for name, ratio in ratios.items()}
        health |= {f'grad_norm/{layer}': norm for layer, norm in self.norms.items()}
        if self.grad_clip:
            health['clipped'] = self.clipped = int(self.clipped)
        seen = look(self.model, self.idx, self.ctx)
        for i, key in enumerate(('dead', 'saturated')):
            if seen:
                shares = dict(
                    zip(seen, torch.stack([found[i] for found in seen.values()]).tolist())
                )
                health |= {key: sum(shares.values()) / len(shares)} | {
                    f'{key}/{name}': v for name, v in shares.items()
                }
        self.samples |= {f'activations/{name}': values for name, (_, _, values) in seen.items()}
        health = {k: float(f'{v:.4g}') if isinstance(v, float) else v for k, v in health.items()}
        self._remember(
            {k: v if math.isfinite(v) else None for k, v in health.items()}
            | {k: line[k] for k in ('iter', 'grad_norm')}
        )
        return health

    def draw(self, step):
        """Draw health.png and add a line to health.jsonl; returns {name: values} of what the
        histograms are of."""
        if not self.on or not self.samples:
            return {}
        samples = {
            name: values.float().cpu().numpy().astype(float)
            for name, values in self.samples.items()
        }
        samples = {name: values[np.isfinite(values)] for name, values in samples.items()}
        samples = {name: values for name, values in samples.items() if len(values)}
        lines = [line for line in _read(self.folder / 'health.jsonl') if line['iter'] < step]
        lines.append(
            {'iter': step} | {name: _histogram(values) for name, values in samples.items()}
        )
        with files.replacing(self.folder / 'health.jsonl') as file:
            file.writelines(json.dumps(line).encode() + b'\n' for line in lines)
        folder = self.folder.name.encode(errors='replace').decode()  # a name may be no text
        title = f"{folder}: {type(self.model).__name__}, step {self.history[-1]['iter']}"
        with files.replacing(self.folder / 'health.png') as file:
            health_page.draw(title, self.history, samples, self.matrices, self.grad_clip).savefig(
                file, format='png'
            )
        return samples


# ---- activations ---------------------------------------------------------------------------------


@torch.no_grad()
def look(model, idx, ctx):
    """{activation: (share of dead units, share of saturated activations, some values)} of idx (B,
    T) in eval mode, in order. Tensors on the model's device."""
    was_training, eyes = model.training, _Eyes(model, idx.size(1))
    hooks = [
        hook
        for name, module in model.named_modules()
        if name
        for hook in (
            module.register_forward_pre_hook(lambda *_, name=name: eyes.inside.append(name)),
            module.register_forward_hook(lambda *_: eyes.inside.pop() and None),
        )
    ]
    try:
        model.eval()
        with ctx, eyes:
            model.forward(idx, idx)  # not the compiled call
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return {
        name: (dead.float().mean(), saturated, values)
        for name, (dead, saturated, values) in eyes.found().items()
    }


class _Eyes(TorchDispatchMode):
    """Sees every operator of a forward pass, and notes those of FLAT, by the module that they are
    in."""

    def __init__(self, model, T):
        super().__init__()
        self.V, self.T, self.inside, self.calls = model.config.vocab_size, T, [''], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        op = func.overloadpacket.__name__
        is_flat = FLAT.get(op.removesuffix('_'))
        x = args[0].clone() if is_flat and op.endswith('_') else args[0] if args else None
        y = func(*args, **(kwargs or {}))
        if is_flat:
            self.note(op.removesuffix('_'), y, is_flat(x, y))
        return y

    def note(self, op, y, flat):
        if y.dim() == 3 and y.size(-1) == self.T != y.size(1):  # (B, C, T), a convolution's
            y, flat = y.mT, flat.mT
        is_cap = self.inside == [''] and y.size(-1) == self.V  # of logits, which are no units
        if y.dim() < 2 or y.size(-1) == self.T or is_cap:  # (…, T, T) are attention's scores
            return
        name = _short(self.inside[-1].removesuffix(op).rstrip('.') + f'.{op}').lstrip('.')
        flat = flat.flatten(0, -2)  # (examples, units)
        self.calls.setdefault(name, []).append((flat.all(0), flat.float().mean(), _sample(y)))

    def found(self):
        """{name: (which units are dead, share of saturated activations, some values)}."""
        found = {}
        for name, calls in self.calls.items():
            if len(calls) >= self.T > 1:  # a recurrence: the calls are examples of the same units
                dead, saturated, values = zip(*calls)
                calls = [(torch.stack(dead).all(0), torch.stack(saturated).mean(), values[-1])]
            found |= {f'{name}_{i}' if i > 1 else name: call for i, call in enumerate(calls, 1)}
        return found


# ---- small things --------------------------------------------------------------------------------


def _short(name):
    """A name without what all have."""
    return name.removeprefix('transformer.').removesuffix('.weight')


def _short_names(model):
    names = [name for name, _ in model.named_parameters()]
    short = [_short(name) for name in names]
    return short if len(set(short)) == len(names) else names


def _layer(name):
    """What a parameter is in: h.0 of h.0.attn.c_attn, ln_f of ln_f.bias."""
    parts = name.split('.')
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return '.'.join(parts[: number + 1])


def _middle(values):
    values = [value for value in values if math.isfinite(value)]
    return float(np.median(values)) if values else math.nan


def _sample(tensor):
    """Up to SAMPLE values of it, evenly spread; an odd stride, so that they are of all columns."""
    flat = tensor.detach().flatten()
    return flat[:: -(-len(flat) // SAMPLE) | 1].clone()


def _histogram(values, bins=40):
    counts, edges = np.histogram(values, bins)
    return dict(
        mean=float(f'{values.mean():.4g}'),
        std=float(f'{values.std():.4g}'),
        low=edges[0],
        high=edges[-1],
        counts=counts.tolist(),
    )


def _read(path):
    """The records of a file of JSON lines, damaged ones left out."""
    for line in (
        path.read_text(encoding='utf-8', errors='replace').splitlines() if path.exists() else ()
    ):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and 'iter' in record:
            yield record
