"""Checkpoints: written whole or not at all, verified when loaded, the one before kept; and models
out of them.

An out_dir holds ckpt.pt (the latest state of the run), ckpt.prev.pt (the one before), best.pt (the
best weights) and sums.json, the sha256 of what each of them may be. The order of a save: the new
file under a temporary name; its sum into sums.json, beside the old ones; ckpt.pt becomes
ckpt.prev.pt; the new file becomes ckpt.pt. After a crash between any two of these, every file that
is there still verifies. (Where ckpt.pt was damaged, the new file is the only good one for a moment:
it is looked for by its temporary name, too.)
"""

import contextlib
import dataclasses
import difflib
import errno
import json
import os
import pickle
import stat
import types
import warnings
import zipfile
from pathlib import Path

import torch

from system import files
from training import guard

SUMS, FRESH = 'sums.json', '.ckpt.pt.new'
RESUMABLE = 'ckpt.pt', FRESH, 'ckpt.prev.pt'
FILES = (
    SUMS,
    'ckpt.pt',
    'ckpt.prev.pt',
    'best.pt',
    FRESH,
    'config.json',
    'metrics.jsonl',
    'evaluation.json',
    'tensorboard',
    'health.jsonl',
    'health.png',
    'preempted',
)


# ---- what a checkpoint says of the run -----------------------------------------------------------


def informative(default, why):
    """A field of `Progress` without which a resumed run still has the same losses, and why that is
    so."""
    return dataclasses.field(default=default, metadata={'informative': why})


@dataclasses.dataclass
class Progress:
    """Where a run is, besides its step: a checkpoint's `progress`.

    A new field needs a line here, and one in train.py that sets it. It is saved with the others;
    `_read_resumable` checks its type; a checkpoint that lacks it gives the default; and
    tests/test_resume.py checks that a resumed run needs it, unless it is `informative`.
    """

    evaluated: int = -1  # step of the last evaluation
    bad_evals: int = 0  # evaluations since the one with the best validation loss
    wall_seconds: int | float = informative(0.0, "is a time")
    train_seconds: int | float = informative(0.0, "is a time")
    wandb_id: str | None = informative(None, "belongs to wandb, which the test's run does without")
    clipped: int = 0  # steps whose gradient was longer than grad_clip, counted by train.py --watch
    data_offset: int = 0  # steps that the data are ahead of the run, see guard.skip_data
    diverged_at: int = -1  # step at which the run diverged last
    rolled_back_to: int = -1  # step of the checkpoint from which it continued then
    guard: dict | list | None = None  # guard.Guard's state; a list in checkpoints of old

    @classmethod
    def load(cls, saved):
        """The Progress of a checkpoint's `progress`; fields that it lacks have their defaults."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in saved.items() if name in names})


# What device, dtype, compile and threads were in the run, where its settings said 'auto'.
RESOLVED_TYPES = {'device': str, 'dtype': str, 'compile': bool | str, 'threads': int}
NUMBER = int, float


# ---- writing -------------------------------------------------------------------------------------


def save(out_dir, name, state):
    """Write `state` (plain types and tensors) as out_dir/name: ckpt.pt, whose predecessor is kept,
    or best.pt.

    Raises OSError where the disk is full or can't be written to; what was there before is still
    there then.
    """
    folder = Path(out_dir)
    fresh = folder / f'.{name}.new'
    try:
        with files.replacing(fresh) as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:  # torch's writer hides the cause
                raise OSError(f"is the disk full? ({str(error).splitlines()[0][:80]})") from None
        sums = _read_sums(folder)
        sums[name] = [files.sha256(fresh), *sums.get(name, [])][:16]  # some of interrupted saves
        with files.replacing(folder / SUMS) as file:
            file.write(json.dumps(sums, indent=1).encode())
        if name == 'ckpt.pt' and (folder / name).exists():
            os.replace(folder / name, folder / 'ckpt.prev.pt')
        os.replace(fresh, folder / name)
    finally:
        fresh.unlink(missing_ok=True)
    files.sync_folder(folder)
    if name == 'ckpt.pt' and any(folder.glob('shards-*')):
        from training import fsdp

        # what can't be read now may be another time: nothing is removed
        with contextlib.suppress(Exception):
            before = folder / 'ckpt.prev.pt'
            kept = (
                [state, torch.load(before, map_location='meta', weights_only=True)]
                if before.exists()
                else [state]
            )
            fsdp.remove_other_shards(
                folder, {content['shards']['folder'] for content in kept if 'shards' in content}
            )


def set_aside(out_dir):
    """Move an earlier run's files in out_dir to out_dir/earlier-N; returns that folder, or None
    where there was no run."""
    folder = Path(out_dir)
    # parts first, then what refers to them: where this is interrupted, nothing passes for litter
    there = [path.name for path in folder.glob('shards-*')] + [
        name for name in FILES[::-1] if (folder / name).exists()
    ]
    if not any(name.endswith('.pt') for name in there):
        return None
    numbers = [int(path.name[8:]) for path in folder.glob('earlier-*') if path.name[8:].isdecimal()]
    aside = folder / f'earlier-{1 + max(numbers, default=0)}'
    aside.mkdir()
    for name in there:
        os.replace(folder / name, aside / name)
    return aside


def make_out_dir(out_dir, init_from='resume'):
    """Create out_dir, prove that it can be written to, and lock it against a second run, while the
    file that this returns is open. Unless it is resumed, an earlier run there is set aside. Raises
    OSError."""
    try:
        os.makedirs(out_dir, exist_ok=True)
        lock = files.lock(Path(out_dir) / '.lock')
        if init_from != 'resume' and (aside := set_aside(out_dir)):
            print(f"{out_dir} held an earlier run: its files are in {aside} now", flush=True)
        (Path(out_dir) / 'preempted').unlink(missing_ok=True)
        return lock
    except BlockingIOError:
        raise OSError(
            f"another run is writing to out_dir={out_dir!r}; take another --out_dir"
        ) from None
    except (OSError, RecursionError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise OSError(
            f"out_dir={out_dir!r} can't be written to ({reason}); take another --out_dir"
        ) from None


def mark_preempted(out_dir, iter_num):
    """Leave the file `preempted` in out_dir, which tells whoever started the run that a signal
    ended it."""
    with files.replacing(Path(out_dir) / 'preempted') as file:
        file.write(f"saved at step {iter_num}\n".encode())


# ---- reading -------------------------------------------------------------------------------------


def _read_sums(folder):
    try:
        sums = json.loads((folder / SUMS).read_text(encoding='utf-8'))
        return {name: known for name, known in sums.items() if isinstance(known, list)}
    # not there, or damaged: checkpoints have their own
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def read(path):
    """A checkpoint file's content, verified. Raises ValueError where it is damaged, OSError where
    it can't be read.

    Against sums.json where that knows the file; one from elsewhere (nanoGPT's) by the checksums
    inside it.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never end
            raise ValueError(f"{path} is no file")
        open(path, 'rb').close()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            raise FileNotFoundError(f"{path}: {error.strerror}") from None
        raise OSError(f"{path} can't be read: {error.strerror or error}") from None
    try:
        with zipfile.ZipFile(path) as archive:
            _check_directory(archive.infolist(), path)
        sums = _read_sums(path.parent).get('best.pt' if path.name == 'best.pt' else 'ckpt.pt')
        if sums and path.name in FILES:
            if files.sha256(path) not in sums:
                raise ValueError("it is not what was saved (its sha256 differs)")
        else:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError("a checksum inside it is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            state = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds something other than tensors and plain types, which might run code: not loaded"
        ) from None
    # zipfile's, pickle's and torch's errors: the file is not what it should be
    except Exception as error:
        if (
            getattr(error, 'errno', None) not in (None, errno.EINVAL)
            or isinstance(error, MemoryError)
            or 'allocate memory' in str(error)
        ):
            raise OSError(
                f"{path} can't be read: {getattr(error, 'strerror', None) or 'out of memory'}"
            ) from None
        raise ValueError(
            f"{path} is damaged or no checkpoint: {' '.join(str(error).split())[:160] or type(error).__name__}"
        ) from None
    if _has(state, {'shards': dict}):
        from training import fsdp

        state['shards']['out_dir'] = str(path.parent)
        fsdp.verify_shards(path.parent, state['shards'])
    if not (
        _has(state, {'model': dict, 'model_args': dict})
        and all(
            isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state['model'].items()
        )
    ):
        raise ValueError(f"{path} is no checkpoint of a run: it has no 'model' and 'model_args'")
    if not all(
        w.layout is torch.strided and w.nbytes <= w.untyped_storage().nbytes()
        for w in state['model'].values()
    ):
        raise ValueError(
            f"{path} is damaged: it has weights that are larger than what it holds of them"
        )
    return state


def _check_directory(found, path):
    """ValueError where a zip archive is not as torch.save writes it, each name once and nothing
    packed: one from elsewhere can say a name twice, of which readers take different ones, or unpack
    to more than the machine has."""
    if any(info.compress_type != zipfile.ZIP_STORED for info in found):
        raise ValueError("it is packed, as no checkpoint is")
    if len({info.filename for info in found}) < len(found):
        raise ValueError("it has a name twice")
    if sum(info.file_size for info in found) > os.path.getsize(path):
        raise ValueError("it says that it holds more than it has bytes")


def _has(state, types):
    """Whether `state` is a dict with these keys, each of its type."""
    return isinstance(state, dict) and all(
        isinstance(state.get(key, ...), kind) for key, kind in types.items()
    )


def _has_types(values, types):
    """Whether `values` is a dict in which each of these keys that it has is of its type."""
    return isinstance(values, dict) and all(
        isinstance(values[key], kind) for key, kind in types.items() if key in values
    )


def _read_resumable(path):
    """Like `read`, of a state that a run can go on from."""
    state = read(path)
    if (
        not _has(
            state,
            {
                'config': dict,
                'iter_num': int,
                'best_val_loss': (*NUMBER, torch.Tensor),
                'optimizer': (dict, types.NoneType),
            },
        )
        or state['iter_num'] < 0
    ):
        raise ValueError(
            f"{path} has weights only, not the state of a run: start from it with --init_from={path}"
        )
    progress = state.get('progress', {})
    resolved = state.get('resolved', {})
    progress_types = {field.name: field.type for field in dataclasses.fields(Progress)}
    if not (
        _has_types(progress, progress_types)
        and _has_types(resolved, RESOLVED_TYPES)
        and guard.is_sound(progress.get('guard'))
        and getattr(state['best_val_loss'], 'numel', int)() in (0, 1)
    ):
        raise ValueError(
            f"{path} is damaged: its 'progress', 'resolved' or 'best_val_loss' is not what a run saves"
        )
    if any(weight.isnan().any() for weight in state['model'].values()):
        raise ValueError(f"{path} is no state to go on from: its weights are not all numbers (NaN)")
    return state


def read_latest(out_dir):
    """The newest state in out_dir that verifies, saying what was passed over. Raises
    FileNotFoundError, ValueError."""
    candidates = [p for name in RESUMABLE if os.path.lexists(p := Path(out_dir, name))]
    if not candidates:
        near = nearest_run(out_dir)
        hint = f"; the nearest is {near!r}" if near else ''
        raise FileNotFoundError(f"out_dir={str(out_dir)!r} has no ckpt.pt to resume from{hint}")
    return first_good(candidates, 'resuming from', _read_resumable)


def nearest_run(folder, names=()):
    """The folder with a model beside `folder`, or the one of `names`, whose name is nearly the
    same.

    None where there is none.
    """
    folder, there = Path(folder), list(names)
    with contextlib.suppress(OSError, ValueError):  # what can't be listed has no names
        for other in folder.parent.iterdir():
            if any((other / name).is_file() for name in (*RESUMABLE, 'best.pt', 'config.json')):
                there.append(other.name)
    near = difflib.get_close_matches(folder.name, there, n=1, cutoff=0.7)
    if not near:
        return None
    return near[0] if near[0] in names else str(folder.parent / near[0])


def first_good(paths, doing, read=read):
    problems = []
    for path in paths:
        try:
            state = read(path)
        except (ValueError, OSError) as error:
            problems.append(error)
        else:
            if problems:
                print(f"{'; '.join(map(str, problems))}; {doing} {path} instead", flush=True)
            return state
    kind = OSError if any(type(error) is OSError for error in problems) else ValueError
    raise kind('; '.join(map(str, problems)))
