"""Checkpoint files: each is written whole or not at all, verified when it is read, and the previous
one is kept.

An out_dir holds ckpt.pt (the latest state of the run), ckpt.prev.pt (the previous one), best.pt
(the weights with the best validation loss) and sums.json (the sha256 of each). A save writes the
new file under a temporary name, adds its sum to sums.json beside the old ones, renames ckpt.pt to
ckpt.prev.pt, and gives the new file its name. A crash between any two of these steps leaves only
files that still verify. Where ckpt.pt was damaged before, the new file is the only good one for a
moment; so a run that resumes looks for it under its temporary name, too.
"""

import contextlib
import dataclasses
import difflib
import errno
import json
import os
import pickle
import stat
import warnings
import zipfile
from pathlib import Path

import torch

from system import files
from training import guard

SUMS = 'sums.json'
UNFINISHED = '.ckpt.pt.new'  # the temporary name of ckpt.pt
RESUMABLE = ('ckpt.pt', UNFINISHED, 'ckpt.prev.pt')  # in the order in which they are tried
# What a run writes to its out_dir, besides the folders shards-* (fsdp.py).
FILES = (
    SUMS,
    'ckpt.pt',
    'ckpt.prev.pt',
    'best.pt',
    UNFINISHED,
    'config.json',
    'metrics.jsonl',
    'evaluation.json',
    'tensorboard',
    'health.jsonl',
    'health.png',
    'preempted',
)
SUMS_KEPT = 16  # sums per file; those of interrupted saves are among them


# ---- what a checkpoint says about the run --------------------------------------------------------


def without_effect(default, why):
    """A field of `Progress` that the losses of a resumed run do not depend on. why: the reason."""
    return dataclasses.field(default=default, metadata={'without_effect': why})


@dataclasses.dataclass
class Progress:
    """Where a run is, besides its step: the entry `progress` of a checkpoint.

    A new field needs one line here and one in train.py, where it is set. The rest follows from the
    line: the field is saved and loaded, its type is checked when a run resumes, a checkpoint
    without it gives the default, and tests/test_resume.py shows that a resumed run needs it,
    unless it is `without_effect`.
    """

    evaluated: int = -1  # step of the last evaluation
    bad_evals: int = 0  # evaluations since the one with the best validation loss
    wall_seconds: int | float = without_effect(0.0, "is a time")
    train_seconds: int | float = without_effect(0.0, "is a time")
    wandb_id: str | None = without_effect(None, "belongs to wandb, which the test does not use")
    clipped: int = 0  # steps whose gradient was longer than grad_clip, counted with --watch
    data_offset: int = 0  # steps that the data are ahead of the run (guard.skip_data)
    diverged_at: int = -1  # step at which the run last diverged
    rolled_back_to: int = -1  # step of the checkpoint from which it continued then
    guard: dict | list | None = None  # Guard.state(); other versions saved a list

    @classmethod
    def load(cls, saved):
        """The Progress in a checkpoint's dict `saved`; fields of other versions are ignored."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in saved.items() if name in names})


# The entry `resolved` of a checkpoint: what the run used where its settings said 'auto'.
RESOLVED_TYPES = {'device': str, 'dtype': str, 'compile': bool | str, 'threads': int}


# ---- writing -------------------------------------------------------------------------------------


def save(out_dir, name, state):
    """Write `state`, plain types and tensors, to the file `name` in out_dir.

    name: 'ckpt.pt', whose predecessor is kept, or 'best.pt'. Raises OSError where the disk is full
    or can't be written to; the previous files are still there then.
    """
    folder = Path(out_dir)
    unfinished = folder / f'.{name}.new'
    try:
        with files.replacing(unfinished) as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch's writer hides the cause
                reason = str(error).splitlines()[0][:80]
                raise OSError(f"is the disk full? ({reason})") from None

        sums = _read_sums(folder)
        sums[name] = [files.sha256(unfinished), *sums.get(name, [])][:SUMS_KEPT]
        with files.replacing(folder / SUMS) as file:
            file.write(json.dumps(sums, indent=1).encode())

        if name == 'ckpt.pt' and (folder / name).exists():
            os.replace(folder / name, folder / 'ckpt.prev.pt')
        os.replace(unfinished, folder / name)
    finally:
        unfinished.unlink(missing_ok=True)
    files.sync_folder(folder)

    if name == 'ckpt.pt' and any(folder.glob('shards-*')):
        _remove_unused_shards(folder, state)


def _remove_unused_shards(folder, state):
    """Remove the folders shards-* that neither `state` nor ckpt.prev.pt refers to."""
    from training import fsdp

    # A ckpt.prev.pt that can't be read now may be readable another time: nothing is removed then.
    with contextlib.suppress(Exception):
        kept = [state]
        previous = folder / 'ckpt.prev.pt'
        if previous.exists():
            kept.append(torch.load(previous, map_location='meta', weights_only=True))
        used = {content['shards']['folder'] for content in kept if 'shards' in content}
        fsdp.remove_other_shards(folder, used)


def set_aside(out_dir):
    """Move an earlier run's files from out_dir to out_dir/earlier-N.

    Returns the new folder, or None where out_dir holds no checkpoint.
    """
    folder = Path(out_dir)
    # Shards first, then the checkpoints that refer to them: if this is interrupted, none of the
    # shards left in place looks unused.
    names = [path.name for path in folder.glob('shards-*')]
    names += [name for name in reversed(FILES) if (folder / name).exists()]
    if not any(name.endswith('.pt') for name in names):
        return None
    numbers = [0]
    for path in folder.glob('earlier-*'):
        number = path.name.removeprefix('earlier-')
        if number.isdecimal():
            numbers.append(int(number))
    aside = folder / f'earlier-{1 + max(numbers)}'
    aside.mkdir()
    for name in names:
        os.replace(folder / name, aside / name)
    return aside


def make_out_dir(out_dir, init_from='resume'):
    """Create out_dir, check that it can be written to, and lock it against a second run.

    Unless init_from is 'resume', an earlier run's files there are set aside. Returns the open lock
    file; the lock holds until it is closed. Raises OSError.
    """
    try:
        os.makedirs(out_dir, exist_ok=True)
        lock = files.lock(Path(out_dir) / '.lock')
        if init_from != 'resume':
            aside = set_aside(out_dir)
            if aside:
                print(f"{out_dir} held an earlier run, whose files are now in {aside}", flush=True)
        (Path(out_dir) / 'preempted').unlink(missing_ok=True)
        return lock
    except BlockingIOError:
        raise OSError(
            f"another run is writing to out_dir={out_dir!r}; choose another --out_dir"
        ) from None
    except (OSError, RecursionError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise OSError(
            f"out_dir={out_dir!r} can't be written to ({reason}); choose another --out_dir"
        ) from None


def mark_preempted(out_dir, iter_num):
    """Write the file `preempted`, which tells whoever started the run that a signal stopped it."""
    with files.replacing(Path(out_dir) / 'preempted') as file:
        file.write(f"saved at step {iter_num}\n".encode())


# ---- reading -------------------------------------------------------------------------------------


def read(path):
    """The content of a checkpoint file, verified.

    It is verified by sums.json where that lists the file, else (nanoGPT's checkpoints) by the
    checksums inside it. Raises ValueError where it is damaged, OSError where it can't be read.
    """
    path = Path(path)
    _check_readable(path)
    try:
        state = _load_verified(path)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds something other than tensors and plain types, which might run code: "
            "not loaded"
        ) from None
    except Exception as error:
        if _is_machines_fault(error):
            reason = getattr(error, 'strerror', None) or 'out of memory'
            raise OSError(f"{path} can't be read: {reason}") from None
        # zipfile's, pickle's and torch's errors: the file is not what it should be
        reason = ' '.join(str(error).split())[:160] or type(error).__name__
        raise ValueError(f"{path} is damaged or not a checkpoint: {reason}") from None

    if _has_all(state, {'shards': dict}):
        from training import fsdp

        state['shards']['out_dir'] = str(path.parent)
        fsdp.verify_shards(path.parent, state['shards'])
    _check_weights(state, path)
    return state


def _check_readable(path):
    """Raise ValueError where `path` is not a regular file, OSError where it can't be opened."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would never end
            raise ValueError(f"{path} is not a file")
        open(path, 'rb').close()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            raise FileNotFoundError(f"{path}: {error.strerror}") from None
        raise OSError(f"{path} can't be read: {error.strerror or error}") from None


def _load_verified(path):
    """The content of a checkpoint file, after checks that need no unpickling.

    Raises whatever the checks, the file system or torch raise.
    """
    with zipfile.ZipFile(path) as archive:
        _check_directory(archive.infolist(), path)

    # The sums of ckpt.prev.pt and of an unfinished save are listed under ckpt.pt.
    name = 'best.pt' if path.name == 'best.pt' else 'ckpt.pt'
    sums = _read_sums(path.parent).get(name)
    if sums and path.name in FILES:
        if files.sha256(path) not in sums:
            raise ValueError("it is not what was saved (its sha256 differs)")
    else:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError("a checksum inside it is wrong")

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.load(path, map_location='cpu', weights_only=True)


def _check_directory(entries, path):
    """Raise ValueError where a zip archive has entries that torch.save would not write.

    Of two entries with one name, readers differ in which they use; compressed ones may unpack to
    more than the machine's memory.
    """
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise ValueError("it is compressed, which no checkpoint is")
    if len({entry.filename for entry in entries}) < len(entries):
        raise ValueError("two of its entries have the same name")
    if sum(entry.file_size for entry in entries) > os.path.getsize(path):
        raise ValueError("its entries claim to be larger than the file")


def _is_machines_fault(error):
    """Whether reading failed for lack of memory or because of the disk, not of the file."""
    if getattr(error, 'errno', None) not in (None, errno.EINVAL):
        return True
    return isinstance(error, MemoryError) or 'allocate memory' in str(error)


def _check_weights(state, path):
    """Raise ValueError where a checkpoint has no model, or weights that are not all in it."""
    is_run = _has_all(state, {'model': dict, 'model_args': dict}) and all(
        isinstance(name, str) and isinstance(weight, torch.Tensor)
        for name, weight in state['model'].items()
    )
    if not is_run:
        raise ValueError(f"{path} is not a run's checkpoint: it has no 'model' and 'model_args'")
    for weight in state['model'].values():
        # A stride of 0, for example, makes a huge tensor out of a few bytes.
        is_whole = (
            weight.layout is torch.strided and weight.nbytes <= weight.untyped_storage().nbytes()
        )
        if not is_whole:
            raise ValueError(f"{path} is damaged: a weight is larger than the data stored for it")


def _read_sums(folder):
    """{file name: sha256 of what was saved under it, the newest first} of sums.json.

    Empty where it is missing or damaged: checkpoints have checksums of their own.
    """
    try:
        sums = json.loads((folder / SUMS).read_text(encoding='utf-8'))
        return {name: known for name, known in sums.items() if isinstance(known, list)}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _has_all(values, types):
    """Whether `values` is a dict with all keys of `types`, each value of its type."""
    if not isinstance(values, dict):
        return False
    return all(key in values and isinstance(values[key], kind) for key, kind in types.items())


def _has_sound(values, types):
    """Whether `values` is a dict whose entries have the right types, as far as `types` has them."""
    if not isinstance(values, dict):
        return False
    return all(isinstance(values[key], kind) for key, kind in types.items() if key in values)


# ---- the state to resume from --------------------------------------------------------------------


def read_latest(out_dir):
    """The newest state in out_dir that verifies; prints which newer files were rejected.

    Raises FileNotFoundError where there is no checkpoint, ValueError where all are damaged, and
    OSError where one could not be read.
    """
    candidates = [Path(out_dir, name) for name in RESUMABLE]
    candidates = [path for path in candidates if os.path.lexists(path)]
    if not candidates:
        hint = ''
        near = nearest_run(out_dir)
        if near:
            hint = f"; the nearest is {near!r}"
        raise FileNotFoundError(f"out_dir={str(out_dir)!r} has no ckpt.pt to resume from{hint}")
    return first_good(candidates, 'resuming from', _read_resumable)


def _read_resumable(path):
    """The content of a checkpoint file as `read` returns it, if a run can continue from it."""
    state = read(path)
    needed = {
        'config': dict,
        'iter_num': int,
        'best_val_loss': int | float | torch.Tensor,
        'optimizer': dict | None,
    }
    if not _has_all(state, needed) or state['iter_num'] < 0:
        raise ValueError(
            f"{path} has weights only, not the state of a run: start from it with "
            f"--init_from={path}"
        )

    progress = state.get('progress', {})
    progress_types = {field.name: field.type for field in dataclasses.fields(Progress)}
    best_val_loss = state['best_val_loss']
    is_sound = (
        _has_sound(progress, progress_types)
        and _has_sound(state.get('resolved', {}), RESOLVED_TYPES)
        and guard.is_sound(progress.get('guard'))
    )
    if isinstance(best_val_loss, torch.Tensor) and best_val_loss.numel() != 1:
        is_sound = False
    if not is_sound:
        raise ValueError(
            f"{path} is damaged: its 'progress', 'resolved' or 'best_val_loss' is not what a run "
            "saves"
        )
    if any(weight.isnan().any() for weight in state['model'].values()):
        raise ValueError(f"{path} can't be resumed: some of its weights are NaN")
    return state


def first_good(paths, doing, read=read):
    """The content of the first of the files that `read` accepts; prints why others were rejected.

    doing: what is done with the file, for that line: 'resuming from'. Raises OSError where none is
    good and one could not be read, else ValueError.
    """
    problems = []
    for path in paths:
        try:
            state = read(path)
        except (ValueError, OSError) as error:
            problems.append(error)
            continue
        if problems:
            print(f"{'; '.join(map(str, problems))}; {doing} {path} instead", flush=True)
        return state
    # FileNotFoundError, as of a broken link, counts as damage.
    kind = OSError if any(type(error) is OSError for error in problems) else ValueError
    raise kind('; '.join(map(str, problems)))


def nearest_run(folder, names=()):
    """The folder beside `folder` that holds a model, or the one of `names`, with a similar name.

    Returns None where no name is similar.
    """
    folder = Path(folder)
    candidates = list(names)
    with contextlib.suppress(OSError, ValueError):  # a parent that can't be listed
        for other in folder.parent.iterdir():
            if any((other / name).is_file() for name in (*RESUMABLE, 'best.pt', 'config.json')):
                candidates.append(other.name)
    matches = difflib.get_close_matches(folder.name, candidates, n=1, cutoff=0.7)
    if not matches:
        return None
    if matches[0] in names:
        return matches[0]
    return str(folder.parent / matches[0])
