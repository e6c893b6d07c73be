"""A GPT as the public speed runs left it: GPT-2's blocks (model.py), with what made them learn
faster per token.

Changes from GPT: rotary positions (RoFormer, arXiv 2104.09864) on normalised queries and keys
(arXiv 2010.04245); squared ReLU (Primer, arXiv 2109.08668); norms without weights, and no biases;
projections into the residual stream begin at zero; a head of its own whose logits are soft-capped
(Gemma 2, arXiv 2408.00118). Most were put together first in the speed runs at
https://github.com/KellerJordan/modded-nanogpt. For small models, `ngram`: embeddings of the last 2,
3, … tokens together, in one hashed table, added to the token's own; it costs no products, but
memory traffic for the table's gradient. Train with Muon: --muon_lr. RESULTS.md has what each part
brings, and what was tried and left out.

Shapes: B batch, T time, C channels, H heads, D head size, V vocabulary.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from model import LanguageModel
from models.parts import attention, kernels, kv_cache, layers
from models.parts.layers import norm


@dataclass
class ModernConfig(attention.AttentionConfig):
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12  # blocks
    n_head: int = 6  # attention heads per block; 128 channels each is fast
    n_embd: int = 768  # channels (C)
    # probability that a token goes past a branch (attention or MLP), while training
    dropout: float = 0.0
    ngram: int = 0  # embeddings of the last 2 … ngram tokens together; 0: none
    ngram_rows: int = 65536  # rows of their table, which they share by hashing
    ngram_dropout: float = 0.0  # probability that one of them is left out, while training
    norm_place: str = 'pre'  # 'pre': a norm in front of each branch; 'post': one behind each sum

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'ngram_rows'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a modern GPT needs at least 1")
        for name in ('dropout', 'ngram_dropout'):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)}: take a probability from 0 up to, not including, 1"
                )
        if self.ngram < 0 or self.ngram == 1:
            raise ValueError(f"ngram={self.ngram}: take 0, or the longest n-gram, from 2 up")
        if self.norm_place not in BLOCKS:
            raise ValueError(
                f"norm_place={self.norm_place!r} is unknown: take {' or '.join(BLOCKS)}"
            )
        super().__post_init__()


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(layers.squared_relu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn = attention.build(config, layer, qk_norm=norm)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, x, rotary, past=None):
        dropout = self.dropout if self.training else 0.0
        x = layers.token_drop_add(x, self.attn(norm(x), rotary, past), dropout)
        return layers.token_drop_add(x, self.mlp(norm(x)), dropout)


class PostNormBlock(Block):
    """As the first Transformer had it: a norm behind each sum (arXiv 1706.03762)."""

    def forward(self, x, rotary, past=None):
        dropout = self.dropout if self.training else 0.0
        x = norm(layers.token_drop_add(x, self.attn(x, rotary, past), dropout))
        return norm(layers.token_drop_add(x, self.mlp(x), dropout))


BLOCKS = {'pre': Block, 'post': PostNormBlock}


class NgramEmbedding(nn.Embedding):
    """The sum of the embeddings of the last 2, 3, … n tokens, which hash to rows of one table."""

    def __init__(self, n, rows, C, dropout):
        super().__init__(rows + 1, C, padding_idx=rows)  # the last row stays zero: what is left out
        self.n, self.rows, self.dropout = n, rows, dropout
        nn.init.zeros_(self.weight)

    def forward(self, idx, before=None, places=None):
        """idx, and the n - 1 ids before each row's first, -1 where there were none: (B, T), (B, n -
        1) -> (B, T, C).

        places: how many tokens of its document come before each, (B, T), where rows hold several;
        else anything.
        """
        B, T = idx.shape
        past = (
            F.pad(idx, (self.n - 1, 0), value=-1) if before is None else torch.cat([before, idx], 1)
        )
        key, keys = idx + 1, []
        for i in range(1, self.n):  # below 2^31 each, so that no product overflows
            earlier = past[:, self.n - 1 - i :][:, :T] + 1
            if isinstance(places, torch.Tensor):
                earlier = earlier * (places >= i)
            key = (key * 0x5851F42D + earlier * 0x14057B7F) % 0x7FFFFFFF
            keys.append((key ^ (key >> 15)) % self.rows)
        keys = torch.stack(keys, -1).view(B * T, -1)
        if self.training and self.dropout:
            keys = keys.masked_fill(
                torch.rand(keys.shape, device=keys.device) < self.dropout, self.rows
            )
        x = F.embedding_bag(keys, self.weight, mode='sum', padding_idx=self.rows).view(B, T, -1)
        return x / (1 - self.dropout) if self.training else x


class Modern(LanguageModel):
    Config = ModernConfig

    def __init__(self, config):
        super().__init__(config)
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                h=nn.ModuleList(
                    BLOCKS[config.norm_place](config, i) for i in range(config.n_layer)
                ),
            )
        )
        if config.ngram:
            self.transformer['ngram'] = NgramEmbedding(
                config.ngram, config.ngram_rows, config.n_embd, config.ngram_dropout
            )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, module in self.transformer.h.named_modules():
            if name.endswith('c_proj'):
                nn.init.zeros_(module.weight)
            elif isinstance(module, nn.Linear):
                bound = math.sqrt(3 / module.in_features)
                nn.init.uniform_(module.weight, -bound, bound)
        nn.init.normal_(self.transformer.wte.weight)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        rotary = layers.rotary_table(config.block_size, config.rotary_dim)
        self.register_buffer('rotary', rotary, persistent=False)  # (2, block_size, D)

    def forward(self, idx, targets=None, cache=None):
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens do not fit into block_size={self.config.block_size}")
        cache = cache or kv_cache.packed_documents(self.config.eot)
        places = cache.extend(idx) if cache else slice(T)
        rotary = self.rotary[:, places]  # (2, T, D)
        rotary = rotary if rotary.dim() == 3 else rotary[:, :, None]  # (2, B, 1, T, D)
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.config.ngram:
            x = x + self.transformer.ngram(
                idx, cache and cache.recent(self.config.ngram - 1, T), places
            )
        x = norm(layers.to_autocast_dtype(x))
        rotary = rotary.type_as(x)
        for block, past in zip(
            self.transformer.h, cache.layers if cache else itertools.repeat(None)
        ):
            recompute = self.gradient_checkpointing and self.training
            x = (
                checkpoint(block, x, rotary, past, use_reentrant=False)
                if recompute
                else block(x, rotary, past)
            )
        x = norm(x if targets is not None else x[:, -1:])
        logits = self.lm_head(x)  # (B, T, V), or (B, 1, V)
        logits = 15 * torch.tanh(layers.at_least_float32(logits) / 15)
        if targets is None:
            return logits, None
        return logits, kernels.cross_entropy(logits, targets)

    def init_cache(self, batch, length, device=None, dtype=None):
        shapes = [block.attn.cache_shapes for block in self.transformer.h]
        return kv_cache.KVCache(
            batch, length, shapes, device, dtype or self.cache_dtype, self.config.eot
        )

    def flops_per_token(self, T):
        """6 per parameter that is multiplied with (tables are looked up), and 12·C·T per layer for
        attention's products."""
        multiplied = sum(
            p.numel() for role in ('matrix', 'head') for p in self.param_groups()[role]
        )
        return 6 * multiplied + sum(block.attn.flops_per_token(T) for block in self.transformer.h)

    def crop_block_size(self, block_size):
        """Another longest context, in place: rotary positions need no weights."""
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1")
        self.config.block_size = block_size
        self.rotary = layers.rotary_table(block_size, self.config.rotary_dim).to(self.rotary.device)
