"""What a dataset is made of: the documents in text, JSONL and parquet files, as bins.prepare takes
them.

One process reads, and cuts what it reads into pieces of about a megabyte, which is cheap; workers
parse and encode them. A text file's byte order mark is no part of its text; everything else is, CR
LF too.
"""

import codecs
import contextlib
import difflib
import hashlib
import itertools
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

from system import files
from system.errors import one_line
from text import conversations, journal, textfiles
from text.bins import Part
from text.chat import Marker
from text.journal import SKIPPED, Remark
from text.textfiles import fetched, reading

# bytes of a piece, about; of the largest text that is not encoded in parts
PIECE, LARGE = 1 << 20, 1 << 22
# bytes of a row, which has to be in memory whole; a small file may unpack to any number of them
MOST = 1 << 28
ROWS = 'jsonl', 'parquet'
FIRST = 100  # rows at the beginning of a file, among which one has to show how all are read
# What Remarks are about, apart from rows.
SEPARATOR, SPECIAL = 'separator', 'special token '
BLANK_LINES = re.compile(rb'(?:[ \t]*\r?\n)+')
# Where a text can be cut so that its parts, each encoded on its own, have the same ids by GPT-2's
# and tiktoken's other encodings: behind a newline between words, in front of a space between words.
CUTS = re.compile(r'(?<=\S)\n(?=[^\s/])'), re.compile(r'(?<=\S)(?= [^\W\d_])')
SURROGATE = re.compile(r'\\u[dD][89a-fA-F]')


class Division(NamedTuple):
    """How a text is divided into documents."""

    separator: str | None  # the pattern of what stands between them; None: a text is one document
    before: str = ''  # the characters that are stripped where a document begins,
    behind: str = ''  # and where it ends
    reach: int = 0  # bytes of the longest match; 0 unless the user has given the separator


DIVISIONS = {
    'file': Division(None),
    'paragraph': Division(r'\n(?:[ \t]*\r?\n)+', behind=' \t\r\n'),
    'line': Division(r'\n', behind='\r\n'),
}


def _division(document):
    """The Division that `document` says: one of DIVISIONS, or at any other text, whose line ends
    may be CR LF too. Line ends around that text belong to no document. Raises ValueError."""
    if document in DIVISIONS:
        return DIVISIONS[document]
    if not document:
        raise ValueError(
            f"document='' must be {', '.join(DIVISIONS)}, or the text that separates documents"
        )
    if near := difflib.get_close_matches(document.lower(), DIVISIONS, n=1, cutoff=0.8):
        raise ValueError(
            f"document={document!r} looks like {near[0]!r}: write that, or a longer separator"
        )
    separator = r'\r?\n'.join(map(re.escape, document.split('\n')))
    reach = len(document.encode()) + document.count('\n')
    return Division(separator, before='\r\n', behind='\r\n', reach=reach)


class Chunk(NamedTuple):
    """Documents of a file that follow each other, or a part of one that is large."""

    name: str
    kind: str
    data: object  # bytes; of parquet a list of rows
    offset: int = 0  # of the data in the text, in bytes
    line: int = 1  # the number of its first line, or row
    key: bytes | None = None  # key, is_last, place: bins.Part's
    is_last: bool = True
    place: tuple | None = None
    is_first: bool = True  # whether a document begins here
    split: str | None = None  # where its documents go; None: by a hash of each


class Piece(NamedTuple):
    file: int  # the number of the file in which it begins
    size: int  # bytes on the disk
    chunks: list


def open(
    words,
    field=None,
    document='file',
    template=None,
    folder=None,
    max_bytes=None,
    *,
    skip_bad_rows=False,
    as_text=False,
    val=(),
    test=(),
):
    """The source that the words stand for: files, folders, globs, `-`,
    owner/name[@revision][:folder or glob] on the Hub. Raises ValueError or OSError.

    field: of rows; a.b is b in a. Names with commas between are those of a conversation, and so is
    one that holds messages; None: what conversations.FORMS recognizes, or 'text'. skip_bad_rows:
    leave out rows that can't be used and report them, in place of an error. document: what is one
    in a text: 'file', 'paragraph', 'line', or for any other text: what stands between two of
    these. template: a chat template, chat.DEFAULT where it is None. folder: where the bins will be;
    standard input is copied into its files.workplace, and the bins there are not sources.
    max_bytes: read only the beginning, about so much of the files' size. as_text: read .csv, .tsv
    and .json as text.

    val, test: words for the files of which these splits consist. With `val` the others all go to
    train. A file that both they and `words` name is not trained on.
    """
    division = _division(document)
    folder = folder and Path(folder)
    if [*map(str, [*words, *val, *test])].count('-') > 1:
        raise ValueError("standard input (-) can be only one of the sources: it is read once")
    named = []  # those to test on come first: of equal documents --dedup keeps the first
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
    return Files(found, field, document, division, template, folder, max_bytes, skip_bad_rows)


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
        print(
            f"{n_copies:,} file(s) that the sources name more than once are read once", flush=True
        )
    if n_held_out:
        print(
            f"{n_held_out:,} file(s) of the sources are in val or test, and so not in train",
            flush=True,
        )
    return list(found.values())


class Files:
    """The documents in files, as bins.prepare takes them; `texts` are those of a vocabulary."""

    def __init__(
        self, found, field, document, division, template, folder, max_bytes, skip_bad_rows
    ):
        if max_bytes:  # of what is trained on
            max_bytes += sum(file.size for file in found if file.split in ('val', 'test'))
            ends = list(accumulate(file.size for file in found))
            found = found[: bisect_left(ends, max_bytes) + 1]
        self.files, self.max_bytes, self.size = (
            found,
            max_bytes or sys.maxsize,
            sum(file.size for file in found),
        )
        self.size = min(self.size, self.max_bytes)
        self.document, self.division = document, division
        self.special, self.eot = None, None
        self.skip_bad_rows = skip_bad_rows
        self.fields = (field or 'text').split(',')
        self.conversations = None  # a conversations.Conversations, where rows are not texts
        if not all(self.fields):
            raise ValueError(
                f"field={field!r} must be a name, or names with commas between: of "
                "what is asked, and last of what is answered"
            )
        rows = [file for file in found if file.kind in ROWS]
        if rows:
            first = self._telling_row(rows, field, folder)
            self.conversations = conversations.reader(first, field, template)
        elif field:
            raise ValueError(
                f"field={field!r} is of rows, which .jsonl and .parquet files have: {found[0].name} is text"
            )
        elif skip_bad_rows:
            raise ValueError(
                "skip_bad_rows is for rows, which .jsonl and .parquet files have: "
                f"{found[0].name} is text"
            )
        self.facts = {}
        if self.conversations:
            self.fields = self.conversations.fields
            self.facts = {'masked': True, 'template': self.conversations.template.description}
        elif template:
            raise ValueError(
                "a template is for conversations, and there are none in the sources: "
                "of rows, --field=NAME says which field holds the messages, "
                "--field=ASKED,ANSWERED which ones a question and its answer"
            )
        if commits := sorted(
            {f'{file.origin[0]}@{file.origin[1]}' for file in found if file.origin}
        ):
            self.facts['hub'] = commits
        self.splits = {file.split for file in found if file.split}
        self.has_text = any(file.kind == 'text' for file in found)
        self.lengths = self._lengths()
        self.has_ends = not all(self.lengths.get(file.split) for file in found)
        self.fingerprint = json.dumps(
            [
                self.fields,
                document,
                self.facts,
                max_bytes,
                skip_bad_rows,
                [[file.name, file.size, file.changed, file.kind, file.split] for file in found],
            ]
        )

    def _lengths(self):
        """{split: its length in characters} of those splits that are one text. That is divided by
        position, or is the whole of its split, and nothing stands behind it."""
        lengths = {}
        splits = dict.fromkeys(file.split for file in self.files)  # each once, in their order
        for split in splits:
            alone = [file for file in self.files if file.split == split]
            if self.document != 'file' or len(alone) > 1 or alone[0].kind != 'text':
                continue
            if self.max_bytes < sys.maxsize and split in ('train', None):
                raise ValueError(
                    "max_bytes takes the first of many documents, and this is one "
                    "text: divide it by --document"
                )
            lengths[split] = _length(fetched(alone[0]))
        return lengths

    @property
    def too_few(self):
        """(what the documents are called, what helps where a split has none)."""
        if self.has_text:
            return 'document', (
                "use smaller ones (--document=paragraph or line), or make them one "
                "text, which is divided by position: `cat FILES | python "
                "data/prepare.py NAME -`"
            )
        if self.conversations:
            return 'conversation', "add conversations"
        return 'row', "add rows"

    def look_for_special_tokens(self, tokenizer):
        """From now on `read` remarks on the texts of this tokenizer's special tokens, which are
        encoded as ordinary text."""
        texts = sorted(tokenizer.special, key=lambda text: (-len(text), text))
        if texts:
            self.special = re.compile('|'.join(map(re.escape, texts)))
        self.eot = next((text for text in texts if tokenizer.special[text] == tokenizer.eot), None)

    def texts(self, most=None):
        """The text of each document, or part of one; where `most` says so, about so many bytes,
        taken evenly from all."""
        share = min(1, most / max(1, self.size)) if most else 1
        for i, piece in enumerate(self.pieces()):
            if i > 0 and int((i + 1) * share) == int(i * share):
                continue
            for _, document in self.read(piece):
                if not isinstance(document, Remark):
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
        """(number, file) of each file from `first` on. One of the Hub is fetched while that before
        it is read, and removed after its turn."""
        coming = {}
        for number, file in enumerate(self.files[first:], first):
            for i, wanted in enumerate(self.files[number : number + 2], number):
                if wanted.origin and i not in coming:
                    coming[i] = Future()
                    threading.Thread(
                        target=_fetch_into, args=(coming[i], wanted), daemon=True
                    ).start()
            if file.origin:
                coming.pop(number).result()
            yield number, file
            if file.origin:
                file.path.unlink(missing_ok=True)

    def _telling_row(self, found, field, folder):
        """The row that decides how all are read: the first one that fits, or else the first; or {}.
        Those to train on are asked before those of val and test, which are read the same way."""
        first = {}
        for file in sorted(found, key=lambda file: file.split in ('val', 'test')):
            row = self._first_row(file, field, folder)
            if conversations.tells_how_to_read(row, field):
                return row
            first = first or row
        return first

    def _first_row(self, file, field, folder):
        """As _first_row below. Of a file of the Hub, it is kept: a command that was stopped needs
        it again when the file is gone."""
        if not file.origin:
            return _first_row(file, field)
        kept = files.workplace(folder) / 'row.json'
        key = [*file.origin, field]
        if kept.is_file():
            known, row = json.loads(kept.read_text(encoding='utf-8'))
            if known == key:
                return row
        row = _first_row(fetched(file), field)
        kept.write_text(json.dumps([key, row], default=str), encoding='utf-8')
        return row

    def _chunks(self, file, stream, head):
        if file.kind == 'parquet':
            if self.conversations:
                return _parquet(file, self.conversations.required, self.conversations.optional)
            return _parquet(file, self.fields)
        division = DIVISIONS['line'] if file.kind == 'jsonl' else self.division
        return _cut(file, stream, head, division, self.lengths.get(file.split))

    def read(self, piece):
        """(split or None, document or Remark) of each document; a worker calls this."""
        for chunk in piece.chunks:
            special = Counter()
            for document in self._documents(chunk):
                yield chunk.split, document
                if self.special and not isinstance(document, Remark):
                    special.update(self._special_in(document))
            for token, n in special.items():
                yield None, Remark(SPECIAL + token, chunk.name, n)

    def _special_in(self, document):
        """The texts of special tokens in a document, but for those that a chat template puts
        there."""
        found = []
        for text, _ in _parts(document):
            if not isinstance(text, Marker):
                found += self.special.findall(text)
        return found

    def _documents(self, chunk):
        """The documents of a chunk, and Remarks."""
        if chunk.kind in ROWS:
            for number, row in _rows(chunk):
                yield from self._read_row(chunk, number, row)
            return
        text, separator = _text(chunk), self.division.separator
        is_whole = chunk.key is None
        texts = [text]
        if separator and (is_whole or chunk.is_last):
            texts = re.split(separator, text)
        if self.division.reach and len(texts) > 1:
            yield Remark(SEPARATOR, chunk.name, len(texts) - 1)
        if is_whole:
            for text in texts:
                if text.strip() or not separator:
                    yield text.lstrip(self.division.before).rstrip(self.division.behind)
            return
        text = texts[0]  # of a last part nothing follows the separator
        if chunk.is_first:
            text = text.lstrip(self.division.before)
        if chunk.is_last:
            text = text.rstrip(self.division.behind)
        yield Part(text, chunk.key, chunk.is_last, chunk.place)

    def report(self, remarks):
        """The lines to print at the end of the Remarks, as journal.count_remarks counts them."""
        special, others = {}, {}
        for about, counted in remarks.items():
            if about.startswith(SPECIAL):
                special[about.removeprefix(SPECIAL)] = counted
            elif about != SEPARATOR:
                others[about] = counted
        if special:
            yield one_line(self._special_notice(special))
        if self.document != 'file' and not self.has_text:
            yield one_line(
                f"notice: --document={self.document!r} divides text files, and there "
                "are only rows: each one is a document"
            )
        elif self.division.reach and SEPARATOR not in remarks:
            yield one_line(
                f"notice: the separator --document={self.document!r} is nowhere in the "
                "sources: each file is one document"
            )
        yield from journal.report(others)

    def _special_notice(self, special):
        most = 3  # which are named
        said = [
            f"{token!r} {n:,} time(s), first in {details[0]}"
            for token, (n, details) in special.items()
        ]
        if len(said) > most:
            said[most:] = [f"and {len(said) - most:,} others"]
        if self.eot in special and self.has_text:
            advice = f"; --document={shlex.quote(self.eot)} divides a text there"
        else:
            advice = ", while sample.py and evaluate.py read them as the tokens"
        return (
            "notice: special tokens of the tokenizer were encoded as ordinary text: "
            f"{'; '.join(said)}{advice}"
        )

    def _read_row(self, chunk, number, row):
        """The document that a row is, and Remarks on it."""
        where = _place(chunk, number)
        try:
            document, unused = self._document(_parsed(row))
        except ValueError as error:
            if self.skip_bad_rows:
                yield Remark(SKIPPED, f"{where}: {error}")
                return
            advice = ''
            # What is wrong with the first row is mostly wrong with all: nothing would be left.
            if number > 1 and '--skip_bad_rows' not in str(error):
                advice = "; --skip_bad_rows leaves such rows out"
            raise ValueError(f"{where}: {error}{advice}") from None
        if document is not None:
            yield document
        for about in unused:
            yield Remark(about, where)

    def _document(self, row):
        """(the text of a row, the parts of its conversation, or None if it is to be left out,
        [what it has that is not used])."""
        if self.conversations:
            return self.conversations.parts(row)
        if not isinstance(row, dict):
            raise ValueError(f"not a row but {str(row)[:40]}: a row is {{…}}")
        text = conversations.value(row, self.fields[0])
        if text is None:  # as large datasets have here and there: an empty document
            return '', []
        if not isinstance(text, str):
            raise ValueError(
                f"its {self.fields[0]!r} is not text but {json.dumps(text, default=str)[:40]}"
            )
        return text, []


def _parts(document):
    """[(text, is_learned)] of any kind of document."""
    if isinstance(document, str):
        return [(document, True)]
    if isinstance(document, Part):
        return [(document.text, True)]
    return document


def _cut(file, stream, head, division, length):
    """The Chunks of a text or of JSONL, of which `head` is read already: whole documents, unless
    one is larger than LARGE.

    length: characters of a text that is alone in its split.
    """
    separator = division.separator and re.compile(division.separator.encode())
    data, at_end, key = (
        bytearray(head.removeprefix(codecs.BOM_UTF8)),
        len(head) <= PIECE,
        b'' if length else None,
    )
    offset, line, characters = len(head) - len(data), 1, 0
    limit = MOST if file.kind == 'jsonl' else LARGE

    def take(n, **facts):
        nonlocal offset, line, characters
        taken = bytes(data[:n])
        place = (characters, length) if length else None
        chunk = Chunk(
            file.name, file.kind, taken, offset, line, place=place, split=file.split, **facts
        )
        offset, line, characters = (
            offset + n,
            line + taken.count(b'\n'),
            characters + (_characters(taken) if length else 0),
        )
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
        elif key is not None and ends:  # here ends a document that came in parts
            yield take(ends[0], key=key, is_first=False)
            key = None
        elif ends:
            yield take(ends[-1])
        elif len(data) <= limit:
            yield take(len(data), key=key, is_first=not key)
        else:
            end = LARGE
            if matches and 0 < matches[0].start() < LARGE:  # a separator is not cut
                end = matches[0].start()
            n, is_first = _safe_end(bytes(data[:end])), not key
            if is_first:
                key = hashlib.sha256(data[:n]).digest()[:16]
            yield take(n, key=key, is_first=is_first, is_last=False)


def _safe_end(data):
    """The last place in these bytes where a text can be cut."""
    for begin in (max(0, len(data) - (1 << 16)), 0):  # the end is enough for most
        text = data[begin:].decode(errors='surrogateescape')
        for pattern in CUTS:
            if found := [match.end() for match in pattern.finditer(text)]:
                return begin + len(text[: found[-1]].encode(errors='surrogateescape'))
    n = len(data) - 1
    while n > len(data) - 4 and data[n] & 0xC0 == 0x80:  # not inside a character
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
    """(number, row) of each row; of JSONL it is the line."""
    if chunk.kind == 'parquet':
        yield from enumerate(chunk.data, chunk.line)
        return
    for number, line in enumerate(chunk.data.split(b'\n'), chunk.line):
        if line.strip():
            yield number, line


def _place(chunk, number):
    unit = 'row' if chunk.kind == 'parquet' else 'line'
    return f"{chunk.name}, {unit} {number}"


def _parsed(row):
    """A row: of JSONL an object, or a list. Raises ValueError."""
    if not isinstance(row, bytes):
        return row
    try:
        line = row.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 at byte {error.start:,} of the line: `iconv -f ITS_ENCODING "
            "-t UTF-8` converts the file"
        ) from None
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}): {line[:40]}") from None
    if not isinstance(found, (dict, list)):
        raise ValueError(f"not a row but {line[:40]}: a row is {{…}}")
    return _mended(found) if SURROGATE.search(line) else found


def _mended(value):
    """JSON can write half a character, which UTF-8 can't: it becomes U+FFFD."""
    if isinstance(value, str):
        return value.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    if isinstance(value, dict):
        return {key: _mended(item) for key, item in value.items()}
    return [_mended(item) for item in value] if isinstance(value, list) else value


def _fetch_into(future, file):
    try:
        future.set_result(fetched(file))
    except Exception as error:
        future.set_exception(error)


def _first_row(file, field):
    """The first row of a file by which rows can be read, or else the first one, or {}."""
    first = {}
    for row in itertools.islice(_good_rows(file), FIRST):
        if conversations.tells_how_to_read(row, field):
            return row
        first = first or row
    return first


def _good_rows(file):
    """The rows at the beginning of a file. Those that can't be parsed are reported when all are
    read."""
    if file.kind == 'parquet':
        with _parquet_file(file) as found:
            for batch in found.iter_batches(1):
                yield from batch.to_pylist()
        return
    with reading(file) as (_, stream):
        chunk = next(_cut(file, stream, stream.read(PIECE + 1), DIVISIONS['line'], None), None)
    for _, line in _rows(chunk) if chunk else ():
        with contextlib.suppress(ValueError):
            yield _parsed(line)


def _parquet(file, fields, optional=()):
    """The Chunks of a parquet file, with the columns of these fields, and of those optional ones
    that it has. A chunk's offset is the same share of the file's bytes as it is of its rows."""
    with _parquet_file(file) as found:
        names = found.schema_arrow.names
        columns = [field if field in names else field.split('.')[0] for field in fields]
        for column in columns:
            if column not in names:
                raise ValueError(
                    f"{file.name} has no column {column!r}, only {', '.join(names)}: "
                    f"{conversations.WHICH_FIELD}"
                )
        for field in optional:
            column = field if field in names else field.split('.')[0]
            if column in names and column not in columns:
                columns.append(column)
        n, line = found.metadata.num_rows, 1
        for i in range(found.num_row_groups):
            group = found.metadata.row_group(i)
            size = sum(
                column.total_uncompressed_size
                for column in map(group.column, range(group.num_columns))
                if column.path_in_schema.split('.')[0] in columns
            )
            for batch in found.iter_batches(
                max(1, PIECE * group.num_rows // max(1, size)), [i], columns
            ):
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
