"""Reads what a dataset's folder says about its bins: meta.json, or nanoGPT's meta.pkl."""

import json

from text.meta_pkl import describe_meta_pkl
from text.tokenizer import GPT2, check_description


def read_meta(folder):
    """(tokenizer description or None, vocab_size, dtype, meta) from a folder's meta.json or
    nanoGPT's meta.pkl; without either, GPT-2's.

    meta is what meta.json holds; where there is no tokenizer, its `no_tokenizer` says why.
    Raises ValueError.
    """
    if (folder / 'meta.json').is_file():
        return _read_meta_json(folder / 'meta.json')
    if (folder / 'meta.pkl').is_file():
        return _read_meta_pkl(folder / 'meta.pkl')
    return dict(GPT2), 50257, 'uint16', {}


def _read_meta_json(path):
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
        _check_meta(meta)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error})") from None
    if not meta['tokenizer']:
        meta['no_tokenizer'] = f"{path} names no tokenizer"
    return meta['tokenizer'], meta['vocab_size'], meta['dtype'], meta


def _check_meta(meta):
    """Raise an error, of whatever class, if a value of meta.json is missing or can't be."""
    vocab_size = meta['vocab_size']
    if meta['dtype'] not in ('uint16', 'uint32') or type(vocab_size) is not int:
        raise ValueError(f"dtype {meta['dtype']!r}, vocab_size {vocab_size!r}")
    for facts in meta.get('splits', {}).values():
        if type(facts['tokens']) is not int or not 0 < facts.get('bytes', 1) < 1 << 63:
            raise ValueError("splits")
    limits = {'vocab_size': 1 << 32, 'separator': vocab_size, 'eot': vocab_size}
    for key, limit in limits.items():
        number = meta.get(key, 0)
        if type(number) is not int or not 0 <= number < max(1, limit):
            raise ValueError(f"{key} {number!r}")
    if meta['tokenizer']:
        check_description(meta['tokenizer'])


def _read_meta_pkl(path):
    try:
        description, vocab_size, problem = describe_meta_pkl(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path.parent}: {error}") from None
    meta = {}
    if problem:
        meta['no_tokenizer'] = f"{path} {problem}"
    return description, vocab_size, 'uint16', meta
