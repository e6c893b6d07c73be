"""torch.compile: whether it pays here, and doing it so that a failure leaves the model as it was."""

import math
import os
import sys
import time
import warnings

import torch

from system.device import synchronize

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


def compile_model(model, parts, *, try_step, wish, insist, device, steps, any_rank):
    """Compile `parts` of `model` in place (state-dict names stay clean) and prove it on
    `try_step()`; returns whether they are.

    wish: True, or 'auto': only where `steps` more of these would take so long uncompiled that it
    pays. any_rank: tells whether a flag is true in any process, so that all decide alike. Where it
    can't be done (no C compiler, an old GPU): ValueError if `insist`, else one line, and the
    model stays as it was. Gradients and buffers that the trial changed are put back.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    if wish != 'auto' or any_rank(
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
