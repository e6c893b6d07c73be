"""What a language model is here (LanguageModel), and GPT-2's architecture (GPT), OpenAI's weights
included.

Shapes: B batch, T time, C channels, H heads, D head size, V vocabulary. GPT-2: Radford et al.
2019, https://github.com/openai/gpt-2 (pre-LayerNorm, learned positions, scaled residual init).
"""

import functools
import itertools
import math
from dataclasses import dataclass

from torch import nn
from torch.utils.checkpoint import checkpoint

from models.parts import kernels, kv_cache, layers
from models.parts.layers import LayerNorm


class LanguageModel(nn.Module):
    """The contract between train.py, sample.py, bench.py and every architecture.

    A model sets `Config`, a dataclass of only the fields it uses, among them block_size and
    vocab_size, and defines forward(idx, targets=None, cache=None) -> (logits, loss): idx (B, T)
    int64; targets the same shape, -1 is ignored; loss the mean cross-entropy in nats (in eval mode
    exactly that; training may add to it). With targets in eval mode logits are (B, T, V), in
    training they may be None; without targets they are the last position's, (B, 1, V). With a
    cache, of init_cache, idx are the tokens after those that it has taken in before, and it takes
    them in too. The rest has defaults to build on.
    """

    Config = None
    fit = None  # counted models: fit(batches of (idx, targets)) replaces the optimizer's steps
    exemptions = {}  # {shared property of tests/test_zoo.py: why it does not hold here}
    cache_dtype = None  # of init_cache, where it is not the weights' own; set by weights.prepare
    tokenizer = None  # set by pretrained.load_model: what the ids stand for
    # recompute blocks in the backward pass: less memory, a third more time
    gradient_checkpointing = False

    def __init__(self, config):
        super().__init__()
        self.config = config

    def num_params(self):
        """Parameters, each tied one counted once."""
        return sum(p.numel() for p in self.parameters())

    def param_groups(self):
        """{role: [parameters]} with the roles matrix, embedding, head and vector; each parameter in
        one of them."""
        embeddings = {id(m.weight) for m in self.modules() if isinstance(m, nn.Embedding)}
        groups = {'matrix': [], 'embedding': [], 'head': [], 'vector': []}
        for name, p in self.named_parameters():
            role = (
                'vector'
                if p.dim() < 2
                else 'embedding'
                if id(p) in embeddings
                else 'head'
                if name.startswith('lm_head.')
                else 'matrix'
            )
            groups[role].append(p)
        return groups

    def after_step(self):
        """Called after every optimizer step, for models that put their weights or buffers right
        then."""

    def calibrate(self, batches):
        """Called before every evaluation and save with training batches, for models that keep
        statistics of the data."""

    def flops_per_token(self, T):
        """FLOPs of forward and backward for one token of a T-token context (PaLM's estimate,
        attention left out)."""
        return 6 * self.num_params()

    def estimate_mfu(self, tokens_per_second, peak_flops):
        """Model FLOPs utilisation: the share of `peak_flops` that training at this speed uses."""
        return self.flops_per_token(self.config.block_size) * tokens_per_second / peak_flops

    def crop_block_size(self, block_size):
        """Shorten the longest context in place, for models that can."""
        raise ValueError(
            f"{type(self).__name__} has block_size={self.config.block_size} and can't change it"
        )

    def keep_documents_apart(self, eot):
        """Let no token see further back than its document's first, `eot`, in place; -1: they are
        read through."""
        if not hasattr(self.config, 'eot'):
            raise ValueError(
                f"{type(self).__name__} can't keep documents apart: leave out document_boundaries"
            )
        self.config.eot = eot

    def set_attention(self, kernel):
        """Compute attention by `kernel`: 'auto' (the fastest), 'sdpa' or 'plain'. Raises
        ValueError."""
        kernels.check_attention(kernel)
        for module in self.modules():
            if hasattr(module, 'attention_kernel'):
                module.attention_kernel = kernel

    def configure_optimizers(
        self, weight_decay, learning_rate, betas, device_type, lrs=None, **options
    ):
        """The optimizer over `param_groups`: AdamW, or another by build_optimizer's options; None
        without parameters."""
        width = getattr(self.config, 'n_embd', 768)
        for name, p in self.named_parameters():
            if name.endswith('c_attn.weight'):
                p.n_matrices = 3  # q, k and v, one above the other
        from training.optimizer import build_optimizer

        return build_optimizer(
            self.param_groups(),
            weight_decay,
            learning_rate,
            betas,
            device_type,
            lrs,
            width=width,
            **options,
        )

    def init_cache(self, batch, length, device=None, dtype=None):
        """What forward(…, cache=…) keeps of up to `length` tokens of each of `batch` rows; None: it
        has no such thing."""

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None):
        """idx (B, T) -> (B, T + max_new_tokens): idx continued, one sampled token after the
        other."""
        from generation import decode, sampling

        return decode.generate(self, idx, max_new_tokens, sampling.Sampling(temperature, top_k))


@dataclass
class GPTConfig:
    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # GPT-2's 50257, padded to a multiple of 64 for speed
    n_layer: int = 12  # blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # channels (C)
    dropout: float = 0.0  # probability, on embeddings, attention weights and both residual branches
    # in Linears and LayerNorms, as GPT-2 has it; without is a bit better and faster
    bias: bool = True
    gelu: str = 'exact'  # 'exact' (nanoGPT's), 'tanh' (OpenAI's approximation), or 'relu'
    n_inner: int = 0  # the MLP's channels; 0: 4 of n_embd
    tied: bool = True  # the head is the embeddings' table; False: a matrix of its own
    norm_eps: float = 1e-5  # added to the variance in LayerNorm
    # the token that begins a document, which sees no other one; -1: they are read through
    eot: int = -1

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a GPT needs at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout={self.dropout}: take a probability from 0 up to, not including, 1"
            )
        if not -1 <= self.eot < self.vocab_size:
            raise ValueError(
                f"eot={self.eot}: take -1, or an id below vocab_size={self.vocab_size}"
            )
        if self.gelu not in ACTIVATIONS:
            raise ValueError(f"gelu={self.gelu!r} is unknown: use {', '.join(ACTIVATIONS)}")
        if self.n_inner < 0:
            raise ValueError(f"n_inner={self.n_inner}: use 0 for 4 x n_embd, or the channels")
        if not 0 < self.norm_eps < math.inf:
            raise ValueError(f"norm_eps={self.norm_eps} must be above 0")

    @property
    def inner(self):
        """The MLP's channels."""
        return self.n_inner or 4 * self.n_embd


ACTIVATIONS = {'exact': nn.GELU, 'tanh': functools.partial(nn.GELU, 'tanh'), 'relu': nn.ReLU}


class CausalSelfAttention(nn.Module):
    attention_kernel = 'auto'  # one of kernels.ATTENTION; set by LanguageModel.set_attention

    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.dropout = config.n_head, config.dropout
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, past=None):
        B, T, C = x.shape
        q, k, v = kernels.split_heads(
            self.c_attn(x), self.n_head, self.attention_kernel
        )  # (B, H, T, D) each
        dropout = self.dropout if self.training else 0.0
        if past is None:
            y = kernels.causal_attention(q, k, v, dropout, kernel=self.attention_kernel)
        else:
            y = past.attend(q, k, v, dropout, kernel=self.attention_kernel)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.inner, bias=config.bias)
        self.gelu = ACTIVATIONS[config.gelu]()
        self.c_proj = nn.Linear(config.inner, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias, config.norm_eps)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd, config.bias, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, past=None):
        x = layers.residual_add(x, self.attn(self.ln_1(x), past))
        return layers.residual_add(x, self.mlp(self.ln_2(x)))


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
        for name, p in self.named_parameters():
            # 2 per block write to the residual stream: keep its variance at 1
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
        cache = cache or kv_cache.packed_documents(self.config.eot)
        x = (
            self.transformer.wte(idx)
            + self.transformer.wpe.weight[cache.extend(idx) if cache else slice(T)]
        )  # (B, T, C)
        x = self.transformer.drop(x)
        for block, past in zip(
            self.transformer.h, cache.layers if cache else itertools.repeat(None)
        ):
            recompute = self.gradient_checkpointing and self.training
            x = checkpoint(block, x, past, use_reentrant=False) if recompute else block(x, past)
        x = self.transformer.ln_f(x if targets is not None else x[:, -1:])
        logits = self.lm_head(x)  # (B, T, V), or (B, 1, V)
        if targets is None:
            return logits, None
        return logits, kernels.cross_entropy(logits, targets)

    def init_cache(self, batch, length, device=None, dtype=None):
        shape = self.config.n_head, self.config.n_embd // self.config.n_head
        shapes = [[shape, shape]] * self.config.n_layer
        return kv_cache.KVCache(
            batch, length, shapes, device, dtype or self.cache_dtype, self.config.eot
        )

    def num_params(self, non_embedding=True):
        """Parameters; by default without the position embeddings, as GPT-2's sizes are told."""
        n = super().num_params()
        return n - self.transformer.wpe.weight.numel() if non_embedding else n

    def flops_per_token(self, T):
        """6 per parameter that is multiplied with, and 12·C·T per layer for the attention products
        (PaLM, arXiv 2204.02311, appendix B)."""
        table = 0 if self.config.tied else self.transformer.wte.weight.numel()  # only looked up
        return 6 * (self.num_params() - table) + 12 * self.config.n_layer * self.config.n_embd * T

    def crop_block_size(self, block_size):
        """Shorten the longest context, in place; the position embeddings beyond it are gone."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(
                f"block_size={block_size}: this model has {self.config.block_size} positions, no more"
            )
        self.config.block_size = block_size
        self.transformer.wpe = nn.Embedding.from_pretrained(
            self.transformer.wpe.weight[:block_size].clone(), freeze=False
        )

    @classmethod
    def from_pretrained(cls, name, **overrides):
        """GPT-2 by name (gpt2, gpt2-medium, gpt2-large, gpt2-xl: downloaded once), or from a
        Hugging Face folder or a .safetensors file.

        overrides: Config fields that hold no weights, such as dropout. Raises ValueError or OSError
        where there is no GPT-2, a file is missing or the download fails.
        """
        from interop import huggingface

        own, fields, weights = huggingface.read(name)
        if own != 'gpt':
            raise ValueError(f"{name} holds no GPT-2 but a {own}: pretrained.load_model opens it")
        model = cls(cls.Config(**fields | overrides))
        huggingface.load_weights(model, weights, name)
        return model
