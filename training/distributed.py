"""Processes: who this one is among them, and what they do together. One process is the case of
one."""

import contextlib
import datetime
import gc
import os
import sys

import torch
import torch.distributed as dist

from system import errors

RANK, WORLD_SIZE = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
LOCAL_RANK = int(os.environ.get('LOCAL_RANK', 0))
LOCAL_WORLD_SIZE = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
IS_MASTER = RANK == 0
IS_LAUNCHED = 'RANK' in os.environ  # by torchrun
# seconds that one may wait for another: a killed process is seen at once, a cut cable is not
TIMEOUT = 600


def start(backend, device, kind='ddp'):
    """Join the other processes that torchrun started; returns this one's device. Raises ValueError.

    backend: 'nccl', 'gloo', or 'auto', which is nccl on CUDA and gloo elsewhere. kind: 'ddp', where
    each has the whole model, or 'fsdp', where each has a part of it.
    """
    if backend not in ('auto', 'nccl', 'gloo'):
        raise ValueError(f"backend={backend!r} is unknown: take auto, nccl or gloo")
    if kind not in ('ddp', 'fsdp'):
        raise ValueError(f"parallel={kind!r} is unknown: take ddp or fsdp")
    if not IS_LAUNCHED:
        if ':' in device:  # cuda:1, say: events and streams belong to the current device
            torch.cuda.set_device(device)
        return device
    type_ = device.split(':')[0]
    if type_ == 'mps':
        raise ValueError(
            "several processes cannot share an MPS device: leave torchrun out, or take --device=cpu"
        )
    if type_ == 'cuda':
        if LOCAL_RANK >= torch.cuda.device_count():
            raise ValueError(
                f"{LOCAL_WORLD_SIZE} processes on {torch.cuda.device_count()} GPU(s): one each is the most"
            )
        device = f'cuda:{LOCAL_RANK}'
        torch.cuda.set_device(device)
    # torchrun's default leaves cores idle
    elif os.environ.get('OMP_NUM_THREADS') == '1' and LOCAL_WORLD_SIZE > 1:
        del os.environ['OMP_NUM_THREADS']
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // LOCAL_WORLD_SIZE))
    use_nccl, limit = type_ == 'cuda' and backend != 'gloo', datetime.timedelta(seconds=TIMEOUT)
    store, *_ = next(dist.rendezvous('env://', RANK, WORLD_SIZE, timeout=limit))
    # one machine, whose torchrun keeps the store over restarts, and
    if os.environ.get('GROUP_WORLD_SIZE', '1') == '1':
        # in it where the lost processes were; several count restarts differently, and make a new
        # store: cluster/README.md
        store = dist.PrefixStore(
            f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store
        )
    # numbers always travel by gloo, see total
    dist.init_process_group(
        'cpu:gloo,cuda:nccl' if use_nccl else 'gloo',
        store=store,
        rank=RANK,
        world_size=WORLD_SIZE,
        timeout=limit,
    )
    return device


def wrap(model, device, kind='ddp'):
    """Put `model` on the device; returns the module to train through. What `start` joined, `kind`
    shares out.

    That is `model` itself; DDP around it, which averages gradients over processes; or, with 'fsdp',
    `model` in parts.
    """
    if kind == 'fsdp' and IS_LAUNCHED:
        from training import fsdp

        return fsdp.shard(model, device)
    model.to(device)
    if not dist.is_initialized() or not any(p.requires_grad for p in model.parameters()):
        return model
    return torch.nn.parallel.DistributedDataParallel(
        model, device_ids=[device] if device.startswith('cuda') else None
    )


def compiled(model):
    """The parts of a model to compile: all of it, or with FSDP each block, between which parameters
    come and go."""
    blocks = [
        block for part in model.modules() if isinstance(part, torch.nn.ModuleList) for block in part
    ]
    return blocks if blocks and hasattr(model, 'set_requires_gradient_sync') else [model]


def clip_gradients(model, most):
    """Scale the gradients down to the norm `most`, all together; returns the norm they had, the
    same in all processes."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), most)
    return norm.full_tensor() if hasattr(norm, 'full_tensor') else norm


def say(text):
    """Print, once for all processes."""
    if IS_MASTER:
        print(text, flush=True)


def share(n):
    """The part of range(n) that is this process's; n is a multiple of WORLD_SIZE."""
    return range(n)[RANK * n // WORLD_SIZE : (RANK + 1) * n // WORLD_SIZE]


def exchange_gradients(model, flag):
    """Whether the next backward pass exchanges gradients: only the last one of a step needs to."""
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model.require_backward_grad_sync = flag
    elif hasattr(model, 'set_requires_gradient_sync'):  # FSDP's
        model.set_requires_gradient_sync(flag)


def tensors(model, optimizer, out_dir, step):
    """What a checkpoint of `step` keeps of a model and its optimizer (None: of the model alone);
    every process asks.

    With FSDP the master gets the whole model where it is alone; else each process writes its part
    beside the checkpoint.
    """
    if not hasattr(model, 'set_requires_gradient_sync'):
        return dict(model=model.state_dict(), optimizer=optimizer and optimizer.state_dict())
    from training import fsdp

    if optimizer is None:
        return dict(model=fsdp.full(model), optimizer=None)
    return dict(model={}, optimizer=None, shards=fsdp.write(out_dir, step, model, optimizer))


def summed(value):
    """A tensor on the device, summed over all processes there; no CPU waits for it."""
    if WORLD_SIZE > 1:
        dist.all_reduce(value)
    return value


def total(values):
    """The sum over all processes of a list of numbers, as a list of floats. On CPUs, so that no GPU
    waits for it."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(values)
    return values.tolist()


def anyone(*flags):
    """For each flag whether it is true on any process: what all of them must decide alike. A list,
    or a bool for one."""
    found = (
        [count > 0 for count in total([float(flag) for flag in flags])]
        if dist.is_initialized()
        else list(flags)
    )
    return found[0] if len(found) == 1 else found


def check_shared(out_dir, iter_num):
    """Raises ValueError where the processes have found different checkpoints in out_dir, of the
    steps iter_num."""
    if dist.is_initialized():
        steps = [None] * WORLD_SIZE
        dist.all_gather_object(steps, iter_num)
        if len(set(steps)) > 1:
            raise ValueError(
                f"the processes find different checkpoints in out_dir={out_dir!r}, of the steps "
                f"{', '.join(sorted(map(str, set(steps))))}: it has to be a folder that all machines share"
            )


@contextlib.contextmanager
def lost_peers():
    """When another process is gone, this one ends with a line and at once: what it still shares
    with that would wait."""
    try:
        yield
    except Exception as error:
        what = ' '.join(f"{type(error).__name__}: {error}".split())
        if WORLD_SIZE == 1 or not (isinstance(error, dist.DistError) or 'gloo' in what.lower()):
            errors.tell_torchrun(what[:600])
            raise
        print(
            f"error: process {RANK} lost another one, which says why above or below, or was killed "
            f"({what.split('. ')[0][:200]}); unless torchrun starts all of them again, the same command with "
            "--init_from=auto goes on from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


@contextlib.contextmanager
def master_first():
    """The master runs the body, then the others do."""
    if not IS_MASTER and dist.is_initialized():
        total([0])
    yield
    if IS_MASTER and dist.is_initialized():
        total([0])


def stop():
    """Leave the others, once all of them are done; let go of the wrapped model first.

    What still holds the group when the process ends takes its threads down with an abort.
    """
    if dist.is_initialized():
        total([0])
        gc.collect()
        dist.destroy_process_group()
