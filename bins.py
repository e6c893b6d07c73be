"""Writing token bins: train.bin, val.bin and the meta.json beside them, which dataset.py reads."""
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from tqdm import tqdm

import files


def write_bins(folder, tokenizer, splits, **facts):
    """Write FOLDER/{split}.bin and meta.json from {split: [texts]}, each file whole or not at all; returns the meta.

    facts: more of meta.json; separator=ID where the texts are documents with that id before, between and behind them.
    """
    return _write(folder, tokenizer, {split: ((tokenizer.encode(text), len(text.encode())) for text in texts)
                                      for split, texts in splits.items()}, **facts)


def write_documents(folder, tokenizer, shards, pieces, read, num_proc=None):
    """Like write_bins, for documents that are too many for one process or one sitting.

    pieces(shard) -> a list; read(piece), in another process, -> (split, document) pairs. After each document comes the
    tokenizer's end-of-text token. A finished shard waits in FOLDER/parts, so that a killed run goes on with the next
    one; the bins depend neither on that nor on num_proc. Memory: a shard's tokens, twice, and each process's piece.
    """
    folder = Path(folder)
    (folder / 'parts').mkdir(exist_ok=True)
    parts = [folder / 'parts' / f'{shard}.npz' for shard in shards]
    encode = functools.partial(_encode_documents, tokenizer, read)
    with ProcessPoolExecutor(num_proc, initializer=_end_with_parent) as pool:
        for i, (shard, part) in enumerate(zip(shards, parts), 1):
            if part.is_file():
                continue
            todo = pieces(shard)
            try:
                done = list(tqdm(pool.map(encode, todo), shard, len(todo), leave=False, disable=None))
            except BrokenProcessPool:
                raise OSError(f"a process was killed while it encoded {shard}, by too little memory perhaps: take a "
                              "smaller --num_proc; the finished shards are kept") from None
            with files.replacing(part) as file:
                np.savez(file, **{key: np.concatenate([encoded[key] for encoded in done]) for key in done[0]})
            print(f"{shard} ({i} of {len(shards)}): {sum(len(encoded['train']) for encoded in done):,} tokens", flush=True)

    def of_split(split):
        for part in parts:
            with np.load(part) as encoded:
                yield encoded[split], int(encoded[f'{split}_bytes'].sum())

    meta = _write(folder, tokenizer, {split: of_split(split) for split in ('train', 'val')})
    shutil.rmtree(folder / 'parts')
    return meta


def _encode_documents(tokenizer, read, piece):
    """{split: ids, split_bytes: [bytes of text]} of the documents in a piece."""
    ids, n_bytes = {'train': [], 'val': []}, {'train': 0, 'val': 0}
    for split, document in read(piece):
        ids[split] += tokenizer.encode_ordinary(document)
        ids[split].append(tokenizer.eot)
        n_bytes[split] += len(document.encode())
    return {**{split: np.array(ids[split], bin_dtype(tokenizer.vocab_size)) for split in ids},
            **{f'{split}_bytes': [n_bytes[split]] for split in ids}}


def _end_with_parent():
    """End this process when the one that started it is killed, and leave Ctrl-C to that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def bin_dtype(vocab_size):
    return 'uint16' if vocab_size <= 2 ** 16 else 'uint32'


def _write(folder, tokenizer, splits, **facts):
    """The bins and meta.json of {split: (ids, bytes of text) pairs}."""
    dtype = bin_dtype(tokenizer.vocab_size)
    meta = {'tokenizer': tokenizer.describe(), 'vocab_size': tokenizer.vocab_size, 'dtype': dtype, **facts, 'splits': {}}
    for split, encoded in splits.items():
        digest, n_tokens, n_bytes = hashlib.sha256(), 0, 0
        with files.replacing(Path(folder) / f'{split}.bin') as file:
            for ids, text_bytes in encoded:
                content = np.asarray(ids, dtype).tobytes()
                file.write(content)
                digest.update(content)
                n_tokens += len(ids)
                n_bytes += text_bytes
        meta['splits'][split] = {'tokens': n_tokens, 'bytes': n_bytes, 'sha256': digest.hexdigest()}
    with files.replacing(Path(folder) / 'meta.json') as file:
        file.write(json.dumps(meta, indent=1).encode())
    for split, facts in meta['splits'].items():
        print(f"{split}: {facts['tokens']:,} tokens, {facts['bytes']:,} bytes, sha256 {facts['sha256']}")
    return meta
