"""Counted n-grams of any vocabulary, and the probabilities they give."""

import torch
from torch import nn
from torch.nn import functional as F

from models.parts.kv_cache import with_previous_ids

AT_ONCE = 2**24  # n-grams that NgramCounts.fit sorts together: 0.4 GB


class NgramCounts(nn.Module):
    """P(token | the n - 1 before it) = (count + k) / (total + k V), counted by `fit`.

    Only what occurs is kept. An n-gram is one number: its ids are digits to base V + 1, where 0
    stands for no token, the last one to base V. keys: these numbers, sorted, so that those of one
    context lie side by side; sums: the counts of all before each, and the whole. Where a window
    begins, what came before is unknown, and counts over all that may have serve.
    """

    def __init__(self, n, V, k):
        super().__init__()
        if (V + 1) ** n >= 2**63:
            raise ValueError(
                f"vocab_size={V} is too large to count {n} tokens together: {int(2 ** (63 / n)) - 2} at most"
            )
        self.n, self.V = n, V
        self.register_buffer('k', torch.tensor(float(k)), persistent=False)
        self.register_buffer('keys', torch.zeros(0, dtype=torch.int64))
        self.register_buffer('sums', torch.zeros(1, dtype=torch.int64))

    def forward(self, context):
        """Log-probabilities (B, T, V) of what follows each context (B, T, n - 1)."""
        number, inverse = self._number(context).unique(return_inverse=True)  # (N,), (B, T)
        first, end = torch.searchsorted(self.keys, torch.stack([number, number + 1]) * self.V)
        k = self.k.to(torch.promote_types(self.k.dtype, torch.float32))
        total = (self.sums[end] - self.sums[first] + k * self.V).log()  # (N,)
        logp = (k.log() - total)[:, None].repeat(1, self.V)  # (N, V)
        rows = torch.arange(len(number), device=number.device).repeat_interleave(end - first)
        at = torch.arange(len(rows), device=rows.device) + (end - (end - first).cumsum(0))[rows]
        logp[rows, self.keys[at] % self.V] = (self.sums[at + 1] - self.sums[at] + k).log() - total[
            rows
        ]
        return logp[inverse]

    def _number(self, ids):
        number = torch.zeros_like(ids[..., 0])
        for i in range(ids.size(-1)):
            number = number * (self.V + 1) + ids[..., i] + 1
        return number

    @torch.no_grad()
    def fit(self, batches):
        """Count anew, over batches of (idx, targets). Targets of -1 are not counted."""
        keys, counts, new, n_new = (
            torch.zeros(0, dtype=torch.int64),
            torch.zeros(0, dtype=torch.int64),
            [],
            0,
        )
        for idx, targets in batches:
            idx, targets = torch.as_tensor(idx).cpu(), torch.as_tensor(targets).cpu()
            context = (
                with_previous_ids(idx, self.n - 2).unfold(1, self.n - 1, 1).clone()
            )  # (B, T, n - 1)
            counted = targets >= 0
            for i in range(self.n - 1):  # the whole context, then with less and less of its left
                new.append((self._number(context) * self.V + targets)[counted])
                n_new += len(new[-1])
                counted = counted & (context[..., i] >= 0)  # else the shorter context is this one
                context[..., i] = -1
            if n_new > AT_ONCE:
                (keys, counts), new, n_new = _add_counts(keys, counts, new), [], 0
        keys, counts = _add_counts(keys, counts, new)
        self.keys, self.sums = (
            keys.to(self.keys.device),
            F.pad(counts.cumsum(0), (1, 0)).to(self.keys.device),
        )

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name in ('keys', 'sums'):  # as long as the counts are that come
            if prefix + name in state_dict:
                setattr(self, name, getattr(self, name).new_empty(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _add_counts(keys, counts, new):
    """Sorted keys and their counts, with one more for each that is in the tensors `new`."""
    keys, inverse = torch.cat([keys, *new]).unique(return_inverse=True)
    more = torch.ones(len(inverse) - len(counts), dtype=torch.int64)
    return keys, torch.zeros_like(keys).index_add_(0, inverse, torch.cat([counts, more]))
