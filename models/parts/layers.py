"""Parts that several models share: norms, rotary positions, activations, and causal attention by
the kernel that is fastest where it runs."""

import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F

ATTENTION = 'auto'  # 'auto' | 'sdpa' | 'plain'; set by use_attention


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


def use_attention(name):
    """Choose the attention kernel for all models: 'auto' (fastest), 'sdpa' or 'plain'. Raises
    ValueError."""
    global ATTENTION
    if name not in ('auto', 'sdpa', 'plain'):
        raise ValueError(f"attention={name!r} is unknown: take auto, sdpa or plain")
    ATTENTION = name


def split_heads(qkv, n_head, parts=3):
    """The q, k and v that lie side by side in (B, T, 3C), as (3, B, H, T, D); in one copy where
    `plain` needs it so.

    parts: how many lie there; two for only k and v.
    """
    B, T, _ = qkv.shape
    qkv = qkv.view(B, T, parts, n_head, -1).permute(2, 0, 3, 1, 4)
    return qkv.contiguous() if _use_plain(qkv) else qkv


def causal_attention(q, k, v, dropout=0.0, mask=None, scale=None):
    """softmax(q kᵀ · scale, keys up to the query only) v.

    q (B, H, T, D), k (B, G, L, D), v (B, G, L, E) with G heads that divide H, each of them for H/G
    neighbours. dropout: probability on the attention weights. mask: instead of "up to the query"
    (then L = T), True for what is seen, or numbers to add to the scores, (T, L) or (…, …, T, L).
    scale: 1/√D unless told. Returns (B, H, T, E).
    """
    attend = plain_attention if _use_plain(q) else sdpa
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


class KVCache:
    """What a model keeps of the tokens so far: their ids, and tensors per layer, such as keys and
    values. With it, one token more costs one row of each product.

    Every row of the batch fills the columns up to `length`. Prompts of different lengths end in the
    same column, so that the rows go on together; row b's tokens then begin at column first[b], and
    before it everything is zero. shapes: for each layer the (H, D) of each tensor that it keeps,
    (B, H, room, D); none for models that need only the ids. eot: see `documents`.
    """

    def __init__(self, B, room, shapes, device=None, dtype=None, eot=-1):
        self.kept = [
            [torch.zeros(B, H, room, D, device=device, dtype=dtype) for H, D in layer]
            for layer in shapes
        ]
        self.ids = torch.full((B, room), -1, device=device)  # -1: before a row's first token
        self.room, self.length, self.first, self.seen, self.eot = room, 0, None, None, eot

    def extend(self, idx):
        """Make room for idx (B, T), the next tokens of each row. Returns their places: a slice, or
        (B, T). ValueError."""
        (_, T), start = idx.shape, self.length
        if start + T > self.room:
            raise ValueError(
                f"{T} tokens do not fit into a cache for {self.room} that holds {start}"
            )
        self.length += T
        self.ids[:, start : self.length] = idx
        self.seen, is_even = None, self.first is None and self.eot < 0
        # otherwise all that is there is seen, or it is a whole prompt
        if not is_even or (start and T > 1):
            columns = torch.arange(self.length, device=idx.device)
            self.seen = columns <= columns[start:, None]  # (T, length)
        if is_even:
            return slice(start, self.length)
        if self.first is not None:
            self.seen = self.seen & (columns >= self.first.view(-1, 1, 1, 1))  # (B, 1, T, length)
        if self.eot >= 0:
            self.seen = self.seen & documents(self.ids[:, : self.length], self.eot, T)
        # a token sees all from the first of its row, or document, on
        return self.seen[:, 0].sum(-1) - 1

    @property
    def layers(self):
        """A Past for each layer."""
        return [Past(self, kept) for kept in self.kept]

    def recent(self, n, T):
        """The n ids before the last T of each row, -1 where there was none: (B, n)."""
        return F.pad(self.ids[:, : self.length - T], (n, 0), value=-1)[:, self.length - T :]

    def select(self, rows):
        """Go on with these rows (N,) of the batch, in this order."""
        self.kept = [[tensor[rows] for tensor in layer] for layer in self.kept]
        self.ids, self.first = (
            self.ids[rows],
            self.first if self.first is None else self.first[rows],
        )

    @classmethod
    def join(cls, caches, room):
        """One cache with the rows of several, which have one row each, and room for so many
        columns."""
        length, one = max(cache.length for cache in caches), caches[0]
        whole = cls(
            len(caches),
            room,
            [[(t.size(1), t.size(3)) for t in layer] for layer in one.kept],
            one.ids.device,
            next((t.dtype for layer in one.kept for t in layer), None),
            one.eot,
        )
        whole.length, starts = length, [length - cache.length for cache in caches]
        for b, (start, cache) in enumerate(zip(starts, caches)):
            whole.ids[b, start:length] = cache.ids[0, : cache.length]
            for mine, theirs in zip(whole.kept, cache.kept):
                for x, y in zip(mine, theirs):
                    x[b, :, start:length] = y[0, :, : cache.length]
        whole.first = torch.tensor(starts, device=one.ids.device) if any(starts) else None
        return whole


class Past:
    """What one layer has of a KVCache: `tensors`, (B, H, room, D) each."""

    def __init__(self, cache, tensors):
        self.cache, self.tensors = cache, tensors

    def keep(self, *new):
        """Keep what the new tokens bring, (B, H, T, D) for each tensor; returns all there is of
        each, (B, H, length, D)."""
        end = self.cache.length
        for kept, x in zip(self.tensors, new):
            kept[:, :, end - x.size(2) : end] = x
        return [kept[:, :, :end] for kept in self.tensors]

    def is_whole(self, T):
        """Whether the T new tokens are all that there is, in each row: a prompt that is read at
        once."""
        return self.cache.length == T and self.cache.seen is None

    def attend(self, q, k, v, dropout=0.0):
        """Keep k and v of the new tokens, and attend to all that q (B, H, T, D) may see: (B, H, T,
        D), in q's type."""
        past_k, past_v = self.keep(k, v)
        dtype = past_k.dtype
        if self.is_whole(q.size(2)):
            return causal_attention(*(x.to(dtype) for x in (q, k, v))).to(q.dtype)
        return sdpa(q.to(dtype), past_k, past_v, mask=self.cache.seen).to(q.dtype)


def documents(ids, eot, T):
    """Which of L ids (B, L) are of the same document as each of the last T: bool (B, 1, T, L). It
    begins with its `eot`."""
    number = (ids == eot).cumsum(1)
    return (number[:, -T:, None] == number[:, None])[:, None]


class Packed:
    """Where rows hold several documents, what stands in for a cache, and for what each layer has of
    it, while all tokens are new: attention goes no further back than a document, whose places begin
    at 0.

    On CUDA this is SDPA with a mask, which FlashAttention does not take: slower than causal
    attention alone.
    """

    def __init__(self, eot):
        self.eot = eot

    def extend(self, idx):
        """The places of idx in their documents, (B, T), as KVCache.extend."""
        self.length = idx.size(1)
        self.seen = documents(idx, self.eot, self.length).tril()  # (B, 1, T, T)
        return self.seen[:, 0].sum(-1) - 1

    @property
    def cache(self):
        return self

    @property
    def layers(self):
        return itertools.repeat(self)

    def recent(self, n, T):
        """No ids before these, as KVCache.recent."""
        return self.seen.new_full((len(self.seen), n), -1, dtype=torch.int64)

    def keep(self, *new):
        return new

    def is_whole(self, T):
        return False

    def attend(self, q, k, v, dropout=0.0):
        return causal_attention(q, k, v, dropout, self.seen)


def packed(eot):
    """A Packed, or None where documents are read through, eot < 0."""
    return Packed(eot) if eot >= 0 else None


def _use_plain(q):
    # Measured forward + backward on a CPU with AMX: in bfloat16 the plain products win 1.2 to 5
    # times up to T = 512, and keep B·H·T² numbers per layer for the backward pass; in float32 SDPA
    # wins from T = 64.
    fastest = q.device.type == 'cpu' and q.dtype == torch.bfloat16 and q.size(-2) <= 512
    return ATTENTION == 'plain' or (ATTENTION == 'auto' and fastest)


def cross_entropy(logits, targets):
    """The mean over targets (B, T) other than -1 of what logits (B, T, V) say, in nats, in at least
    float32; 0 where there is no target, whose gradient is 0 too. (torch's own mean is NaN then, and
    the same number otherwise.)"""
    logits, targets = at_least_float32(logits).flatten(0, 1), targets.flatten()
    return F.cross_entropy(logits, targets, ignore_index=-1, reduction='sum') / (
        targets >= 0
    ).sum().clamp(min=1)


def compute_type(x):
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


def rotary(T, D, base=10000, scale=None):
    """(2, T, D): the cosines and signed sines by which `rotate` turns positions 0 … T-1.

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


def rotate(x, rotary):
    """RoPE: turn each pair (d, d + D/2) of x (…, T, D) by its position's angle; rotary: (2, T, D),
    as of `rotary`."""
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


def add_some(x, y, p):
    """x + y for (B, T, C), without the y of each token with probability p, the others scaled up."""
    if not p:
        return x + y
    kept = torch.rand(*y.shape[:2], 1, device=y.device) >= p
    return torch.addcmul(x, y, (kept / (1 - p)).type_as(y))


def add(x, y):
    """x + y in x's dtype: the residual stream stays float32 under autocast. A CPU is slow at adding
    two dtypes."""
    return x + (y.type_as(x) if x.device.type == 'cpu' else y)


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


def with_past(idx, n, cache=None):
    """idx (B, T) behind the n ids before it, -1 where there were none: (B, n + T). A cache takes
    idx in."""
    if cache is None:
        return F.pad(idx, (n, 0), value=-1)
    cache.extend(idx)
    return torch.cat([cache.recent(n, idx.size(1)), idx], 1)


# arXiv 1502.01852
INITS = {
    'kaiming': lambda weight, f: nn.init.kaiming_normal_(weight, nonlinearity=f),
    # Glorot, Bengio 2010
    'xavier': lambda weight, f: nn.init.xavier_normal_(weight, nn.init.calculate_gain(f)),
}
