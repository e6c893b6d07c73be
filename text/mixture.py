"""Several datasets in one run, each with a share of the windows: --dataset=NAME:WEIGHT,NAME:WEIGHT.

The rows of all batches of a run, one behind the other, are dealt out, so that after any of them
each dataset has had its share, up to rounding. Which one has row r depends on r and the weights
alone, in whole numbers: nothing has to be remembered, a run resumes, and any number of processes
and micro-batches see the same. Each dataset keeps epochs of its own.
"""

import fractions
import math
import os
import re
from pathlib import Path

import numpy as np

from text.dataset import Dataset, open_single
from text.folders import folder_of


def parse(words):
    """[(name, weight)] of what --dataset= says, the weights whole numbers; of one dataset [(name,
    1)]. ValueError."""
    found = [re.fullmatch(r'\s*(.+):(\d*\.?\d+)\s*', word) for word in str(words).split(',')]
    if len(found) == 1 or os.path.isdir(folder_of(words)):  # which may have a comma in its name
        return [(words, 1)]
    if not all(found):
        raise ValueError(
            f"dataset={words!r}: a mixture is NAME:WEIGHT,NAME:WEIGHT, a weight behind each name; a "
            "name in it has no comma"
        )
    if max(len(match[2]) for match in found) > 20:
        raise ValueError(f"dataset={words[:60]}… has a weight of more than 20 digits: take fewer")
    weights = [fractions.Fraction(match[2]) for match in found]
    one = fractions.Fraction(
        math.gcd(*(w.numerator for w in weights)), math.lcm(*(w.denominator for w in weights))
    )
    weights = [int(w / one) for w in weights] if one else [0]
    if not all(weights):
        raise ValueError(f"dataset={words!r}: weights must be above 0")
    if sum(weights) > 10**6:  # times a row's number this stays below 2^63 up to 2^43 rows
        raise ValueError(
            f"dataset={words!r}: these weights divide rows into {sum(weights):,} parts: take fewer digits"
        )
    if len({match[1] for match in found}) < len(found):
        raise ValueError(f"dataset={words!r} names a dataset twice")
    return [(match[1], weight) for match, weight in zip(found, weights)]


def deal(rows, weights):
    """(which of the datasets each of `rows` is of, its number there), for an array of rows and
    whole-numbered weights.

    The first dataset has a row wherever the whole part of its share of the rows up to there grows;
    the others deal out what is left in the same way.
    """
    which, numbers, is_left = np.full(len(rows), -1), np.array(rows), np.ones(len(rows), bool)
    for k, weight in enumerate(weights):
        total, left = sum(weights[k:]), numbers[is_left]
        before = left * weight // total
        is_mine = (left + 1) * weight // total > before
        numbers[is_left] = np.where(is_mine, before, left - before)
        which[np.flatnonzero(is_left)[is_mine]] = k
        is_left = which < 0
    return which, numbers


class Mixture(Dataset):
    """The datasets of `parse`'s names and weights, as one. Raises ValueError or OSError.

    The loss of an evaluation is the mean of theirs, by weight. meta: what none of theirs
    contradicts.
    """

    def __init__(self, words, block_size, batch_size, batches_per_step=1, seed=1337):
        self._settings(words, block_size, batch_size, batches_per_step, seed)
        names, self.weights = zip(*parse(words))
        self.parts = [
            open_single(name, block_size, batch_size, batches_per_step, seed) for name in names
        ]
        first, self.folder, self.shares = (
            self.parts[0],
            Path(words),
            [w / sum(self.weights) for w in self.weights],
        )
        for part in self.parts[1:]:
            if (part.tokenizer, part.vocab_size) != (first.tokenizer, first.vocab_size):
                raise ValueError(
                    f"{first.name} and {part.name} were prepared with different tokenizers: a mixture has one"
                )
        self.tokenizer, self.vocab_size = first.tokenizer, first.vocab_size
        metas = [part.meta for part in self.parts]
        self.meta = {
            key: value
            for meta in metas
            for key, value in meta.items()
            if all(other.get(key, value) == value for other in metas)
        }
        self.tokens = {
            split: sum(part.tokens[split] for part in self.parts)
            for split in first.tokens
            if all(split in part.tokens for part in self.parts)
        }
        self.batch_tokens = round(self._mean([part.batch_tokens for part in self.parts]))
        self.windows = max(
            -(-part.windows * sum(self.weights) // w) for part, w in zip(self.parts, self.weights)
        )

    def _mean(self, values):
        return sum(share * value for share, value in zip(self.shares, values))

    @property
    def eot(self):
        eots = {part.eot for part in self.parts}
        if len(eots) > 1:
            raise ValueError(
                f"document_boundaries=True: the documents of {self.name} end with different tokens"
            )
        return eots.pop()

    def train_rows(self, numbers):
        rows, (which, numbers) = (
            np.empty((2, len(numbers), self.block_size), np.int64),
            deal(numbers, self.weights),
        )
        for k in np.unique(which):
            rows[:, which == k] = self.parts[k].train_rows(numbers[which == k])
        return rows[0], rows[1]

    def train_counts(self, numbers):
        counts, (which, numbers) = np.empty(len(numbers), np.int64), deal(numbers, self.weights)
        for k in np.unique(which):
            counts[which == k] = self.parts[k].train_counts(numbers[which == k])
        return counts

    def epoch(self):
        """(idx, targets) batches until each dataset has been seen whole; the others go on with
        further epochs."""
        for start in range(0, self.windows, self.batch_size):
            yield self.train_rows(np.arange(start, min(start + self.batch_size, self.windows)))

    @property
    def epoch_tokens(self):
        return self.windows * self.batch_tokens // self.batch_size

    def epochs(self, tokens):
        seen = [
            tokens * share * part.batch_tokens / self.batch_tokens
            for share, part in zip(self.shares, self.parts)
        ]
        return ', '.join(f"{part.epochs(n)} of {part.name}" for part, n in zip(self.parts, seen))

    def opening(self):
        return self.parts[0].opening()

    def _limits(self, limit):
        """The batches of each dataset in an evaluation of at most `limit`: by weight, but at least
        one."""
        if limit is None:
            return [None] * len(self.parts)
        return (
            np.bincount(deal(np.arange(limit), self.weights)[0], minlength=len(self.parts))
            .clip(1)
            .tolist()
        )

    def check_evaluations(self, limit):
        for part, n in zip(self.parts, self._limits(limit)):
            part.check_evaluations(n)

    def eval_batches(self, split, limit=None):
        return sum(part.eval_batches(split, n) for part, n in zip(self.parts, self._limits(limit)))

    def eval_batch(self, split, i, limit=None):
        """As a Dataset's, but `valid` is the batch's part of the whole evaluation: its dataset's
        weight, divided among its targets."""
        for part, share, n in zip(self.parts, self.shares, self._limits(limit)):
            if i < (batches := part.eval_batches(split, n)):
                idx, targets, valid = part.eval_batch(split, i, n)
                return idx, targets, share * valid / part.eval_targets(split, n)
            i -= batches
        raise IndexError(i)

    def bytes_per_token(self, split):
        each = [part.bytes_per_token(split) for part in self.parts]
        return self._mean(each) if all(each) else None
