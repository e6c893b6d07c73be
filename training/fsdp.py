"""Sharded training (train.py --parallel=fsdp) by torch's FSDP2, and its checkpoints.

Each process keeps a part of every parameter, gradient and moment, and writes its part of a
checkpoint by torch.distributed.checkpoint (DCP).

Such a checkpoint is a folder, out_dir/shards-STEP, and an index: plain data in ckpt.pt. Any number
of processes reads what any other number has written, bit for bit; `read_whole_state` reads it
without a process group.

The index: {'folder': its name, 'model': {name in the state dict: the name its tensor is stored
by}, 'optimizer': {'state': {parameter number: [keys]}, 'param_groups': …}, 'files': {name:
sha256}}.
"""

import contextlib
import io
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
from training.optimizer import load_optimizer_state

FOLDER = re.compile(r'shards-\d+(-\d+)?')
FILE = re.compile(r'__\d+_\d+\.distcp|\.metadata')


# ---- training ------------------------------------------------------------------------------------


def shard_model(model, device):
    """Spread the parameters of `model`, which is on the CPU, over the processes, in place.

    Returns the model. Build the optimizer after this; then all processes call the model, or none.

    Each block (each element of a ModuleList) is moved to the device on its own and the rest at the
    end, so that no device ever holds the whole model. In a pass a process has its part of the model
    and all of one or two blocks; while it accumulates gradients without exchanging them, it has all
    of these. Raises ValueError for a model without trainable parameters.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"parallel='fsdp': {type(model).__name__} has no parameters to train: use ddp"
        )
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    attributes = {name: dict(vars(p)) for name, p in model.named_parameters()}
    module = type(model).__module__

    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    for blocks in reversed(lists):  # those inside of others first
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)  # tied weights are in no block, so they stay in one group

    type(model).__module__ = module  # fully_shard changes it; models.name_of needs it
    for name, p in model.named_parameters():
        vars(p).update(attributes[name])  # such as n_matrices, for Muon

    # Persistent buffers, such as running statistics: all use the master's, as under DDP.
    persistent = model.state_dict().keys() - attributes.keys()

    def broadcast_buffers(*_):
        for name, buffer in model.named_buffers():
            if name in persistent:
                dist.broadcast(buffer, 0)

    model.register_forward_pre_hook(broadcast_buffers)
    return model


def full_state_dict(model):
    """The state dict with whole tensors, on the CPU, in the master; {} in the other processes.

    All processes call it.
    """
    whole = {}
    first_names = _first_names(model)
    for name, value in model.state_dict().items():
        if isinstance(value, DTensor):
            value = value.full_tensor()
        if dist.get_rank() == 0:
            first = first_names[name]
            whole[name] = whole[first] if first in whole else value.cpu()
    return whole


def _first_names(model):
    """{name in the state dict: the first name of the same tensor}, which differ for tied ones."""
    first_names = {}
    names_by_id = {}
    for name, value in model.state_dict(keep_vars=True).items():
        first_names[name] = names_by_id.setdefault(id(value), name)
    return first_names


# ---- writing -------------------------------------------------------------------------------------


def write_shards(out_dir, step, model, optimizer):
    """Write the state of model and optimizer to out_dir/shards-STEP, completely or not at all.

    Returns the index. An existing folder is kept; the new one is shards-STEP-2 then. All processes
    call this, on a disk that they share. If one of them can't write, all raise OSError.
    """
    out_dir = Path(out_dir)
    rank = dist.get_rank()
    optimizer_state = optimizer.state_dict()
    tensors = _named_tensors(model.state_dict(), optimizer_state['state'])
    # Rank 0 looks for a name, and all use it.
    name = _on_all_ranks(lambda: _unused_name(out_dir, step) if rank == 0 else None)[0]
    folder = out_dir / f'.{name}.new'
    index = dict(
        folder=name,
        model=_first_names(model),
        optimizer=dict(
            state={i: list(values) for i, values in optimizer_state['state'].items()},
            param_groups=optimizer_state['param_groups'],
        ),
    )

    def make_folder():
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

    def own_digests():
        own = [*folder.glob(f'__{rank}_*')]
        if rank == 0:
            own.append(folder / '.metadata')
        return {path.name: files.sha256(path) for path in own}

    def publish():
        if rank == 0:
            _publish(folder, out_dir / name, index['files'])

    try:
        _on_all_ranks(make_folder)
        with _one_line_errors(OSError, f"cannot write {folder}"):
            dcp.save(
                {key: tensors[key] for key in _tensor_names(index)},
                storage_writer=_Writer(folder, per_thread_copy_ahead=0),
                planner=DefaultSavePlanner(
                    flatten_state_dict=False, dedup_save_to_lowest_rank=True
                ),
            )
        index['files'] = {}
        for digests in _on_all_ranks(own_digests):
            index['files'] |= digests
        _on_all_ranks(publish)
    except OSError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return index


def _unused_name(out_dir, step):
    name = f'shards-{step}'
    number = 1
    while (out_dir / name).exists():
        number += 1
        name = f'shards-{step}-{number}'
    return name


def _publish(folder, path, written):
    """Rename the complete `folder` to `path`: from now on the checkpoint exists."""
    for name in written:
        if not (folder / name).exists():
            raise OSError(
                f"{folder} has no {name}, which another process wrote: out_dir must be on a disk "
                "that all machines share"
            )
    files.sync_folder(folder)
    os.replace(folder, path)
    files.sync_folder(path.parent)


def remove_other_shards(out_dir, keep):
    """Remove the folders of checkpoints whose names are not in `keep`, and interrupted writes."""
    for path in Path(out_dir).glob('*shards-*'):
        name = path.name.removeprefix('.').removesuffix('.new')
        if FOLDER.fullmatch(name) and path.name not in keep:
            shutil.rmtree(path, ignore_errors=True)


# ---- reading -------------------------------------------------------------------------------------


def load_state(state, model, optimizer):
    """Load a checkpoint into a sharded model and its optimizer; all processes call it.

    state: a checkpoint with whole tensors, or with the index of verified shards in 'shards', to
    which the reader has added 'out_dir', the folder that they are in. Raises ValueError in all
    processes if it is another model's or optimizer's.
    """
    if 'shards' in state:
        optimizer_state = _load_shards(state['shards'], model, optimizer)
    else:
        optimizer_state = _load_whole(state, model, optimizer)
    load_optimizer_state(optimizer, optimizer_state)


def _params_of(optimizer):
    params = []
    for group in optimizer.param_groups:
        params += group['params']
    return params


def _load_shards(index, model, optimizer):
    """Read the weights into the model; returns the optimizer's state dict, sharded like it."""
    params = _params_of(optimizer)
    reader = _Reader(index['out_dir'], index)
    keys_by_param = index['optimizer']['state']
    unknown = keys_by_param.keys() - set(range(len(params)))
    if _first_names(model) != index['model'] or unknown:
        raise ValueError(
            f"{reader.path} holds another model's weights, or another optimizer's state"
        )

    moments = {}
    for i, keys in keys_by_param.items():
        moments[i] = {}
        for key in keys:
            size = reader.known[f'optimizer.{i}.{key}'].size
            is_sharded = size == params[i].shape  # like its parameter; a count of steps is not
            moments[i][key] = torch.empty_like(params[i]) if is_sharded else torch.zeros(size)
    reader.load(_named_tensors(model.state_dict(), moments), no_dist=False)
    return dict(state=moments, param_groups=index['optimizer']['param_groups'])


def _load_whole(state, model, optimizer):
    """Load the weights' parts into the model; returns the optimizer's state dict, sharded like it.

    Without one, as in a checkpoint of weights, returns None.
    """
    params = _params_of(optimizer)
    optimizer_state = state['optimizer']
    with _one_line_errors(
        ValueError, "the checkpoint's weights or moments are those of another model, or damaged"
    ):
        weights = {}
        for name, own in model.state_dict().items():
            weights[name] = _part_of(state['model'][name], own)
        model.load_state_dict(weights)
        if not optimizer_state:
            return optimizer_state
        moments = {}
        for i, values in optimizer_state['state'].items():
            moments[i] = {key: _part_of(value, params[i]) for key, value in values.items()}
    return {**optimizer_state, 'state': moments}


def _part_of(whole, like):
    """This process's part of a tensor, sharded as `like` is; all of it if it differs from that."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    part = distribute_tensor(
        whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )
    return part.clone()


def read_whole_state(out_dir, index):
    """{'model': …, 'optimizer': …} of verified shards, as a ckpt.pt of whole tensors has them.

    One process reads them, to the CPU. Raises ValueError.
    """
    reader = _Reader(out_dir, index)
    with _one_line_errors(ValueError, f"{reader.path} can't be loaded"):
        tensors = {
            name: torch.empty(known.size, dtype=known.properties.dtype)
            for name, known in reader.known.items()
        }
    reader.load(tensors, no_dist=True)

    optimizer = index['optimizer']
    optimizer_state = {}
    for i, keys in optimizer['state'].items():
        optimizer_state[i] = {key: tensors[f'optimizer.{i}.{key}'] for key in keys}
    return dict(
        model={name: tensors[f'model.{first}'] for name, first in index['model'].items()},
        optimizer=dict(state=optimizer_state, param_groups=optimizer['param_groups']),
    )


def verify_shards(out_dir, index):
    """Raise ValueError if a file of the checkpoint differs from what was written, or is missing.

    The error names the file, or says that the index is damaged. Raises OSError where a file can't
    be read.
    """
    with _one_line_errors(
        ValueError, f"{out_dir} has a checkpoint in parts whose index is damaged"
    ):
        _check_index(index)
    for name, digest in index['files'].items():
        path = Path(out_dir, index['folder'], name)
        try:
            if not path.is_file():
                raise ValueError(f"{path} is missing: the checkpoint is incomplete")
            if files.sha256(path) != digest:
                raise ValueError(
                    f"{path} is damaged: it is not what was saved (its sha256 differs)"
                )
        except OSError as error:
            raise OSError(f"{path} can't be read: {error.strerror or error}") from None


def _check_index(index):
    """Raise some error if the index, which may be any plain data, lacks what reading needs."""
    if not FOLDER.fullmatch(index['folder']):
        raise ValueError(f"folder={index['folder']!r}")
    for name in index['files']:
        if not FILE.fullmatch(name):
            raise ValueError(f"file={name!r}")
    if '.metadata' not in index['files']:
        raise ValueError("no .metadata")
    if not isinstance(index['optimizer']['param_groups'][0], dict):
        raise ValueError("no parameter groups")
    _tensor_names(index)


# ---- torch.distributed.checkpoint ----------------------------------------------------------------


class _Unpickler(pickle._Unpickler):
    """Reads .metadata, and refuses anything that DCP does not write there, which might run code.

    It is Python's unpickler: the one in C can be made to allocate gigabytes by a few bytes.
    """

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
        if (module, name) in self.KNOWN:
            return self.KNOWN[module, name]
        if module == 'torch' and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which might run code")


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, to be called with per_thread_copy_ahead=0, which copies tensor by tensor.

    To copy ahead, DCP opens a CUDA context, even for a model on the CPU, which fails where the GPU
    is full.
    """

    def storage_meta(self):
        return None  # it would be the temporary folder's path, of a class of this operating system


class _Reader(dcp.FileSystemReader):
    """DCP's reader of a checkpoint's folder, restricted to tensors.

    Anything else DCP would unpickle, and so run code in it. `known` is {name: metadata} of the
    tensors. Raises ValueError.
    """

    def __init__(self, out_dir, index):
        super().__init__(Path(out_dir, index['folder']))
        with _one_line_errors(ValueError, f"{self.path / '.metadata'} is damaged, and not loaded"):
            self.metadata = _Unpickler(io.BytesIO((self.path / '.metadata').read_bytes())).load()
            self.known = self.metadata.state_dict_metadata
            if not self._describes(index):
                raise ValueError("it describes other things than the run's tensors in this folder")

    def _describes(self, index):
        """Whether the metadata is of the index's tensors, stored plainly in the index's files."""
        if self.known.keys() != set(_tensor_names(index)):
            return False
        for known in self.known.values():
            types = type(known), type(known.size), type(known.properties.dtype)
            if types != (metadata.TensorStorageMetadata, torch.Size, torch.dtype):
                return False
        places = self.metadata.storage_data.values()
        if not places:
            return False
        for place in places:
            is_inside = place.relative_path in index['files']
            if not is_inside or place.transform_descriptors is not None:
                return False
        return True

    def read_metadata(self, *args, **options):
        return self.metadata

    def load(self, tensors, no_dist):
        """Fill {name: tensor} in place. no_dist: this process alone, with whole tensors."""
        with _one_line_errors(ValueError, f"{self.path} can't be loaded"):
            dcp.load(
                {name: tensors[name] for name in self.known},
                storage_reader=self,
                planner=DefaultLoadPlanner(flatten_state_dict=False),
                no_dist=no_dist,
            )


def _named_tensors(weights, optimizer_state):
    """{name in the folder: tensor} of a model's state dict and an optimizer's state."""
    tensors = {f'model.{name}': tensor for name, tensor in weights.items()}
    for i, values in optimizer_state.items():
        for key, tensor in values.items():
            tensors[f'optimizer.{i}.{key}'] = tensor
    return tensors


def _tensor_names(index):
    """The names of all tensors in the folder; tied weights are there once, by their first name."""
    names = [f'model.{name}' for name in dict.fromkeys(index['model'].values())]
    for i, keys in index['optimizer']['state'].items():
        names += [f'optimizer.{i}.{key}' for key in keys]
    return names


# ---- errors --------------------------------------------------------------------------------------


def _on_all_ranks(function):
    """Call function() in each process; returns the list of all results, in each of them.

    If one raises OSError or ValueError, all do.
    """
    result = None
    problem = None
    try:
        result = function()
    except OSError as error:
        problem = OSError, str(error)
    except ValueError as error:
        problem = ValueError, str(error)

    outcomes = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, (result, problem))
    for _, problem in outcomes:
        if problem:
            error_class, message = problem
            raise error_class(message)
    return [result for result, _ in outcomes]


@contextlib.contextmanager
def _one_line_errors(error_class, what):
    """Turn any error in the body into an error_class whose message is `what` and the reason.

    DCP's errors, which hold those of all processes, become the first of these.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # that there is no process group
            yield
    except (Exception, dcp.CheckpointException) as error:
        if isinstance(error, dcp.CheckpointException):
            error = next(iter(error.failures.values()))[0]
        elif isinstance(error, dist.DistError) or 'gloo' in str(error):
            raise  # another process is gone: see distributed.exit_on_lost_peer
        reason = ' '.join(str(error).split())[:160] or type(error).__name__
        raise error_class(f"{what}: {reason}") from None
