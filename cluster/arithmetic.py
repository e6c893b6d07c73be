"""What a run costs on paper: memory, traffic, checkpoints and failures, as cluster/README.md prints
it.

    python cluster/arithmetic.py                            # GPT-2 XL on 8 nodes of 8 GPUs
    python cluster/arithmetic.py --nodes=2 --n_embd=768 --n_layer=12 --n_head=12 --batch_size=32

Units: GB is 10^9 bytes. Nothing here is measured; what is assumed can be given.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import torch

from model import GPT, GPTConfig

FP32, BF16 = 4, 2


def options(words=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default, text in [
        ('nodes', 8, 'nodes'),
        ('gpus', 8, 'GPUs per node'),
        ('n_layer', 48, 'blocks'),
        ('n_head', 25, 'heads'),
        ('n_embd', 1600, 'channels'),
        ('block_size', 1024, 'tokens per window'),
        ('vocab_size', 50304, 'entries'),
        ('batch_size', 8, 'windows per GPU and step, in one micro-batch'),
        ('tflops', 989.0, "a GPU's peak, bfloat16"),
        ('mfu', 0.4, 'the share of it that computing reaches'),
        ('hash_gbs', 1.5, 'GB/s of sha256 on one core'),
        ('restart', 180.0, 'seconds from a failure to the first new step'),
    ]:
        parser.add_argument(
            f'--{name}', type=type(default), default=default, help=f'{text} (default {default})'
        )
    return parser.parse_args(words)


def build(o):
    """The model's shapes without its numbers."""
    with torch.device('meta'):
        return GPT(GPTConfig(o.block_size, o.vocab_size, o.n_layer, o.n_head, o.n_embd, bias=False))


def activation_bytes(o):
    """(of a block, of a block's input alone, of the rest): bytes kept per token for the backward
    pass under bfloat16.

    A block, in units of C values: the residual stream before each norm in float32, and in bfloat16
    each norm's output (1 each), q, k, v (3), what attention gives and that in c_proj's order (2),
    the MLP's middle before and after its GELU (8). The rest: the last norm, and the logits, (V) in
    bfloat16, in float32, and the gradient of these.
    """
    C = o.n_embd
    block = (2 * FP32 + (2 + 3 + 2 + 8) * BF16) * C
    return block, FP32 * C, (FP32 + BF16) * C + (BF16 + 2 * FP32) * o.vocab_size


def memory(o, n_params, kind, recompute):
    """{what: bytes on each GPU}, for kind 'DDP' or 'FSDP'.

    Weights, gradients and moments are float32. Autocast also keeps the weights that it uses in
    bfloat16: with DDP, those of the whole model, which has a second copy of the gradients too, in
    buckets; with FSDP, those of a block, of the next block, which is collected ahead, and those
    outside of blocks, which stay collected through the step.
    """
    per_param = FP32 * n_params
    if kind == 'FSDP':
        per_param /= o.nodes * o.gpus
        params_of_block = 12 * o.n_embd**2
        params_outside = n_params - o.n_layer * params_of_block
        collected = params_outside + 2 * params_of_block
        buffers = (FP32 + BF16 + FP32) * collected
    else:
        buffers = (FP32 + BF16) * n_params

    block, block_input, rest = activation_bytes(o)
    if recompute:
        per_token = rest + o.n_layer * block_input + block
    else:
        per_token = rest + o.n_layer * block
    return {
        'weights': per_param,
        'gradients': per_param,
        'moments': 2 * per_param,
        'buffers': buffers,
        'activations': o.batch_size * o.block_size * per_token,
    }


def traffic(o, n_params, kind):
    """Bytes that each GPU sends per step, all in float32: the gradients' sum goes around a ring
    twice; FSDP collects the weights for the forward and again for the backward pass, and spreads
    the gradients. That is also what a node sends: the rings of its GPUs share the bytes, and each
    leaves the node once."""
    n = o.nodes * o.gpus
    rounds = 3 if kind == 'FSDP' else 2
    return (n - 1) / n * FP32 * n_params * rounds


def step_seconds(o, model):
    """Of computing one step."""
    return (
        model.flops_per_token(o.block_size)
        * o.batch_size
        * o.block_size
        / (o.tflops * 1e12 * o.mfu)
    )


def save_seconds(o, n_params, kind, disk):
    """Of one save, `disk` bytes/s for all together: rank 0 writes the whole, or each its part; then
    its sha256 is taken."""
    size = 3 * FP32 * n_params
    return size / disk + size / (o.hash_gbs * 1e9) / (o.nodes * o.gpus if kind == 'FSDP' else 1)


def best_interval(save, between):
    """Young's interval between saves of `save` seconds, where failures come every `between`
    seconds: sqrt(2 · save · between). doi:10.1145/361147.361115; Daly's
    (10.1016/j.future.2004.11.016) differs by less than `save`."""
    return math.sqrt(2 * save * between)


def lost_share(o, interval, save, between):
    """The share of time that saving, doing again what was lost, and starting again take."""
    return save / interval + (interval / 2 + o.restart) / between


def duration(seconds):
    return (
        f'{seconds:.2g} s'
        if seconds < 10
        else f'{seconds:.0f} s'
        if seconds < 120
        else f'{seconds / 60:.0f} min'
    )


def page(o):
    """The tables, lines of Markdown."""
    model, n_gpus = build(o), o.nodes * o.gpus
    n_params = model.num_params(non_embedding=False)
    tokens, computing = n_gpus * o.batch_size * o.block_size, step_seconds(o, model)
    gb = [
        ('DDP', 'DDP', False),
        ('DDP, `--gradient_checkpointing=True`', 'DDP', True),
        ('FSDP', 'FSDP', False),
        ('FSDP, `--gradient_checkpointing=True`', 'FSDP', True),
    ]
    yield (
        f'{n_params:,} parameters (n_layer={o.n_layer}, n_head={o.n_head}, n_embd={o.n_embd}, '
        f'block_size={o.block_size}), {o.nodes} x {o.gpus} GPUs of {o.tflops:g} TFLOP/s at {o.mfu:.0%} MFU, '
        f'{o.batch_size} windows per GPU: {tokens:,} tokens per step, {computing:.2f} s of computing.'
    )
    yield ''
    yield '| GB per GPU | weights | gradients | moments | buffers | activations | sum |'
    yield '|---|---|---|---|---|---|---|'
    for name, kind, recompute in gb:
        parts = memory(o, n_params, kind, recompute)
        yield (
            f'| {name} | '
            + ' | '.join(f'{part / 1e9:.1f}' for part in [*parts.values(), sum(parts.values())])
            + ' |'
        )
    yield ''
    yield '| traffic per step | GB per GPU | at 400 GB/s per node | at 12.5 GB/s per node | computing |'
    yield '|---|---|---|---|---|'
    for kind in ('DDP', 'FSDP'):
        sent = traffic(o, n_params, kind)
        yield f'| {kind} | {sent / 1e9:.1f} | {sent / 400e9:.3f} s | {sent / 12.5e9:.2f} s | {computing:.2f} s |'
    yield ''
    yield '| a checkpoint | GB | files | at 0.5 GB/s | at 2 GB/s | at 10 GB/s |'
    yield '|---|---|---|---|---|---|'
    for kind, files in (
        ('DDP', '1'),
        ('FSDP', f'{n_gpus} of {3 * FP32 * n_params / n_gpus / 1e9:.2f} GB'),
    ):
        times = ' | '.join(
            duration(save_seconds(o, n_params, kind, disk * 1e9)) for disk in (0.5, 2, 10)
        )
        yield f'| {kind} | {3 * FP32 * n_params / 1e9:.1f} | {files} | {times} |'
    yield ''
    yield '| a failure every | DDP: best interval | it loses | 15 min lose | FSDP: best interval | it loses | 15 min lose |'
    yield '|---|---|---|---|---|---|---|'
    for name, between in (
        ('33 days', 33 * 86400),
        ('day', 86400),
        ('6 hours', 6 * 3600),
        ('hour', 3600),
    ):
        cells = []
        for kind in ('DDP', 'FSDP'):
            save = save_seconds(o, n_params, kind, 2e9)
            best = best_interval(save, between)
            cells += [
                duration(best),
                *(f'{lost_share(o, interval, save, between):.1%}' for interval in (best, 900)),
            ]
        yield f'| {name} | ' + ' | '.join(cells) + ' |'


if __name__ == '__main__':
    print(*page(options()), sep='\n')
