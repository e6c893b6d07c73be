"""What a run starts from: a checkpoint whose settings and state it continues with, or a trained
model."""

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

# What the noise in the losses depends on, which the guard measures.
NOISE = {
    'dataset',
    'block_size',
    'batch_size',
    'gradient_accumulation_steps',
    'document_boundaries',
    'dropout',
}


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
            return 'resume', checkpoint.read_latest(out_dir)
        except FileNotFoundError:
            return otherwise or 'scratch', None
        except ValueError as error:
            print(f"{error}; starting afresh", flush=True)
            return otherwise or 'scratch', None
    if init_from == 'resume':
        return init_from, checkpoint.read_latest(out_dir)
    # A misspelt name is told before any data is prepared.
    if (
        init_from != 'scratch'
        and init_from not in huggingface.OPENAI
        and not os.path.lexists(init_from)
    ):
        raise pretrained.no_model(Path(init_from))
    return init_from, None


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
            (str, bool, *checkpoint.NUMBER)
            if config[key] == 'auto'
            else checkpoint.NUMBER
            if own is float
            else (own,)
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
        if folder == init_from or any(
            os.path.lexists(Path(folder, file)) for file in checkpoint.RESUMABLE
        ):
            name = json.loads(Path(folder, 'config.json').read_text(encoding='utf-8'))['model']
    Config = models.architecture(name).Config
    for key in ('bias', 'dropout'):
        if values.get(key) and key not in {field.name for field in dataclasses.fields(Config)}:
            raise ValueError(f"model={name} has no {key}: leave out {key}={values[key]}")
    return Config


def load_training_state(state, model, optimizer, scaler):
    """Put a checkpoint's weights and moments in their places; returns (iter_num, best_val_loss,
    progress).

    Of no state it is where a run begins. Raises ValueError where they are of something else.
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
    scaler.load_state_dict(state.get('scaler') or scaler.state_dict())
    return (
        int(state['iter_num']),
        float(state['best_val_loss']),
        checkpoint.Progress.load(state.get('progress', {})),
    )


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
