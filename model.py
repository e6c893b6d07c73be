"""The contract of every language model here (LanguageModel), and GPT-2's architecture (GPT).

GPT-2 is a Transformer decoder (Vaswani et al. 2017, arXiv 1706.03762) with learned positions, a
LayerNorm before each branch and a scaled initialisation of the branches' outputs (Radford et al.
2019, https://github.com/openai/gpt-2). Names of modules are nanoGPT's, so its checkpoints load.

Shapes: B batch, T time, C channels, H heads, D head size, V vocabulary.
"""

import functools
import itertools
import math
from dataclasses import dataclass

from torch import nn
from torch.utils.checkpoint import checkpoint

from models.parts import kernels, kv_cache
from models.parts.layers import LayerNorm, residual_add


class LanguageModel(nn.Module):
    """What train.py, sample.py, bench.py and the others expect of an architecture.

    A subclass sets `Config`, a dataclass of the fields that it uses, with block_size and vocab_size
    among them, and defines

        forward(idx, targets=None, cache=None) -> (logits, loss)

    idx      (B, T) int64: token ids
    targets  (B, T) int64: the next token of each position; -1: not scored
    cache    from `init_cache`: idx continues the tokens that it holds, and is added to them
    logits   without targets (B, 1, V), of the last position; with targets (B, T, V), or, in
             training, None
    loss     the mean cross-entropy in nats, to which training may add; None without targets

    The methods below have defaults that suit most models.
    """

    Config = None

    # Models that count instead of learning: fit(batches of (idx, targets)) replaces training steps.
    fit = None

    # {property that tests/test_zoo.py checks of all models: the reason why it does not hold here}
    exemptions = {}

    # Type of the cache's tensors if it is not the weights'; set by quantize.convert_weights.
    cache_dtype = None

    # What the token ids stand for; set by pretrained.load_model.
    tokenizer = None

    # Recompute each block in the backward pass: less memory, a third more time. Set by train.py.
    gradient_checkpointing = False

    def __init__(self, config):
        super().__init__()
        self.config = config

    def num_params(self):
        """Number of parameters; a tied one counts once."""
        return sum(p.numel() for p in self.parameters())

    def param_groups(self):
        """{role: [parameters]}, each parameter in one role: matrix, embedding, head or vector."""
        embeddings = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        groups = {'matrix': [], 'embedding': [], 'head': [], 'vector': []}
        for name, p in self.named_parameters():
            if p.dim() < 2:
                groups['vector'].append(p)
            elif id(p) in embeddings:
                groups['embedding'].append(p)
            elif name.startswith('lm_head.'):
                groups['head'].append(p)
            else:
                groups['matrix'].append(p)
        return groups

    def configure_optimizers(
        self, weight_decay, learning_rate, betas, device_type, lrs=None, **options
    ):
        """The optimizer of `param_groups`, by build_optimizer; None for a model without parameters.

        lrs: {role: learning rate of its own}. options: more of build_optimizer's arguments.
        """
        from training.optimizer import build_optimizer  # not needed to read a model

        return build_optimizer(
            self.param_groups(),
            weight_decay,
            learning_rate,
            betas,
            device_type,
            lrs,
            width=getattr(self.config, 'n_embd', 768),  # learning rates scale with it
            **options,
        )

    def after_step(self):
        """Called after every optimizer step, for models that constrain their weights or buffers."""

    def calibrate(self, batches):
        """Called with training batches before every evaluation and save.

        For models that keep statistics of the data.
        """

    def set_attention(self, kernel):
        """Compute attention by `kernel`: 'auto' (the fastest here), 'sdpa' or 'plain'.

        Raises ValueError for another name.
        """
        kernels.check_attention(kernel)
        for module in self.modules():
            if hasattr(module, 'attention_kernel'):
                module.attention_kernel = kernel

    def keep_documents_apart(self, eot):
        """Hide earlier documents of a row from each token, in place.

        eot: the token that begins a document; -1: attention crosses documents. Raises ValueError
        for a model without this option.
        """
        if not hasattr(self.config, 'eot'):
            raise ValueError(
                f"{type(self).__name__} can't keep documents apart: omit document_boundaries"
            )
        self.config.eot = eot

    def crop_block_size(self, block_size):
        """Set the longest context, in place. Raises ValueError for a model that can't."""
        raise ValueError(
            f"{type(self).__name__} has block_size={self.config.block_size} and can't change it"
        )

    def init_cache(self, batch, length, device=None, dtype=None):
        """A cache of up to `length` tokens of `batch` rows for `forward`; None: not supported."""

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """Continue idx (B, T) by sampling token after token: (B, T + max_new_tokens)."""
        from generation import decode, sampling

        return decode.generate(self, idx, max_new_tokens, sampling.Sampling(temperature, top_k))

    def flops_per_token(self, T):
        """FLOPs of forward and backward per token in a context of T tokens.

        This default counts 6 per parameter and no attention (PaLM, arXiv 2204.02311, appendix B).
        """
        return 6 * self.num_params()

    def estimate_mfu(self, tokens_per_second, peak_flops):
        """Model FLOPs utilisation: the share of the device's `peak_flops` that is used."""
        return self.flops_per_token(self.config.block_size) * tokens_per_second / peak_flops


# ---- GPT-2 ---------------------------------------------------------------------------------------

ACTIVATIONS = {'exact': nn.GELU, 'tanh': functools.partial(nn.GELU, 'tanh'), 'relu': nn.ReLU}


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # channels (C)
    dropout: float = 0.0  # probability, on embeddings, attention weights and both residual branches
    bias: bool = True  # in Linears and LayerNorms, as in GPT-2; False: slightly better and faster
    gelu: str = 'exact'  # 'exact' (nanoGPT's), 'tanh' (OpenAI's approximation), or 'relu'
    n_inner: int = 0  # channels of the MLP's hidden layer; 0: 4 x n_embd
    tied: bool = True  # the head shares the token embeddings' matrix; False: it has its own
    norm_eps: float = 1e-5  # added to the variance in LayerNorm
    eot: int = -1  # token that begins a document, within which attention stays; -1: no limit

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a GPT needs at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if not -1 <= self.eot < self.vocab_size:
            raise ValueError(f"eot={self.eot}: use -1, or an id below vocab_size={self.vocab_size}")
        if self.gelu not in ACTIVATIONS:
            raise ValueError(f"gelu={self.gelu!r} is unknown: use {', '.join(ACTIVATIONS)}")
        if self.n_inner < 0:
            raise ValueError(f"n_inner={self.n_inner}: use 0 for 4 x n_embd, or the channels")
        if not 0 < self.norm_eps < math.inf:
            raise ValueError(f"norm_eps={self.norm_eps} must be above 0")

    @property
    def inner(self):
        """Channels of the MLP's hidden layer."""
        return self.n_inner or 4 * self.n_embd


class CausalSelfAttention(nn.Module):
    attention_kernel = 'auto'  # set by LanguageModel.set_attention

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout  # on the attention weights
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_attn.weight.n_matrices = 3  # q, k and v, which Muon updates one by one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, past=None):
        """x (B, T, C) -> (B, T, C). past: this layer's keys and values of earlier tokens."""
        B, T, C = x.shape
        qkv = self.c_attn(x)  # (B, T, 3C)
        q, k, v = kernels.split_heads(qkv, self.n_head, self.attention_kernel)  # (B, H, T, D) each

        dropout = self.dropout if self.training else 0.0
        if past is None:
            y = kernels.causal_attention(q, k, v, dropout, kernel=self.attention_kernel)
        else:
            y = past.attend(q, k, v, dropout, kernel=self.attention_kernel)

        y = y.transpose(1, 2).reshape(B, T, C)  # (B, H, T, D) -> (B, T, C), heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.inner, bias=config.bias)
        self.gelu = ACTIVATIONS[config.gelu]()
        self.c_proj = nn.Linear(config.inner, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = self.gelu(self.c_fc(x))  # (B, T, inner)
        return self.dropout(self.c_proj(x))  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias, config.norm_eps)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, past=None):
        x = residual_add(x, self.attn(self.ln_1(x), past))
        x = residual_add(x, self.mlp(self.ln_2(x)))
        return x


class GPT(LanguageModel):
    Config = GPTConfig

    def __init__(self, config):
        super().__init__(config)
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=LayerNorm(config.n_embd, config.bias, config.norm_eps),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.transformer.wte.weight

        self.apply(self._init_weights)
        # Two projections per block add to the residual stream. Scaled like this, all of them
        # together keep its variance independent of the depth.
        for name, p in self.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

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

        x = self.transformer.wte(idx) + self.transformer.wpe.weight[positions]  # (B, T, C)
        x = self.transformer.drop(x)
        for block, past in zip(self.transformer.h, pasts):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, past, use_reentrant=False)
            else:
                x = block(x, past)

        if targets is None:  # generation needs the last position alone
            x = x[:, -1:]
        x = self.transformer.ln_f(x)
        logits = self.lm_head(x)  # (B, T, V), or (B, 1, V)
        if targets is None:
            return logits, None
        return logits, kernels.cross_entropy(logits, targets)

    def init_cache(self, batch, length, device=None, dtype=None):
        key_shape = (self.config.n_head, self.config.n_embd // self.config.n_head)  # (H, D)
        shapes = [[key_shape, key_shape]] * self.config.n_layer  # keys and values of each layer
        dtype = dtype or self.cache_dtype
        return kv_cache.KVCache(batch, length, shapes, device, dtype, eot=self.config.eot)

    def num_params(self, non_embedding=True):
        """Number of parameters, by default without position embeddings, as GPT-2's sizes count."""
        n = super().num_params()
        if non_embedding:
            n -= self.transformer.wpe.weight.numel()
        return n

    def flops_per_token(self, T):
        """6 per parameter of a matrix product, and 12·C·T per layer for the attention products.

        PaLM, arXiv 2204.02311, appendix B.
        """
        n = self.num_params()
        if not self.config.tied:
            n -= self.transformer.wte.weight.numel()  # looked up, not multiplied
        return 6 * n + 12 * self.config.n_layer * self.config.n_embd * T

    def crop_block_size(self, block_size):
        """Shorten the longest context, in place; position embeddings beyond it are dropped."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(
                f"block_size={block_size} must be from 1 to {self.config.block_size}, the positions"
                " that this model has"
            )
        self.config.block_size = block_size
        weight = self.transformer.wpe.weight[:block_size].clone()
        self.transformer.wpe = nn.Embedding.from_pretrained(weight, freeze=False)

    @classmethod
    def from_pretrained(cls, name, **overrides):
        """GPT-2 with OpenAI's weights, or those of a Hugging Face folder or .safetensors file.

        name: gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded once), or a path. overrides:
        Config fields that hold no weights, such as dropout. Raises ValueError or OSError if there
        is no GPT-2, a file is missing or the download fails.
        """
        from interop import huggingface

        architecture, fields, weights = huggingface.read(name)
        if architecture != 'gpt':
            raise ValueError(
                f"{name} holds a {architecture}, not a GPT-2: load it with pretrained.load_model"
            )
        model = cls(cls.Config(**fields | overrides))
        huggingface.load_weights(model, weights, name)
        return model
