"""What a dataset is made of: text, JSONL and parquet files, folders, globs, standard input, datasets on the Hugging Face
Hub, as bins.prepare takes them.

One process reads, and cuts what it reads into pieces of about a megabyte, which is cheap; workers parse and encode them.
A text file's byte order mark is no part of its text; everything else is, CR LF too.
"""
import builtins
import codecs
import contextlib
import fnmatch
import glob
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import sys
import threading
import zlib
from bisect import bisect_left
from concurrent.futures import Future
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

import files
import hub
from bins import Part
from chat import Template

PIECE, LARGE = 1 << 20, 1 << 22     # bytes of a piece, about; of the largest text that is not encoded in parts
SNIFF = 1 << 16                     # bytes at the beginning of a file by which it is taken for text
ROWS = 'jsonl', 'parquet'
SEPARATORS = {'file': None, 'paragraph': r'\n(?:[ \t]*\r?\n)+', 'line': r'\n'}     # behind a document and its last \r
ENDS = {'file': '', 'paragraph': ' \t\r\n', 'line': '\r\n'}   # what is at its end and no part of it
BLANK_LINES = re.compile(rb'(?:[ \t]*\r?\n)+')
BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: 'UTF-32', codecs.BOM_UTF32_BE: 'UTF-32',
                    codecs.BOM_UTF16_LE: 'UTF-16', codecs.BOM_UTF16_BE: 'UTF-16'}
# Where a text can be cut so that its parts, each encoded on its own, have the same ids by GPT-2's and tiktoken's other
# encodings: behind a newline between words, in front of a space between words.
CUTS = re.compile(r'(?<=\S)\n(?=[^\s/])'), re.compile(r'(?<=\S)(?= [^\W\d_])')
SURROGATE = re.compile(r'\\u[dD][89a-fA-F]')


class File(NamedTuple):
    name: str           # as the user knows it
    path: Path
    kind: str           # text, jsonl, parquet
    packed: str         # '', gz, zst
    size: int           # bytes on the disk
    changed: object     # what tells it from another file of this name and size
    origin: tuple | None = None     # repository, commit and name of a file of the Hub, which is fetched to `path`


class Chunk(NamedTuple):
    """Documents of a file that follow each other, or a part of one that is large."""
    name: str
    kind: str
    data: object                    # bytes; of parquet a list of rows
    offset: int = 0                 # of the data in the text, in bytes
    line: int = 1                   # the number of its first line, or row
    key: bytes | None = None        # key, is_last, place: bins.Part's
    is_last: bool = True
    place: tuple | None = None


class Piece(NamedTuple):
    file: int           # the number of the file in which it begins
    size: int           # bytes on the disk
    chunks: list


def open(words, field=None, document='file', template=None, folder=None, max_bytes=None):
    """The source that the words stand for: files, folders, globs, `-`, owner/name[@revision][:folder or glob] on the Hub.
    Raises ValueError or OSError.

    field: of rows, 'text' where it is None; a.b is b in a; two with a comma are what a user asks and an assistant answers,
    and one that holds messages is a conversation. document: what is one in a text: the file, a paragraph, a line.
    template: a chat template, chat.DEFAULT where it is None. folder: where the bins will be; standard input is copied into
    its parts/, and what preparing has put there is no source. max_bytes: take only the beginning, about so much of the
    files' size.
    """
    if document not in SEPARATORS:
        raise ValueError(f"document={document!r} is unknown: take {', '.join(SEPARATORS)}")
    folder = folder and Path(folder)
    found = [file for word in words for file in _files(str(word), field, folder)]
    return Files(found, field, document, template, folder, max_bytes)


# ---- which files -----------------------------------------------------------------------------------------------------

def _files(word, field, folder):
    """The files that a word stands for."""
    path = Path(word).expanduser()
    if word == '-':
        return [_standard_input(field, folder)]
    if path.is_file():
        return [_checked(_file(word, path, field))]
    if path.is_dir():
        found = sorted((p.relative_to(path).as_posix(), p) for p in _walk(path, folder))
        return _readable(word, [_file(f'{word.rstrip("/")}/{name}', p, field) for name, p in found])
    if path.exists():
        raise ValueError(f"{word} is neither a file nor a folder: send it to standard input, and take - for its name")
    if glob.has_magic(str(path)):
        names = sorted(name for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if names:
            return _readable(word, [_file(name, Path(name), field) for name in names])
    return _on_the_hub(word, field, folder)


def _walk(path, folder):
    """The files in a folder, without hidden ones and those that preparing has written into it."""
    own = Path(folder).resolve() if folder else None
    for root, folders, names in os.walk(path):
        is_own = Path(root).resolve() == own
        folders[:] = [name for name in folders if not name.startswith('.') and not (is_own and name == 'parts')]
        for name in names:
            left_out = name.startswith('.') or (is_own and (name == 'meta.json' or name.endswith(('.bin', '.mask'))))
            if not left_out and Path(root, name).is_file():     # no socket, no link to nowhere
                yield Path(root, name)


def _file(name, path, field):
    stat = path.stat()
    return File(name, path, *_kind(name, field), stat.st_size, stat.st_mtime_ns)


def _kind(name, field):
    """(kind, packed) of a file, by the end of its name."""
    stem, packed = name.lower(), ''
    if stem.endswith(('.gz', '.zst')):
        stem, _, packed = stem.rpartition('.')
    return ('parquet' if stem.endswith('.parquet') else
            'jsonl' if stem.endswith(('.jsonl', '.ndjson', '.jsonlines')) or (field and stem.endswith('.json')) else
            'text'), packed


def _standard_input(field, folder):
    """Standard input as a file: a vocabulary is made by reading everything once more."""
    path = Path(folder) / 'parts' / 'stdin'
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"standard input: copying it to {path}", flush=True)
    try:
        with builtins.open(path, 'wb') as file:
            shutil.copyfileobj(sys.stdin.buffer, file, PIECE)
    except OSError as error:
        raise OSError(f"cannot copy standard input to {path}: {error.strerror}") from None
    file = _file('standard input', path, field)
    return _checked(file._replace(kind='jsonl' if field else 'text', changed=files.sha256(path)))


def _on_the_hub(word, field, folder):
    """The files of owner/name[@revision][:folder or glob], a dataset on the Hub or in NANOGPT_MIRROR. A command that was
    stopped goes on with the commit that it began with."""
    where, _, part = word.partition(':')
    repo, _, revision = where.partition('@')
    if not re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', repo) or re.search(r'\.(txt|jsonl?|parquet|md|gz|zst)$', repo):
        raise FileNotFoundError(f"there is no file{' like' if glob.has_magic(word) else ' or folder'} {word}")
    if not revision:    # else it can't be meant for a file
        print(f"{word}: there is no such file or folder here, so it is taken for a dataset on the Hugging Face Hub",
              flush=True)
    try:
        if mirror := hub.mirror_folder(repo):
            found = sorted((p.relative_to(mirror).as_posix(), p) for p in _walk(mirror, folder))
            return [_checked(_file(name, p, field)) for name, p in found if _is_wanted(name, part)]
        pinned = Path(folder) / 'parts' / 'hub.json'
        commits = json.loads(pinned.read_text(encoding='utf-8')) if pinned.is_file() else {}
        commit, sizes = hub.listing(repo, commits.get(where) or revision or None)
    except OSError as error:
        raise error if revision else OSError(f"{word} is neither a file nor a folder here, and {error}") from None
    pinned.parent.mkdir(parents=True, exist_ok=True)
    pinned.write_text(json.dumps({**commits, where: commit}), encoding='utf-8')
    wanted = sorted(name for name in sizes if _is_wanted(name, part))
    if not wanted:
        raise ValueError(f"{word}: of the {len(sizes)} files of commit {commit}, none is called .parquet, .jsonl or .txt "
                         + f"and lies in {part}" * bool(part))
    print(f"{repo}: commit {commit}, {len(wanted):,} file(s), {sum(map(sizes.get, wanted)) / 1e6:,.1f} MB, the first is "
          f"{wanted[0]}; each is removed when it is read", flush=True)
    path = pinned.with_name('hub') / repo.replace('/', '--')
    return [File(f'{repo}:{name}', path / name, *_kind(name, field), sizes[name], commit, (repo, commit, name))
            for name in wanted]


def _is_wanted(name, part):
    """Whether a file of a dataset is text or rows, and in the folder `part` or called as that glob says."""
    is_text = re.search(r'\.(parquet|(jsonl|ndjson|jsonlines|txt)(\.gz|\.zst)?)$', name.lower())
    return is_text and (not part or fnmatch.fnmatch(name, part) or name.startswith(part.rstrip('/') + '/'))


def _checked(file):
    if wrong := _what_is_wrong(file):
        raise ValueError(f"{file.name} {wrong}")
    return file


def _readable(word, found):
    """Those of the files found that are text or rows; says how many are left out."""
    wrong = {file for file in found if _what_is_wrong(file)}
    if wrong:
        first = next(file.name for file in found if file in wrong)
        print(f"{word}: {len(wrong):,} of {len(found):,} files left out, which are no UTF-8 text; the first is {first}")
    return [file for file in found if file not in wrong]


def _what_is_wrong(file):
    """Why a file is no text, judged by its beginning, or ''."""
    if file.kind == 'parquet':
        return ''
    with _reading(file) as (_, stream):
        head = stream.read(SNIFF)
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return f"is {encoding}, not UTF-8: `iconv -f {encoding} -t UTF-8` converts it"
    if b'\0' in head:
        return "is a binary file (there are zero bytes in it)"
    try:
        codecs.getincrementaldecoder('utf-8')().decode(head, final=len(head) < SNIFF)
    except UnicodeDecodeError as error:
        return f"is not UTF-8 at byte {error.start:,}: `iconv -f ITS_ENCODING -t UTF-8` converts it"
    if file.kind == 'jsonl' and head.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b'['):
        return "is one JSON array: `jq -c '.[]'` makes lines of it, a row on each"
    return ''


@contextlib.contextmanager
def _reading(file):
    """(the file on the disk, its text) as binary files. Raises ValueError where it is damaged."""
    damages = [EOFError, zlib.error, gzip.BadGzipFile]
    try:
        with builtins.open(file.path, 'rb') as raw:
            if file.packed == 'zst':
                try:
                    import zstandard
                except ImportError:
                    raise ValueError(f"{file.name} needs a package: pip install zstandard") from None
                damages.append(zstandard.ZstdError)
                unpacked = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
                yield raw, io.BufferedReader(unpacked, PIECE)
            else:
                yield raw, gzip.GzipFile(fileobj=raw) if file.packed else raw
    except tuple(damages) as error:
        raise ValueError(f"{file.name} is damaged: {error}") from None


# ---- from files to pieces, and from pieces to documents --------------------------------------------------------------

class Files:
    """The documents in files, as bins.prepare takes them; `texts` are those of a vocabulary."""

    def __init__(self, found, field, document, template, folder, max_bytes):
        if not found:
            raise ValueError("there is no file to read")
        if max_bytes:
            ends = list(accumulate(file.size for file in found))
            found = found[:bisect_left(ends, max_bytes) + 1]
        self.files, self.max_bytes, self.size = found, max_bytes or sys.maxsize, sum(file.size for file in found)
        self.size = min(self.size, self.max_bytes)
        self.document, self.fields, self.template = document, (field or 'text').split(','), None
        if len(self.fields) > 2 or not all(self.fields):
            raise ValueError(f"field={field!r} must be a name, or two with a comma: of what is asked, what is answered")
        if rows := [file for file in found if file.kind in ROWS]:
            first = self._first_row(rows[0], folder)
            if field is None and 'text' not in first and 'messages' in first:
                self.fields = ['messages']
            if len(self.fields) == 2 or isinstance(first.get(self.fields[0]), list):
                self.template = Template(template)
        if template and not self.template:
            raise ValueError("a template is for rows with messages, or for --field=ASKED,ANSWERED; there are no such rows")
        self.facts = {'masked': True, 'template': self.template.description} if self.template else {}
        if commits := sorted({f'{file.origin[0]}@{file.origin[1]}' for file in found if file.origin}):
            self.facts['hub'] = commits
        # One text alone is divided by position; this is its length in characters.
        is_alone = len(found) == 1 and found[0].kind == 'text' and document == 'file'
        if is_alone and max_bytes:
            raise ValueError("max_bytes takes the first of many documents, and this is one text: divide it by --document")
        self.length = _length(_fetched(found[0])) if is_alone else None
        self.fingerprint = json.dumps([self.fields, document, self.facts, max_bytes,
                                       [[file.name, file.size, file.changed] for file in found]])

    def texts(self, most=None):
        """The text of each document, or part of one; where `most` says so, about so many bytes, taken evenly from all."""
        share = min(1, most / max(1, self.size)) if most else 1
        for i, piece in enumerate(self.pieces()):
            for _, document in self.read(piece) if int((i + 1) * share) > int(i * share) or i == 0 else ():
                yield (document if isinstance(document, str) else document.text if isinstance(document, Part) else
                       ''.join(text for text, _ in document))

    def pieces(self, first=0):
        """From file number `first` on."""
        left = self.max_bytes - sum(file.size for file in self.files[:first])
        for piece in self._pieces(first):
            yield piece
            left -= piece.size
            if left <= 0:
                return

    def _pieces(self, first):
        """Small files share a piece; a larger one has its pieces for itself."""
        small, size, begin = [], 0, first
        for number, file in self._here(first):
            with _reading(file) as (raw, stream):
                head = b'' if file.kind == 'parquet' else stream.read(PIECE + 1)
                is_small = file.kind != 'parquet' and len(head) <= PIECE
                if small and (not is_small or size + len(head) > PIECE):
                    yield Piece(begin, sum(file.size for file in self.files[begin:number]), small)
                    small, size = [], 0
                begin = begin if small else number
                before = 0
                for chunk in self._chunks(file, stream, head):
                    if is_small:
                        small.append(chunk)
                        size += len(head)
                    else:
                        at = chunk.offset if file.kind == 'parquet' else raw.tell()
                        yield Piece(number, at - before, [chunk])
                        before = at
        if small:
            yield Piece(begin, sum(file.size for file in self.files[begin:]), small)

    def _here(self, first):
        """(number, file) of each file from `first` on. One of the Hub is fetched while that before it is read, and removed
        after its turn."""
        coming = {}
        for number, file in enumerate(self.files[first:], first):
            for i, wanted in enumerate(self.files[number:number + 2], number):
                if wanted.origin and i not in coming:
                    coming[i] = Future()
                    threading.Thread(target=_fetch_into, args=(coming[i], wanted), daemon=True).start()
            if file.origin:
                coming.pop(number).result()
            yield number, file
            if file.origin:
                file.path.unlink(missing_ok=True)

    def _first_row(self, file, folder):
        """The first row of a file; of one of the Hub, kept for a command that was stopped when the file is gone again."""
        kept = file.origin and folder / 'parts' / 'row.json'
        if kept and kept.is_file() and (known := json.loads(kept.read_text(encoding='utf-8')))[0] == list(file.origin):
            return known[1]
        row = _first_row(_fetched(file))
        if kept:
            kept.write_text(json.dumps([file.origin, row], default=str), encoding='utf-8')
        return row

    def _chunks(self, file, stream, head):
        if file.kind == 'parquet':
            return _parquet(file, self.fields)
        separator = SEPARATORS['line' if file.kind == 'jsonl' else self.document]
        return _cut(file, stream, head, separator and re.compile(separator.encode()), self.length)

    def read(self, piece):
        """(None, document) of each document; a worker calls this."""
        for chunk in piece.chunks:
            if chunk.kind in ROWS:
                for line, row in _rows(chunk):
                    yield None, self._document(chunk, line, row)
            elif chunk.key is not None:
                text = _text(chunk).rstrip(ENDS[self.document] if chunk.is_last else '')
                yield None, Part(text, chunk.key, chunk.is_last, chunk.place)
            elif self.document == 'file':
                yield None, _text(chunk)
            else:
                for document in re.split(SEPARATORS[self.document], _text(chunk)):
                    if document.strip():
                        yield None, document.rstrip(ENDS[self.document])

    def _document(self, chunk, line, row):
        """What a row says: a text, or the parts of a conversation."""
        try:
            if not self.template:
                text = _value(row, self.fields[0])
                if not isinstance(text, str):
                    raise ValueError(f"its {self.fields[0]!r} is no text but {json.dumps(text, default=str)[:40]}")
                return text
            if len(self.fields) == 2:
                return self.template.parts({field: _value(row, field) for field in self.fields}, self.fields)
            return self.template.parts({'messages': _value(row, self.fields[0])})
        except ValueError as error:
            where = f"{chunk.name}, {'row' if chunk.kind == 'parquet' else 'line'} {line}"
            raise ValueError(f"{where}: {error}") from None


def _cut(file, stream, head, separator, length):
    """The Chunks of a text or of JSONL, of which `head` is read already: whole documents, unless one is larger than LARGE.

    length: characters of a text that is one document, to be divided by position.
    """
    data, at_end, key = bytearray(head.removeprefix(codecs.BOM_UTF8)), len(head) <= PIECE, b'' if length else None
    offset, line, characters = len(head) - len(data), 1, 0
    limit = sys.maxsize if file.kind == 'jsonl' else LARGE      # a row has to be whole to be parsed

    def take(n, **facts):
        nonlocal offset, line, characters
        taken = bytes(data[:n])
        chunk = Chunk(file.name, file.kind, taken, offset, line, place=(characters, length) if length else None, **facts)
        offset, line, characters = offset + n, line + taken.count(b'\n'), characters + (_characters(taken) if length else 0)
        del data[:n]
        return chunk

    while data or not at_end:
        if separator and key is None and (blank := BLANK_LINES.match(data)):
            take(blank.end())
        ends = [match.end() for match in separator.finditer(data)] if separator else []
        if ends and ends[0] > limit:
            ends = []
        if not ends and not at_end and len(data) <= limit:
            more = stream.read(max(PIECE, len(data)))
            data += more
            at_end = not more
        elif key is not None and ends:      # here ends a document that came in parts
            yield take(ends[0], key=key)
            key = None
        elif ends:
            yield take(ends[-1])
        elif len(data) <= limit:
            yield take(len(data), key=key)
        else:
            n = _safe_end(bytes(data[:LARGE]))
            key = key or hashlib.sha256(data[:n]).digest()[:16]
            yield take(n, key=key, is_last=False)


def _safe_end(data):
    """The last place in these bytes where a text can be cut."""
    for begin in (max(0, len(data) - SNIFF), 0):
        text = data[begin:].decode(errors='surrogateescape')
        for pattern in CUTS:
            if found := [match.end() for match in pattern.finditer(text)]:
                return begin + len(text[:found[-1]].encode(errors='surrogateescape'))
    n = len(data) - 1
    while n > len(data) - 4 and data[n] & 0xC0 == 0x80:     # not inside a character
        n -= 1
    return n


def _characters(data):
    """How many characters of UTF-8 begin in these bytes."""
    return int(np.count_nonzero(np.frombuffer(data, np.uint8) & 0xC0 != 0x80))


def _length(file):
    """Characters of a file, its byte order mark not counted."""
    with _reading(file) as (_, stream):
        block = stream.read(PIECE)
        n = -block.startswith(codecs.BOM_UTF8)
        while block:
            n += _characters(block)
            block = stream.read(PIECE)
    return n


def _text(chunk):
    try:
        return chunk.data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{chunk.name} is not UTF-8 at byte {chunk.offset + error.start:,}: `iconv -f ITS_ENCODING "
                         "-t UTF-8` converts it") from None


def _rows(chunk):
    """(number, row) of each row."""
    if chunk.kind == 'parquet':
        yield from enumerate(chunk.data, chunk.line)
        return
    for number, line in enumerate(_text(chunk).split('\n'), chunk.line):
        if line.strip():
            yield number, _row(line, f"{chunk.name}, line {number}")


def _row(line, where):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({error}): {line[:40]}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where} is no row: {{…}} is one, this is {line[:40]}")
    return _mended(row) if SURROGATE.search(line) else row


def _mended(value):
    """JSON can write half a character, which UTF-8 can't: it becomes U+FFFD."""
    if isinstance(value, str):
        return value.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    if isinstance(value, dict):
        return {key: _mended(item) for key, item in value.items()}
    return [_mended(item) for item in value] if isinstance(value, list) else value


def _value(row, field):
    """A field of a row; a.b is b in a."""
    value = row
    for key in [field] if field in row else field.split('.'):
        if not isinstance(value, dict) or key not in value:
            there = ', '.join(map(str, row)) or 'none'
            raise ValueError(f"there is no field {field!r}, only {there}: --field says which")
        value = value[key]
    return value


def _fetched(file):
    """The file, once it is here."""
    if file.origin and not (file.path.is_file() and file.path.stat().st_size == file.size):
        repo, commit, name = file.origin
        if hub.download(repo, name, commit, 'dataset', file.path.parents[name.count('/')]) is None:
            raise OSError(f"{file.name} is not there any more")
    return file


def _fetch_into(future, file):
    try:
        future.set_result(_fetched(file))
    except Exception as error:
        future.set_exception(error)


def _first_row(file):
    """The first row of a file, or {}."""
    if file.kind == 'parquet':
        with _parquet_file(file) as found:
            return next(found.iter_batches(1)).to_pylist()[0] if found.metadata.num_rows else {}
    with _reading(file) as (_, stream):
        chunk = next(_cut(file, stream, stream.read(PIECE + 1), re.compile(b'\n'), None), None)
    return next((row for _, row in _rows(chunk)), {}) if chunk else {}


def _parquet(file, fields):
    """The Chunks of a parquet file. A chunk's offset is the same share of the file's bytes as it is of its rows."""
    with _parquet_file(file) as found:
        names = found.schema_arrow.names
        columns = [field if field in names else field.split('.')[0] for field in fields]
        for column in columns:
            if column not in names:
                raise ValueError(f"{file.name} has no column {column!r}, only {', '.join(names)}: --field says which")
        group, n = found.metadata.row_group(0) if found.num_row_groups else None, found.metadata.num_rows
        size = sum(column.total_uncompressed_size for column in (group.column(i) for i in range(group.num_columns))
                   if column.path_in_schema.split('.')[0] in columns) if group else 0
        line = 1
        for batch in found.iter_batches(max(1, PIECE * group.num_rows // max(1, size)) if group else 1, columns=columns):
            yield Chunk(file.name, file.kind, batch.to_pylist(), file.size * (line - 1 + len(batch)) // n, line)
            line += len(batch)


@contextlib.contextmanager
def _parquet_file(file):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{file.name} needs a package: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(file.path) as found:
            yield found
    except pyarrow.ArrowException as error:
        raise ValueError(f"{file.name} can't be read as parquet: {error}") from None
