"""Generate text with a model: a run of train.py, GPT-2, or a folder in Hugging Face's format.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=5
    python sample.py --init_from=path/to/folder --start=FILE:prompt.txt --temperature=0
    python sample.py --init_from=gpt2 --interactive=True
    python sample.py --out_dir=out-chat --chat=True --interactive=True   # trained on conversations

Text goes to stdout, its speed to stderr.
"""

from system.errors import begin_script

begin_script()  # before the imports, which take seconds

import itertools
import sys
import time

import torch

from configurator import Texts, configure
from generation import decode, quantize
from generation.sampling import Sampling
from system.checks import check_at_least, check_between
from system.compilation import resolve_compile
from system.device import memory_errors, resolve_device, resolve_dtype, tune_for_speed
from system.errors import fail, user_errors
from text import prompts
from text.chat import Dialogue, Template
from training import pretrained

# ---- settings ------------------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir), gpt2[-medium|-large|-xl], a folder, a checkpoint file
out_dir = 'out'  # the run to sample from
start = '\n'  # the prompt; FILE:name: a file's text; LINES:name: one per line; -: standard input
prompt = ''  # another name for start
num_samples = 10  # continuations of each prompt, generated side by side
max_new_tokens = 500  # the most tokens to generate for each
temperature = 0.8  # 1.0: the model's distribution; lower: more predictable; 0: the likeliest token
top_k = 200  # draw only from the k likeliest tokens; 0: from all
top_p = 1.0  # draw only from the likeliest tokens that together have this probability
min_p = 0.0  # draw only from tokens at least this fraction as probable as the likeliest
repetition_penalty = 1.0  # above 1: tokens already in the context become less likely
stop = Texts()  # end a sample at this text or special token; several: repeat it, ['a', 'b'], a|b
num_beams = 0  # search for the likeliest texts with this many beams instead of drawing; 0: draw
length_penalty = 1.0  # of the beam search: above 0, longer texts score better
interactive = False  # read a line, continue it, read the next, all in one context
chat = False  # answer the prompt as a user's message (for models trained on conversations)
seed = 1337  # of the first sample; each further sample uses the next number
device = 'auto'  # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'  # weights: auto, float32, bfloat16, float16, int8 (CPU; fastest for few samples)
compile = False  # True pays off for long samples on a GPU
# --------------------------------------------------------------------------------------------------

_RULE = '-' * 15  # between samples (with _ in front, or it would be a setting)


def draw(texts):
    """Print num_samples continuations of each text: the first as it is generated, the others when
    all are done."""
    rows = []
    samples = []
    for text in texts:
        shown = f'{text}\n' if chat else text
        rows += [encode(text)] * num_samples
        samples += [shown] * num_samples
    longest = max(len(row) for row in rows)
    context = decode.Context(model, rows, room=longest + max_new_tokens)

    began = time.perf_counter()
    context.logits()  # reads the prompts
    print(samples[0], end='', flush=True)
    prompts_read = time.perf_counter()

    seeds = range(seed, seed + len(rows))
    for pieces in decode.stream_text(context, max_new_tokens, sampling, seeds, stops, stop_ids):
        samples = [sample + piece for sample, piece in zip(samples, pieces)]
        print(pieces[0], end='', flush=True)
    seconds = time.perf_counter() - prompts_read

    print(f'\n{_RULE}')
    for sample in samples[1:]:
        print(f'{sample}\n{_RULE}')
    sys.stdout.flush()
    n_prompts = sum(len(row) for row in rows)
    n_tokens = sum(len(row) for row in context.rows) - n_prompts
    report(
        f"prompts in {prompts_read - began:.2f} s; {n_tokens} tokens in {seconds:.2f} s, "
        f"{n_tokens / seconds:.1f} tokens/s",
        context,
    )


def search(text):
    """Print the likeliest continuations of the text, the best first, with their scores."""
    ids = encode(text)
    context = decode.Context(model, [ids], room=len(ids) + max_new_tokens)
    results = decode.beam_search_text(
        context, max_new_tokens, num_beams, length_penalty, stops=stops, stop_ids=stop_ids
    )
    shown = f'{text}\n' if chat else text
    for score, continuation in results[:num_samples]:
        print(f'{shown}{continuation}\n{_RULE} {score:.4f}', flush=True)
    report(f"{num_beams} beams", context)


def report(message, context):
    """Print a line on stderr: the message, and how often the context slid."""
    if context.slides:
        message += f"; {context.describe_slides()}"
    print(message, file=sys.stderr)


def continue_lines(text):
    """Continue each line of standard input until it ends (Ctrl-D), all in one context that begins
    with `text`."""
    context = None
    for turn, line in enumerate(prompts.typed_lines()):
        try:
            if context is None:
                opening = text if text.strip() else ''
                ids = [*encode(opening), *encode(line)]
                context = decode.Context(model, [ids], room=model.config.block_size)
            else:
                ids = [*encode('\n'), *encode(line)]
                context.add(torch.tensor([ids]))
        except ValueError as error:  # the next line may be fine
            print(f"error: {error}", file=sys.stderr)
            continue
        print_reply(context, seed + turn)


def answer_lines(text):
    """Answer the message `text`, unless it is blank, and each line of standard input until it ends
    (Ctrl-D)."""
    messages = prompts.typed_lines()
    if text.strip():
        messages = itertools.chain([text], messages)
    for turn, message in enumerate(messages):
        try:
            ids = dialogue.ask(message)
            context = decode.Context(model, [ids], room=model.config.block_size)
        except ValueError as error:  # the next message may be fine
            print(f"error: {error}", file=sys.stderr)
            continue
        dialogue.answer(print_reply(context, seed + turn))
        if dialogue.left_out:
            print(f"the first {dialogue.left_out} turns no longer fit", file=sys.stderr)


def print_reply(context, seed):
    """Print what follows the context as it is generated, and return it."""
    reply = ''
    for (piece,) in decode.stream_text(context, max_new_tokens, sampling, [seed], stops, stop_ids):
        print(piece, end='', flush=True)
        reply += piece
    print(flush=True)
    if context.slides:
        print(context.describe_slides(), file=sys.stderr)
    return reply


with user_errors():
    configure(globals(), sys.argv[1:], resolve_device)
    device = resolve_device(device)
    compile = resolve_compile(compile, device) is True
    if dtype != 'int8':
        dtype = resolve_dtype(dtype, device)
    check_between(1, 1_000_000, globals(), 'num_samples')
    check_at_least(0, globals(), 'seed num_beams max_new_tokens')
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k or None,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    texts = prompts.read_prompts(prompt or start)
    if sum([len(texts) > 1, num_beams > 0, interactive]) > 1:
        fail("several prompts, num_beams and interactive=True can't be combined: choose one")

    source = out_dir if init_from == 'resume' else init_from
    model = pretrained.load_model(source, device)
    if model.tokenizer is None:
        fail(pretrained.no_tokenizer(source, model))
    encode = model.tokenizer.encode

    # A sample ends at a text of `stops`, or at an id of `stop_ids`: a special token, whose text
    # may be decoded differently.
    stops = prompts.parse_stops(stop, model.tokenizer)
    if isinstance(stop, str) and len(stops) > 1:  # a|b was divided
        print(f"a sample ends at {' or '.join(map(repr, stops))}", file=sys.stderr)
    stop_ids = [prompts.special_token_id(model.tokenizer, text) for text in stops]

    if chat:
        template = getattr(model, 'template', None)
        if not template:
            fail(
                "chat=True needs a model trained on conversations, whose checkpoint keeps their "
                "template: this one has none"
            )
        room = model.config.block_size * 3 // 4  # a quarter is left for the answer
        dialogue = Dialogue(Template(template), model.tokenizer, room)
        encode = dialogue.ask
        stops += dialogue.stops
        stop_ids.append(dialogue.end)

    tune_for_speed()
    quantize.convert_weights(model, dtype, compile)
    with memory_errors("use a smaller model, or another --device"):
        if interactive and chat:
            answer_lines(texts[0])
        elif interactive:
            continue_lines(texts[0])
        elif num_beams:
            search(texts[0])
        else:
            draw(texts)
