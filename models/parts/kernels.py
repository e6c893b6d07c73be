"""Attention and the loss, by the kernel that is fastest where they run."""

import math

import torch
from torch.nn import functional as F

from models.parts.layers import at_least_float32

ATTENTION = (
    'auto',
    'sdpa',
    'plain',
)  # the kernels of causal_attention; auto: the fastest where it runs


def check_attention(name):
    """ValueError unless `name` is one of ATTENTION."""
    if name not in ATTENTION:
        raise ValueError(f"attention={name!r} is unknown: use auto, sdpa or plain")


def split_heads(qkv, n_head, kernel='auto', parts=3):
    """The q, k and v that lie side by side in (B, T, 3C), as (3, B, H, T, D); in one copy where
    `plain` needs it so.

    parts: how many lie there; two for only k and v.
    """
    B, T, _ = qkv.shape
    qkv = qkv.view(B, T, parts, n_head, -1).permute(2, 0, 3, 1, 4)
    return qkv.contiguous() if _use_plain(qkv, kernel) else qkv


def causal_attention(q, k, v, dropout=0.0, mask=None, scale=None, kernel='auto'):
    """softmax(q kᵀ · scale, keys up to the query only) v.

    q (B, H, T, D), k (B, G, L, D), v (B, G, L, E) with G heads that divide H, each of them for H/G
    neighbours. dropout: probability on the attention weights. mask: instead of "up to the query"
    (then L = T), True for what is seen, or numbers to add to the scores, (T, L) or (…, …, T, L).
    scale: 1/√D unless told. Returns (B, H, T, E).
    """
    attend = plain_attention if _use_plain(q, kernel) else sdpa
    return attend(q, k, v, dropout, mask, scale, is_causal=mask is None)


def sdpa(q, k, v, dropout=0.0, mask=None, scale=None, is_causal=False):
    """causal_attention by torch's kernels; not causal: with the mask alone, or none."""
    (B, H, T, D), G, E = q.shape, k.size(1), v.size(-1)
    if D != E and T > 1:  # the fast kernels want one width
        scale = scale or D**-0.5
        q, k, v = (
            x if x.size(-1) == max(D, E) else F.pad(x, (0, max(D, E) - x.size(-1)))
            for x in (q, k, v)
        )
    # a group's queries as rows of one product: it reads each key once
    if T == 1 and G < H and not is_causal:
        q = q.reshape(B, G, H // G, -1)
    y = F.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal, scale=scale, enable_gqa=q.size(1) != G
    )
    return y.reshape(B, H, T, -1)[..., :E] if y.shape != (B, H, T, E) else y


def plain_attention(q, k, v, dropout=0.0, mask=None, scale=None, is_causal=True):
    """The same as three products in q's own dtype; a softmax over bfloat16 sums in float32 inside
    its kernel."""
    (B, H, T, D), (G, L) = q.shape, k.shape[1:3]
    bias = q.new_zeros(1, 1) if mask is None else mask
    if is_causal:
        bias = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    elif bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill_(~bias, -math.inf)
    is_same = H == G and bias.dim() == 2  # for all heads: then the product adds it
    # a group's queries: rows of one
    q, k, v = q.reshape(B * G, -1, D), k.reshape(B * G, L, D), v.reshape(B * G, L, -1)
    # autocast would take the softmax to float32 and back
    with torch.autocast(q.device.type, enabled=False):
        att = torch.baddbmm(
            bias if is_same else q.new_zeros(1, 1), q, k.transpose(1, 2), alpha=scale or D**-0.5
        )
        if not is_same:
            att.view(B, H, T, L).add_(bias)
        return (F.dropout(att.softmax(-1), dropout) @ v).view(B, H, T, -1)  # att: (B·G, H/G·T, L)


def _use_plain(q, kernel):
    # Measured forward + backward on a CPU with AMX: in bfloat16 the plain products win 1.2 to 5
    # times up to T = 512, and keep B·H·T² numbers per layer for the backward pass; in float32 SDPA
    # wins from T = 64.
    fastest = q.device.type == 'cpu' and q.dtype == torch.bfloat16 and q.size(-2) <= 512
    return kernel == 'plain' or (kernel == 'auto' and fastest)


def cross_entropy(logits, targets):
    """The mean over targets (B, T) other than -1 of what logits (B, T, V) say, in nats, in at least
    float32; 0 where there is no target, whose gradient is 0 too. (torch's own mean is NaN then, and
    the same number otherwise.)"""
    logits, targets = at_least_float32(logits).flatten(0, 1), targets.flatten()
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction='sum') / (
        targets >= 0
    ).sum().clamp(min=1)
