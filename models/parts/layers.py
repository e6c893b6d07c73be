"""Layers that architectures share: norms, rotary embeddings, activations, initialisations."""

import torch
from torch import nn
from torch.nn import functional as F

# ---- number formats ------------------------------------------------------------------------------


def at_least_float32(x):
    """x, converted to float32 if it has fewer bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def to_autocast_dtype(x):
    """x, converted to bfloat16 if autocast computes in that.

    A residual stream in the same type as the matrix products needs no conversions.
    """
    device_type = x.device.type
    if not torch.is_autocast_enabled(device_type):
        return x
    if torch.get_autocast_dtype(device_type) != torch.bfloat16:
        return x
    return x.bfloat16()


# ---- norms ---------------------------------------------------------------------------------------


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension (C), with an optional bias (arXiv 1607.06450)."""

    def __init__(self, C, bias, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.bias = nn.Parameter(torch.zeros(C)) if bias else None
        self.eps = eps

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """x divided by its root mean square, times a weight, over the last dimension (C).

    Computed in at least float32 (arXiv 1910.07467).
    """

    def __init__(self, C, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.eps = eps

    def forward(self, x):
        y = F.rms_norm(at_least_float32(x), self.weight.shape, self.weight, self.eps)
        return y.type_as(x)


def norm(x):
    """LayerNorm without weights over the last dimension, in x's dtype.

    It is one kernel on a CPU, where RMSNorm is several.
    """
    return F.layer_norm(x, x.shape[-1:]).type_as(x)  # CUDA's autocast returns float32


# ---- residual connections ------------------------------------------------------------------------


def residual_add(x, y):
    """x + y in x's dtype: the residual stream stays float32 under autocast."""
    if x.device.type == 'cpu':
        y = y.type_as(x)  # a CPU is slow at adding two dtypes
    return x + y


def token_drop_add(x, y, p):
    """x + y for (B, T, C), where each token loses its y with probability p.

    What remains of y is scaled up by 1/(1 - p), as in dropout.
    """
    if not p:
        return x + y
    kept = torch.rand(*y.shape[:2], 1, device=y.device) >= p  # (B, T, 1)
    return torch.addcmul(x, y, (kept / (1 - p)).type_as(y))


# ---- rotary position embeddings (RoPE, arXiv 2104.09864) -----------------------------------------


def rotary_table(T, D, base=10000, scale=None):
    """Cosines and signed sines of the rotations of positions 0 to T-1: (2, T, D).

    For `apply_rotary`. scale: a function that changes the frequencies (D/2,), in radians per
    position. They are rounded exactly as in transformers: far from the start, a frequency's last
    bit shows in its angle.
    """
    frequencies = 1.0 / base ** (torch.arange(0, D, 2) / D)  # (D/2,)
    if scale:
        frequencies = scale(frequencies)
    angles = torch.outer(torch.arange(T), frequencies)  # (T, D/2)
    cos = angles.cos()
    sin = angles.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])


def apply_rotary(x, rotary):
    """Rotate each pair of channels (d, d + D/2) of x (…, T, D) by its position's angle.

    rotary (2, T, D): rows of `rotary_table`.
    """
    return _ApplyRotary.apply(x, rotary)


class _ApplyRotary(torch.autograd.Function):
    """A rotation, whose backward pass rotates by the negative angle and needs only the table.

    No operator here works in place: when torch 2.11 compiles an in-place one in an
    autograd.Function, it silently cuts the gradient off (tests/test_compiled.py).
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
    """x with the two halves of its last dimension swapped."""
    return x.roll(x.shape[-1] // 2, -1)


# ---- activations ---------------------------------------------------------------------------------


class _SquaredReLU(torch.autograd.Function):
    """relu(x)² (Primer, arXiv 2109.08668); its backward pass is two operators, not three."""

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


# ---- initialisations -----------------------------------------------------------------------------


def kaiming_normal(weight, activation):
    """He et al. 2015, arXiv 1502.01852."""
    nn.init.kaiming_normal_(weight, nonlinearity=activation)


def xavier_normal(weight, activation):
    """Glorot, Bengio 2010, https://proceedings.mlr.press/v9/glorot10a.html"""
    nn.init.xavier_normal_(weight, nn.init.calculate_gain(activation))


# name: function(weight, the activation that follows), in place
INITS = {'kaiming': kaiming_normal, 'xavier': xavier_normal}


def check_init(name):
    """Raise ValueError unless `name` is one of INITS."""
    if name not in INITS:
        raise ValueError(f"init={name!r} is unknown: use {' or '.join(INITS)}")
