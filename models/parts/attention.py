"""Kinds of causal self-attention, one class each; the setting attention_kind says which a model has
(KINDS).

All are built alike, kind(config, layer, qk_norm, dropout, bias), and called alike,
forward(x, rotary, past=None): x (B, T, C) to (B, T, C). rotary: layers.rotary_table's rows for these T
places; past: a kv_cache.LayerCache, which keeps `cache_shapes` of each token.

Shapes: B batch, T new tokens, L all tokens, C channels, H heads, G heads of keys and values, D head
size (C/H unless head_dim says otherwise), R latent, E the rotated channels beside it.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from models.parts import kernels, layers


@dataclass
class AttentionConfig:
    """The fields of a Config whose model takes its attention from here; it has n_head, n_embd and
    vocab_size too."""

    # mha, gqa, mqa, sliding, banded, differential, mla, gated, sinks, alibi
    attention_kind: str = 'mha'
    head_dim: int = 0  # channels of a head; 0: n_embd / n_head
    # gqa's heads of keys and values; 0: a quarter of n_head, or the next that divides it
    n_kv_head: int = 0
    window: int = 128  # tokens that sliding and banded attention sees, the query's own among them
    kv_rank: int = 0  # mla's numbers per token for all keys and values; 0: four heads' size
    rope_dim: int = 0  # mla's rotated channels of a key, shared by all heads; 0: half a head's size
    # the token that begins a document, which sees no other one; -1: they are read through
    eot: int = -1

    def __post_init__(self):
        kind, H = self.attention_kind, self.n_head
        if kind not in KINDS:
            raise ValueError(f"attention_kind={kind!r} is unknown: take {', '.join(KINDS)}")
        if not self.head_dim and self.n_embd % (2 * H):
            raise ValueError(
                f"n_embd={self.n_embd} is not divisible by 2 x n_head={H}: rotation is of pairs"
            )
        if self.head_dim < 0 or self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim}: use 0 for n_embd / n_head, or an even "
                "number: rotation is of pairs"
            )
        for name, whose in (('n_kv_head', 'gqa'), ('kv_rank', 'mla'), ('rope_dim', 'mla')):
            value = getattr(self, name)
            if value < 0 or (value and kind != whose):
                raise ValueError(
                    f"{name}={value}: take 0 or more, and 0 unless it is attention_kind={whose!r}"
                )
        if not -1 <= self.eot < self.vocab_size:
            raise ValueError(
                f"eot={self.eot}: take -1, or an id below vocab_size={self.vocab_size}"
            )
        if self.window < 1:
            raise ValueError(f"window={self.window}: a token sees at least itself, 1")
        if H % self.kv_heads:
            raise ValueError(f"n_head={H} is not divisible by n_kv_head={self.n_kv_head}")
        if kind == 'differential' and H % 2:
            raise ValueError(
                f"n_head={H}: differential attention takes heads in pairs, an even number"
            )
        if self.rotary_dim % 2:
            raise ValueError(f"rope_dim={self.rope_dim} is odd: rotation is of pairs")

    @property
    def kv_heads(self):
        """G, the heads of keys and values."""
        quarter = next(
            n for n in range(1, self.n_head + 1) if not self.n_head % n and 4 * n >= self.n_head
        )
        return {'mqa': 1, 'gqa': self.n_kv_head or quarter}.get(self.attention_kind, self.n_head)

    @property
    def head_size(self):
        """D, the channels of a head."""
        return self.head_dim or self.n_embd // self.n_head

    @property
    def latent(self):
        """R, what mla keeps of a token besides the rotated key."""
        return self.kv_rank or 4 * self.head_size

    @property
    def rotary_dim(self):
        """The channels of a head that rotate."""
        if self.attention_kind == 'mla':
            return self.rope_dim or 2 * math.ceil(self.head_size / 4)
        return self.head_size


def build(config, layer, **options):
    """The attention of block `layer`, from 0, of a model with this AttentionConfig; options: of
    Attention."""
    kinds = KINDS[config.attention_kind]
    return kinds[layer % len(kinds)](config, layer, **options)


def same(x):
    return x


def seen(q, k, past):
    """Which of k's L columns each token of q, in the last T of them, may look at: bool (T, L), or
    (B, 1, T, L)."""
    if past and past.cache.seen is not None:
        return past.cache.seen
    T, L = q.size(2), k.size(2)
    return torch.ones(T, L, dtype=torch.bool, device=q.device).tril(L - T)


class Attention(nn.Module):
    """mha: every head with queries, keys and values of its own (arXiv 1706.03762), rotated.

    qk_norm: of queries and keys, before they are rotated; dropout: probability on the attention
    weights; bias: of the projections to queries, keys and values and of the output projection.
    """

    attention_kernel = 'auto'  # one of kernels.ATTENTION; set by LanguageModel.set_attention

    def __init__(self, config, layer, qk_norm=same, dropout=0.0, bias=False):
        super().__init__()
        self.n_head, self.C, self.D = config.n_head, config.n_embd, config.head_size
        self.width = self.n_head * self.D  # of all heads side by side
        self.qk_norm, self.dropout, self.cache_shapes = (
            qk_norm,
            dropout,
            [(config.kv_heads, self.D)] * 2,
        )
        self.init_projections(config, bias)
        self.c_proj = nn.Linear(self.width, self.C, bias=bias)

    def init_projections(self, config, bias):
        self.c_attn = nn.Linear(self.C, 3 * self.width, bias=bias)

    def forward(self, x, rotary, past=None):
        return self.c_proj(self.mix(x, rotary, past))

    def mix(self, x, rotary, past):
        """What the heads bring, side by side: (B, T, H·D)."""
        return self.attend(*self.heads(x, rotary), past).transpose(1, 2).flatten(2)

    def heads(self, x, rotary):
        """q (B, H, T, D), k and v (B, G, T, D)."""
        # (2, B, H, T, D), (1, B, H, T, D)
        qk, v = kernels.split_heads(self.c_attn(x), self.n_head, self.attention_kernel).split(
            [2, 1]
        )
        q, k = layers.apply_rotary(self.qk_norm(qk), rotary)
        return q, k, v[0]

    def attend(self, q, k, v, past):
        """(B, H, T, D)."""
        dropout = self.dropout if self.training else 0.0
        if past is None:
            return kernels.causal_attention(q, k, v, dropout, kernel=self.attention_kernel)
        return past.attend(q, k, v, dropout, kernel=self.attention_kernel)

    def weigh(self, q, k, v, past, mask=None, scale=None):
        """causal_attention in k's type, which a cache may have of its own, over all that `past` has
        kept."""
        if mask is None and past and not past.is_whole(q.size(2)):
            mask = seen(q, k, past)
        dropout = self.dropout if self.training else 0.0
        return kernels.causal_attention(
            q.to(k.dtype), k, v.to(k.dtype), dropout, mask, scale, kernel=self.attention_kernel
        ).type_as(q)

    def flops_per_token(self, T):
        """FLOPs of forward and backward for scores and sums over T tokens, which PaLM counts as if
        all were seen."""
        return 12 * self.width * T


class GroupedQuery(Attention):
    """gqa, mqa: H/G neighbouring heads share keys and values, so that the cache shrinks (arXiv
    2305.13245, 1911.02150)."""

    def init_projections(self, config, bias):
        self.n_kv_head = config.kv_heads
        self.c_q = nn.Linear(self.C, self.width, bias=bias)
        self.c_kv = nn.Linear(self.C, 2 * self.n_kv_head * self.D, bias=bias)
        self.c_kv.weight.n_matrices = 2  # to Muon

    def heads(self, x, rotary):
        q = self.c_q(x).unflatten(-1, (self.n_head, self.D)).transpose(1, 2)
        k, v = kernels.split_heads(self.c_kv(x), self.n_kv_head, self.attention_kernel, parts=2)
        return (
            layers.apply_rotary(self.qk_norm(q), rotary),
            layers.apply_rotary(self.qk_norm(k), rotary),
            v,
        )


class Windowed(Attention):
    """sliding: a token sees the last `window`, itself among them; n blocks see n·(window - 1) + 1
    (arXiv 2004.05150).

    banded: this in every second block, the others are dense (GPT-3, arXiv 2005.14165; Sparse
    Transformer, 1904.10509).
    """

    def __init__(self, config, layer, **options):
        super().__init__(config, layer, **options)
        self.window = config.window

    def attend(self, q, k, v, past):
        T = q.size(2)
        if (past.cache.length if past else T) <= self.window:  # all is near
            return super().attend(q, k, v, past)
        k, v = past.keep(k, v) if past else (k, v)
        L = k.size(2)
        mask = seen(q, k, past) & torch.ones(T, L, dtype=torch.bool, device=q.device).triu(
            L - T - self.window + 1
        )
        start = max(0, L - T - self.window + 1)  # the first that anybody sees
        return self.weigh(q, k[:, :, start:], v[:, :, start:], past, mask[..., start:])

    def flops_per_token(self, T):
        return super().flops_per_token(min(T, self.window))


class Alibi(Attention):
    """alibi: no rotation; a head's scores fall with the distance, each head with a slope of its own
    (arXiv 2108.12409)."""

    def __init__(self, config, layer, **options):
        super().__init__(config, layer, **options)
        self.register_buffer('slopes', slopes(config.n_head).view(1, -1, 1, 1), persistent=False)

    def heads(self, x, rotary):
        qk, v = kernels.split_heads(self.c_attn(x), self.n_head, self.attention_kernel).split(
            [2, 1]
        )
        q, k = self.qk_norm(qk)
        return q, k, v[0]

    def attend(self, q, k, v, past):
        k, v = past.keep(k, v) if past else (k, v)
        places = torch.arange(k.size(2), device=q.device)
        bias = self.slopes * (places - places[-q.size(2) :, None])  # (1, H, T, L)
        return self.weigh(q, k, v, past, bias.masked_fill(~seen(q, k, past), -math.inf).to(k.dtype))


def slopes(n):
    """ALiBi's slopes of n heads: powers of 2^(-8/n); where n is no power of two, every second of
    twice as many fill up."""
    power = 2 ** int(math.log2(n))
    some = 2 ** (-8 / power * torch.arange(1, power + 1))
    return torch.cat([some, slopes(2 * power)[::2][: n - power]]) if n > power else some


class Sinks(Attention):
    """sinks: one more score in each head's softmax, learned, with nothing behind it: a head may
    look at nothing (arXiv 2309.17453; so in GPT-OSS, arXiv 2508.10925)."""

    def __init__(self, config, layer, **options):
        super().__init__(config, layer, **options)
        self.sinks = nn.Parameter(torch.zeros(config.n_head))

    def attend(self, q, k, v, past):
        k, v = past.keep(k, v) if past else (k, v)
        mask = F.pad(seen(q, k, past), (1, 0), value=True)
        # the sink as a key in front of all others, with one channel more, where q is such that the
        # score is the sink
        q, k, v = (
            F.pad(q, (0, 1), value=math.sqrt(self.D)),
            F.pad(k, (0, 1, 1, 0)),
            F.pad(v, (0, 1, 1, 0)),
        )
        k[:, :, 0, -1] = self.sinks.type_as(k)
        return self.weigh(q, k, v, past, mask, scale=self.D**-0.5)[..., :-1]


class Gated(Attention):
    """gated: what the heads bring times a gate from the token itself, σ(x W), before the projection
    (arXiv 2505.06708)."""

    def init_projections(self, config, bias):
        super().init_projections(config, bias)
        self.c_gate = nn.Linear(self.C, self.width, bias=False)

    def forward(self, x, rotary, past=None):
        return self.c_proj(self.mix(x, rotary, past) * self.c_gate(x).sigmoid())


class Differential(Attention):
    """differential: the difference of two softmaxes, of heads i and i + H/2, over values of both
    (arXiv 2410.05258).

    (A₁ - λ A₂) v, where λ is learned around λ₀, which grows with depth; its RMS norm, times 1 - λ₀.
    """

    def __init__(self, config, layer, **options):
        super().__init__(config, layer, **options)
        self.cache_shapes = [(self.n_head, self.D), (self.n_head // 2, 2 * self.D)]
        self.lambda_0 = 0.8 - 0.6 * math.exp(-0.3 * layer)
        for name in ('lambda_q1', 'lambda_k1', 'lambda_q2', 'lambda_k2'):
            self.register_parameter(name, nn.Parameter(torch.randn(self.D) * 0.1))

    def attend(self, q, k, v, past):
        v = torch.cat(v.chunk(2, 1), -1)  # (B, H/2, T, 2D)
        k, v = past.keep(k, v) if past else (k, v)
        first, second = (self.weigh(*half, v, past) for half in zip(q.chunk(2, 1), k.chunk(2, 1)))
        exponents = (self.lambda_q1 * self.lambda_k1).sum(), (self.lambda_q2 * self.lambda_k2).sum()
        y = first - (exponents[0].exp() - exponents[1].exp() + self.lambda_0) * second
        return F.rms_norm(layers.at_least_float32(y), (2 * self.D,), eps=1e-5).type_as(y) * (
            1 - self.lambda_0
        )

    def flops_per_token(self, T):
        return 18 * self.width * T  # the values are twice as wide


class Up(nn.Linear):
    """A Linear whose matrix is also taken apart: a class of its own, which weights.prepare leaves
    as it is."""


class Latent(Attention):
    """mla: keys and values of all heads out of one latent of R numbers, and one rotated key of E
    for all heads; these are all that a cache keeps (DeepSeek-V2, arXiv 2405.04434; queries straight
    from x, as in its Lite).

    q of a head: D channels for its key from the latent, E for the rotated one. Reading on in a
    cache, the matrices from the latent act on queries and sums instead (`absorbed`): the latent is
    key and value, and nothing is expanded.
    """

    def __init__(self, config, layer, **options):
        super().__init__(config, layer, **options)
        self.cache_shapes = [(1, self.R + self.E)]
        self.scale = (self.D + self.E) ** -0.5

    def init_projections(self, config, bias):
        self.R, self.E = config.latent, config.rotary_dim
        self.c_q = nn.Linear(self.C, self.n_head * (self.D + self.E), bias=False)
        self.c_kv = nn.Linear(self.C, self.R, bias=False)
        self.c_rope = nn.Linear(self.C, self.E, bias=False)
        self.ln_kv = layers.RMSNorm(self.R, 1e-6)
        # all heads' keys, and all heads' values below them
        self.c_up = Up(self.R, 2 * self.width, bias=False)
        self.c_up.weight.n_matrices = 2

    def heads(self, x, rotary):
        """q (B, H, T, D), its rotated part (B, H, T, E), and what is kept of each token, (B, 1, T,
        R + E)."""
        q = self.qk_norm(self.c_q(x).unflatten(-1, (self.n_head, -1))).transpose(1, 2)
        q, q_rope = q.split([self.D, self.E], -1)
        k_rope = layers.apply_rotary(self.qk_norm(self.c_rope(x))[:, None], rotary)
        return (
            q,
            layers.apply_rotary(q_rope, rotary),
            torch.cat([self.ln_kv(self.c_kv(x))[:, None], k_rope], -1),
        )

    def attend(self, q, q_rope, latent, past):
        (kept,) = past.keep(latent) if past else (latent,)
        is_new = kept.size(2) == q.size(2)  # none was there before
        return (self.expanded if is_new else self.absorbed)(q, q_rope, kept, past)

    def expanded(self, q, q_rope, kept, past):
        """Each head's own keys and values: (B, H, L, D + E), (B, H, L, D)."""
        latent, k_rope = kept.type_as(q).split([self.R, self.E], -1)
        k, v = kernels.split_heads(
            self.c_up(latent[:, 0]), self.n_head, self.attention_kernel, parts=2
        )
        k = torch.cat([k, k_rope.expand(-1, self.n_head, -1, -1)], -1)
        return self.weigh(torch.cat([q, q_rope], -1), k, v, past, scale=self.scale)

    def absorbed(self, q, q_rope, kept, past):
        """The same, by one key for all heads, the latent, which is the value too: (B, 1, L, R +
        E)."""
        up_k, up_v = self.c_up.weight.view(2, self.n_head, self.D, self.R)
        y = self.weigh(
            torch.cat([torch.einsum('bhtd,hdr->bhtr', q, up_k), q_rope], -1),
            kept,
            kept,
            past,
            scale=self.scale,
        )
        return torch.einsum('bhtr,hdr->bhtd', y[..., : self.R], up_v)

    def flops_per_token(self, T):
        return 6 * self.n_head * (2 * self.D + self.E) * T


# Blocks take a kind's classes by turns.
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
