"""Decoding: from a model's logits to ids and texts, sampled or by beam search.

The model reads the prompt once and then one token at a time, with a cache of keys and values where
it has one (init_cache). When the context is full it slides: the last three quarters of it are read
again into a new cache, which costs little and works for every model.
"""

import codecs
import itertools

import torch

from models.parts import kv_cache


class Context:
    """The tokens of each row so far, and the model's logits for the next one. Each token is read
    only once, until the context is full.

    rows: the prompts, [[id]]; equal ones are read once.
    room: the most tokens that a row will have, for the cache's size.
    Raises ValueError for a prompt that the model can't read.

    A row that has filled the model's context slides: its last `kept` tokens are read again, and
    generation continues from them. `slides` counts how often that happened.
    """

    def __init__(self, model, rows, room):
        block_size = model.config.block_size
        vocab_size = model.config.vocab_size
        if not all(rows):
            raise ValueError(
                "the prompt is empty: generation needs at least one token to start from"
            )
        longest = max(len(row) for row in rows)
        if longest > block_size:
            raise ValueError(
                f"the prompt has {longest} tokens, the model's context {block_size}: shorten it"
            )
        largest_id = max(max(row) for row in rows)
        if largest_id >= vocab_size:
            raise ValueError(
                f"the prompt has the id {largest_id}, but the model's end at {vocab_size - 1}"
            )

        self.model = model
        self.rows = [list(row) for row in rows]
        self.block_size = block_size
        self.room = min(max(room, longest), block_size)
        self.weight = next(itertools.chain(model.parameters(), model.buffers()))
        self.device = self.weight.device
        self.n_vocab = None  # all ids
        if model.tokenizer:
            self.n_vocab = model.tokenizer.vocab_size  # ids above are padding

        self.starts = [0] * len(rows)  # where in each row the model's context begins
        self.kept = max(1, block_size * 3 // 4)
        self.slides = 0
        self.cache = None
        self.n_unread = longest  # tokens at the end of each row that the model has not read
        self.last_logits = None  # (B, 1, V), of the last position read

    @torch.inference_mode()
    def logits(self):
        """Logits (B, V) of the token after each row."""
        if self.n_unread:
            if self.cache is not None and self.cache.length + self.n_unread <= self.room:
                unread = [row[-self.n_unread :] for row in self.rows]
                idx = torch.tensor(unread, device=self.device)
                self.last_logits, _ = self.model(idx, cache=self.cache)
            else:
                self.last_logits = self._read_all()
            self.n_unread = 0
        return self.last_logits[:, -1, : self.n_vocab]

    def _read_all(self):
        """Read all rows, after sliding those that are too long, into a new cache if the model has
        one. Returns logits (B, 1, V)."""
        self._slide_full_rows()
        if self.cache is not None:
            self.room = self.block_size  # after a slide, the cache may fill the whole context
        prompts = [tuple(row[start:]) for row, start in zip(self.rows, self.starts)]
        dtype = self._cache_dtype()
        caches = {
            prompt: self.model.init_cache(1, len(prompt), self.device, dtype) for prompt in prompts
        }
        has_cache = None not in caches.values()
        if not has_cache:
            self.kept = self.block_size  # the whole context is read for every token anyway
            if len({len(prompt) for prompt in prompts}) == 1:
                return self.model(torch.tensor(prompts, device=self.device))[0]

        # Equal prompts are read once. This calls model.forward, which is never compiled: a compiled
        # model would be compiled again for each length.
        logits = {}
        for prompt, cache in caches.items():
            idx = torch.tensor([prompt], device=self.device)
            logits[prompt], _ = self.model.forward(idx, cache=cache)
        if has_cache:
            self.cache = kv_cache.KVCache.join([caches[prompt] for prompt in prompts], self.room)
        return torch.cat([logits[prompt] for prompt in prompts])

    def _slide_full_rows(self):
        """Move the start of each row that is longer than the context."""
        is_sliding = False
        for b, row in enumerate(self.rows):
            if len(row) - self.starts[b] > self.block_size:
                self.starts[b] = len(row) - self.kept
                is_sliding = True
        if is_sliding:
            self.slides += 1

    def _cache_dtype(self):
        """The cache's number format: the model's choice, else autocast's, else the weights'."""
        if self.model.cache_dtype:
            return self.model.cache_dtype
        if torch.is_autocast_enabled(self.device.type):
            return torch.get_autocast_dtype(self.device.type)
        return self.weight.dtype

    def describe_slides(self):
        """A sentence on how often the context slid; '' where it never did."""
        if not self.slides:
            return ''
        times = "once" if self.slides == 1 else f"{self.slides} times"
        return f"the context filled up {times}; its last {self.kept} tokens were kept"

    def add(self, idx):
        """Append idx (B, T) to the rows."""
        for row, ids in zip(self.rows, idx.tolist()):
            row += ids
        self.n_unread += idx.size(1)

    @torch.inference_mode()
    def select(self, rows):
        """Continue with the rows of these numbers, in this order; a number may come twice."""
        self.rows = [list(self.rows[row]) for row in rows]
        self.starts = [self.starts[row] for row in rows]
        self.last_logits = self.last_logits[rows]
        if self.cache is not None:
            self.cache.select(torch.tensor(rows, device=self.device))


# ---- ids -----------------------------------------------------------------------------------------


@torch.inference_mode()
def stream(context, max_new_tokens, sampling, seeds=None):
    """Yield the next id of each row, (B,), max_new_tokens times, and append it to the context.

    seeds: one per row; a row's draws depend on its own seed alone, not on the rows beside it. None:
    draws come from torch's global generator.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 0")
    if seeds is None:
        generators = [None] * len(context.rows)
    else:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for _ in range(max_new_tokens):
        uniform = [
            torch.rand((), dtype=torch.float64, generator=generator) for generator in generators
        ]
        ids = sampling(context.logits(), context.rows, torch.stack(uniform))
        context.add(ids[:, None])
        yield ids


def generate(model, idx, max_new_tokens, sampling):
    """idx (B, T) -> (B, T + max_new_tokens). Of a long idx, the model sees the last block_size."""
    prompts = idx[:, -model.config.block_size :].tolist()
    context = Context(model, prompts, room=idx.size(1) + max_new_tokens)
    columns = [idx]
    for ids in stream(context, max_new_tokens, sampling):
        columns.append(ids[:, None])
    return torch.cat(columns, dim=1)


@torch.inference_mode()
def beam_search(context, max_new_tokens, num_beams, length_penalty=1.0, is_end=lambda ids: False):
    """The likeliest continuations of the context's one row: up to num_beams pairs (score, ids), the
    best first.

    A score is the sum of log-probabilities over length ** length_penalty: above 0, longer texts are
    preferred. is_end(ids) says whether a continuation is complete. The search stops when num_beams
    are complete and the best open one scores no higher than the worst of them, at its present
    length: transformers' early_stopping=False.
    """
    if max_new_tokens < 1:
        return [(0.0, [])]
    n_prompt = len(context.rows[0])
    complete = []  # (score, ids)
    totals = torch.zeros(1, device=context.device)  # sums of log-probabilities, (beams,)
    for n in range(1, max_new_tokens + 1):
        sums = context.logits().float().log_softmax(-1) + totals[:, None]  # (beams, V)
        # Twice as many candidates as beams, since up to half of them may be complete.
        n_candidates = min(2 * num_beams, sums.numel())
        best, places = sums.flatten().topk(n_candidates)
        beams = []  # the open ones: (total, row, ids), the best first
        for rank, (total, place) in enumerate(zip(best.tolist(), places.tolist())):
            row, token = divmod(place, sums.size(1))
            ids = [*context.rows[row][n_prompt:], token]
            if not is_end(ids):
                beams.append((total, row, ids))
            elif rank < num_beams:
                complete.append((total / n**length_penalty, ids))
        beams = beams[:num_beams]
        complete = sorted(complete, reverse=True)[:num_beams]

        if not beams:
            return complete
        best_open_score = beams[0][0] / n**length_penalty
        if len(complete) == num_beams and best_open_score <= complete[-1][0]:
            return complete
        if n < max_new_tokens:
            context.select([row for _, row, _ in beams])
            context.add(torch.tensor([[ids[-1]] for _, _, ids in beams]))
            totals = torch.tensor([total for total, _, _ in beams], device=context.device)

    for total, _, ids in beams:
        complete.append((total / max_new_tokens**length_penalty, ids))
    return sorted(complete, reverse=True)[:num_beams]


# ---- texts ---------------------------------------------------------------------------------------


class TextStream:
    """The text of ids that come one by one, released once it is certain: whole characters, up to
    the first of the texts `stops`."""

    def __init__(self, tokenizer, stops=()):
        self.tokenizer = tokenizer
        self.stops = stops
        self.decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
        self.held = ''  # decoded, but it may be the beginning of a stop
        self.done = False  # whether a stop came

    def add(self, ids, final=False):
        """The text that becomes certain with these further ids; final: there will be no others."""
        if self.done:
            return ''
        self.held += self.decoder.decode(self.tokenizer.decode_bytes(ids), final)
        places = [self.held.find(stop) for stop in self.stops]
        ends = [place for place in places if place >= 0]
        if ends:
            self.done = True
            n_certain = min(ends)
        elif final:
            n_certain = len(self.held)
        else:
            n_certain = len(self.held) - self._length_of_begun_stop()
        text = self.held[:n_certain]
        self.held = self.held[n_certain:]
        return text

    def _length_of_begun_stop(self):
        """How many characters at the end of `held` may be the beginning of a stop."""
        longest = 0
        for stop in self.stops:
            for n in range(1, len(stop)):
                if self.held.endswith(stop[:n]):
                    longest = max(longest, n)
        return longest

    def finish(self):
        """The text that was held back; whatever is added afterwards is ignored."""
        text = self.add([], final=True)
        self.done = True
        return text


def stream_text(context, max_new_tokens, sampling, seeds=None, stops=(), stop_ids=()):
    """Yield, after each token, the text that each row gained: [str].

    A row ends before the first of the texts `stops`, or of the `stop_ids`, that it generates.
    Generation ends when every row has ended, or after max_new_tokens.
    """
    streams = [TextStream(context.model.tokenizer, stops) for _ in context.rows]
    for ids in stream(context, max_new_tokens, sampling, seeds):
        pieces = []
        for text_stream, token in zip(streams, ids.tolist()):
            if token in stop_ids:
                pieces.append(text_stream.finish())
            else:
                pieces.append(text_stream.add([token]))
        yield pieces
        if all(text_stream.done for text_stream in streams):
            return
    yield [text_stream.add([], final=True) for text_stream in streams]


def beam_search_text(context, max_new_tokens, num_beams, length_penalty=1.0, stops=(), stop_ids=()):
    """The texts that `beam_search` finds, [(score, text)].

    Each ends before the first of the texts `stops`, the `stop_ids` or the tokenizer's end of text.
    Raises ValueError for num_beams or a length_penalty out of range.
    """
    if num_beams > 10_000:
        raise ValueError(f"num_beams={num_beams} must be at most 10000")
    if abs(length_penalty) > 100:
        raise ValueError(f"length_penalty={length_penalty} must be from -100 to 100")
    tokenizer = context.model.tokenizer
    stop_ids = {*stop_ids, getattr(tokenizer, 'eot', None)}

    def is_end(ids):
        if ids[-1] in stop_ids:
            return True
        text = tokenizer.decode_bytes(ids).decode(errors='replace')
        return any(stop in text for stop in stops)

    results = []
    for score, ids in beam_search(context, max_new_tokens, num_beams, length_penalty, is_end):
        if ids and ids[-1] in stop_ids:
            ids = ids[:-1]
        text = TextStream(tokenizer, stops).add(ids, final=True)
        results.append((score, text))
    return results
