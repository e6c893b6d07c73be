"""Datasets to train on, and what lies in a dataset's folder."""

import hashlib
import json

import numpy as np

from support.scripts import ROOT

# 4,000 characters of a file that does not change, since losses depend on it.
CORPUS = (ROOT / 'LICENSE').read_text(encoding='utf-8')[:1000] * 4


def write_text(folder, text):
    """Make `folder` a dataset of `text` by characters, nine tenths to train on."""
    from text.bins import write_bins
    from text.tokenizer import CharTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    cut = len(text) * 9 // 10
    write_bins(folder, CharTokenizer.of(text), {'train': [text[:cut]], 'val': [text[cut:]]})
    return folder


def bin_of(folder, split, dtype='uint16'):
    """The ids of a split."""
    return np.fromfile(folder / f'{split}.bin', dtype)


def contents(folder):
    """{name: bytes} of what a dataset is made of."""
    return {name: (folder / name).read_bytes() for name in ('train.bin', 'val.bin', 'meta.json')}


def assert_meta_is_true(folder, texts):
    """meta.json against the bins and the {split: text} that they were made from."""
    meta = json.loads((folder / 'meta.json').read_text())
    for split, text in texts.items():
        content = (folder / f'{split}.bin').read_bytes()
        assert (
            meta['splits'][split].items()
            >= {
                'tokens': len(content) // np.dtype(meta['dtype']).itemsize,
                'bytes': len(text.encode()),
                'sha256': hashlib.sha256(content).hexdigest(),
            }.items()
        )
