"""How a run starts: from scratch, from a trained model's settings, or from a checkpoint that it
resumes."""

import contextlib
import dataclasses
import json
import math
import os
from pathlib import Path

import models
from interop import huggingface
from training import checkpoint, pretrained
from training.optimizer import load_optimizer_state

# Settings that change how noisy the loss is. The guard's statistics are dropped when one changes.
NOISE = {
    'dataset',
    'block_size',
    'batch_size',
    'gradient_accumulation_steps',
    'document_boundaries',
    'dropout',
}


def begin(init_from, out_dir):
    """What a run starts from, and the checkpoint that it resumes.

    init_from: scratch; resume; auto, which is resume if out_dir has a good checkpoint, else
    scratch; auto:SOURCE, else SOURCE; or a source of pretrained.open_model.

    Returns (init_from without auto, the checkpoint's content or None). Raises ValueError, and
    OSError where a checkpoint can't be read, even with auto: a disk may be away for a while.
    """
    start, _, otherwise = init_from.partition(':')
    if start == 'auto':
        try:
            return 'resume', checkpoint.read_latest(out_dir)
        except FileNotFoundError:
            return otherwise or 'scratch', None
        except ValueError as error:
            print(f"{error}; starting afresh", flush=True)
            return otherwise or 'scratch', None
    if init_from == 'resume':
        return init_from, checkpoint.read_latest(out_dir)

    # A misspelt name is reported now, before any data is prepared.
    if (
        init_from != 'scratch'
        and init_from not in huggingface.OPENAI
        and not os.path.lexists(init_from)
    ):
        raise pretrained.no_model(Path(init_from))
    return init_from, None


# ---- settings ------------------------------------------------------------------------------------


def run_settings(state):
    """The settings of a checkpoint's run that a resumed run continues with.

    They exclude out_dir, init_from and model, which the resumed run knows.
    """
    config = dict(state['config'])
    for key in ('out_dir', 'init_from', 'model'):
        config.pop(key, None)
    if 'model_name' not in state:
        # nanoGPT's config has what was asked for; without CUDA it computed in float32.
        config.pop('compile', None)
        if not str(config.get('device')).startswith('cuda'):
            config.pop('dtype', None)
    return config


def adopt_settings(config, given, trained, source, free):
    """Change `config` to the settings `trained` of a model or run, except those that were given.

    given: {key: where it was set}. source: whose settings they are, for messages. free: keys that
    the user may override; overriding another one raises ValueError.
    """
    for key in (given.keys() & trained.keys()) - free:
        if config[key] != trained[key]:
            raise ValueError(
                f"{source} has {key}={trained[key]!r}, not {config[key]!r} ({given[key]}): "
                "remove this setting"
            )
    changes = {}
    for key, value in trained.items():
        if key in config and key not in given:
            if type(value) not in _types_like(config[key]):
                raise ValueError(f"{source} is damaged: its {key} is {str(value)[:40]!r}")
            changes[key] = value
    config.update(changes)


def _types_like(value):
    """The types allowed for a setting that now has `value`."""
    if value == 'auto':
        return str, bool, int, float
    if type(value) is float:
        return int, float
    return (type(value),)


def adopt_run_settings(config, given, state, out_dir):
    """Change `config` to that of the run in out_dir, whose checkpoint has the content `state`.

    The settings of its model can't be given another value, except models.FREE; all others can.
    Raises ValueError.
    """
    trained = state['config']
    for key in NOISE & given.keys():
        if config[key] != trained.get(key, config[key]):
            # The losses that the guard has seen tell nothing about the new ones.
            state.get('progress', {}).pop('guard', None)

    name = state.get('model_name', 'gpt')
    adopt_settings(config, given, {'model': name}, source=out_dir, free=models.FREE)

    # A checkpoint lacks the fields that are newer than it: they have their defaults.
    fields = dataclasses.fields(models.architecture(name).Config)
    args = {field.name: field.default for field in fields} | state['model_args']
    adopt_settings(config, given, args, source=out_dir, free=models.FREE)
    adopt_settings(config, given, run_settings(state), source=out_dir, free=config.keys())


def adopt_model_settings(config, given, model, source):
    """Change `config` to the settings of a trained model, which a new run starts from.

    They can't be given another value, except models.FREE and block_size. Raises ValueError.
    """
    trained = {'model': models.name_of(model)} | dataclasses.asdict(model.config)
    adopt_settings(config, given, trained, source, free=models.FREE | {'block_size'})


def model_config(settings):
    """The Config class of the model that train.py's `settings` start from.

    Where they resume a run or start from one, config.json in its folder names the model. Raises
    ValueError where `bias` or `dropout` are set for a model that does not have them.
    """
    name = settings['model']
    init_from = settings['init_from']
    is_resumed = init_from == 'resume' or init_from.split(':')[0] == 'auto'
    folder = settings['out_dir'] if is_resumed else init_from
    # A folder that can't be read is reported later, when it is opened.
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        checkpoints = [Path(folder, file) for file in checkpoint.RESUMABLE]
        if not is_resumed or any(os.path.lexists(path) for path in checkpoints):
            name = json.loads(Path(folder, 'config.json').read_text(encoding='utf-8'))['model']

    Config = models.architecture(name).Config
    fields = {field.name for field in dataclasses.fields(Config)}
    for key in ('bias', 'dropout'):
        if settings.get(key) and key not in fields:
            raise ValueError(f"model={name} has no {key}: remove {key}={settings[key]}")
    return Config


# ---- state ---------------------------------------------------------------------------------------


def load_training_state(state, model, optimizer, scaler):
    """Load a checkpoint's content into a run's model, optimizer and gradient scaler.

    state: as checkpoint.read_latest returns it, or None for a run that starts. optimizer: None for
    a counted model. Returns (iter_num, best_val_loss, Progress). Raises ValueError where the
    checkpoint is another model's or another optimizer's.
    """
    if not state:
        return 0, math.inf, checkpoint.Progress()
    if hasattr(model, 'set_requires_gradient_sync'):
        from training import fsdp

        fsdp.load_state(state, model, optimizer)
    else:
        model.load_state_dict(pretrained.weights_of(state))
        if optimizer:
            load_optimizer_state(optimizer, state['optimizer'])
    if state.get('scaler'):
        scaler.load_state_dict(state['scaler'])
    progress = checkpoint.Progress.load(state.get('progress', {}))
    return int(state['iter_num']), float(state['best_val_loss']), progress


# ---- vocabulary ----------------------------------------------------------------------------------


def check_tokenizer(model, trained_on, data, source):
    """Raise ValueError where the dataset `data` has other ids than the model was trained on.

    trained_on: the description of the model's tokenizer, or None where it is not known. Then only
    the size of the vocabulary can be compared, and a line says so.
    """
    entries = model.config.vocab_size
    if data.vocab_size > entries or (data.tokenizer and trained_on not in (None, data.tokenizer)):
        raise ValueError(
            f"{data.folder} was prepared with another tokenizer ({data.vocab_size} entries) than "
            f"the model of {source}"
        )
    if trained_on or not data.tokenizer:
        return
    if entries not in (data.vocab_size, padded_vocab_size(data.vocab_size)):
        raise ValueError(
            f"{data.folder} has a tokenizer of {data.vocab_size} entries, the model of {source} "
            f"has {entries} and does not say which tokenizer they belong to: use the dataset that "
            "it was trained on"
        )
    if os.environ.get('RANK', '0') == '0':
        print(
            f"{source} does not say which tokenizer its {entries} ids belong to; assuming those of "
            f"{data.folder}",
            flush=True,
        )


def padded_vocab_size(vocab_size):
    """The vocab_size of a new model: from 1000 on rounded up to a multiple of 64, for speed."""
    if vocab_size < 1000:
        return vocab_size
    return 64 * math.ceil(vocab_size / 64)
