"""What a dataset is made of: the documents in text, JSONL and parquet files, as bins.prepare takes them.

One process reads, and cuts what it reads into pieces of about a megabyte, which is cheap; workers parse and encode them.
A text file's byte order mark is no part of its text; everything else is, CR LF too.
"""
import codecs
import contextlib
import difflib
import hashlib
import json
import re
import shlex
import sys
import threading
from bisect import bisect_left
from collections import Counter
from concurrent.futures import Future
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

import files
import textfiles
from bins import Note, Part
from chat import Marker, Template
from textfiles import fetched, reading

PIECE, LARGE = 1 << 20, 1 << 22     # bytes of a piece, about; of the largest text that is not encoded in parts
MOST = 1 << 28      # bytes of a row, which has to be in memory whole; a small file may unpack to any number of them
ROWS = 'jsonl', 'parquet'
BLANK_LINES = re.compile(rb'(?:[ \t]*\r?\n)+')
# Where a text can be cut so that its parts, each encoded on its own, have the same ids by GPT-2's and tiktoken's other
# encodings: behind a newline between words, in front of a space between words.
CUTS = re.compile(r'(?<=\S)\n(?=[^\s/])'), re.compile(r'(?<=\S)(?= [^\W\d_])')
SURROGATE = re.compile(r'\\u[dD][89a-fA-F]')


class Division(NamedTuple):
    """How a text is divided into documents."""
    separator: str | None   # the pattern of what stands between them; None: a text is one document
    before: str = ''        # the characters that are stripped where a document begins,
    behind: str = ''        # and where it ends
    reach: int = 0          # bytes of the longest match; 0 unless the user has given the separator


DIVISIONS = {'file': Division(None),
             'paragraph': Division(r'\n(?:[ \t]*\r?\n)+', behind=' \t\r\n'),
             'line': Division(r'\n', behind='\r\n')}


def _division(document):
    """The Division that `document` says: one of DIVISIONS, or at any other text, whose line ends
    may be CR LF too. Line ends around that text belong to no document. Raises ValueError."""
    if document in DIVISIONS:
        return DIVISIONS[document]
    if not document:
        raise ValueError(f"document='' must be {', '.join(DIVISIONS)}, or the text that separates "
                         "documents")
    if near := difflib.get_close_matches(document.lower(), DIVISIONS, n=1, cutoff=0.8):
        raise ValueError(f"document={document!r} looks like {near[0]!r}: write that, or a longer "
                         "separator")
    separator = r'\r?\n'.join(map(re.escape, document.split('\n')))
    reach = len(document.encode()) + document.count('\n')
    return Division(separator, before='\r\n', behind='\r\n', reach=reach)


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
    is_first: bool = True           # whether a document begins here
    split: str | None = None        # where its documents go; None: by a hash of each


class Piece(NamedTuple):
    file: int           # the number of the file in which it begins
    size: int           # bytes on the disk
    chunks: list


def open(words, field=None, document='file', template=None, folder=None, max_bytes=None, *,
         as_text=False, val=(), test=()):
    """The source that the words stand for: files, folders, globs, `-`, owner/name[@revision][:folder or glob] on the Hub.
    Raises ValueError or OSError.

    field: of rows, 'text' where it is None; a.b is b in a; two with a comma are what a user asks and an assistant answers,
    and one that holds messages is a conversation. document: what is one in a text: 'file',
    'paragraph', 'line', or for any other text: what stands between two of these. template: a chat
    template, chat.DEFAULT where it is None. folder: where the bins will be; standard input is
    copied into its files.workplace, and the bins there are not sources. max_bytes: read only the
    beginning, about so much of the files' size. as_text: read .csv, .tsv and .json as text.

    val, test: words for the files of which these splits consist. With `val` the others all go to
    train. A file that both they and `words` name is not trained on.
    """
    division = _division(document)
    folder = folder and Path(folder)
    if [*map(str, [*words, *val, *test])].count('-') > 1:
        raise ValueError("standard input (-) can be only one of the sources: it is read once")
    named = []      # those to test on come first: of equal documents --dedup keeps the first
    for split, of_split in (('test', test), ('val', val), ('train' if val else None, words)):
        files_of_split = []
        for word in of_split:
            files_of_split += textfiles.find(str(word), field, folder, as_text)
        is_wanted = of_split or split in ('train', None)
        if is_wanted and not files_of_split:
            raise ValueError(f"there is no file to read for {split or 'train'}")
        named += [file._replace(split=split) for file in files_of_split]
    found = _each_once(named)
    if not any(file.split in ('train', None) for file in found):
        raise ValueError("there is no file to train on: val and test name all of them")
    return Files(found, field, document, division, template, folder, max_bytes)


def _each_once(named):
    """The files, each once, in the split that names it first. Raises ValueError where one is both
    in val and in test."""
    found, n_copies, n_held_out = {}, 0, 0
    for file in named:
        first = found.setdefault(file.path.resolve(), file)
        if first is file:
            continue
        if first.split == file.split:
            n_copies += 1
        elif file.split == 'val':
            raise ValueError(f"{file.name} is both in val and in test")
        else:
            n_held_out += 1
    if n_copies:
        print(f"{n_copies:,} file(s) that the sources name more than once are read once",
              flush=True)
    if n_held_out:
        print(f"{n_held_out:,} file(s) of the sources are in val or test, and so not in train",
              flush=True)
    return list(found.values())


class Files:
    """The documents in files, as bins.prepare takes them; `texts` are those of a vocabulary."""

    def __init__(self, found, field, document, division, template, folder, max_bytes):
        if max_bytes:       # of what is trained on
            max_bytes += sum(file.size for file in found if file.split in ('val', 'test'))
            ends = list(accumulate(file.size for file in found))
            found = found[:bisect_left(ends, max_bytes) + 1]
        self.files, self.max_bytes, self.size = found, max_bytes or sys.maxsize, sum(file.size for file in found)
        self.size = min(self.size, self.max_bytes)
        self.document, self.division = document, division
        self.special, self.eot = None, None
        self.fields, self.template = (field or 'text').split(','), None
        if len(self.fields) > 2 or not all(self.fields):
            raise ValueError(f"field={field!r} must be a name, or two with a comma: of what is asked, what is answered")
        if rows := [file for file in found if file.kind in ROWS]:
            first = next((row for file in rows if (row := self._first_row(file, folder))), {})
            is_chat = field is None and 'text' not in first and 'messages' in first
            if is_chat:
                self.fields = ['messages']
            if is_chat or len(self.fields) == 2 or _is_conversation(first, self.fields[0]):
                self.template = Template(template)
        elif field:
            raise ValueError(f"field={field!r} is of rows, which .jsonl and .parquet files have: {found[0].name} is text")
        if template and not self.template:
            raise ValueError("a template is for rows with messages, or for --field=ASKED,ANSWERED; there are no such rows")
        self.facts = {'masked': True, 'template': self.template.description} if self.template else {}
        if commits := sorted({f'{file.origin[0]}@{file.origin[1]}' for file in found if file.origin}):
            self.facts['hub'] = commits
        self.splits = {file.split for file in found if file.split}
        self.has_text = any(file.kind == 'text' for file in found)
        # One text alone is divided by position, or is the whole of its split, and nothing stands
        # behind it. {split: its length in characters}
        self.lengths = {}
        for split in {file.split for file in found}:
            alone = [file for file in found if file.split == split]
            if document == 'file' and len(alone) == 1 and alone[0].kind == 'text':
                if max_bytes and split in ('train', None):
                    raise ValueError("max_bytes takes the first of many documents, and this is one "
                                     "text: divide it by --document")
                self.lengths[split] = _length(fetched(alone[0]))
        self.has_ends = not all(self.lengths.get(file.split) for file in found)
        self.fingerprint = json.dumps([self.fields, document, self.facts, max_bytes, [
            [file.name, file.size, file.changed, file.kind, file.split] for file in found]])

    def look_for_special_tokens(self, tokenizer):
        """From now on `read` gives Notes of the texts of this tokenizer's special tokens, which are
        encoded as ordinary text."""
        texts = sorted(tokenizer.special, key=lambda text: (-len(text), text))
        if texts:
            self.special = re.compile('|'.join(map(re.escape, texts)))
        self.eot = next((text for text in texts if tokenizer.special[text] == tokenizer.eot), None)

    def texts(self, most=None):
        """The text of each document, or part of one; where `most` says so, about so many bytes, taken evenly from all."""
        share = min(1, most / max(1, self.size)) if most else 1
        for i, piece in enumerate(self.pieces()):
            if i > 0 and int((i + 1) * share) == int(i * share):
                continue
            for _, document in self.read(piece):
                if not isinstance(document, Note):
                    yield ''.join(text for text, _ in _parts(document))

    def pieces(self, first=0):
        """From file number `first` on."""
        ends, number, read = [0, *accumulate(file.size for file in self.files)], first, 0
        for piece in self._pieces(first):
            if piece.file != number:
                number, read = piece.file, 0
            if ends[number] + read >= self.max_bytes:
                return
            yield piece
            read += piece.size

    def _pieces(self, first):
        """Small files share a piece; a larger one has its pieces for itself."""
        small, size, begin = [], 0, first
        for number, file in self._here(first):
            with reading(file) as (raw, stream):
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
        kept = file.origin and files.workplace(folder) / 'row.json'
        if kept and kept.is_file() and (known := json.loads(kept.read_text(encoding='utf-8')))[0] == list(file.origin):
            return known[1]
        row = _first_row(fetched(file))
        if kept:
            kept.write_text(json.dumps([file.origin, row], default=str), encoding='utf-8')
        return row

    def _chunks(self, file, stream, head):
        if file.kind == 'parquet':
            return _parquet(file, self.fields)
        division = DIVISIONS['line'] if file.kind == 'jsonl' else self.division
        return _cut(file, stream, head, division, self.lengths.get(file.split))

    def read(self, piece):
        """(split or None, document or Note) of each document; a worker calls this."""
        for chunk in piece.chunks:
            special = []
            for document in self._documents(chunk):
                yield chunk.split, document
                if self.special and not isinstance(document, Note):
                    special += self._special_in(document)
            for token, n in Counter(special).items():
                yield None, Note(f'special {token}', chunk.name, n)

    def _special_in(self, document):
        """The texts of special tokens in a document, but for those that a chat template puts there."""
        found = []
        for text, _ in _parts(document):
            if not isinstance(text, Marker):
                found += self.special.findall(text)
        return found

    def _documents(self, chunk):
        if chunk.kind in ROWS:
            for line, row in _rows(chunk):
                yield self._document(chunk, line, row)
            return
        text, separator = _text(chunk), self.division.separator
        is_whole = chunk.key is None
        texts = [text]
        if separator and (is_whole or chunk.is_last):
            texts = re.split(separator, text)
        if self.division.reach and len(texts) > 1:
            yield Note('separator', chunk.name, len(texts) - 1)
        if is_whole:
            for text in texts:
                if text.strip() or not separator:
                    yield text.lstrip(self.division.before).rstrip(self.division.behind)
            return
        text = texts[0]     # of a last part nothing follows the separator
        if chunk.is_first:
            text = text.lstrip(self.division.before)
        if chunk.is_last:
            text = text.rstrip(self.division.behind)
        yield Part(text, chunk.key, chunk.is_last, chunk.place)

    def notices(self, notes):
        """What the user is told of the Notes, {what: [how often, where first]}, at the end."""
        special = {}
        for what, found in notes.items():
            if what.startswith('special '):
                special[what.removeprefix('special ')] = found
        if special:
            yield self._special_notice(special)
        if self.division.reach and self.has_text and 'separator' not in notes:
            yield (f"notice: the separator --document={self.document!r} is nowhere in the sources: "
                   "each file is one document")

    def _special_notice(self, special):
        most = 3        # which are named
        said = [f"{token!r} {n:,} time(s), first in {where}"
                for token, (n, where) in special.items()]
        if len(said) > most:
            said[most:] = [f"and {len(said) - most:,} others"]
        if self.eot in special and self.has_text:
            advice = f"; --document={shlex.quote(self.eot)} divides a text there"
        else:
            advice = ", while sample.py and evaluate.py read them as the tokens"
        return ("notice: special tokens of the tokenizer were encoded as ordinary text: "
                f"{'; '.join(said)}{advice}")

    def _document(self, chunk, line, row):
        """What a row says: a text, or the parts of a conversation."""
        try:
            if not self.template:
                text = _value(row, self.fields[0])
                if text is None:        # as large datasets have here and there: an empty document, which is passed over
                    return ''
                if not isinstance(text, str):
                    raise ValueError(f"its {self.fields[0]!r} is no text but {json.dumps(text, default=str)[:40]}")
                return text
            if len(self.fields) == 2:
                return self.template.parts({field: _value(row, field) for field in self.fields}, self.fields)
            return self.template.parts({'messages': _value(row, self.fields[0])})
        except ValueError as error:
            where = f"{chunk.name}, {'row' if chunk.kind == 'parquet' else 'line'} {line}"
            raise ValueError(f"{where}: {error}") from None


def _parts(document):
    """[(text, is_learned)] of any kind of document."""
    if isinstance(document, str):
        return [(document, True)]
    if isinstance(document, Part):
        return [(document.text, True)]
    return document


def _cut(file, stream, head, division, length):
    """The Chunks of a text or of JSONL, of which `head` is read already: whole documents, unless one is larger than LARGE.

    length: characters of a text that is alone in its split.
    """
    separator = division.separator and re.compile(division.separator.encode())
    data, at_end, key = bytearray(head.removeprefix(codecs.BOM_UTF8)), len(head) <= PIECE, b'' if length else None
    offset, line, characters = len(head) - len(data), 1, 0
    limit = MOST if file.kind == 'jsonl' else LARGE

    def take(n, **facts):
        nonlocal offset, line, characters
        taken = bytes(data[:n])
        place = (characters, length) if length else None
        chunk = Chunk(file.name, file.kind, taken, offset, line, place=place, split=file.split,
                      **facts)
        offset, line, characters = offset + n, line + taken.count(b'\n'), characters + (_characters(taken) if length else 0)
        del data[:n]
        return chunk

    while data or not at_end:
        # A separator that the user has given may itself begin with a line end.
        if separator and not division.reach and key is None and (blank := BLANK_LINES.match(data)):
            take(blank.end())
        matches = list(separator.finditer(data)) if separator else []
        ends = [match.end() for match in matches]
        if ends and ends[0] > limit:
            ends = []
        if not ends and len(data) > limit == MOST:
            raise ValueError(f"{file.name}, line {line} is a row of more than {MOST:,} bytes")
        if not ends and not at_end and len(data) <= limit + division.reach:
            more = stream.read(max(PIECE, len(data)))
            data += more
            at_end = not more
        elif key is not None and ends:      # here ends a document that came in parts
            yield take(ends[0], key=key, is_first=False)
            key = None
        elif ends:
            yield take(ends[-1])
        elif len(data) <= limit:
            yield take(len(data), key=key, is_first=not key)
        else:
            end = LARGE
            if matches and 0 < matches[0].start() < LARGE:      # a separator is not cut
                end = matches[0].start()
            n, is_first = _safe_end(bytes(data[:end])), not key
            if is_first:
                key = hashlib.sha256(data[:n]).digest()[:16]
            yield take(n, key=key, is_first=is_first, is_last=False)


def _safe_end(data):
    """The last place in these bytes where a text can be cut."""
    for begin in (max(0, len(data) - (1 << 16)), 0):       # the end is enough for most
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
    with reading(file) as (_, stream):
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
        raise ValueError(f"{chunk.name} {textfiles.not_utf8(chunk.offset + error.start)}") from None


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


def _is_conversation(row, field):
    with contextlib.suppress(ValueError):
        return isinstance(_value(row, field), list)
    return False


def _fetch_into(future, file):
    try:
        future.set_result(fetched(file))
    except Exception as error:
        future.set_exception(error)


def _first_row(file):
    """The first row of a file, or {}."""
    if file.kind == 'parquet':
        with _parquet_file(file) as found:
            return next(found.iter_batches(1)).to_pylist()[0] if found.metadata.num_rows else {}
    with reading(file) as (_, stream):
        chunk = next(_cut(file, stream, stream.read(PIECE + 1), DIVISIONS['line'], None), None)
    return next((row for _, row in _rows(chunk)), {}) if chunk else {}


def _parquet(file, fields):
    """The Chunks of a parquet file. A chunk's offset is the same share of the file's bytes as it is of its rows."""
    with _parquet_file(file) as found:
        names = found.schema_arrow.names
        columns = [field if field in names else field.split('.')[0] for field in fields]
        for column in columns:
            if column not in names:
                raise ValueError(f"{file.name} has no column {column!r}, only {', '.join(names)}: --field says which")
        n, line = found.metadata.num_rows, 1
        for i in range(found.num_row_groups):
            group = found.metadata.row_group(i)
            size = sum(column.total_uncompressed_size for column in map(group.column, range(group.num_columns))
                       if column.path_in_schema.split('.')[0] in columns)
            for batch in found.iter_batches(max(1, PIECE * group.num_rows // max(1, size)), [i], columns):
                at = file.size * (line - 1 + len(batch)) // n
                yield Chunk(file.name, file.kind, batch.to_pylist(), at, line, split=file.split)
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
