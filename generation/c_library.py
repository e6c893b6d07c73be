"""decode.c as a library: compiled for this CPU when it is first needed, kept in the user's cache,
and loaded."""

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import tempfile
from pathlib import Path

# decode.c's types WEIGHT and CACHE for each dtype of the weights. C has no bfloat16: it is read as
# two bytes.
TYPES = {
    'float32': ('float', 'float'),
    'bfloat16': ('uint16_t', 'uint16_t'),
    'int8': ('int8_t', 'uint16_t'),
}
SOURCE = Path(__file__).with_name('decode.c')


def pointers(*tensors):
    """A C array of the tensors' addresses, null for None. The tensors must outlive it."""
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    return (ctypes.c_void_p * len(addresses))(*addresses)


@functools.cache
def load(dtype):
    """decode.c for weights of `dtype`, as a ctypes library; None where it can't be had: no C
    compiler, no folder to write to, or a dtype that is not in TYPES."""
    if dtype not in TYPES:
        return None
    flags = _compiler_flags(dtype)
    try:
        path = _path_in_cache(flags)
        if path is None:
            return None
        library = _open(path)
        if library is None:
            _compile(flags, path, can_be_single_threaded=dtype == 'int8')
            library = _open(path)
    except (OSError, RuntimeError):  # no compiler, nowhere to write, no home
        return None
    if library is not None:
        _declare_arguments(library)
    return library


def _compiler_flags(dtype):
    """The options of cc that decide on the machine code."""
    weight, cache = TYPES[dtype]
    flags = [f'-DWEIGHT={weight}', f'-DCACHE={cache}', '-O3', '-march=native', '-shared', '-fPIC']
    # Sums may be computed in any order, so that they become vector instructions.
    flags += ['-fassociative-math', '-fno-signed-zeros', '-fno-trapping-math', '-fno-math-errno']
    if platform.machine().lower() in ('x86_64', 'amd64'):
        flags.append('-mprefer-vector-width=512')
    return flags


def _path_in_cache(flags):
    """Where the library lies in the user's cache: its name depends on the source, the flags and the
    CPU. None where the folder belongs to another user, who could have put any code there."""
    cache = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
    folder = cache / 'nanogpt'
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, 'getuid') and folder.stat().st_uid != os.getuid():
        return None
    source = SOURCE.read_text(encoding='utf-8')
    key = ''.join([source, platform.machine(), platform.processor(), *flags, *_cpu_features()])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return folder / f'decode-{digest}.so'


def _cpu_features():
    """The lines of /proc/cpuinfo that say which instructions the CPUs have; [] where that file is
    missing."""
    try:
        text = Path('/proc/cpuinfo').read_text(encoding='utf-8', errors='replace')
    except OSError:
        return []
    features = []
    for line in text.splitlines():
        if line.startswith(('flags', 'Features', 'model name')):
            features.append(line)
    return features


def _compile(flags, path, can_be_single_threaded):
    """Compile decode.c to `path`, if the compiler can. It appears there complete or not at all."""
    choices = [['-fopenmp']]
    if can_be_single_threaded:
        # Apple's compiler has no OpenMP. On one thread, only int8 is faster than torch.
        choices.append([])
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        output = f'{folder}/decode.so'
        for threads in choices:
            command = ['cc', *flags, *threads, str(SOURCE), '-lm', '-o', output]
            if subprocess.run(command, capture_output=True).returncode == 0:
                os.replace(output, path)
                return


def _open(path):
    """The library at `path`; None where there is none, or a damaged one."""
    try:
        if path.stat().st_size == 0:  # left by a crash
            return None
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _declare_arguments(library):
    """Tell ctypes the arguments of decode.c's two functions, which return nothing."""
    pointer = ctypes.c_void_p
    number = ctypes.c_long
    library.product.argtypes = [pointer] * 3 + [number] * 3
    library.product.restype = None
    library.blocks.argtypes = [pointer, number, *[pointer] * 4, *[number] * 7, ctypes.c_float]
    library.blocks.restype = None
