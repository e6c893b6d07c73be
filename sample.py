"""Text from a model: from a run of train.py, from GPT-2, or from a Hugging Face folder.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=5 --max_new_tokens=100
    python sample.py --init_from=path/to/folder --start=FILE:prompt.txt --temperature=0
    python sample.py --init_from=gpt2 --interactive=True --stop=$'\\n'
    echo "Once upon a time" | python sample.py --init_from=gpt2 --start=- --num_beams=4

The first sample is printed as it comes, those beside it when it is done. Speed goes to stderr.
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
start = '\n'  # the text to go on from; FILE:prompt.txt: from a file; LINES:prompts.txt: from each of its lines; -: standard input
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
    kind, _, name = text.partition(':')
    if kind not in ('FILE', 'LINES') and text != '-':
        return [text]
    try:
        text = sys.stdin.read() if text == '-' else Path(name).read_text(encoding='utf-8')
    except (OSError, ValueError) as error:
        fail(f"the prompt {name or '-'} can't be read as UTF-8 text ({getattr(error, 'strerror', None) or error})")
    return text.splitlines() if kind == 'LINES' else [text]


def encode(text):
    ids = model.tokenizer.encode(text)
    if len(ids) >= model.config.block_size:
        raise ValueError(f"the prompt has {len(ids)} tokens, the model's context {model.config.block_size}: shorten it")
    return ids


def draw(texts):
    """Print num_samples continuations of each text, the first as it comes."""
    rows, samples = ([x for x in some for _ in range(num_samples)] for some in (map(encode, texts), texts))
    context, begun = generate.Context(model, rows, max(map(len, rows)) + max_new_tokens), time.perf_counter()
    if max(map(len, rows)) + max_new_tokens > context.block_size:
        print(f"a context of {context.block_size} tokens will be full before the end: whenever it is, its last "
              f"{context.block_size * 3 // 4} are read anew", file=sys.stderr)
    context.logits()
    print(samples[0], end='', flush=True)
    read, steps = time.perf_counter(), 0
    for news in generate.texts(context, max_new_tokens, sampling, range(seed, seed + len(rows)), stops):
        samples, steps = [sample + new for sample, new in zip(samples, news)], steps + 1
        print(news[0], end='', flush=True)
    done = time.perf_counter()
    for sample in ['', *samples[1:]]:
        print(f"{sample}\n{'-' * 15}", flush=True)
    lengths = [len(row) - len(prompt) for row, prompt in zip(context.rows, rows)]
    print(f"prompts read in {read - begun:.2f} s; {sum(lengths)} tokens in {done - read:.2f} s, "
          f"{sum(lengths) / (done - read):.1f} tokens/s", file=sys.stderr)


def search(text):
    """Print the likeliest continuations of the text, the best first, with their scores."""
    def is_end(ids):
        return ids[-1] == eot or any(stop in model.tokenizer.decode(ids) for stop in stops)

    context, eot = generate.Context(model, [encode(text)], model.config.block_size), getattr(model.tokenizer, 'eot', None)
    for score, ids in generate.beam_search(context, max_new_tokens, num_beams, length_penalty, is_end)[:num_samples]:
        print(f"{text}{generate.Text(model.tokenizer, stops).add(ids, final=True)}\n{'-' * 15} {score:.4f}", flush=True)


def converse(text):
    """Continue one line after the other of standard input, all in one context, until it ends (Ctrl-D)."""
    context, start = None, text.strip() and text
    for turn in itertools.count():
        print('> ' if sys.stdin.isatty() else '', end='', file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            return
        try:
            ids = encode(('\n' if context else start) + line.rstrip('\n'))
            if context:
                context.add(torch.tensor([ids]))
            else:
                context = generate.Context(model, [ids], model.config.block_size)
        except ValueError as error:     # the next line may be better
            print(f"error: {error}", file=sys.stderr)
            continue
        for new, in generate.texts(context, max_new_tokens, sampling, [seed + turn], stops):
            print(new, end='', flush=True)
        print(flush=True)


with user_errors():
    configure(globals(), sys.argv[1:], runtime.resolve_device)
    device, text = runtime.resolve_device(device), prompt or start
    dtype = dtype if dtype == 'int8' else runtime.resolve_dtype(dtype, device)
    compile = runtime.resolve_compile(compile, device)
    sampling = generate.Sampling(temperature, top_k or None, top_p, min_p, repetition_penalty)
    stops = [stop for stop in stop.split('|') if stop]
    runtime.check_at_least(1, globals(), 'num_samples')
    runtime.check_at_least(0, globals(), 'seed max_new_tokens num_beams')
    texts = prompts(text)
    if (interactive or num_beams) and (len(texts) > 1 or (interactive and num_beams)):
        fail("interactive=True and num_beams take one prompt, and not each other")
    model = checkpoint.load_model(out_dir if init_from == 'resume' else init_from, device)
    if model.tokenizer is None:
        fail(f"{init_from} does not say which tokenizer its {model.config.vocab_size} ids belong to")
    runtime.be_fast()
    weights.prepare(model, dtype)
    if compile:
        model.compile()
    with runtime.memory_errors("take a smaller model, or another --device"):
        converse(texts[0]) if interactive else search(texts[0]) if num_beams else draw(texts)
