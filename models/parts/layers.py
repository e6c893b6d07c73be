"""Layers that several models share: norms, rotary positions, activations, initialisations."""

import torch
from torch import nn
from torch.nn import functional as F


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension (C) whose bias is optional."""

    def __init__(self, C, bias, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.bias = nn.Parameter(torch.zeros(C)) if bias else None
        self.eps = eps

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """x over its root mean square (arXiv 1910.07467), in at least float32, times a weight, over the
    last dimension (C)."""

    def __init__(self, C, eps=1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(C)), eps

    def forward(self, x):
        return F.rms_norm(at_least_float32(x), self.weight.shape, self.weight, self.eps).type_as(x)


def to_autocast_dtype(x):
    """x in bfloat16 where autocast computes in that: a residual stream in the products' own type
    needs no conversions."""
    kind = x.device.type
    is_bf16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    return x.bfloat16() if is_bf16 else x


def at_least_float32(x):
    """x, or float32 where it has fewer bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norm(x):
    """LayerNorm without weights, over the last dimension, in x's type. One kernel, where RMSNorm is
    several on a CPU."""
    return F.layer_norm(x, x.shape[-1:]).type_as(x)  # CUDA's autocast returns float32


def rotary_table(T, D, base=10000, scale=None):
    """(2, T, D): the cosines and signed sines by which `apply_rotary` turns positions 0 … T-1.

    scale: a function that changes the frequencies (D/2,), in radians per position. Far from the
    start the last bit of a frequency shows in its angle: they are rounded as transformers does.
    """
    frequencies = 1.0 / base ** (torch.arange(0, D, 2) / D)  # (D/2,)
    if scale:
        frequencies = scale(frequencies)
    angles = torch.outer(torch.arange(T), frequencies)  # (T, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])


class _Rotate(torch.autograd.Function):
    """Turning back is turning by the negative angle: the backward pass needs nothing but the
    angles.

    No operator here works in place: compiled by torch 2.11, an in-place one in an autograd.Function
    cuts the gradient off without a word (tests/test_compiled.py).
    """

    @staticmethod
    def forward(ctx, x, rotary):
        cos, sin = rotary.type_as(x)
        ctx.save_for_backward(cos, sin)
        return torch.addcmul(x * cos, _swap_halves(x), sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return torch.addcmul(grad * cos, _swap_halves(grad), sin, value=-1), None


def _swap_halves(x):
    """The two halves of the last dimension, the second one first."""
    return x.roll(x.shape[-1] // 2, -1)


def apply_rotary(x, rotary):
    """RoPE: turn each pair (d, d + D/2) of x (…, T, D) by its position's angle; rotary: (2, T, D),
    as of `rotary_table`."""
    return _Rotate.apply(x, rotary)


class _SquaredReLU(torch.autograd.Function):
    """relu(x)², whose backward pass is two operators; that of relu and square would be three."""

    @staticmethod
    def forward(ctx, x):
        x = x.relu()
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * (grad * x)


squared_relu = _SquaredReLU.apply


def token_drop_add(x, y, p):
    """x + y for (B, T, C), without the y of each token with probability p, the others scaled up."""
    if not p:
        return x + y
    kept = torch.rand(*y.shape[:2], 1, device=y.device) >= p
    return torch.addcmul(x, y, (kept / (1 - p)).type_as(y))


def residual_add(x, y):
    """x + y in x's dtype: the residual stream stays float32 under autocast. A CPU is slow at adding
    two dtypes."""
    return x + (y.type_as(x) if x.device.type == 'cpu' else y)


# arXiv 1502.01852
INITS = {
    'kaiming': lambda weight, f: nn.init.kaiming_normal_(weight, nonlinearity=f),
    # Glorot, Bengio 2010
    'xavier': lambda weight, f: nn.init.xavier_normal_(weight, nn.init.calculate_gain(f)),
}
