"""The documents in files, in pieces that worker processes read, as bins.prepare expects them."""

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
from typing import NamedTuple

from system import files
from system.errors import one_line
from text.chat import Marker
from text.documents import SKIPPED, Part, Remark, remark_lines
from text.sources import cutting, rows
from text.sources.cutting import SEPARATOR
from text.sources.formats import WITH_ROWS, Wanted
from text.sources.hub_dataset import downloaded

N_FIRST_ROWS = 100  # at the beginning of a file; one of them has to show how all are read
MARK = re.compile(r'<\|[^|\s]+\|>|\[\|[^|\s]+\|\]')  # how special tokens are spelled
SPECIAL = 'special token '  # and its text: what Remarks about special tokens are about


class Piece(NamedTuple):
    """Chunks that a worker reads at once."""

    file: int  # the number of the file in which it begins
    size: int  # bytes on the disk
    chunks: list


class Source:
    """The documents in files, as bins.prepare reads them; `texts` are those for a vocabulary.

    source_files: [formats.SourceFile]; division: the cutting.Division that `document` names; the
    other arguments are those of sources.open. Raises ValueError.
    """

    def __init__(
        self, source_files, field, document, division, template, folder, max_bytes, skip_bad_rows
    ):
        if max_bytes:  # of what is trained on
            max_bytes += sum(file.size for file in source_files if file.split in ('val', 'test'))
            ends = list(accumulate(file.size for file in source_files))
            source_files = source_files[: bisect_left(ends, max_bytes) + 1]
        self.files = source_files
        self.max_bytes = max_bytes or sys.maxsize
        self.size = min(sum(file.size for file in source_files), self.max_bytes)
        self.document = document
        self.division = division
        self.skip_bad_rows = skip_bad_rows
        self.special = None  # the pattern of the tokenizer's special tokens
        self.end_of_text = None  # the text of one of them
        self.unknown_marks = []  # of the template, spelled like special tokens that it lacks
        self.splits = {file.split for file in source_files if file.split}
        self.has_text = any(not file.has_rows for file in source_files)

        self.rows = self._row_reader(field, template, folder)
        fields = ['text']
        self.facts = {}  # for meta.json
        if self.rows:
            fields = self.rows.fields
            self.facts.update(self.rows.facts)
        if template and not self.facts:
            raise ValueError(
                "a template is for conversations, and there are none in the sources: "
                "of rows, --field=NAME says which field holds the messages, "
                "--field=ASKED,ANSWERED which ones a question and its answer"
            )
        commits = {f'{file.origin[0]}@{file.origin[1]}' for file in source_files if file.origin}
        if commits:
            self.facts['hub'] = sorted(commits)

        self.lengths = self._lengths()
        # Whether something separates documents in the bins.
        self.has_ends = not all(self.lengths.get(file.split) for file in source_files)
        self.fingerprint = json.dumps(
            [
                fields,
                document,
                self.facts,
                max_bytes,
                skip_bad_rows,
                [
                    [file.name, file.size, file.changed, file.kind, file.split]
                    for file in source_files
                ],
            ]
        )

    # ---- how the files are read ------------------------------------------------------------------

    def _row_reader(self, field, template, folder):
        """What reads the rows of all files, or None if there are only texts. Raises ValueError."""
        if field is not None and not all((field or 'text').split(',')):
            raise ValueError(
                f"field={field!r} must be a name, or names with commas between: of "
                "what is asked, and last of what is answered"
            )
        with_rows = [file for file in self.files if file.has_rows]
        if with_rows:
            row = self._telling_row(with_rows, field, folder)
            return rows.reader(row, field, template)
        if field:
            raise ValueError(
                f"field={field!r} is of rows, which {WITH_ROWS} files have: "
                f"{self.files[0].name} is text"
            )
        if self.skip_bad_rows:
            raise ValueError(
                f"skip_bad_rows is for rows, which {WITH_ROWS} files have: "
                f"{self.files[0].name} is text"
            )
        return None

    def _telling_row(self, with_rows, field, folder):
        """The row that decides how all are read: the first one that fits, or else the first; or {}.
        Files to train on are asked before those of val and test, which are read the same way."""
        first = {}
        for file in sorted(with_rows, key=lambda file: file.split in ('val', 'test')):
            row = _kept_first_row(file, field, folder)
            if rows.shows_how_to_read(row, field):
                return row
            first = first or row
        return first

    def _lengths(self):
        """{split: its length in characters} of those splits that are one text. Such a text is
        divided by position, or is the whole of its split, and nothing follows it in the bins."""
        lengths = {}
        splits = dict.fromkeys(file.split for file in self.files)  # each once, in their order
        for split in splits:
            of_split = [file for file in self.files if file.split == split]
            if self.document != 'file' or len(of_split) > 1 or of_split[0].has_rows:
                continue
            if self.max_bytes < sys.maxsize and split in ('train', None):
                raise ValueError(
                    "max_bytes takes the first of many documents, and this is one "
                    "text: divide it by --document"
                )
            lengths[split] = downloaded(of_split[0]).count_characters()
        return lengths

    @property
    def too_few(self):
        """(what a document is called, what helps if a split has none)."""
        if self.has_text:
            return 'document', (
                "use smaller ones (--document=paragraph or line), or make them one "
                "text, which is divided by position: `cat FILES | python "
                "data/prepare.py NAME -`"
            )
        return self.rows.unit, f"add {self.rows.unit}s"

    # ---- pieces, in the process that reads -------------------------------------------------------

    def pieces(self, first=0):
        """Yields the Pieces of the files from number `first` on, up to max_bytes."""
        ends = [0, *accumulate(file.size for file in self.files)]
        number = first
        n_read = 0  # of this file
        for piece in self._pieces(first):
            if piece.file != number:
                number = piece.file
                n_read = 0
            if ends[number] + n_read >= self.max_bytes:
                return
            yield piece
            n_read += piece.size

    def _pieces(self, first):
        """Small files share a piece; a larger one has its pieces for itself."""
        small = []  # chunks of small files
        n_bytes = 0  # of these, unpacked
        begin = first
        for number, file in self._files_here(first):
            for batch in file.batches(self._wanted(file)):
                is_full = n_bytes + batch.size > cutting.PIECE
                if small and (not batch.is_whole_file or is_full):
                    yield Piece(begin, self._size(begin, number), small)
                    small = []
                    n_bytes = 0
                if batch.is_whole_file:
                    if not small:
                        begin = number
                    small += batch.chunks
                    # Where pieces end decides what max_bytes reads: a file has always counted once
                    # for each of its chunks.
                    n_bytes += batch.size * len(batch.chunks)
                else:
                    yield Piece(number, batch.size, batch.chunks)
        if small:
            yield Piece(begin, self._size(begin, len(self.files)), small)

    def _size(self, begin, end):
        """Bytes on the disk of the files from number `begin` to number `end`, excluded."""
        return sum(file.size for file in self.files[begin:end])

    def _wanted(self, file):
        columns = []
        optional_columns = []
        if self.rows:
            columns = self.rows.required
            optional_columns = self.rows.optional
        return Wanted(self.division, self.lengths.get(file.split), columns, optional_columns)

    def _files_here(self, first):
        """Yields (number, file) of each file from `first` on. One of the Hub is downloaded while
        the previous one is read, and removed after it was read."""
        downloads = {}
        for number, file in enumerate(self.files[first:], first):
            for i, wanted in enumerate(self.files[number : number + 2], number):
                if wanted.origin and i not in downloads:
                    downloads[i] = Future()
                    threading.Thread(
                        target=_download_into, args=(downloads[i], wanted), daemon=True
                    ).start()
            if file.origin:
                downloads.pop(number).result()
            yield number, file
            if file.origin:
                file.path.unlink(missing_ok=True)

    # ---- documents, in the workers ---------------------------------------------------------------

    def read(self, piece):
        """Yields (split or None, document or Remark) of each document in a piece."""
        for chunk in piece.chunks:
            special = Counter()
            for document in self._documents(chunk):
                yield chunk.split, document
                if self.special and not isinstance(document, Remark):
                    special.update(self._special_in(document))
            for token, n in special.items():
                yield None, Remark(SPECIAL + token, chunk.name, n)

    def _documents(self, chunk):
        """Yields the documents of a chunk, and Remarks."""
        if not chunk.format.has_rows:
            text = chunk.format.text_of(chunk)
            yield from cutting.documents_of(chunk, text, self.division)
            return
        for number, row in chunk.format.rows_of(chunk):
            yield from self._read_row(chunk, number, row)

    def _read_row(self, chunk, number, row):
        """Yields the document that a row is, and Remarks on it. Raises ValueError."""
        where = f"{chunk.name}, {chunk.format.unit} {number}"
        try:
            document, unused = self.rows.parts(chunk.format.parse(row))
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

    def texts(self, most=None):
        """Yields the text of each document, or part of one, for a vocabulary. most: of about so
        many bytes, spread evenly over all files."""
        share = 1
        if most:
            share = min(1, most / max(1, self.size))
        for i, piece in enumerate(self.pieces()):
            if i > 0 and int((i + 1) * share) == int(i * share):
                continue
            for _, document in self.read(piece):
                if not isinstance(document, Remark):
                    yield ''.join(text for text, _ in _parts(document))

    # ---- special tokens, and what is reported at the end -----------------------------------------

    def look_for_special_tokens(self, tokenizer):
        """From now on `read` remarks on the texts of this tokenizer's special tokens, which are
        encoded as ordinary text; `report` names the marks of the template that are none of them.
        """
        texts = sorted(tokenizer.special, key=lambda text: (-len(text), text))
        if texts:
            self.special = re.compile('|'.join(map(re.escape, texts)))
        for text in texts:
            if tokenizer.special[text] == tokenizer.eot:
                self.end_of_text = text
                break
        marks = []
        for pair in self.facts.get('template', {}).values():
            marks += MARK.findall(''.join(pair))
        for mark in dict.fromkeys(marks):
            if mark not in tokenizer.special and not _is_one_token(tokenizer, mark):
                self.unknown_marks.append(mark)

    def _special_in(self, document):
        """The texts of special tokens in a document, except those that a chat template puts
        there."""
        found = []
        for text, _ in _parts(document):
            if not isinstance(text, Marker):
                found += self.special.findall(text)
        return found

    def report(self, remarks):
        """Yields the lines to print at the end. remarks: as documents.count_remarks counts them."""
        special = {}
        others = {}
        for about, counted in remarks.items():
            if about.startswith(SPECIAL):
                special[about.removeprefix(SPECIAL)] = counted
            elif about != SEPARATOR:
                others[about] = counted
        if special:
            yield one_line(self._special_notice(special))
        if self.unknown_marks:
            yield one_line(
                f"notice: the tokenizer has no special tokens {', '.join(self.unknown_marks)}, "
                "which the template writes: they were encoded as ordinary text"
            )
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
        yield from remark_lines(others)

    def _special_notice(self, special):
        most = 3  # that are named
        tokens = [
            f"{token!r} {n:,} time(s), first in {details[0]}"
            for token, (n, details) in special.items()
        ]
        if len(tokens) > most:
            tokens[most:] = [f"and {len(tokens) - most:,} others"]
        if self.end_of_text in special and self.has_text:
            advice = f"; --document={shlex.quote(self.end_of_text)} divides a text there"
        else:
            advice = ", while sample.py and evaluate.py read them as the tokens"
        return (
            "notice: special tokens of the tokenizer were encoded as ordinary text: "
            f"{'; '.join(tokens)}{advice}"
        )


def _parts(document):
    """[(text, is_learned)] of any kind of document."""
    if isinstance(document, str):
        return [(document, True)]
    if isinstance(document, Part):
        return [(document.text, True)]
    return document


def _is_one_token(tokenizer, text):
    try:
        return len(tokenizer.encode(text)) == 1
    except ValueError:  # it lacks a character
        return False


def _download_into(future, file):
    try:
        future.set_result(downloaded(file))
    except Exception as error:
        future.set_exception(error)


def _kept_first_row(file, field, folder):
    """The row of `_first_row`. That of a file of the Hub is kept in the dataset's workplace: a
    command that was stopped needs it again when the file is removed."""
    if not file.origin:
        return _first_row(file, field)
    kept = files.workplace(folder) / 'row.json'
    key = [*file.origin, field]
    if kept.is_file():
        known, row = json.loads(kept.read_text(encoding='utf-8'))
        if known == key:
            return row
    row = _first_row(downloaded(file), field)
    kept.write_text(json.dumps([key, row], default=str), encoding='utf-8')
    return row


def _first_row(file, field):
    """The first row of a file that shows how rows are read, or else the first one, or {}."""
    first = {}
    for row in itertools.islice(file.first_rows(), N_FIRST_ROWS):
        if rows.shows_how_to_read(row, field):
            return row
        first = first or row
    return first
