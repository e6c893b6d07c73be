"""Decoding: from a model's logits to tokens, texts and beams.

The model reads the prompt once and then one token at a time, over a cache of keys and values where
it has one (init_cache). A full context slides: the last three quarters of it are read again, which
costs little and needs nothing from the model.
"""

import codecs
import itertools

import torch

from models.parts import kv_cache


class Context:
    """The tokens so far, rows [[id]], and what the model says of the next: `logits`. Only what is
    new gets read.

    room: how many tokens a row will have at most. Rows with the same tokens are read once. A row
    that has filled the model's context goes on from its last tokens, `kept`, which are read anew;
    `slides` counts how often. Raises ValueError.
    """

    def __init__(self, model, rows, room):
        longest, self.block_size = max(map(len, rows)), model.config.block_size
        if not all(rows):
            raise ValueError(
                "the prompt is empty: generation needs at least one token to start from"
            )
        if longest > self.block_size:
            raise ValueError(
                f"the prompt has {longest} tokens, the model's context {self.block_size}: shorten it"
            )
        if max(map(max, rows)) >= model.config.vocab_size:
            raise ValueError(
                f"the prompt has the id {max(map(max, rows))}, the model {model.config.vocab_size} ids"
            )
        self.model, self.rows, self.room = (
            model,
            [list(row) for row in rows],
            min(max(room, longest), self.block_size),
        )
        self.starts, self.slides, self.kept = [0] * len(rows), 0, max(1, self.block_size * 3 // 4)
        self.cache, self.unread, self.last = None, longest, None
        self.weight = next(itertools.chain(model.parameters(), model.buffers()))
        # ids from there on are padding
        self.n_vocab = model.tokenizer.vocab_size if model.tokenizer else None

    @torch.inference_mode()
    def logits(self):
        """Logits (B, V) of the token after each row."""
        if self.unread and (self.cache is None or self.cache.length + self.unread > self.room):
            self.last = self._read()
        elif self.unread:
            idx = torch.tensor(
                [row[-self.unread :] for row in self.rows], device=self.weight.device
            )
            self.last = self.model(idx, cache=self.cache)[0]
        self.unread = 0
        return self.last[:, -1, : self.n_vocab]

    def _read(self):
        """Read each row anew, from its last tokens where it is too long, into a new cache where the
        model has one."""
        full = [b for b, row in enumerate(self.rows) if len(row) - self.starts[b] > self.block_size]
        self.slides += bool(full)
        for b in full:
            self.starts[b] = len(self.rows[b]) - self.kept
        if self.cache is not None:
            self.room = self.block_size
        keys, device = (
            [tuple(row[start:]) for row, start in zip(self.rows, self.starts)],
            self.weight.device,
        )
        dtype, autocast = self.model.cache_dtype, torch.is_autocast_enabled(device.type)
        dtype = dtype or (torch.get_autocast_dtype(device.type) if autocast else self.weight.dtype)
        caches = {key: self.model.init_cache(1, len(key), device, dtype) for key in keys}
        if None in caches.values():
            self.kept = self.block_size  # all is read anew anyway
        if None in caches.values() and len({len(key) for key in keys}) == 1:
            return self.model(torch.tensor(keys, device=device))[0]
        read = self.model.forward  # not compiled: a prompt's length comes but once
        logits = {
            key: read(torch.tensor([key], device=device), cache=cache)[0]
            for key, cache in caches.items()
        }
        if None not in caches.values():
            self.cache = kv_cache.KVCache.join([caches[key] for key in keys], self.room)
        return torch.cat([logits[key] for key in keys])

    def describe_slides(self):
        """A clause on how often the context was full; '' where it never was."""
        return (
            f"; full {self.slides} times, the context went on from its last {self.kept} tokens"
            if self.slides
            else ''
        )

    def add(self, idx):
        """idx (B, T) come next in each row."""
        for row, ids in zip(self.rows, idx.tolist()):
            row += ids
        self.unread += idx.size(1)

    @torch.inference_mode()
    def select(self, rows):
        """Go on with these rows, in this order; a row may come more than once."""
        self.rows, self.last = [list(self.rows[row]) for row in rows], self.last[rows]
        self.starts = [self.starts[row] for row in rows]
        if self.cache is not None:
            self.cache.select(torch.tensor(rows, device=self.weight.device))


@torch.inference_mode()
def stream(context, max_new_tokens, sampling, seeds=None):
    """Add the next id to each row of the context, max_new_tokens times, and yield them, (B,).

    seeds: one per row, which alone decide on its draws, whatever the other rows are; None: torch's
    own random numbers.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 0")
    own = [
        None if seeds is None else torch.Generator().manual_seed(seed)
        for seed in seeds or context.rows
    ]
    for _ in range(max_new_tokens):
        chances = torch.stack(
            [torch.rand((), dtype=torch.float64, generator=generator) for generator in own]
        )
        ids = sampling(context.logits(), context.rows, chances)
        context.add(ids[:, None])
        yield ids


def generate(model, idx, max_new_tokens, sampling):
    """idx (B, T) -> (B, T + max_new_tokens)."""
    context = Context(
        model, idx[:, -model.config.block_size :].tolist(), idx.size(1) + max_new_tokens
    )
    return torch.cat(
        [idx, *(ids[:, None] for ids in stream(context, max_new_tokens, sampling))], dim=1
    )


@torch.inference_mode()
def beam_search(context, max_new_tokens, num_beams, length_penalty=1.0, is_end=lambda ids: False):
    """The likeliest continuations of the context's one row: up to num_beams pairs (score, ids), the
    best first.

    The score is the sum of log-probabilities over length ** length_penalty (above 0: longer texts
    are preferred). is_end(ids): whether a continuation is complete. The search ends with num_beams
    complete ones when the best of the others is, at its present length, below all of them (it might
    yet have risen): transformers' early_stopping=False.
    """
    start, scores = len(context.rows[0]), torch.zeros(1, device=context.weight.device)
    complete, still_open = [], [(0.0, 0, 0, [])] * (max_new_tokens == 0)
    for n in range(1, max_new_tokens + 1):
        sums = context.logits().float().log_softmax(-1) + scores[:, None]  # (beams, V)
        # twice as many: half may be complete
        best, at = sums.flatten().topk(min(2 * num_beams, sums.numel()))
        still_open = []
        for rank, (total, i) in enumerate(zip(best.tolist(), at.tolist())):
            beam, token = divmod(i, sums.size(1))
            ids = [*context.rows[beam][start:], token]
            if not is_end(ids):
                still_open.append((total, beam, token, ids))
            elif rank < num_beams:
                complete.append((total / n**length_penalty, ids))
        still_open, complete = still_open[:num_beams], sorted(complete, reverse=True)[:num_beams]
        if not still_open or (
            len(complete) == num_beams and still_open[0][0] / n**length_penalty <= complete[-1][0]
        ):
            return complete
        if n < max_new_tokens:
            totals, beams, tokens, _ = zip(*still_open)
            context.select(list(beams))
            context.add(torch.tensor(tokens)[:, None])
            scores = torch.tensor(totals, device=scores.device)
    complete += [
        (total / max(1, max_new_tokens) ** length_penalty, ids) for total, *_, ids in still_open
    ]
    return sorted(complete, reverse=True)[:num_beams]


class TextStream:
    """What a row's ids say behind its prompt, given out as it becomes certain: whole characters, up
    to the first of the `stops`."""

    def __init__(self, tokenizer, stops=()):
        self.tokenizer, self.stops = tokenizer, stops
        self.decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        self.held, self.done = '', False

    def add(self, ids, final=False):
        """The text that is certain with these further ids; `done` says whether a stop came."""
        if self.done:
            return ''
        self.held += self.decoder.decode(self.tokenizer.decode_bytes(ids), final)
        ends = [at for at in map(self.held.find, self.stops) if at >= 0]
        if ends:
            self.done, certain = True, min(ends)
        else:  # what may be the beginning of a stop has to wait
            waiting = (
                n
                for stop in self.stops
                for n in range(1, len(stop))
                if self.held.endswith(stop[:n])
            )
            certain = len(self.held) - (0 if final else max(waiting, default=0))
        text, self.held = self.held[:certain], self.held[certain:]
        return text

    def finish(self):
        """The text that was held back; nothing is added after it."""
        text = self.add([], final=True)
        self.done = True
        return text


def stream_text(context, max_new_tokens, sampling, seeds=None, stops=(), ends=()):
    """Yield, token by token, the text that each row gained: [str].

    A row ends before the first of the texts `stops` or ids `ends` that it generates. Generation
    ends with the last row, or after max_new_tokens.
    """
    outs = [TextStream(context.model.tokenizer, stops) for _ in context.rows]
    for ids in stream(context, max_new_tokens, sampling, seeds):
        gained = []
        for out, i in zip(outs, ids.tolist()):
            if i in ends:
                gained.append(out.finish())
            else:
                gained.append(out.add([i]))
        yield gained
        if all(out.done for out in outs):
            return
    yield [out.add([], final=True) for out in outs]


def beam_search_text(context, max_new_tokens, num_beams, length_penalty=1.0, stops=(), ends=()):
    """The texts that `beam_search` finds, [(score, text)].

    Each ends before the first of the texts `stops`, the ids `ends` or the tokenizer's end of text.
    Raises ValueError for num_beams or a length_penalty out of range.
    """
    if num_beams > 10_000 or abs(length_penalty) > 100:
        raise ValueError(
            f"num_beams={num_beams}, length_penalty={length_penalty}: take at most 10000 beams, and a "
            "penalty from -100 to 100"
        )
    own = context.model.tokenizer
    ends = {*ends, getattr(own, 'eot', None)}

    def is_end(ids):
        text = own.decode_bytes(ids).decode(errors='replace')
        return ids[-1] in ends or any(stop in text for stop in stops)

    results = []
    for score, ids in beam_search(context, max_new_tokens, num_beams, length_penalty, is_end):
        if ids and ids[-1] in ends:
            ids = ids[:-1]
        results.append((score, TextStream(own, stops).add(ids, final=True)))
    return results
