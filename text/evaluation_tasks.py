"""Evaluation tasks: the texts on which evaluate.py scores a model, as rows of ids, and what the
scores say."""

import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from system import files
from text.dataset_option import open_unmixed
from text.folders import DATA_FOLDER
from text.sources import formats

# (URL, sha256): the sums are those that the dataset_infos.json of the Hugging Face datasets record.
DOWNLOADS = {
    'lambada': (
        'https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl',
        '4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226',
    ),
    'hellaswag': (
        'https://github.com/rowanz/hellaswag/raw/master/data/hellaswag_val.jsonl',
        '0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588',
    ),
}


@dataclass
class Task:
    """rows: [(ids, n)]; the last n ids of a row are scored, given those before them.

    figures(logprobs, is_greedy) -> {name: number}. For each row, logprobs has the sum of its n
    log-probabilities in nats, is_greedy whether each of the n ids was the likeliest: (rows,) each.
    """

    rows: list
    figures: Callable


# ---- bits per byte and perplexity of a text ------------------------------------------------------


@dataclass
class Text:
    """A text as ids, with its size.

    cuts: places in ids; what lies between two of them is scored as one piece. These are the
    separators between documents or, if the data has none, both ends of the text.
    """

    ids: np.ndarray
    n_bytes: int
    n_words: float  # 0: unknown
    cuts: list


def load_text(name, split, tokenizer, max_tokens):
    """The Text of a file, or of a split of a dataset. max_tokens: use only so many; 0: all.

    A lossless tokenizer's ids are decoded, to count their bytes and words. Otherwise these are a
    share of the original text's, which for a dataset are only its recorded bytes. Raises ValueError
    or OSError.
    """
    separator = None
    documents = []
    if Path(name).is_file():
        ids, documents = _encode_file(name, tokenizer)
        n_all = len(ids)
    else:
        data = _open_dataset(name, split, tokenizer)
        separator = data.meta.get('separator')
        n_all = data.tokens[split]
        n_first = min(max_tokens, n_all) if max_tokens else n_all
        ids = data.first(split, n_first).astype(np.int64)
    if max_tokens:
        ids = ids[:max_tokens]
    if tokenizer.lossless:
        documents = _decode_documents(ids, tokenizer)
        n_all = len(ids)

    if documents:
        n_bytes = sum(len(text.encode()) for text in documents)
    else:
        n_bytes = _recorded_bytes(data, split)
    n_words = sum(len(re.split(r'\s+', text)) for text in documents if text)
    n_bytes = n_bytes * len(ids) // max(1, n_all)
    n_words = n_words * len(ids) / max(1, n_all)
    if len(ids) < 2 or not n_bytes:
        raise ValueError(
            f"{name} has {n_bytes} bytes of text, {len(ids)} token(s): too few to predict one "
            "from another"
        )
    cuts = [0, len(ids) - 1]
    if separator is not None:
        cuts = np.flatnonzero(ids == separator).tolist()
    return Text(ids, n_bytes, n_words, cuts)


def _encode_file(path, tokenizer):
    """(ids, documents) of a text file; documents are divided by end-of-text tokens."""
    text = formats.read_text(path)
    try:
        ids = np.array(tokenizer.encode(text), np.int64)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if tokenizer.eot is None:
        return ids, [text]
    return ids, text.split(tokenizer.decode([tokenizer.eot]))


def _open_dataset(name, split, tokenizer):
    """The Dataset, which must have this split, and the model's tokenizer."""
    data = open_unmixed(name)
    if split not in data.tokens:
        raise ValueError(f"{data.folder} has no split {split!r}")
    if data.tokenizer != tokenizer.describe():
        raise ValueError(
            f"{data.folder} was made with another tokenizer than the model's: evaluate the text "
            "itself, with --dataset=FILE"
        )
    return data


def _decode_documents(ids, tokenizer):
    """The texts between the end-of-text tokens."""
    eot = tokenizer.eot
    parts = np.split(ids, np.flatnonzero(ids == eot))
    return [tokenizer.decode(part[part != eot].tolist()) for part in parts]


def _recorded_bytes(data, split):
    """The bytes of a split's text, as meta.json records them."""
    n_bytes = data.meta.get('splits', {}).get(split, {}).get('bytes')
    if n_bytes is None:
        raise ValueError(
            f"{data.folder / 'meta.json'} does not say how many bytes of text {split} has "
            "(splits): evaluate the text itself, with --dataset=FILE"
        )
    return n_bytes


def bpb_task(text, block_size):
    """The text as train.py evaluates it: windows side by side, or, where it is a list of documents,
    each document on its own."""
    has_documents = len(text.cuts) > 2
    rows = windows(text.ids, text.cuts, block_size, block_size, reaches_back=has_documents)
    return _text_task(text, rows)


def perplexity_task(text, block_size, stride, eot):
    """The text in windows that move by `stride` tokens, after an end-of-text token if there is
    one."""
    ids = text.ids
    cuts = text.cuts
    if eot is not None:
        ids = np.concatenate([[eot], text.ids])
        cuts = [0, len(text.ids)]
    rows = windows(ids, cuts, block_size, stride, reaches_back=True)
    return _text_task(text, rows)


def windows(ids, cuts, block_size, stride, reaches_back):
    """Rows that score every id between two cuts once, the first of them excepted: block_size of
    them in the first row, then `stride` in each.

    reaches_back: a row begins block_size ids before its end, but not before the cut; otherwise with
    the last id that the previous row scored.
    """
    rows = []
    for first, last in itertools.pairwise(cuts):
        scored = first  # everything up to here has been
        for end in [*range(min(first + block_size, last), last, stride), last]:
            begin = max(first, end - block_size) if reaches_back else scored
            rows.append((ids[begin : end + 1], end - scored))
            scored = end
    return rows


def _text_task(text, rows):
    """The Task of scoring these rows of the text."""
    n_scored = sum(n for _, n in rows)
    n_ids = len(text.ids)

    def figures(logprobs, is_greedy):
        # An id that is not scored, such as the first, counts like the average one: loss * n_ids.
        loss = -logprobs.sum() / n_scored
        found = {'loss': loss, 'token_perplexity': np.exp(loss)}
        if text.n_words:
            found['word_perplexity'] = np.exp(loss * n_ids / text.n_words)
        found['bits_per_byte'] = loss / math.log(2) * n_ids / text.n_bytes
        found['tokens'] = n_scored
        found['bytes'] = text.n_bytes
        return found

    return Task(rows, figures)


# ---- LAMBADA and HellaSwag -----------------------------------------------------------------------


def lambada_task(tokenizer, block_size, path, limit):
    """The last word of each passage. path: a file of examples; '': the download."""

    def read(example):
        match example:
            case {'text': str(text)} if text.rpartition(' ')[0].strip():
                space = text.rindex(' ')
                return encode_ending(tokenizer, text[:space], text[space:], block_size)
        raise ValueError('an example of LAMBADA has a "text" of several words')

    rows = read_examples('lambada', path, limit, read)

    def figures(logprobs, is_greedy):
        found = {'perplexity': np.exp(-logprobs.mean())}
        found |= accuracy('acc', is_greedy)
        return found | counts(len(rows), rows, block_size)

    return Task(rows, figures)


def hellaswag_task(tokenizer, block_size, path, limit):
    """Four endings of each context, one of them right. path: a file of examples; '': the
    download."""

    def read(example):
        """(four rows, the lengths of their texts, the number of the right one)"""
        match example:
            case {
                'activity_label': str(activity),
                'ctx_a': str(a),
                'ctx_b': str(b),
                'label': label,
                'endings': [str(), str(), str(), str()] as endings,
            } if str(label) in ('0', '1', '2', '3'):
                context = tidy(f'{activity}: {a} {b.capitalize()}')
                endings = [tidy(text) for text in endings]
                rows = [
                    encode_ending(tokenizer, context, f' {text}', block_size) for text in endings
                ]
                return rows, [len(text) for text in endings], int(label)
        raise ValueError(
            'an example of HellaSwag has "activity_label", "ctx_a", "ctx_b", four "endings" and a '
            '"label" from 0 to 3'
        )

    examples = read_examples('hellaswag', path, limit, read)
    rows = []
    for four, _, _ in examples:
        rows += four
    lengths = np.array([lengths for _, lengths, _ in examples])  # (examples, 4)
    labels = np.array([label for _, _, label in examples])

    def figures(logprobs, is_greedy):
        logprobs = logprobs.reshape(-1, 4)
        found = accuracy('acc', logprobs.argmax(1) == labels)
        found |= accuracy('acc_norm', (logprobs / lengths).argmax(1) == labels)
        return found | counts(len(examples), rows, block_size)

    return Task(rows, figures)


def tidy(text):
    """A text of HellaSwag without [header], [title], …, remains of WikiHow's pages."""
    text = text.strip().replace(' [title]', '. ')
    return re.sub(r'\[.*?\]', '', text).replace('  ', ' ')


def encode_ending(tokenizer, context, text, block_size):
    """The row (ids, n) of `text` after `context`, encoded together; white space between them is
    scored."""
    ids = tokenizer.encode(context + text)
    n = len(ids) - len(tokenizer.encode(context.rstrip()))
    if n > block_size:
        raise ValueError(
            f"{text[:40]!r}… is {n} tokens long, more than the model's block_size={block_size}"
        )
    return ids, n


def read_examples(task, path, limit, read):
    """[read(example)] of the JSON lines of `path`, or of the download. limit: the most examples;
    0: all. Raises ValueError, with the line, or OSError."""
    if not path:
        url, digest = DOWNLOADS[task]
        path = DATA_FOLDER / url.rpartition('/')[2]
        files.download(url, path, digest, mirrored_as=f'{task}/{path.name}')
    examples = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if limit and len(examples) == limit:
            break
        if not line.strip():
            continue
        try:
            examples.append(read(json.loads(line)))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: it is not JSON ({error.msg})") from None
        except UnicodeDecodeError as error:
            reason = formats.not_utf8(error.start)
            raise ValueError(f"{path}, line {number}: it {reason}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    if not examples:
        raise ValueError(f"{path} holds no examples")
    return examples


def accuracy(name, is_right):
    """The share of right answers under this name, and the standard error of that mean."""
    n = len(is_right)
    share = np.mean(is_right)
    error = math.nan
    if n > 1:
        error = math.sqrt(share * (1 - share) / (n - 1))
    return {name: share, f'{name}_stderr': error}


def counts(n_examples, rows, block_size):
    """How many examples there are, and how many rows lose the beginning of their context."""
    n_cut = sum(len(ids) > block_size + 1 for ids, _ in rows)
    return {'examples': n_examples, 'cut_contexts': n_cut}
