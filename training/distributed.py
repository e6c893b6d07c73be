"""The processes that torchrun started: which one this is, and what they do together.

Everything here also works in a single process, without torchrun.
"""

import contextlib
import datetime
import gc
import os
import sys

import torch
import torch.distributed as dist

from system import errors
from system.device import memory_errors
from system.errors import user_errors

RANK = int(os.environ.get('RANK', 0))
WORLD_SIZE = int(os.environ.get('WORLD_SIZE', 1))
LOCAL_RANK = int(os.environ.get('LOCAL_RANK', 0))  # among the processes of this machine
LOCAL_WORLD_SIZE = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
IS_MASTER = RANK == 0  # the process that prints and saves
IS_LAUNCHED = 'RANK' in os.environ  # by torchrun
# Seconds that a process waits for another. A killed process is noticed at once, a cut cable is not.
TIMEOUT = 600


# ---- joining and leaving -------------------------------------------------------------------------


def init(backend, device, kind='ddp'):
    """Join the processes that torchrun started; returns the device of this one.

    backend: 'nccl', 'gloo', or 'auto', which is nccl on CUDA and gloo elsewhere. kind: 'ddp', where
    each process has the whole model, or 'fsdp', where each has a part of it. Raises ValueError for
    other values, and where processes and devices don't match.
    """
    if backend not in ('auto', 'nccl', 'gloo'):
        raise ValueError(f"backend={backend!r} is unknown: use auto, nccl or gloo")
    if kind not in ('ddp', 'fsdp'):
        raise ValueError(f"parallel={kind!r} is unknown: use ddp or fsdp")
    if not IS_LAUNCHED:
        if ':' in device:  # as in cuda:1: events and streams belong to the current device
            torch.cuda.set_device(device)
        return device

    device = _local_device(device)
    is_cuda = device.startswith('cuda')
    if is_cuda:
        torch.cuda.set_device(device)
    elif os.environ.get('OMP_NUM_THREADS') == '1' and LOCAL_WORLD_SIZE > 1:
        # That is torchrun's default, which leaves cores idle.
        del os.environ['OMP_NUM_THREADS']
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // LOCAL_WORLD_SIZE))

    timeout = datetime.timedelta(seconds=TIMEOUT)
    # Numbers always travel by gloo, see sum_over_ranks.
    backends = 'cpu:gloo,cuda:nccl' if is_cuda and backend != 'gloo' else 'gloo'
    dist.init_process_group(
        backends, store=_store(timeout), rank=RANK, world_size=WORLD_SIZE, timeout=timeout
    )
    return device


def _local_device(device):
    """The device of this process: its own GPU, or the CPU that all share."""
    kind = device.split(':')[0]
    if kind == 'mps':
        raise ValueError(
            "several processes can't share an MPS device: run without torchrun, or set --device=cpu"
        )
    if kind != 'cuda':
        return device
    if torch.cuda.device_count() <= LOCAL_RANK:
        raise ValueError(
            f"{LOCAL_WORLD_SIZE} processes on {torch.cuda.device_count()} GPU(s): start at most "
            "one process per GPU"
        )
    return f'cuda:{LOCAL_RANK}'


def _store(timeout):
    """torchrun's key-value store, through which the processes find each other.

    On one machine torchrun keeps the store when it restarts the processes, with what the lost ones
    wrote to it: so each attempt has a prefix of its own. Several machines count their restarts
    differently, but make a new store (see cluster/README.md).
    """
    store, *_ = next(dist.rendezvous('env://', RANK, WORLD_SIZE, timeout=timeout))
    if os.environ.get('GROUP_WORLD_SIZE', '1') != '1':
        return store
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def shutdown():
    """Leave the group of processes, once all of them are done.

    Delete the wrapped model first: if anything still holds the group when the process ends, its
    threads end with an abort.
    """
    if dist.is_initialized():
        barrier()
        gc.collect()
        dist.destroy_process_group()


@contextlib.contextmanager
def exit_on_lost_peer():
    """If another process is gone, end this one at once, with one line.

    A regular exit would wait for the lost process in what it shares with it.
    """
    try:
        yield
    except Exception as error:
        text = ' '.join(f"{type(error).__name__}: {error}".split())
        is_lost_peer = isinstance(error, dist.DistError) or 'gloo' in text.lower()
        if WORLD_SIZE == 1 or not is_lost_peer:
            errors.tell_torchrun(text[:600])
            raise
        reason = text.split('. ')[0][:200]
        print(
            f"error: process {RANK} lost contact with another one, which was killed or prints its "
            f"own error ({reason}); unless torchrun restarts all of them, the same command with "
            "--init_from=auto continues from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


# ---- the model -----------------------------------------------------------------------------------


def wrap_model(model, device, kind='ddp'):
    """Put `model` on the device; returns the module to call for training.

    That is `model` itself in a single process, DDP around it, which averages gradients over the
    processes, or with kind='fsdp' `model`, each of whose parameters is spread over them.
    """
    if kind == 'fsdp' and IS_LAUNCHED:
        from training import fsdp

        return fsdp.shard_model(model, device)
    model.to(device)
    is_trainable = any(p.requires_grad for p in model.parameters())
    if not dist.is_initialized() or not is_trainable:
        return model
    device_ids = [device] if device.startswith('cuda') else None
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=device_ids)


def _is_fsdp(model):
    return hasattr(model, 'set_requires_gradient_sync')


def parts_to_compile(model):
    """The modules of `model` to compile one by one: all of it, or with FSDP each of its blocks.

    FSDP gathers and frees parameters between blocks, which is not to be compiled.
    """
    if not _is_fsdp(model):
        return [model]
    blocks = []
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList):
            blocks += module
    return blocks or [model]


def set_gradient_sync(model, flag):
    """Whether the next backward pass exchanges gradients: only the last one of a step needs to."""
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model.require_backward_grad_sync = flag
    elif _is_fsdp(model):
        model.set_requires_gradient_sync(flag)


def clip_gradients(model, max_norm):
    """Scale all gradients together down to max_norm; returns their norm before.

    The norm is that of the whole model, the same in all processes.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if hasattr(norm, 'full_tensor') else norm


def checkpoint_tensors(model, optimizer, out_dir, step):
    """The tensors of a checkpoint at `step`, {'model': …, 'optimizer': …}; all processes call it.

    optimizer: None for a checkpoint of weights. With FSDP the weights alone are gathered on the
    master; with an optimizer, each process writes its part of both to a folder in out_dir, and the
    result has the index of these parts, 'shards', instead of tensors. Raises OSError where that
    fails.
    """
    if not _is_fsdp(model):
        optimizer_state = None if optimizer is None else optimizer.state_dict()
        return dict(model=model.state_dict(), optimizer=optimizer_state)
    from training import fsdp

    if optimizer is None:
        return dict(model=fsdp.full_state_dict(model), optimizer=None)
    index = fsdp.write_shards(out_dir, step, model, optimizer)
    return dict(model={}, optimizer=None, shards=index)


# ---- communication -------------------------------------------------------------------------------


def print0(text):
    """Print in the master process only."""
    if IS_MASTER:
        print(text, flush=True)


def rank_range(n):
    """This process's share of range(n), as a range; n is a multiple of WORLD_SIZE."""
    return range(RANK * n // WORLD_SIZE, (RANK + 1) * n // WORLD_SIZE)


def all_reduce_sum(tensor):
    """Sum a tensor over all processes, in place, on its device; the CPU does not wait for it."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_over_ranks(values):
    """The sums over all processes of a list of numbers, as floats.

    This is done on CPUs, so that the numbers need not wait for the GPU's queued work.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(values)
    return values.tolist()


def any_rank(flag):
    """Whether `flag` is true in any process, for decisions that all of them must make alike."""
    return any_rank_each([flag])[0]


def any_rank_each(flags):
    """For each of several flags, whether it is true in any process; one exchange for all."""
    if not dist.is_initialized():
        return [bool(flag) for flag in flags]
    counts = sum_over_ranks([float(flag) for flag in flags])
    return [count > 0 for count in counts]


def barrier():
    """Wait until all processes have arrived here."""
    if dist.is_initialized():
        sum_over_ranks([0])


@contextlib.contextmanager
def one_line_errors(advice):
    """A user's mistake, a lost process, or too little memory ends the script with one line.

    advice: what to do about the memory.
    """
    with exit_on_lost_peer(), user_errors(), memory_errors(advice):
        yield


@contextlib.contextmanager
def master_first():
    """The master runs the body before the others do."""
    if not IS_MASTER:
        barrier()
    yield
    if IS_MASTER:
        barrier()


def check_same_checkpoint(out_dir, iter_num):
    """Raise ValueError if the processes have found different checkpoints in out_dir.

    iter_num: the step of the one that this process has found.
    """
    if not dist.is_initialized():
        return
    steps = [None] * WORLD_SIZE
    dist.all_gather_object(steps, iter_num)
    if len(set(steps)) > 1:
        steps = ', '.join(sorted(map(str, set(steps))))
        raise ValueError(
            f"the processes find different checkpoints in out_dir={out_dir!r}, at steps {steps}: "
            "all machines must share this folder"
        )
