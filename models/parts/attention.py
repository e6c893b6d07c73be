"""Kinds of causal self-attention, one class each; a model's attention_kind chooses one of KINDS.

Every kind is constructed as kind(config, layer, qk_norm, dropout, bias) and called as
forward(x, rotary, past=None): (B, T, C) -> (B, T, C).

    rotary  the rows of layers.rotary_table for these T positions
    past    a kv_cache.LayerCache, which keeps tensors of `cache_shapes` for each token

A kind overrides of Attention what it changes: init_projections (its matrices), heads (q, k and v of
x), attend (the weighted sums of values) or forward.

Shapes: B batch, T new tokens, L all tokens, C channels, H heads, G heads of keys and values, D head
size (C/H unless head_dim is set). mla: R latent channels, E channels that rotate.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from models.parts import kernels, layers


@dataclass
class AttentionConfig:
    """The Config fields of a model that takes its attention from here.

    The model's own Config adds n_head, n_embd and vocab_size.
    """

    attention_kind: str = 'mha'  # gqa, mqa, sliding, banded, differential, mla, gated, sinks, alibi
    head_dim: int = 0  # channels of a head; 0: n_embd / n_head
    n_kv_head: int = 0  # gqa: heads of keys and values; 0: a quarter of n_head, or the next divisor
    window: int = 128  # sliding, banded: tokens that a token sees, itself among them
    kv_rank: int = 0  # mla: numbers per token for all keys and values; 0: four heads' size
    rope_dim: int = 0  # mla: rotated channels of a key, shared by all heads; 0: half a head's size
    eot: int = -1  # token that begins a document, within which attention stays; -1: no limit

    def __post_init__(self):
        kind = self.attention_kind
        if kind not in KINDS:
            raise ValueError(f"attention_kind={kind!r} is unknown: use {', '.join(KINDS)}")
        if not self.head_dim and self.n_embd % (2 * self.n_head):
            raise ValueError(
                f"n_embd={self.n_embd} is not divisible by 2 x n_head={self.n_head}: rotary "
                "embeddings turn channels in pairs"
            )
        if self.head_dim < 0 or self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim}: use 0 for n_embd / n_head, or an even number: "
                "rotary embeddings turn channels in pairs"
            )
        for name, of_kind in (('n_kv_head', 'gqa'), ('kv_rank', 'mla'), ('rope_dim', 'mla')):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name}={value} must be at least 0")
            if value and kind != of_kind:
                raise ValueError(f"{name}={value} needs attention_kind={of_kind!r}")
        if not -1 <= self.eot < self.vocab_size:
            raise ValueError(f"eot={self.eot}: use -1, or an id below vocab_size={self.vocab_size}")
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1: a token sees itself")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}")
        if kind == 'differential' and self.n_head % 2:
            raise ValueError(
                f"n_head={self.n_head} must be even: differential attention pairs its heads"
            )
        if self.rotary_dim % 2:
            raise ValueError(
                f"rope_dim={self.rope_dim} is odd: rotary embeddings turn pairs of channels"
            )

    @property
    def kv_heads(self):
        """G, the heads of keys and values."""
        if self.attention_kind == 'mqa':
            return 1
        if self.attention_kind != 'gqa':
            return self.n_head
        if self.n_kv_head:
            return self.n_kv_head
        G = (self.n_head + 3) // 4
        while self.n_head % G:
            G += 1
        return G

    @property
    def head_size(self):
        """D, the channels of a head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def latent(self):
        """R, the numbers that mla keeps of a token besides the rotated key."""
        return self.kv_rank or 4 * self.head_size

    @property
    def rotary_dim(self):
        """The channels of a head that rotate."""
        if self.attention_kind != 'mla':
            return self.head_size
        return self.rope_dim or 2 * math.ceil(self.head_size / 4)


def build(config, layer, **options):
    """The attention of block `layer`, counted from 0.

    config: a model's, with AttentionConfig's fields. options: keywords of Attention.
    """
    classes = KINDS[config.attention_kind]
    return classes[layer % len(classes)](config, layer, **options)


def identity(x):
    return x


class Attention(nn.Module):
    """mha: every head has its own queries, keys and values (arXiv 1706.03762), which rotate.

    qk_norm: a norm of queries and keys before they rotate. dropout: probability, on the attention
    weights. bias: of the projections to queries, keys and values and of the output projection.
    """

    attention_kernel = 'auto'  # set by LanguageModel.set_attention

    def __init__(self, config, layer, qk_norm=identity, dropout=0.0, bias=False):
        super().__init__()
        self.n_head = config.n_head
        self.C = config.n_embd
        self.D = config.head_size
        self.width = self.n_head * self.D  # of all heads side by side
        self.qk_norm = qk_norm
        self.dropout = dropout
        self.cache_shapes = [(config.kv_heads, self.D)] * 2  # (heads, size) of keys, of values
        self.init_projections(config, bias)
        self.c_proj = nn.Linear(self.width, self.C, bias=bias)

    def init_projections(self, config, bias):
        self.c_attn = nn.Linear(self.C, 3 * self.width, bias=bias)
        self.c_attn.weight.n_matrices = 3  # q, k and v, which Muon updates one by one

    def forward(self, x, rotary, past=None):
        return self.c_proj(self.mix(x, rotary, past))

    def mix(self, x, rotary, past):
        """The heads' outputs side by side: (B, T, H·D)."""
        y = self.attend(*self.heads(x, rotary), past)  # (B, H, T, D)
        return y.transpose(1, 2).flatten(2)

    def heads(self, x, rotary):
        """q (B, H, T, D), k and v (B, G, T, D)."""
        qkv = kernels.split_heads(self.c_attn(x), self.n_head, self.attention_kernel)
        qk, v = qkv.split([2, 1])  # (2, B, H, T, D), (1, B, H, T, D)
        q, k = layers.apply_rotary(self.qk_norm(qk), rotary)
        return q, k, v[0]

    def attend(self, q, k, v, past):
        """The weighted sums of values: (B, H, T, D)."""
        dropout = self.dropout if self.training else 0.0
        if past is None:
            return kernels.causal_attention(q, k, v, dropout, kernel=self.attention_kernel)
        return past.attend(q, k, v, dropout, kernel=self.attention_kernel)

    def masked_attention(self, q, k, v, past, mask=None, scale=None):
        """causal_attention over all keys and values, which `past` has returned.

        It computes in k's dtype, since a cache may have its own. mask: default, that of `past`.
        """
        if mask is None and past is not None and not past.is_prompt(q.size(2)):
            mask = visible(q, k, past)
        dropout = self.dropout if self.training else 0.0
        y = kernels.causal_attention(
            q.to(k.dtype),
            k,
            v.to(k.dtype),
            dropout=dropout,
            mask=mask,
            scale=scale,
            kernel=self.attention_kernel,
        )
        return y.type_as(q)

    def flops_per_token(self, T):
        """FLOPs of forward and backward for scores and weighted sums in a context of T tokens.

        As in PaLM's estimate, no token is masked.
        """
        return 12 * self.width * T


def visible(q, k, past):
    """Which of k's L keys each of the T newest tokens may see: bool (T, L) or (B, 1, T, L)."""
    if past is not None and past.cache.mask is not None:
        return past.cache.mask
    T = q.size(2)
    L = k.size(2)
    return torch.ones(T, L, dtype=torch.bool, device=q.device).tril(L - T)


class GroupedQuery(Attention):
    """gqa, mqa: H/G neighbouring heads share keys and values.

    The cache shrinks by as much (arXiv 2305.13245, 1911.02150).
    """

    def init_projections(self, config, bias):
        self.n_kv_head = config.kv_heads
        self.c_q = nn.Linear(self.C, self.width, bias=bias)
        self.c_kv = nn.Linear(self.C, 2 * self.n_kv_head * self.D, bias=bias)
        self.c_kv.weight.n_matrices = 2  # k and v, which Muon updates one by one

    def heads(self, x, rotary):
        q = self.c_q(x).unflatten(-1, (self.n_head, self.D)).transpose(1, 2)  # (B, H, T, D)
        kv = self.c_kv(x)
        k, v = kernels.split_heads(kv, self.n_kv_head, self.attention_kernel, parts=2)
        q = layers.apply_rotary(self.qk_norm(q), rotary)
        k = layers.apply_rotary(self.qk_norm(k), rotary)
        return q, k, v


class Windowed(Attention):
    """sliding: a token sees the last `window` tokens, itself among them (arXiv 2004.05150).

    Through n blocks it sees n·(window - 1) + 1. banded: this in every second block; the others are
    dense (GPT-3, arXiv 2005.14165; Sparse Transformer, arXiv 1904.10509).
    """

    def __init__(self, config, layer, **options):
        super().__init__(config, layer, **options)
        self.window = config.window

    def attend(self, q, k, v, past):
        T = q.size(2)
        length = T if past is None else past.cache.length
        if length <= self.window:  # every token is in the window
            return super().attend(q, k, v, past)

        if past is not None:
            k, v = past.update(k, v)
        L = k.size(2)
        farthest = L - T - self.window + 1  # the first key that the first query sees
        in_window = torch.ones(T, L, dtype=torch.bool, device=q.device).triu(farthest)
        mask = visible(q, k, past) & in_window
        start = max(0, farthest)  # no query sees a key before it
        return self.masked_attention(q, k[:, :, start:], v[:, :, start:], past, mask[..., start:])

    def flops_per_token(self, T):
        return super().flops_per_token(min(T, self.window))


class Alibi(Attention):
    """alibi: nothing rotates; a head's scores fall with the distance (arXiv 2108.12409).

    Each head has a slope of its own.
    """

    def __init__(self, config, layer, **options):
        super().__init__(config, layer, **options)
        slopes = alibi_slopes(config.n_head).view(1, -1, 1, 1)  # (1, H, 1, 1)
        self.register_buffer('slopes', slopes, persistent=False)

    def heads(self, x, rotary):
        qkv = kernels.split_heads(self.c_attn(x), self.n_head, self.attention_kernel)
        qk, v = qkv.split([2, 1])
        q, k = self.qk_norm(qk)
        return q, k, v[0]

    def attend(self, q, k, v, past):
        if past is not None:
            k, v = past.update(k, v)
        positions = torch.arange(k.size(2), device=q.device)
        distances = positions - positions[-q.size(2) :, None]  # (T, L), 0 or below where visible
        bias = self.slopes * distances  # (1, H, T, L)
        bias = bias.masked_fill(~visible(q, k, past), -math.inf)
        return self.masked_attention(q, k, v, past, bias.to(k.dtype))


def alibi_slopes(n):
    """The slopes of n heads (n,): powers of 2^(-8/n).

    If n is not a power of two, every second slope of twice as many heads is appended.
    """
    power = 2 ** int(math.log2(n))
    slopes = 2 ** (-8 / power * torch.arange(1, power + 1))
    if n == power:
        return slopes
    return torch.cat([slopes, alibi_slopes(2 * power)[::2][: n - power]])


class Sinks(Attention):
    """sinks: each head's softmax has one more, learned score, which has no value.

    So a head may attend to nothing (arXiv 2309.17453; as in GPT-OSS, arXiv 2508.10925).
    """

    def __init__(self, config, layer, **options):
        super().__init__(config, layer, **options)
        self.sinks = nn.Parameter(torch.zeros(config.n_head))

    def attend(self, q, k, v, past):
        if past is not None:
            k, v = past.update(k, v)
        mask = F.pad(visible(q, k, past), (1, 0), value=True)
        # The sink is a key before all others, with a value of 0. One more channel holds its score:
        # √D in each query, which the softmax's scale cancels, and 0 in every other key.
        q = F.pad(q, (0, 1), value=math.sqrt(self.D))
        k = F.pad(k, (0, 1, 1, 0))
        v = F.pad(v, (0, 1, 1, 0))
        k[:, :, 0, -1] = self.sinks.type_as(k)
        y = self.masked_attention(q, k, v, past, mask, scale=self.D**-0.5)
        return y[..., :-1]


class Gated(Attention):
    """gated: the heads' outputs are multiplied by σ(x W), a gate of the token itself.

    This happens before the output projection (arXiv 2505.06708).
    """

    def init_projections(self, config, bias):
        super().init_projections(config, bias)
        self.c_gate = nn.Linear(self.C, self.width, bias=False)

    def forward(self, x, rotary, past=None):
        return self.c_proj(self.mix(x, rotary, past) * self.c_gate(x).sigmoid())


class Differential(Attention):
    """differential: the difference of two softmaxes, (A₁ - λ A₂) v (arXiv 2410.05258).

    A₁ and A₂ are of heads i and i + H/2, and v is twice as wide. λ is learned around λ₀, which
    grows with depth. The result has its root mean square normalised and is multiplied by 1 - λ₀.
    """

    def __init__(self, config, layer, **options):
        super().__init__(config, layer, **options)
        self.cache_shapes = [(self.n_head, self.D), (self.n_head // 2, 2 * self.D)]
        self.lambda_0 = 0.8 - 0.6 * math.exp(-0.3 * layer)
        for name in ('lambda_q1', 'lambda_k1', 'lambda_q2', 'lambda_k2'):
            self.register_parameter(name, nn.Parameter(torch.randn(self.D) * 0.1))

    def attend(self, q, k, v, past):
        v = torch.cat(v.chunk(2, 1), -1)  # (B, H/2, T, 2D)
        if past is not None:
            k, v = past.update(k, v)
        q1, q2 = q.chunk(2, 1)  # (B, H/2, T, D)
        k1, k2 = k.chunk(2, 1)  # (B, H/2, L, D)
        first = self.masked_attention(q1, k1, v, past)
        second = self.masked_attention(q2, k2, v, past)  # (B, H/2, T, 2D)

        exponent_1 = (self.lambda_q1 * self.lambda_k1).sum()
        exponent_2 = (self.lambda_q2 * self.lambda_k2).sum()
        y = first - (exponent_1.exp() - exponent_2.exp() + self.lambda_0) * second
        normed = F.rms_norm(layers.at_least_float32(y), (2 * self.D,), eps=1e-5).type_as(y)
        return normed * (1 - self.lambda_0)

    def flops_per_token(self, T):
        return 18 * self.width * T  # the values are twice as wide


class Up(nn.Linear):
    """A Linear whose matrix is also used in parts.

    As a class of its own it is not among the Linears that quantize.convert_weights replaces.
    """


class Latent(Attention):
    """mla: keys and values of all heads are computed from one small latent, which is cached.

    The latent has R numbers; a rotated key of E, shared by all heads, is cached beside it
    (DeepSeek-V2, arXiv 2405.04434; queries come straight from x, as in its Lite model). A head's q
    has D channels for its key from the latent, and E for the rotated one.

    When a cache is continued, the latent itself is key and value, and the matrices that would
    expand it act on queries and sums instead (`absorbed`).
    """

    def __init__(self, config, layer, **options):
        super().__init__(config, layer, **options)
        self.cache_shapes = [(1, self.R + self.E)]
        self.scale = (self.D + self.E) ** -0.5

    def init_projections(self, config, bias):
        self.R = config.latent
        self.E = config.rotary_dim
        self.c_q = nn.Linear(self.C, self.n_head * (self.D + self.E), bias=False)
        self.c_kv = nn.Linear(self.C, self.R, bias=False)
        self.c_rope = nn.Linear(self.C, self.E, bias=False)
        self.ln_kv = layers.RMSNorm(self.R, 1e-6)
        # Rows for all heads' keys, then rows for all heads' values.
        self.c_up = Up(self.R, 2 * self.width, bias=False)
        self.c_up.weight.n_matrices = 2  # which Muon updates one by one

    def heads(self, x, rotary):
        """q (B, H, T, D), its rotated part (B, H, T, E), and what is cached (B, 1, T, R + E)."""
        q = self.c_q(x).unflatten(-1, (self.n_head, -1))  # (B, T, H, D + E)
        q = self.qk_norm(q).transpose(1, 2)
        q, q_rope = q.split([self.D, self.E], -1)
        k_rope = layers.apply_rotary(self.qk_norm(self.c_rope(x))[:, None], rotary)
        q_rope = layers.apply_rotary(q_rope, rotary)
        latent = self.ln_kv(self.c_kv(x))[:, None]  # (B, 1, T, R)
        return q, q_rope, torch.cat([latent, k_rope], -1)

    def attend(self, q, q_rope, new, past):
        if past is None:
            return self.expanded(q, q_rope, new, past)
        (kept,) = past.update(new)  # (B, 1, L, R + E)
        if kept.size(2) == q.size(2):  # all tokens are new
            return self.expanded(q, q_rope, kept, past)
        return self.absorbed(q, q_rope, kept, past)

    def expanded(self, q, q_rope, kept, past):
        """Attention with each head's own keys (B, H, L, D + E) and values (B, H, L, D)."""
        latent, k_rope = kept.type_as(q).split([self.R, self.E], -1)
        kv = self.c_up(latent[:, 0])  # (B, L, 2·H·D)
        k, v = kernels.split_heads(kv, self.n_head, self.attention_kernel, parts=2)
        k = torch.cat([k, k_rope.expand(-1, self.n_head, -1, -1)], -1)
        q = torch.cat([q, q_rope], -1)
        return self.masked_attention(q, k, v, past, scale=self.scale)

    def absorbed(self, q, q_rope, kept, past):
        """The same by one key and value for all heads, (B, 1, L, R + E), without expanding it."""
        up_k, up_v = self.c_up.weight.view(2, self.n_head, self.D, self.R)
        q = torch.einsum('bhtd,hdr->bhtr', q, up_k)
        q = torch.cat([q, q_rope], -1)  # (B, H, T, R + E)
        y = self.masked_attention(q, kept, kept, past, scale=self.scale)
        return torch.einsum('bhtr,hdr->bhtd', y[..., : self.R], up_v)

    def flops_per_token(self, T):
        return 6 * self.n_head * (2 * self.D + self.E) * T


# The classes of each kind; blocks use them in turn.
KINDS = {
    'mha': [Attention],
    'gqa': [GroupedQuery],
    'mqa': [GroupedQuery],
    'sliding': [Windowed],
    'banded': [Attention, Windowed],
    'differential': [Differential],
    'mla': [Latent],
    'gated': [Gated],
    'sinks': [Sinks],
    'alibi': [Alibi],
}
