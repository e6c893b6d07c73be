"""Trained models: from a run's out_dir, a checkpoint, a Hugging Face folder or an OpenAI name."""

import dataclasses
import json
import os
from pathlib import Path

import models
from interop import huggingface
from models.parts import construction
from text import tokenizer, tokenizer_files
from text.folders import DATA_FOLDER
from text.meta import read_meta
from training import checkpoint, lora


def load_model(source, device='cpu'):
    """The model of `open_model` in eval mode on `device`, for sampling and evaluation.

    Its attribute `tokenizer` is set if the source says which tokenizer it was trained with.
    """
    model, description = open_model(source)
    if description:
        model.tokenizer = tokenizer.load(description)
    return model.to(device).eval()


def open_model(source, settings=None):
    """Open a trained model from any source.

    source: an out_dir, a checkpoint file, a Hugging Face folder or .safetensors file, or an OpenAI
    name. Of an out_dir it is the best weights, or the latest if the run had
    always_save_checkpoint. Weights that a run trained by LoRA are merged into the matrices.
    settings: see `restore_model`.

    Returns (model on the CPU, description of its tokenizer or None). Raises ValueError, OSError.
    """
    path = Path(source)
    is_weights = path.suffix == '.safetensors'
    if path.is_file() and not is_weights:
        return _open_checkpoint(checkpoint.read(path), settings)

    paths = [path / name for name in _preferred_checkpoints(path)]
    paths = [path for path in paths if os.path.lexists(path)]
    if paths:
        return _open_checkpoint(checkpoint.first_good(paths, 'using'), settings)
    if (path / 'metrics.jsonl').exists():
        raise FileNotFoundError(f"{source!r} holds a run that has saved no checkpoint yet")

    folder = path.parent if is_weights else path
    if not (folder / 'config.json').exists() and source not in huggingface.OPENAI:
        raise no_model(folder)
    return _open_huggingface(source, folder, settings)


def _open_checkpoint(state, settings):
    """(model, description of its tokenizer or None) of a checkpoint's content, LoRA merged."""
    model, description = restore_model(state, settings)
    return lora.merge(model), description


def _open_huggingface(source, folder, settings):
    """(model, description of its tokenizer or None) of an OpenAI name or files in `folder`."""
    name, fields, weights = huggingface.read(source)
    Model = models.architecture(name)
    config = Model.Config(**fields | _changeable_fields(Model.Config, settings))
    given = [weight for weight in weights.values() if weight is not None]
    model = construction.construct(Model, config, _most_bytes(given))
    huggingface.load_weights(model, weights, source)

    description = tokenizer_files.from_files(folder)
    if not description and model.config.vocab_size == 50257:
        description = dict(tokenizer.GPT2)
    return model, description or None


def _preferred_checkpoints(out_dir):
    """The names of checkpoint files in out_dir, in the order in which sampling prefers them."""
    try:
        config = json.loads((out_dir / 'config.json').read_text(encoding='utf-8'))
        prefers_latest = config['always_save_checkpoint']
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        prefers_latest = False
    if prefers_latest:
        return 'ckpt.pt', 'ckpt.prev.pt', 'best.pt'
    return 'best.pt', 'ckpt.pt', 'ckpt.prev.pt'


def no_model(folder):
    """The FileNotFoundError for a source that is neither a folder with a model nor a known name."""
    names = huggingface.OPENAI
    problem = "does not exist"
    if folder.is_dir():
        problem = "holds no checkpoint (best.pt, ckpt.pt) and no Hugging Face model"
    near = checkpoint.nearest_run(folder, [*names, 'scratch', 'resume', 'auto'])
    if near:
        problem += f"; the nearest is {near!r}"
    return FileNotFoundError(
        f"{str(folder)!r} {problem}; the names that need no folder are {', '.join(names)}, and for "
        "train.py scratch, resume, auto"
    )


def restore_model(state, settings=None, defer_shards=False):
    """Build the model of a checkpoint's content, nanoGPT's included, with its weights.

    A run with lora_rank gives the model as it trains, with its low-rank matrices apart. The model's
    `template` is the chat template of the run's data.

    settings: train.py's, of which it uses the Config fields that may change between runs, such as
    dropout (models.FREE). defer_shards: leave weights that FSDP saved in shards to
    resume.load_training_state.

    Returns (model on the CPU, description of its tokenizer or None). Raises ValueError.
    """
    Model = models.architecture(state.get('model_name', 'gpt'))
    weights = None
    if not (defer_shards and 'shards' in state):
        weights = weights_of(state)

    args = state['model_args']
    changed = _changeable_fields(Model.Config, settings)
    if 'batchnorm' in changed and bool(changed['batchnorm']) != bool(args['batchnorm']):
        raise ValueError(
            f"batchnorm={changed['batchnorm']!r}: the run has {args['batchnorm']!r}, and models "
            "with and without it have different weights: remove this setting"
        )
    try:
        config = Model.Config(**args | changed)
        if weights is None:
            model = construction.construct(Model, config)
            lora.add(model, state['config'].get('lora_rank', 0))
        else:
            model = construction.construct(Model, config, _most_bytes(weights.values()))
            lora.add(model, lora.rank_of(weights))
            model.load_state_dict(weights)
    except (TypeError, RuntimeError, AttributeError, ArithmeticError, LookupError) as error:
        raise ValueError(
            f"the checkpoint's weights and model_args are not those of a {Model.__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from None
    model.template = state.get('template')
    return model, _tokenizer_of(state, model)


def _tokenizer_of(state, model):
    """The description of a checkpoint's tokenizer, or None where it is not known.

    nanoGPT's checkpoints have none: it is that of the dataset their config names.
    """
    description = state.get('tokenizer')
    if description or 'model_name' in state:
        return description
    config = state.get('config')
    name = ''
    if isinstance(config, dict):
        name = str(config.get('dataset', ''))
    description, vocab_size = read_meta(DATA_FOLDER / name)[:2]
    # Without a dataset, read_meta assumes GPT-2's.
    if vocab_size > model.config.vocab_size:
        return None
    return description


def weights_of(state):
    """A checkpoint's weights {name in the model: tensor}; reads those in shards into `state`."""
    shards = state.pop('shards', None)
    if shards:
        from training import fsdp

        state.update(fsdp.read_whole_state(shards['out_dir'], shards))
    weights = {name.removeprefix('_orig_mod.'): weight for name, weight in state['model'].items()}
    if 'model_name' not in state:
        # nanoGPT kept its causal mask among the weights on old versions of torch.
        weights = {
            name: weight for name, weight in weights.items() if not name.endswith('.attn.bias')
        }
    return weights


def _changeable_fields(Config, settings):
    """{field: value} of those `settings` that may differ from what the model was trained with."""
    if not settings:
        return {}
    names = {field.name for field in dataclasses.fields(Config)} & models.FREE
    return {name: value for name, value in settings.items() if name in names}


def _most_bytes(weights):
    """An upper limit on the bytes of a model with these weights: 8 for each number, and 1 MiB."""
    return (1 << 20) + 8 * sum(weight.numel() for weight in weights)


def dataset_of(out_dir):
    """The `dataset` that the run in out_dir was trained on; ValueError where config.json lacks
    it."""
    try:
        return json.loads(Path(out_dir, 'config.json').read_text(encoding='utf-8'))['dataset']
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise ValueError(
            f"{out_dir}/config.json does not say what the run was trained on: give --dataset, "
            "a folder in data/ or a text file"
        ) from None


def no_tokenizer(source, model):
    """The error message where text is asked of a model whose tokenizer is not known."""
    return (
        f"{source} does not say which tokenizer its {model.config.vocab_size} ids belong to, so it "
        "can't read or write text: a run gets its tokenizer from the dataset's meta.json "
        "(tokenizer) or meta.pkl (itos, one character per id)"
    )
