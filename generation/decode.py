"""Decoding: from a model's logits to tokens, texts and beams.

The model reads the prompt once and then one token at a time, over a cache of keys and values where
it has one (init_cache). A full context slides: the last three quarters of it are read again, which
costs little and needs nothing from the model.
"""

import codecs
import itertools
import sys
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from models.parts import layers
from text import tokenizer


@dataclass
class Sampling:
    """How the next token is drawn from logits; the settings apply in this order of the fields, the
    penalty before all.

    repetition_penalty: CTRL's, arXiv 1909.05858. top_p: arXiv 1904.09751. min_p: arXiv 2407.01082.
    Raises ValueError.
    """

    # 1: as the model says; below: more predictable; 0: always the likeliest token
    temperature: float = 1.0
    top_k: int | None = None  # only from so many likeliest tokens; None: from all
    top_p: float = 1.0  # only from the likeliest tokens that together have this probability
    min_p: float = 0.0  # only from tokens at least this times as probable as the likeliest
    repetition_penalty: float = 1.0  # above 1: tokens that are there already become less likely

    def __post_init__(self):
        for name, low, high in (('temperature', 0, None), ('top_k', 1, None), ('min_p', 0, 1)):
            value = getattr(self, name)
            if value is not None and not (value >= low and (high is None or value <= high)):
                raise ValueError(
                    f"{name}={value} must be at least {low}"
                    + (f" and at most {high}" if high else '')
                )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")
        if not self.repetition_penalty > 0:
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty} must be above 0; 1 changes nothing"
            )

    def __call__(self, logits, rows, chances):
        """One id (B,) per row of logits (B, V): rows are the ids so far, chances (B,) uniform
        numbers that decide."""
        logits = penalised(logits, rows, self.repetition_penalty)
        if self.temperature < 1e-6:  # logits over so little overflow
            return logits.argmax(-1)
        ids = None
        if self.top_k and self.top_k < logits.size(-1):
            logits, ids = top(logits, self.top_k)
        elif self.top_p < 1:
            logits, ids = logits.sort(descending=True)
        probs = (logits / self.temperature).softmax(-1)
        # what comes before a token has less than top_p: so the first one always stays
        if self.top_p < 1:
            probs = probs.masked_fill(probs.cumsum(-1) - probs >= self.top_p, 0)
        if self.min_p:
            probs = probs.masked_fill(probs < self.min_p * probs.amax(-1, keepdim=True), 0)
        # MPS has no float64
        sums = (probs.float() if probs.device.type == 'mps' else probs.double()).cumsum(-1)
        wanted = chances.to(sums.dtype).to(sums.device)[:, None] * sums[:, -1:]
        if not sums[:, -1].isfinite().all():
            raise ValueError(
                "the model gives no probabilities, but NaN: it has diverged, or dtype=float16 is too narrow"
            )
        at = (sums <= wanted).sum(-1, keepdim=True).clamp(max=sums.size(-1) - 1)
        return (at if ids is None else ids.gather(-1, at))[:, 0]


def top(logits, k, width=32):
    """logits.topk(k) of (B, V): (values, indices), each (B, k). On a CPU by blocks, of which the k
    with the greatest maxima hold all: of 50,000 logits, the first 200 take 0.37 ms less."""
    V = logits.size(-1)
    if logits.device.type != 'cpu' or V < 4 * k * width:
        return logits.topk(k)
    # (B, V / width, width)
    blocks = F.pad(logits, (0, -V % width), value=-torch.inf).unflatten(-1, (-1, width))
    which = blocks.amax(-1).topk(k).indices  # (B, k)
    values, at = blocks.gather(1, which[..., None].expand(-1, -1, width)).flatten(1).topk(k)
    return values, which.gather(1, at // width) * width + at % width


def penalised(logits, rows, penalty):
    """Logits (B, V) in at least float32, those of each row's ids over `penalty`, or times it where
    negative."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if penalty == 1:
        return logits
    logits = logits.clone()
    for row, ids in zip(logits, rows):
        seen = torch.tensor(list(set(ids)), device=row.device)
        row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
    return logits


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
            self.cache = layers.KVCache.join([caches[key] for key in keys], self.room)
        return torch.cat([logits[key] for key in keys])

    def history(self):
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


def continue_ids(model, idx, max_new_tokens, sampling):
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


class Text:
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


def texts(context, max_new_tokens, sampling, seeds=None, stops=(), ends=()):
    """Yield, token by token, the text that each row gained: [str].

    A row ends before the first of the texts `stops` or ids `ends` that it generates. Generation
    ends with the last row, or after max_new_tokens.
    """
    outs = [Text(context.model.tokenizer, stops) for _ in context.rows]
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


def likeliest(context, max_new_tokens, num_beams, length_penalty=1.0, stops=(), ends=()):
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
        results.append((score, Text(own, stops).add(ids, final=True)))
    return results


def closing_sample(model, description, start, out_dir, meta):
    """What a run shows at its end: a sample after the ids `start`, or where a separator divides the
    data ten documents.

    description: of the tokenizer, or None; meta: of the data.
    """
    if description is None:
        print(f"no sample: {meta.get('no_tokenizer', 'the data has no tokenizer')}")
        return
    try:
        model.tokenizer = tokenizer.load(description)
    except (OSError, ValueError) as error:  # the run itself went well
        return print(f"no sample: {error}")
    model.eval()._compiled_call_impl = None  # or it would be compiled anew for every length
    say = f"for more: python sample.py --out_dir={out_dir}"
    say += ' --chat=True --interactive=True' * ('template' in meta)
    if (separator := meta.get('separator')) is not None:
        between = model.tokenizer.decode([separator])
        print(f"---- ten samples; {say} --start=${between!r} --stop=${between!r}")
        context = Context(model, [[separator]] * 10, 1000)
        print(
            ''.join(
                f'{text}\n'
                for text in map(''.join, zip(*texts(context, 100, Sampling(), stops=[between])))
            )
        )
        return
    print(f"---- a sample, after the first words of the validation text; {say}")
    context = Context(model, [start[-model.config.block_size :]], len(start) + 400)
    print(model.tokenizer.decode(start), end='')
    for (text,) in texts(context, 400, Sampling(temperature=0.8, top_k=200)):
        print(text, end='', flush=sys.stdout.isatty())
    print(flush=True)
