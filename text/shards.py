"""What a dataset's folder holds: meta.json, and raw numbers, in NAME.bin or in shards
NAME-00000.bin, NAME-00001.bin, …"""

import bisect
import functools
import itertools
import json
import re

import numpy as np

from text.tokenizer import GPT2, check_description, describe_meta_pkl

LOOKED_AT = 1_000_000  # ids at the start of a bin from which wider_dtype guesses their dtype
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


def wider_dtype(ids):
    """'int64' or 'int32' if `ids`, the start of a bin, seem to have been written so; else None.

    ids: (n,), as read in the bin's own dtype, uint16 or uint32. An int64 id read as uint16 is
    followed by three zeros, an int32 id by one.
    """
    for wide in ('int64', 'int32'):
        per_id = np.dtype(wide).itemsize // ids.dtype.itemsize
        if per_id == 1 or len(ids) % per_id or len(ids) < 64:
            continue
        columns = ids.reshape(-1, per_id)
        first = columns[:, 0]
        if columns[:, 1:].any():
            continue
        if first.min() == first.max():  # 1, 0, 1, 0, …: as int32 it would be the same id for ever
            continue
        return wide
    return None


def may_separate(ids, wide, tokenizer):
    """Whether the zeros in `ids`, which look like `wide` ones, may be the text's own.

    So it is where every second character is the same line end, space or punctuation mark, as in
    "0 1 1 0". tokenizer: the description of the tokenizer that made the ids, or None.
    """
    if not tokenizer or tokenizer['kind'] != 'char' or tokenizer['chars'][:1].isalnum():
        return False
    per_id = np.dtype(wide).itemsize // ids.dtype.itemsize
    return per_id == 2 and bool(ids[::2].min() > 0)


def conversion(path, wide, dtype):
    """(command, name): a shell command that writes the ids of `path`, which are `wide`, as `dtype`
    to a file of this name beside it. It leaves `path` as it is, and refuses ids that do not fit."""
    name = f"{path.stem}-{dtype}.bin"
    limit = np.iinfo(dtype).max + 1
    program = (
        f"import numpy; p = '{_escaped(path.as_posix())}'; ids = numpy.memmap(p, '{wide}', 'r'); "
        f"0 <= ids.min() and ids.max() < {limit} or exit('error: an id is not from 0 to {limit - 1}'); "
        f"ids.astype('{dtype}').tofile(p[:-4] + '-{dtype}.bin')"
    )
    return f'python -c "{program}"', name


def _escaped(text):
    """A text for a literal of Python that stands between double quotes in a shell.

    Two spaces are escaped too: an error is one line, in which they would become one.
    """

    def escape(match):
        return f"\\U{ord(match[0]):08x}"

    return re.sub(r'[^\w /.,:=+@~-]| (?= )', escape, text)


def read_meta(folder):
    """(tokenizer description or None, vocab_size, dtype, meta) by meta.json or nanoGPT's meta.pkl;
    without either, GPT-2's.

    meta is what meta.json holds; where there is no tokenizer, its `no_tokenizer` says why.
    Raises ValueError.
    """
    if (folder / 'meta.json').is_file():
        try:
            meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
            if meta['dtype'] not in ('uint16', 'uint32') or type(meta['vocab_size']) is not int:
                raise ValueError(f"dtype {meta['dtype']!r}, vocab_size {meta['vocab_size']!r}")
            if not all(
                type(facts['tokens']) is int and 0 < facts.get('bytes', 1) < 1 << 63
                for facts in meta.get('splits', {}).values()
            ):
                raise ValueError("splits")
            for key, most in (
                ('vocab_size', 1 << 32),
                ('separator', meta['vocab_size']),
                ('eot', meta['vocab_size']),
            ):
                if type(number := meta.get(key, 0)) is not int or not 0 <= number < max(1, most):
                    raise ValueError(f"{key} {number!r}")
            if meta['tokenizer']:
                check_description(meta['tokenizer'])
            else:
                meta['no_tokenizer'] = f"{folder / 'meta.json'} names no tokenizer"
            return meta['tokenizer'], meta['vocab_size'], meta['dtype'], meta
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{folder / 'meta.json'} cannot be read ({type(error).__name__}: {error})"
            ) from None
    if (folder / 'meta.pkl').is_file():
        try:
            description, vocab_size, problem = describe_meta_pkl((folder / 'meta.pkl').read_bytes())
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        meta = {}
        if problem:
            meta['no_tokenizer'] = f"{folder / 'meta.pkl'} {problem}"
        return description, vocab_size, 'uint16', meta
    return dict(GPT2), 50257, 'uint16', {}
