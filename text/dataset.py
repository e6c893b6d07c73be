"""The batches that training and evaluation read from a dataset's bins.

A bin is raw uint16, or uint32 where the vocabulary needs it. meta.json beside it says which, by
which tokenizer, and for each split its tokens, bytes of text and sha256. A batch's rows are windows
of block_size tokens, whose targets are the tokens after each.
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

# The id of <|endoftext|>, for bins whose meta.json does not say it.
TIKTOKEN_EOT = {'gpt2': 50256, 'p50k_base': 50256, 'cl100k_base': 100257, 'o200k_base': 199999}
# Windows in a step: the array of their numbers alone is then 1 GB.
MOST_WINDOWS = 1 << 27
# Bins of up to this many tokens are searched for ids beyond the vocabulary (in less than 0.1 s).
SCAN_LIMIT = 100_000_000


class Dataset:
    """The splits of data/NAME, or of any folder, and the batches of them.

    tokenizer: description of the tokenizer, or None.
    vocab_size: all token ids are below it.
    eot: the id after each document.
    tokens: {split: number of tokens}.
    masks: {split: Shards of one byte per token}; a target whose byte is 0 becomes -1, which is not
        scored. Empty if every token is a target.
    windows: number of windows in an epoch.

    Raises ValueError or OSError that says what is missing or wrong.
    """

    def __init__(self, name, block_size, batch_size, batches_per_step=1, seed=1337):
        self._set_sizes(name, block_size, batch_size, batches_per_step, seed)
        self.folder = folder_of(name)
        self.tokenizer, self.vocab_size, self.dtype, self.meta = read_meta(self.folder)

        self.shards = {}
        for split in ('train', 'val', 'test'):
            shards = Shards(self.folder, split, 'bin', self.dtype)
            if shards.paths or split != 'test':  # a test split is optional
                self.shards[split] = shards
        self.tokens = {split: len(shards) for split, shards in self.shards.items()}
        for split in self.tokens:
            self._check_split(split)

        if self.meta.get('masked'):
            self.masks = {split: self._open_mask(split) for split in self.tokens}
        elif stray := next(self.folder.glob('*.mask'), None):
            raise ValueError(
                f'{stray} is there, but meta.json does not say "masked": true; prepare it again'
            )

        self.windows = max(1, (self.tokens['train'] - block_size) // block_size)
        self._eot = self.meta.get('eot')
        if 'eot' not in self.meta:
            self._eot = TIKTOKEN_EOT.get((self.tokenizer or {}).get('name'))
            if self._eot:  # a vocabulary that was cut has it as the last entry
                self._eot = min(self._eot, self.vocab_size - 1)

    def _set_sizes(self, name, block_size, batch_size, batches_per_step, seed):
        if batch_size * batches_per_step > MOST_WINDOWS:
            raise ValueError(
                f"batch_size={batch_size} times gradient_accumulation_steps={batches_per_step} are "
                f"more windows in a step than {MOST_WINDOWS:,}: use a smaller one"
            )
        self.name = name
        self.block_size = block_size
        self.batch_size = batch_size
        self.batches_per_step = batches_per_step
        self.seed = seed
        self.batch_tokens = batch_size * block_size
        self.masks = {}
        # The shares of the last step's micro-batches; {(split, limit): targets of an evaluation}.
        self._shares_step = None
        self._shares = None
        self._targets = {}

    @property
    def eot(self):
        """The id after each document of a stream. Raises ValueError if there is none."""
        if self._eot is None:
            raise ValueError(
                f"document_boundaries=True: {self.name} has no token behind each document (eot in "
                "meta.json): prepare it with a tokenizer that has one"
            )
        return self._eot

    # ---- checks ----------------------------------------------------------------------------------

    def _check_split(self, split):
        """Raise FileNotFoundError or ValueError if a split's bin is missing, too short or not what
        meta.json says."""
        shards = self.shards[split]
        n = self.tokens[split]
        if not shards.paths:
            raise FileNotFoundError(f"{shards.name} is missing: {self._advice_if_missing()}")
        if n < 2:
            raise ValueError(
                f"{shards.name} holds {n} token(s): too few to learn from; prepare it again"
            )
        if split == 'train' and n <= self.block_size:
            raise ValueError(
                f"block_size={self.block_size} is larger than the train split of {self.name} ({n} "
                f"tokens, of which {n - 1} can be a context); use a smaller --block_size"
            )
        facts = self.meta.get('splits', {}).get(split, {})
        if 'tokens' not in facts:  # otherwise meta.json was written with the bin, in its dtype
            check_dtype(shards, split, self.tokenizer)
        if n <= SCAN_LIMIT:
            self._check_ids(split, self._tokens(split, 0, n))
        if n != facts.get('tokens', n):
            raise ValueError(
                f"{shards.name} holds {n} tokens, meta.json says {facts['tokens']}; prepare it "
                "again"
            )

    def _advice_if_missing(self):
        """What to do where a bin is missing."""
        script = self.folder / 'prepare.py'
        if script.is_file():
            return f"run `python {script}` first"
        advice = "dataset= names a folder in data/, or a path, with train.bin and val.bin"
        known = [path.name for path in folders.DATA_FOLDER.iterdir() if path.is_dir()]
        nearest = difflib.get_close_matches(str(self.name), known, n=1)
        if nearest:
            advice += f"; the nearest is {nearest[0]!r}"
        return advice

    def _open_mask(self, split):
        """The Shards of a split's mask. Raises ValueError if they are missing, of another length
        than the tokens, or all 0."""
        mask = Shards(self.folder, split, 'mask', 'uint8')
        n = self.tokens[split]
        if not mask.paths:
            raise ValueError(
                f"{mask.name} is missing, and meta.json says that there is one; prepare it again"
            )
        if len(mask) != n:
            raise ValueError(f"{mask.name} has {len(mask)} bytes for {n} tokens; prepare it again")
        if n <= SCAN_LIMIT and not mask.read(1, n).any():
            raise ValueError(
                f"{mask.name} leaves no token to learn or to evaluate; prepare it again"
            )
        return mask

    def _check_ids(self, split, tokens):
        """Raise ValueError if a token is beyond the vocabulary."""
        largest = int(tokens.max())
        if largest >= self.vocab_size:
            raise ValueError(
                f"{self.shards[split].name} holds the id {largest}, but its vocabulary has "
                f"{self.vocab_size} entries; prepare it again, with ids written as {self.dtype}"
            )

    # ---- reading ---------------------------------------------------------------------------------

    def _tokens(self, split, start, n):
        """Tokens start to start + n of a split, fewer at its end."""
        return self.shards[split].read(start, n)

    def _read(self, split, spans):
        """(idx, targets), each (len(spans), block_size) int64: the tokens of each span (see
        `_spans`), and the same one token later, from the first target that counts. The rest is 0 in
        idx and -1 in targets."""
        rows = np.full((2, len(spans), self.block_size), -1, np.int64)
        for idx, targets, (start, scored, end) in zip(*rows, spans.tolist()):
            piece = self._tokens(split, start, end - start + 1)
            idx[: end - start] = piece[:-1]
            scored_targets = targets[scored - start : end - start]
            scored_targets[:] = piece[1 + scored - start :]
            if self.masks:
                mask = self.masks[split].read(scored + 1, end - scored)
                scored_targets[mask == 0] = -1
        self._check_ids(split, rows)
        return np.maximum(rows[0], 0), rows[1]

    def _count_targets(self, split, spans):
        """(len(spans),): how many targets each span has."""
        if not self.masks:
            return spans[:, 2] - spans[:, 1]
        mask = self.masks[split]
        counts = []
        for _, scored, end in spans.tolist():
            counts.append(np.count_nonzero(mask.read(scored + 1, end - scored)))
        return np.array(counts)

    def _spans(self, split, places):
        """(len(places), 3): for each window the positions of its first token, of the first token
        whose successor is scored, and of its last target.

        places: what `_train_places` and `_eval_places` return, here the windows' starts.
        """
        last = self.tokens[split] - 1
        starts = np.minimum(places, last)
        return np.stack([starts, starts, np.minimum(starts + self.block_size, last)], 1)

    def first(self, split, n):
        """The first n tokens of a split, as a NumPy array."""
        return self._tokens(split, 0, n)

    def opening(self):
        """The ids with which a sample can begin: the first 32 of the validation split, or with
        masks those before the first that is learned."""
        n = 32
        if self.masks:
            learned = np.flatnonzero(self.masks['val'].read(0, 10_000))
            if len(learned) and learned[0]:
                n = learned[0]
        return self.first('val', n).tolist()

    # ---- training --------------------------------------------------------------------------------

    def train_batch(self, step, micro):
        """(idx, targets, share) of micro-batch `micro` of `step`: a function of the seed alone, on
        every rank.

        share: the part of the step's targets that are in it, which weights its loss. Each window
        comes once per epoch, in another order and from another offset each time.
        """
        windows_per_step = self.batches_per_step * self.batch_size
        numbers = step * windows_per_step + np.arange(windows_per_step)
        numbers = numbers.reshape(-1, self.batch_size)  # (batches_per_step, batch_size)
        if self._shares_step != step:
            counts = np.array([self.train_counts(row).sum() for row in numbers])
            self._shares = (counts / max(1, counts.sum())).tolist()
            self._shares_step = step
        idx, targets = self.train_rows(numbers[micro])
        return idx, targets, self._shares[micro]

    def train_rows(self, numbers):
        """(idx, targets) of the training windows with these numbers, which continue through all
        epochs."""
        return self._read('train', self._spans('train', self._train_places(numbers)))

    def train_counts(self, numbers):
        """How many targets each of the training windows with these numbers has."""
        if not self.masks:  # every window is full
            return np.full(len(numbers), self.block_size)
        return self._count_targets('train', self._spans('train', self._train_places(numbers)))

    def _train_places(self, numbers):
        """Where the training windows with these numbers are: see `_spans`."""
        epochs, windows = np.divmod(numbers, self.windows)
        places = np.empty(len(numbers), np.int64)
        for epoch in np.unique(epochs):
            sequence = np.random.SeedSequence((self.seed, int(epoch)))
            *order_keys, offset_key = sequence.generate_state(5, np.uint64)
            here = epochs == epoch
            shuffled = permute(windows[here], self.windows, order_keys)
            places[here] = self._epoch_places(shuffled, offset_key)
        return places

    def _epoch_places(self, windows, offset_key):
        """Where an epoch's windows start: side by side, from an offset that its key decides."""
        slack = self.tokens['train'] - 1 - self.windows * self.block_size
        offset = int(offset_key % np.uint64(min(slack, self.block_size - 1) + 1))
        return offset + windows * self.block_size

    @property
    def epoch_tokens(self):
        """How many tokens `epoch` reads."""
        return self.tokens['train']

    def epochs(self, tokens):
        """How often the training split has been seen after this many tokens, in words."""
        return f"{tokens / self.tokens['train']:.3g} epochs"

    def epoch(self):
        """Yields the (idx, targets) batches of one pass over the training split, in its order."""
        for i in range(self.eval_batches('train')):
            idx, targets, _ = self.eval_batch('train', i)
            yield idx, targets

    # ---- evaluation ------------------------------------------------------------------------------

    def eval_windows(self, split):
        """How many windows side by side the split has."""
        return -(-(self.tokens[split] - 1) // self.block_size)

    def eval_batches(self, split, limit=None):
        """How many batches an evaluation of `split` has: the whole split, or at most `limit`."""
        whole = -(-self.eval_windows(split) // self.batch_size)
        if limit is None:
            return whole
        return min(limit, whole)

    def eval_batch(self, split, i, limit=None):
        """(idx, targets, valid): batch i of `eval_batches(split, limit)`, and how many targets it
        has. Always the same ones.

        The whole split is its windows side by side, the last batch filled up with ignored targets,
        so that every token but the first is predicted once. Fewer batches are windows spread evenly
        over it.
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
        """How many targets all batches of an evaluation have together. Raises ValueError if there
        are none."""
        if (split, limit) not in self._targets:
            total = 0
            for i in range(self.eval_batches(split, limit)):
                total += int(self._count_targets(split, self._eval_spans(split, i, limit)).sum())
            self._targets[split, limit] = total
        if not self._targets[split, limit]:
            raise ValueError(
                f"{self.folder / split}.mask leaves no token to evaluate in the batches of "
                f"eval_iters={limit}: use more"
            )
        return self._targets[split, limit]

    def _eval_spans(self, split, i, limit):
        """The spans of batch i of an evaluation."""
        windows = np.arange(i * self.batch_size, (i + 1) * self.batch_size)
        batches = self.eval_batches(split, limit)
        if batches < self.eval_batches(split):  # spread over the split
            windows = windows * self.eval_windows(split) // (batches * self.batch_size)
        return self._spans(split, self._eval_places(windows))

    def _eval_places(self, windows):
        """Where the evaluation windows with these numbers are: see `_spans`."""
        return windows * self.block_size

    def bits_per_byte(self, split, loss):
        """`loss` (nats per token) as bits per byte of text. None if meta.json does not say the
        bytes, or the loss is over some of the tokens only."""
        bytes_per_token = self.bytes_per_token(split)
        if not bytes_per_token:
            return None
        return loss / np.log(2) / bytes_per_token

    def bytes_per_token(self, split):
        """The bytes of text per token of a split, or None: see `bits_per_byte`."""
        facts = self.meta.get('splits', {}).get(split)
        if not facts or 'bytes' not in facts or self.masks:
            return None
        return facts['bytes'] / facts['tokens']


class Documents(Dataset):
    """A dataset of short texts that are independent of each other, such as names: each window is
    one of them.

    meta.json's `separator` is the id between them. A document's context begins with the separator
    before it, and its targets end with the one after it; the rest is padding, 0 in idx and -1 in
    targets. A document longer than block_size has several windows. The last of them starts early
    enough to end with the document, and repeats no target.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.spans = {split: self._document_spans(split) for split in self.tokens}
        self.windows = len(self.spans['train'])
        # On average: windows differ in length.
        self.batch_tokens = round(self.batch_size * (self.tokens['train'] - 1) / self.windows)

    def _document_spans(self, split):
        """(windows, 3): the spans of a split's windows."""
        tokens = self._tokens(split, 0, self.tokens[split])
        separator = self.meta['separator']
        at = np.flatnonzero(tokens == separator)
        if len(at) < 2 or at[0] or at[-1] != len(tokens) - 1:
            raise ValueError(
                f"{self.folder / split}.bin does not begin and end with its separator, the id "
                f"{separator}: prepare it again"
            )
        spans = []
        for start, end in zip(at[:-1].tolist(), at[1:].tolist()):
            for scored in range(start, end, self.block_size):
                window_start = max(start, min(scored, end - self.block_size))
                spans.append((window_start, scored, min(scored + self.block_size, end)))
        return np.array(spans)

    def _spans(self, split, places):
        """As a Dataset's, of windows by their numbers; those after the last one are empty."""
        known = self.spans[split]
        spans = known[np.minimum(places, len(known) - 1)]
        spans[places >= len(known)] = 0
        return spans

    def train_counts(self, numbers):
        return self._count_targets('train', self._spans('train', self._train_places(numbers)))

    def _epoch_places(self, windows, offset_key):
        return windows

    def _eval_places(self, windows):
        return windows

    def eval_windows(self, split):
        return len(self.spans[split])


class RandomDataset(Dataset):
    """Random ids in place of text, to measure speed where no data is prepared."""

    def __init__(self, block_size, batch_size, batches_per_step=1, seed=1337, vocab_size=50257):
        self._set_sizes('random', block_size, batch_size, batches_per_step, seed)
        self.folder = Path('random')
        self.meta = {}
        self.tokenizer = None
        self.vocab_size = vocab_size
        self._eot = vocab_size - 1

        n = max(1 << 20, 4 * block_size)
        ids = np.random.default_rng(seed).integers(vocab_size, size=n, dtype=np.uint32)
        self._ids = {'train': ids, 'val': ids[: 8 * block_size + 1]}
        self.tokens = {split: len(ids) for split, ids in self._ids.items()}
        self.windows = (n - block_size) // block_size

    def _tokens(self, split, start, n):
        return self._ids[split][start : start + n]


def open_single(name, *args):
    """The dataset `name`, which is not a mixture: a RandomDataset for 'random', Documents where
    meta.json names a separator, else a Dataset. The arguments are theirs."""
    if name == 'random':
        return RandomDataset(*args)
    _, _, _, meta = read_meta(folder_of(name))
    if 'separator' in meta:
        return Documents(name, *args)
    return Dataset(name, *args)
