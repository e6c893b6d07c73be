"""Parts that several models share: norms, rotary positions, activations, and causal attention by the kernel that is
fastest where it runs."""
import math

import torch
from torch import nn
from torch.nn import functional as F

ATTENTION = 'auto'      # 'auto' | 'sdpa' | 'plain'; set by use_attention


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension (C) whose bias is optional."""

    def __init__(self, C, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.bias = nn.Parameter(torch.zeros(C)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


def use_attention(name):
    """Choose the attention kernel for all models: 'auto' (fastest), 'sdpa' or 'plain'. Raises ValueError."""
    global ATTENTION
    if name not in ('auto', 'sdpa', 'plain'):
        raise ValueError(f"attention={name!r} is unknown: take auto, sdpa or plain")
    ATTENTION = name


def split_heads(qkv, n_head):
    """The q, k and v that lie side by side in (B, T, 3C), as (3, B, H, T, D); in one copy where `plain` needs it so."""
    B, T, _ = qkv.shape
    qkv = qkv.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)
    return qkv.contiguous() if _use_plain(qkv) else qkv


def causal_attention(q, k, v, dropout=0.0):
    """softmax(q kᵀ / √D, keys up to the query only) v.

    q, k, v: (B, H, T, D); dropout: probability on the attention weights. Returns (B, H, T, D).
    """
    if _use_plain(q):
        return plain_attention(q, k, v, dropout)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)


def _use_plain(q):
    # Measured forward + backward on a CPU with AMX: in bfloat16 the plain products win 1.2 to 5 times up to T = 512,
    # and keep B·H·T² numbers per layer for the backward pass; in float32 SDPA wins from T = 64.
    fastest = q.device.type == 'cpu' and q.dtype == torch.bfloat16 and q.size(-2) <= 512
    return ATTENTION == 'plain' or (ATTENTION == 'auto' and fastest)


def compute_type(x):
    """x in bfloat16 where autocast computes in that: a residual stream in the products' own type needs no conversions."""
    kind = x.device.type
    is_bf16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    return x.bfloat16() if is_bf16 else x


def norm(x):
    """LayerNorm without weights, over the last dimension, in x's type. One kernel, where RMSNorm is several on a CPU."""
    return F.layer_norm(x, x.shape[-1:]).type_as(x)     # CUDA's autocast returns float32


def rotary(T, D, base=10000):
    """(2, T, D): the cosines and signed sines by which `rotate` turns positions 0 … T-1."""
    angles = torch.outer(torch.arange(T), base ** (-torch.arange(0, D, 2) / D))         # (T, D/2)
    return torch.stack([torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)])


class _Rotate(torch.autograd.Function):
    """Turning back is turning by the negative angle: the backward pass needs nothing but the angles."""

    @staticmethod
    def forward(ctx, x, rotary):
        rotary = rotary.type_as(x)
        ctx.save_for_backward(rotary)
        return (x * rotary[0]).addcmul_(x.roll(x.shape[-1] // 2, -1), rotary[1])

    @staticmethod
    def backward(ctx, grad):
        rotary, = ctx.saved_tensors
        return (grad * rotary[0]).addcmul_(grad.roll(grad.shape[-1] // 2, -1), rotary[1], value=-1), None


def rotate(x, rotary):
    """RoPE: turn each pair (d, d + D/2) of x (…, T, D) by its position's angle; rotary: (2, T, D), as of `rotary`."""
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
        x, = ctx.saved_tensors
        return (grad * x).mul_(2)


squared_relu = _SquaredReLU.apply


def add_some(x, y, p):
    """x + y for (B, T, C), without the y of each token with probability p, the others scaled up."""
    if not p:
        return x + y
    kept = torch.rand(*y.shape[:2], 1, device=y.device) >= p
    return torch.addcmul(x, y, (kept / (1 - p)).type_as(y))


def add(x, y):
    """x + y in x's dtype: the residual stream stays float32 under autocast. A CPU is slow at adding two dtypes."""
    return x + (y.type_as(x) if x.device.type == 'cpu' else y)


def plain_attention(q, k, v, dropout=0.0):
    """The same as three products in q's own dtype; a softmax over bfloat16 sums in float32 inside its kernel."""
    B, H, T, D = q.shape
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    mask = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    with torch.autocast(q.device.type, enabled=False):      # autocast would take the softmax to float32 and back
        att = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=D ** -0.5).softmax(-1)    # (B·H, T, T)
        return (F.dropout(att, dropout) @ v).view(B, H, T, D)
