"""The cache of generation (KVCache), and rows that hold several documents (PackedDocuments).

Shapes: B batch, T new tokens, L all tokens so far, H heads, D head size.
"""

import itertools

import torch
from torch.nn import functional as F

from models.parts import kernels


class KVCache:
    """The tokens so far: their ids, and tensors of each layer, such as keys and values.

    With it, one more token costs one row of each product.

    All rows of the batch fill the columns up to `length`. Prompts of different lengths end in the
    same column, so that their rows continue together; row b then begins at column first[b], and
    everything before it is zero.

    room: columns there are, the longest `length`. shapes: for each layer the (H, D) of each tensor
    (B, H, room, D) that it keeps; empty for models that need only the ids. eot: the token that
    begins a document, within which attention stays; -1: no limit.
    """

    def __init__(self, B, room, shapes, device=None, dtype=None, eot=-1):
        self.kept = []  # the tensors of each layer
        for layer in shapes:
            tensors = [torch.zeros(B, H, room, D, device=device, dtype=dtype) for H, D in layer]
            self.kept.append(tensors)
        self.ids = torch.full((B, room), -1, device=device)  # -1: before a row's first token
        self.room = room
        self.length = 0
        self.first = None  # (B,), or None: all rows begin at column 0
        self.mask = None  # of the newest tokens: (T, L) or (B, 1, T, L), or None: they see all
        self.eot = eot

    def extend(self, idx):
        """Make room for idx (B, T), the next tokens of each row.

        Returns their positions: a slice, or (B, T) where rows differ. Raises ValueError if they do
        not fit.
        """
        T = idx.size(1)
        start = self.length
        if start + T > self.room:
            raise ValueError(
                f"{T} tokens do not fit into a cache for {self.room} that holds {start}"
            )
        self.length += T
        self.ids[:, start : self.length] = idx

        rows_differ = self.first is not None or self.eot >= 0
        if not rows_differ and (start == 0 or T == 1):
            # A whole prompt, for which the kernel is causal, or one token, which sees everything.
            self.mask = None
            return slice(start, self.length)

        columns = torch.arange(self.length, device=idx.device)
        self.mask = columns <= columns[start:, None]  # (T, L)
        if not rows_differ:
            return slice(start, self.length)
        if self.first is not None:
            self.mask = self.mask & (columns >= self.first.view(-1, 1, 1, 1))  # (B, 1, T, L)
        if self.eot >= 0:
            self.mask = self.mask & same_document(self.ids[:, : self.length], self.eot, T)
        # A token sees everything from the beginning of its row or document: it counts its position.
        return self.mask[:, 0].sum(-1) - 1

    @property
    def layers(self):
        """A LayerCache for each layer."""
        return [LayerCache(self, tensors) for tensors in self.kept]

    def previous_ids(self, n, T):
        """The n ids before the last T of each row: (B, n), -1 where there are none."""
        ids = F.pad(self.ids[:, : self.length - T], (n, 0), value=-1)
        return ids[:, self.length - T :]

    def select(self, rows):
        """Keep these rows (N,) of the batch, in this order, in place."""
        for i, tensors in enumerate(self.kept):
            self.kept[i] = [tensor[rows] for tensor in tensors]
        self.ids = self.ids[rows]
        if self.first is not None:
            self.first = self.first[rows]

    @classmethod
    def join(cls, caches, room):
        """One cache of the rows of several caches with one row each, with `room` columns."""
        one = caches[0]
        device = one.ids.device
        dtype = one.kept[0][0].dtype if one.kept else None
        shapes = []
        for tensors in one.kept:
            shapes.append([(tensor.size(1), tensor.size(3)) for tensor in tensors])  # (H, D) each
        joined = cls(len(caches), room, shapes, device, dtype, one.eot)
        joined.length = max(cache.length for cache in caches)

        starts = [joined.length - cache.length for cache in caches]
        for b, (start, cache) in enumerate(zip(starts, caches)):
            joined.ids[b, start : joined.length] = cache.ids[0, : cache.length]
            for targets, sources in zip(joined.kept, cache.kept):
                for target, source in zip(targets, sources):
                    target[b, :, start : joined.length] = source[0, :, : cache.length]
        if any(starts):
            joined.first = torch.tensor(starts, device=device)
        return joined


class LayerCache:
    """What a KVCache holds for one layer: `tensors`, (B, H, room, D) each."""

    def __init__(self, cache, tensors):
        self.cache = cache
        self.tensors = tensors

    def update(self, *new):
        """Store the new tokens' part of each tensor, (B, H, T, D).

        Returns each tensor up to them, (B, H, L, D).
        """
        end = self.cache.length
        for tensor, x in zip(self.tensors, new):
            tensor[:, :, end - x.size(2) : end] = x
        return [tensor[:, :, :end] for tensor in self.tensors]

    def is_prompt(self, T):
        """Whether the T new tokens are all there are, in every row, as when a prompt is read."""
        return self.cache.length == T and self.cache.mask is None

    def attend(self, q, k, v, dropout=0.0, kernel='auto'):
        """Store k and v of the new tokens, and attend from q to all that it may see.

        q (B, H, T, D), k and v (B, H, T, D). Returns (B, H, T, D), in q's dtype.
        """
        all_k, all_v = self.update(k, v)
        dtype = all_k.dtype
        if self.is_prompt(q.size(2)):
            y = kernels.causal_attention(q.to(dtype), k.to(dtype), v.to(dtype), kernel=kernel)
        else:
            y = kernels.sdpa(q.to(dtype), all_k, all_v, mask=self.cache.mask)
        return y.to(q.dtype)


class PackedDocuments:
    """Rows of several documents, read at once: attention stays within a document.

    Each document's positions begin at 0. This stands in for a KVCache, and for each layer's
    LayerCache, when all tokens are new. On CUDA attention is then SDPA with a mask, which
    FlashAttention does not support: it is slower than causal attention alone.
    """

    def __init__(self, eot):
        self.eot = eot

    def extend(self, idx):
        """The positions of idx in their documents, (B, T), as KVCache.extend."""
        self.length = idx.size(1)
        self.mask = same_document(idx, self.eot, self.length).tril()  # (B, 1, T, T)
        return self.mask[:, 0].sum(-1) - 1

    @property
    def cache(self):
        return self

    @property
    def layers(self):
        return itertools.repeat(self)

    def previous_ids(self, n, T):
        """None before these: (B, n) of -1, as KVCache.previous_ids."""
        return self.mask.new_full((len(self.mask), n), -1, dtype=torch.int64)

    def update(self, *new):
        return new

    def is_prompt(self, T):
        return False  # it needs the mask

    def attend(self, q, k, v, dropout=0.0, kernel='auto'):
        return kernels.causal_attention(q, k, v, dropout, self.mask, kernel=kernel)


def same_document(ids, eot, T):
    """Which of L ids (B, L) are in the same document as each of the last T: bool (B, 1, T, L).

    A document begins with its `eot`.
    """
    number = (ids == eot).cumsum(1)  # (B, L)
    return (number[:, -T:, None] == number[:, None])[:, None]


def with_previous_ids(idx, n, cache=None):
    """idx (B, T) after the n ids before it, -1 where there are none: (B, n + T).

    With a cache, idx continues the tokens that it holds, and is added to them.
    """
    if cache is None:
        return F.pad(idx, (n, 0), value=-1)
    cache.extend(idx)
    return torch.cat([cache.previous_ids(n, idx.size(1)), idx], 1)
