"""Recognises bins whose ids were written as int64 or int32, and says how to convert them."""

import os
import re

import numpy as np

LOOKED_AT = 1_000_000  # ids at the start of a bin from which wider_dtype guesses their dtype


def check_dtype(shards, split, tokenizer):
    """ValueError where a file's ids were written as int64 or int32.

    shards: those of a split's tokens; tokenizer: the description of the one that made them, or
    None.
    """
    for path, start, end in zip(shards.paths, shards.starts, shards.ends):
        ids = shards.read(start, min(LOOKED_AT, end - start))
        wide = wider_dtype(ids)
        if wide is None:
            continue
        if may_separate(ids, wide, tokenizer):
            _print_separated(path, wide, shards.dtype, tokenizer)
            continue
        command, converted = conversion(path, wide, shards.dtype)
        raise ValueError(
            f"{path} seems to hold {wide} ids: read as {shards.dtype}, each one is followed by "
            f"zeros. `{command}` writes {converted} beside it, to be renamed to {path.name}. "
            f"If the ids are right as they are, put \"splits\": {{\"{split}\": "
            f"{{\"tokens\": {len(shards)}}}}} into meta.json"
        )


def _print_separated(path, wide, dtype, tokenizer):
    if os.environ.get('RANK', '0') == '0':
        command, converted = conversion(path, wide, dtype)
        print(
            f"{path}: every second id is 0, which is {tokenizer['chars'][0]!r}. If these are "
            f"{wide} ids instead, `{command}` writes {converted} beside it, to be renamed to "
            f"{path.name}",
            flush=True,
        )


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
