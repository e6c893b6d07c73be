"""Decoding: tokens from a model, one after the other."""
import codecs
import itertools
import sys

import torch

import tokenizer


def sample(logits, temperature, top_k, n_vocab=None):
    """One token per row of logits (B, V) -> (B, 1). n_vocab: ids from there on are padding, never drawn."""
    if n_vocab is not None:
        logits = logits[:, :n_vocab]
    if temperature < 1e-6:      # logits over so little overflow
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1)


@torch.inference_mode()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None):
    """Yield max_new_tokens times the next token (B, 1) of idx (B, T); the context is the last block_size tokens.

    temperature 0 takes the likeliest token; top_k None draws from the whole vocabulary. Raises ValueError.
    """
    for name, value, least in (('temperature', temperature, 0), ('top_k', top_k, 1), ('max_new_tokens', max_new_tokens, 0)):
        if value is not None and value < least:
            raise ValueError(f"{name}={value} must be at least {least}")
    if idx.size(1) == 0:
        raise ValueError("the prompt is empty: generation needs at least one token to start from")
    n_vocab = model.tokenizer.vocab_size if model.tokenizer else None
    for _ in range(max_new_tokens):
        logits, _ = model(idx[:, -model.config.block_size:])
        token = sample(logits[:, -1], temperature, top_k, n_vocab)
        yield token
        idx = torch.cat([idx, token], dim=1)


def show(model, ids, max_new_tokens, temperature, top_k):
    """Print the text of `ids` and its continuation, on a terminal as it is generated, a whole character at a time."""
    decoder = codecs.getincrementaldecoder('utf-8')(errors='replace')
    device = next(itertools.chain(model.parameters(), model.buffers())).device
    idx = torch.tensor([ids], dtype=torch.long, device=device)
    tokens = stream(model, idx, max_new_tokens, temperature, top_k)
    for some in itertools.chain([ids], ([token.item()] for token in tokens)):
        print(decoder.decode(model.tokenizer.decode_bytes(some)), end='', flush=sys.stdout.isatty())
    print(decoder.decode(b'', final=True), flush=True)


def closing_sample(model, description, start, out_dir):
    """What a run shows at its end: a sample after the ids `start`; description: of the tokenizer."""
    try:
        model.tokenizer = tokenizer.load(description)
    except (OSError, ValueError) as error:      # the run itself went well
        return print(f"no sample: {error}")
    print(f"---- a sample, after the first words of the validation text; for more: python sample.py --out_dir={out_dir}")
    model._compiled_call_impl = None    # or it would be compiled anew for every length
    show(model.eval(), start, max_new_tokens=400, temperature=0.8, top_k=200)
