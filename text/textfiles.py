"""Files of text by their names: those of folders and globs, standard input, datasets on the Hugging
Face Hub; packed ones.

Judges by a file's name what kind it is, and by its beginning whether it is text at all.
"""

import codecs
import contextlib
import fnmatch
import glob
import gzip
import io
import json
import os
import re
import shlex
import shutil
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

from system import files, hub
from text import conversations

BLOCK = 1 << 20  # bytes read at a time
SNIFF = 1 << 16  # bytes at the beginning of a file by which it is taken for text
# Named like these, a file holds rows that somebody exported, not text.
TABLES = '.csv', '.tsv', '.json'
STANDARD_INPUT = 'standard input'  # the File's name
BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: 'UTF-32',
    codecs.BOM_UTF32_BE: 'UTF-32',
    codecs.BOM_UTF16_LE: 'UTF-16',
    codecs.BOM_UTF16_BE: 'UTF-16',
}


class File(NamedTuple):
    name: str  # as the user knows it
    path: Path
    kind: str  # text, jsonl, parquet, or table: one of TABLES, which is an error
    packed: str  # '', gz, zst
    size: int  # bytes on the disk
    changed: object  # what tells it from another file of this name and size
    # repository, commit and name of a file of the Hub, which is fetched to `path`
    origin: tuple | None = None
    split: str | None = None  # where its documents go; None: by a hash of each


def find(word, field=None, folder=None, as_text=False):
    """The Files that a word stands for: a file, a folder, a glob, `-`,
    owner/name[@revision][:folder or glob] on the Hub.

    field: where it is given, .json and standard input hold rows. folder: in whose files.workplace
    copies go; the bins there are not sources. as_text: read TABLES as the text that they are.
    Raises ValueError or OSError.
    """
    if not word:
        raise ValueError("a source has an empty name")
    try:
        path = Path(word).expanduser()
    except RuntimeError:
        raise FileNotFoundError(f"{word}: there is no such user here") from None
    if word == '-':
        return [_standard_input(field, folder)]
    if path.is_file():
        return [_checked(_file(word, path, field, as_text))]
    if path.is_dir():
        found = sorted((p.relative_to(path).as_posix(), p) for p in _walk(path, folder))
        stem = word.rstrip('/')
        return _readable(word, [_file(f'{stem}/{name}', p, field, as_text) for name, p in found])
    if path.exists():
        raise ValueError(
            f"{word} is neither a file nor a folder: send it to standard input, and take - for its name"
        )
    if glob.has_magic(str(path)):
        names = sorted(
            name for name in glob.glob(str(path), recursive=True) if Path(name).is_file()
        )
        if names:
            return _readable(word, [_file(name, Path(name), field, as_text) for name in names])
    return _on_the_hub(word, field, folder)


def _walk(path, folder):
    """The files in a folder, without hidden ones and those that preparing has written into it."""
    own = Path(folder).resolve() if folder else None
    for root, folders, names in os.walk(path):
        is_own = Path(root).resolve() == own
        folders[:] = [name for name in folders if not name.startswith('.')]
        for name in names:
            left_out = name.startswith('.') or (
                is_own and (name == 'meta.json' or name.endswith(('.bin', '.mask')))
            )
            if not left_out and Path(root, name).is_file():  # no socket, no link to nowhere
                yield Path(root, name)


def _file(name, path, field, as_text=False):
    stat = path.stat()
    return File(name, path, *_kind(name, field, as_text), stat.st_size, stat.st_mtime_ns)


def _kind(name, field, as_text=False):
    """(kind, packed) of a file, by the end of its name."""
    stem, packed = name.lower(), ''
    if stem.endswith(('.gz', '.zst')):
        stem, _, packed = stem.rpartition('.')
    if stem.endswith('.parquet'):
        return 'parquet', packed
    if stem.endswith(('.jsonl', '.ndjson', '.jsonlines')):
        return 'jsonl', packed
    if stem.endswith(TABLES) and not as_text:
        if field and stem.endswith('.json'):
            return 'jsonl', packed
        return 'table', packed
    return 'text', packed


def _standard_input(field, folder):
    """Standard input as a file: a vocabulary is made by reading everything once more."""
    path = files.workplace(folder) / 'stdin'
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"standard input: copying it to {path}", flush=True)
    try:
        with open(path, 'wb') as file:
            shutil.copyfileobj(sys.stdin.buffer, file, BLOCK)
    except OSError as error:
        raise OSError(f"cannot copy standard input to {path}: {error.strerror}") from None
    file = _file(STANDARD_INPUT, path, field)
    return _checked(file._replace(kind='jsonl' if field else 'text', changed=files.sha256(path)))


def _on_the_hub(word, field, folder):
    """The files of owner/name[@revision][:folder or glob], a dataset on the Hub or in
    NANOGPT_MIRROR. A command that was stopped goes on with the commit that it began with."""
    where, _, part = word.partition(':')
    repo, _, revision = where.partition('@')
    if not re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', repo) or re.search(
        r'\.(txt|jsonl?|parquet|md|gz|zst)$', repo
    ):
        raise FileNotFoundError(
            f"there is no file{' like' if glob.has_magic(word) else ' or folder'} {word}"
        )
    if not revision:  # else it can't be meant for a file
        print(
            f"{word}: there is no such file or folder here, so it is taken for a dataset on the Hugging Face Hub",
            flush=True,
        )
    try:
        if mirror := hub.mirror_folder(repo):
            found = sorted((p.relative_to(mirror).as_posix(), p) for p in _walk(mirror, folder))
            return [_checked(_file(name, p, field)) for name, p in found if _is_wanted(name, part)]
        pinned = files.workplace(folder) / 'hub.json'
        commits = json.loads(pinned.read_text(encoding='utf-8')) if pinned.is_file() else {}
        commit, sizes = hub.listing(repo, commits.get(where) or revision or None)
    except OSError as error:
        raise (
            error
            if revision
            else OSError(f"{word} is neither a file nor a folder here, and {error}")
        ) from None
    pinned.parent.mkdir(parents=True, exist_ok=True)
    pinned.write_text(json.dumps({**commits, where: commit}), encoding='utf-8')
    wanted = sorted(name for name in sizes if _is_wanted(name, part))
    if not wanted:
        raise ValueError(
            f"{word}: of the {len(sizes)} files of commit {commit}, none is called .parquet, .jsonl or .txt "
            + f"and lies in {part}" * bool(part)
        )
    print(
        f"{repo}: commit {commit}, {len(wanted):,} file(s), {sum(map(sizes.get, wanted)) / 1e6:,.1f} MB, the first is "
        f"{wanted[0]}; each is removed when it is read",
        flush=True,
    )
    path = pinned.with_name('hub') / repo.replace('/', '--')
    return [
        File(
            f'{repo}:{name}',
            path / name,
            *_kind(name, field),
            sizes[name],
            commit,
            (repo, commit, name),
        )
        for name in wanted
    ]


def _is_wanted(name, part):
    """Whether a file of a dataset is text or rows, and in the folder `part` or called as that glob
    says."""
    is_text = re.search(r'\.(parquet|(jsonl|ndjson|jsonlines|txt)(\.gz|\.zst)?)$', name.lower())
    # a server's word: it stays in the folder
    is_inside = not re.search(r'(^|/)\.\.(/|$)|^/|[\\:\x00-\x1f]', name)
    return (
        is_text
        and is_inside
        and (not part or fnmatch.fnmatch(name, part) or name.startswith(part.rstrip('/') + '/'))
    )


def _checked(file):
    if wrong := _what_is_wrong(file):
        raise ValueError(f"{file.name} {wrong}")
    return file


def _readable(word, found):
    """Those of the files found that are text or rows; says how many are left out. ValueError where
    there are TABLES: they may be most of somebody's data."""
    tables = [file.name for file in found if file.kind == 'table']
    if tables:
        raise ValueError(
            f"{word}: {len(tables):,} of {len(found):,} files are .csv, .tsv or "
            f".json, not text; the first is {tables[0]}. Convert them (the error for "
            "one alone says how), leave them out by a glob in quotes, such as "
            "'*.txt', or read them as they are with --as_text"
        )
    readable, not_text, not_lines = [], [], []
    for file in found:
        why_not_text, why_not_lines = _judged(file)
        if why_not_text:
            not_text.append(file.name)
        elif why_not_lines:
            not_lines.append((file.name, why_not_lines))
        else:
            readable.append(file)
    if not_text:
        print(
            f"{word}: {len(not_text):,} of {len(found):,} files left out, which are not UTF-8 "
            f"text; the first is {not_text[0]}"
        )
    if not_lines:
        first, why = not_lines[0]
        print(
            f"{word}: {len(not_lines):,} of {len(found):,} files left out, which do not hold a "
            f"row on each line; the first, {first}, {why}"
        )
    return readable


def _what_is_wrong(file):
    """Why a file is neither text nor rows, judged by its beginning, or ''."""
    if file.kind == 'table':
        with reading(file) as (_, stream):
            return _how_to_convert(file, stream.read(SNIFF))
    why_not_text, why_not_lines = _judged(file)
    return why_not_text or why_not_lines


def _judged(file):
    """(why a file is not UTF-8 text, why it can't be read as rows), each '' if it is fine. Judged
    by the beginning of a file that is not one of TABLES."""
    if file.kind == 'parquet':
        return '', ''
    with reading(file) as (_, stream):
        head = stream.read(SNIFF)
    if why_not_text := _why_not_text(head, is_whole=len(head) < SNIFF):
        return why_not_text, ''
    if file.kind != 'jsonl':
        return '', ''
    return '', _what_is_wrong_with_lines(file, head)


def _why_not_text(head, is_whole):
    """Why these bytes, with which a file begins, are not UTF-8 text, or ''."""
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return f"is {encoding}, not UTF-8: `iconv -f {encoding} -t UTF-8` converts it"
    if b'\0' in head:
        return "is a binary file (there are zero bytes in it)"
    try:
        codecs.getincrementaldecoder('utf-8')().decode(head, final=is_whole)
    except UnicodeDecodeError as error:
        return not_utf8(error.start)
    return ''


def not_utf8(at):
    """What is said of a file whose byte `at` is not UTF-8."""
    return f"is not UTF-8 at byte {at:,}: `iconv -f ITS_ENCODING -t UTF-8` converts it"


def _how_to_convert(file, head):
    """What is said of a file that is one of TABLES, and begins with these bytes."""
    _, ending = _stem_and_ending(file)
    if ending == '.json':
        return _how_to_convert_json(file, head)
    dialect = ",delimiter='\\t'" if ending == '.tsv' else ''
    command = _command(file, f"for row in csv.DictReader({_opened(file, as_text=True)}{dialect})")
    return (
        f"is not text but a table: `{command}` writes its rows as lines, whose columns --field "
        "names; --as_text reads it as it is"
    )


def _how_to_convert_json(file, head):
    as_it_is = "; --as_text reads it as it is"
    if array := _how_to_convert_array(file, head):
        return f"is not text but {array}{as_it_is}"
    first, others = _first_line(head)
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, (dict, list)) and others.strip():
        return (
            "holds a row on each line: --field=KEY reads what is under that key, or call it "
            f".jsonl{as_it_is}"
        )
    return f"is not text but {_how_to_convert_object(file)}{as_it_is}"


def _how_to_convert_object(file):
    command = _command(file, f"for row in {_parsed(file)}['KEY']")
    return f"JSON: `{command}` writes the list under a KEY as lines"


def _what_is_wrong_with_lines(file, head):
    """Why a file can't be read as JSONL, judged by its beginning, or ''."""
    if array := _how_to_convert_array(file, head):
        return f"is {array}, which can be prepared"
    _, ending = _stem_and_ending(file)
    first, _ = _first_line(head)
    if ending == '.json' and first.strip() == '{':
        return f"is {_how_to_convert_object(file)}, which can be prepared"
    return ''


def _how_to_convert_array(file, head):
    """What is said of a file that is one JSON array, judged by its beginning, or ''. A line may
    well be an array, of messages; but the file as a whole may not."""
    text = _decoded(head)
    if not text.startswith('['):
        return ''
    line, others = _first_line(head)
    has_messages = _begins_with_message(line if line.strip() != '[' else text)
    try:
        json.loads(line)
        if others.strip() or (has_messages and file.kind == 'jsonl'):
            return ''
    except (ValueError, RecursionError):
        is_cut_off = len(head) == SNIFF and '\n' not in text
        if has_messages and is_cut_off and file.kind == 'jsonl':
            return ''
    rows = f'for row in {_parsed(file)}'
    if has_messages:  # it is one row itself
        rows = f'for row in [{_parsed(file)}]'
    return f"one JSON array: `{_command(file, rows)}` writes its rows as lines"


def _begins_with_message(text):
    """Whether the first item of an array is a message, as far as the text goes."""
    text = text[1:].lstrip()
    try:
        return conversations.is_message(json.JSONDecoder().raw_decode(text)[0])
    except (ValueError, RecursionError):  # it is longer
        return re.match(r'\{\s*"(role|from|content|value)"\s*:', text) is not None


def _decoded(head):
    return head.decode(errors='ignore').removeprefix('\ufeff').lstrip()


def _first_line(head):
    """(the first line, the others) of these bytes."""
    line, _, others = _decoded(head).partition('\n')
    return line, others


def _stem_and_ending(file):
    """The name of a file without its ending, and this in small letters: ('a', '.json') of
    a.JSON.gz."""
    name = file.name
    if file.packed:
        name = name[: -len(f'.{file.packed}')]
    stem, dot, ending = name.rpartition('.')
    return stem, (dot + ending).lower()


def _command(file, rows):
    """The command that writes a file's rows as JSONL into a file of another name, or where it came
    by standard input, to standard output.

    rows: Python, from "for row in" on.
    """
    modules = ['json', 'sys']
    modules += [name for name in ('csv', 'gzip', 'zstandard') if f'{name}.' in rows]
    program = f"import {','.join(modules)};"
    if 'csv' in modules:
        program += 'csv.field_size_limit(1<<30);'  # else texts end at 128 KB
    command = f'python -c "{program}[print(json.dumps(row)) {rows}]"'
    if file.name == STANDARD_INPUT:
        return command
    stem, ending = _stem_and_ending(file)
    # What ends in .jsonl already needs another name.
    lines = f'{stem}.jsonl' if ending in TABLES else f'{stem}-rows.jsonl'
    return f"{command} {_quoted(file.name)} > {_quoted(lines)}"


def _quoted(name):
    """A name as a word of a command, which a dash in front does not make an option."""
    return shlex.quote(f'./{name}' if name.startswith('-') else name)


def _parsed(file):
    """A Python expression: what the JSON in a file stands for."""
    return f'json.load({_opened(file)})'


def _opened(file, as_text=False):
    """A Python expression: the file that is named in sys.argv[1], opened."""
    if file.name == STANDARD_INPUT:
        return 'sys.stdin.buffer'
    opener = {'': 'open', 'gz': 'gzip.open', 'zst': 'zstandard.open'}[file.packed]
    if as_text:
        return f"{opener}(sys.argv[1],'rt',encoding='utf-8-sig',newline='')"
    return f"{opener}(sys.argv[1],'rb')"


def read_text(path, as_text=False):
    """The text of one file, .gz and .zst too, without its byte order mark. as_text: also where its
    name says that it holds rows. Raises ValueError or OSError."""
    file = _file(str(path), Path(path), field=None)
    if file.kind != 'text' and not as_text:
        raise ValueError(
            f"{path} holds rows, not text: `python data/prepare.py NAME "
            f"{shlex.quote(str(path))}` makes a dataset of them, whose NAME can be "
            "given instead"
        )
    with reading(file) as (_, stream):
        content = stream.read()
    if wrong := _why_not_text(content[:SNIFF], is_whole=len(content) < SNIFF):
        raise ValueError(f"{path} {wrong}")
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} {not_utf8(error.start)}") from None


@contextlib.contextmanager
def reading(file):
    """(the file on the disk, its text) as binary files. Raises ValueError where it is damaged."""
    damages = [EOFError, zlib.error, gzip.BadGzipFile]
    try:
        with open(file.path, 'rb') as raw:
            if file.packed == 'zst':
                try:
                    import zstandard
                except ImportError:
                    raise ValueError(
                        f"{file.name} needs a package: pip install zstandard"
                    ) from None
                damages.append(zstandard.ZstdError)
                yield (
                    raw,
                    io.BufferedReader(_Unpacked(_frames(raw, zstandard.ZstdDecompressor())), BLOCK),
                )
            else:
                yield raw, gzip.GzipFile(fileobj=raw) if file.packed else raw
    except tuple(damages) as error:
        raise ValueError(f"{file.name} is damaged: {error}") from None


def _frames(raw, zstd):
    """What a .zst file holds, block by block. EOFError where its end is missing: the library's own
    reader says nothing."""
    frame = None
    while block := raw.read(1 << 12):  # a block may hold 32,000 times its size
        while block:
            frame = frame or zstd.decompressobj()
            yield frame.decompress(block)
            block, frame = frame.unused_data, None if frame.eof else frame
    if frame:
        raise EOFError("its end is missing")


class _Unpacked(io.RawIOBase):
    """An iterator of bytes as a file."""

    def __init__(self, blocks):
        self.blocks, self.left = blocks, b''

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.left:
            if (block := next(self.blocks, None)) is None:
                return 0
            self.left = memoryview(block)
        n = min(len(buffer), len(self.left))
        buffer[:n], self.left = self.left[:n], self.left[n:]
        return n


def fetched(file):
    """The file, once it is here."""
    if file.origin and not (file.path.is_file() and file.path.stat().st_size == file.size):
        repo, commit, name = file.origin
        if hub.download(repo, name, commit, 'dataset', file.path.parents[name.count('/')]) is None:
            raise OSError(f"{file.name} is not there any more")
    return file
