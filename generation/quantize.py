"""Weights for generation, in bfloat16, float16 or int8: a token costs reading them once, so half
the bytes, half the time.

On a CPU, decode.c does a token's products, and GPT-2's whole blocks; it is compiled when it is
first needed.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional as F

import model as gpt
from generation import c_library

DTYPES = {
    'float32': torch.float32,
    'bfloat16': torch.bfloat16,
    'float16': torch.float16,
    'int8': torch.int8,
}
ACTIVATIONS = {'exact': 0, 'tanh': 1, 'relu': 2}  # GPTConfig's gelu, as decode.c numbers them
MAX_C_ROWS = 16  # rows, for which decode.c is the faster way


def convert_weights(model, dtype, compile=False):
    """Keep the matrices of `model`'s Linears, in place, in dtype, one of DTYPES, and its cache too
    (int8: in bfloat16).

    Embeddings, norms and biases stay float32, and so does what flows between them. compile: by
    torch.compile, not decode.c. The model has to stay on its device from here on. Raises ValueError
    where int8 is no gain: it is for decode.c.
    """
    device = next(model.parameters(), torch.empty(0)).device.type
    library = None
    if device == 'cpu' and not compile:
        library = c_library.load(dtype)
    if dtype == 'int8' and not library:
        raise ValueError(
            "dtype='int8' is for a CPU with a C compiler (cc), without --compile=True: take --dtype=auto"
        )
    if compile:
        model.compile()
    if dtype == 'float32' and not library:
        return
    model.cache_dtype = torch.bfloat16 if dtype == 'int8' else DTYPES[dtype]
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, WeightOnlyLinear(child, DTYPES[dtype], library))
    if library and isinstance(model, gpt.GPT):
        blocks = FusedBlocks(model.transformer.h, model.config, library, model.cache_dtype)
        model.transformer.h = nn.ModuleList([blocks])


def has_int8():
    """Whether int8 is there, on a CPU: with a C compiler."""
    return c_library.load('int8') is not None


class WeightOnlyLinear(nn.Module):
    """An nn.Linear with its matrix in `dtype`. int8: whole numbers up to 127, times a scale per
    output.

    library: decode.c, for up to MAX_C_ROWS rows; what one of them gives does not depend on the others, to
    the bit.
    """

    def __init__(self, linear, dtype, library=None):
        super().__init__()
        weight, scale = linear.weight.detach(), None
        if dtype == torch.int8:
            scale = weight.abs().amax(1).clamp(min=1e-30) / 127
            weight = (weight / scale[:, None]).round()
        self.register_buffer('weight', weight.to(dtype).contiguous())
        self.register_buffer('scale', scale)
        self.register_buffer('bias', None if linear.bias is None else linear.bias.detach())
        # decode.c counts in 64s
        self.product = library and library.product if weight.size(1) >= 64 else None
        self.matrix = library and c_library.pointers(self.weight, scale, self.bias)

    def forward(self, x):
        *before, k = x.shape
        B, n = x.numel() // k, len(self.weight)
        if self.product and B <= MAX_C_ROWS and x.dtype == torch.float32:
            x, y = x.contiguous(), x.new_empty(*before, n)
            self.product(self.matrix, x.data_ptr(), y.data_ptr(), B, n, k)
            return y
        kind = torch.bfloat16 if self.scale is not None else self.weight.dtype
        y = F.linear(x.to(kind), self.weight.to(kind)).to(x.dtype)
        y = y if self.scale is None else y * self.scale
        return y if self.bias is None else y + self.bias


class FusedBlocks(nn.Module):
    """All Blocks of a GPT: one token of a few rows by decode.c, in x's place; all else by `blocks`,
    with their Linears."""

    def __init__(self, blocks, config, library, cache_dtype):
        super().__init__()
        self.blocks = blocks
        self.config = config
        self.run = library.blocks
        self.cache_dtype = cache_dtype
        tensors = []
        for b in blocks:
            for layer in (b.ln_1, b.attn.c_attn, b.attn.c_proj, b.ln_2, b.mlp.c_fc, b.mlp.c_proj):
                tensors += layer.weight, getattr(layer, 'scale', None), layer.bias
        self.layers = c_library.pointers(*tensors)

    def forward(self, x, past=None):
        B, T, C = x.shape
        if (
            past is None
            or T > 1
            or B > MAX_C_ROWS
            or x.dtype != torch.float32
            or past.tensors[0].dtype != self.cache_dtype
        ):
            for block, own in zip(
                self.blocks, past.cache.layers if past else itertools.repeat(None)
            ):
                x = block(x, own)
            return x
        config, cache = self.config, past.cache
        kv = c_library.pointers(*itertools.chain(*cache.kept))
        first = None if cache.first is None else cache.first.data_ptr()
        space = x.new_empty(B * (C + max(3 * C, config.inner)))
        self.run(
            self.layers,
            len(self.blocks),
            x.data_ptr(),
            kv,
            first,
            space.data_ptr(),
            B,
            C,
            config.n_head,
            config.inner,
            cache.room,
            cache.length - 1,
            ACTIVATIONS[config.gelu],
            config.norm_eps,
        )
        return x
