"""How good a model is: bits per byte and perplexity of a text, LAMBADA, HellaSwag.

    python evaluate.py --out_dir=out-shakespeare-char
    python evaluate.py --init_from=gpt2 --tasks=bpb,perplexity,lambada,hellaswag
    python evaluate.py --init_from=path/to/folder --tasks=perplexity --dataset=book.txt --stride=64

bpb: the text as train.py evaluates it, in windows side by side, every token but the first
predicted once. perplexity: windows move on by `stride` tokens, so that each token is scored once,
with at least block_size - stride tokens before it, where there are so many. The text follows an
end-of-text token, where the tokenizer has one. lambada: the last word of a passage (arXiv
1606.06031, OpenAI's version); acc: every one of its tokens is the likeliest. hellaswag: the right
one of four endings (arXiv 1905.07830); acc by log-probability, acc_norm by that per character.

The figures are lm-evaluation-harness's for lambada_openai, hellaswag and, with
--stride=block_size, rolling perplexity. Bits per byte and word perplexity compare models with
different tokenizers. Where one loses some of a text, they are of the text as it was: --limit takes
a share of its bytes, and prepared data has no words. Probabilities are over padded ids too.
"""

from system.errors import begin_script

begin_script()  # before the imports, which take seconds

import difflib
import functools
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from configurator import configure
from system import files
from system.checks import check_at_least
from system.device import autocast, memory_errors, resolve_device, resolve_dtype, to_device
from system.errors import fail, user_errors
from text.dataset_option import open_unmixed
from text.folders import DATA_FOLDER
from text.sources import formats
from training import pretrained

# ---- settings ------------------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir), gpt2[-medium|-large|-xl], a folder, a checkpoint file
out_dir = 'out'  # the run to evaluate
tasks = 'bpb,perplexity'  # which of bpb, perplexity, lambada, hellaswag, with commas between
dataset = ''  # a folder in data/ or a text file; default: the run's own dataset, or shakespeare
split = 'val'  # of the folder: train, val, test
stride = 'auto'  # tokens between windows of perplexity, 1 to block_size; auto: half of block_size
lambada = ''  # a file with one {"text": …} a line; else it is downloaded (1.8 MB)
hellaswag = ''  # a file like hellaswag_val.jsonl; else that is downloaded (12 MB)
limit = 0  # use only so many examples, and so many times block_size tokens of text; 0: all
batch_size = 8  # windows or endings at a time
device = 'auto'  # auto, cpu, cuda, cuda:1, mps
dtype = 'float32'  # float32, bfloat16, float16; auto: the fastest that the device has
out = ''  # JSON file for results and settings; default: out_dir/evaluation.json of a run
# --------------------------------------------------------------------------------------------------

# each with the sha256 that the dataset_infos.json of its Hugging Face dataset has for this URL
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


# ---- tasks: each gives rows and figures ----------------------------------------------------------
# A row is (ids, n): the last n ids are scored, given those before them. figures(logprobs, greedy)
# -> {name: number} takes what `score` finds out about the rows.


@functools.cache
def read_text():
    """(ids, bytes, words, cuts): cuts are the text's ends and the ids between its documents.
    ValueError, OSError."""
    name = dataset or (pretrained.dataset_of(out_dir) if init_from == 'resume' else 'shakespeare')
    if Path(name).is_file():
        text = formats.read_text(name)
        try:
            ids = np.array(own.encode(text), np.int64)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        documents, n_ids, separator = (
            [text] if eot is None else text.split(own.decode([eot])),
            len(ids),
            None,
        )
    else:
        data = open_unmixed(name)
        if data.tokenizer != own.describe() or split not in data.tokens:
            raise ValueError(
                f"{data.folder} was made with another tokenizer than the model's: give the text itself, as "
                "--dataset=FILE"
                if split in data.tokens
                else f"{data.folder} has no split {split!r}"
            )
        documents, n_ids, separator = [], data.tokens[split], data.meta.get('separator')
        ids = data.first(split, min(limit * T, n_ids) or n_ids).astype(np.int64)
    ids = ids[: limit * T or None]
    if own.lossless:
        parts, n_ids = np.split(ids, np.flatnonzero(ids == eot)), len(ids)
        documents = [own.decode(part[part != eot].tolist()) for part in parts]
    if documents:
        n_bytes = sum(len(text.encode()) for text in documents)
    else:
        n_bytes = data.meta.get('splits', {}).get(split, {}).get('bytes')
        if n_bytes is None:
            raise ValueError(
                f"{data.folder / 'meta.json'} does not say how many bytes of text {split} has "
                "(splits): give the text itself, as --dataset=FILE"
            )
    n_words = sum(len(re.split(r'\s+', text)) for text in documents if text)
    n_bytes, n_words = n_bytes * len(ids) // max(1, n_ids), n_words * len(ids) / max(1, n_ids)
    if len(ids) < 2 or not n_bytes:
        raise ValueError(
            f"{name} has {n_bytes} bytes of text, {len(ids)} token(s): too few to predict one from another"
        )
    return (
        ids,
        n_bytes,
        n_words,
        [0, len(ids) - 1] if separator is None else np.flatnonzero(ids == separator).tolist(),
    )


def text_task(rolling):
    """Windows of T tokens: rolling ones reach back from the end of what they score, the others
    begin with it."""
    text, n_bytes, n_words, cuts = read_text()
    ids, cuts = (
        (np.concatenate([[eot], text]), [0, len(text)])
        if rolling and eot is not None
        else (text, cuts)
    )
    rows, reach = [], rolling or len(cuts) > 2
    for first, last in np.column_stack([cuts[:-1], cuts[1:]]).tolist():
        ends = [*range(min(first + T, last), last, stride if rolling else T), last]
        rows += [
            (ids[max(first, end - T) if reach else before : end + 1], end - before)
            for before, end in zip([first, *ends], ends)
        ]
    last = sum(n for _, n in rows)

    def figures(logprobs, greedy):
        # a first token that is not scored counts as one like the others, below
        loss = -logprobs.sum() / last
        return {
            'loss': loss,
            'token_perplexity': np.exp(loss),
            **({'word_perplexity': np.exp(loss * len(text) / n_words)} if n_words else {}),
            'bits_per_byte': loss / math.log(2) * len(text) / n_bytes,
            'tokens': last,
            'bytes': n_bytes,
        }

    return rows, figures


def read_examples(task, path, read):
    """[read(example)] of the JSON lines in `path`, or of the download. Raises ValueError, with the
    line, or OSError."""
    if not path:
        url, digest = DOWNLOADS[task]
        path = DATA_FOLDER / url.rpartition('/')[2]
        files.download(url, path, digest, mirrored_as=f'{task}/{path.name}')
    examples = []
    for i, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if line.strip() and len(examples) < (limit or math.inf):
            try:
                examples.append(read(json.loads(line)))
            except (ValueError, RecursionError) as error:
                what = error
                if isinstance(error, json.JSONDecodeError):
                    what = f"it is not JSON ({error.msg})"
                elif isinstance(error, UnicodeDecodeError):
                    what = f"it {formats.not_utf8(error.start)}"
                raise ValueError(f"{path}, line {i}: {what}") from None
    if not examples:
        raise ValueError(f"{path} holds no examples")
    return examples


def ending(context, text):
    """The row of `text` after `context`, encoded together; white space between them is scored."""
    ids = own.encode(context + text)
    n = len(ids) - len(own.encode(context.rstrip()))
    if n > T:
        raise ValueError(f"{text[:40]!r}… is {n} tokens long, more than block_size={T}")
    return ids, n


def lambada_task():
    def read(example):
        match example:
            case {'text': str(text)} if text.rpartition(' ')[0].strip():
                return ending(text[: text.rindex(' ')], text[text.rindex(' ') :])
        raise ValueError('an example of LAMBADA has a "text" of several words')

    rows = read_examples('lambada', lambada, read)
    return rows, lambda logprobs, greedy: {
        'perplexity': np.exp(-logprobs.mean()),
        **accuracies(rows, acc=greedy),
    }


def hellaswag_task():
    def tidy(text):  # [header], [title], … are left over from WikiHow's pages
        return re.sub(r'\[.*?\]', '', text.strip().replace(' [title]', '. ')).replace('  ', ' ')

    def read(example):
        match example:
            case {
                'activity_label': str(activity),
                'ctx_a': str(a),
                'ctx_b': str(b),
                'label': label,
                'endings': [str(), str(), str(), str()] as texts,
            } if str(label) in ('0', '1', '2', '3'):
                context, texts = (
                    tidy(f'{activity}: {a} {b.capitalize()}'),
                    [tidy(text) for text in texts],
                )
                return (
                    [ending(context, f' {text}') for text in texts],
                    [len(text) for text in texts],
                    int(label),
                )
        raise ValueError(
            'an example of HellaSwag has "activity_label", "ctx_a", "ctx_b", four "endings", "label" 0 to 3'
        )

    fours, lengths, labels = zip(*read_examples('hellaswag', hellaswag, read))
    rows = [row for four in fours for row in four]

    def figures(logprobs, greedy):
        logprobs = logprobs.reshape(-1, 4)
        return accuracies(
            rows,
            acc=logprobs.argmax(1) == labels,
            acc_norm=(logprobs / lengths).argmax(1) == labels,
        )

    return rows, figures


def accuracies(rows, **answers):
    """Shares of right answers, with the standard errors of these means, and how many examples there
    are."""
    found = {}
    for name, right in answers.items():
        n, share = len(right), np.mean(right)
        found |= {
            name: share,
            f'{name}_stderr': math.sqrt(share * (1 - share) / (n - 1)) if n > 1 else math.nan,
        }
    return {**found, 'examples': n, 'cut_contexts': sum(len(ids) > T + 1 for ids, _ in rows)}


TASKS = {
    'bpb': lambda: text_task(rolling=False),
    'perplexity': lambda: text_task(rolling=True),
    'lambada': lambada_task,
    'hellaswag': hellaswag_task,
}


# ---- scoring -------------------------------------------------------------------------------------


def score(rows, name):
    """Of each row the log-probability in nats, and whether each of its n tokens was the likeliest.

    Rows are padded at their ends, which a causal model does not see; too long ones lose their
    beginnings.
    """
    # like lengths together, the largest batch first
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    logprobs, greedy = np.zeros(len(rows)), np.zeros(len(rows), bool)
    for first in tqdm(range(0, len(rows), batch_size), name, leave=False, disable=None):
        places = order[first : first + batch_size]
        batch = [(rows[i][0][-T - 1 :], rows[i][1]) for i in places]
        idx = np.zeros((len(batch), len(batch[0][0]) - 1), np.int64)  # (B, T)
        targets = np.full_like(idx, -1)
        for row, (ids, n) in enumerate(batch):
            idx[row, : len(ids) - 1] = ids[:-1]
            targets[row, len(ids) - 1 - n : len(ids) - 1] = ids[-n:]
        x, y = to_device(device, idx, targets)
        logits, y = model(x, y)[0][y >= 0].float(), y[y >= 0]  # (N, V), (N,)
        nats = F.cross_entropy(logits, y, reduction='none').cpu()
        missed = (logits.argmax(-1) != y).cpu()
        owner = np.nonzero(targets >= 0)[0]
        logprobs[places] = -np.bincount(owner, nats, len(batch))  # bincount adds in float64
        greedy[places] = np.bincount(owner, missed, len(batch)) == 0
    return logprobs, greedy


with user_errors():
    config, _ = configure(globals(), sys.argv[1:], resolve_device)
    device = config['device'] = resolve_device(device)
    dtype = config['dtype'] = resolve_dtype(dtype, device)
    check_at_least(0, config, 'limit')
    check_at_least(1, config, 'batch_size')
    if not Path(out).parent.is_dir():
        fail(f"out={out}: there is no folder {Path(out).parent}")
    for name in (names := [name.strip() for name in tasks.split(',')]):
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0)[0]
            fail(
                f"there is no task {name!r}; the nearest is {near!r} (there are: {', '.join(TASKS)})"
            )
    source = out_dir if init_from == 'resume' else init_from
    model = pretrained.load_model(source, device)
    if model.tokenizer is None:
        fail(pretrained.no_tokenizer(source, model))
    T, own, eot = model.config.block_size, model.tokenizer, model.tokenizer.eot
    stride = config['stride'] = max(1, T // 2) if stride == 'auto' else stride
    if stride not in range(1, T + 1):
        fail(f"stride={stride} must be from 1 to {T}, the model's block_size")
    # all mistakes come before the first long computation
    todo = {name: TASKS[name]() for name in names}
    results = {}
    with (
        memory_errors("take a smaller --batch_size, or another --device"),
        torch.inference_mode(),
        autocast(device, dtype),
        np.errstate(over='ignore'),
    ):
        for name, (rows, figures) in todo.items():
            found = {
                k: v if type(v) is int else float(v) for k, v in figures(*score(rows, name)).items()
            }
            results[name] = {k: v if math.isfinite(v) else None for k, v in found.items()}
    print(f"{'task':12}{'metric':18}{'value':>14}")
    for name, found in results.items():
        for metric, value in found.items():
            if not metric.endswith('_stderr'):
                text = (
                    f'{value:,}'
                    if type(value) is int
                    else 'not finite'
                    if value is None
                    else f'{value:.6g}'
                )
                error = '' if (e := found.get(f'{metric}_stderr')) is None else f' ± {e:.4f}'
                print(f'{name:12}{metric:18}{text:>14}{error}')
    if path := out or (f'{out_dir}/evaluation.json' if init_from == 'resume' else ''):
        with files.replacing(path) as file:
            file.write(json.dumps({**config, 'results': results}, indent=1).encode())
