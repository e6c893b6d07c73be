"""Decoding: tokens from a model, one after the other."""
import sys

import torch

import tokenizer as tokenizers


def sample(logits, temperature, top_k, n_vocab=None):
    """One token per row of logits (B, V) -> (B, 1). n_vocab: ids from there on are padding, never drawn."""
    if n_vocab is not None:
        logits = logits[:, :n_vocab]
    if temperature == 0:
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
    if temperature < 0 or (top_k is not None and top_k < 1) or max_new_tokens < 0:
        raise ValueError(f"temperature={temperature} must be at least 0, top_k={top_k} at least 1 "
                         f"and max_new_tokens={max_new_tokens} at least 0")
    if idx.size(1) == 0:
        raise ValueError("the prompt is empty: generation needs at least one token to start from")
    n_vocab = model.tokenizer.vocab_size if model.tokenizer else None
    for _ in range(max_new_tokens):
        logits, _ = model(idx[:, -model.config.block_size:])
        token = sample(logits[:, -1], temperature, top_k, n_vocab)
        yield token
        idx = torch.cat([idx, token], dim=1)


def show_sample(model, description, device, max_new_tokens=300):
    """Print a short sample of what a model just trained; a line in its place where its tokenizer can't be loaded."""
    try:
        model.tokenizer = tokenizers.load(description) if description else None
    except (OSError, ValueError) as error:
        print(f"no sample: {error}")
        return
    if model.tokenizer:
        start = torch.tensor([[model.tokenizer.start_id]], device=device)
        print('-' * 20, 'a sample', '-' * 20)
        write(model, start, model.tokenizer, max_new_tokens, temperature=0.8, top_k=200)
        print('-' * 50)


def write(model, idx, tokenizer, max_new_tokens, temperature, top_k, out=None):
    """Write the continuation of idx (1, T) to `out` (stdout) as it is generated, whole characters at a time."""
    out = out or sys.stdout
    printable = tokenizers.streaming_decoder(tokenizer)
    for token in stream(model, idx, max_new_tokens, temperature, top_k):
        out.write(printable(token[0].tolist()))
        if out.isatty():
            out.flush()
    out.write(printable([], final=True) + '\n')
    out.flush()
