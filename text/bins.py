"""Writing token bins: train.bin, val.bin and the meta.json beside them, which dataset.py reads.

`write_bins` for texts that fit into memory; `prepare` for any number of documents, by several
processes, in as many sittings as it takes.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from bisect import bisect_right
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from system import errors, files
from text import chat, journal
from text import tokenizer as tokenizers
from text.journal import SPLITS, Remark

VERSION = 3  # of how documents become bins here: what another one has begun is begun anew
TELL_SECONDS = 10  # between two lines about how far it is
ROW = np.dtype(
    [('split', 'u1'), ('documents', 'u1'), ('tokens', 'u4'), ('bytes', 'u4'), ('digest', 'V16')]
)


class Part(NamedTuple):
    """A part of a document that is too large to be read at once. The parts of one come one after
    the other."""

    text: str
    key: bytes  # the digest of the document's first part, which decides where all of them go
    is_last: bool
    # (characters before this part, in all) of a text that is divided by position
    place: tuple | None = None


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
        report(remarks) perhaps: in place of journal.report, the lines to print at the end
    A document is a text, or a list of (text, is_learned), or a Part of one. In its place may stand
    a journal.Remark, which is counted and reported at the end. None lets the sha256 of the seed and
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
            _Encoder, source=source, shares=shares, seed=seed, dtype=dtype, end=end, masked=masked
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


# ---- what the workers do -------------------------------------------------------------------------


class _Encoder:
    """A piece of the source -> (ids, learned or None, table of ROWs, Remarks), documents one after
    the other."""

    def __init__(self, tokenizer, source, shares, seed, dtype, end, masked):
        self.tokenizer, self.source, self.dtype, self.masked = tokenizer, source, dtype, masked
        self.seeded = hashlib.sha256(b'%d/' % seed)
        eot = getattr(tokenizer, 'eot', None)
        self.eot, self.end = (None, end) if eot is None else (np.array([eot], dtype), '')
        self.sums = [0, *itertools.accumulate(shares)]
        self.limits = [int(share * 2**64) for share in self.sums[1:-1]]

    def __call__(self, piece):
        ids, learned, table, remarks = [], [], [], []
        for split, document in self.source.read(piece):
            if isinstance(document, Remark):
                remarks.append(document)
                continue
            for (*row, text_bytes, digest), new, are_learned, ends in self._rows(split, document):
                row_ids = (
                    [np.asarray(new, self.dtype), self.eot]
                    if ends and self.eot is not None
                    else [np.asarray(new, self.dtype)]
                )
                n = sum(map(len, row_ids))
                ids += row_ids
                if self.masked:
                    are_learned = (
                        np.ones(n, 'u1') if are_learned is True else np.asarray(are_learned, 'u1')
                    )
                    learned += (
                        [are_learned, are_learned[-1:]] if len(are_learned) < n else [are_learned]
                    )
                table.append((*row, n, text_bytes, digest))
        all_ids = np.concatenate([np.empty(0, self.dtype), *ids])
        all_learned = np.concatenate([np.empty(0, 'u1'), *learned]) if self.masked else None
        return all_ids, all_learned, np.array(table, ROW), remarks

    def _rows(self, split, document):
        """((split, documents in it, bytes of text, digest or nothing), ids, True or whether each is
        learned, whether the eot follows) of a document; of one by position perhaps several."""
        if isinstance(document, Part):
            if document.place:
                yield from self._by_position(split, document)
            else:
                text = document.text + (self._end(document.text) if document.is_last else '')
                yield (
                    (
                        self._hashed(split, document.key)[0],
                        document.is_last,
                        len(text.encode()),
                        b'',
                    ),
                    self.tokenizer.encode_ordinary(text),
                    True,
                    document.is_last,
                )
        elif isinstance(document, str):
            if document:
                content, end = document.encode(), self._end(document)
                split, digest = self._hashed(split, content)
                yield (
                    (split, 1, len(content) + len(end.encode()), digest),
                    self.tokenizer.encode_ordinary(document + end),
                    True,
                    True,
                )
        else:
            text = ''.join(part for part, _ in document)
            end, (split, digest) = self._end(text), self._hashed(split, text.encode())
            yield (
                (split, 1, len((text + end).encode()), digest),
                *chat.encode(
                    self.tokenizer, [*document, *([(end, document[-1][1])] if end else [])]
                ),
                True,
            )

    def _by_position(self, split, part):
        """The parts of a part that is cut where one split ends and the next begins, or all of it
        where its split is given; nothing stands behind them."""
        start, length = part.place
        if split is not None:
            row = SPLITS.index(split), start == 0, len(part.text.encode()), b''
            yield row, self.tokenizer.encode_ordinary(part.text), True, False
            return
        cuts = [int(share * length) for share in self.sums]
        for split, (first, last) in enumerate(itertools.pairwise(cuts)):
            text = part.text[max(0, first - start) : max(0, last - start)]
            if text:
                yield (
                    (split, first >= start, len(text.encode()), b''),
                    self.tokenizer.encode_ordinary(text),
                    True,
                    False,
                )

    def _hashed(self, split, content):
        """(the number of the split, 16 bytes that stand for the content), by one sha256 of the seed
        and the content."""
        digest = self.seeded.copy()
        digest.update(content)
        digest = digest.digest()
        number = (
            bisect_right(self.limits, int.from_bytes(digest[:8]))
            if split is None
            else SPLITS.index(split)
        )
        return number, digest[16:]

    def _end(self, text):
        return ('' if text.endswith('\n') else '\n') if self.end is None else self.end


_encoder = None  # a worker's


def _start(make, description):
    """Begin as a worker, with an encoder of its own: end when the process that started it ends,
    which Ctrl-C is left to."""
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(
        target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True
    ).start()
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'
    _encoder = make(tokenizers.load(description))


def _encode(piece):
    return _encoder(piece)


# ---- what the process that was asked does --------------------------------------------------------


def _encode_all(output, source, tokenizer, encoder, num_proc):
    if num_proc is None:  # a process takes as long to start as 4 MB to encode
        num_proc = min(_cores(), 61, 1 + (source.size or 1 << 40) // (1 << 22))
    with (
        _progress(source.size, output.done['size']) as advance,
        _workers(num_proc, encoder, tokenizer) as submit,
    ):
        waiting = deque()
        for piece in output.left_of(source):
            waiting.append((piece, submit(piece)))
            if len(waiting) >= 2 * num_proc:
                advance(output.add(*waiting.popleft()))
        while waiting:
            advance(output.add(*waiting.popleft()))


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


@contextlib.contextmanager
def _workers(n, encoder, tokenizer):
    """submit(piece) -> a function that returns it encoded: by n processes, or where that is one, by
    this."""
    if n == 1:
        yield functools.partial(functools.partial, encoder(tokenizer))
        return
    pool = ProcessPoolExecutor(
        n, multiprocessing.get_context('spawn'), _start, (encoder, tokenizer.describe())
    )

    def submit(piece):
        with errors.no_interrupt():  # which the processes that this starts would tell of
            return functools.partial(_wait, pool, pool.submit(_encode, piece))

    try:
        yield submit
    finally:
        pool.shutdown(cancel_futures=True)


def _wait(pool, future):
    """A future's result. A pool waits for ever for the rest of what a process was sending when it
    was killed: not here."""
    while True:
        try:
            return future.result(timeout=1)
        except TimeoutError:
            if future.done():  # the error is a worker's
                raise
            processes = list((pool._processes or {}).values())
            if any(process.exitcode for process in processes):
                for process in processes:
                    process.kill()
                # the last one that is open: the pool sees that nothing more comes
                pool._result_queue._writer.close()


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
    lines_of = getattr(source, 'report', journal.report)
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
