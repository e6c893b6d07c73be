"""Weights for generation in bfloat16, float16 or int8. A token takes as long as it takes to read
all weights once: half the bytes, half the time.

On a CPU, decode.c computes one token's linear layers, and GPT-2's whole blocks.
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
ACTIVATIONS = {'exact': 0, 'tanh': 1, 'relu': 2}  # GPTConfig.gelu -> decode.c's enum
MAX_C_ROWS = 16  # for more rows than this, torch's products are faster than decode.c's
MIN_C_COLUMNS = 64  # decode.c sums 64 products at a time


def convert_weights(model, dtype, compile=False):
    """Convert the matrices of the model's nn.Linears, in place, to dtype, one of DTYPES, and let
    its cache use that dtype too (bfloat16 for int8).

    Embeddings, norms, biases and activations stay float32. compile: use torch.compile in place of
    decode.c. The model must stay on its device from here on. Raises ValueError for int8 without
    decode.c, where it would not be faster.
    """
    device = next(model.parameters(), torch.empty(0)).device.type
    library = None
    if device == 'cpu' and not compile:
        library = c_library.load(dtype)
    if dtype == 'int8' and not library:
        raise ValueError(
            "dtype='int8' is for a CPU with a C compiler (cc), without --compile=True: "
            "use --dtype=auto"
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
    """Whether int8 works on this machine's CPU: it needs a C compiler."""
    return c_library.load('int8') is not None


class WeightOnlyLinear(nn.Module):
    """An nn.Linear whose matrix is stored in `dtype`; inputs and outputs stay as they are.

    int8: integers from -127 to 127, with a float32 scale per output channel. library: decode.c or
    None; it computes up to MAX_C_ROWS rows, and a row's result is the same bits whatever the
    others are.
    """

    def __init__(self, linear, dtype, library=None):
        super().__init__()
        weight = linear.weight.detach()
        scale = None
        if dtype == torch.int8:
            scale = weight.abs().amax(1).clamp(min=1e-30) / 127
            weight = (weight / scale[:, None]).round()
        bias = linear.bias
        if bias is not None:
            bias = bias.detach()
        self.register_buffer('weight', weight.to(dtype).contiguous())
        self.register_buffer('scale', scale)
        self.register_buffer('bias', bias)

        self.c_product = None
        if library and weight.size(1) >= MIN_C_COLUMNS:
            self.c_product = library.product
            self.c_matrix = c_library.pointers(self.weight, self.scale, self.bias)

    def forward(self, x):
        *leading, k = x.shape
        B = x.numel() // k
        n = len(self.weight)
        if self.c_product and B <= MAX_C_ROWS and x.dtype == torch.float32:
            x = x.contiguous()
            y = x.new_empty(*leading, n)
            self.c_product(self.c_matrix, x.data_ptr(), y.data_ptr(), B, n, k)
            return y

        dtype = self.weight.dtype
        if self.scale is not None:
            dtype = torch.bfloat16  # which has all integers up to 127
        y = F.linear(x.to(dtype), self.weight.to(dtype)).to(x.dtype)
        if self.scale is not None:
            y = y * self.scale
        if self.bias is not None:
            y = y + self.bias
        return y


class FusedBlocks(nn.Module):
    """All blocks of a GPT as one module: decode.c computes one token of up to MAX_C_ROWS rows, in
    x's memory; the blocks themselves, with their converted Linears, everything else."""

    def __init__(self, blocks, config, library, cache_dtype):
        super().__init__()
        self.blocks = blocks
        self.config = config
        self.cache_dtype = cache_dtype
        self.c_blocks = library.blocks
        tensors = []
        for block in blocks:
            attn, mlp = block.attn, block.mlp
            for layer in (block.ln_1, attn.c_attn, attn.c_proj, block.ln_2, mlp.c_fc, mlp.c_proj):
                scale = getattr(layer, 'scale', None)  # int8 has one, a LayerNorm has not
                tensors += [layer.weight, scale, layer.bias]
        self.c_layers = c_library.pointers(*tensors)

    def forward(self, x, past=None):
        """x (B, T, C) -> (B, T, C). past: the first layer's LayerCache, or None."""
        if not self._can_use_c(x, past):
            layers = itertools.repeat(None)
            if past is not None:
                layers = past.cache.layers
            for block, layer in zip(self.blocks, layers):
                x = block(x, layer)
            return x

        B, _, C = x.shape
        config = self.config
        cache = past.cache
        first = None
        if cache.first is not None:
            first = cache.first.data_ptr()
        space = x.new_empty(B * (C + max(3 * C, config.inner)))
        self.c_blocks(  # ctypes has no keywords: the order is that of `blocks` in decode.c
            self.c_layers,
            len(self.blocks),
            x.data_ptr(),
            c_library.pointers(*itertools.chain(*cache.kept)),
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

    def _can_use_c(self, x, past):
        """Whether x is one float32 token of few rows, with a cache of the dtype that decode.c was
        compiled for."""
        B, T, _ = x.shape
        if past is None or T > 1 or B > MAX_C_ROWS:
            return False
        return x.dtype == torch.float32 and past.tensors[0].dtype == self.cache_dtype
