"""Bins while they are prepared: appended to piece by piece, interruptible and resumable.

`Output` keeps them in a folder of their own. journal.json there says how much of them is done: a
run that was stopped cuts off what is beyond, and continues with the next piece.
"""

import contextlib
import hashlib
import itertools
import json
import shutil
import signal
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from system import files
from text.bin_files import Stream
from text.documents import SKIPPED, count_remarks

SAVE_SECONDS = 5  # between two journals
KEPT = "what is done is kept, and the same command continues from there"

NOTHING_DONE = {
    'identity': None,  # a hash of everything that the bins depend on
    'file': 0,  # the number of the source's file that was read last,
    'pieces': 0,  # and how many of its pieces are done
    'size': 0,  # bytes of the source that are done
    'dropped': 0,  # duplicates
    'kept': 0,  # digests of documents, which --dedup compares
    'seconds': 0.0,
    'remarks': {},  # as documents.count_remarks counts them
    'splits': {},  # {split: {tokens, bytes, documents, learned}}
}


class Output:
    """The bins as they grow in `folder`; `done` is what the journal will say of them.

    identity: a hash of everything that the bins depend on; what another one has left in the folder
    is removed. splits: names; dtype: of the ids; masked: whether there are masks too; dedup: keep
    the first of equal documents; shard_tokens: tokens of a file, 0 for any number.
    """

    def __init__(self, folder, identity, splits, dtype, masked, dedup, shard_tokens):
        self.folder = folder
        self.splits = splits
        self.dtype = dtype
        self.masked = masked
        self.dedup = dedup
        self.shard_tokens = shard_tokens
        found = load(folder)
        try:
            if found['identity'] != identity:
                raise EOFError
            self._open(found)
            print(
                f"continuing after the first {found['size'] / 1e6:,.1f} MB, which are done",
                flush=True,
            )
        except EOFError:
            if found['identity']:
                print(
                    f"{folder.parent} has the beginning of something else: starting anew",
                    flush=True,
                )
            shutil.rmtree(folder)
            folder.mkdir()
            counts = dict.fromkeys(('tokens', 'bytes', 'documents', 'learned'), 0)
            empty = {split: counts for split in splits}
            self._open({**NOTHING_DONE, 'identity': identity, 'splits': empty})

    def _open(self, done):
        """Open the files where the journal says that they end. Raises EOFError if they are
        shorter."""
        self.done = done
        self.saved_at = time.monotonic()
        self.began_at = time.monotonic() - done['seconds']
        self.bins = {}
        self.masks = {}
        for split, facts in done['splits'].items():
            self.bins[split] = self._stream(split, '.bin', self.dtype, facts['tokens'])
        if self.masked:
            for split, facts in done['splits'].items():
                self.masks[split] = self._stream(split, '.mask', 'u1', facts['tokens'])
        self.digests = None
        self.seen = set()  # digests of documents
        if self.dedup:
            self.digests = Stream(self.folder, 'digests', '', 'V16', shard=0, n=done['kept'])
            if done['kept']:
                self.seen = set(np.fromfile(self.folder / 'digests', 'V16').tolist())

    def _stream(self, split, suffix, dtype, n):
        return Stream(self.folder, split, suffix, dtype, shard=self.shard_tokens, n=n)

    def pieces_left(self, source):
        """An iterator of the source's pieces that are not done."""
        pieces = source.pieces
        if self.done['file']:
            return itertools.islice(pieces(self.done['file']), self.done['pieces'], None)
        return itertools.islice(pieces(), self.done['pieces'], None)

    def add(self, piece, encoded):
        """Append a piece; returns its size in bytes. Wherever this is stopped, `done` stays true.

        encoded: a function that returns what an encoder.Encoder makes of the piece.
        """
        ids, learned, table, remarks = encoded()
        is_kept = self._without_duplicates(table)
        n_dropped = int((~is_kept).sum())

        splits = {}
        for i, split in enumerate(self.splits):
            rows = is_kept & (table['split'] == i)
            tokens = np.repeat(rows, table['tokens'])
            self.bins[split].append(ids[tokens])
            new = {key: int(table[key][rows].sum()) for key in ('tokens', 'bytes', 'documents')}
            new['learned'] = 0
            if self.masked:
                self.masks[split].append(learned[tokens])
                new['learned'] = int(learned[tokens].sum())
            before = self.done['splits'][split]
            splits[split] = {key: before[key] + new[key] for key in new}

        size = getattr(piece, 'size', None)
        if size is None:
            size = int(table['bytes'].sum())
        file = getattr(piece, 'file', 0)
        pieces = 1
        if file == self.done['file']:
            pieces = self.done['pieces'] + 1
        n_digests = 0
        if self.digests:
            n_digests = self.digests.n
        self.done = {
            **self.done,
            'splits': splits,
            'file': file,
            'size': self.done['size'] + size,
            'pieces': pieces,
            'dropped': self.done['dropped'] + n_dropped,
            'kept': n_digests,
            'remarks': count_remarks(remarks, self.done['remarks']),
        }
        if time.monotonic() - self.saved_at > SAVE_SECONDS:
            self.save()
        return size

    def _without_duplicates(self, table):
        """Whether to keep each document of a table, bool; remembers the new ones."""
        is_kept = np.ones(len(table), bool)
        if not self.digests:
            return is_kept
        new = []
        for i, digest in enumerate(table['digest'].tolist()):
            if not any(digest):  # a part of a large document
                continue
            is_kept[i] = digest not in self.seen
            if is_kept[i]:
                self.seen.add(digest)
                new.append(digest)
        self.digests.append(np.array(new, 'V16'))
        return is_kept

    def save(self):
        """Write the journal, once the bins that it describes are on the disk."""
        self.done['seconds'] = time.monotonic() - self.began_at
        for stream in self._streams():
            stream.sync()
        with files.replacing(self.folder / 'journal.json') as file:
            file.write(json.dumps(self.done).encode())
        self.saved_at = time.monotonic()

    def _streams(self):
        streams = [*self.bins.values(), *self.masks.values()]
        if self.digests:
            streams.append(self.digests)
        return streams

    def close(self):
        for stream in self._streams():
            with contextlib.suppress(OSError):
                stream.close()

    @contextlib.contextmanager
    def kept_if_stopped(self):
        """What stops this block leaves a journal; but what is wrong with a text stays wrong, and
        leaves nothing."""
        try:
            yield
        except ValueError:
            self.close()
            shutil.rmtree(self.folder.parent, ignore_errors=True)
            raise
        except BrokenProcessPool:
            self.save()
            raise OSError(
                "a process was killed while it encoded, perhaps for lack of memory: use a smaller "
                f"--num_proc; {KEPT}"
            ) from None
        except KeyboardInterrupt:
            self.save()
            print(f"stopped; {KEPT}", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None
        except OSError as error:
            with contextlib.suppress(OSError):
                self.save()
            reason = error
            if error.strerror:
                reason = f"{error.filename or self.folder}: {error.strerror}"
            raise OSError(f"{reason}; {KEPT}") from None
        finally:
            self.close()

    def finish(self, shares, meta, unit, advice):
        """All pieces are added: write the meta.json beside the bins. Raises ValueError if a split
        has no text.

        shares: {split: its share} of the splits to which a hash assigns documents. unit, advice:
        what a document is called, and what helps if there are too few.
        """
        n = sum(facts['documents'] for facts in self.done['splits'].values())
        if not n and SKIPPED in self.done['remarks']:
            n_skipped, first = self.done['remarks'][SKIPPED]
            raise ValueError(f"none of the {n_skipped:,} row(s) can be used: {first[0]}")
        if not n:
            raise ValueError("there is no text in the sources: every document is empty or skipped")
        for split, facts in self.done['splits'].items():
            if facts['tokens'] >= 2:
                continue
            if split not in shares:
                raise ValueError(
                    f"the files for {split} hold {facts['tokens']} token(s) of text: "
                    "at least 2 are needed"
                )
            raise ValueError(
                f"none of the {n:,} {unit}(s) fell to {split}, whose share is "
                f"{shares[split]}: {advice}, or use another --split or --seed, or "
                f"your own files (--{split}=FILE)"
            )
        self.save()
        meta = {**meta, 'splits': {split: self._facts(split) for split in self.splits}}
        with files.replacing(self.folder / 'meta.json') as file:
            file.write(json.dumps(meta, indent=1).encode())

    def _facts(self, split):
        """meta.json's facts about a split. Reads its bins for the sha256."""
        done = self.done['splits'][split]
        digest = hashlib.sha256()
        for path in self.bins[split].paths():
            with open(path, 'rb') as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        facts = {key: done[key] for key in ('tokens', 'bytes', 'documents')}
        facts['sha256'] = digest.hexdigest()
        if self.shard_tokens:
            starts = range(0, done['tokens'], self.shard_tokens)
            facts['shards'] = [min(self.shard_tokens, done['tokens'] - i) for i in starts]
        if self.masked:
            facts['learned'] = done['learned']
        return facts


def load(folder):
    """The journal that was saved last in a folder, or NOTHING_DONE."""
    try:
        return json.loads((folder / 'journal.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return dict(NOTHING_DONE)
