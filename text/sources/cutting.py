"""Cuts a text or a file of rows into chunks of about a megabyte, and these into documents.

One process reads and cuts, which is cheap; worker processes find the documents in the chunks. A
text's byte order mark is no part of its text; everything else is, CR LF too.
"""

import codecs
import difflib
import hashlib
import re
from typing import NamedTuple

import numpy as np

from text.documents import Part, Remark

PIECE = 1 << 20  # bytes of a chunk, about
LARGE = 1 << 22  # bytes of the largest text that is not encoded in parts
# Bytes of the longest row, which has to be in memory whole. A small file may unpack to any number.
LONGEST_ROW = 1 << 28
SEPARATOR = 'separator'  # what Remarks about separators that were found are about
BLANK_LINES = re.compile(rb'(?:[ \t]*\r?\n)+')

# Where a text can be cut so that its parts, each encoded on its own, have the same ids in GPT-2's
# and tiktoken's other encodings: after a newline between words, or before a space between words.
SAFE_CUTS = re.compile(r'(?<=\S)\n(?=[^\s/])'), re.compile(r'(?<=\S)(?= [^\W\d_])')


class Division(NamedTuple):
    """How a text is divided into documents."""

    separator: str | None  # the pattern of what separates documents; None: a text is one document
    before: str = ''  # the characters that are stripped at the start of a document,
    behind: str = ''  # and at its end
    reach: int = 0  # bytes of the longest match; 0 unless the user has given the separator


DIVISIONS = {
    'file': Division(None),
    'paragraph': Division(r'\n(?:[ \t]*\r?\n)+', behind=' \t\r\n'),
    'line': Division(r'\n', behind='\r\n'),
}


def division_by(document):
    """The Division for --document: one of DIVISIONS, or at any other text.

    A line end in that text also matches CR LF, and line ends around it belong to no document.
    Raises ValueError.
    """
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
    """Consecutive documents of a file, or a part of a large one."""

    name: str  # the file's, as the user knows it
    format: type  # the formats.SourceFile that can read the data
    data: object  # bytes; of parquet a list of rows
    offset: int = 0  # of the data in the text, in bytes
    line: int = 1  # the number of its first line, or row
    key: bytes | None = None  # key, is_last, place: as in documents.Part
    is_last: bool = True
    place: tuple | None = None
    is_first: bool = True  # whether a document begins here
    split: str | None = None  # where its documents go; None: by a hash of each


# ---- from a file to chunks -----------------------------------------------------------------------


def cut(file, stream, head, division, n_characters=None):
    """Yields the Chunks of a text or of a file with a row on each line: whole documents, unless one
    is larger than LARGE.

    file: a formats.SourceFile; stream: its content, of which `head`, at most PIECE + 1 bytes, has
    been read already. n_characters: the length of a text that is divided by position. Raises
    ValueError for a row that is too long.
    """
    limit = LARGE
    if file.has_rows:
        limit = LONGEST_ROW
    separator = None
    if division.separator:
        separator = re.compile(division.separator.encode())
    unread = _Unread(file, head, n_characters)
    key = None
    if n_characters:
        key = b''
    at_end = len(head) <= PIECE
    data = unread.data  # shrinks when a chunk is taken

    while data or not at_end:
        # A separator that the user has given may itself begin with a line end.
        if separator and not division.reach and key is None:
            blank = BLANK_LINES.match(data)
            if blank:
                unread.take(blank.end())
        matches = []
        if separator:
            matches = list(separator.finditer(data))
        ends = [match.end() for match in matches]
        if ends and ends[0] > limit:
            ends = []
        if not ends and file.has_rows and len(data) > limit:
            raise ValueError(
                f"{file.name}, line {unread.line} is a row of more than {LONGEST_ROW:,} bytes"
            )

        if not ends and not at_end and len(data) <= limit + division.reach:
            more = stream.read(max(PIECE, len(data)))
            data += more
            at_end = not more
        elif key is not None and ends:  # the end of a document that came in parts
            yield unread.take(ends[0], key=key, is_first=False)
            key = None
        elif ends:
            yield unread.take(ends[-1])
        elif len(data) <= limit:
            yield unread.take(len(data), key=key, is_first=not key)
        else:
            end = LARGE
            if matches and 0 < matches[0].start() < LARGE:  # a separator is not cut
                end = matches[0].start()
            n = safe_end(bytes(data[:end]))
            is_first = not key
            if is_first:
                key = hashlib.sha256(data[:n]).digest()[:16]
            yield unread.take(n, key=key, is_first=is_first, is_last=False)


class _Unread:
    """The bytes of a file that no chunk has yet, and where they are in it."""

    def __init__(self, file, head, n_characters):
        self.file = file
        self.data = bytearray(head.removeprefix(codecs.BOM_UTF8))
        self.offset = len(head) - len(self.data)
        self.line = 1
        self.characters_before = 0
        self.n_characters = n_characters

    def take(self, n, **facts):
        """Remove the first n bytes, and return them as a Chunk. facts: more of its fields."""
        taken = bytes(self.data[:n])
        place = None
        if self.n_characters:
            place = (self.characters_before, self.n_characters)
            self.characters_before += count_characters(taken)
        chunk = Chunk(
            self.file.name,
            type(self.file),
            taken,
            self.offset,
            self.line,
            place=place,
            split=self.file.split,
            **facts,
        )
        self.offset += n
        self.line += taken.count(b'\n')
        del self.data[:n]
        return chunk


def safe_end(data):
    """The last place in these bytes of UTF-8 where a text can be cut."""
    for begin in (max(0, len(data) - (1 << 16)), 0):  # the end is enough for most
        text = data[begin:].decode(errors='surrogateescape')
        for pattern in SAFE_CUTS:
            places = [match.end() for match in pattern.finditer(text)]
            if places:
                return begin + len(text[: places[-1]].encode(errors='surrogateescape'))
    n = len(data) - 1
    while n > len(data) - 4 and data[n] & 0xC0 == 0x80:  # not inside a character
        n -= 1
    return n


def count_characters(data):
    """The number of characters of UTF-8 that begin in these bytes."""
    return int(np.count_nonzero(np.frombuffer(data, np.uint8) & 0xC0 != 0x80))


# ---- from a chunk to documents -------------------------------------------------------------------


def documents_of(chunk, text, division):
    """Yields the documents of a chunk, or the Part of one; and a Remark if there are separators.

    text: the chunk's data, decoded.
    """
    separator = division.separator
    is_whole = chunk.key is None
    texts = [text]
    if separator and (is_whole or chunk.is_last):
        texts = re.split(separator, text)
    if division.reach and len(texts) > 1:
        yield Remark(SEPARATOR, chunk.name, len(texts) - 1)

    if is_whole:
        for text in texts:
            if text.strip() or not separator:
                yield text.lstrip(division.before).rstrip(division.behind)
        return
    text = texts[0]  # nothing follows the separator at the end of a last part
    if chunk.is_first:
        text = text.lstrip(division.before)
    if chunk.is_last:
        text = text.rstrip(division.behind)
    yield Part(text, chunk.key, chunk.is_last, chunk.place)
