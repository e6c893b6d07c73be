"""What a training run prints at its end: a sample of the model."""

import sys

from generation.decode import Context, stream_text
from generation.sampling import Sampling
from text import tokenizer


def print_final_sample(model, description, start, out_dir, meta):
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
                for text in map(
                    ''.join, zip(*stream_text(context, 100, Sampling(), stops=[between]))
                )
            )
        )
        return
    print(f"---- a sample, after the first words of the validation text; {say}")
    context = Context(model, [start[-model.config.block_size :]], len(start) + 400)
    print(model.tokenizer.decode(start), end='')
    for (text,) in stream_text(context, 400, Sampling(temperature=0.8, top_k=200)):
        print(text, end='', flush=sys.stdout.isatty())
    print(flush=True)
