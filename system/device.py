"""The machine: device, number format, compilation, randomness, peak speed; and settings that cannot
be."""

import contextlib
import ctypes
import math
import os
import platform
import select
import signal
import socket
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import numpy as np
import torch

from system.errors import fail, user_errors  # noqa: F401 (scripts have both from here)

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


# ---- mistakes ------------------------------------------------------------------------------------


def check_at_least(least, config, keys):
    """Fail where one of the settings `keys` (names in one string) is below `least`."""
    for key in keys.split():
        if config[key] < least:
            fail(f"{key}={config[key]} must be at least {least}")


def check_at_most(most, config, keys):
    """Fail where one of the settings `keys` (names in one string) is above `most`."""
    for key in keys.split():
        if config[key] > most:
            fail(f"{key}={config[key]} must be at most {most}")


def check_between(least, most, config, keys):
    """Fail where one of the settings `keys` (names in one string) is below `least` or above
    `most`."""
    check_at_least(least, config, keys)
    check_at_most(most, config, keys)


def check_ranges(config, processes):
    """Fail where one of train.py's settings is out of its range."""
    check_at_least(
        1, config, 'batch_size block_size gradient_accumulation_steps eval_iters log_interval'
    )
    check_at_least(
        0,
        config,
        'seed eval_interval save_minutes early_stop learning_rate max_iters weight_decay grad_clip '
        'warmup_iters lr_decay_iters min_lr muon_lr embed_lr head_lr cooldown max_norm warmup_lr '
        'lora_rank spike_sigmas',
    )
    check_at_most(1, config, 'cooldown')
    check_at_most(
        1e30,
        config,
        'learning_rate min_lr muon_lr embed_lr head_lr warmup_lr weight_decay max_norm',
    )
    if config['gradient_accumulation_steps'] % processes:
        fail(
            f"gradient_accumulation_steps={config['gradient_accumulation_steps']} is not a multiple of {processes} "
            "processes"
        )
    if config['parallel'] == 'fsdp' and config['watch']:
        fail("watch=True looks at whole weights: leave it out with parallel='fsdp'")


def memory_advice(batch_size, gradient_accumulation_steps):
    """What to do when training runs out of memory."""
    if batch_size == 1:
        return "take --gradient_checkpointing=True, or a smaller --block_size"
    return (
        f"halve --batch_size={batch_size} and double --gradient_accumulation_steps={gradient_accumulation_steps}: the "
        "result stays the same"
    )


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


GRACE = 240  # seconds that a save has after a signal; batch systems are asked for 300
STOP_SIGNALS = [
    getattr(signal, name)
    for name in ('SIGINT', 'SIGTERM', 'SIGUSR1', 'SIGBREAK')
    if hasattr(signal, name)
]


class StopRequest:
    """SIGINT (Ctrl-C), SIGTERM or SIGUSR1, received, so that a loop can stop where nothing is lost;
    `signal` is its number.

    A second one ends at once, and so does a save that hangs, after GRACE seconds. What comes within
    two seconds is the same one: torchrun and batch systems tell each process, and each other. A
    thread listens, too, since Python calls handlers only between two instructions of the main
    thread, and that may be waiting for another process.
    """

    def __init__(self):
        self.signal = None
        self._ears = socket.socketpair()
        self._ears[1].setblocking(False)
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)
        signal.set_wakeup_fd(self._ears[1].fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, daemon=True).start()

    def release(self):
        """Once nothing is left to save: SIGINT and SIGTERM end the process, as by default, and
        SIGUSR1 does nothing."""
        signal.set_wakeup_fd(-1)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, number, frame):
        self.signal = self.signal or number

    def _listen(self):
        since = math.inf
        while True:
            left = None if since == math.inf else max(0.0, since + GRACE - time.monotonic())
            if not select.select(self._ears[:1], [], [], left)[0]:
                self._tell(f"error: not saved within {GRACE} s of the signal: ending without\n")
                os._exit(128 + self.signal)
            for number in self._ears[0].recv(64):
                if number in STOP_SIGNALS and since == math.inf:
                    self.signal, since = self.signal or number, time.monotonic()
                    self._tell(
                        f"{signal.Signals(number).name}: saving after this step; once more ends without saving\n"
                    )
                elif number in STOP_SIGNALS and time.monotonic() - since > 2:
                    os._exit(128 + number)

    def _tell(self, text):
        with contextlib.suppress(OSError):  # nobody may be there to read it
            os.write(2, text.encode())

    @property
    def exit_code(self):
        """128 + the signal's number; 0 under torchrun, which would take anything else for a fault
        to recover from."""
        return 0 if 'TORCHELASTIC_RUN_ID' in os.environ else 128 + (self.signal or signal.SIGTERM)


# ---- device and number format --------------------------------------------------------------------


def resolve_device(device, recorded=None):
    """'auto' | 'cpu' | 'cuda[:N]' | 'mps' -> a device that is there. Raises ValueError where it
    isn't.

    'auto' is the fastest device; where a run is resumed, the one that it used before (`recorded`),
    if this machine has it. No other device than the one named is asked about: a run on the CPU must
    work where a GPU is full or reserved.
    """
    if device == 'auto' and recorded:
        try:
            return resolve_device(recorded)
        except ValueError:
            fastest = _fastest_device()
            if os.environ.get('RANK', '0') == '0':
                print(
                    f"the run used device={recorded!r}, which can't be used here: "
                    f"it goes on with device={fastest!r}",
                    flush=True,
                )
            return fastest
    if device == 'auto':
        return _fastest_device()
    kind, _, index = str(device).partition(':')
    if kind not in ('cpu', 'cuda', 'mps') or (index and not (kind == 'cuda' and index.isdigit())):
        raise ValueError(
            f"device={device!r} is unknown: take auto, cpu, cuda, cuda:0, cuda:1, … or mps"
        )
    if kind == 'cpu':
        return 'cpu'
    backend = torch.cuda if kind == 'cuda' else torch.backends.mps
    if not backend.is_available():
        raise ValueError(
            f"device={device!r} is not available here: take --device=auto, or install a torch built for it"
        )
    if kind == 'cuda' and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device={device!r}: this machine has {torch.cuda.device_count()} GPU(s), counted from cuda:0"
        )
    if kind == 'cuda' and (missing := _missing_kernels(device)):
        raise ValueError(f"{missing}; install an older torch or take --device=cpu")
    return str(device)


def _fastest_device():
    """cuda, mps or cpu: the first of them that this machine and the installed torch have."""
    if torch.cuda.is_available():
        missing = _missing_kernels('cuda')
        if not missing:
            return 'cuda'
        print(f"{missing}; using the CPU", file=sys.stderr)
    return 'mps' if torch.backends.mps.is_available() else 'cpu'


def _missing_kernels(device):
    """Why the installed torch has no kernels for this GPU, or ''."""
    if torch.version.hip:  # AMD's names follow another scheme
        return ''
    major, minor = torch.cuda.get_device_capability(device)
    built = [arch.split('_')[1].rstrip('af') for arch in torch.cuda.get_arch_list()]
    if not built or any(int(b[:-1]) == major and int(b[-1]) <= minor for b in built):
        return ''
    newest_ptx = [a for a in torch.cuda.get_arch_list() if a.startswith('compute_')]
    if newest_ptx and all(int(b[:-1]) <= major for b in built):
        return ''
    return f"this torch has no kernels for {torch.cuda.get_device_name(device)} (capability {major}.{minor})"


def resolve_dtype(dtype, device):
    """'auto' | 'float32' | 'bfloat16' | 'float16' -> the format to compute in. Raises ValueError
    where the device can't.

    auto is bfloat16 where the chip has it in hardware; on CUDA otherwise float16; elsewhere
    float32.
    """
    kind = device.split(':')[0]
    has_bf16 = {
        'cuda': kind == 'cuda' and torch.cuda.get_device_capability(device)[0] >= 8,
        'mps': False,
        'cpu': cpu_has_bfloat16(),
    }[kind]
    if dtype == 'auto':
        return 'bfloat16' if has_bf16 else 'float16' if kind == 'cuda' else 'float32'
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown: take auto, float32, bfloat16 or float16")
    # a CPU without it computes right, only slowly
    if dtype == 'bfloat16' and not has_bf16 and kind != 'cpu':
        raise ValueError(
            f"dtype='bfloat16': {device} has no bfloat16 in hardware; take --dtype=float16 or float32"
        )
    return dtype


def cpu_has_bfloat16():
    """Whether the CPU multiplies bfloat16 in hardware (x86: AVX-512 BF16 or AMX; Arm: the BF16
    extension)."""
    if platform.machine().lower() in ('x86_64', 'amd64'):
        probes = (
            getattr(torch.cpu, name, None)
            for name in ('_is_avx512_bf16_supported', '_is_amx_tile_supported')
        )
        return any(probe() for probe in probes if probe)
    try:
        with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as cpuinfo:
            return ' bf16' in cpuinfo.read()
    except OSError:
        return False


def autocast(device, dtype):
    """The context in which forward passes run: mixed precision, or nothing for float32."""
    if dtype == 'float32':
        return contextlib.nullcontext()
    return torch.autocast(device.split(':')[0], DTYPES[dtype])


def versions():
    """What a checkpoint was made with."""
    return {
        'torch': str(torch.__version__),
        'numpy': np.__version__,
        'python': platform.python_version(),
    }


def set_threads(threads):
    """Use `threads` CPU threads, unless the user's OMP_NUM_THREADS says otherwise; returns the
    number in use.

    Sums are split by thread: the same number gives the same bits.
    """
    if threads and 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def be_fast():
    """TF32 where the chip has it. On a CPU large pages, if this comes before the first tensor (a
    step takes 3 to 5 % less); and ask glibc to keep freed memory for the next step: handing it back
    and faulting it in again costs 10 %."""
    os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')
    torch.set_float32_matmul_precision('high')
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        # M_MMAP_THRESHOLD: take large blocks from the heap too
        libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: which never shrinks


def to_device(device, *arrays):
    """NumPy arrays as tensors on the device; towards a GPU the copy does not wait."""
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    if device.startswith('cuda'):
        return [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
    return [tensor.to(device) for tensor in tensors]


def synchronize(device):
    """Wait until the device has done what was asked of it, so that a clock tells the truth."""
    if device.startswith('cuda'):
        torch.cuda.synchronize(device)
    elif device == 'mps':
        torch.mps.synchronize()


def peak_memory(device):
    """The most bytes that tensors took on the GPU, or that the process took on a CPU; 0 where
    nobody counts."""
    if device.startswith('cuda'):
        return torch.cuda.max_memory_allocated(device)
    if device == 'mps':
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == 'darwin' else 1024
    )


# ---- randomness ----------------------------------------------------------------------------------


def seed_everything(*key, device):
    """Make torch's random numbers, on the CPU and on `device`, a function of `key` alone.

    key: non-negative integers, the last not 0.
    """
    number = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    torch.default_generator.manual_seed(number)  # torch.manual_seed takes ten times as long
    if device.startswith('cuda'):
        torch.cuda.manual_seed_all(number)
    elif device == 'mps':
        torch.mps.manual_seed(number)


def be_deterministic(flag):
    """If wished, bit-identical repeats on CUDA too, at some cost in speed; call before anything
    runs on the GPU."""
    if flag:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
        torch.use_deterministic_algorithms(True)


# ---- compilation ---------------------------------------------------------------------------------

# From how many seconds of eager training on it pays to compile. It takes about 50 s on two CPU
# cores and saves a sixth of a step there; the figure for GPUs is a guess, not measured.
COMPILE_PAYS = {'cuda': 120, 'cpu': 300}


def resolve_compile(wish, device):
    """True | False | 'auto' -> whether to compile. auto stays 'auto', for compile_model, where it
    may pay."""
    if str(wish) not in ('True', 'False', 'auto'):
        raise ValueError(f"compile={wish!r} is unknown: take True, False or auto")
    if wish != 'auto':
        return wish
    can = device == 'cpu' or (
        device.startswith('cuda') and torch.cuda.get_device_capability(device)[0] >= 7
    )
    return 'auto' if can else False


def compile_model(model, try_step, wish, insist, device, steps, processes):
    """Compile `model` in place (state-dict names stay clean) and prove it on `try_step()`; returns
    whether it is.

    wish: True, or 'auto': only where `steps` more of these would take so long uncompiled that it
    pays; processes: the module parallel, which makes their answers one and knows the parts. Where
    it can't be done (no C compiler, an old GPU): ValueError if `insist`, else one line, and the
    model stays as it was. Gradients and buffers that the trial changed are put back.
    """
    parts = processes.compiled(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    if wish != 'auto' or processes.anyone(
        steps > 0 and _seconds_of(try_step, device) * steps > COMPILE_PAYS[device.split(':')[0]]
    ):
        try:
            if os.environ.get('RANK', '0') == '0':
                print("compiling, which takes a minute", flush=True)
            for part in parts:
                part.compile()
            with warnings.catch_warnings():
                # the traceback of a step that Ctrl-C ends
                warnings.filterwarnings('ignore', 'Error detected in')
                try_step()
        except Exception as error:  # the compiler's ways to fail are many and undocumented
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = f"torch.compile does not work here ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
            if insist:
                raise ValueError(f"{reason}; take --compile=False") from None
            print(f"{reason}; going on without it", file=sys.stderr)
            for part in parts:
                part._compiled_call_impl = None
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    model.zero_grad(set_to_none=True)
    if device.startswith('cuda'):
        torch.cuda.reset_peak_memory_stats(device)
    return parts[0]._compiled_call_impl is not None


def _seconds_of(try_step, device):
    """How long `try_step()` takes, once it has been done before; for ever if it does not fit:
    compiled, it may."""
    try:
        try_step()
        synchronize(device)
        start = time.perf_counter()
        try_step()
        synchronize(device)
        return time.perf_counter() - start
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return math.inf


def profiler(folder, device):
    """A profiler that skips 5 steps, warms up for 5, and writes the next 5 as a trace into
    `folder`; call its step(). Without a folder it does nothing."""
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


# ---- peak speed ----------------------------------------------------------------------------------

# Dense TFLOP/s by the makers' data sheets: 16-bit formats with 32-bit sums, and float32 as TF32
# where the chip has it.
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
    """Peak FLOP/s of the GPU called `name` in `dtype`, or None for one that the table does not
    know."""
    words = name.replace('-', ' ').split()
    # slower or faster relatives of the same name
    if {'Laptop', 'Ti', 'SUPER', 'D', 'MIG'} & set(words):
        return None
    for known, (half, single) in GPU_PEAKS.items():
        parts = known.split()
        if any(words[i : i + len(parts)] == parts for i in range(len(words))):
            return (single if dtype == 'float32' else half) * 1e12
    return None


def peak_flops(device, dtype):
    """Peak FLOP/s of a device for MFU, or None where it is not known (also a T4 or V100 asked for
    bfloat16)."""
    if not device.startswith('cuda'):
        return None
    return gpu_peak_flops(torch.cuda.get_device_name(device), dtype)


def measured_peak_flops(dtype, size=2048, seconds=1.0):
    """FLOP/s that a CPU reaches in one large square matrix product in `dtype`: the best of repeats
    within `seconds`."""
    a = torch.randn(size, size).to(DTYPES[dtype])
    best, end = float('inf'), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
