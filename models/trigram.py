"""Trigram: the next token by the last two, from counts or from a table of logits.

table=counted: P(c | a b) = (count(a b c) + k) / (count(a b) + k V), additive smoothing, in one pass
over the data. Only triples that occur are stored, so any vocabulary is possible. The token before a
window's first is not known: there it is P(c | b), over all pairs. table=learned: a table of logits
with a row for each (a, b), and for each b alone: (V + 1) V rows. With `rank`, for large
vocabularies, logits = (A[a] * B[b]) C, which is a table of that rank (canonical polyadic
decomposition, Hitchcock 1927).

Changes from Bigram (bigram.py):
- one more token of context, and so many more triples than pairs that `k` begins to matter.

Shapes: B batch, T time, V vocabulary.
"""

from dataclasses import dataclass

from torch import nn

from model import LanguageModel
from models.parts import kernels, kv_cache, ngrams


@dataclass
class TrigramConfig:
    block_size: int = 1024  # longest window, in tokens, of which the model reads the last two
    vocab_size: int = 50304  # ids are below it
    table: str = 'counted'  # counted (in one pass over the data) or learned (by the optimizer)
    k: float = 1.0  # counted: added to every count, so that nothing is impossible
    rank: int = 0  # learned: the table's rank; 0: a full table

    def __post_init__(self):
        for name in ('block_size', 'vocab_size'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a trigram model needs at least 1")
        if self.table not in ('counted', 'learned'):
            raise ValueError(f"table={self.table!r} is unknown: use counted or learned")
        if self.k != 1 and self.table == 'learned':
            raise ValueError(f"k={self.k} has no effect with table=learned: omit it")
        if not self.k > 0:
            raise ValueError(
                f"k={self.k} must be above 0, however small: it keeps new triples possible"
            )
        if self.rank < 0:
            raise ValueError(f"rank={self.rank} must be at least 0")
        if self.rank and self.table == 'counted':
            raise ValueError(f"rank={self.rank} needs table=learned")
        n_entries = (self.vocab_size + 1) * self.vocab_size**2
        if self.table == 'learned' and not self.rank and n_entries > 2**28:
            raise ValueError(
                f"vocab_size={self.vocab_size}: a table of all triples is too large to learn: use "
                "--rank=64"
            )


class Table(nn.Embedding):
    """A row of logits for each pair of tokens: (B, T, 2) -> (B, T, V).

    The first of them may be missing, -1.
    """

    def __init__(self, config):
        V = config.vocab_size
        super().__init__((V + 1) * V, V)
        nn.init.zeros_(self.weight)

    def forward(self, context):
        V = self.embedding_dim
        return super().forward((context[..., 0] + 1) * V + context[..., 1])


class LowRankTable(nn.Module):
    """The same as a product of three matrices."""

    def __init__(self, config):
        super().__init__()
        V = config.vocab_size
        # A, with one row more for a missing token, and B
        self.wte = nn.ModuleList([nn.Embedding(V + 1, config.rank), nn.Embedding(V, config.rank)])
        self.c_proj = nn.Linear(config.rank, V, bias=False)
        # Around 1, so that at first the last token alone decides
        nn.init.normal_(self.wte[0].weight, mean=1.0)
        nn.init.normal_(self.c_proj.weight, std=0.1 * config.rank**-0.5)

    def forward(self, context):
        first = self.wte[0](context[..., 0] + 1)  # (B, T, rank)
        last = self.wte[1](context[..., 1])
        return self.c_proj(first * last)


class Trigram(LanguageModel):
    Config = TrigramConfig

    def __init__(self, config):
        super().__init__(config)
        if config.table == 'counted':
            self.lm_head = ngrams.NgramCounts(3, config.vocab_size, config.k)
            self.fit = self.lm_head.fit
            self.exemptions = {
                'flops': "counts are looked up",
                'learns': "counts are not parameters",
            }
        elif config.rank:
            self.lm_head = LowRankTable(config)
        else:
            self.lm_head = Table(config)
            self.exemptions = {'flops': "a table is looked up"}

    def forward(self, idx, targets=None, cache=None):
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size={self.config.block_size}")
        context = kv_cache.with_previous_ids(idx, 1, cache).unfold(1, 2, 1)  # (B, T, 2)

        if targets is None:  # generation needs the last position alone
            context = context[:, -1:]
        logits = self.lm_head(context)  # (B, T, V), or (B, 1, V)
        if targets is None:
            return logits, None
        return logits, kernels.cross_entropy(logits, targets)

    def init_cache(self, batch, length, device=None, dtype=None):
        return kv_cache.KVCache(batch, length, [], device, dtype)

    def flops_per_token(self, T):
        """6 per parameter of a matrix product; tables are looked up."""
        return 6 * sum(p.numel() for p in self.param_groups()['head'])

    def crop_block_size(self, block_size):
        """Set the longest window, in place: no weight depends on it."""
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1")
        self.config.block_size = block_size
