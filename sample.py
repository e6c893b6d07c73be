"""Text from a model: from a run of train.py, from GPT-2, or from a Hugging Face folder. Its speed goes to stderr.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=5 --max_new_tokens=100
    python sample.py --init_from=path/to/folder --start=FILE:prompt.txt --temperature=0
    python sample.py --init_from=gpt2 --interactive=True
"""
import itertools
import sys
import time
from pathlib import Path

import torch

import checkpoint
import generate
import runtime
import weights
from configurator import configure
from runtime import fail, user_errors

# ---- settings --------------------------------------------------------------------------------------------------------
init_from = 'resume'  # resume (the run in out_dir), gpt2[-medium|-large|-xl], a Hugging Face folder, a checkpoint file
out_dir = 'out'  # the run to sample from
start = '\n'  # the text to go on from; FILE:name: a file's; LINES:name: each line of a file; -: standard input
prompt = ''  # the same under another name
num_samples = 10  # how many continuations of each, side by side
max_new_tokens = 500  # tokens in each, at most
temperature = 0.8  # 1.0: as the model says; below: more predictable; 0: always the likeliest token
top_k = 200  # draw only from so many likeliest tokens; 0: from all
top_p = 1.0  # draw only from the likeliest tokens that together have this probability
min_p = 0.0  # draw only from tokens at least this times as probable as the likeliest
repetition_penalty = 1.0  # above 1: tokens that are there already become less likely
stop = ''  # a text that ends a sample; several with | between
num_beams = 0  # search the likeliest texts over so many beams, in place of drawing; 0: draw
length_penalty = 1.0  # of the search: above 0, longer texts score better
interactive = False  # read a line, continue it, read the next: the context stays
seed = 1337  # of the first sample; each further one takes the next
device = 'auto'  # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'  # of the weights: auto, float32, bfloat16, float16, int8 (on a CPU; the fastest for a few samples)
compile = False  # True pays for long samples on a GPU
# ----------------------------------------------------------------------------------------------------------------------


def prompts(text):
    """The texts that `start` stands for."""
    if text != '-' and not text.startswith(('FILE:', 'LINES:')):
        return [text]
    try:
        read = sys.stdin.read() if text == '-' else Path(text.partition(':')[2]).read_text(encoding='utf-8')
    except (OSError, ValueError) as error:
        fail(f"{text} can't be read as UTF-8 text ({getattr(error, 'strerror', None) or error})")
    lines = [line for line in read.splitlines() if line] if text.startswith('LINES:') else [read]
    return lines or fail(f"{text} has no line")


def draw(texts):
    """Print num_samples continuations of each text, the first as it comes, the others when all are done."""
    rows, samples = ([x for x in some for _ in range(num_samples)] for some in (map(model.tokenizer.encode, texts), texts))
    context, began = generate.Context(model, rows, max(map(len, rows)) + max_new_tokens), time.perf_counter()
    context.logits()
    print(samples[0], end='', flush=True)
    read = time.perf_counter()
    for news in generate.texts(context, max_new_tokens, sampling, range(seed, seed + len(rows)), stops):
        samples = [sample + new for sample, new in zip(samples, news)]
        print(news[0], end='', flush=True)
    took, tokens = time.perf_counter() - read, sum(map(len, context.rows)) - sum(map(len, rows))
    print('', *samples[1:], '', sep=f"\n{'-' * 15}\n", end='', flush=True)
    print(f"prompts in {read - began:.2f} s; {tokens} tokens in {took:.2f} s, {tokens / took:.1f} tokens/s"
          f"{context.history()}", file=sys.stderr)


def search(text):
    """Print the likeliest continuations of the text, the best first, with their scores."""
    ids = model.tokenizer.encode(text)
    context = generate.Context(model, [ids], len(ids) + max_new_tokens)
    for score, new in generate.likeliest(context, max_new_tokens, num_beams, length_penalty, stops)[:num_samples]:
        print(f"{text}{new}\n{'-' * 15} {score:.4f}", flush=True)
    print(f"{num_beams} beams{context.history()}", file=sys.stderr)


def converse(text):
    """Continue one line after the other of standard input, all in one context, until it ends (Ctrl-D)."""
    context = None
    for turn in itertools.count(seed):
        print('> ' if sys.stdin.isatty() else '', end='', file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            return
        try:
            ids = [i for x in ('\n' if context else text.strip() and text, line[:-1]) for i in model.tokenizer.encode(x)]
            if context:
                context.add(torch.tensor([ids]))
            context = context or generate.Context(model, [ids], model.config.block_size)
        except ValueError as error:     # the next line may be better
            print(f"error: {error}", file=sys.stderr)
            continue
        for new, in generate.texts(context, max_new_tokens, sampling, [turn], stops):
            print(new, end='', flush=True)
        print(flush=True)
        print(context.history().strip('; '), end='\n' * bool(context.slides), file=sys.stderr)


with user_errors():
    configure(globals(), sys.argv[1:], runtime.resolve_device)
    device, compile = runtime.resolve_device(device), runtime.resolve_compile(compile, device) is True
    dtype = dtype if dtype == 'int8' else runtime.resolve_dtype(dtype, device)
    runtime.check_at_least(1, globals(), 'num_samples')
    runtime.check_at_least(0, globals(), 'seed num_beams max_new_tokens')
    sampling = generate.Sampling(temperature, top_k or None, top_p, min_p, repetition_penalty)
    stops, texts = [end for end in stop.split('|') if end], prompts(prompt or start)
    if (len(texts) > 1) + (num_beams > 0) + interactive > 1:
        fail("several prompts, num_beams and interactive=True can't be combined: take one of them")
    model = checkpoint.load_model(out_dir if init_from == 'resume' else init_from, device)
    if model.tokenizer is None:
        fail(f"{init_from} does not say which tokenizer its {model.config.vocab_size} ids belong to")
    runtime.be_fast()
    weights.prepare(model, dtype, compile)
    with runtime.memory_errors("take a smaller model, or another --device"):
        converse(texts[0]) if interactive else search(texts[0]) if num_beams else draw(texts)
