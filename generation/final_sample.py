"""What a training run prints at its end: a sample of the model."""

import sys

from generation.decode import Context, stream_text
from generation.sampling import Sampling
from text import tokenizer


def print_final_sample(model, description, start, out_dir, meta):
    """Print a continuation of the ids `start`; or ten documents, where the data is a list of them.

    description: the tokenizer's, from which it is loaded, or None. out_dir: the run, for the
    command that prints more. meta: the contents of the data's meta.json.
    """
    if description is None:
        reason = meta.get('no_tokenizer', 'the data has no tokenizer')
        print(f"no sample: {reason}")
        return
    try:
        model.tokenizer = tokenizer.load(description)
    except (OSError, ValueError) as error:  # the run itself went well
        print(f"no sample: {error}")
        return

    model.eval()
    model._compiled_call_impl = None  # or it would be compiled again for every length
    command = f"python sample.py --out_dir={out_dir}"
    if 'template' in meta:
        command += " --chat=True --interactive=True"
    separator = meta.get('separator')
    if separator is None:
        _print_continuation(model, start, command)
    else:
        _print_documents(model, separator, command)


def _print_continuation(model, start, command):
    """Print the ids `start` as text, and 400 tokens that follow them, as they are generated."""
    print(f"---- a sample, after the first words of the validation text; for more: {command}")
    prompt = start[-model.config.block_size :]
    context = Context(model, [prompt], room=len(start) + 400)
    print(model.tokenizer.decode(start), end='')
    for (text,) in stream_text(context, 400, Sampling(temperature=0.8, top_k=200)):
        print(text, end='', flush=sys.stdout.isatty())
    print(flush=True)


def _print_documents(model, separator, command):
    """Print ten documents, each generated after the id `separator` until it comes again."""
    separator_text = model.tokenizer.decode([separator])
    options = f"--start=${separator_text!r} --stop=${separator_text!r}"  # $'\n', as a shell has it
    print(f"---- ten samples; for more: {command} {options}")
    documents = [''] * 10
    context = Context(model, [[separator]] * 10, room=1000)
    for pieces in stream_text(context, 100, Sampling(), stops=[separator_text]):
        documents = [document + piece for document, piece in zip(documents, pieces)]
    print(*documents, sep='\n', end='\n\n')
