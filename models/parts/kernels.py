"""Attention and the loss, computed by the kernel that is fastest on the device at hand.

Shapes: B batch, T time, C channels, H heads, D head size, V vocabulary; G heads of keys and values,
L keys, E size of a value.
"""

import math

import torch
from torch.nn import functional as F

from models.parts.layers import at_least_float32

# What --attention may be: torch's scaled_dot_product_attention, three plain products, or whichever
# is faster for the tensors at hand.
ATTENTION = ('auto', 'sdpa', 'plain')


def check_attention(kernel):
    """Raise ValueError unless `kernel` is one of ATTENTION."""
    if kernel not in ATTENTION:
        raise ValueError(f"attention={kernel!r} is unknown: use auto, sdpa or plain")


def split_heads(qkv, n_head, kernel='auto', parts=3):
    """Split q, k and v, side by side in (B, T, 3C), into heads: (3, B, H, T, D).

    parts: how many lie there; 2 for k and v alone.
    """
    B, T, _ = qkv.shape
    qkv = qkv.view(B, T, parts, n_head, -1).permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
    if _use_plain(qkv, kernel):
        # Batched products need contiguous heads: copying all parts at once is fastest.
        qkv = qkv.contiguous()
    return qkv


def causal_attention(q, k, v, dropout=0.0, mask=None, scale=None, kernel='auto'):
    """softmax(q kᵀ · scale) v, where a query sees keys up to its own position.

    q (B, H, T, D), k (B, G, L, D), v (B, G, L, E). G divides H: each head of keys and values serves
    H/G neighbouring heads of queries. dropout: probability, on the attention weights. mask, in
    place of the causal one (for which L = T): True where a query sees a key, or numbers to add to
    the scores; (T, L) or broadcast to (B, H, T, L). scale: default 1/√D. kernel: one of ATTENTION.
    Returns (B, H, T, E).
    """
    attend = plain_attention if _use_plain(q, kernel) else sdpa
    return attend(q, k, v, dropout, mask, scale, is_causal=mask is None)


def _use_plain(q, kernel):
    """Whether `kernel` means plain products for queries q (…, T, D)."""
    if kernel != 'auto':
        return kernel == 'plain'
    # Measured forward + backward on a CPU with AMX: in bfloat16 the plain products win by 1.2 to 5
    # times up to T = 512, and keep B·H·T² numbers per layer for the backward pass; in float32 SDPA
    # wins from T = 64.
    return q.device.type == 'cpu' and q.dtype == torch.bfloat16 and q.size(-2) <= 512


def sdpa(q, k, v, dropout=0.0, mask=None, scale=None, is_causal=False):
    """Attention as in `causal_attention`, by torch's kernels.

    Without is_causal and mask, every query sees every key.
    """
    B, H, T, D = q.shape
    G = k.size(1)
    E = v.size(-1)
    if D != E and T > 1:
        # The fast kernels need one size for all: pad with zeros, cut off below.
        scale = scale or D**-0.5
        q, k, v = (_pad_channels(x, max(D, E)) for x in (q, k, v))
    if T == 1 and G < H and not is_causal:
        # One token: the queries of a group become the rows of one product, which reads a key once.
        q = q.reshape(B, G, H // G, -1)
    y = F.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal, scale=scale, enable_gqa=q.size(1) != G
    )
    if y.shape != (B, H, T, E):
        y = y.reshape(B, H, T, -1)[..., :E]
    return y


def _pad_channels(x, n):
    """x (…, C) with zeros appended to n channels."""
    if x.size(-1) == n:
        return x
    return F.pad(x, (0, n - x.size(-1)))


def plain_attention(q, k, v, dropout=0.0, mask=None, scale=None, is_causal=True):
    """Attention as in `sdpa`, by two batched products and a softmax, in q's own dtype.

    The softmax over bfloat16 sums in float32 inside its kernel.
    """
    B, H, T, D = q.shape
    G, L = k.shape[1:3]
    scale = scale or D**-0.5

    # What is added to the scores: 0 where a query sees a key, -inf elsewhere.
    if is_causal:
        bias = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    elif mask is None:
        bias = q.new_zeros(1, 1)
    elif mask.dtype == torch.bool:
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -math.inf)
    else:
        bias = mask

    # The queries of a group become the rows of one product.
    q = q.reshape(B * G, -1, D)  # (B·G, H/G·T, D)
    k = k.reshape(B * G, L, D)
    v = v.reshape(B * G, L, -1)

    # Autocast would convert the softmax to float32 and back.
    with torch.autocast(q.device.type, enabled=False):
        if H == G and bias.dim() == 2:  # one bias for all heads: the product can add it
            att = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
        else:
            att = torch.baddbmm(q.new_zeros(1, 1), q, k.transpose(1, 2), alpha=scale)
            att.view(B, H, T, L).add_(bias)
        att = F.dropout(att.softmax(-1), dropout)  # (B·G, H/G·T, L)
        return (att @ v).view(B, H, T, -1)


def cross_entropy(logits, targets):
    """The mean cross-entropy of logits (B, T, V) over targets (B, T), in nats.

    Targets of -1 do not count. It is computed in at least float32. Without any target it is 0, as
    is its gradient, where torch's own mean is NaN.
    """
    logits = at_least_float32(logits).flatten(0, 1)
    targets = targets.flatten()
    total = F.cross_entropy(logits, targets, ignore_index=-1, reduction='sum')
    return total / (targets >= 0).sum().clamp(min=1)
