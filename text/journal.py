"""Bins as they grow: appended to piece by piece, stopped anywhere, gone on with, put in place once
they are whole.

`Output` keeps them in a folder of their own, with a journal of what is done; `switch` puts them
where readers look.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from system import files
from text.documents import SKIPPED, count_remarks

SAVE_SECONDS = 5  # between two journals
SPLITS = 'train', 'val', 'test'


class Stream:
    """One file to append arrays to, or numbered ones of `shard` items each, from item n on: what is
    beyond is cut off."""

    def __init__(self, folder, name, suffix, dtype, shard, n):
        self.folder, self.name, self.suffix, self.dtype = folder, name, suffix, np.dtype(dtype)
        self.shard, self.n, self.file = shard, n, None
        for path in self.paths():
            number = int(path.stem.rpartition('-')[2]) if shard else 0
            if (left := min(n - number * shard, shard) if shard else n) <= 0:
                path.unlink()
            elif path.stat().st_size > left * self.dtype.itemsize:
                os.truncate(path, left * self.dtype.itemsize)
        if sum(path.stat().st_size for path in self.paths()) != n * self.dtype.itemsize:
            raise EOFError

    def paths(self):
        return sorted(
            self.folder.glob(
                f'{self.name}-*{self.suffix}' if self.shard else self.name + self.suffix
            )
        )

    def append(self, array):
        array = np.ascontiguousarray(array, self.dtype)
        while len(array):
            number, inside = divmod(self.n, self.shard) if self.shard else (0, self.n)
            if self.file is None or (self.shard and not inside):
                self.close()
                number = f'-{number:05d}' if self.shard else ''
                self.file = open(
                    self.folder / f'{self.name}{number}{self.suffix}', 'ab', buffering=0
                )
            now = array[: self.shard - inside] if self.shard else array
            self._write(memoryview(now).cast('B'))
            array, self.n = array[len(now) :], self.n + len(now)

    def _write(self, content):
        try:
            while content:
                content = content[self.file.write(content) :]
        except OSError as error:
            raise OSError(f"cannot write {self.file.name}: {error.strerror}") from None

    def sync(self):
        if self.file:
            os.fsync(self.file.fileno())

    def close(self):
        if self.file:
            self.sync()
            self.file.close()
        self.file = None


_KEPT = "what is done is kept, and the same command goes on with it"


class Output:
    """The bins as they grow in `folder`, and the journal that says how much of them is whole."""

    def __init__(self, folder, identity, splits, dtype, masked, dedup, shard_tokens):
        self.folder, self.splits, self.dtype, self.masked, self.dedup = (
            folder,
            splits,
            dtype,
            masked,
            dedup,
        )
        self.shard_tokens, found = shard_tokens, load(folder)
        try:
            if found['identity'] != identity:
                raise EOFError
            self._begin(found)
            print(
                f"going on after the first {found['size'] / 1e6:,.1f} MB, which are done",
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
            self._begin(
                _NOTHING
                | {
                    'identity': identity,
                    'splits': {
                        split: dict.fromkeys(('tokens', 'bytes', 'documents', 'learned'), 0)
                        for split in splits
                    },
                }
            )

    def _begin(self, done):
        """Go on from what the journal says. Raises EOFError where there is less."""
        self.done, self.saved, self.began = (
            done,
            time.monotonic(),
            time.monotonic() - done['seconds'],
        )
        n, shard = (
            {split: facts['tokens'] for split, facts in done['splits'].items()},
            self.shard_tokens,
        )
        self.bins = {
            split: Stream(self.folder, split, '.bin', self.dtype, shard, n[split]) for split in n
        }
        self.masks = {
            split: Stream(self.folder, split, '.mask', 'u1', shard, n[split])
            for split in n
            if self.masked
        }
        self.digests = (
            Stream(self.folder, 'digests', '', 'V16', 0, done['kept']) if self.dedup else None
        )
        self.seen = (
            set(np.fromfile(self.folder / 'digests', 'V16').tolist())
            if self.dedup and done['kept']
            else set()
        )

    def left_of(self, source):
        """The source's pieces that are not done."""
        return itertools.islice(
            source.pieces(self.done['file']) if self.done['file'] else source.pieces(),
            self.done['pieces'],
            None,
        )

    def add(self, piece, encoded):
        """Append a piece, which `encoded` returns; returns its size in bytes. Whatever stops this,
        `done` stays true."""
        ids, learned, table, remarks = encoded()
        kept, dropped = np.ones(len(table), bool), 0
        if self.digests:
            new = []
            for i, digest in enumerate(table['digest'].tolist()):
                if any(digest):  # Parts have none
                    kept[i] = digest not in self.seen
                    if kept[i]:
                        self.seen.add(digest)
                        new.append(digest)
            self.digests.append(np.array(new, 'V16'))
            dropped = int((~kept).sum())
        splits = {}
        for i, split in enumerate(self.splits):
            rows = kept & (table['split'] == i)
            tokens = np.repeat(rows, table['tokens'])
            self.bins[split].append(ids[tokens])
            if self.masked:
                self.masks[split].append(learned[tokens])
            new = {key: int(table[key][rows].sum()) for key in ('tokens', 'bytes', 'documents')}
            new['learned'] = int(learned[tokens].sum()) if self.masked else 0
            splits[split] = {key: self.done['splits'][split][key] + new[key] for key in new}
        file, size = getattr(piece, 'file', 0), getattr(piece, 'size', None)
        size = int(table['bytes'].sum()) if size is None else size
        self.done = {
            **self.done,
            'splits': splits,
            'file': file,
            'size': self.done['size'] + size,
            'pieces': self.done['pieces'] + 1 if file == self.done['file'] else 1,
            'dropped': self.done['dropped'] + dropped,
            'kept': self.digests.n if self.digests else 0,
            'remarks': count_remarks(remarks, self.done['remarks']),
        }
        if time.monotonic() - self.saved > SAVE_SECONDS:
            self.save()
        return size

    def save(self):
        """Write the journal, once what it tells of is on the disk."""
        self.done['seconds'] = time.monotonic() - self.began
        for stream in self._streams():
            stream.sync()
        with files.replacing(self.folder / 'journal.json') as file:
            file.write(json.dumps(self.done).encode())
        self.saved = time.monotonic()

    def _streams(self):
        return [
            *self.bins.values(),
            *self.masks.values(),
            *([self.digests] if self.digests else []),
        ]

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
                "a process was killed while it encoded, by too little memory perhaps: take a smaller "
                f"--num_proc; {_KEPT}"
            ) from None
        except KeyboardInterrupt:
            self.save()
            print(f"stopped; {_KEPT}", file=sys.stderr)
            raise SystemExit(128 + signal.SIGINT) from None
        except OSError as error:
            with contextlib.suppress(OSError):
                self.save()
            what = f"{error.filename or self.folder}: {error.strerror}" if error.strerror else error
            raise OSError(f"{what}; {_KEPT}") from None
        finally:
            self.close()

    def finish(self, shares, meta, unit, advice):
        """All pieces are added: write the meta.json beside them. Raises ValueError where a split
        has nothing.

        shares: {split: its share} of the splits to which a hash assigns documents. unit, advice:
        what the documents are called, and what helps where they are too few.
        """
        n = sum(facts['documents'] for facts in self.done['splits'].values())
        if not n and SKIPPED in self.done['remarks']:
            n_skipped, first = self.done['remarks'][SKIPPED]
            raise ValueError(f"none of the {n_skipped:,} row(s) can be used: {first[0]}")
        if not n:
            raise ValueError("there is no text in the sources: every document is empty or left out")
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
        facts, digest = self.done['splits'][split], hashlib.sha256()
        for path in self.bins[split].paths():
            with open(path, 'rb') as file:
                while block := file.read(1 << 22):
                    digest.update(block)
        found = {key: facts[key] for key in ('tokens', 'bytes', 'documents')} | {
            'sha256': digest.hexdigest()
        }
        if shard := self.shard_tokens:
            found['shards'] = [
                min(shard, facts['tokens'] - i) for i in range(0, facts['tokens'], shard)
            ]
        return found | ({'learned': facts['learned']} if self.masked else {})


_NOTHING = {
    'identity': None,
    'file': 0,
    'pieces': 0,
    'size': 0,
    'dropped': 0,
    'kept': 0,
    'seconds': 0.0,
    'remarks': {},
    'splits': {},
}


def load(folder):
    """What was saved last in a folder, or _NOTHING."""
    try:
        return json.loads((folder / 'journal.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return dict(_NOTHING)


def switch(folder, new, meta):
    """Put the bins in `new` in the place of the folder's own. Stopped in between, it can be called
    again: the meta.json that stands there until then is one that readers refuse."""

    def write_meta(content):
        with files.replacing(folder / 'meta.json') as file:
            file.write(json.dumps(content, indent=1).encode())

    write_meta(
        {'dtype': "of bins that were replaced only in part: prepare them again", 'vocab_size': 0}
    )
    is_bin = re.compile(rf'({"|".join(SPLITS)})(-\d+)?\.(bin|mask)').fullmatch
    moved = {path.name for path in new.iterdir() if is_bin(path.name)}
    wanted = set()
    for split, facts in meta['splits'].items():
        numbers = [f'-{i:05d}' for i in range(len(facts['shards']))] if 'shards' in facts else ['']
        wanted |= {
            f'{split}{n}.{kind}'
            for n in numbers
            for kind in (['bin', 'mask'] if meta.get('masked') else ['bin'])
        }
    for path in folder.iterdir():
        if is_bin(path.name) and path.name not in wanted:
            path.unlink()
    for name in moved:
        os.replace(new / name, folder / name)
    files.sync_folder(folder)
    write_meta(meta)
