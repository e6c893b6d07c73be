"""Bins as files: appended to while they are prepared, then moved to where readers look."""

import json
import os
import re

import numpy as np

from system import files

SPLITS = 'train', 'val', 'test'
# The dtype in the meta.json of a folder whose bins are being replaced, which readers refuse.
REPLACED_IN_PART = "of bins that were replaced only in part: prepare them again"


class Stream:
    """One file to append arrays to, or numbered ones of `shard` items each.

    n: how many items to keep; what is behind them in the files is cut off. Raises EOFError if there
    are fewer.
    """

    def __init__(self, folder, name, suffix, dtype, shard, n):
        self.folder = folder
        self.name = name
        self.suffix = suffix
        self.dtype = np.dtype(dtype)
        self.shard = shard
        self.n = n
        self.file = None
        for path in self.paths():
            self._cut_off(path)
        if sum(path.stat().st_size for path in self.paths()) != n * self.dtype.itemsize:
            raise EOFError

    def _cut_off(self, path):
        """Remove from a file what is behind the first n items of all files."""
        left = self.n
        if self.shard:
            number = int(path.stem.rpartition('-')[2])
            left = min(self.n - number * self.shard, self.shard)
        size = left * self.dtype.itemsize
        if left <= 0:
            path.unlink()
        elif path.stat().st_size > size:
            os.truncate(path, size)

    def paths(self):
        """The files, in order."""
        pattern = f'{self.name}{self.suffix}'
        if self.shard:
            pattern = f'{self.name}-*{self.suffix}'
        return sorted(self.folder.glob(pattern))

    def append(self, array):
        array = np.ascontiguousarray(array, self.dtype)
        while len(array):
            now = array
            number = ''
            starts_shard = False
            if self.shard:
                i, inside = divmod(self.n, self.shard)
                now = array[: self.shard - inside]
                number = f'-{i:05d}'
                starts_shard = inside == 0
            if self.file is None or starts_shard:
                self.close()
                path = self.folder / f'{self.name}{number}{self.suffix}'
                self.file = open(path, 'ab', buffering=0)
            self._write(memoryview(now).cast('B'))
            self.n += len(now)
            array = array[len(now) :]

    def _write(self, content):
        try:
            while content:
                n_written = self.file.write(content)
                content = content[n_written:]
        except OSError as error:
            raise OSError(f"cannot write {self.file.name}: {error.strerror}") from None

    def sync(self):
        """Put what was written on the disk."""
        if self.file:
            os.fsync(self.file.fileno())

    def close(self):
        if self.file:
            self.sync()
            self.file.close()
        self.file = None


def put_in_place(folder, new, meta):
    """Move the bins in the folder `new` to `folder`, in the place of those there.

    Can be called again after it was stopped: until it is done, `folder` has a meta.json that
    readers refuse.
    """
    _write_meta(folder, {'dtype': REPLACED_IN_PART, 'vocab_size': 0})
    is_bin = re.compile(rf'({"|".join(SPLITS)})(-\d+)?\.(bin|mask)').fullmatch
    moved = {path.name for path in new.iterdir() if is_bin(path.name)}
    wanted = _names(meta)
    for path in folder.iterdir():
        if is_bin(path.name) and path.name not in wanted:
            path.unlink()
    for name in moved:
        os.replace(new / name, folder / name)
    files.sync_folder(folder)
    _write_meta(folder, meta)


def _names(meta):
    """The names of the files that a meta.json describes."""
    kinds = ['bin']
    if meta.get('masked'):
        kinds.append('mask')
    names = set()
    for split, facts in meta['splits'].items():
        stems = [split]
        if 'shards' in facts:
            stems = [f'{split}-{i:05d}' for i in range(len(facts['shards']))]
        for kind in kinds:
            names |= {f'{stem}.{kind}' for stem in stems}
    return names


def _write_meta(folder, meta):
    with files.replacing(folder / 'meta.json') as file:
        file.write(json.dumps(meta, indent=1).encode())
