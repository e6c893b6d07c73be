"""Hugging Face's format, both ways: a model's config, weights and tokenizer as `transformers` and
its kin read them.

CONVERTERS has the architectures that `transformers` has too, each with a class that says what its
config and weights are there.
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

# The sizes that OpenAI published, with the commits of openai-community/NAME on the Hugging Face
# Hub.
OPENAI = {
    'gpt2': '607a30d783dfa663caf39e06633721c8d4cfcd7e',
    'gpt2-medium': '6dcaa7a952f72f9298047fd5137cd6e4f05f41da',
    'gpt2-large': '32b71b12589c2f8d625668d2335a01cac3249519',
    'gpt2-xl': '15ea56dee5df4983c59b2538573817e1667135e2',
}
FILES = (
    'model.safetensors',
    'model.safetensors.index.json',
    'pytorch_model.bin',
    'pytorch_model.bin.index.json',
)


def read(source):
    """(architecture, Config fields, state dict) of an OpenAI size, a folder or a .safetensors file.

    Prints which sizes config.json leaves to transformers' defaults. Raises ValueError, OSError.
    """
    path = (
        Path(source)
        if Path(source).is_dir() or str(source).endswith('.safetensors')
        else _download(source)
    )
    folder = path.parent if path.suffix == '.safetensors' else path
    name, keys = _read_config(folder / 'config.json')
    converter = CONVERTERS[name]
    fields = converter.fields(keys)
    if keys.has('quantization_config'):
        keys.refuse('quantization_config', "is not supported: use the weights as they were trained")
    if keys.problems:
        problems = '; '.join(keys.problems)
        raise ValueError(f"{folder / 'config.json'} can't be loaded as --model={name}: {problems}")
    stored = _weights(path)
    _check_depth(stored, converter.sizes['n_layer'][0], keys, path)
    if keys.assumed:
        defaults = ', '.join(f'{key}={default}' for key, default in keys.assumed.items())
        missing = ', '.join(keys.assumed)
        _notice(f"{folder}/config.json lacks {missing}: using transformers' {defaults}")
    try:
        state = converter.state(stored, keys, fields)
    except RuntimeError as error:  # torch's, of other shapes
        reason = ' '.join(str(error).split())[:120]
        raise ValueError(f"{path}: weights don't fit its config.json ({reason})") from None
    if fields['tied']:
        _tie_head(state, keys, fields, path)
    return name, fields, state


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


def _check_depth(stored, key, keys, path):
    """ValueError where the weights are of more or fewer layers than config.json says with `key`."""
    matches = (re.search(r'(?:^|\.)(?:h|layers)\.(\d+)\.', name) for name in stored)
    n_layer = len({match[1] for match in matches if match})
    expected = keys.assumed.get(key) or keys.config[key]
    if n_layer != expected:
        says = f"says {key}={expected}"
        if key in keys.assumed:
            says = f"lacks {key}, for which transformers uses {expected}"
        raise ValueError(f"{path} has the weights of {n_layer} layers, and its config.json {says}")


def _tie_head(state, keys, fields, path):
    """Put the embeddings' table into the dict `state` as the head. A stored head that differs from
    it stays instead, and unties the model, as transformers does it: then fields['tied'] becomes
    False.
    """
    table = state.get('transformer.wte.weight')
    head = state.setdefault('lm_head.weight', table)
    if table is None or head is table or _are_equal(head, table):
        return  # without a table, `load_weights` says that it is missing
    fields['tied'] = False
    says = "lacks tie_word_embeddings, for which transformers uses true"
    if keys.has('tie_word_embeddings'):
        says = "says tie_word_embeddings=true"
    _notice(
        f"{path} stores an lm_head.weight that differs from the embeddings, although its "
        f"config.json {says}: using both, as transformers does (tied=False)"
    )


def _are_equal(a, b):
    """Whether two tensors, perhaps of different dtypes, have the same shape and numbers."""
    return a.shape == b.shape and bool((a == b).all())


def _notice(text):
    """Print a line, once for all processes of a run."""
    if os.environ.get('RANK', '0') == '0':
        print(text, flush=True)


def load_weights(model, weights, source):
    """Put the state dict that `read` got from `source` into `model`. Raises ValueError unless it is
    its own."""
    own = model.state_dict()
    missing = [name for name in own if weights.get(name) is None]
    unknown = [name for name in weights if name not in own]
    shared = [name for name in own if name not in missing]
    unfit = [name for name in shared if weights[name].shape != own[name].shape]
    reasons = []
    if unfit:
        there, here = tuple(weights[unfit[0]].shape), tuple(own[unfit[0]].shape)
        reasons.append(f"{unfit[0]} has the shape {there}, by config.json {here}")
    if missing:
        reasons.append(f"missing: {_some(missing)}")
    if unknown:
        reasons.append(f"not in a model of this config.json: {_some(unknown)}")
    if reasons:
        count = len(unfit) + len(missing) + len(unknown)
        raise ValueError(
            f"{source}: {count} weights are missing or don't fit its config.json: "
            f"{'; '.join(reasons)}"
        )
    model.load_state_dict(weights)


def _some(names):
    """The first three of the names, and how many more there are."""
    more = len(names) - 3
    return ', '.join(names[:3]) + (f" and {more} more" if more > 0 else '')


def _download(name):
    """The folder with config.json and model.safetensors of an OpenAI size; NANOGPT_MIRROR may hold
    it as NAME/."""
    if name not in OPENAI:
        raise ValueError(f"{name!r} is neither a folder nor one of {', '.join(OPENAI)}")
    if folder := hub.mirror_folder(name):
        return folder
    try:
        for file in ('config.json', 'model.safetensors'):
            path = hub.download(f'openai-community/{name}', file, OPENAI[name])
    except OSError as error:
        raise OSError(
            f"{error}; or put config.json and model.safetensors of {name} into a folder and give that as "
            "--init_from"
        ) from None
    return path.parent


def _weights(path):
    """{name: tensor} of a file, or of a folder: of the one file there, or of those that its index
    names."""
    if path.is_dir():
        there = [path / name for name in FILES if (path / name).is_file()]
        if not there:
            raise FileNotFoundError(f"{path} has no {FILES[0]} or {FILES[2]}")
        path = there[0]
    try:
        if path.suffix == '.bin':
            found = torch.load(path, map_location='cpu', weights_only=True)
            if not all(
                isinstance(name, str) and isinstance(tensor, torch.Tensor)
                for name, tensor in found.items()
            ):
                raise ValueError("it holds something other than tensors with names")
            return dict(found)
        if path.suffix != '.json':
            return safetensors.torch.load_file(path)
        names = sorted(set(json.loads(path.read_bytes())['weight_map'].values()))
        if wrong := [
            name
            for name in names
            if not name.endswith(('.safetensors', '.bin'))
            or '..' in Path(name).parts
            or Path(name).is_absolute()
        ]:
            raise ValueError(f"it names {wrong[0]!r}, which is no file of weights in this folder")
        shards = [path.parent / name for name in names]
    except Exception as error:  # each format's own errors
        reason = ' '.join(str(error).split())[:120]
        raise ValueError(
            f"{path} is damaged or not plain weights ({type(error).__name__}: {reason})"
        ) from None
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(
                f"{shard} is missing, one of {len(shards)} files that {path} names"
            )
    return {name: tensor for shard in shards for name, tensor in _weights(shard).items()}


def to_files(model, name, dtype):
    """({file: text or JSON}, {name: tensor}) of a model of the architecture `name`, padded ids left
    out. ValueError."""
    if name not in CONVERTERS:
        raise ValueError(
            f"Hugging Face's format has no model like {name!r}: train one with --model={' or '.join(CONVERTERS)}"
        )
    converter, c, own = CONVERTERS[name], model.config, model.tokenizer
    vocab_size, eot = (
        min(own.vocab_size, c.vocab_size) if own else c.vocab_size,
        getattr(own, 'eot', None),
    )
    ends = {'bos_token_id': eot, 'eos_token_id': eot}
    files = {
        'config.json': {
            'architectures': [converter.architecture],
            'model_type': converter.model_type,
            **converter.config(c),
            'vocab_size': vocab_size,
            **ends,
            'torch_dtype': dtype,
        },
        'generation_config.json': {**ends, 'pad_token_id': eot},
    }
    files |= tokenizer_files.to_files(own, c.block_size) if own else {}
    weights = converter.stored(model.state_dict(), c, vocab_size)
    return files, {k: v.to(getattr(torch, dtype)).contiguous() for k, v in weights.items()}
