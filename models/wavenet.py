"""Causal convolutions whose reach doubles from layer to layer: a context of 2^n_layer tokens by
n_layer products.

form=gated: WaveNet (van den Oord et al. 2016, arXiv 1609.03499). In each layer, with * a
convolution that looks back in steps of its dilation 1, 2, 4, …: z = tanh(W_f * x) σ(W_g * x); x
grows by a 1x1 product of z, and what the head reads grows by another, the skips. The head: ReLU,
1x1, ReLU, 1x1. `n_stack` stacks of `n_layer` layers, each beginning at dilation 1. Generation keeps
each layer's inputs (fast WaveNet, arXiv 1611.09482). Before the first token are zeros.

form=hierarchical: the MLP (mlp.py) whose context is taken in by pairs, pairs of pairs, …: each
level is a Linear over two neighbours, batch norm, tanh. It is a tree over 2^n_layer tokens at every
position: convolutions of kernel 2 with dilations 1, 2, 4, …, so that trees share their branches.
Before the first token is padding, with an embedding of its own. That none sees the future holds in
eval mode only, as in mlp.py, which also says what `batchnorm` may be.

Against GPT: no attention, no position embeddings; the context is `receptive_field` tokens and
block_size only the window. Shapes: B batch, T time, C channels, V vocabulary.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from model import LanguageModel
from models.parts import batchnorm, kernels, kv_cache, layers


@dataclass
class WavenetConfig:
    block_size: int = 1024  # longest window, in tokens
    vocab_size: int = 50304  # ids are below it
    form: str = 'gated'  # gated (WaveNet's) or hierarchical (a tree of pairs)
    # layers of a stack, the last of which looks back by 2^(n_layer - 1); levels of the tree
    n_layer: int = 10
    n_stack: int = 1  # gated: stacks, one behind the other
    kernel: int = 2  # gated: tokens that one layer looks at
    n_embd: int = 64  # channels (C) of the embeddings; gated: of the layers too
    n_skip: int = 0  # gated: channels of the skips; 0: as many as n_embd
    n_hidden: int = 128  # hierarchical: units of each level
    batchnorm: str = ''  # hierarchical: ema, precise, frozen or batch; '': none
    dropout: float = 0.0  # gated: probability, on what each layer adds to x and to the skips
    init: str = 'kaiming'  # of the matrices: kaiming or xavier

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_stack', 'n_embd', 'n_hidden'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a WaveNet needs at least 1")
        if self.kernel < 2 or self.n_skip < 0 or self.n_layer > 24:
            raise ValueError(
                f"kernel={self.kernel}, n_skip={self.n_skip}, n_layer={self.n_layer}: take a kernel from 2, "
                "n_skip from 0, n_layer up to 24, which is 16 million tokens"
            )
        if self.n_layer * self.n_stack > 1000:
            raise ValueError(
                f"n_layer={self.n_layer} x n_stack={self.n_stack}: take at most 1000 layers in all"
            )
        for name, known in (
            ('form', FORMS),
            ('batchnorm', batchnorm.BATCH_NORMS),
            ('init', layers.INITS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown: take {' or '.join(filter(None, known))}"
                )
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout={self.dropout}: take a probability from 0 up to, not including, 1"
            )
        others = (
            dict(batchnorm='', n_hidden=128)
            if self.form == 'gated'
            else dict(n_stack=1, kernel=2, n_skip=0, dropout=0.0)
        )
        for name, value in others.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"form={self.form} has no {name}: leave out {name}={getattr(self, name)}"
                )


class Layer(nn.Module):
    """(B, T, C) -> what goes on to the next layer, (B, T, C), and the skip, (B, T, n_skip)."""

    def __init__(self, config, dilation):
        super().__init__()
        C = config.n_embd
        self.kernel, self.dilation = config.kernel, dilation
        # W_f above W_g; a place is C of its columns, the oldest first
        self.c_fc = nn.Linear(config.kernel * C, 2 * C)
        self.c_fc.weight.n_matrices = 2
        self.c_proj = nn.Linear(C, C)
        self.c_skip = nn.Linear(C, config.n_skip or C)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, past=None):
        z = self.gate(x, past)
        return layers.residual_add(x, self.dropout(self.c_proj(z))), self.dropout(self.c_skip(z))

    def gate(self, x, past):
        T, reach = x.size(1), (self.kernel - 1) * self.dilation
        # (B, T or more, C)
        known = x if past is None else past.keep(x[:, None])[0][:, 0].type_as(x)
        known = F.pad(known, (0, 0, max(0, reach + T - known.size(1)), 0))[:, -(reach + T) :]
        taps = [known[:, i * self.dilation :][:, :T] for i in range(self.kernel)]
        f, g = self.c_fc(torch.cat(taps, -1)).chunk(2, -1)  # (B, T, C) each
        return torch.tanh(f) * torch.sigmoid(g)


class LastLayer(Layer):
    """The head reads the skips alone: nothing goes on."""

    def __init__(self, config, dilation):
        super().__init__(config, dilation)
        del self.c_proj

    def forward(self, x, past=None):
        return None, self.dropout(self.c_skip(self.gate(x, past)))


class Gated(nn.Module):
    """idx (B, T) -> what the head reads, (B, T, n_skip)."""

    def __init__(self, config):
        super().__init__()
        dilations = [2**i for i in range(config.n_layer)] * config.n_stack
        self.receptive_field = 1 + (config.kernel - 1) * sum(dilations)
        self.n_out = config.n_skip or config.n_embd
        self.shapes = [[(1, config.n_embd)]] * len(dilations)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.h = nn.ModuleList(
            [*(Layer(config, d) for d in dilations[:-1]), LastLayer(config, dilations[-1])]
        )
        self.c_proj = nn.Linear(self.n_out, self.n_out)
        init = layers.INITS[config.init]
        for layer in self.h:
            init(layer.c_fc.weight, 'tanh')
            init(layer.c_skip.weight, 'linear')
            # a sum of so many has a variance of about 1
            layer.c_skip.weight.data.mul_(len(dilations) ** -0.5)
        for layer in self.h[:-1]:
            init(layer.c_proj.weight, 'linear')
            layer.c_proj.weight.data.mul_(len(dilations) ** -0.5)
        init(self.c_proj.weight, 'relu')

    def forward(self, idx, valid=None, cache=None):
        if cache:
            cache.extend(idx)
        x, skips = self.wte(idx), 0.0
        for layer, past in zip(self.h, cache.layers if cache else itertools.repeat(None)):
            x, skip = layer(x, past)
            skips = skips + skip
        return F.relu(self.c_proj(F.relu(skips)))


class Level(nn.Module):
    """Each pair (x[t - dilation], x[t]) to units: (B, T, C) -> (B, T - dilation, n_hidden)."""

    def __init__(self, config, C, dilation):
        super().__init__()
        self.dilation = dilation
        self.c_fc = nn.Linear(2 * C, config.n_hidden, bias=not config.batchnorm)
        self.norm = batchnorm.BATCH_NORMS[config.batchnorm](config.n_hidden)

    def forward(self, x, valid):
        x = self.c_fc(torch.cat([x[:, : -self.dilation], x[:, self.dilation :]], -1))
        return torch.tanh(self.norm(x, valid[:, -x.size(1) :]))


class Hierarchical(nn.Module):
    """idx (B, T) -> what the head reads, (B, T, n_hidden)."""

    def __init__(self, config):
        super().__init__()
        self.receptive_field, self.n_out, self.shapes = 2**config.n_layer, config.n_hidden, []
        self.wte = nn.Embedding(config.vocab_size + 1, config.n_embd)  # the last row: padding
        widths = [config.n_embd] + [config.n_hidden] * (config.n_layer - 1)
        self.h = nn.ModuleList(Level(config, C, 2**i) for i, C in enumerate(widths))
        for level in self.h:
            layers.INITS[config.init](level.c_fc.weight, 'tanh')

    def forward(self, idx, valid=None, cache=None):
        n = self.receptive_field - 1
        valid = torch.ones_like(idx, dtype=torch.bool) if valid is None else valid
        # what is before counts as the first does
        valid = torch.cat([valid[:, :1].expand(-1, n), valid], 1)
        # -1, no token, is the last row
        x = self.wte(kv_cache.with_previous_ids(idx, n, cache) % self.wte.num_embeddings)
        for level in self.h:
            x = level(x, valid)
        return x


FORMS = {'gated': Gated, 'hierarchical': Hierarchical}


class Wavenet(LanguageModel):
    Config = WavenetConfig

    def __init__(self, config):
        super().__init__(config)
        self.transformer = FORMS[config.form](config)
        self.lm_head = nn.Linear(self.transformer.n_out, config.vocab_size)
        layers.INITS[config.init](self.lm_head.weight, 'linear')
        self.lm_head.weight.data.mul_(0.1)  # nearly all tokens alike at first
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        if config.batchnorm == 'batch':
            self.exemptions = batchnorm.ONE_BATCH
        elif config.batchnorm in ('ema', 'precise'):
            self.exemptions = batchnorm.IN_TRAINING

    @property
    def receptive_field(self):
        """How many tokens, its own among them, a position sees."""
        return self.transformer.receptive_field

    def forward(self, idx, targets=None, cache=None):
        if idx.size(1) > self.config.block_size:
            raise ValueError(
                f"{idx.size(1)} tokens do not fit into block_size={self.config.block_size}"
            )
        x = self.transformer(idx, None if targets is None else targets >= 0, cache)
        logits = self.lm_head(x if targets is not None else x[:, -1:])  # (B, T, V), or (B, 1, V)
        if targets is None:
            return logits, None
        return logits, kernels.cross_entropy(logits, targets)

    def calibrate(self, batches):
        batchnorm.measure_statistics(self, batches)

    def init_cache(self, batch, length, device=None, dtype=None):
        if self.config.batchnorm == 'batch':
            return None
        return kv_cache.KVCache(
            batch, length, self.transformer.shapes, device, dtype or self.cache_dtype
        )

    def flops_per_token(self, T):
        """6 per parameter that is multiplied with: embeddings are looked up."""
        return 6 * (self.num_params() - self.transformer.wte.weight.numel())

    def crop_block_size(self, block_size):
        """Another longest window, in place: nothing depends on it."""
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1")
        self.config.block_size = block_size
