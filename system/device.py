"""The device: which one, its number format, threads, memory, random numbers, peak speed, profiler.

A device is a string everywhere: 'cpu', 'cuda', 'cuda:1' or 'mps'.
"""

import contextlib
import ctypes
import os
import platform
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch

from system.errors import fail

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


# ---- device and number format --------------------------------------------------------------------


def resolve_device(device, recorded=None):
    """'auto' | 'cpu' | 'cuda[:N]' | 'mps' -> a device that this machine has, or ValueError.

    'auto' is the fastest device; in a resumed run it is the device that the run used before
    (`recorded`), if this machine has it. Only the named device is queried: a run on the CPU must
    work where the GPU is full or reserved.
    """
    if device == 'auto' and recorded:
        return _recorded_device(recorded)
    if device == 'auto':
        return _fastest_device()

    kind, _, index = str(device).partition(':')
    is_known = kind in ('cpu', 'cuda', 'mps')
    has_valid_index = not index or (kind == 'cuda' and index.isdigit())
    if not is_known or not has_valid_index:
        raise ValueError(
            f"device={device!r} is unknown: use auto, cpu, cuda, cuda:0, cuda:1, … or mps"
        )
    if kind == 'cpu':
        return 'cpu'

    backend = torch.cuda if kind == 'cuda' else torch.backends.mps
    if not backend.is_available():
        raise ValueError(
            f"device={device!r} is not available here: use --device=auto, or install a torch "
            "built for it"
        )
    if kind == 'cuda':
        _check_gpu(device, int(index or 0))
    return str(device)


def _recorded_device(recorded):
    """The device that a resumed run used before, or the fastest one if this machine lacks it."""
    try:
        return resolve_device(recorded)
    except ValueError:
        fastest = _fastest_device()

    if os.environ.get('RANK', '0') == '0':
        print(
            f"the run used device={recorded!r}, which can't be used here: "
            f"it continues with device={fastest!r}",
            flush=True,
        )
    return fastest


def _fastest_device():
    """cuda, mps or cpu: the first of them that this machine and the installed torch support."""
    if torch.cuda.is_available():
        problem = _missing_kernels('cuda')
        if not problem:
            return 'cuda'
        print(f"{problem}; using the CPU", file=sys.stderr)
    if torch.backends.mps.is_available():
        return 'mps'
    return 'cpu'


def _check_gpu(device, index):
    """Raise ValueError if there is no GPU `index`, or the installed torch can't run on it."""
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"device={device!r}: this machine has {torch.cuda.device_count()} GPU(s), counted "
            "from cuda:0"
        )
    if problem := _missing_kernels(device):
        raise ValueError(f"{problem}; install an older torch or use --device=cpu")


def _missing_kernels(device):
    """A sentence if the installed torch has no kernels for this GPU, '' if it has them.

    Compiled kernels (sm_XY) run on GPUs of the same major capability and at least the same minor
    one. PTX (compute_XY) is compiled when it is loaded, for any later GPU.
    """
    if torch.version.hip:  # AMD names its architectures differently
        return ''
    major, minor = torch.cuda.get_device_capability(device)
    architectures = torch.cuda.get_arch_list()
    capabilities = [name.split('_')[1].rstrip('af') for name in architectures]
    if not capabilities:
        return ''

    if any(int(c[:-1]) == major and int(c[-1]) <= minor for c in capabilities):
        return ''
    has_ptx = any(name.startswith('compute_') for name in architectures)
    if has_ptx and all(int(c[:-1]) <= major for c in capabilities):
        return ''
    return (
        f"this torch has no kernels for {torch.cuda.get_device_name(device)} "
        f"(capability {major}.{minor})"
    )


def resolve_dtype(dtype, device):
    """'auto' | 'float32' | 'bfloat16' | 'float16' -> the format to compute in, or ValueError.

    'auto' is bfloat16 where the hardware supports it, else float16 on CUDA and float32 elsewhere.
    """
    kind = device.split(':')[0]
    has_bfloat16 = _has_bfloat16(device)
    if dtype == 'auto':
        if has_bfloat16:
            return 'bfloat16'
        return 'float16' if kind == 'cuda' else 'float32'

    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown: use auto, float32, bfloat16 or float16")
    # A CPU without hardware support computes the same numbers, only slowly.
    if dtype == 'bfloat16' and not has_bfloat16 and kind != 'cpu':
        raise ValueError(
            f"dtype='bfloat16': {device} has no bfloat16 in hardware; use --dtype=float16 or "
            "float32"
        )
    return dtype


def _has_bfloat16(device):
    """Whether the device computes in bfloat16 in hardware, as far as we use it."""
    if device.startswith('cuda'):
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device == 'cpu' and cpu_has_bfloat16()


def cpu_has_bfloat16():
    """Whether the CPU multiplies bfloat16 in hardware.

    On x86 that takes AVX-512 BF16 or AMX, on Arm the BF16 extension.
    """
    if platform.machine().lower() in ('x86_64', 'amd64'):
        for name in ('_is_avx512_bf16_supported', '_is_amx_tile_supported'):
            probe = getattr(torch.cpu, name, None)  # private, so it may be missing
            if probe and probe():
                return True
        return False
    try:
        with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as cpuinfo:
            return ' bf16' in cpuinfo.read()
    except OSError:
        return False


def autocast(device, dtype):
    """The context for forward passes: mixed precision, or a null context for float32."""
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(device.split(':')[0], DTYPES[dtype])


def library_versions():
    """{name: version} of Python and the libraries that a checkpoint was made with."""
    return {
        'torch': str(torch.__version__),
        'numpy': np.__version__,
        'python': platform.python_version(),
    }


# ---- speed ---------------------------------------------------------------------------------------


def set_threads(threads):
    """Use `threads` CPU threads (None: torch's default); returns the number in use.

    OMP_NUM_THREADS, if the user has set it, wins. A checkpoint records the number because sums are
    split by thread: the same number of threads gives the same bits.
    """
    if threads and 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


# glibc's mallopt(3)
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


def tune_for_speed():
    """Enable TF32 on GPUs that have it, and large pages and memory reuse on CPUs.

    Large pages need this call before the first tensor; they make a step 3 to 5 % faster. Keeping
    freed memory in the process saves 10 %, the cost of returning it to the system and faulting it
    in again.
    """
    os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')
    torch.set_float32_matmul_precision('high')

    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        # Allocate large blocks on the heap too, which then never shrinks. Some versions of glibc
        # refuse thresholds above 32 MiB.
        if not libc.mallopt(M_MMAP_THRESHOLD, 2**30):
            libc.mallopt(M_MMAP_THRESHOLD, 2**25)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def to_device(device, *arrays):
    """NumPy arrays as a list of tensors on the device; copies to a GPU are asynchronous."""
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    if device.startswith('cuda'):
        return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    return [tensor.to(device) for tensor in tensors]


def synchronize(device):
    """Wait until the device has finished its queued work, so that it can be timed."""
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)
    elif device == 'mps':
        torch.mps.synchronize()


# ---- memory --------------------------------------------------------------------------------------


def peak_memory(device):
    """Peak memory in bytes: of tensors on the GPU, or of the process on a CPU; 0 if unknown."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated(device)
    if device == 'mps':
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else 1024 * peak  # Linux counts in KiB


@contextlib.contextmanager
def memory_errors(advice):
    """Out of memory, on any device, ends the script with one line that ends in `advice`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error).lower()
        if (
            isinstance(error, (torch.OutOfMemoryError, MemoryError))
            or 'out of memory' in text
            or 'allocate memory' in text
        ):
            fail(f"out of memory: {advice}")
        raise


# ---- random numbers ------------------------------------------------------------------------------


def seed_everything(*key, device):
    """Make torch's random numbers, on the CPU and on `device`, a function of `key` alone.

    key: non-negative integers, of which the last is not 0.
    """
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    seed = int(state >> np.uint64(1))  # torch's seeds are signed
    torch.default_generator.manual_seed(seed)  # ten times as fast as torch.manual_seed
    if device.startswith('cuda'):
        torch.cuda.manual_seed_all(seed)
    elif device == 'mps':
        torch.mps.manual_seed(seed)


def use_deterministic_algorithms(flag):
    """If `flag`, make repeated runs bit-identical on CUDA too, at some cost in speed.

    Must be called before anything runs on the GPU.
    """
    if flag:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)


# ---- peak speed ----------------------------------------------------------------------------------

# Dense TFLOP/s from the vendors' data sheets: 16-bit formats with 32-bit accumulation, and float32
# as TF32 where the chip has it.
GPU_PEAKS = {  # part of the name: (16-bit, float32)
    'B200': (2250, 1125),
    'GB200': (2500, 1250),
    'H200 NVL': (835, 417),
    'H200': (989, 494),
    'GH200': (989, 494),
    'H100 PCIe': (756, 378),
    'H100 NVL': (835, 417),
    'H100': (989, 494),
    'A100': (312, 156),
    'A30': (165, 82),
    'A40': (149.7, 74.8),
    'A10G': (70, 35),
    'A10': (125, 62.5),
    'L40S': (362, 183),
    'L40': (181, 90.5),
    'L4': (121, 60),
    'RTX 6000 Ada': (364, 182),
    'RTX A6000': (154.8, 77.4),
    'RTX 5090': (209.5, 104.8),
    'RTX 4090': (165.2, 82.6),
    'RTX 3090': (71, 35.6),
    'V100': (125, 15.7),
    'T4': (65, 8.1),
}


def gpu_peak_flops(name, dtype):
    """Peak FLOP/s of the GPU called `name` in `dtype`, or None if it is not in the table."""
    words = name.replace('-', ' ').split()
    # Variants of a listed name that are slower or faster than it.
    if {'Laptop', 'Ti', 'SUPER', 'D', 'MIG'} & set(words):
        return None
    for known, (half, single) in GPU_PEAKS.items():
        # The words of the listed name, next to each other: 'A10' is not in 'NVIDIA A100'.
        if f" {known} " in f" {' '.join(words)} ":
            return (single if dtype == 'float32' else half) * 1e12
    return None


def peak_flops(device, dtype):
    """Peak FLOP/s of a GPU from the table, to compute MFU; None for other devices."""
    if not device.startswith('cuda'):
        return None
    return gpu_peak_flops(torch.cuda.get_device_name(device), dtype)


def measured_peak_flops(dtype, size=2048, seconds=1.0):
    """FLOP/s of the CPU in a matrix product: the best of repetitions during `seconds`.

    The product is of two size x size matrices in `dtype`.
    """
    a = torch.randn(size, size).to(DTYPES[dtype])
    best = float('inf')
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


# ---- profiling -----------------------------------------------------------------------------------


def make_profiler(folder, device):
    """A profiler whose step() is to be called after each step; without a folder it does nothing.

    It skips 5 steps, warms up for 5, and writes a trace of the next 5 to `folder`.
    """
    if not folder:
        return SimpleNamespace(step=lambda: None)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.startswith('cuda'):
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(
        activities=activities,
        record_shapes=True,
        schedule=torch.profiler.schedule(wait=5, warmup=5, active=5, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(folder),
    )
