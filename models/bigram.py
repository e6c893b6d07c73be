"""Bigram: the next token by the last one alone, from counts or from a table of logits.

table=counted: P(b | a) = (count(a b) + k) / (count(a) + k V), additive smoothing, in one pass over
the data. Only pairs that occur are stored, so any vocabulary is possible. table=learned: row a of a
V x V table holds the logits after a; it starts at zero and converges to the counts, which are its
maximum likelihood. With `rank`, for large vocabularies, the table is the product of a V x rank and
a rank x V matrix.

Changes from GPT (model.py):
- no layers and no positions: a context of one token. Every other model has to beat this one.

Shapes: B batch, T time, V vocabulary.
"""

from dataclasses import dataclass

from torch import nn

from model import LanguageModel
from models.parts import kernels, kv_cache, ngrams


@dataclass
class BigramConfig:
    block_size: int = 1024  # longest window, in tokens, of which the model reads the last
    vocab_size: int = 50304  # ids are below it
    table: str = 'counted'  # counted (in one pass over the data) or learned (by the optimizer)
    k: float = 1.0  # counted: added to every count, so that nothing is impossible
    rank: int = 0  # learned: the table's rank; 0: a full table

    def __post_init__(self):
        for name in ('block_size', 'vocab_size'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a bigram model needs at least 1")
        if self.table not in ('counted', 'learned'):
            raise ValueError(f"table={self.table!r} is unknown: use counted or learned")
        if self.k != 1 and self.table == 'learned':
            raise ValueError(f"k={self.k} has no effect with table=learned: omit it")
        if not self.k > 0:
            raise ValueError(
                f"k={self.k} must be above 0, however small: it keeps new pairs possible"
            )
        if self.rank < 0:
            raise ValueError(f"rank={self.rank} must be at least 0")
        if self.rank and self.table == 'counted':
            raise ValueError(f"rank={self.rank} needs table=learned")
        n_entries = self.vocab_size**2
        if self.table == 'learned' and not self.rank and n_entries > 2**28:
            raise ValueError(
                f"vocab_size={self.vocab_size}: a table of all pairs is too large to learn: use "
                "--rank=64"
            )


class Table(nn.Embedding):
    """A row of logits for each token: (B, T, 1) -> (B, T, V)."""

    def __init__(self, config):
        super().__init__(config.vocab_size, config.vocab_size)
        nn.init.zeros_(self.weight)

    def forward(self, context):
        return super().forward(context[..., 0])


class LowRankTable(nn.Module):
    """The same as a product of two matrices."""

    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.rank)
        self.c_proj = nn.Linear(config.rank, config.vocab_size, bias=False)
        nn.init.normal_(self.c_proj.weight, std=0.1 * config.rank**-0.5)

    def forward(self, context):
        return self.c_proj(self.wte(context[..., 0]))


class Bigram(LanguageModel):
    Config = BigramConfig

    def __init__(self, config):
        super().__init__(config)
        if config.table == 'counted':
            self.lm_head = ngrams.NgramCounts(2, config.vocab_size, config.k)
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
        context = kv_cache.with_previous_ids(idx, 0, cache)[..., None]  # (B, T, 1)

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
