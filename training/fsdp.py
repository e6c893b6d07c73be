"""Sharded training (train.py --parallel=fsdp): each process keeps a part of every parameter,
gradient and moment, by torch's FSDP2; and the checkpoints of that, to which each process writes its
part, by torch.distributed.checkpoint.

Such a checkpoint is a folder, out_dir/shards-STEP, and its index: plain data that lies in ckpt.pt.
Any number of processes reads what any other number has written, to the bit; `whole` reads it
without a group of processes.
"""

import contextlib
import io
import itertools
import os
import pickle
import re
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from system import files
from training import optimizer as optimizers

FOLDER = re.compile(r'shards-\d+(-\d+)?')
FILE = re.compile(r'__\d+_\d+\.distcp|\.metadata')


# ---- training ------------------------------------------------------------------------------------


def shard(model, device):
    """Share out `model`, which lies on the CPU, among the processes, in place; returns it. Raises
    ValueError.

    Each block (what is in a ModuleList) goes to the device on its own, the rest in the end: no
    device ever holds the whole. In a pass a process has its part of all, and all of a block or two;
    while it accumulates gradients without exchanging them, all of these. The optimizer is built
    after this, and the model is called by all processes or by none.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"parallel='fsdp': {type(model).__name__} has nothing that an optimizer learns: leave it out"
        )
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    marks, module = (
        {name: dict(vars(p)) for name, p in model.named_parameters()},
        type(model).__module__,
    )
    # those inside others first
    for blocks in reversed([m for m in model.modules() if isinstance(m, nn.ModuleList)]):
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # tied weights lie in no block, so they are in one group
    type(model).__module__ = module  # by which models.name_of knows it
    for name, p in model.named_parameters():
        vars(p).update(marks[name])  # n_matrices
    stored = model.state_dict().keys() - marks.keys()

    def share_buffers(*_):  # statistics, say: the master's hold, as under DDP
        for name, buffer in model.named_buffers():
            if name in stored:
                dist.broadcast(buffer, 0)

    model.register_forward_pre_hook(share_buffers)
    return model


def full(model):
    """The state_dict with whole tensors, on the CPU: on the master, {} on the others. To be called
    by all."""
    whole, first = {}, _first_names(model)
    for name, value in model.state_dict().items():
        value = value.full_tensor() if isinstance(value, DTensor) else value
        if dist.get_rank() == 0:
            whole[name] = whole[first[name]] if first[name] in whole else value.cpu()
    return whole


def _first_names(model):
    """{name in the state_dict: the first name that this tensor, tied perhaps, has there}."""
    names = {}
    return {
        name: names.setdefault(id(value), name)
        for name, value in model.state_dict(keep_vars=True).items()
    }


# ---- writing -------------------------------------------------------------------------------------


def write(out_dir, step, model, optimizer):
    """Write what a resumed run needs of both to out_dir/shards-STEP, whole or not at all; returns
    the index of it.

    What is there already stays: the folder is shards-STEP-2 then. To be called by all processes, on
    a disk that they share. Raises OSError in all of them where one can't write.
    """
    folder, rank, state = Path(out_dir), dist.get_rank(), optimizer.state_dict()
    (name,) = filter(None, _each(lambda: rank == 0 and _free_name(folder, step)))
    fresh, tensors = folder / f'.{name}.new', _flat(model.state_dict(), state['state'])
    index = dict(
        folder=name,
        model=_first_names(model),
        optimizer=dict(
            state={i: list(values) for i, values in state['state'].items()},
            param_groups=state['param_groups'],
        ),
    )
    try:
        _each(lambda: rank == 0 and (shutil.rmtree(fresh, ignore_errors=True), fresh.mkdir()))
        with _errors(OSError, f"cannot write {fresh}"):
            dcp.save(
                {key: tensors[key] for key in _names(index)},
                storage_writer=_Writer(fresh, per_thread_copy_ahead=0),
                planner=DefaultSavePlanner(
                    flatten_state_dict=False, dedup_save_to_lowest_rank=True
                ),
            )
        mine = [*fresh.glob(f'__{rank}_*'), *([fresh / '.metadata'] if rank == 0 else [])]
        sums = _each(lambda: {path.name: files.sha256(path) for path in mine})
        index['files'] = {file: digest for part in sums for file, digest in part.items()}
        _each(lambda: rank == 0 and _publish(fresh, folder / name, index['files']))
    except OSError:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return index


def tidy(out_dir, keep):
    """Remove the folders of checkpoints in out_dir that are not in `keep`, and what interrupted
    writes have left."""
    for path in Path(out_dir).glob('*shards-*'):
        if (
            FOLDER.fullmatch(path.name.removeprefix('.').removesuffix('.new'))
            and path.name not in keep
        ):
            shutil.rmtree(path, ignore_errors=True)


def _free_name(folder, step):
    names = (f'shards-{step}' + f'-{n}' * (n > 1) for n in itertools.count(1))
    return next(name for name in names if not (folder / name).exists())


def _publish(fresh, path, written):
    """The step at which a checkpoint is there, after which it can't be lost."""
    if missing := [name for name in written if not (fresh / name).exists()]:
        raise OSError(
            f"{fresh} has no {missing[0]}, which another process wrote: out_dir has to be on a disk that all "
            "machines share"
        )
    files.sync_folder(fresh)
    os.replace(fresh, path)
    files.sync_folder(path.parent)


# ---- reading -------------------------------------------------------------------------------------


def load(state, model, optimizer):
    """Put a checkpoint's weights and moments into a sharded model and its optimizer; every process
    calls it.

    state: with the tensors, or with the index of parts that were verified, and with `out_dir`,
    where they are. Raises ValueError, in all processes, where they are of another model or
    optimizer.
    """
    params = [p for group in optimizer.param_groups for p in group['params']]
    if 'shards' in state:
        index = state['shards']
        reader = _Reader(index['out_dir'], index)
        if _first_names(model) != index['model'] or index['optimizer']['state'].keys() - set(
            range(len(params))
        ):
            raise ValueError(
                f"{reader.path} holds another model's weights, or another optimizer's state"
            )
        sizes = {
            i: {key: reader.known[f'optimizer.{i}.{key}'].size for key in keys}
            for i, keys in index['optimizer']['state'].items()
        }
        moments = {
            i: {
                key: torch.empty_like(params[i]) if size == params[i].shape else torch.zeros(size)
                for key, size in own.items()
            }
            for i, own in sizes.items()
        }
        reader.load(_flat(model.state_dict(), moments), no_dist=False)
        return optimizers.load(
            optimizer, dict(state=moments, param_groups=index['optimizer']['param_groups'])
        )
    weights, whole = model.state_dict(), state['optimizer']
    with _errors(
        ValueError, "the checkpoint's weights or moments are those of another model, or damaged"
    ):
        model.load_state_dict(
            {name: _part_of(state['model'][name], own) for name, own in weights.items()}
        )
        moments = whole and {
            i: {key: _part_of(value, params[i]) for key, value in own.items()}
            for i, own in whole['state'].items()
        }
    optimizers.load(optimizer, whole and {**whole, 'state': moments})


def _part_of(whole, like):
    """This process's part of a tensor that is shared out as `like` is."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    return distribute_tensor(
        whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    ).clone()


def whole(out_dir, index):
    """dict(model=…, optimizer=…) of parts that were verified, as a ckpt.pt with all in it has them;
    by one process, on the CPU. Raises ValueError."""
    reader, model, optimizer = _Reader(out_dir, index), index['model'], index['optimizer']
    with _errors(ValueError, f"{reader.path} can't be loaded"):
        tensors = {
            name: torch.empty(known.size, dtype=known.properties.dtype)
            for name, known in reader.known.items()
        }
    reader.load(tensors, no_dist=True)
    state = {
        i: {key: tensors[f'optimizer.{i}.{key}'] for key in keys}
        for i, keys in optimizer['state'].items()
    }
    return dict(
        model={name: tensors[f'model.{first}'] for name, first in model.items()},
        optimizer=dict(state=state, param_groups=optimizer['param_groups']),
    )


def verify(out_dir, index):
    """Raise ValueError where a file of the checkpoint is not what was written, with its name, or
    the index is damaged."""
    with _errors(ValueError, f"{out_dir} has a checkpoint in parts whose index is damaged"):
        folder = Path(out_dir, FOLDER.fullmatch(index['folder'])[0])
        sums = {FILE.fullmatch(name)[0]: digest for name, digest in index['files'].items()}
        _names(index), sums['.metadata'], index['optimizer']['param_groups'][0]
    for name, digest in sums.items():
        try:
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name} is missing: the checkpoint is not whole")
            if files.sha256(folder / name) != digest:
                raise ValueError(
                    f"{folder / name} is damaged: it is not what was saved (its sha256 differs)"
                )
        except OSError as error:
            raise OSError(f"{folder / name} can't be read: {error.strerror or error}") from None


class _Unpickler(pickle._Unpickler):
    """Makes what a .metadata consists of, and nothing else that somebody may have put there.
    Python's: the one in C can be made to allocate gigabytes by a few bytes."""

    KNOWN = {
        (kind.__module__, kind.__qualname__): kind
        for kind in (
            metadata.Metadata,
            metadata.MetadataIndex,
            metadata.TensorStorageMetadata,
            metadata.ChunkStorageMetadata,
            metadata.TensorProperties,
            metadata._MEM_FORMAT_ENCODING,
            filesystem._StorageInfo,
            torch.Size,
            torch.serialization._get_layout,
        )
    }

    def find_class(self, module, name):
        kind = self.KNOWN.get(
            (module, name), getattr(torch, name, None) if module == 'torch' else None
        )
        if (module, name) in self.KNOWN or isinstance(kind, torch.dtype):
            return kind
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which might run code")


class _Writer(dcp.FileSystemWriter):
    """per_thread_copy_ahead=0 copies tensors to the CPU one by one. To copy ahead, DCP opens a CUDA
    context, even for a model on the CPU, which fails where the GPU has no room for it."""

    def storage_meta(self):  # the path of the folder while it is written, in this system's own type
        return None


class _Reader(dcp.FileSystemReader):
    """Reads tensors, and nothing but tensors: with anything else DCP would run what code is in it.
    Raises ValueError."""

    def __init__(self, out_dir, index):
        super().__init__(Path(out_dir, index['folder']))
        with _errors(ValueError, f"{self.path / '.metadata'} is damaged, and not loaded"):
            self.metadata = _Unpickler(io.BytesIO((self.path / '.metadata').read_bytes())).load()
            self.known = self.metadata.state_dict_metadata
            kinds = {
                (type(known), type(known.size), type(known.properties.dtype))
                for known in self.known.values()
            }
            places = {
                (place.relative_path in index['files'], place.transform_descriptors)
                for place in self.metadata.storage_data.values()
            }
            if (
                kinds != {(metadata.TensorStorageMetadata, torch.Size, torch.dtype)}
                or places != {(True, None)}
                or self.known.keys() != set(_names(index))
            ):
                raise ValueError("it describes other things than the run's tensors in this folder")

    def read_metadata(self, *args, **options):
        return self.metadata

    def load(self, tensors, no_dist):
        """Fill {name: tensor}; those that are shards by all processes together."""
        with _errors(ValueError, f"{self.path} can't be loaded"):
            dcp.load(
                {name: tensors[name] for name in self.known},
                storage_reader=self,
                planner=DefaultLoadPlanner(flatten_state_dict=False),
                no_dist=no_dist,
            )


# ---- both ----------------------------------------------------------------------------------------


def _flat(weights, state):
    """{name: tensor} of the model's weights and the optimizer's state."""
    return {f'model.{name}': tensor for name, tensor in weights.items()} | {
        f'optimizer.{i}.{key}': tensor
        for i, values in state.items()
        for key, tensor in values.items()
    }


def _names(index):
    """The names by which a folder has its tensors, tied ones once."""
    return [
        *(f'model.{name}' for name in dict.fromkeys(index['model'].values())),
        *(
            f'optimizer.{i}.{key}'
            for i, keys in index['optimizer']['state'].items()
            for key in keys
        ),
    ]


def _each(work):
    """What work() returns in each process, in a list in all of them. One's OSError or ValueError is
    raised in all."""
    try:
        mine = work(), None
    except (OSError, ValueError) as error:
        mine = None, (OSError if isinstance(error, OSError) else ValueError, str(error))
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    for _, problem in every:
        if problem:
            raise problem[0](problem[1])
    return [value for value, _ in every]


@contextlib.contextmanager
def _errors(kind, what):
    """Any error in the body is a `kind`, with one line; DCP's, which brings those of all processes,
    too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # that there is no group of processes
            yield
    except (Exception, dcp.CheckpointException) as error:
        if isinstance(error, dcp.CheckpointException):
            error = next(iter(error.failures.values()))[0]
        elif isinstance(error, dist.DistError) or 'gloo' in str(error):
            raise  # another process is gone
        raise kind(
            f"{what}: {' '.join(str(error).split())[:160] or type(error).__name__}"
        ) from None
