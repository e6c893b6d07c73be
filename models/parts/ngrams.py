"""Counted n-grams over any vocabulary, and the probabilities that they give.

Shapes: B batch, T time, V vocabulary, N distinct contexts.
"""

import torch
from torch import nn
from torch.nn import functional as F

from models.parts.kv_cache import with_previous_ids
from models.parts.layers import at_least_float32

MAX_PENDING = 2**24  # n-grams that NgramCounts.fit sorts at once: 0.4 GB


class NgramCounts(nn.Module):
    """P(token | the n - 1 before it) = (count + k) / (total + k V), counted by `fit`.

    Only n-grams that occur are stored, each as one number: its ids are the digits to base V + 1,
    where 0 stands for "no token", and the last to base V.

        keys  these numbers, sorted, so that those of one context lie side by side
        sums  keys' cumulative counts: sums[i] counts all before keys[i], and sums[-1] is the total

    The tokens before a window's first are not known. There a shorter context is used, whose counts
    are of all n-grams that end in it.
    """

    def __init__(self, n, V, k):
        super().__init__()
        if (V + 1) ** n >= 2**63:
            most = int(2 ** (63 / n)) - 2
            raise ValueError(
                f"vocab_size={V} is too large to count {n} tokens together: {most} at most"
            )
        self.n = n
        self.V = V
        self.register_buffer('k', torch.tensor(float(k)), persistent=False)
        self.register_buffer('keys', torch.zeros(0, dtype=torch.int64))
        self.register_buffer('sums', torch.zeros(1, dtype=torch.int64))

    def forward(self, context):
        """Log-probabilities (B, T, V) of the token after each context (B, T, n - 1)."""
        numbers, inverse = self._number(context).unique(return_inverse=True)  # (N,), (B, T)
        # keys[first:end] are the n-grams of each context
        limits = torch.stack([numbers, numbers + 1]) * self.V
        first, end = torch.searchsorted(self.keys, limits)  # (N,) each

        # A token that never followed the context: k / (total + k V)
        k = at_least_float32(self.k)
        log_total = (self.sums[end] - self.sums[first] + k * self.V).log()  # (N,)
        logp = (k.log() - log_total)[:, None].repeat(1, self.V)  # (N, V)

        # Those that did: for each row of logp, its keys one after the other
        n_keys = end - first
        rows = torch.arange(len(numbers), device=numbers.device).repeat_interleave(n_keys)
        places = torch.arange(len(rows), device=rows.device) + (end - n_keys.cumsum(0))[rows]
        tokens = self.keys[places] % self.V
        counts = self.sums[places + 1] - self.sums[places]
        logp[rows, tokens] = (counts + k).log() - log_total[rows]
        return logp[inverse]

    def _number(self, ids):
        """ids (…, n) as one number each, (…): digits to base V + 1, -1 as 0."""
        number = torch.zeros_like(ids[..., 0])
        for i in range(ids.size(-1)):
            number = number * (self.V + 1) + ids[..., i] + 1
        return number

    @torch.no_grad()
    def fit(self, batches):
        """Count anew, over batches of (idx, targets); targets of -1 do not count."""
        keys = torch.zeros(0, dtype=torch.int64)
        counts = torch.zeros(0, dtype=torch.int64)
        pending = []  # tensors of n-grams that are not in keys yet
        n_pending = 0
        for idx, targets in batches:
            idx = torch.as_tensor(idx).cpu()
            targets = torch.as_tensor(targets).cpu()
            ids = with_previous_ids(idx, self.n - 2)
            context = ids.unfold(1, self.n - 1, 1).clone()  # (B, T, n - 1)
            counted = targets >= 0
            # Count with the whole context, then with ever fewer of its first tokens.
            for i in range(self.n - 1):
                ngrams = self._number(context) * self.V + targets
                pending.append(ngrams[counted])
                n_pending += len(pending[-1])
                counted = counted & (context[..., i] >= 0)  # else the shorter one is the same
                context[..., i] = -1
            if n_pending > MAX_PENDING:
                keys, counts = _add_counts(keys, counts, pending)
                pending = []
                n_pending = 0
        keys, counts = _add_counts(keys, counts, pending)

        device = self.keys.device
        self.keys = keys.to(device)
        self.sums = F.pad(counts.cumsum(0), (1, 0)).to(device)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        # Take on the sizes of the stored counts, which depend on the data.
        for name in ('keys', 'sums'):
            stored = state_dict.get(prefix + name)
            if stored is not None:
                setattr(self, name, getattr(self, name).new_empty(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _add_counts(keys, counts, new):
    """Sorted keys and their counts after counting each number in the tensors `new` once."""
    keys, inverse = torch.cat([keys, *new]).unique(return_inverse=True)
    ones = torch.ones(len(inverse) - len(counts), dtype=torch.int64)
    counts = torch.zeros_like(keys).index_add_(0, inverse, torch.cat([counts, ones]))
    return keys, counts
