"""Weights for generation, in bfloat16, float16 or int8: a token costs reading them once, so half
the bytes, half the time.

On a CPU, decode.c does a token's products, and GPT-2's whole blocks; it is compiled when it is
first needed.
"""

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import platform
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import model as gpt

DTYPES = {
    'float32': torch.float32,
    'bfloat16': torch.bfloat16,
    'float16': torch.float16,
    'int8': torch.int8,
}
# decode.c's WEIGHT and CACHE for each; bfloat16 is two bytes to C.
C_TYPES = {
    'float32': ('float', 'float'),
    'bfloat16': ('uint16_t', 'uint16_t'),
    'int8': ('int8_t', 'uint16_t'),
}
ACTIVATIONS = {'exact': 0, 'tanh': 1, 'relu': 2}  # GPTConfig's gelu, as decode.c numbers them
FEW = 16  # rows, for which decode.c is the faster way


def prepare(model, dtype, compile=False):
    """Keep the matrices of `model`'s Linears, in place, in dtype, one of DTYPES, and its cache too
    (int8: in bfloat16).

    Embeddings, norms and biases stay float32, and so does what flows between them. compile: by
    torch.compile, not decode.c. The model has to stay on its device from here on. Raises ValueError
    where int8 is no gain: it is for decode.c.
    """
    device = next(model.parameters(), torch.empty(0)).device.type
    library = (
        _library(*C_TYPES[dtype]) if device == 'cpu' and dtype in C_TYPES and not compile else None
    )
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
                setattr(module, name, Linear(child, DTYPES[dtype], library))
    if library and isinstance(model, gpt.GPT):
        blocks = Blocks(model.transformer.h, model.config, library, model.cache_dtype)
        model.transformer.h = nn.ModuleList([blocks])


def can_int8():
    """Whether int8 is there, on a CPU: with a C compiler."""
    return _library(*C_TYPES['int8']) is not None


class Linear(nn.Module):
    """An nn.Linear with its matrix in `dtype`. int8: whole numbers up to 127, times a scale per
    output.

    library: decode.c, for up to FEW rows; what one of them gives does not depend on the others, to
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
        self.matrix = library and _pointers(self.weight, scale, self.bias)

    def forward(self, x):
        *before, k = x.shape
        B, n = x.numel() // k, len(self.weight)
        if self.product and B <= FEW and x.dtype == torch.float32:
            x, y = x.contiguous(), x.new_empty(*before, n)
            self.product(self.matrix, x.data_ptr(), y.data_ptr(), B, n, k)
            return y
        kind = torch.bfloat16 if self.scale is not None else self.weight.dtype
        y = F.linear(x.to(kind), self.weight.to(kind)).to(x.dtype)
        y = y if self.scale is None else y * self.scale
        return y if self.bias is None else y + self.bias


class Blocks(nn.Module):
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
        self.layers = _pointers(*tensors)

    def forward(self, x, past=None):
        B, T, C = x.shape
        if (
            past is None
            or T > 1
            or B > FEW
            or x.dtype != torch.float32
            or past.tensors[0].dtype != self.cache_dtype
        ):
            for block, own in zip(
                self.blocks, past.cache.layers if past else itertools.repeat(None)
            ):
                x = block(x, own)
            return x
        config, cache = self.config, past.cache
        kv = _pointers(*itertools.chain(*cache.kept))
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


def _pointers(*tensors):
    return (ctypes.c_void_p * len(tensors))(
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors)
    )


def _loaded(path):
    """The library at `path`, or None where there is none, or a damaged one."""
    try:
        return ctypes.CDLL(str(path)) if path.stat().st_size else None
    except OSError:
        return None


@functools.cache
def _library(weight, cache):
    """decode.c for these types, compiled for this CPU and kept in the user's cache; None where
    there is no C compiler."""
    source = Path(__file__).with_name('decode.c')
    # and sums in any order
    flags = (
        f'-DWEIGHT={weight} -DCACHE={cache} -O3 -march=native -shared -fPIC '
        '-fassociative-math -fno-signed-zeros -fno-trapping-math -fno-math-errno'
    ).split()
    flags += ['-mprefer-vector-width=512'] * (platform.machine().lower() in ('x86_64', 'amd64'))
    about = [source.read_text(encoding='utf-8'), platform.machine(), platform.processor(), *flags]
    with (
        contextlib.suppress(OSError),
        open('/proc/cpuinfo', encoding='utf-8', errors='replace') as file,
    ):
        about += [line for line in file if line.startswith(('flags', 'Features', 'model name'))]
    try:
        folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'nanogpt'
        path = folder / f"decode-{hashlib.sha256(''.join(about).encode()).hexdigest()[:16]}.so"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if hasattr(os, 'getuid') and folder.stat().st_uid != os.getuid():
            return None  # code of somebody else's may be in it
        library = _loaded(path)
        if library is None:
            with tempfile.TemporaryDirectory(dir=folder) as fresh:
                # Apple's compiler has no OpenMP: on one thread, only int8 is faster than torch
                for threads in [['-fopenmp']] + [[]] * (weight == 'int8_t'):
                    command = [
                        'cc',
                        *flags,
                        *threads,
                        str(source),
                        '-lm',
                        '-o',
                        f'{fresh}/decode.so',
                    ]
                    if subprocess.run(command, capture_output=True).returncode == 0:
                        os.replace(f'{fresh}/decode.so', path)
                        break
            library = _loaded(path)
        if library is None:
            return None
    except (OSError, RuntimeError):  # no compiler, nowhere to write, no home
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_long
    library.product.argtypes, library.product.restype = [pointer] * 3 + [number] * 3, None
    library.blocks.argtypes = [pointer, number, *[pointer] * 4, *[number] * 7, ctypes.c_float]
    library.blocks.restype = None
    return library
