"""Encodes the documents of a piece of a source, and chooses the split of each."""

import hashlib
import itertools
from bisect import bisect_right

import numpy as np

from text import chat
from text.documents import Part, Remark
from text.journal import SPLITS

ROW = np.dtype(
    [('split', 'u1'), ('documents', 'u1'), ('tokens', 'u4'), ('bytes', 'u4'), ('digest', 'V16')]
)


class Encoder:
    """A piece of the source -> (ids, learned or None, table of ROWs, Remarks), documents one after
    the other."""

    def __init__(self, tokenizer, source, shares, seed, dtype, end, masked):
        self.tokenizer, self.source, self.dtype, self.masked = tokenizer, source, dtype, masked
        self.seeded = hashlib.sha256(b'%d/' % seed)
        eot = getattr(tokenizer, 'eot', None)
        self.eot, self.end = (None, end) if eot is None else (np.array([eot], dtype), '')
        self.sums = [0, *itertools.accumulate(shares)]
        self.limits = [int(share * 2**64) for share in self.sums[1:-1]]

    def __call__(self, piece):
        ids, learned, table, remarks = [], [], [], []
        for split, document in self.source.read(piece):
            if isinstance(document, Remark):
                remarks.append(document)
                continue
            for (*row, text_bytes, digest), new, are_learned, ends in self._rows(split, document):
                row_ids = (
                    [np.asarray(new, self.dtype), self.eot]
                    if ends and self.eot is not None
                    else [np.asarray(new, self.dtype)]
                )
                n = sum(map(len, row_ids))
                ids += row_ids
                if self.masked:
                    are_learned = (
                        np.ones(n, 'u1') if are_learned is True else np.asarray(are_learned, 'u1')
                    )
                    learned += (
                        [are_learned, are_learned[-1:]] if len(are_learned) < n else [are_learned]
                    )
                table.append((*row, n, text_bytes, digest))
        all_ids = np.concatenate([np.empty(0, self.dtype), *ids])
        all_learned = np.concatenate([np.empty(0, 'u1'), *learned]) if self.masked else None
        return all_ids, all_learned, np.array(table, ROW), remarks

    def _rows(self, split, document):
        """((split, documents in it, bytes of text, digest or nothing), ids, True or whether each is
        learned, whether the eot follows) of a document; of one by position perhaps several."""
        if isinstance(document, Part):
            if document.place:
                yield from self._by_position(split, document)
            else:
                text = document.text + (self._end(document.text) if document.is_last else '')
                yield (
                    (
                        self._hashed(split, document.key)[0],
                        document.is_last,
                        len(text.encode()),
                        b'',
                    ),
                    self.tokenizer.encode_ordinary(text),
                    True,
                    document.is_last,
                )
        elif isinstance(document, str):
            if document:
                content, end = document.encode(), self._end(document)
                split, digest = self._hashed(split, content)
                yield (
                    (split, 1, len(content) + len(end.encode()), digest),
                    self.tokenizer.encode_ordinary(document + end),
                    True,
                    True,
                )
        else:
            text = ''.join(part for part, _ in document)
            end, (split, digest) = self._end(text), self._hashed(split, text.encode())
            yield (
                (split, 1, len((text + end).encode()), digest),
                *chat.encode(
                    self.tokenizer, [*document, *([(end, document[-1][1])] if end else [])]
                ),
                True,
            )

    def _by_position(self, split, part):
        """The parts of a part that is cut where one split ends and the next begins, or all of it
        where its split is given; nothing stands behind them."""
        start, length = part.place
        if split is not None:
            row = SPLITS.index(split), start == 0, len(part.text.encode()), b''
            yield row, self.tokenizer.encode_ordinary(part.text), True, False
            return
        cuts = [int(share * length) for share in self.sums]
        for split, (first, last) in enumerate(itertools.pairwise(cuts)):
            text = part.text[max(0, first - start) : max(0, last - start)]
            if text:
                yield (
                    (split, first >= start, len(text.encode()), b''),
                    self.tokenizer.encode_ordinary(text),
                    True,
                    False,
                )

    def _hashed(self, split, content):
        """(the number of the split, 16 bytes that stand for the content), by one sha256 of the seed
        and the content."""
        digest = self.seeded.copy()
        digest.update(content)
        digest = digest.digest()
        number = (
            bisect_right(self.limits, int.from_bytes(digest[:8]))
            if split is None
            else SPLITS.index(split)
        )
        return number, digest[16:]

    def _end(self, text):
        return ('' if text.endswith('\n') else '\n') if self.end is None else self.end
