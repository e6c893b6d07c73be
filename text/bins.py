"""Writing token bins: train.bin, val.bin and the meta.json beside them, which dataset.py reads.

`write_bins` for texts that fit into memory; `prepare` for any number of documents, by several
processes, in as many sittings as it takes.
"""

import contextlib
import functools
import hashlib
import json
import shutil
import time
from collections import deque
from fractions import Fraction
from pathlib import Path

import numpy as np
from tqdm import tqdm

from system import files
from text import journal
from text.documents import remark_lines
from text.encoder import Encoder
from text.journal import SPLITS
from text.workers import n_cores, workers

VERSION = 3  # of how documents become bins here: what another one has begun is begun anew
TELL_SECONDS = 10  # between two lines about how far it is


def prepare(
    folder,
    source,
    tokenizer,
    split=(0.9, 0.1),
    seed=1337,
    dedup=False,
    num_proc=None,
    shard_tokens=0,
    end=None,
    **facts,
):
    """Make FOLDER a dataset of the source's documents, however many they are; returns the meta.

    source: an object that worker processes can be given, with
        fingerprint     a text that changes with its documents
        size            of its text in bytes, or None
        pieces()        an iterator of small parts of it, the same every time. A piece may have a `size` in bytes, which
                        add up to the source's; where it has a number `file`, pieces(n) begins with
                        the first of file n
        read(piece)     in a worker: an iterator of (split or None, document)
        facts           perhaps: more of meta.json
        facts           perhaps: more of meta.json
        splits          perhaps: the splits that it names itself
        too_few         perhaps: (what its documents are called, what to do where a split has none)
        report(remarks) perhaps: in place of remark_lines, the lines to print at the end
    A document is a text, or a list of (text, is_learned), or a Part of one. In its place may stand
    a documents.Remark, which is counted and reported at the end. None lets the sha256 of the seed and
    the document choose, so that copies stay on one side. Behind each document stands the
    tokenizer's eot, or where that has none the text `end`: by default a newline, unless the
    document ends with one. A Part with a `place` is of a text with nothing behind it.

    split: the shares of train, val and perhaps test; None: the source names the split of every
    document. dedup: keep the first of equal documents (Parts apart), which needs 100 bytes of
    memory for each. shard_tokens: put so many tokens in a file. num_proc: processes that encode,
    by default one per core.
    facts: more of meta.json; masked=True where documents are lists.

    The bins depend on nothing else: not on num_proc, nor on how often the work was stopped. What is
    done waits in files.workplace(FOLDER), where the same call finds it. Old bins stay until the new
    ones are whole.
    """
    with files.alone_in(folder):
        return _prepare(
            Path(folder), source, tokenizer, split, seed, dedup, num_proc, shard_tokens, end, facts
        )


def _prepare(folder, source, tokenizer, split, seed, dedup, num_proc, shard_tokens, end, facts):
    work = files.workplace(folder) / 'bins'
    facts = {**getattr(source, 'facts', {}), **facts}
    shares = check_split(split) if split else []
    named = getattr(source, 'splits', ())
    splits = [name for i, name in enumerate(SPLITS) if i < len(shares) or name in named]
    dtype, eot, masked = (
        bin_dtype(tokenizer.vocab_size),
        getattr(tokenizer, 'eot', None),
        bool(facts.get('masked')),
    )
    of = [
        source.fingerprint,
        shares,
        seed,
        dedup,
        shard_tokens,
        end,
        facts,
        tokenizer.describe(),
        VERSION,
    ]
    identity = hashlib.sha256(repr(of).encode()).hexdigest()
    work.mkdir(parents=True, exist_ok=True)
    found = journal.load(work)
    if found['identity'] == identity and (work / 'meta.json').is_file():
        print(f"{folder}: the bins are ready; putting them in place")
    else:
        output = journal.Output(work, identity, splits, dtype, masked, dedup, shard_tokens)
        encoder = functools.partial(
            Encoder, source=source, shares=shares, seed=seed, dtype=dtype, end=end, masked=masked
        )
        with output.kept_if_stopped():
            _encode_all(output, source, tokenizer, encoder, num_proc)
            meta = {
                'tokenizer': tokenizer.describe(),
                'vocab_size': tokenizer.vocab_size,
                'dtype': dtype,
            }
            if eot is not None:
                meta['eot'] = eot
            unit, advice = getattr(source, 'too_few', ('document', "add documents"))
            try:
                output.finish(dict(zip(SPLITS, split or ())), {**meta, **facts}, unit, advice)
            except ValueError:  # the remarks may say why
                _report(source, output.done['remarks'])
                raise
        found = output.done
    meta = json.loads((work / 'meta.json').read_text(encoding='utf-8'))
    journal.switch(folder, work, meta)
    shutil.rmtree(work.parent, ignore_errors=True)
    _tell(folder, meta, found, dedup)
    _report(source, found['remarks'])
    return meta


def check_split(split):
    """The shares of train, val and perhaps test, as exact fractions. Raises ValueError."""
    with contextlib.suppress(ValueError, ZeroDivisionError):
        shares = [Fraction(str(share)) for share in split]
        if len(shares) in (2, 3) and min(shares) > 0 and sum(shares) == 1:
            return shares
    raise ValueError(
        f"split={','.join(map(str, split))} must be two or three shares above 0 that add up to 1, for train, "
        "val and perhaps test, such as 0.8,0.1,0.1"
    )


# ---- what the process that was asked does --------------------------------------------------------


def _encode_all(output, source, tokenizer, encoder, num_proc):
    if num_proc is None:  # a process takes as long to start as 4 MB to encode
        num_proc = min(n_cores(), 61, 1 + (source.size or 1 << 40) // (1 << 22))
    with (
        _progress(source.size, output.done['size']) as advance,
        workers(num_proc, encoder, tokenizer) as submit,
    ):
        waiting = deque()
        for piece in output.left_of(source):
            waiting.append((piece, submit(piece)))
            if len(waiting) >= 2 * num_proc:
                advance(output.add(*waiting.popleft()))
        while waiting:
            advance(output.add(*waiting.popleft()))


@contextlib.contextmanager
def _progress(total, done):
    """advance(bytes): a bar on a terminal, a line every ten seconds elsewhere."""
    began, told, at_first = time.monotonic(), time.monotonic(), done

    def advance(n):
        nonlocal told, done
        done += n
        bar.update(n)
        if bar.disable and (now := time.monotonic()) - told > TELL_SECONDS:
            told, speed = now, max(1, done - at_first) / (now - began)
            of = (
                f" of {total / 1e6:,.1f} MB, about {max(0, total - done) / speed:,.0f} s left"
                if total
                else " MB"
            )
            print(f"{done / 1e6:,.1f}{of} ({speed / 1e6:,.1f} MB/s)", flush=True)

    with tqdm(
        total=total,
        initial=done,
        unit='B',
        unit_scale=True,
        leave=False,
        dynamic_ncols=True,
        disable=None,
    ) as bar:
        yield advance


def _tell(folder, meta, done, dedup):
    for split, of in meta['splits'].items():
        learned = f" ({of['learned']:,} of them learned)" if 'learned' in of else ''
        print(
            f"{split}: {of['tokens']:,} tokens{learned}, {of['bytes']:,} bytes in {of['documents']:,} document(s), "
            f"{of['bytes'] / of['tokens']:.2f} bytes per token, sha256 {of['sha256']}"
        )
    size, seconds = (
        sum(of['bytes'] for of in meta['splits'].values()) / 1e6,
        max(done['seconds'], 1e-3),
    )
    print(
        f"{folder}: {size:,.1f} MB in {seconds:,.1f} s, {size / seconds:,.2f} MB/s"
        + (f"; {done['dropped']:,} duplicate(s) dropped" if dedup else ''),
        flush=True,
    )


def _report(source, remarks):
    lines_of = getattr(source, 'report', remark_lines)
    for line in lines_of(remarks):
        print(line, flush=True)


# ---- texts that fit into memory ------------------------------------------------------------------


def write_bins(folder, tokenizer, splits, **facts):
    """Write FOLDER/{split}.bin and meta.json from {split: [texts]}, each file whole or not at all;
    returns the meta.

    facts: more of meta.json; separator=ID where the texts are documents with that id before,
    between and behind them.
    """
    return write_ids(
        folder,
        tokenizer,
        {
            split: ((tokenizer.encode(text), len(text.encode())) for text in texts)
            for split, texts in splits.items()
        },
        **facts,
    )


def bin_dtype(vocab_size):
    return 'uint16' if vocab_size <= 2**16 else 'uint32'


def write_ids(folder, tokenizer, splits, **facts):
    """Like write_bins, from {split: (ids, bytes of text) pairs}."""
    dtype = bin_dtype(tokenizer.vocab_size)
    meta = {
        'tokenizer': tokenizer.describe(),
        'vocab_size': tokenizer.vocab_size,
        'dtype': dtype,
        **facts,
        'splits': {},
    }
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
        print(
            f"{split}: {facts['tokens']:,} tokens, {facts['bytes']:,} bytes, sha256 {facts['sha256']}"
        )
    return meta
