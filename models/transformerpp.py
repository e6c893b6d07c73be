"""Transformer++: GPT-2 as Llama left it, and most open models are today.

Touvron et al. 2023, arXiv 2302.13971.

Changes from GPT (model.py):
- RMSNorm (arXiv 1910.07467) in place of LayerNorm;
- rotary positions (RoFormer, arXiv 2104.09864) in place of learned ones;
- SwiGLU (arXiv 2002.05202) in place of GELU: a third matrix, and so two thirds of the width;
- no biases.

attention_kind offers grouped heads, as in the larger Llamas, and more; rope_scaling Llama 3's
rotations for long contexts. A Hugging Face folder of a LlamaForCausalLM loads as it is
(--init_from), and export.py writes one.

Shapes: B batch, T time, C channels, H heads, D head size, V vocabulary.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from model import LanguageModel
from models.parts import attention, kernels, kv_cache, layers
from models.parts.layers import RMSNorm, residual_add


@dataclass
class TransformerppConfig(attention.AttentionConfig):
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # channels (C)
    dropout: float = 0.0  # probability, on embeddings, attention weights and both residual branches
    attn_dropout: float = 0.0  # probability on the attention weights instead; 0: dropout's
    n_hidden: int = 0  # SwiGLU's channels; 0: 8/3 of n_embd, up to the next multiple of multiple_of
    multiple_of: int = 32  # see n_hidden; a larger power of two may be faster
    tied: bool = True  # the head shares the token embeddings' matrix; False: it has its own
    attention_bias: bool = False  # in attention's projections
    mlp_bias: bool = False  # in SwiGLU's matrices
    rope_theta: float = 1e4  # the slowest rotation turns once in 2π times about this many tokens
    rope_scaling: str = 'none'  # slower rotations, to extend the context: none, linear, llama3
    rope_factor: float = 1.0  # linear, llama3: how many times slower
    rope_low_freq: float = 1.0  # llama3: rotations of fewer turns in rope_original tokens slow down
    rope_high_freq: float = 4.0  # llama3: rotations of more turns stay; those between, in part
    rope_original: int = 8192  # llama3: the model's longest context before it was extended
    norm_eps: float = 1e-5  # added to the mean square in RMSNorm
    norm_place: str = 'pre'  # 'pre': a norm before each branch; 'post': one after each sum

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'multiple_of'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a Transformer++ needs at least 1")
        for name in ('dropout', 'attn_dropout'):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.n_hidden < 0:
            raise ValueError(f"n_hidden={self.n_hidden}: use 0 for 8/3 of n_embd, or the channels")
        if not (self.rope_theta > 0 and self.norm_eps > 0):
            raise ValueError(
                f"rope_theta={self.rope_theta}, norm_eps={self.norm_eps}: both must be above 0"
            )
        if self.norm_place not in BLOCKS:
            raise ValueError(
                f"norm_place={self.norm_place!r} is unknown: use {' or '.join(BLOCKS)}"
            )
        if self.attention_bias and self.attention_kind == 'mla':
            raise ValueError("attention_bias=True: attention_kind='mla' has no biases, omit it")
        self._check_rope()
        super().__post_init__()

    def _check_rope(self):
        if self.attention_kind == 'alibi' and self.rope_scaling != 'none':
            raise ValueError(
                f"rope_scaling={self.rope_scaling!r}: attention_kind='alibi' rotates "
                "nothing, omit it"
            )
        if self.rope_scaling not in ROPE_SCALINGS:
            raise ValueError(
                f"rope_scaling={self.rope_scaling!r} is unknown: use {', '.join(ROPE_SCALINGS)}"
            )
        for name in ROPE_FIELDS['llama3']:
            value = getattr(self, name)
            default = getattr(type(self), name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be above 0")
            if value != default and name not in ROPE_FIELDS[self.rope_scaling]:
                raise ValueError(
                    f"{name}={value} has no effect with rope_scaling={self.rope_scaling!r}: omit "
                    "it, or change rope_scaling"
                )
        if self.rope_low_freq >= self.rope_high_freq:
            raise ValueError(
                f"rope_low_freq={self.rope_low_freq} must be below "
                f"rope_high_freq={self.rope_high_freq}"
            )

    @property
    def hidden(self):
        """SwiGLU's channels."""
        if self.n_hidden:
            return self.n_hidden
        multiples = -(-8 * self.n_embd // (3 * self.multiple_of))  # rounded up
        return multiples * self.multiple_of


# ---- frequencies of the rotations (D/2,) -> slower ones, to extend the context -------------------


def unscaled(frequencies, config):
    return frequencies


def linear(frequencies, config):
    """Position interpolation (arXiv 2306.15595): rope_factor times the tokens, the same angles."""
    return frequencies / config.rope_factor


def llama3(frequencies, config):
    """Llama 3.1's (arXiv 2407.21783): only the slow rotations get slower.

    Those of fewer than rope_low_freq turns in the old context are slowed by rope_factor, those of
    more than rope_high_freq stay, and between the two the share that stays rises from 0 to 1.
    """
    low = config.rope_low_freq
    high = config.rope_high_freq
    factor = config.rope_factor
    wavelengths = 2 * math.pi / frequencies  # tokens per turn
    share = (config.rope_original / wavelengths - low) / (high - low)
    scaled = (1 - share) * frequencies / factor + share * frequencies
    scaled = torch.where(wavelengths > config.rope_original / low, frequencies / factor, scaled)
    return torch.where(wavelengths < config.rope_original / high, frequencies, scaled)


ROPE_SCALINGS = {'none': unscaled, 'linear': linear, 'llama3': llama3}
ROPE_FIELDS = {  # the fields that each of them uses
    'none': (),
    'linear': ('rope_factor',),
    'llama3': ('rope_factor', 'rope_low_freq', 'rope_high_freq', 'rope_original'),
}


# ---- the model -----------------------------------------------------------------------------------


class MLP(nn.Module):
    """SwiGLU: (silu(x Wg) ⊙ x Wf) Wp."""

    def __init__(self, config):
        super().__init__()
        self.c_gate = nn.Linear(config.n_embd, config.hidden, bias=config.mlp_bias)
        self.c_fc = nn.Linear(config.n_embd, config.hidden, bias=config.mlp_bias)
        self.silu = nn.SiLU()
        self.c_proj = nn.Linear(config.hidden, config.n_embd, bias=config.mlp_bias)

    def forward(self, x):
        x = self.silu(self.c_gate(x)) * self.c_fc(x)  # (B, T, hidden)
        return self.c_proj(x)  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = RMSNorm(config.n_embd, config.norm_eps)
        dropout = config.attn_dropout or config.dropout
        self.attn = attention.build(config, layer, dropout=dropout, bias=config.attention_bias)
        self.ln_2 = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rotary, past=None):
        x = residual_add(x, self.dropout(self.attn(self.ln_1(x), rotary, past)))
        x = residual_add(x, self.dropout(self.mlp(self.ln_2(x))))
        return x


class PostNormBlock(Block):
    """A norm after each sum, as in the first Transformer (arXiv 1706.03762); none at the end."""

    def forward(self, x, rotary, past=None):
        x = self.ln_1(residual_add(x, self.dropout(self.attn(x, rotary, past))))
        x = self.ln_2(residual_add(x, self.dropout(self.mlp(x))))
        return x


BLOCKS = {'pre': Block, 'post': PostNormBlock}


class Transformerpp(LanguageModel):
    Config = TransformerppConfig

    def __init__(self, config):
        super().__init__(config)
        block = BLOCKS[config.norm_place]
        if config.norm_place == 'pre':
            ln_f = RMSNorm(config.n_embd, config.norm_eps)
        else:
            ln_f = nn.Identity()  # the last block ends with a norm
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(block(config, layer) for layer in range(config.n_layer)),
                ln_f=ln_f,
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.transformer.wte.weight

        for name, module in self.named_modules():
            std = 0.02
            if name.endswith('c_proj'):  # 2 per block add to the residual stream, as in GPT
                std = 0.02 / math.sqrt(2 * config.n_layer)
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

        self.register_buffer('rotary', self._rotary_table(), persistent=False)

    def _rotary_table(self):
        """(2, block_size, D)"""
        config = self.config
        scale = functools.partial(ROPE_SCALINGS[config.rope_scaling], config=config)
        return layers.rotary_table(config.block_size, config.rotary_dim, config.rope_theta, scale)

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
        x = self.transformer.drop(x)
        for block, past in zip(self.transformer.h, pasts):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, rotary, past, use_reentrant=False)
            else:
                x = block(x, rotary, past)

        if targets is None:  # generation needs the last position alone
            x = x[:, -1:]
        x = self.transformer.ln_f(x)
        logits = self.lm_head(x)  # (B, T, V), or (B, 1, V)
        if targets is None:
            return logits, None
        return logits, kernels.cross_entropy(logits, targets)

    def init_cache(self, batch, length, device=None, dtype=None):
        shapes = [block.attn.cache_shapes for block in self.transformer.h]
        dtype = dtype or self.cache_dtype
        return kv_cache.KVCache(batch, length, shapes, device, dtype, eot=self.config.eot)

    def flops_per_token(self, T):
        """6 per parameter of a matrix product, and attention: 12·C·T per layer for mha."""
        n = self.num_params()
        if not self.config.tied:
            n -= self.transformer.wte.weight.numel()  # looked up, not multiplied
        return 6 * n + sum(block.attn.flops_per_token(T) for block in self.transformer.h)

    def crop_block_size(self, block_size):
        """Set the longest context, in place: rotary positions need no weights."""
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1")
        self.config.block_size = block_size
        self.rotary = self._rotary_table().to(self.rotary.device)
