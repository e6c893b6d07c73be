"""Text from a model: from a run of train.py, from GPT-2, or from a Hugging Face folder. Its speed
goes to stderr.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=5 --max_new_tokens=100
    python sample.py --init_from=path/to/folder --start=FILE:prompt.txt --temperature=0
    python sample.py --init_from=gpt2 --interactive=True
    python sample.py --out_dir=out-chat --chat=True --interactive=True      # a run on conversations answers
"""

from system.errors import begin_script

begin_script()  # before the imports, which take seconds

import itertools
import sys
import time

import torch

import prompts
from configurator import Texts, configure
from generation import decode as generate
from generation import quantize as weights
from system import device as runtime
from system.device import fail, user_errors
from text.chat import Dialogue, Template
from training import checkpoint

# ---- settings ------------------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir), gpt2[-medium|-large|-xl], a folder, a checkpoint file
out_dir = 'out'  # the run to sample from
start = '\n'  # the prompt; FILE:name: from a file; LINES:name: one per line; -: from standard input
prompt = ''  # the same under another name
num_samples = 10  # how many continuations of each, side by side
max_new_tokens = 500  # tokens in each, at most
temperature = 0.8  # 1.0: as the model says; below: more predictable; 0: always the likeliest token
top_k = 200  # draw only from so many likeliest tokens; 0: from all
top_p = 1.0  # draw only from the likeliest tokens that together have this probability
min_p = 0.0  # draw only from tokens at least this times as probable as the likeliest
repetition_penalty = 1.0  # above 1: tokens that are there already become less likely
stop = Texts()  # end a sample at this text or special token; several: repeat it, ['a', 'b'], a|b
num_beams = 0  # search the likeliest texts over so many beams, in place of drawing; 0: draw
length_penalty = 1.0  # of the search: above 0, longer texts score better
interactive = False  # read a line, continue it, read the next: the context stays
chat = False  # treat the prompt as a user's message and answer it (models trained on conversations)
seed = 1337  # of the first sample; each further one takes the next
device = 'auto'  # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'  # weights: auto, float32, bfloat16, float16, int8 (CPU; fastest for few samples)
compile = False  # True pays for long samples on a GPU
# --------------------------------------------------------------------------------------------------


def draw(texts):
    """Print num_samples continuations of each text, the first as it comes, the others when all are
    done."""
    rows, samples = (
        [x for x in some for _ in range(num_samples)]
        for some in (map(encode, texts), [text + '\n' * chat for text in texts])
    )
    context, began = (
        generate.Context(model, rows, max(map(len, rows)) + max_new_tokens),
        time.perf_counter(),
    )
    context.logits()
    print(samples[0], end='', flush=True)
    read = time.perf_counter()
    for news in generate.texts(
        context, max_new_tokens, sampling, range(seed, seed + len(rows)), stops, ends
    ):
        samples = [sample + new for sample, new in zip(samples, news)]
        print(news[0], end='', flush=True)
    took, tokens = time.perf_counter() - read, sum(map(len, context.rows)) - sum(map(len, rows))
    print('', *samples[1:], '', sep=f"\n{'-' * 15}\n", end='', flush=True)
    print(
        f"prompts in {read - began:.2f} s; {tokens} tokens in {took:.2f} s, {tokens / took:.1f} tokens/s"
        f"{context.history()}",
        file=sys.stderr,
    )


def search(text):
    """Print the likeliest continuations of the text, the best first, with their scores."""
    ids = encode(text)
    context = generate.Context(model, [ids], len(ids) + max_new_tokens)
    found = generate.likeliest(context, max_new_tokens, num_beams, length_penalty, stops, ends)
    for score, new in found[:num_samples]:
        print(f"{text}{chr(10) * chat}{new}\n{'-' * 15} {score:.4f}", flush=True)
    print(f"{num_beams} beams{context.history()}", file=sys.stderr)


def converse(text):
    """Continue one line after the other of standard input, all in one context, or answer them,
    until it ends (Ctrl-D)."""
    context, asked = None, [text] if chat and text.strip() else []
    for turn, line in enumerate(itertools.chain(asked, prompts.typed()), seed):
        try:
            if chat:
                context, ids = None, encode(line)
            else:
                ids = [
                    i for x in ('\n' if context else text.strip() and text, line) for i in encode(x)
                ]
            if context:
                context.add(torch.tensor([ids]))
            context = context or generate.Context(model, [ids], model.config.block_size)
        except ValueError as error:  # the next line may be better
            print(f"error: {error}", file=sys.stderr)
            continue
        reply = ''
        for (new,) in generate.texts(context, max_new_tokens, sampling, [turn], stops, ends):
            print(new, end='', flush=True)
            reply += new
        print(flush=True)
        print(context.history().strip('; '), end='\n' * bool(context.slides), file=sys.stderr)
        if chat:
            talk.answer(reply)
            print(
                f"the first {talk.left_out} turns no longer fit\n" * bool(talk.left_out),
                end='',
                file=sys.stderr,
            )


with user_errors():
    configure(globals(), sys.argv[1:], runtime.resolve_device)
    device, compile = (
        runtime.resolve_device(device),
        runtime.resolve_compile(compile, device) is True,
    )
    dtype = dtype if dtype == 'int8' else runtime.resolve_dtype(dtype, device)
    runtime.check_between(1, 1_000_000, globals(), 'num_samples')
    runtime.check_at_least(0, globals(), 'seed num_beams max_new_tokens')
    sampling = generate.Sampling(temperature, top_k or None, top_p, min_p, repetition_penalty)
    texts = prompts.read(prompt or start)
    if (len(texts) > 1) + (num_beams > 0) + interactive > 1:
        fail("several prompts, num_beams and interactive=True can't be combined: take one of them")
    source = out_dir if init_from == 'resume' else init_from
    model = checkpoint.load_model(source, device)
    if model.tokenizer is None:
        fail(checkpoint.no_tokenizer(source, model))
    if chat and not getattr(model, 'template', None):
        fail(
            "chat=True is for a run on conversations, which keeps their template: this model has none"
        )
    stops = prompts.stops(stop, model.tokenizer)
    if isinstance(stop, str) and len(stops) > 1:
        print(f"a sample ends at {' or '.join(map(repr, stops))}", file=sys.stderr)
    ends = [prompts.special_id(model.tokenizer, text) for text in stops]
    encode = model.tokenizer.encode
    if chat:
        talk = Dialogue(Template(model.template), model.tokenizer, model.config.block_size * 3 // 4)
        encode = talk.ask
        stops += talk.stops
        ends.append(talk.end)
    runtime.be_fast()
    weights.prepare(model, dtype, compile)
    with runtime.memory_errors("take a smaller model, or another --device"):
        converse(texts[0]) if interactive else search(texts[0]) if num_beams else draw(texts)
