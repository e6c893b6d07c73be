"""Modern: a GPT as the public speed runs left it, which learns faster per token.

Changes from GPT (model.py):
- rotary positions (RoFormer, arXiv 2104.09864), on normalised queries and keys (arXiv 2010.04245),
  in place of learned ones;
- squared ReLU (Primer, arXiv 2109.08668) in place of GELU;
- norms without weights, one more of them after the embeddings, and no biases;
- projections into the residual stream start at zero;
- an untied head, whose logits are soft-capped (Gemma 2, arXiv 2408.00118);
- `ngram`, for small models: embeddings of the last 2, 3, … tokens together, in one hashed table,
  added to the token's own. They cost no products, but memory traffic for the table's gradient.

Most of these were first combined at https://github.com/KellerJordan/modded-nanogpt. Train with
Muon: --muon_lr. RESULTS.md says what each part brings, and what was tried and dropped.

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
from models.parts.layers import norm, token_drop_add


@dataclass
class ModernConfig(attention.AttentionConfig):
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12  # blocks
    n_head: int = 6  # attention heads per block; 128 channels each is fast
    n_embd: int = 768  # channels (C)
    dropout: float = 0.0  # probability that a token skips a branch (attention, MLP) in training
    ngram: int = 0  # embeddings of the last 2 … ngram tokens together; 0: none
    ngram_rows: int = 65536  # rows of their table, which they share by hashing
    ngram_dropout: float = 0.0  # probability that each of them is dropped in training
    norm_place: str = 'pre'  # 'pre': a norm before each branch; 'post': one after each sum

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'ngram_rows'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a modern GPT needs at least 1")
        for name in ('dropout', 'ngram_dropout'):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.ngram < 0 or self.ngram == 1:
            raise ValueError(f"ngram={self.ngram}: use 0 for none, or at least 2 tokens")
        if self.norm_place not in BLOCKS:
            raise ValueError(
                f"norm_place={self.norm_place!r} is unknown: use {' or '.join(BLOCKS)}"
            )
        super().__post_init__()


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        x = layers.squared_relu(self.c_fc(x))  # (B, T, 4C)
        return self.c_proj(x)  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn = attention.build(config, layer, qk_norm=norm)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, x, rotary, past=None):
        dropout = self.dropout if self.training else 0.0
        x = token_drop_add(x, self.attn(norm(x), rotary, past), dropout)
        x = token_drop_add(x, self.mlp(norm(x)), dropout)
        return x


class PostNormBlock(Block):
    """A norm after each sum, as in the first Transformer (arXiv 1706.03762)."""

    def forward(self, x, rotary, past=None):
        dropout = self.dropout if self.training else 0.0
        x = norm(token_drop_add(x, self.attn(x, rotary, past), dropout))
        x = norm(token_drop_add(x, self.mlp(x), dropout))
        return x


BLOCKS = {'pre': Block, 'post': PostNormBlock}


class NgramEmbedding(nn.Embedding):
    """The sum of the embeddings of the last 2, 3, … n tokens, which hash to rows of one table."""

    def __init__(self, n, rows, C, dropout):
        super().__init__(rows + 1, C, padding_idx=rows)  # the last row stays zero: dropped n-grams
        self.n = n
        self.rows = rows
        self.dropout = dropout
        nn.init.zeros_(self.weight)

    def forward(self, idx, previous=None, positions=None):
        """(B, T, C).

        idx (B, T). previous (B, n - 1): the ids before each row's first, -1 where there are none;
        default: none. positions (B, T): those in the token's document, where rows hold several; a
        slice otherwise.
        """
        B, T = idx.shape
        if previous is None:
            ids = F.pad(idx, (self.n - 1, 0), value=-1)  # (B, n - 1 + T)
        else:
            ids = torch.cat([previous, idx], 1)

        # A token's n-grams: each key extends the hash of the one shorter by a token.
        key = idx + 1
        keys = []
        for i in range(1, self.n):
            earlier = ids[:, self.n - 1 - i :][:, :T] + 1  # the token i places before; 0: none
            if isinstance(positions, torch.Tensor):
                earlier = earlier.masked_fill(positions < i, 0)  # it is another document's
            # Factors and results are below 2^31, so that no product overflows.
            key = (key * 0x5851F42D + earlier * 0x14057B7F) % 0x7FFFFFFF
            keys.append((key ^ (key >> 15)) % self.rows)
        keys = torch.stack(keys, -1).view(B * T, -1)  # (B·T, n - 1)

        if self.training and self.dropout:
            is_dropped = torch.rand(keys.shape, device=keys.device) < self.dropout
            keys = keys.masked_fill(is_dropped, self.rows)
        x = F.embedding_bag(keys, self.weight, mode='sum', padding_idx=self.rows)
        x = x.view(B, T, -1)  # (B, T, C)
        if self.training:
            x = x / (1 - self.dropout)
        return x


class Modern(LanguageModel):
    Config = ModernConfig

    def __init__(self, config):
        super().__init__(config)
        block = BLOCKS[config.norm_place]
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                h=nn.ModuleList(block(config, layer) for layer in range(config.n_layer)),
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
        if cache is None and self.config.eot >= 0:
            cache = kv_cache.PackedDocuments(self.config.eot)  # attention stays within documents
        if cache is None:
            positions = slice(T)
            pasts = itertools.repeat(None)  # no block has seen earlier tokens
        else:
            positions = cache.extend(idx)  # a slice, or (B, T) where rows differ
            pasts = cache.layers  # what each block keeps of earlier tokens
        rotary = self.rotary[:, positions]  # (2, T, D)
        if rotary.dim() == 4:
            rotary = rotary[:, :, None]  # (2, B, 1, T, D), the same for all heads

        x = self.transformer.wte(idx)  # (B, T, C)
        if self.config.ngram:
            previous = None
            if cache is not None:
                previous = cache.previous_ids(self.config.ngram - 1, T)
            x = x + self.transformer.ngram(idx, previous, positions)
        x = norm(layers.to_autocast_dtype(x))
        rotary = rotary.type_as(x)
        for block, past in zip(self.transformer.h, pasts):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, rotary, past, use_reentrant=False)
            else:
                x = block(x, rotary, past)

        if targets is None:  # generation needs the last position alone
            x = x[:, -1:]
        logits = self.lm_head(norm(x))  # (B, T, V), or (B, 1, V)
        logits = 15 * torch.tanh(layers.at_least_float32(logits) / 15)
        if targets is None:
            return logits, None
        return logits, kernels.cross_entropy(logits, targets)

    def init_cache(self, batch, length, device=None, dtype=None):
        shapes = [block.attn.cache_shapes for block in self.transformer.h]
        dtype = dtype or self.cache_dtype
        return kv_cache.KVCache(batch, length, shapes, device, dtype, eot=self.config.eot)

    def flops_per_token(self, T):
        """6 per parameter of a matrix product, and attention: 12·C·T per layer for mha.

        Tables are looked up and cost none.
        """
        groups = self.param_groups()
        n = sum(p.numel() for p in groups['matrix'] + groups['head'])
        return 6 * n + sum(block.attn.flops_per_token(T) for block in self.transformer.h)

    def crop_block_size(self, block_size):
        """Set the longest context, in place: rotary positions need no weights."""
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1")
        self.config.block_size = block_size
        rotary = layers.rotary_table(block_size, self.config.rotary_dim)
        self.rotary = rotary.to(self.rotary.device)
