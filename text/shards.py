"""Reads the raw numbers in a dataset's folder: NAME.bin, or shards NAME-00000.bin,
NAME-00001.bin, …"""

import bisect
import functools
import itertools
import re

import numpy as np

# Files of one array that are held open: a process may have 256 in all on macOS.
MOST_OPEN = 32


class Shards:
    """The numbers in FOLDER/NAME.KIND, or in its shards one after the other.

    paths: the files, none if there is none; starts, ends: the numbers of each file's first number
    and of the one after its last; name: the paths in words. Raises ValueError if both forms are
    there, a shard is missing, or a file was cut off.
    """

    def __init__(self, folder, name, kind, dtype):
        self.dtype = np.dtype(dtype)
        whole = folder / f'{name}.{kind}'
        self.paths = _shard_paths(folder, name, kind)
        if self.paths and whole.is_file():
            raise ValueError(
                f"{folder} holds both {whole.name} and {self.paths[0].name}: remove what is not "
                "meant"
            )
        if not self.paths and whole.is_file():
            self.paths = [whole]

        lengths = []
        for path in self.paths:
            size = path.stat().st_size
            if size % self.dtype.itemsize:
                raise ValueError(
                    f"{path} is not a whole number of {self.dtype} ids long: it was cut off; "
                    "prepare it again"
                )
            lengths.append(size // self.dtype.itemsize)
        self.ends = list(itertools.accumulate(lengths))
        self.starts = [0, *self.ends]

        self.name = str(whole)
        if self.paths:
            self.name = str(self.paths[0])
        if len(self.paths) > 1:
            self.name += f" … {self.paths[-1].name}"
        self._open = functools.lru_cache(MOST_OPEN)(
            functools.partial(open, mode='rb', buffering=1 << 12)
        )

    def __len__(self):
        return self.ends[-1] if self.ends else 0

    def read(self, start, n):
        """Numbers start to start + n, fewer at the end, as a NumPy array.

        They are read, not mapped: that is faster for windows, and a map's pages would stay in the
        process's memory.
        """
        size = self.dtype.itemsize
        pieces = []
        at = bisect.bisect_right(self.ends, start)
        while n > 0 and at < len(self.ends):
            file = self._open(self.paths[at])
            file.seek((start - self.starts[at]) * size)
            piece = np.frombuffer(file.read(n * size), self.dtype)
            if len(piece) == n and not pieces:
                return piece
            pieces.append(piece)
            start += len(piece)
            n -= len(piece)
            at += 1
        return np.concatenate([np.zeros(0, self.dtype), *pieces])


def _shard_paths(folder, name, kind):
    """The files NAME-00000.KIND, … in a folder, in their order. Raises ValueError if one of them is
    missing."""
    paths = []
    for path in sorted(folder.glob(f'{name}-*.{kind}')):
        if re.fullmatch(rf'{name}-\d+\.{kind}', path.name):
            paths.append(path)
    for i, path in enumerate(paths):
        expected = f'{name}-{i:05}.{kind}'
        if path.name != expected:
            raise ValueError(
                f"{folder / expected} is missing: {path.name} is there, and shards need all "
                "numbers from 00000 on"
            )
    return paths
