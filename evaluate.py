"""Measure how good a model is: bits per byte and perplexity of a text, LAMBADA, HellaSwag.

    python evaluate.py --out_dir=out-shakespeare-char
    python evaluate.py --init_from=gpt2 --tasks=bpb,perplexity,lambada,hellaswag
    python evaluate.py --init_from=path/to/folder --tasks=perplexity --dataset=book.txt --stride=64

bpb: the text as train.py evaluates it, in windows side by side; every token but the first is
predicted once. perplexity: windows move by `stride` tokens, so that each token is scored once,
with at least block_size - stride tokens before it, except at the beginning. The text follows an
end-of-text token, if the tokenizer has one. lambada: the last word of a passage (arXiv 1606.06031,
OpenAI's version); acc: each of its tokens is the likeliest. hellaswag: the right one of four
endings (arXiv 1905.07830); acc by log-probability, acc_norm by log-probability per character.

The numbers are those of lm-evaluation-harness for lambada_openai, hellaswag and, with
--stride=block_size, rolling perplexity. Bits per byte and word perplexity compare models with
different tokenizers. If a tokenizer loses some of the text, they refer to the original text: with
--limit, to a share of its bytes; prepared data has no word perplexity then. Probabilities are over
padded ids too.
"""

from system.errors import begin_script

begin_script()  # before the imports, which take seconds

import difflib
import json
import math
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
from text import evaluation_tasks
from training import pretrained

# ---- settings ------------------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir), gpt2[-medium|-large|-xl], a folder, a checkpoint file
out_dir = 'out'  # the run to evaluate
tasks = 'bpb,perplexity'  # any of bpb, perplexity, lambada, hellaswag, separated by commas
dataset = ''  # a folder in data/ or a text file; default: the run's own dataset, or shakespeare
split = 'val'  # of a dataset: train, val, test
stride = 'auto'  # of perplexity's windows, in tokens, 1 to block_size; auto: half of block_size
lambada = ''  # a file with one {"text": …} per line; default: download it (1.8 MB)
hellaswag = ''  # a file like hellaswag_val.jsonl; default: download it (12 MB)
limit = 0  # use only so many examples, and limit * block_size tokens of the text; 0: all
batch_size = 8  # windows or endings at a time
device = 'auto'  # auto, cpu, cuda, cuda:1, mps
dtype = 'float32'  # float32, bfloat16, float16; auto: the fastest that the device has
out = ''  # JSON file for results and settings; default: evaluation.json in a run's out_dir
# --------------------------------------------------------------------------------------------------

TASKS = ('bpb', 'perplexity', 'lambada', 'hellaswag')


def make_tasks(names, tokenizer, block_size):
    """{name: Task} of these names, by the settings."""
    text = None
    if 'bpb' in names or 'perplexity' in names:
        source = dataset
        if not source:
            source = pretrained.dataset_of(out_dir) if init_from == 'resume' else 'shakespeare'
        text = evaluation_tasks.load_text(source, split, tokenizer, max_tokens=limit * block_size)
    made = {}
    for name in names:
        if name == 'bpb':
            made[name] = evaluation_tasks.bpb_task(text, block_size)
        elif name == 'perplexity':
            made[name] = evaluation_tasks.perplexity_task(text, block_size, stride, tokenizer.eot)
        elif name == 'lambada':
            made[name] = evaluation_tasks.lambada_task(tokenizer, block_size, lambada, limit)
        elif name == 'hellaswag':
            made[name] = evaluation_tasks.hellaswag_task(tokenizer, block_size, hellaswag, limit)
    return made


def score(model, rows, name):
    """(logprobs, is_greedy) of a Task's rows: of the last n ids of each, the sum of their
    log-probabilities in nats, and whether each of them was the likeliest. (rows,), both.

    Rows are padded at the end, which a causal model does not see. Of rows that are too long for the
    model, the beginning is cut off. name: for the progress bar.
    """
    longest = model.config.block_size + 1
    logprobs = np.zeros(len(rows))
    is_greedy = np.zeros(len(rows), bool)
    # Rows of similar length together, the largest batch first: if memory runs out, it does so now.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]))
    for first in tqdm(range(0, len(rows), batch_size), name, leave=False, disable=None):
        places = order[first : first + batch_size]
        batch = []
        for i in places:
            ids, n = rows[i]
            batch.append((ids[-longest:], n))
        T = len(batch[0][0]) - 1
        idx = np.zeros((len(batch), T), np.int64)
        targets = np.full_like(idx, -1)  # -1: not scored
        for b, (ids, n) in enumerate(batch):
            end = len(ids) - 1
            idx[b, :end] = ids[:-1]
            targets[b, end - n : end] = ids[-n:]

        x, y = to_device(device, idx, targets)
        logits, _ = model(x, y)  # (B, T, V)
        is_scored = y >= 0
        logits = logits[is_scored]  # (N, V); the others are freed before the copy to float32
        logits = logits.float()
        y = y[is_scored]  # (N,)
        nats = F.cross_entropy(logits, y, reduction='none').cpu()
        is_missed = (logits.argmax(-1) != y).cpu()

        # Sum by row; bincount adds in float64.
        owner = np.nonzero(targets >= 0)[0]  # the row b of each of the N
        logprobs[places] = -np.bincount(owner, nats, len(batch))
        is_greedy[places] = np.bincount(owner, is_missed, len(batch)) == 0
    return logprobs, is_greedy


def as_json(figures):
    """{name: int, float, or None where it is not finite}, of NumPy's and Python's numbers."""
    plain = {}
    for name, value in figures.items():
        if type(value) is not int:
            value = float(value)
        plain[name] = value if math.isfinite(value) else None
    return plain


def print_table(results):
    """Print {task: {metric: value}}, with the standard error of a metric behind it."""
    print(f"{'task':12}{'metric':18}{'value':>14}")
    for task, figures in results.items():
        for metric, value in figures.items():
            if metric.endswith('_stderr'):
                continue
            if value is None:
                text = 'not finite'
            elif type(value) is int:
                text = f'{value:,}'
            else:
                text = f'{value:.6g}'
            stderr = figures.get(f'{metric}_stderr')
            error = '' if stderr is None else f' ± {stderr:.4f}'
            print(f'{task:12}{metric:18}{text:>14}{error}')


with user_errors():
    config, _ = configure(globals(), sys.argv[1:], resolve_device)
    device = config['device'] = resolve_device(device)
    dtype = config['dtype'] = resolve_dtype(dtype, device)
    check_at_least(0, config, 'limit')
    check_at_least(1, config, 'batch_size')
    if not Path(out).parent.is_dir():
        fail(f"out={out}: there is no folder {Path(out).parent}")
    names = [name.strip() for name in tasks.split(',')]
    for name in names:
        if name not in TASKS:
            nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0)[0]
            fail(
                f"there is no task {name!r}; the nearest is {nearest!r} "
                f"(there are: {', '.join(TASKS)})"
            )

    source = out_dir if init_from == 'resume' else init_from
    model = pretrained.load_model(source, device)
    if model.tokenizer is None:
        fail(pretrained.no_tokenizer(source, model))
    block_size = model.config.block_size
    if stride == 'auto':
        stride = max(1, block_size // 2)
    if stride not in range(1, block_size + 1):
        fail(f"stride={stride} must be from 1 to {block_size}, the model's block_size")
    config['stride'] = stride

    # All texts are read before the first long computation, so that mistakes show at once.
    todo = make_tasks(names, model.tokenizer, block_size)
    results = {}
    with (
        memory_errors("use a smaller --batch_size, or another --device"),
        torch.inference_mode(),
        autocast(device, dtype),
        np.errstate(over='ignore'),
    ):
        for name, task in todo.items():
            logprobs, is_greedy = score(model, task.rows, name)
            results[name] = as_json(task.figures(logprobs, is_greedy))

    print_table(results)
    path = out
    if not path and init_from == 'resume':
        path = f'{out_dir}/evaluation.json'
    if path:
        with files.replacing(path) as file:
            file.write(json.dumps({**config, 'results': results}, indent=1).encode())
