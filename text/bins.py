"""Writes token bins: train.bin, val.bin and the meta.json beside them, which dataset.py reads.

`write_bins` is for texts that fit into memory, `prepare` for any number of documents: it uses
several processes, and a run that was stopped continues where it was.
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
from text.bin_files import SPLITS, put_in_place
from text.documents import remark_lines
from text.encoder import Encoder
from text.workers import n_cores, workers

VERSION = 3  # of how documents become bins; what another version has begun is begun anew
PROGRESS_SECONDS = 10  # between two lines about the progress
MOST_WORKERS = 61  # by default; a process of Windows can't wait for more


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

    source: an object that can be sent to worker processes, with
        fingerprint     a text that changes with its documents
        size            bytes of its text, or None
        pieces()        an iterator of small parts of it, the same every time. A piece may have a
                        `size` in bytes; these add up to the source's. If it has the number of a
                        `file`, pieces(n) begins with the first one of file n
        read(piece)     in a worker: an iterator of (split or None, document)
        facts           optional: more of meta.json
        splits          optional: the splits that it names itself
        too_few         optional: (what a document is called, what to do if a split has none)
        report(remarks) optional: the lines to print at the end, instead of documents.remark_lines
    A document is a text, a list of (text, is_learned), or a documents.Part; a documents.Remark in
    its place is counted, and reported at the end. Without a split, the sha256 of the seed and the
    document chooses one, so that copies stay on one side. After each document comes the tokenizer's
    eot, or, if it has none, the text `end`: by default a newline, unless the document ends with
    one. Nothing follows a Part with a `place`.

    split: the shares of train, val and perhaps test; None: the source names the split of every
    document. dedup: keep the first of equal documents (Parts excepted), which needs 100 bytes of
    memory for each. num_proc: processes that encode; default: one per core. shard_tokens: write
    files of so many tokens. facts: more of meta.json; masked=True if documents are lists.

    The bins depend on nothing else: not on num_proc, nor on how often the run was stopped. What is
    done is kept in files.workplace(FOLDER), where the same call finds it. Old bins stay until the
    new ones are complete. Raises ValueError, OSError.
    """
    folder = Path(folder)
    with files.alone_in(folder):
        facts = {**getattr(source, 'facts', {}), **facts}
        masked = bool(facts.get('masked'))
        dtype = bin_dtype(tokenizer.vocab_size)
        shares = []
        if split:
            shares = check_split(split)
        own_splits = getattr(source, 'splits', ())
        splits = [name for i, name in enumerate(SPLITS) if i < len(shares) or name in own_splits]
        depends_on = [
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
        identity = hashlib.sha256(repr(depends_on).encode()).hexdigest()

        work = files.workplace(folder) / 'bins'
        work.mkdir(parents=True, exist_ok=True)
        done = journal.load(work)
        if done['identity'] == identity and (work / 'meta.json').is_file():
            print(f"{folder}: the bins are ready; putting them in place")
        else:
            output = journal.Output(work, identity, splits, dtype, masked, dedup, shard_tokens)
            make_encoder = functools.partial(
                Encoder,
                source=source,
                shares=shares,
                seed=seed,
                dtype=dtype,
                end=end,
                masked=masked,
            )
            with output.kept_if_stopped():
                _encode_all(output, source, tokenizer, make_encoder, num_proc)
                _finish(output, source, tokenizer, split, facts)
            done = output.done

        meta = json.loads((work / 'meta.json').read_text(encoding='utf-8'))
        put_in_place(folder, work, meta)
        shutil.rmtree(work.parent, ignore_errors=True)
        _print_summary(folder, meta, done, dedup)
        _report(source, done['remarks'])
        return meta


def check_split(split):
    """The shares of train, val and perhaps test, as exact fractions. Raises ValueError."""
    with contextlib.suppress(ValueError, ZeroDivisionError):
        shares = [Fraction(str(share)) for share in split]
        if len(shares) in (2, 3) and min(shares) > 0 and sum(shares) == 1:
            return shares
    raise ValueError(
        f"split={','.join(map(str, split))} must be two or three shares above 0 that add up to 1, "
        "for train, val and perhaps test, such as 0.8,0.1,0.1"
    )


def _encode_all(output, source, tokenizer, make_encoder, num_proc):
    """Encode the source's pieces that are not done, and add them to the output in their order."""
    if num_proc is None:  # a process takes as long to start as 4 MB to encode
        size = source.size or 1 << 40
        num_proc = min(n_cores(), MOST_WORKERS, 1 + size // (1 << 22))
    with (
        _progress(source.size, output.done['size']) as advance,
        workers(num_proc, make_encoder, tokenizer) as submit,
    ):
        waiting = deque()
        for piece in output.pieces_left(source):
            waiting.append((piece, submit(piece)))
            if len(waiting) >= 2 * num_proc:
                size = output.add(*waiting.popleft())
                advance(size)
        while waiting:
            size = output.add(*waiting.popleft())
            advance(size)


def _finish(output, source, tokenizer, split, facts):
    """Write the meta.json of bins that are complete. Raises ValueError if a split has no text."""
    meta = {
        'tokenizer': tokenizer.describe(),
        'vocab_size': tokenizer.vocab_size,
        'dtype': output.dtype,
    }
    eot = getattr(tokenizer, 'eot', None)
    if eot is not None:
        meta['eot'] = eot
    meta.update(facts)
    unit, advice = getattr(source, 'too_few', ('document', "add documents"))
    try:
        output.finish(dict(zip(SPLITS, split or ())), meta, unit, advice)
    except ValueError:
        _report(source, output.done['remarks'])  # they may say why
        raise


@contextlib.contextmanager
def _progress(total, done):
    """advance(bytes): a bar on a terminal, elsewhere a line every ten seconds.

    total: bytes, or None; done: bytes that an earlier run has done.
    """
    began = time.monotonic()
    printed = began
    done_before = done

    def advance(n):
        nonlocal printed, done
        done += n
        bar.update(n)
        now = time.monotonic()
        if not bar.disable or now - printed <= PROGRESS_SECONDS:
            return
        printed = now
        speed = max(1, done - done_before) / (now - began)
        of_total = " MB"
        if total:
            seconds_left = max(0, total - done) / speed
            of_total = f" of {total / 1e6:,.1f} MB, about {seconds_left:,.0f} s left"
        print(f"{done / 1e6:,.1f}{of_total} ({speed / 1e6:,.1f} MB/s)", flush=True)

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


def _print_summary(folder, meta, done, dedup):
    """A line on each split, and one on the speed. done: the journal."""
    size = 0
    for split, facts in meta['splits'].items():
        learned = ''
        if 'learned' in facts:
            learned = f" ({facts['learned']:,} of them learned)"
        print(
            f"{split}: {facts['tokens']:,} tokens{learned}, {facts['bytes']:,} bytes in "
            f"{facts['documents']:,} document(s), {facts['bytes'] / facts['tokens']:.2f} bytes per "
            f"token, sha256 {facts['sha256']}"
        )
        size += facts['bytes']
    size_in_mb = size / 1e6
    seconds = max(done['seconds'], 1e-3)
    dropped = ''
    if dedup:
        dropped = f"; {done['dropped']:,} duplicate(s) dropped"
    print(
        f"{folder}: {size_in_mb:,.1f} MB in {seconds:,.1f} s, {size_in_mb / seconds:,.2f} MB/s"
        f"{dropped}",
        flush=True,
    )


def _report(source, remarks):
    lines_of = getattr(source, 'report', remark_lines)
    for line in lines_of(remarks):
        print(line, flush=True)


# ---- texts that fit into memory ------------------------------------------------------------------


def write_bins(folder, tokenizer, splits, **facts):
    """Write FOLDER/{split}.bin and meta.json from {split: [texts]}, each file completely or not at
    all; returns the meta.

    facts: more of meta.json; separator=ID if the texts are documents with that id before, between
    and after them.
    """
    encoded = {}
    for split, texts in splits.items():
        encoded[split] = ((tokenizer.encode(text), len(text.encode())) for text in texts)
    return write_ids(folder, tokenizer, encoded, **facts)


def bin_dtype(vocab_size):
    """The dtype of ids in a bin: 'uint16', or 'uint32' for a vocabulary that needs it."""
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
        digest = hashlib.sha256()
        n_tokens = 0
        n_bytes = 0
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
    for split, of_split in meta['splits'].items():
        print(
            f"{split}: {of_split['tokens']:,} tokens, {of_split['bytes']:,} bytes, "
            f"sha256 {of_split['sha256']}"
        )
    return meta
