"""torch.compile: whether it pays on this machine, and trying it so that a failure costs nothing."""

import math
import os
import sys
import time
import warnings

import torch

from system.device import synchronize

# The seconds of eager training above which compiling pays. On two CPU cores it takes about 50 s and
# makes a step a sixth faster. The figure for GPUs is an estimate, not measured.
COMPILE_PAYS = {'cuda': 120, 'cpu': 300}


def resolve_compile(mode, device):
    """True | False | 'auto' -> True, False, or 'auto' where compiling may pay, or ValueError.

    compile_model decides on 'auto' once it has timed a step.
    """
    if str(mode) not in ('True', 'False', 'auto'):
        raise ValueError(f"compile={mode!r} is unknown: use True, False or auto")
    if mode != 'auto' or device == 'cpu':
        return mode
    if device.startswith('cuda') and torch.cuda.get_device_capability(device)[0] >= 7:
        return mode
    return False


def compile_model(model, parts, *, mode, is_required, try_step, steps, device, any_rank):
    """Compile `parts` of `model` in place and test them on a step; returns whether it succeeded.

    mode: True, or 'auto', which compiles only if training for `steps` more calls of try_step()
    would take long enough uncompiled that it pays. try_step() runs one micro-batch forward and
    backward; the gradients and buffers that it changes are restored. any_rank(flag): whether the
    flag is true in any process, so that all of them decide alike.

    Where compilation fails (no C compiler, an old GPU), the model stays as it was and one line on
    stderr says why; if is_required, that line is a ValueError. Names in the state dict never
    change.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    is_compiled = False
    if mode != 'auto' or any_rank(_pays(try_step, steps, device)):
        is_compiled = _try_compile(parts, try_step, is_required)

    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    model.zero_grad(set_to_none=True)
    if device.startswith('cuda'):
        torch.cuda.reset_peak_memory_stats(device)
    return is_compiled


def _pays(try_step, steps, device):
    """Whether `steps` uncompiled steps take so long that compiling saves time."""
    if steps <= 0:
        return False
    return _seconds_of(try_step, device) * steps > COMPILE_PAYS[device.split(':')[0]]


def _seconds_of(try_step, device):
    """The seconds that `try_step()` takes after a first call to warm up.

    Infinity if it does not fit into memory: compiled, it may.
    """
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


def _try_compile(parts, try_step, is_required):
    """Compile the parts and run try_step(), which triggers it; returns whether that worked."""
    if os.environ.get('RANK', '0') == '0':
        print("compiling, which takes a minute", flush=True)
    try:
        for part in parts:
            part.compile()
        with warnings.catch_warnings():
            # Autograd would print the traceback of the forward pass if Ctrl-C ends the step.
            warnings.filterwarnings('ignore', 'Error detected in')
            try_step()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many undocumented ways
        text = ' '.join(str(error).split())[:120]
        reason = f"torch.compile does not work here ({type(error).__name__}: {text})"
        if is_required:
            raise ValueError(f"{reason}; set --compile=False") from None
        print(f"{reason}; continuing without it", file=sys.stderr)
        for part in parts:
            part._compiled_call_impl = None  # undoes compile()
        return False
    return True
