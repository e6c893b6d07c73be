"""The kinds of files that can be read: one class each, all listed in FORMATS.

A new kind is a class and its entry in FORMATS. The class says which names it recognizes, judges by
a file's beginning whether it can be read, and cuts a file into chunks, whose documents or rows a
worker process reads.
"""

import codecs
import contextlib
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from text.sources import conversion, cutting
from text.sources.compression import opened, split_name
from text.sources.conversion import TABLES
from text.sources.cutting import DIVISIONS, Chunk, Division
from text.sources.fields import WHICH_FIELD

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF32_LE: 'UTF-32',
    codecs.BOM_UTF32_BE: 'UTF-32',
    codecs.BOM_UTF16_LE: 'UTF-16',
    codecs.BOM_UTF16_BE: 'UTF-16',
}
SURROGATE = re.compile(r'\\u[dD][89a-fA-F]')


class Wanted(NamedTuple):
    """What to read of a file."""

    division: Division  # of a text into documents
    n_characters: int | None  # of a text that is divided by position; None: it is not
    columns: list  # of rows: the fields that are needed,
    optional_columns: list  # and those that are read where a file has them


class Batch(NamedTuple):
    """Chunks of a file that are read one after the other."""

    chunks: list
    size: int  # bytes that were read for them; of a compressed file, packed ones
    is_whole_file: bool = False  # a small one, which may share a piece with others; size: unpacked


@dataclass(frozen=True)
class SourceFile:
    """A file to read, and how its kind is read: the base class of FORMATS."""

    name: str  # as the user knows it
    path: Path
    compression: str  # '', gz, zst
    size: int  # bytes on the disk
    changed: object  # what tells it from another file of this name and size
    # repository, commit and name of a file of the Hub, which is downloaded to `path`
    origin: tuple | None = None
    split: str | None = None  # where its documents go; None: by a hash of each

    kind = ''  # a name for the class, part of what identifies a command
    endings = ()  # of the names of such files
    hub_endings = ()  # of those in datasets on the Hub
    may_be_compressed = True
    has_rows = False

    @classmethod
    def recognizes(cls, name, field=None, as_text=False):
        """Whether a name in lower case, without .gz or .zst, is one of this kind. field, as_text:
        as for find.find."""
        return name.endswith(cls.endings)

    def judge(self):
        """(why it is not UTF-8 text, why it can't be read as rows), each '' if it is fine."""
        return '', ''

    def batches(self, wanted):
        """Yields the Batches of this file. wanted: a Wanted. Raises ValueError, OSError."""
        raise NotImplementedError


class _LinesFile(SourceFile):
    """A file of UTF-8 text, which is cut into chunks between lines."""

    def judge(self):
        with opened(self) as (_, stream):
            head = stream.read(conversion.SNIFF)
        not_text = why_not_text(head, is_whole=len(head) < conversion.SNIFF)
        if not_text:
            return not_text, ''
        return '', self.why_not_rows(head)

    def why_not_rows(self, head):
        return ''

    def cut_by(self, division, n_characters=None):
        """Yields the Batches of this file, divided by a Division."""
        with opened(self) as (raw, stream):
            head = stream.read(cutting.PIECE + 1)
            chunks = cutting.cut(self, stream, head, division, n_characters)
            if len(head) <= cutting.PIECE:
                yield Batch(list(chunks), len(head), is_whole_file=True)
                return
            before = 0
            for chunk in chunks:
                position = raw.tell()
                yield Batch([chunk], position - before)
                before = position


class TextFile(_LinesFile):
    """Text, which is one document or many; any file whose name says nothing else."""

    kind = 'text'
    hub_endings = ('.txt',)

    @classmethod
    def recognizes(cls, name, field=None, as_text=False):
        return True

    def batches(self, wanted):
        yield from self.cut_by(wanted.division, wanted.n_characters)

    @staticmethod
    def text_of(chunk):
        """The text of a chunk. Raises ValueError if it is not UTF-8."""
        try:
            return chunk.data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{chunk.name} {not_utf8(chunk.offset + error.start)}") from None

    def count_characters(self):
        """Characters of this file, its byte order mark not counted."""
        with opened(self) as (_, stream):
            block = stream.read(cutting.PIECE)
            n = 0
            if block.startswith(codecs.BOM_UTF8):
                n = -1
            while block:
                n += cutting.count_characters(block)
                block = stream.read(cutting.PIECE)
        return n


class JsonLines(_LinesFile):
    """A row on each line, as a JSON object or array."""

    kind = 'jsonl'
    endings = ('.jsonl', '.ndjson', '.jsonlines')
    hub_endings = endings
    has_rows = True
    unit = 'line'  # what a row is called in messages

    @classmethod
    def recognizes(cls, name, field=None, as_text=False):
        if field and not as_text and name.endswith('.json'):
            return True
        return name.endswith(cls.endings)

    def why_not_rows(self, head):
        return conversion.why_not_lines(self, head)

    def batches(self, wanted):
        yield from self.cut_by(DIVISIONS['line'])

    def first_rows(self):
        """Yields the rows at the beginning of this file, those that can't be parsed left out."""
        with opened(self) as (_, stream):
            head = stream.read(cutting.PIECE + 1)
            chunk = next(cutting.cut(self, stream, head, DIVISIONS['line']), None)
        if chunk is None:
            return
        for _, line in self.rows_of(chunk):
            with contextlib.suppress(ValueError):
                yield self.parse(line)

    @staticmethod
    def rows_of(chunk):
        """Yields (line number, line) of each row in a chunk."""
        for number, line in enumerate(chunk.data.split(b'\n'), chunk.line):
            if line.strip():
                yield number, line

    @staticmethod
    def parse(line):
        """The dict or list in a line of bytes. Raises ValueError."""
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"not UTF-8 at byte {error.start:,} of the line: `iconv -f ITS_ENCODING "
                "-t UTF-8` converts the file"
            ) from None
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not JSON ({error}): {text[:40]}") from None
        if not isinstance(row, (dict, list)):
            raise ValueError(f"not a row but {text[:40]}: a row is {{…}}")
        if SURROGATE.search(text):
            return _without_surrogates(row)
        return row


class Parquet(SourceFile):
    """A table of Apache Parquet; needs pyarrow."""

    kind = 'parquet'
    endings = ('.parquet',)
    hub_endings = endings
    may_be_compressed = False
    has_rows = True
    unit = 'row'

    def batches(self, wanted):
        """Of the columns that are wanted. A batch has the same share of the file's bytes as of its
        rows."""
        with self._opened() as table:
            columns = self._columns(table, wanted)
            n_rows = table.metadata.num_rows
            line = 1
            position = 0
            for i in range(table.num_row_groups):
                group = table.metadata.row_group(i)
                rows_per_batch = cutting.PIECE * group.num_rows // max(1, _size(group, columns))
                for rows in table.iter_batches(max(1, rows_per_batch), [i], columns):
                    before = position
                    position = self.size * (line - 1 + len(rows)) // n_rows
                    chunk = Chunk(
                        self.name, Parquet, rows.to_pylist(), position, line, split=self.split
                    )
                    yield Batch([chunk], position - before)
                    line += len(rows)

    def _columns(self, table, wanted):
        """The names of the columns to read. Raises ValueError if one is missing."""
        names = table.schema_arrow.names
        columns = [_column(field, names) for field in wanted.columns]
        for column in columns:
            if column not in names:
                raise ValueError(
                    f"{self.name} has no column {column!r}, only {', '.join(names)}: {WHICH_FIELD}"
                )
        for field in wanted.optional_columns:
            column = _column(field, names)
            if column in names and column not in columns:
                columns.append(column)
        return columns

    def first_rows(self):
        """Yields the rows of this file."""
        with self._opened() as table:
            for rows in table.iter_batches(1):
                yield from rows.to_pylist()

    @staticmethod
    def rows_of(chunk):
        """Yields (row number, row) of each row in a chunk."""
        yield from enumerate(chunk.data, chunk.line)

    @staticmethod
    def parse(row):
        return row

    @contextlib.contextmanager
    def _opened(self):
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError:
            raise ValueError(f"{self.name} needs a package: pip install pyarrow") from None
        try:
            with parquet.ParquetFile(self.path) as table:
                yield table
        except pyarrow.ArrowException as error:
            raise ValueError(f"{self.name} can't be read as parquet: {error}") from None


class Table(SourceFile):
    """Rows in a form that is not read: an error, which says how to convert it."""

    kind = 'table'
    endings = TABLES

    @classmethod
    def recognizes(cls, name, field=None, as_text=False):
        return not as_text and name.endswith(cls.endings)

    def judge(self):
        with opened(self) as (_, stream):
            return conversion.how_to_convert_table(self, stream.read(conversion.SNIFF)), ''


FORMATS = [Parquet, JsonLines, Table, TextFile]  # the first that recognizes a name reads the file
WITH_ROWS = ' and '.join(form.endings[0] for form in reversed(FORMATS) if form.has_rows)


def format_of(name, field=None, as_text=False):
    """(the class of FORMATS, the compression) of a file, by its name. field, as_text: as for
    find.find."""
    stem, compression = split_name(name.lower())
    form = next(form for form in FORMATS if form.recognizes(stem, field, as_text))
    return form, compression


def source_file(name, path, field=None, as_text=False):
    """The SourceFile at a path, which the user knows by this name. Raises OSError."""
    form, compression = format_of(name, field, as_text)
    stat = path.stat()
    return form(name, path, compression, stat.st_size, stat.st_mtime_ns)


def read_text(path, as_text=False):
    """The text of one file, .gz and .zst too, without its byte order mark.

    as_text: also where its name says that it holds rows. Raises ValueError or OSError.
    """
    file = source_file(str(path), Path(path))
    if not isinstance(file, TextFile) and not as_text:
        raise ValueError(
            f"{path} holds rows, not text: `python data/prepare.py NAME "
            f"{shlex.quote(str(path))}` makes a dataset of them, whose NAME can be "
            "given instead"
        )
    with opened(file) as (_, stream):
        content = stream.read()
    head = content[: conversion.SNIFF]
    not_text = why_not_text(head, is_whole=len(content) < conversion.SNIFF)
    if not_text:
        raise ValueError(f"{path} {not_text}")
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} {not_utf8(error.start)}") from None


def why_not_text(head, is_whole):
    """Why the first bytes of a file, or all of them, are not UTF-8 text, or ''."""
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


def not_utf8(position):
    """What to say of a file that is not UTF-8 at this byte."""
    return f"is not UTF-8 at byte {position:,}: `iconv -f ITS_ENCODING -t UTF-8` converts it"


def _without_surrogates(item):
    """Half a character, which JSON can write and UTF-8 can't, becomes U+FFFD."""
    if isinstance(item, str):
        return item.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')
    if isinstance(item, dict):
        return {key: _without_surrogates(value) for key, value in item.items()}
    if isinstance(item, list):
        return [_without_surrogates(value) for value in item]
    return item


def _column(field, names):
    """The column that holds a field: 'a' of 'a.b', unless 'a.b' is a column itself."""
    if field in names:
        return field
    return field.split('.')[0]


def _size(group, columns):
    """Bytes of these columns in a row group of a parquet file, unpacked."""
    size = 0
    for i in range(group.num_columns):
        column = group.column(i)
        if column.path_in_schema.split('.')[0] in columns:
            size += column.total_uncompressed_size
    return size
