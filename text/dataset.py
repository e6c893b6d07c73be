"""Token bins: written once by data/NAME/prepare.py, read by windows; which windows a step trains
and evaluates on.

A bin is raw uint16, or uint32 where the vocabulary needs it; meta.json beside it says which, by
which tokenizer, and for each split its tokens, bytes of text and sha256. Windows are block_size
tokens and the token after each.
"""

import difflib
from pathlib import Path

import numpy as np

from text import folders
from text.folders import folder_of
from text.meta import read_meta
from text.shards import Shards
from text.shuffle import permute
from text.wide_ids import check_dtype

# <|endoftext|>
TIKTOKEN_EOT = {'gpt2': 50256, 'p50k_base': 50256, 'cl100k_base': 100257, 'o200k_base': 199999}
MOST_WINDOWS = 1 << 27  # in a step: their numbers alone are 1 GB
# bins up to so many tokens are searched whole for ids beyond the vocabulary (< 0.1 s)
SCAN_LIMIT = 100_000_000


class Dataset:
    """The splits of data/NAME (or of any folder), and the batches that training and evaluation take
    from them.

    tokenizer: its description; vocab_size: ids are below it; eot: what stands behind each document;
    tokens: {split: how many}. Where there are masks (train.mask, a byte per token), targets whose
    byte is 0 are -1, as padding is. Raises ValueError or OSError with what is missing or wrong.
    """

    def __init__(self, name, block_size, batch_size, batches_per_step=1, seed=1337):
        self._settings(name, block_size, batch_size, batches_per_step, seed)
        self.folder = folder_of(name)
        self.tokenizer, self.vocab_size, self.dtype, self.meta = read_meta(self.folder)
        self.shards = {
            split: Shards(self.folder, split, 'bin', self.dtype)
            for split in ('train', 'val', 'test')
        }
        if not self.shards['test'].paths:
            del self.shards['test']
        self.tokens = {split: len(shards) for split, shards in self.shards.items()}
        for split, n in self.tokens.items():
            path = self.shards[split].name
            if not self.shards[split].paths:
                script, there = (
                    self.folder / 'prepare.py',
                    [folder.name for folder in folders.DATA_FOLDER.iterdir() if folder.is_dir()],
                )
                near = difflib.get_close_matches(str(name), there, n=1)
                raise FileNotFoundError(
                    f"{path} is missing: "
                    + (
                        f"run `python {script}` first"
                        if script.is_file()
                        else "dataset= takes a folder in data/, or a path, with train.bin and val.bin"
                        + (f"; the nearest is {near[0]!r}" if near else '')
                    )
                )
            if n < 2:
                raise ValueError(
                    f"{path} holds {n} token(s): too few to learn from; prepare it again"
                )
            if split == 'train' and n <= block_size:
                raise ValueError(
                    f"block_size={block_size} is larger than the train split of {name} ({n} tokens, of "
                    f"which {n - 1} can be a context); take a smaller --block_size"
                )
            facts = self.meta.get('splits', {}).get(split, {})
            if 'tokens' not in facts:  # else meta.json was written with the bin
                check_dtype(self.shards[split], split, self.tokenizer)
            if n <= SCAN_LIMIT:
                self._check(split, self._tokens(split, 0, n))
            if n != facts.get('tokens', n):
                raise ValueError(
                    f"{path} holds {n} tokens, meta.json says {facts['tokens']}; prepare it again"
                )
        if self.meta.get('masked'):
            self.masks = {split: self._mask(split) for split in self.tokens}
        elif stray := next(self.folder.glob('*.mask'), None):
            raise ValueError(
                f'{stray} is there, but meta.json does not say "masked": true; prepare it again'
            )
        self.windows = max(1, (self.tokens['train'] - block_size) // block_size)  # per epoch
        known = TIKTOKEN_EOT.get((self.tokenizer or {}).get('name'))
        # the last of a shortened vocabulary
        self._eot = self.meta.get('eot', known and min(known, self.vocab_size - 1))

    @property
    def eot(self):
        """The token that stands behind each document of a stream. ValueError where there is
        none."""
        if self._eot is None:
            raise ValueError(
                f"document_boundaries=True: {self.name} has no token behind each document (eot in meta.json): "
                "prepare it with a tokenizer that has one"
            )
        return self._eot

    def _settings(self, name, block_size, batch_size, batches_per_step, seed):
        if batch_size * batches_per_step > MOST_WINDOWS:
            raise ValueError(
                f"batch_size={batch_size} times gradient_accumulation_steps={batches_per_step} are more "
                f"windows in a step than {MOST_WINDOWS:,}: take less"
            )
        self.name, self.block_size, self.batch_size = name, block_size, batch_size
        self.batches_per_step, self.seed = batches_per_step, seed
        self.batch_tokens, self.masks, self._shares, self._targets = (
            batch_size * block_size,
            {},
            (None, None),
            {},
        )

    def _mask(self, split):
        mask, n = Shards(self.folder, split, 'mask', 'uint8'), self.tokens[split]
        if len(mask) != n:
            raise ValueError(
                f"{mask.name} "
                + (
                    f"has {len(mask)} bytes for {n} tokens"
                    if mask.paths
                    else "is missing, and meta.json says that there is one"
                )
                + "; prepare it again"
            )
        if n <= SCAN_LIMIT and not mask.read(1, n).any():
            raise ValueError(
                f"{mask.name} leaves no token to learn or to be judged by; prepare it again"
            )
        return mask

    def _tokens(self, split, start, n):
        """Tokens start to start + n of a split, fewer at its end."""
        return self.shards[split].read(start, n)

    def _check(self, split, tokens):
        if (top := int(tokens.max())) >= self.vocab_size:
            raise ValueError(
                f"{self.shards[split].name} holds the id {top}, but its vocabulary has {self.vocab_size} "
                f"entries; prepare it again, with ids written as {self.dtype}"
            )

    def _read(self, split, spans):
        """(idx, targets), each (len(spans), block_size) int64: the tokens of each span (see
        `_spans`), and the same one token later, from the first that counts. The rest is 0 in idx
        and -1 in targets."""
        rows = np.full((2, len(spans), self.block_size), -1, np.int64)
        for idx, targets, (start, scored, end) in zip(*rows, spans.tolist()):
            piece = self._tokens(split, start, end - start + 1)
            idx[: end - start] = piece[:-1]
            targets[scored - start : end - start] = piece[1 + scored - start :]
            if self.masks:
                targets[scored - start : end - start][
                    self.masks[split].read(scored + 1, end - scored) == 0
                ] = -1
        self._check(split, rows)
        return np.maximum(rows[0], 0), rows[1]

    def _counts(self, split, spans):
        """How many targets each of `spans` has."""
        if not self.masks:
            return spans[:, 2] - spans[:, 1]
        mask = self.masks[split]
        return np.array(
            [
                np.count_nonzero(mask.read(scored + 1, end - scored))
                for _, scored, end in spans.tolist()
            ]
        )

    def _spans(self, split, places):
        """(len(places), 3): each window's start, the first token whose next one is a target that
        counts, and its last target. Windows are at `places`, of which `train_places` and
        `eval_batch` know."""
        starts = np.minimum(places, self.tokens[split] - 1)
        return np.stack(
            [starts, starts, np.minimum(starts + self.block_size, self.tokens[split] - 1)], 1
        )

    # ---- training --------------------------------------------------------------------------------

    def train_batch(self, step, micro):
        """(idx, targets, share) of micro-batch `micro` of `step`: a function of the seed alone,
        whoever asks.

        share: the part of the step's targets that are in it, which weighs its loss. Every window
        comes once per epoch, in a new order and from a new offset each time.
        """
        numbers = np.arange(self.batches_per_step * self.batch_size).reshape(-1, self.batch_size)
        numbers += step * numbers.size
        if self._shares[0] != step:
            counts = np.array([self.train_counts(some).sum() for some in numbers])
            self._shares = step, (counts / max(1, counts.sum())).tolist()
        return *self.train_rows(numbers[micro]), self._shares[1][micro]

    def train_rows(self, numbers):
        """(idx, targets) of the training windows with these numbers, which go on through all
        epochs."""
        return self._read('train', self._spans('train', self._train_places(numbers)))

    def train_counts(self, numbers):
        """How many targets each of them has."""
        if not self.masks:  # they are full
            return np.full(len(numbers), self.block_size)
        return self._counts('train', self._spans('train', self._train_places(numbers)))

    def _train_places(self, numbers):
        epochs, windows = np.divmod(numbers, self.windows)
        places = np.empty(len(numbers), np.int64)
        for epoch in np.unique(epochs):
            key = np.random.SeedSequence((self.seed, int(epoch))).generate_state(5, np.uint64)
            here = epochs == epoch
            places[here] = self._places(permute(windows[here], self.windows, key[:4]), key[4])
        return places

    def _places(self, windows, key):
        """Where these training windows start in an epoch, whose offset `key` decides."""
        slack = self.tokens['train'] - 1 - self.windows * self.block_size
        return int(key % np.uint64(min(slack, self.block_size - 1) + 1)) + windows * self.block_size

    @property
    def epoch_tokens(self):
        """How many tokens `epoch` goes through."""
        return self.tokens['train']

    def epochs(self, tokens):
        """How often the training split has been seen after so many tokens, in words."""
        return f"{tokens / self.tokens['train']:.3g} epochs"

    def epoch(self):
        """(idx, targets) batches of one pass over the whole training split, in its order."""
        for i in range(self.eval_batches('train')):
            yield self.eval_batch('train', i)[:2]

    def first(self, split, n):
        """The first n tokens of a split, as a NumPy array."""
        return self._tokens(split, 0, n)

    def opening(self):
        """The ids that a sample can go on from: the first 32 to validate on, or those before the
        first that is learned."""
        learned = np.flatnonzero(self.masks['val'].read(0, 10_000)) if self.masks else []
        return self.first('val', learned[0] if len(learned) and learned[0] else 32).tolist()

    # ---- evaluation ------------------------------------------------------------------------------

    def eval_windows(self, split):
        """How many windows side by side the split has."""
        return -(-(self.tokens[split] - 1) // self.block_size)

    def eval_batches(self, split, limit=None):
        """How many batches an evaluation of `split` has: the whole split, or at most `limit`."""
        whole = -(-self.eval_windows(split) // self.batch_size)
        return whole if limit is None else min(limit, whole)

    def eval_batch(self, split, i, limit=None):
        """(idx, targets, valid): batch i of `eval_batches(split, limit)`, and its number of
        targets.

        The whole split is its windows side by side, the last batch filled up with ignored targets,
        so that every token but the first is predicted once; fewer batches are windows spread evenly
        over it. Always the same ones.
        """
        if self.masks:
            self.eval_targets(split, limit)
        idx, targets = self._read(split, self._eval_spans(split, i, limit))
        return idx, targets, int((targets >= 0).sum())

    def check_evaluations(self, limit):
        """Raise ValueError if an evaluation of `limit` batches of a split would have no target."""
        for split in self.masks:
            if split != 'test':
                self.eval_targets(split, limit)

    def eval_targets(self, split, limit=None):
        """How many targets all batches of an evaluation have together, counted once. ValueError
        where there are none."""
        if (split, limit) not in self._targets:
            spans = (
                self._eval_spans(split, i, limit) for i in range(self.eval_batches(split, limit))
            )
            self._targets[split, limit] = sum(
                int(self._counts(split, some).sum()) for some in spans
            )
        if not self._targets[split, limit]:
            raise ValueError(
                f"{self.folder / split}.mask leaves no token to be judged by in what eval_iters={limit} "
                "takes: take more"
            )
        return self._targets[split, limit]

    def _eval_spans(self, split, i, limit):
        windows = np.arange(i * self.batch_size, (i + 1) * self.batch_size)
        if (batches := self.eval_batches(split, limit)) < self.eval_batches(split):
            windows = windows * self.eval_windows(split) // (batches * self.batch_size)
        return self._spans(split, self._eval_places(windows))

    def _eval_places(self, windows):
        return windows * self.block_size

    def bits_per_byte(self, split, loss):
        """`loss` (nats per token) as bits per byte of text, or None where meta.json does not say
        the bytes, or the loss is that of some tokens only."""
        bytes_per_token = self.bytes_per_token(split)
        return loss / np.log(2) / bytes_per_token if bytes_per_token else None

    def bytes_per_token(self, split):
        """Of the text of a split; None: see bits_per_byte."""
        facts = self.meta.get('splits', {}).get(split)
        if not facts or 'bytes' not in facts or self.masks:
            return None
        return facts['bytes'] / facts['tokens']


class Documents(Dataset):
    """A dataset of short texts that know nothing of each other, such as names: each window is one
    of them.

    meta.json's `separator` is the id between them. A document's context begins with the one before
    it, its targets end with the one behind it; the rest is padding, 0 in idx and -1 in targets. One
    longer than block_size takes several windows, the last of which begins so early that it ends
    with the document, and repeats no target.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.spans = {split: self._divide(split) for split in self.tokens}
        self.windows = len(self.spans['train'])
        # on average
        self.batch_tokens = round(self.batch_size * (self.tokens['train'] - 1) / self.windows)

    def _divide(self, split):
        """The spans of a split's windows."""
        tokens, separator = self._tokens(split, 0, self.tokens[split]), self.meta['separator']
        ends = np.flatnonzero(tokens == separator)
        if len(ends) < 2 or ends[0] or ends[-1] != len(tokens) - 1:
            raise ValueError(
                f"{self.folder / split}.bin does not begin and end with its separator, the id {separator}: "
                "prepare it again"
            )
        spans = []
        for start, end in zip(ends[:-1].tolist(), ends[1:].tolist()):
            spans += [
                (max(start, min(at, end - self.block_size)), at, min(at + self.block_size, end))
                for at in range(start, end, self.block_size)
            ]
        return np.array(spans)

    def _spans(self, split, places):
        spans = self.spans[split]  # beyond the last one: empty
        return spans[np.minimum(places, len(spans) - 1)] * (places < len(spans))[:, None]

    def train_counts(self, numbers):
        return self._counts('train', self._spans('train', self._train_places(numbers)))

    def _places(self, windows, key=None):
        return windows

    _eval_places = _places

    def eval_windows(self, split):
        return len(self.spans[split])


class RandomDataset(Dataset):
    """Random ids in place of text, to measure speed where no data is prepared."""

    def __init__(self, block_size, batch_size, batches_per_step=1, seed=1337, vocab_size=50257):
        self._settings('random', block_size, batch_size, batches_per_step, seed)
        self.tokenizer, self.vocab_size, self.meta, self.folder = (
            None,
            vocab_size,
            {},
            Path('random'),
        )
        ids = np.random.default_rng(seed).integers(
            vocab_size, size=max(1 << 20, 4 * block_size), dtype=np.uint32
        )
        self._ids = {'train': ids, 'val': ids[: 8 * block_size + 1]}
        self.tokens = {split: len(ids) for split, ids in self._ids.items()}
        self.windows, self._eot = (len(ids) - block_size) // block_size, vocab_size - 1

    def _tokens(self, split, start, n):
        return self._ids[split][start : start + n]


def open_single(name, *args):
    """RandomDataset for 'random', Documents where meta.json names a separator, else Dataset; the
    arguments are theirs."""
    if name == 'random':
        return RandomDataset(*args)
    return (Documents if 'separator' in read_meta(folder_of(name))[3] else Dataset)(name, *args)
