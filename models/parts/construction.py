"""Constructing a model, after checking that it fits into this machine's memory."""

import contextlib
import dataclasses
import math
import os
import re
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

MAX_LAYERS = 10_000  # as in the deepest network that learned: Xiao et al. 2018, arXiv 1806.05393
MAX_POSITIONS = 10**8  # of a table that is computed for all of them


def construct(Model, config, stored_bytes=None):
    """Model(config), if it fits into memory.

    stored_bytes: for a model whose weights are loaded afterwards, the most that they may be. Then
    they get no random values, which would take a minute for a billion. Raises ValueError before
    anything is allocated: a system that promises more memory than it has would kill the process
    without a message.
    """
    n_layer = getattr(config, 'n_layer', 1)
    if n_layer > MAX_LAYERS:
        raise ValueError(f"n_layer={n_layer} must be at most {MAX_LAYERS}")
    weights, tables = _bytes_of_all_layers(Model, config, n_layer)
    size = weights + tables
    memory = memory_bytes()
    if size > memory and torch.get_default_device().type != 'meta':
        raise ValueError(
            f"a {Model.__name__} of these sizes has {size / 1e9:,.1f} GB of weights, and this "
            f"machine has {memory / 1e9:,.1f} GB of memory: use a smaller model"
        )
    if stored_bytes and weights > stored_bytes:
        raise ValueError(
            f"these weights are not those of a {Model.__name__} of such sizes, which has "
            f"{weights / 1e6:,.1f} MB of them"
        )
    if stored_bytes:
        with _Uninitialized():
            return Model(config)
    return Model(config)


def _bytes_of_all_layers(Model, config, n_layer):
    """Bytes of weights and of computed tables, as in `_bytes`.

    Those of many layers are inferred from models of one and two. Infinite on overflow.
    """
    try:
        # Two models in either case: one whose parameters come from torch.randn draws numbers here
        # too, so that its initial values depend on how often it is made.
        if n_layer > 2:
            weights, tables = _bytes(Model, dataclasses.replace(config, n_layer=1))
            weights_of_two, tables_of_two = _bytes(Model, dataclasses.replace(config, n_layer=2))
        else:
            weights, tables = _bytes(Model, config)
            weights_of_two, tables_of_two = _bytes(Model, config)
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
        if re.search('[Oo]verflow|Memory|allocate memory', f'{type(error)} {error}'):
            return math.inf, 0
        return 0, 0  # a model that can't be constructed without values: not checked
    weights += (n_layer - 1) * (weights_of_two - weights)
    tables += (n_layer - 1) * (tables_of_two - tables)
    return weights, tables


def _bytes(Model, config):
    """Bytes of a model's weights, and of tables that it computes, without allocating them.

    A table is, for example, the rotary angles of all positions.
    """
    with _NoValues():
        model = Model(config)
    stored = model.state_dict().keys()
    weights = sum(p.nbytes for p in model.parameters())
    tables = 0
    for name, buffer in model.named_buffers():
        if name in stored:
            weights += buffer.nbytes
        else:
            tables += buffer.nbytes
    return weights, tables


class _NoValues(TorchFunctionMode):
    """Tensors are made without memory and without random numbers.

    torch.device('meta') would affect all functions, some of which take seconds to import there.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.empty, torch.zeros, torch.ones):
            kwargs['device'] = 'meta'
        elif func is torch.arange and max(args, default=0) > MAX_POSITIONS:
            raise MemoryError
        elif func.__name__ == 'normal_':
            return _filled_tensor(args, kwargs)
        return func(*args, **kwargs)


class _Uninitialized(TorchFunctionMode):
    """Parameters keep the values that their memory happens to hold."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ in ('normal_', 'uniform_', 'kaiming_uniform_'):
            return _filled_tensor(args, kwargs)
        return func(*args, **kwargs)


def _filled_tensor(args, kwargs):
    """The tensor that a call such as tensor.normal_() or nn.init.normal_(tensor) would fill."""
    return kwargs['tensor'] if 'tensor' in kwargs else args[0]


def memory_bytes():
    """The bytes of memory that this process may use, as far as the system says."""
    most = 1 << 62
    with contextlib.suppress(OSError, ValueError, AttributeError):  # Windows; no limit: 'max'
        most = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
        limit = Path('/sys/fs/cgroup/memory.max').read_text(encoding='utf-8')
        most = min(most, int(limit))
    return most
