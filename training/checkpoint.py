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
import math
import os
import pickle
import stat
import types
import warnings
import zipfile
from pathlib import Path

import torch

import models
from interop import huggingface
from system import files
from text import folders, tokenizer, tokenizer_files
from text.meta import read_meta
from training import guard, lora
from training import optimizer as optimizers

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
# Where a run is, besides its step: the step of the last evaluation, evaluations since the best one,
# times, clipped gradients, how many steps the data are ahead (guard.py), what the guard has seen.
PROGRESS = dict(
    evaluated=-1,
    bad_evals=0,
    wall_seconds=0.0,
    train_seconds=0.0,
    wandb_id=None,
    clipped=0,
    data_offset=0,
    diverged_at=-1,
    rolled_back_to=-1,
    guard=None,
)
# What the noise in the losses depends on, which the guard measures.
NOISE = {
    'dataset',
    'block_size',
    'batch_size',
    'gradient_accumulation_steps',
    'document_boundaries',
    'dropout',
}
NUMBER = int, float
PROGRESS_KINDS = dict(
    evaluated=int,
    bad_evals=int,
    wall_seconds=NUMBER,
    train_seconds=NUMBER,
    clipped=int,
    data_offset=int,
    diverged_at=int,
    rolled_back_to=int,
    wandb_id=(str, types.NoneType),
    guard=(dict, list, types.NoneType),
)
RESOLVED = dict(device='cpu', dtype='float32', compile=False, threads=1)
RESOLVED_KINDS = dict(device=str, dtype=str, compile=(bool, str), threads=int)


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
            fsdp.tidy(
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
        fsdp.verify(path.parent, state['shards'])
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
    parts = {'progress': PROGRESS, 'resolved': {}, **state}
    if not (
        all(
            _has(parts[key], {}) and _has(known | parts[key], kinds)
            for key, known, kinds in (
                ('progress', PROGRESS, PROGRESS_KINDS),
                ('resolved', RESOLVED, RESOLVED_KINDS),
            )
        )
        and guard.is_sound(parts['progress'].get('guard'))
        and getattr(state['best_val_loss'], 'numel', int)() in (0, 1)
    ):
        raise ValueError(
            f"{path} is damaged: its 'progress', 'resolved' or 'best_val_loss' is not what a run saves"
        )
    if any(weight.isnan().any() for weight in state['model'].values()):
        raise ValueError(f"{path} is no state to go on from: its weights are not all numbers (NaN)")
    return state


def begin(init_from, out_dir):
    """(what a run starts from, the state that it resumes or None) of the setting init_from. Raises
    OSError, ValueError.

    auto: resume, if out_dir has a checkpoint that verifies, else from scratch; auto:SOURCE: else
    from SOURCE. One that cannot be read, as when a disk is away for a while, is an OSError: the run
    in it is not over.
    """
    start, _, otherwise = init_from.partition(':')
    if start == 'auto':
        try:
            return 'resume', read_latest(out_dir)
        except FileNotFoundError:
            return otherwise or 'scratch', None
        except ValueError as error:
            print(f"{error}; starting afresh", flush=True)
            return otherwise or 'scratch', None
    if init_from == 'resume':
        return init_from, read_latest(out_dir)
    # A misspelt name is told before any data is prepared.
    if (
        init_from != 'scratch'
        and init_from not in huggingface.OPENAI
        and not os.path.lexists(init_from)
    ):
        raise _no_model(Path(init_from))
    return init_from, None


def read_latest(out_dir):
    """The newest state in out_dir that verifies, saying what was passed over. Raises
    FileNotFoundError, ValueError."""
    candidates = [p for name in RESUMABLE if os.path.lexists(p := Path(out_dir, name))]
    if not candidates:
        near = _nearest_run(out_dir)
        hint = f"; the nearest is {near!r}" if near else ''
        raise FileNotFoundError(f"out_dir={str(out_dir)!r} has no ckpt.pt to resume from{hint}")
    return _first_good(candidates, 'resuming from', _read_resumable)


def _nearest_run(folder, names=()):
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


def _first_good(paths, doing, read=read):
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


def settings(state):
    """The settings that a run goes on with: its config, without what belongs to the machine or the
    place it ran at."""
    config = {
        k: v for k, v in state['config'].items() if k not in ('out_dir', 'init_from', 'model')
    }
    # nanoGPT's: it kept wishes, and computed in float32 where there was no CUDA
    if 'model_name' not in state:
        config.pop('compile', None)
        if not str(config.get('device')).startswith('cuda'):
            config.pop('dtype', None)
    return config


def adopt(config, given, kept, whose, free):
    """Take the settings `kept`, which a trained model brings, into `config`, unless given; returns
    what changed.

    given: {key: where it was set}. Raises ValueError where others are asked for, `free` ones
    excepted.
    """
    for key in given.keys() & kept.keys() - free:
        if config[key] != kept[key]:
            raise ValueError(
                f"{whose} has {key}={kept[key]!r}, {given[key]} asks for {config[key]!r}: leave it out"
            )
    changes = {k: v for k, v in kept.items() if k in config and k not in given}
    for key, value in changes.items():
        own = type(config[key])
        kinds = (
            (str, bool, *NUMBER) if config[key] == 'auto' else NUMBER if own is float else (own,)
        )
        if type(value) not in kinds:
            raise ValueError(f"{whose} is damaged: there, {key} is {str(value)[:40]!r}")
    config.update(changes)
    return changes


def adopt_run(config, given, state, out_dir):
    """`adopt` what the run in out_dir, of which `state` is, had: of its model all, of its settings
    what isn't given."""
    if any(config[key] != state['config'].get(key, config[key]) for key in NOISE & given.keys()):
        # what it has seen tells nothing about these losses
        state.get('progress', {}).pop('guard', None)
    name = state.get('model_name', 'gpt')
    changes = adopt(config, given, {'model': name}, out_dir, models.FREE)
    fields = dataclasses.fields(models.architecture(name).Config)
    args = {field.name: field.default for field in fields}  # of fields newer than the run
    changes |= adopt(config, given, args | state['model_args'], out_dir, models.FREE)
    return changes | adopt(config, given, settings(state), out_dir, config.keys())


def model_config(values):
    """The Config class of the model that train.py's settings are about: that of the run in a folder
    that they start from.

    Raises ValueError where they ask for what it does not have.
    """
    name, init_from = values['model'], values['init_from']
    folder = (
        values['out_dir']
        if init_from == 'resume' or init_from.split(':')[0] == 'auto'
        else init_from
    )
    # what is wrong is said later
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        if folder == init_from or any(os.path.lexists(Path(folder, file)) for file in RESUMABLE):
            name = json.loads(Path(folder, 'config.json').read_text(encoding='utf-8'))['model']
    Config = models.architecture(name).Config
    for key in ('bias', 'dropout'):
        if values.get(key) and key not in {field.name for field in dataclasses.fields(Config)}:
            raise ValueError(f"model={name} has no {key}: leave out {key}={values[key]}")
    return Config


def take_up(state, model, optimizer, scaler):
    """Put a checkpoint's weights and moments in their places; returns (iter_num, best_val_loss,
    progress).

    Of no state it is where a run begins. Raises ValueError where they are of something else.
    """
    if not state:
        return 0, math.inf, dict(PROGRESS)
    if hasattr(model, 'set_requires_gradient_sync'):
        from training import fsdp

        fsdp.load(state, model, optimizer)
    else:
        model.load_state_dict(_weights(state))
        if optimizer:
            optimizers.load(optimizer, state['optimizer'])
    scaler.load_state_dict(state.get('scaler') or scaler.state_dict())
    return (
        int(state['iter_num']),
        float(state['best_val_loss']),
        PROGRESS | state.get('progress', {}),
    )


def _weights(state):
    """The weights in a checkpoint by the model's own names. What lies in parts beside it comes into
    `state`, all of it."""
    if shards := state.pop('shards', None):
        from training import fsdp

        state.update(fsdp.whole(shards['out_dir'], shards))
    weights = {k.removeprefix('_orig_mod.'): v for k, v in state['model'].items()}
    # nanoGPT's; on old torch versions it kept its causal mask among the weights
    if 'model_name' not in state:
        weights = {k: v for k, v in weights.items() if not k.endswith('.attn.bias')}
    return weights


def restore(state, settings=None, in_parts=False):
    """(model, tokenizer description or None) of a checkpoint's content, on the CPU. nanoGPT's
    checkpoints work too. Of a run with lora_rank it is the model as it trains; the model's
    `template` is the chat template of the run's data.

    settings: train.py's; of them it takes the Config fields that may change (models.FREE), such as
    dropout. in_parts: leave weights that lie in parts beside the checkpoint to `take_up`.
    """
    Model = models.architecture(state.get('model_name', 'gpt'))
    is_apart = in_parts and 'shards' in state
    weights = {} if is_apart else _weights(state)
    free = _free(Model.Config, settings)
    if 'batchnorm' in free and bool(free['batchnorm']) != bool(state['model_args']['batchnorm']):
        raise ValueError(
            f"batchnorm={free['batchnorm']!r}: the run has {state['model_args']['batchnorm']!r}, and with or "
            "without it are different weights: leave it out"
        )
    try:
        most = (
            None if is_apart else (1 << 20) + 8 * sum(weight.numel() for weight in weights.values())
        )
        model = models.make(Model, Model.Config(**state['model_args'] | free), most)
        lora.add(model, state['config'].get('lora_rank', 0) if is_apart else lora.rank_of(weights))
        if not is_apart:
            model.load_state_dict(weights)
    except (TypeError, RuntimeError, AttributeError, ArithmeticError, LookupError) as error:
        raise ValueError(
            f"the checkpoint's weights and model_args are not a {Model.__name__}'s: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None
    description = state.get('tokenizer')
    if not description and 'model_name' not in state:
        config = state.get('config')
        folder = folders.DATA_FOLDER / str(
            config.get('dataset', '') if isinstance(config, dict) else ''
        )
        description, vocab_size = read_meta(folder)[:2]
        if vocab_size > model.config.vocab_size:  # the folder is gone, and the model not GPT-2's
            description = None
    model.template = state.get('template')
    return model, description


def check_tokenizer(model, trained_on, data, whose):
    """Raises ValueError where the dataset `data` has other ids than `model`, by the tokenizer
    `trained_on`, learned.

    Of a model whose tokenizer is not known only the size of the vocabulary can be compared, and a
    line says so.
    """
    entries = model.config.vocab_size
    if data.vocab_size > entries or (data.tokenizer and trained_on not in (None, data.tokenizer)):
        raise ValueError(
            f"{data.folder} was prepared with another tokenizer ({data.vocab_size} entries) than the model of "
            f"{whose}"
        )
    if trained_on or not data.tokenizer:
        return
    if entries not in (data.vocab_size, padded_vocab_size(data.vocab_size)):
        raise ValueError(
            f"{data.folder} has a tokenizer of {data.vocab_size} entries, the model of {whose} has "
            f"{entries} and does not say which tokenizer they belong to: use the dataset that it was "
            "trained on"
        )
    if os.environ.get('RANK', '0') == '0':
        print(
            f"{whose} does not say which tokenizer its {entries} ids belong to; assuming those of "
            f"{data.folder}",
            flush=True,
        )


def padded_vocab_size(vocab_size):
    """How many entries a new model has for a vocabulary: from 1000 on a multiple of 64, for
    speed."""
    if vocab_size < 1000:
        return vocab_size
    return 64 * math.ceil(vocab_size / 64)


def _free(Config, settings):
    return {
        f.name: settings[f.name]
        for f in dataclasses.fields(Config)
        if f.name in models.FREE & (settings or {}).keys()
    }


def open_model(source, settings=None):
    """(model, tokenizer description or None) from an out_dir, a checkpoint, a Hugging Face folder
    or .safetensors file, or an OpenAI name. What a run learned by LoRA is merged into its weights.

    From an out_dir: the best weights, or the latest where its run had always_save_checkpoint.
    Raises ValueError, OSError.
    """
    path = Path(source)
    is_weights = path.suffix == '.safetensors'
    if path.is_file() and not is_weights:
        return _merged(read(path), settings)
    names = [name for name in _preference(path) if os.path.lexists(path / name)]
    if names:
        return _merged(_first_good([path / name for name in names], 'taking'), settings)
    if (path / 'metrics.jsonl').exists():
        raise FileNotFoundError(f"{source!r} holds a run that has saved no checkpoint yet")
    folder = path.parent if is_weights else path
    if not (folder / 'config.json').exists() and source not in huggingface.OPENAI:
        raise _no_model(folder)
    name, fields, weights = huggingface.read(source)
    Model = models.architecture(name)
    most = (1 << 20) + 8 * sum(weight.numel() for weight in weights.values() if weight is not None)
    model = models.make(Model, Model.Config(**fields | _free(Model.Config, settings)), most)
    huggingface.fill(model, weights, source)
    return model, tokenizer_files.from_files(folder) or (
        dict(tokenizer.GPT2) if model.config.vocab_size == 50257 else None
    )


def _no_model(folder):
    """The error for a source of weights that is neither a folder with a model nor a known name."""
    names = huggingface.OPENAI
    what = "does not exist"
    if folder.is_dir():
        what = "holds no checkpoint (best.pt, ckpt.pt) and no Hugging Face model"
    near = _nearest_run(folder, [*names, 'scratch', 'resume', 'auto'])
    if near:
        what += f"; the nearest is {near!r}"
    return FileNotFoundError(
        f"{str(folder)!r} {what}; the names that need no folder are {', '.join(names)}, and for "
        "train.py scratch, resume, auto"
    )


def _merged(state, settings):
    model, description = restore(state, settings)
    return lora.merge(model), description


def _preference(folder):
    try:
        latest = json.loads((folder / 'config.json').read_text(encoding='utf-8'))[
            'always_save_checkpoint'
        ]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        latest = False
    return (
        ('ckpt.pt', 'ckpt.prev.pt', 'best.pt') if latest else ('best.pt', 'ckpt.pt', 'ckpt.prev.pt')
    )


def dataset_of(out_dir):
    """What the run in out_dir was trained on. Raises ValueError where its config.json does not
    say."""
    try:
        return json.loads(Path(out_dir, 'config.json').read_text(encoding='utf-8'))['dataset']
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(
            f"{out_dir}/config.json does not say what the run was trained on: give --dataset, a folder in "
            "data/ or a text file"
        ) from None


def no_tokenizer(source, model):
    """What to say where text is asked of a model whose source has no tokenizer."""
    return (
        f"{source} does not say which tokenizer its {model.config.vocab_size} ids belong to, so it "
        "can't read or write text: a run gets its tokenizer from the dataset's meta.json (tokenizer) "
        "or meta.pkl (itos, one character per id)"
    )


def load_model(source, device='cpu'):
    """The model of `open_model` in eval mode on `device`, with its `tokenizer` where the source
    says which."""
    model, description = open_model(source)
    if description:
        model.tokenizer = tokenizer.load(description)
    return model.to(device).eval()
