"""MLP: an MLP over the embeddings of the last `context` tokens, side by side.

A neural probabilistic language model (Bengio, Ducharme, Vincent, Jauvin 2003,
https://www.jmlr.org/papers/v3/bengio03a.html):
logits = U tanh(H x + d) + b, and with `direct` + W x.

Changes from GPT (model.py):
- no attention: a context of fixed length, each place of which has weights of its own;
- the places before a window's first token are padding, which has an embedding of its own;
- `batchnorm` normalises what tanh gets, by one of batchnorm.BATCH_NORMS: ema (moving averages),
  precise (measured before each evaluation), frozen (measured once) or batch (the mini-batch's
  statistics, in eval mode too). In training it mixes positions: only in eval mode are later tokens
  hidden from earlier ones.

Shapes: B batch, T time, C channels, V vocabulary; n places of context.
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
            raise ValueError(f"context={self.context} must be at most block_size={self.block_size}")
        batchnorm.check(self.batchnorm)
        layers.check_init(self.init)


class Hidden(nn.Module):
    """tanh(H x + d): (B, T, n·C) -> (B, T, n_hidden). With batch norm, d is the norm's bias."""

    def __init__(self, config):
        super().__init__()
        self.n_out = config.n_hidden
        n_in = config.context * config.n_embd
        self.c_fc = nn.Linear(n_in, config.n_hidden, bias=not config.batchnorm)
        self.norm = batchnorm.BATCH_NORMS[config.batchnorm](config.n_hidden)

    def forward(self, x, valid):
        return torch.tanh(self.norm(self.c_fc(x), valid))


class HiddenAndDirect(Hidden):
    """Hidden units and x side by side: the head's columns for x are W."""

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
        hidden = HiddenAndDirect if config.direct else Hidden
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size + 1, config.n_embd),  # the last row: padding
                h=hidden(config),
            )
        )
        self.lm_head = nn.Linear(self.transformer.h.n_out, config.vocab_size)

        init = layers.INITS[config.init]
        init(self.transformer.h.c_fc.weight, 'tanh')
        init(self.lm_head.weight, 'linear')
        self.lm_head.weight.data.mul_(0.1)  # at first all tokens are almost equally likely
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.exemptions = batchnorm.EXEMPTIONS[config.batchnorm]

    def forward(self, idx, targets=None, cache=None):
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size={self.config.block_size}")
        n = self.config.context
        ids = kv_cache.with_previous_ids(idx, n - 1, cache)  # (B, n - 1 + T)
        ids = ids % (self.config.vocab_size + 1)  # -1, padding, is the embeddings' last row
        x = self.transformer.wte(ids.unfold(1, n, 1))  # (B, T, n, C)
        x = x.flatten(2)  # (B, T, n·C)
        valid = None if targets is None else targets >= 0
        x = self.transformer.h(x, valid)

        if targets is None:  # generation needs the last position alone
            x = x[:, -1:]
        logits = self.lm_head(x)  # (B, T, V), or (B, 1, V)
        if targets is None:
            return logits, None
        return logits, kernels.cross_entropy(logits, targets)

    def calibrate(self, batches):
        batchnorm.measure_statistics(self, batches)

    def init_cache(self, batch, length, device=None, dtype=None):
        if self.config.batchnorm == 'batch':
            return None  # a prediction depends on the whole batch
        return kv_cache.KVCache(batch, length, [], device, dtype)

    def flops_per_token(self, T):
        """6 per parameter of a matrix product; embeddings are looked up."""
        return 6 * (self.num_params() - self.transformer.wte.weight.numel())

    def crop_block_size(self, block_size):
        """Set the longest window, in place: no weight depends on it."""
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1")
        self.config.block_size = block_size
