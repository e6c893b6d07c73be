"""Constructing a model, unless it does not fit into this machine's memory."""

import contextlib
import dataclasses
import math
import os
import re
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

MOST_PLACES = 10**8
# the deepest network that learned anything: Xiao et al. 2018, arXiv 1806.05393
MOST_LAYERS = 10_000


def construct(Model, config, most=None):
    """Model(config), unless it takes more bytes than there are in this machine, or its weights more
    than `most`.

    most: given for a model whose weights are loaded afterwards, so they get no random values: a
    billion would take a minute. Raises ValueError before anything is built: a system that promises
    more memory than it has would kill the process without a word.
    """
    n, memory = getattr(config, 'n_layer', 1), memory_bytes()
    if n > MOST_LAYERS:
        raise ValueError(f"n_layer={n}: take at most {MOST_LAYERS}")
    try:
        one, two = (
            _bytes(Model, dataclasses.replace(config, **{'n_layer': k} if n > 2 else {}))
            for k in (1, 2)
        )
        weights, tables = (a + (n - 1) * (b - a) for a, b in zip(one, two))
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
        is_beyond = re.search('[Oo]verflow|Memory|allocate memory', f'{type(error)} {error}')
        weights = math.inf if is_beyond else 0  # else a model that can't be made without values
        tables = 0
    size = weights + tables
    if size > memory and torch.get_default_device().type != 'meta':
        raise ValueError(
            f"a {Model.__name__} of these sizes has {size / 1e9:,.1f} GB of weights, and this machine has "
            f"{memory / 1e9:,.1f} GB of memory: take a smaller model"
        )
    if most and weights > most:
        raise ValueError(
            f"these weights are no {Model.__name__}'s of such sizes, which has {weights / 1e6:,.1f} MB of "
            "them"
        )
    with _Uninitialized() if most else contextlib.nullcontext():
        return Model(config)


def _bytes(Model, config):
    """The bytes of a model's weights, and of tables that it computes, such as angles of positions;
    without making them."""
    with _NoValues():
        model = Model(config)
    stored = model.state_dict().keys()
    weights = sum(p.nbytes for p in model.parameters())
    weights += sum(buffer.nbytes for name, buffer in model.named_buffers() if name in stored)
    tables = sum(buffer.nbytes for name, buffer in model.named_buffers() if name not in stored)
    return weights, tables


class _NoValues(TorchFunctionMode):
    """Tensors without memory, and no random numbers. torch.device('meta') means all functions, and
    some of those take seconds to import there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs['device'] = 'meta'
        # of a table, which is made for all of them
        elif func is torch.arange and max(args, default=0) > MOST_PLACES:
            raise MemoryError
        elif func.__name__ == 'normal_':  # a tensor's, and torch.nn.init's
            return kwargs['tensor'] if 'tensor' in kwargs else args[0]
        return func(*args, **kwargs)


class _Uninitialized(TorchFunctionMode):
    """Parameters keep what was in their memory before."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # a tensor's, and torch.nn.init's
        if func.__name__ in ('normal_', 'uniform_', 'kaiming_uniform_'):
            return kwargs['tensor'] if 'tensor' in kwargs else args[0]
        return func(*args, **kwargs)


def memory_bytes():
    """The bytes of memory that this process may have, as far as the system says."""
    most = 1 << 62
    with contextlib.suppress(OSError, ValueError, AttributeError):  # Windows; no limit: 'max'
        most = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
        most = min(most, int(Path('/sys/fs/cgroup/memory.max').read_text(encoding='utf-8')))
    return most
