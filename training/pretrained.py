"""Trained models: from a checkpoint, an out_dir, a Hugging Face folder or an OpenAI name."""

import dataclasses
import json
import os
from pathlib import Path

import models
from interop import huggingface
from models.parts import construction
from text import dataset, tokenizer, tokenizer_files
from training import checkpoint, lora


def load_model(source, device='cpu'):
    """The model of `open_model` in eval mode on `device`, with its `tokenizer` where the source
    says which."""
    model, description = open_model(source)
    if description:
        model.tokenizer = tokenizer.load(description)
    return model.to(device).eval()


def open_model(source, settings=None):
    """(model, tokenizer description or None) from an out_dir, a checkpoint, a Hugging Face folder
    or .safetensors file, or an OpenAI name. What a run learned by LoRA is merged into its weights.

    From an out_dir: the best weights, or the latest where its run had always_save_checkpoint.
    Raises ValueError, OSError.
    """
    path = Path(source)
    is_weights = path.suffix == '.safetensors'
    if path.is_file() and not is_weights:
        return _merged(checkpoint.read(path), settings)
    names = [name for name in _preference(path) if os.path.lexists(path / name)]
    if names:
        return _merged(checkpoint.first_good([path / name for name in names], 'taking'), settings)
    if (path / 'metrics.jsonl').exists():
        raise FileNotFoundError(f"{source!r} holds a run that has saved no checkpoint yet")
    folder = path.parent if is_weights else path
    if not (folder / 'config.json').exists() and source not in huggingface.OPENAI:
        raise no_model(folder)
    name, fields, weights = huggingface.read(source)
    Model = models.architecture(name)
    most = (1 << 20) + 8 * sum(weight.numel() for weight in weights.values() if weight is not None)
    model = construction.construct(
        Model, Model.Config(**fields | _free(Model.Config, settings)), most
    )
    huggingface.load_weights(model, weights, source)
    return model, tokenizer_files.from_files(folder) or (
        dict(tokenizer.GPT2) if model.config.vocab_size == 50257 else None
    )


def _merged(state, settings):
    model, description = restore_model(state, settings)
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


def no_model(folder):
    """The error for a source of weights that is neither a folder with a model nor a known name."""
    names = huggingface.OPENAI
    what = "does not exist"
    if folder.is_dir():
        what = "holds no checkpoint (best.pt, ckpt.pt) and no Hugging Face model"
    near = checkpoint.nearest_run(folder, [*names, 'scratch', 'resume', 'auto'])
    if near:
        what += f"; the nearest is {near!r}"
    return FileNotFoundError(
        f"{str(folder)!r} {what}; the names that need no folder are {', '.join(names)}, and for "
        "train.py scratch, resume, auto"
    )


def restore_model(state, settings=None, in_parts=False):
    """(model, tokenizer description or None) of a checkpoint's content, on the CPU. nanoGPT's
    checkpoints work too. Of a run with lora_rank it is the model as it trains; the model's
    `template` is the chat template of the run's data.

    settings: train.py's; of them it takes the Config fields that may change (models.FREE), such as
    dropout. in_parts: leave weights that lie in parts beside the checkpoint to resume.load_training_state.
    """
    Model = models.architecture(state.get('model_name', 'gpt'))
    is_apart = in_parts and 'shards' in state
    weights = {} if is_apart else weights_of(state)
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
        model = construction.construct(Model, Model.Config(**state['model_args'] | free), most)
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
        folder = dataset.ROOT / str(config.get('dataset', '') if isinstance(config, dict) else '')
        description, vocab_size = dataset.read_meta(folder)[:2]
        if vocab_size > model.config.vocab_size:  # the folder is gone, and the model not GPT-2's
            description = None
    model.template = state.get('template')
    return model, description


def weights_of(state):
    """The weights in a checkpoint by the model's own names. What lies in parts beside it comes into
    `state`, all of it."""
    if shards := state.pop('shards', None):
        from training import fsdp

        state.update(fsdp.read_whole_state(shards['out_dir'], shards))
    weights = {k.removeprefix('_orig_mod.'): v for k, v in state['model'].items()}
    # nanoGPT's; on old torch versions it kept its causal mask among the weights
    if 'model_name' not in state:
        weights = {k: v for k, v in weights.items() if not k.endswith('.attn.bias')}
    return weights


def _free(Config, settings):
    return {
        f.name: settings[f.name]
        for f in dataclasses.fields(Config)
        if f.name in models.FREE & (settings or {}).keys()
    }


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
