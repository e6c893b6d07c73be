"""The next token by the one before it alone: counts, or a table of logits that is learned.

counted: P(b | a) = (count(a b) + k) / (count(a) + k V), additive smoothing; one pass over the
data, no optimizer. Only pairs that occur are kept, so any vocabulary will do. learned: row a of a V
x V table holds the logits after a; it begins with zeros and ends where the counts are, which are
its maximum likelihood. With `rank`, for large vocabularies, it is the product of a V x rank and a
rank x V matrix. Against GPT: no layers, no positions, a context of one token. What any other model
has to beat.

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
    rank: int = 0  # learned: the table's rank; 0: a whole table

    def __post_init__(self):
        for name in ('block_size', 'vocab_size'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a bigram model needs at least 1")
        if self.table not in ('counted', 'learned'):
            raise ValueError(f"table={self.table!r} is unknown: take counted or learned")
        if self.k != 1 and self.table == 'learned':
            raise ValueError(f"k={self.k} is for table=counted: leave it out")
        if not self.k > 0:
            raise ValueError(
                f"k={self.k} must be above 0, however little: what never occurred would be impossible"
            )
        if self.rank < 0 or (self.rank and self.table == 'counted'):
            raise ValueError(f"rank={self.rank}: take 0, or with table=learned more")
        if self.table == 'learned' and not self.rank and self.vocab_size**2 > 2**28:
            raise ValueError(
                f"vocab_size={self.vocab_size}: a table of all pairs is too large to learn: take --rank=64"
            )


class Table(nn.Embedding):
    """A row of logits for each token: (B, T, 1) -> (B, T, V)."""

    def __init__(self, config):
        super().__init__(config.vocab_size, config.vocab_size)
        nn.init.zeros_(self.weight)

    def forward(self, context):
        return super().forward(context[..., 0])


class LowRankTable(nn.Module):
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
                'learns': "counts are no parameters",
            }
        elif config.rank:
            self.lm_head = LowRankTable(config)
        else:
            self.lm_head = Table(config)
            self.exemptions = {'flops': "a table is looked up"}

    def forward(self, idx, targets=None, cache=None):
        if idx.size(1) > self.config.block_size:
            raise ValueError(
                f"{idx.size(1)} tokens do not fit into block_size={self.config.block_size}"
            )
        context = kv_cache.with_previous_ids(idx, 0, cache)[..., None]  # (B, T, 1)
        # (B, T, V), or (B, 1, V)
        logits = self.lm_head(context if targets is not None else context[:, -1:])
        if targets is None:
            return logits, None
        return logits, kernels.cross_entropy(logits, targets)

    def init_cache(self, batch, length, device=None, dtype=None):
        return kv_cache.KVCache(batch, length, [], device, dtype)

    def flops_per_token(self, T):
        """6 per parameter that is multiplied with; tables are looked up."""
        return 6 * sum(p.numel() for p in self.param_groups()['head'])

    def crop_block_size(self, block_size):
        """Another longest window, in place: nothing depends on it."""
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1")
        self.config.block_size = block_size
