"""Processes: who this one is among them, and what they do together. One process is the case of one."""
import contextlib
import gc
import os

import torch
import torch.distributed as dist

RANK, WORLD_SIZE = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
LOCAL_RANK = int(os.environ.get('LOCAL_RANK', 0))
LOCAL_WORLD_SIZE = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
IS_MASTER = RANK == 0


def start(backend, device):
    """Join the other processes that torchrun started; returns this one's device. Raises ValueError.

    backend: 'nccl', 'gloo', or 'auto', which is nccl on CUDA and gloo elsewhere.
    """
    if backend not in ('auto', 'nccl', 'gloo'):
        raise ValueError(f"backend={backend!r} is unknown: take auto, nccl or gloo")
    if WORLD_SIZE == 1 and 'RANK' not in os.environ:
        return device
    kind = device.split(':')[0]
    if kind == 'mps':
        raise ValueError("several processes cannot share an MPS device: leave torchrun out, or take --device=cpu")
    if kind == 'cuda':
        if LOCAL_RANK >= torch.cuda.device_count():
            raise ValueError(f"{LOCAL_WORLD_SIZE} processes on {torch.cuda.device_count()} GPU(s): one each is the most")
        device = f'cuda:{LOCAL_RANK}'
        torch.cuda.set_device(device)
    elif os.environ.get('OMP_NUM_THREADS') == '1':      # torchrun's default, which leaves cores idle
        del os.environ['OMP_NUM_THREADS']
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // LOCAL_WORLD_SIZE))
    use_nccl = kind == 'cuda' and backend != 'gloo'
    dist.init_process_group('cpu:gloo,cuda:nccl' if use_nccl else 'gloo')   # numbers always travel by gloo, see total
    return device


def wrap(model, device):
    """The module to train through: `model` itself, or DDP around it, which averages gradients over processes."""
    if not dist.is_initialized() or not any(p.requires_grad for p in model.parameters()):
        return model
    return torch.nn.parallel.DistributedDataParallel(model, device_ids=[device] if device.startswith('cuda') else None)


def share(n):
    """The part of range(n) that is this process's; n is a multiple of WORLD_SIZE."""
    return range(n)[RANK * n // WORLD_SIZE:(RANK + 1) * n // WORLD_SIZE]


def exchange_gradients(model, flag):
    """Whether DDP's next backward pass exchanges gradients: only the last one of a step needs to."""
    if isinstance(model, torch.nn.parallel.DistributedDataParallel):
        model.require_backward_grad_sync = flag


def total(values):
    """The sum over all processes of a list of numbers, as a list of floats. On CPUs, so that no GPU waits for it."""
    values = torch.as_tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(values)
    return values.tolist()


def anyone(flag):
    """Whether `flag` is true on any process: what all of them must decide alike."""
    return total([float(flag)])[0] > 0 if dist.is_initialized() else flag


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
