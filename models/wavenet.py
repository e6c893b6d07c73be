"""WaveNet: causal convolutions whose dilation doubles from layer to layer.

Thus n_layer products reach 2^n_layer tokens.

form=gated is WaveNet (van den Oord et al. 2016, arXiv 1609.03499). Where * is a convolution that
looks back in steps of its layer's dilation 1, 2, 4, …, each layer computes
z = tanh(W_f * x) σ(W_g * x); a 1x1 product of z is added to x, another to the skips, which the head
reads: ReLU, 1x1, ReLU, 1x1. `n_stack` stacks of `n_layer` layers each begin at dilation 1. There
are zeros before the first token. Generation keeps each layer's inputs (fast WaveNet, arXiv
1611.09482).

form=hierarchical is the MLP (mlp.py) whose context is read in pairs, pairs of pairs, …: each level
is a Linear over two neighbours, batch norm, tanh. That is a tree over 2^n_layer tokens at every
position; as convolutions of kernel 2 with dilations 1, 2, 4, …, trees share their branches. There
is padding before the first token, with an embedding of its own. As in mlp.py, which also explains
`batchnorm`, later tokens are hidden from earlier ones in eval mode only.

Changes from GPT (model.py):
- no attention: each layer sees a few tokens, farther apart from layer to layer;
- no position embeddings;
- the context is `receptive_field` tokens, and block_size only the window.

Shapes: B batch, T time, C channels, V vocabulary.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from model import LanguageModel
from models.parts import batchnorm, kernels, kv_cache, layers

# Fields that only one form has, and the default that they must keep in the other
ONLY_GATED = {'n_stack': 1, 'kernel': 2, 'n_skip': 0, 'dropout': 0.0}
ONLY_HIERARCHICAL = {'batchnorm': '', 'n_hidden': 128}


@dataclass
class WavenetConfig:
    block_size: int = 1024  # longest window, in tokens
    vocab_size: int = 50304  # ids are below it
    form: str = 'gated'  # gated (WaveNet's) or hierarchical (a tree of pairs)
    n_layer: int = 10  # layers of a stack, of which the last looks back 2^(n_layer-1); tree levels
    n_stack: int = 1  # gated: stacks, one after the other
    kernel: int = 2  # gated: tokens that one layer looks at
    n_embd: int = 64  # channels (C) of the embeddings; gated: of the layers too
    n_skip: int = 0  # gated: channels of the skips; 0: n_embd
    n_hidden: int = 128  # hierarchical: units of each level
    batchnorm: str = ''  # hierarchical: ema, precise, frozen or batch; '': none
    dropout: float = 0.0  # gated: probability, on what each layer adds to x and to the skips
    init: str = 'kaiming'  # of the matrices: kaiming or xavier

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_stack', 'n_embd', 'n_hidden'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a WaveNet needs at least 1")
        if self.kernel < 2:
            raise ValueError(f"kernel={self.kernel} must be at least 2")
        if self.n_skip < 0:
            raise ValueError(f"n_skip={self.n_skip} must be at least 0")
        if self.n_layer > 24:
            raise ValueError(
                f"n_layer={self.n_layer} must be at most 24, which reaches 16 million tokens"
            )
        if self.n_layer * self.n_stack > 1000:
            raise ValueError(
                f"n_layer={self.n_layer} x n_stack={self.n_stack} must be at most 1000 layers"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r} is unknown: use {' or '.join(FORMS)}")
        batchnorm.check(self.batchnorm)
        layers.check_init(self.init)
        unused = ONLY_HIERARCHICAL if self.form == 'gated' else ONLY_GATED
        for name, default in unused.items():
            value = getattr(self, name)
            if value != default:
                raise ValueError(f"form={self.form} has no {name}: omit {name}={value}")


class Layer(nn.Module):
    """x (B, T, C) -> the next layer's x, (B, T, C), and the skip, (B, T, n_skip)."""

    def __init__(self, config, dilation):
        super().__init__()
        C = config.n_embd
        self.kernel = config.kernel
        self.dilation = dilation
        # W_f above W_g. Each tap of the kernel is C of the columns, the oldest first.
        self.c_fc = nn.Linear(config.kernel * C, 2 * C)
        self.c_fc.weight.n_matrices = 2  # W_f and W_g, which Muon updates one by one
        self.c_proj = nn.Linear(C, C)
        self.c_skip = nn.Linear(C, config.n_skip or C)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, past=None):
        z = self.gate(x, past)
        x = layers.residual_add(x, self.dropout(self.c_proj(z)))
        return x, self.dropout(self.c_skip(z))

    def gate(self, x, past):
        """z (B, T, C). past: a kv_cache.LayerCache of this layer's earlier inputs."""
        T = x.size(1)
        known = x
        if past is not None:
            (known,) = past.update(x[:, None])  # (B, 1, L, C)
            known = known[:, 0].type_as(x)

        # The T positions and the `reach` before them, zeros where there are none
        reach = (self.kernel - 1) * self.dilation
        missing = max(0, reach + T - known.size(1))
        known = F.pad(known, (0, 0, missing, 0))[:, -(reach + T) :]  # (B, reach + T, C)
        taps = [known[:, i * self.dilation :][:, :T] for i in range(self.kernel)]
        f, g = self.c_fc(torch.cat(taps, -1)).chunk(2, -1)  # (B, T, C) each
        return torch.tanh(f) * torch.sigmoid(g)


class LastLayer(Layer):
    """A Layer with only the skip: no other layer follows."""

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
        self.cache_shapes = [[(1, config.n_embd)]] * len(dilations)
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        all_but_last = [Layer(config, dilation) for dilation in dilations[:-1]]
        self.h = nn.ModuleList([*all_but_last, LastLayer(config, dilations[-1])])
        self.c_proj = nn.Linear(self.n_out, self.n_out)

        init = layers.INITS[config.init]
        scale = len(dilations) ** -0.5  # the sum over all layers then has a variance of about 1
        for layer in self.h:
            init(layer.c_fc.weight, 'tanh')
            init(layer.c_skip.weight, 'linear')
            layer.c_skip.weight.data.mul_(scale)
        for layer in self.h[:-1]:
            init(layer.c_proj.weight, 'linear')
            layer.c_proj.weight.data.mul_(scale)
        init(self.c_proj.weight, 'relu')

    def forward(self, idx, valid=None, cache=None):
        if cache is None:
            pasts = itertools.repeat(None)
        else:
            cache.extend(idx)
            pasts = cache.layers
        x = self.wte(idx)  # (B, T, C)
        skips = 0.0
        for layer, past in zip(self.h, pasts):
            x, skip = layer(x, past)
            skips = skips + skip
        return F.relu(self.c_proj(F.relu(skips)))


class Level(nn.Module):
    """The units of each pair (x[t - dilation], x[t]): (B, T, C) -> (B, T - dilation, n_hidden)."""

    def __init__(self, config, C, dilation):
        super().__init__()
        self.dilation = dilation
        self.c_fc = nn.Linear(2 * C, config.n_hidden, bias=not config.batchnorm)
        self.norm = batchnorm.BATCH_NORMS[config.batchnorm](config.n_hidden)

    def forward(self, x, valid):
        pairs = torch.cat([x[:, : -self.dilation], x[:, self.dilation :]], -1)  # (B, …, 2C)
        x = self.c_fc(pairs)
        return torch.tanh(self.norm(x, valid[:, -x.size(1) :]))


class Hierarchical(nn.Module):
    """idx (B, T) -> what the head reads, (B, T, n_hidden)."""

    def __init__(self, config):
        super().__init__()
        self.receptive_field = 2**config.n_layer
        self.n_out = config.n_hidden
        self.cache_shapes = []  # the ids suffice
        self.wte = nn.Embedding(config.vocab_size + 1, config.n_embd)  # the last row: padding
        widths = [config.n_embd] + [config.n_hidden] * (config.n_layer - 1)
        self.h = nn.ModuleList(Level(config, C, 2**i) for i, C in enumerate(widths))
        init = layers.INITS[config.init]
        for level in self.h:
            init(level.c_fc.weight, 'tanh')

    def forward(self, idx, valid=None, cache=None):
        n = self.receptive_field - 1
        ids = kv_cache.with_previous_ids(idx, n, cache)  # (B, n + T)
        if valid is None:
            valid = torch.ones_like(idx, dtype=torch.bool)
        # Positions before the window count in the norm's statistics if its first one does.
        valid = torch.cat([valid[:, :1].expand(-1, n), valid], 1)  # (B, n + T)

        x = self.wte(ids % self.wte.num_embeddings)  # -1, padding, is the last row
        for level in self.h:
            x = level(x, valid)
        return x  # (B, T, n_hidden): the levels have used up the n positions before


FORMS = {'gated': Gated, 'hierarchical': Hierarchical}


class Wavenet(LanguageModel):
    Config = WavenetConfig

    def __init__(self, config):
        super().__init__(config)
        self.transformer = FORMS[config.form](config)
        self.lm_head = nn.Linear(self.transformer.n_out, config.vocab_size)

        init = layers.INITS[config.init]
        init(self.lm_head.weight, 'linear')
        self.lm_head.weight.data.mul_(0.1)  # at first all tokens are almost equally likely
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        self.exemptions = batchnorm.EXEMPTIONS[config.batchnorm]

    @property
    def receptive_field(self):
        """How many tokens a position sees, its own included."""
        return self.transformer.receptive_field

    def forward(self, idx, targets=None, cache=None):
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size={self.config.block_size}")
        valid = None if targets is None else targets >= 0
        x = self.transformer(idx, valid, cache)  # (B, T, n_out)

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
        dtype = dtype or self.cache_dtype
        return kv_cache.KVCache(batch, length, self.transformer.cache_shapes, device, dtype)

    def flops_per_token(self, T):
        """6 per parameter of a matrix product; embeddings are looked up."""
        return 6 * (self.num_params() - self.transformer.wte.weight.numel())

    def crop_block_size(self, block_size):
        """Set the longest window, in place: no weight depends on it."""
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1")
        self.config.block_size = block_size
