"""Several datasets in one run, each with a share of the windows: --dataset=NAME:WEIGHT,NAME:WEIGHT.

All rows of a run's batches, one after the other, are dealt out to the datasets, so that after any
number of rows each dataset has had its share, up to rounding. Which dataset has row r depends on r
and the weights alone, in whole numbers: there is no state to save, a run resumes, and any number of
processes and micro-batches see the same. Each dataset has epochs of its own.
"""

import fractions
import math
import os
import re
from pathlib import Path

import numpy as np

from text.dataset import Dataset, open_single
from text.folders import folder_of

# Times a row's number, the sum of the weights stays below 2^63 up to 2^43 rows.
MOST_PARTS = 10**6


def parse(words):
    """[(name, weight)] of what --dataset= says, with whole-numbered weights; [(name, 1)] for one
    dataset. Raises ValueError."""
    matches = [re.fullmatch(r'\s*(.+):(\d*\.?\d+)\s*', word) for word in str(words).split(',')]
    if len(matches) == 1:
        return [(words, 1)]
    if os.path.isdir(folder_of(words)):  # a folder with a comma in its name
        return [(words, 1)]
    if not all(matches):
        raise ValueError(
            f"dataset={words!r}: a mixture is NAME:WEIGHT,NAME:WEIGHT, a weight behind each name; "
            "a name in it has no comma"
        )
    names = [match[1] for match in matches]
    digits = [match[2] for match in matches]
    if max(map(len, digits)) > 20:
        raise ValueError(f"dataset={words[:60]}… has a weight of more than 20 digits: use fewer")
    weights = _whole_numbers([fractions.Fraction(text) for text in digits])
    if not all(weights):
        raise ValueError(f"dataset={words!r}: weights must be above 0")
    if sum(weights) > MOST_PARTS:
        raise ValueError(
            f"dataset={words!r}: these weights divide rows into {sum(weights):,} parts: use fewer "
            "digits"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"dataset={words!r} names a dataset twice")
    return list(zip(names, weights))


def _whole_numbers(ratios):
    """The smallest whole numbers with the ratios of these ones."""
    unit = fractions.Fraction(
        math.gcd(*(fraction.numerator for fraction in ratios)),
        math.lcm(*(fraction.denominator for fraction in ratios)),
    )
    if not unit:  # all are 0
        return [0]
    return [int(fraction / unit) for fraction in ratios]


def deal(rows, weights):
    """(which dataset each of `rows` belongs to, its number there), for an array of row numbers and
    whole-numbered weights.

    The first dataset has a row wherever the whole part of its share of the rows up to there grows;
    the others deal out the remaining rows in the same way.
    """
    which = np.full(len(rows), -1)
    numbers = np.array(rows)
    is_left = np.ones(len(rows), bool)
    for k, weight in enumerate(weights):
        total = sum(weights[k:])
        left = numbers[is_left]
        before = left * weight // total  # rows of dataset k before each
        is_mine = (left + 1) * weight // total > before
        numbers[is_left] = np.where(is_mine, before, left - before)
        which[np.flatnonzero(is_left)[is_mine]] = k
        is_left = which < 0
    return which, numbers


class Mixture(Dataset):
    """The datasets that --dataset=NAME:WEIGHT,NAME:WEIGHT names, as one.

    The loss of an evaluation is the mean of theirs, by weight. meta: the entries that no two of
    them contradict. Raises ValueError or OSError.
    """

    def __init__(self, words, block_size, batch_size, batches_per_step=1, seed=1337):
        self._set_sizes(words, block_size, batch_size, batches_per_step, seed)
        self.folder = Path(words)
        self.parts = []
        self.weights = []
        for name, weight in parse(words):
            self.parts.append(open_single(name, block_size, batch_size, batches_per_step, seed))
            self.weights.append(weight)
        total = sum(self.weights)
        self.shares = [weight / total for weight in self.weights]

        first = self.parts[0]
        for part in self.parts[1:]:
            if (part.tokenizer, part.vocab_size) != (first.tokenizer, first.vocab_size):
                raise ValueError(
                    f"{first.name} and {part.name} were prepared with different tokenizers: a "
                    "mixture needs one for all"
                )
        self.tokenizer = first.tokenizer
        self.vocab_size = first.vocab_size
        self.meta = _common_entries([part.meta for part in self.parts])
        self.tokens = {}
        for split in first.tokens:
            if all(split in part.tokens for part in self.parts):
                self.tokens[split] = sum(part.tokens[split] for part in self.parts)

        self.batch_tokens = round(self._mean([part.batch_tokens for part in self.parts]))
        # An epoch ends when each dataset has been seen whole: see `epoch`.
        self.windows = max(
            -(-part.windows * total // weight) for part, weight in zip(self.parts, self.weights)
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

    # ---- training --------------------------------------------------------------------------------

    def train_rows(self, numbers):
        rows = np.empty((2, len(numbers), self.block_size), np.int64)
        which, numbers = deal(numbers, self.weights)
        for k in np.unique(which):
            rows[:, which == k] = self.parts[k].train_rows(numbers[which == k])
        return rows[0], rows[1]

    def train_counts(self, numbers):
        counts = np.empty(len(numbers), np.int64)
        which, numbers = deal(numbers, self.weights)
        for k in np.unique(which):
            counts[which == k] = self.parts[k].train_counts(numbers[which == k])
        return counts

    def epoch(self):
        """Yields (idx, targets) batches until each dataset has been seen whole; meanwhile the
        others begin further epochs."""
        for start in range(0, self.windows, self.batch_size):
            yield self.train_rows(np.arange(start, min(start + self.batch_size, self.windows)))

    @property
    def epoch_tokens(self):
        return self.windows * self.batch_tokens // self.batch_size

    def epochs(self, tokens):
        words = []
        for part, share in zip(self.parts, self.shares):
            seen = tokens * share * part.batch_tokens / self.batch_tokens
            words.append(f"{part.epochs(seen)} of {part.name}")
        return ', '.join(words)

    def opening(self):
        return self.parts[0].opening()

    # ---- evaluation ------------------------------------------------------------------------------

    def _limits(self, limit):
        """For each dataset the batches that it has in an evaluation of at most `limit`: by weight,
        but at least one. None stands for all."""
        if limit is None:
            return [None] * len(self.parts)
        which, _ = deal(np.arange(limit), self.weights)
        return np.bincount(which, minlength=len(self.parts)).clip(1).tolist()

    def check_evaluations(self, limit):
        for part, part_limit in zip(self.parts, self._limits(limit)):
            part.check_evaluations(part_limit)

    def eval_batches(self, split, limit=None):
        limits = self._limits(limit)
        return sum(part.eval_batches(split, n) for part, n in zip(self.parts, limits))

    def eval_batch(self, split, i, limit=None):
        """As a Dataset's, but `valid` is the batch's part of the whole evaluation: its dataset's
        weight, divided among its targets."""
        for part, share, part_limit in zip(self.parts, self.shares, self._limits(limit)):
            batches = part.eval_batches(split, part_limit)
            if i < batches:
                idx, targets, valid = part.eval_batch(split, i, part_limit)
                return idx, targets, share * valid / part.eval_targets(split, part_limit)
            i -= batches
        raise IndexError(i)

    def bytes_per_token(self, split):
        each = [part.bytes_per_token(split) for part in self.parts]
        if not all(each):
            return None
        return self._mean(each)


def _common_entries(metas):
    """The entries of these dicts that no other of them contradicts."""
    common = {}
    for meta in metas:
        for key, value in meta.items():
            if all(other.get(key, value) == value for other in metas):
                common[key] = value
    return common
