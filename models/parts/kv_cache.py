"""What a model keeps of the tokens so far, and rows that hold several documents."""

import itertools

import torch
from torch.nn import functional as F

from models.parts import kernels


class KVCache:
    """What a model keeps of the tokens so far: their ids, and tensors per layer, such as keys and
    values. With it, one token more costs one row of each product.

    Every row of the batch fills the columns up to `length`. Prompts of different lengths end in the
    same column, so that the rows go on together; row b's tokens then begin at column first[b], and
    before it everything is zero. shapes: for each layer the (H, D) of each tensor that it keeps,
    (B, H, room, D); none for models that need only the ids. eot: see `same_document`.
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
            self.seen = self.seen & same_document(self.ids[:, : self.length], self.eot, T)
        # a token sees all from the first of its row, or document, on
        return self.seen[:, 0].sum(-1) - 1

    @property
    def layers(self):
        """A LayerCache for each layer."""
        return [LayerCache(self, kept) for kept in self.kept]

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


class LayerCache:
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

    def attend(self, q, k, v, dropout=0.0, kernel='auto'):
        """Keep k and v of the new tokens, and attend to all that q (B, H, T, D) may see: (B, H, T,
        D), in q's type."""
        past_k, past_v = self.keep(k, v)
        dtype = past_k.dtype
        if self.is_whole(q.size(2)):
            return kernels.causal_attention(*(x.to(dtype) for x in (q, k, v)), kernel=kernel).to(
                q.dtype
            )
        return kernels.sdpa(q.to(dtype), past_k, past_v, mask=self.cache.seen).to(q.dtype)


def same_document(ids, eot, T):
    """Which of L ids (B, L) are of the same document as each of the last T: bool (B, 1, T, L). It
    begins with its `eot`."""
    number = (ids == eot).cumsum(1)
    return (number[:, -T:, None] == number[:, None])[:, None]


class PackedDocuments:
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
        self.seen = same_document(idx, self.eot, self.length).tril()  # (B, 1, T, T)
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

    def attend(self, q, k, v, dropout=0.0, kernel='auto'):
        return kernels.causal_attention(q, k, v, dropout, self.seen, kernel=kernel)


def packed_documents(eot):
    """A PackedDocuments, or None where documents are read through, eot < 0."""
    return PackedDocuments(eot) if eot >= 0 else None


def with_previous_ids(idx, n, cache=None):
    """idx (B, T) behind the n ids before it, -1 where there were none: (B, n + T). A cache takes
    idx in."""
    if cache is None:
        return F.pad(idx, (n, 0), value=-1)
    cache.extend(idx)
    return torch.cat([cache.recent(n, idx.size(1)), idx], 1)
