"""decode.c: compiled for this CPU when it is first needed, kept in the user's cache, and loaded."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

# decode.c's WEIGHT and CACHE for each; bfloat16 is two bytes to C.
TYPES = {
    'float32': ('float', 'float'),
    'bfloat16': ('uint16_t', 'uint16_t'),
    'int8': ('int8_t', 'uint16_t'),
}


def pointers(*tensors):
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
def load(dtype):
    """decode.c for weights of `dtype`, compiled for this CPU and kept in the user's cache; None where
    there is no C compiler."""
    if dtype not in TYPES:
        return None
    weight, cache = TYPES[dtype]
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
