"""A neural probabilistic language model: an MLP over the embeddings of the last `context` tokens,
laid side by side.

Bengio, Ducharme, Vincent, Jauvin 2003, https://www.jmlr.org/papers/v3/bengio03a.html: logits = U
tanh(H x + d) + b, and with `direct` + W x. Against GPT: no attention; a context of fixed length,
each place of which has weights of its own. Before a window's first token is padding, with an
embedding of its own.

`batchnorm` normalises what tanh gets, as batchnorm.BATCH_NORMS says: ema (moving averages),
precise (measured before each evaluation), frozen (measured once), batch (those of the mini-batch,
in use too). In training it lets places learn of each other, so that none sees the future holds in
eval mode only.

Shapes: B batch, T time, C channels, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import nn

from model import LanguageModel
from models.parts import batchnorm, kernels, kv_cache, layers


@dataclass
class MLPConfig:
    block_size: int = 1024  # longest window, in tokens
    vocab_size: int = 50304  # ids are below it
    context: int = 3  # tokens that a prediction is made from, however long the window
    n_embd: int = 10  # channels (C) of each
    n_hidden: int = 200  # hidden units
    direct: bool = False  # a matrix from the embeddings to the logits, past the hidden units
    batchnorm: str = ''  # of the hidden units: ema, precise, frozen or batch; '': none
    init: str = 'kaiming'  # of the matrices: kaiming or xavier

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'context', 'n_embd', 'n_hidden'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: an MLP needs at least 1")
        if self.context > self.block_size:
            raise ValueError(
                f"context={self.context} is longer than a window: take at most block_size={self.block_size}"
            )
        for name, known in (('batchnorm', batchnorm.BATCH_NORMS), ('init', layers.INITS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown: take {' or '.join(filter(None, known))}"
                )


class Hidden(nn.Module):
    """tanh(H x + d); with batch norm, whose bias is d."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(
            config.context * config.n_embd, config.n_hidden, bias=not config.batchnorm
        )
        self.norm = batchnorm.BATCH_NORMS[config.batchnorm](config.n_hidden)
        self.n_out = config.n_hidden

    def forward(self, x, valid):
        return torch.tanh(self.norm(self.c_fc(x), valid))


class HiddenAndDirect(Hidden):
    """x beside the hidden units: the head's columns for it are W."""

    def __init__(self, config):
        super().__init__(config)
        self.n_out += self.c_fc.in_features

    def forward(self, x, valid):
        h = super().forward(x, valid)
        return torch.cat([h, x.type_as(h)], -1)


class MLP(LanguageModel):
    Config = MLPConfig

    def __init__(self, config):
        super().__init__(config)
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size + 1, config.n_embd),  # the last row: padding
                h=(HiddenAndDirect if config.direct else Hidden)(config),
            )
        )
        self.lm_head = nn.Linear(self.transformer.h.n_out, config.vocab_size)
        layers.INITS[config.init](self.transformer.h.c_fc.weight, 'tanh')
        layers.INITS[config.init](self.lm_head.weight, 'linear')
        self.lm_head.weight.data.mul_(0.1)  # nearly all tokens alike at first
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if config.batchnorm == 'batch':
            self.exemptions = batchnorm.ONE_BATCH
        elif config.batchnorm in ('ema', 'precise'):
            self.exemptions = batchnorm.IN_TRAINING

    def forward(self, idx, targets=None, cache=None):
        if idx.size(1) > self.config.block_size:
            raise ValueError(
                f"{idx.size(1)} tokens do not fit into block_size={self.config.block_size}"
            )
        V, n = self.config.vocab_size, self.config.context
        ids = kv_cache.with_previous_ids(idx, n - 1, cache) % (V + 1)  # -1, no token, is V
        x = self.transformer.wte(ids.unfold(1, n, 1)).flatten(2)  # (B, T, n C)
        x = self.transformer.h(x, None if targets is None else targets >= 0)
        logits = self.lm_head(x if targets is not None else x[:, -1:])  # (B, T, V), or (B, 1, V)
        if targets is None:
            return logits, None
        return logits, kernels.cross_entropy(logits, targets)

    def calibrate(self, batches):
        batchnorm.measure_statistics(self, batches)

    def init_cache(self, batch, length, device=None, dtype=None):
        return (
            kv_cache.KVCache(batch, length, [], device, dtype)
            if self.config.batchnorm != 'batch'
            else None
        )

    def flops_per_token(self, T):
        """6 per parameter that is multiplied with: embeddings are looked up."""
        return 6 * (self.num_params() - self.transformer.wte.weight.numel())

    def crop_block_size(self, block_size):
        """Another longest window, in place: nothing depends on it."""
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1")
        self.config.block_size = block_size
