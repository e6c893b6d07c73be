"""Encodes the documents of a piece of a source, and chooses the split of each."""

import hashlib
import itertools
from bisect import bisect_right
from typing import NamedTuple

import numpy as np

from text import chat
from text.bin_files import SPLITS
from text.documents import Part, Remark

# A line of the table that describes the encoded documents: the number of the split, whether a
# document counts here (once for all parts of one), tokens, bytes of text, its digest.
ROW = np.dtype(
    [('split', 'u1'), ('documents', 'u1'), ('tokens', 'u4'), ('bytes', 'u4'), ('digest', 'V16')]
)


class Encoded(NamedTuple):
    """A document, or a part of one, as ids."""

    split: int  # the index in SPLITS
    counts: bool  # whether to count a document: once for all parts of one
    n_bytes: int  # of its text
    digest: bytes  # of its content; b'' if it is a part
    ids: list
    learned: list | None = None  # whether each id is learned; None: all are
    has_end: bool = True  # whether the end of text follows, if the tokenizer has one


class Encoder:
    """Called with a piece of the source, returns its documents one after the other: (ids, learned
    or None, table of ROWs, Remarks).

    shares: of train, val and perhaps test; dtype: of the ids; end: as for bins.prepare; masked:
    whether `learned`, uint8 of the ids' shape, is needed.
    """

    def __init__(self, tokenizer, source, shares, seed, dtype, end, masked):
        self.tokenizer = tokenizer
        self.source = source
        self.dtype = dtype
        self.masked = masked
        self.seed_hash = hashlib.sha256(b'%d/' % seed)
        self.eot = None
        self.end = end
        eot = getattr(tokenizer, 'eot', None)
        if eot is not None:
            self.eot = np.array([eot], dtype)
            self.end = ''
        self.sums = [0, *itertools.accumulate(shares)]
        self.limits = [int(share * 2**64) for share in self.sums[1:-1]]

    def __call__(self, piece):
        ids = [np.empty(0, self.dtype)]
        learned = [np.empty(0, 'u1')]
        table = []
        remarks = []
        for split, document in self.source.read(piece):
            if isinstance(document, Remark):
                remarks.append(document)
                continue
            for row in self._encoded(split, document):
                n_ids = len(row.ids)
                ids.append(np.asarray(row.ids, self.dtype))
                has_eot = row.has_end and self.eot is not None
                if has_eot:
                    n_ids += 1
                    ids.append(self.eot)
                if self.masked:
                    learned += _mask(row.learned, n_ids)
                table.append((row.split, row.counts, n_ids, row.n_bytes, row.digest))
        all_learned = None
        if self.masked:
            all_learned = np.concatenate(learned)
        return np.concatenate(ids), all_learned, np.array(table, ROW), remarks

    def _encoded(self, split, document):
        """Yields the Encoded of a document; of a text by position perhaps several. split: its name,
        or None."""
        if isinstance(document, Part):
            if document.place:
                yield from self._by_position(split, document)
            else:
                yield self._part(split, document)
        elif isinstance(document, str):
            if document:  # an empty one is no document
                yield self._text(split, document)
        else:
            yield self._conversation(split, document)

    def _text(self, split, text):
        content = text.encode()
        end = self._end_of(text)
        number, digest = self._split_of(split, content)
        ids = self.tokenizer.encode_ordinary(text + end)
        return Encoded(number, True, len(content) + len(end.encode()), digest, ids)

    def _conversation(self, split, parts):
        """parts: [(text, is_learned)]."""
        text = ''.join(part for part, _ in parts)
        end = self._end_of(text)
        number, digest = self._split_of(split, text.encode())
        if end:
            _, is_learned = parts[-1]
            parts = [*parts, (end, is_learned)]
        ids, learned = chat.encode(self.tokenizer, parts)
        return Encoded(number, True, len((text + end).encode()), digest, ids, learned)

    def _part(self, split, part):
        """The first part of a document chooses the split of all. The document counts with its last
        part."""
        text = part.text
        if part.is_last:
            text += self._end_of(text)
        number, _ = self._split_of(split, part.key)
        ids = self.tokenizer.encode_ordinary(text)
        n_bytes = len(text.encode())
        return Encoded(number, part.is_last, n_bytes, b'', ids, has_end=part.is_last)

    def _by_position(self, split, part):
        """Yields the pieces of a part that is cut where one split ends and the next begins, or all
        of it if its split is given; nothing follows them."""
        start, length = part.place
        if split is not None:
            ids = self.tokenizer.encode_ordinary(part.text)
            n_bytes = len(part.text.encode())
            yield Encoded(SPLITS.index(split), start == 0, n_bytes, b'', ids, has_end=False)
            return
        cuts = [int(share * length) for share in self.sums]
        for number, (first, last) in enumerate(itertools.pairwise(cuts)):
            text = part.text[max(0, first - start) : max(0, last - start)]
            if text:
                ids = self.tokenizer.encode_ordinary(text)
                n_bytes = len(text.encode())
                yield Encoded(number, first >= start, n_bytes, b'', ids, has_end=False)

    def _split_of(self, split, content):
        """(the number of the split, the digest), by one sha256 of the seed and the content."""
        sha256 = self.seed_hash.copy()
        sha256.update(content)
        digest = sha256.digest()
        if split is None:
            number = bisect_right(self.limits, int.from_bytes(digest[:8]))
        else:
            number = SPLITS.index(split)
        return number, digest[16:]

    def _end_of(self, text):
        """The text that follows a document, if the tokenizer has no token for that."""
        if self.end is not None:
            return self.end
        if text.endswith('\n'):
            return ''
        return '\n'


def _mask(learned, n):
    """[arrays of uint8] of n altogether: whether each id is learned; None: all are. The end of
    text behind the ids is learned if the last id is."""
    if learned is None:
        return [np.ones(n, 'u1')]
    mask = np.asarray(learned, 'u1')
    if len(mask) < n:
        return [mask, mask[-1:]]
    return [mask]
