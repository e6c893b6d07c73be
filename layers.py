"""Parts that several models share: LayerNorm, and causal attention by the kernel that is fastest where it runs."""
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
    """The q, k and v that lie side by side in (B, T, 3C), each as (B, H, T, D); in one copy where `plain` needs it so."""
    B, T, _ = qkv.shape
    qkv = qkv.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)     # (3, B, H, T, D)
    return (qkv.contiguous() if _use_plain(qkv) else qkv).unbind(0)


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
