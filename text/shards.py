"""The raw numbers in a dataset's folder: NAME.bin, or shards NAME-00000.bin, NAME-00001.bin, …"""

import bisect
import functools
import itertools
import re

import numpy as np

OPEN = 32  # files of one array that are held open: a process may have 256 in all on macOS


class Shards:
    """The numbers of FOLDER/NAME.KIND, or of its shards one behind the other. No file: `paths` is
    empty. ValueError."""

    def __init__(self, folder, name, kind, dtype):
        self.dtype, whole = np.dtype(dtype), folder / f'{name}.{kind}'
        self.paths = sorted(
            path
            for path in folder.glob(f'{name}-*.{kind}')
            if re.fullmatch(rf'{name}-\d+\.{kind}', path.name)
        )
        if self.paths and whole.is_file():
            raise ValueError(
                f"{folder} holds both {whole.name} and {self.paths[0].name}: remove what is not meant"
            )
        for i, path in enumerate(self.paths):
            if path.name != (expected := f'{name}-{i:05}.{kind}'):
                raise ValueError(
                    f"{folder / expected} is missing: {path.name} is there, and shards have all numbers from "
                    "00000 on"
                )
        self.paths = self.paths or [whole] * whole.is_file()
        sizes = [path.stat().st_size for path in self.paths]
        for path, size in zip(self.paths, sizes):
            if size % self.dtype.itemsize:
                raise ValueError(
                    f"{path} is not a whole number of {self.dtype} ids long: it was cut off; prepare it again"
                )
        self.ends = list(itertools.accumulate(size // self.dtype.itemsize for size in sizes))
        self.starts = [0, *self.ends]
        self.name = f"{(self.paths or [whole])[0]}" + (
            f" … {self.paths[-1].name}" if len(self.paths) > 1 else ''
        )
        self._open = functools.lru_cache(OPEN)(
            functools.partial(open, mode='rb', buffering=1 << 12)
        )

    def __len__(self):
        return self.ends[-1] if self.ends else 0

    def read(self, start, n):
        """Numbers start to start + n, fewer at the end. Read, not mapped: that is faster for
        windows, and the pages of a map would stay in the process's memory."""
        pieces, at, size = [], bisect.bisect_right(self.ends, start), self.dtype.itemsize
        while n > 0 and at < len(self.ends):
            file = self._open(self.paths[at])
            file.seek((start - self.starts[at]) * size)
            pieces.append(np.frombuffer(file.read(n * size), self.dtype))
            if len(pieces[-1]) == n and len(pieces) == 1:
                return pieces[0]
            start, n, at = start + len(pieces[-1]), n - len(pieces[-1]), at + 1
        return np.concatenate([np.zeros(0, self.dtype), *pieces])
