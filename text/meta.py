"""What a dataset's folder says of its bins: meta.json, or nanoGPT's meta.pkl."""

import json

from text.meta_pkl import describe_meta_pkl
from text.tokenizer import GPT2, check_description


def read_meta(folder):
    """(tokenizer description or None, vocab_size, dtype, meta) by meta.json or nanoGPT's meta.pkl;
    without either, GPT-2's.

    meta is what meta.json holds; where there is no tokenizer, its `no_tokenizer` says why.
    Raises ValueError.
    """
    if (folder / 'meta.json').is_file():
        try:
            meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
            if meta['dtype'] not in ('uint16', 'uint32') or type(meta['vocab_size']) is not int:
                raise ValueError(f"dtype {meta['dtype']!r}, vocab_size {meta['vocab_size']!r}")
            if not all(
                type(facts['tokens']) is int and 0 < facts.get('bytes', 1) < 1 << 63
                for facts in meta.get('splits', {}).values()
            ):
                raise ValueError("splits")
            for key, most in (
                ('vocab_size', 1 << 32),
                ('separator', meta['vocab_size']),
                ('eot', meta['vocab_size']),
            ):
                if type(number := meta.get(key, 0)) is not int or not 0 <= number < max(1, most):
                    raise ValueError(f"{key} {number!r}")
            if meta['tokenizer']:
                check_description(meta['tokenizer'])
            else:
                meta['no_tokenizer'] = f"{folder / 'meta.json'} names no tokenizer"
            return meta['tokenizer'], meta['vocab_size'], meta['dtype'], meta
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{folder / 'meta.json'} cannot be read ({type(error).__name__}: {error})"
            ) from None
    if (folder / 'meta.pkl').is_file():
        try:
            description, vocab_size, problem = describe_meta_pkl((folder / 'meta.pkl').read_bytes())
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        meta = {}
        if problem:
            meta['no_tokenizer'] = f"{folder / 'meta.pkl'} {problem}"
        return description, vocab_size, 'uint16', meta
    return dict(GPT2), 50257, 'uint16', {}
