"""Hugging Face's format, both ways: folders with a config.json, weights and a tokenizer, as
`transformers` and what builds on it read and write them.

What an architecture's config and weights are called there stands in huggingface_models.py.
"""

import json
import os
import re
from pathlib import Path

import safetensors.torch
import torch

from interop.huggingface_models import CONVERTERS, shortened
from system import hub
from text import tokenizer_files

# The sizes that OpenAI published, and the commits of openai-community/NAME on the Hugging Face Hub.
OPENAI = {
    'gpt2': '607a30d783dfa663caf39e06633721c8d4cfcd7e',
    'gpt2-medium': '6dcaa7a952f72f9298047fd5137cd6e4f05f41da',
    'gpt2-large': '32b71b12589c2f8d625668d2335a01cac3249519',
    'gpt2-xl': '15ea56dee5df4983c59b2538573817e1667135e2',
}
# The files that a folder may keep weights in, in the order in which they are looked for.
FILES = (
    'model.safetensors',
    'model.safetensors.index.json',
    'pytorch_model.bin',
    'pytorch_model.bin.index.json',
)


# ---- reading -------------------------------------------------------------------------------------


def read(source):
    """(architecture, Config fields, state dict) of an OpenAI size, a folder or a .safetensors file.

    Prints which sizes config.json leaves to transformers' defaults. Raises ValueError, OSError.
    """
    if Path(source).is_dir() or str(source).endswith('.safetensors'):
        path = Path(source)
    else:
        path = _download(source)
    folder = path.parent if path.suffix == '.safetensors' else path

    name, keys = _read_config(folder / 'config.json')
    converter = CONVERTERS[name]
    fields = converter.import_config(keys)
    if keys.has('quantization_config'):
        keys.refuse('quantization_config', "is not supported: use the weights as they were trained")
    if keys.problems:
        problems = '; '.join(keys.problems)
        raise ValueError(f"{folder / 'config.json'} can't be loaded as --model={name}: {problems}")

    stored = _read_weights(path)
    _check_depth(stored, converter.sizes['n_layer'][0], keys, path)
    if keys.assumed:
        defaults = ', '.join(f'{key}={default}' for key, default in keys.assumed.items())
        missing = ', '.join(keys.assumed)
        _notice(f"{folder}/config.json lacks {missing}: using transformers' {defaults}")
    try:
        state = converter.import_weights(stored, keys, fields)
    except RuntimeError as error:  # torch's, where shapes don't match
        reason = _one_line(error)
        raise ValueError(f"{path}: weights don't fit its config.json ({reason})") from None
    if fields['tied']:
        _tie_head(state, keys, fields, path)
    return name, fields, state


def _download(name):
    """The folder with config.json and model.safetensors of an OpenAI size: of the Hub, or the
    folder NAME of NANOGPT_MIRROR."""
    if name not in OPENAI:
        raise ValueError(f"{name!r} is neither a folder nor one of {', '.join(OPENAI)}")
    folder = hub.mirror_folder(name)
    if folder:
        return folder
    try:
        for file in ('config.json', 'model.safetensors'):
            path = hub.download(f'openai-community/{name}', file, OPENAI[name])
    except OSError as error:
        raise OSError(
            f"{error}; or put config.json and model.safetensors of {name} into a folder and use "
            "that as --init_from"
        ) from None
    return path.parent


def _read_config(path):
    """(architecture, Keys) of a config.json in any Unicode encoding. Raises ValueError, OSError."""
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if type(config) is not dict:
        raise ValueError(f"{path} can't be used: it holds a {type(config).__name__}, not an object")
    known = {converter.model_type: name for name, converter in CONVERTERS.items()}
    supported = ' and '.join(f"{theirs} (as --model={ours})" for theirs, ours in known.items())
    if 'model_type' not in config:
        raise ValueError(f"{path} can't be used: model_type is missing; supported are {supported}")
    model_type = config['model_type']
    if type(model_type) is not str or model_type not in known:
        raise ValueError(
            f"{path} can't be used: model_type={shortened(model_type)} is not "
            f"supported, only {supported}"
        )
    name = known[model_type]
    return name, CONVERTERS[name].keys(config)


def _read_weights(path):
    """{name: tensor} of a file, or of the first of FILES in a folder. An index is a JSON file that
    names the files which hold the tensors."""
    if path.is_dir():
        present = [path / name for name in FILES if (path / name).is_file()]
        if not present:
            raise FileNotFoundError(f"{path} has no {FILES[0]} or {FILES[2]}")
        path = present[0]
    try:
        if path.suffix == '.bin':
            return _read_pytorch_file(path)
        if path.suffix != '.json':
            return safetensors.torch.load_file(path)
        shards = _read_index(path)
    except Exception as error:  # each format raises errors of its own
        reason = _one_line(error)
        raise ValueError(
            f"{path} is damaged or not plain weights ({type(error).__name__}: {reason})"
        ) from None

    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(
                f"{shard} is missing, one of {len(shards)} files that {path} names"
            )
    weights = {}
    for shard in shards:
        weights |= _read_weights(shard)
    return weights


def _read_pytorch_file(path):
    """{name: tensor} of a .bin file, of which nothing is executed. Raises ValueError where it holds
    anything else."""
    weights = dict(torch.load(path, map_location='cpu', weights_only=True).items())
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ValueError("it holds something other than tensors with names")
    return weights


def _read_index(path):
    """The paths of the files that an index names, which must lie in its folder."""
    weight_map = json.loads(path.read_bytes())['weight_map']
    names = sorted(set(weight_map.values()))
    for name in names:
        is_outside = '..' in Path(name).parts or Path(name).is_absolute()
        if is_outside or not name.endswith(('.safetensors', '.bin')):
            raise ValueError(f"it names {name!r}, which is not a file of weights in this folder")
    return [path.parent / name for name in names]


def _check_depth(stored, key, keys, path):
    """Raise ValueError unless the weights have as many layers as config.json says in `key`."""
    layers = set()
    for name in stored:
        match = re.search(r'(?:^|\.)(?:h|layers)\.(\d+)\.', name)
        if match:
            layers.add(match[1])
    n_layer = len(layers)
    expected = keys.assumed.get(key) or keys.config[key]
    if n_layer != expected:
        says = f"says {key}={expected}"
        if key in keys.assumed:
            says = f"lacks {key}, for which transformers uses {expected}"
        raise ValueError(f"{path} has the weights of {n_layer} layers, and its config.json {says}")


def _tie_head(state, keys, fields, path):
    """Make the embeddings' table in the dict `state` the head too.

    If a head is stored that differs from the table, it stays and the model becomes untied, with
    fields['tied'] = False, as in transformers.
    """
    table = state.get('transformer.wte.weight')
    head = state.setdefault('lm_head.weight', table)
    if table is None or head is table or _are_equal(head, table):
        return  # without a table, load_weights says that it is missing
    fields['tied'] = False
    says = "lacks tie_word_embeddings, for which transformers uses true"
    if keys.has('tie_word_embeddings'):
        says = "says tie_word_embeddings=true"
    _notice(
        f"{path} stores an lm_head.weight that differs from the embeddings, although its "
        f"config.json {says}: using both, as transformers does (tied=False)"
    )


def _are_equal(a, b):
    """Whether two tensors have the same shape and numbers, in whatever dtypes."""
    return a.shape == b.shape and bool((a == b).all())


def _notice(text):
    """Print a line, once for all processes of a run."""
    if os.environ.get('RANK', '0') == '0':
        print(text, flush=True)


def _one_line(error):
    """The beginning of an error's text, without line breaks."""
    return ' '.join(str(error).split())[:120]


def load_weights(model, weights, source):
    """Load the state dict that `read` got from `source` into `model`. Raises ValueError unless
    names and shapes are the model's."""
    state = model.state_dict()
    missing = [name for name in state if weights.get(name) is None]
    unknown = [name for name in weights if name not in state]
    shared = [name for name in state if name not in missing]
    misshapen = [name for name in shared if weights[name].shape != state[name].shape]
    reasons = []
    if misshapen:
        name = misshapen[0]
        there = tuple(weights[name].shape)
        here = tuple(state[name].shape)
        reasons.append(f"{name} has the shape {there}, by config.json {here}")
    if missing:
        reasons.append(f"missing: {_first_three(missing)}")
    if unknown:
        reasons.append(f"not in a model of this config.json: {_first_three(unknown)}")
    if reasons:
        count = len(misshapen) + len(missing) + len(unknown)
        raise ValueError(
            f"{source}: {count} weights are missing or don't fit its config.json: "
            f"{'; '.join(reasons)}"
        )
    model.load_state_dict(weights)


def _first_three(names):
    """The first three of the names, and how many more there are."""
    text = ', '.join(names[:3])
    n_more = len(names) - 3
    if n_more > 0:
        text += f" and {n_more} more"
    return text


# ---- writing -------------------------------------------------------------------------------------


def to_files(model, name, dtype):
    """({file: text or JSON}, {name: tensor}) of a model of the architecture `name`, its weights in
    dtype, without the ids that are padding. Raises ValueError."""
    if name not in CONVERTERS:
        raise ValueError(
            f"Hugging Face's format has no model like {name!r}: train one with "
            f"--model={' or '.join(CONVERTERS)}"
        )
    converter = CONVERTERS[name]
    config = model.config
    tokenizer = model.tokenizer
    vocab_size = config.vocab_size
    if tokenizer:
        vocab_size = min(tokenizer.vocab_size, vocab_size)
    eot = getattr(tokenizer, 'eot', None)
    ends = {'bos_token_id': eot, 'eos_token_id': eot}
    files = {
        'config.json': {
            'architectures': [converter.architecture],
            'model_type': converter.model_type,
            **converter.export_config(config),
            'vocab_size': vocab_size,
            **ends,
            'torch_dtype': dtype,
        },
        'generation_config.json': {**ends, 'pad_token_id': eot},
    }
    if tokenizer:
        files |= tokenizer_files.to_files(tokenizer, config.block_size)
    stored = converter.export_weights(model.state_dict(), config, vocab_size)
    torch_dtype = getattr(torch, dtype)
    weights = {name: value.to(torch_dtype).contiguous() for name, value in stored.items()}
    return files, weights
