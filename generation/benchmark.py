"""Measure how fast generation is in each number format, beside nanoGPT's way, which reads the whole
context for every token, in float32.

    python bench.py generation                      # the shape of GPT-2 124M, random weights
    python bench.py generation --init_from=gpt2-xl --dtypes=bfloat16 --num_samples=8
    python bench.py generation --plot=speed.png     # tokens/s against position

The variants alternate, so that a machine whose speed drifts is fair to all; a token's time is the
median of the rounds. The limit is the time that it takes, at the measured memory bandwidth, to read
what a token needs: the weights of all linear layers, and the keys and values so far.
"""

from system.errors import begin_script

begin_script()  # before the imports, which take seconds

import copy
import dataclasses
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import models
from configurator import configure
from generation import decode, quantize
from generation.sampling import Sampling
from system import files
from system.checks import check_at_least
from system.device import (
    memory_errors,
    resolve_device,
    resolve_dtype,
    seed_everything,
    synchronize,
    tune_for_speed,
)
from system.errors import fail, user_errors
from training import pretrained

# ---- settings ------------------------------------------------------------------------------------
init_from = ''  # as in sample.py; '': random weights of `model`, whose fields are settings too
model = 'gpt'  # gpt, or NAME for models/NAME.py
dtypes = 'auto'  # formats to compare: float32,bfloat16,float16,int8; auto: those that pay off here
uncached = True  # also measure reading the whole context for each token, in float32
prompt_tokens = 1  # length of the random prompt
max_new_tokens = 256  # tokens to generate
num_samples = 1  # samples generated side by side
prefill_tokens = 512  # length of the prompt whose reading is measured
rounds = 3  # runs of each variant
seed = 1337  # of weights and tokens
device = 'auto'  # auto, cpu, cuda, cuda:1, mps
plot = ''  # file for a picture of tokens/s against position: .png, .svg or .pdf
# --------------------------------------------------------------------------------------------------


def config_class(values):
    """The Config whose fields are settings too; None where a checkpoint decides."""
    if values['init_from']:
        return None
    return models.architecture(values['model']).Config


def build_model(config):
    """The model to measure in float32, in eval mode, by the settings."""
    if init_from:
        return pretrained.load_model(init_from, device)
    names = {field.name for field in dataclasses.fields(config_class(config))}
    fields = {name: config[name] for name in names & config.keys()}
    return models.build(model, vocab_size=50257, **fields).to(device).eval()


def formats_to_compare():
    """The number formats that the setting dtypes names, each once."""
    if dtypes == 'auto':
        formats = ['float32', resolve_dtype('auto', device)]
        if device == 'cpu' and quantize.has_int8():
            formats.append('int8')
    else:
        formats = [dtype for dtype in dtypes.split(',') if dtype]
    unknown = set(formats) - quantize.DTYPES.keys()
    if unknown:
        fail(
            f"dtypes={dtypes!r}: {min(unknown)!r} is unknown; use some of "
            f"{', '.join(quantize.DTYPES)}"
        )
    return list(dict.fromkeys(formats))


# ---- measuring -----------------------------------------------------------------------------------


def clock(work):
    """Seconds that work() takes on the device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def measure_bandwidth(size=2**26):
    """Bytes per second that the device reads at best: the fastest of ten dot products of two
    float32 vectors."""
    a, b = torch.ones(2, size, device=device)
    n_bytes = 2 * 4 * size
    return n_bytes / min(clock(lambda: torch.dot(a, b)) for _ in range(10))


def measure_tokens(variant):
    """Seconds of each of max_new_tokens steps of num_samples rows, [float]."""
    prompt = torch.randint(n_vocab, (prompt_tokens,)).tolist()
    rows = [prompt] * num_samples
    context = decode.Context(variant, rows, room=prompt_tokens + max_new_tokens)
    context.logits()
    steps = decode.stream(context, max_new_tokens + 1, sampling, range(num_samples))
    next(steps)  # its logits are there already: nothing to measure
    return [clock(lambda: next(steps)) for _ in range(max_new_tokens)]


def measure_prefill(variant):
    """Tokens per second when a prompt is read."""
    prompt = torch.randint(n_vocab, (1, min(prefill_tokens, block_size)), device=device)
    return prompt.numel() / clock(lambda: variant(prompt))


def measure_linears(variant):
    """Seconds of one token's linear layers alone."""
    linears = linear_layers(variant)
    sizes = {layer.weight.shape[1] for layer in linears}
    inputs = {size: torch.randn(num_samples, 1, size, device=device) for size in sizes}

    def run_all():
        for layer in linears:
            layer(inputs[layer.weight.shape[1]])

    return clock(run_all)


def linear_layers(variant):
    """Its linear layers, converted or not."""
    kinds = (nn.Linear, quantize.WeightOnlyLinear)
    return [module for module in variant.modules() if isinstance(module, kinds)]


def bytes_per_token(variant):
    """Bytes to read for a token in the middle of the text: the weights of all linear layers, and
    the keys and values so far."""
    sizes = {}  # by address: shared weights count once
    for layer in linear_layers(variant):
        for tensor in (layer.weight, *layer.buffers()):
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
    n_bytes = sum(sizes.values())
    cache = variant.init_cache(num_samples, 1, 'meta', variant.cache_dtype)
    if cache:
        n_positions = prompt_tokens + max_new_tokens // 2
        for layer in cache.kept:
            for tensor in layer:
                n_bytes += n_positions * tensor.numel() * tensor.element_size()
    return n_bytes


# ---- results -------------------------------------------------------------------------------------


def print_row(name, curve):
    """Print a variant's line of the table. curve: seconds of each token, medians of the rounds."""
    tenth = max(1, len(curve) // 10)
    ms = statistics.median(curve) * 1e3
    first_ms = statistics.mean(curve[:tenth]) * 1e3
    last_ms = statistics.mean(curve[-tenth:]) * 1e3
    total = statistics.median(sum(run) for run in token_times[name])
    speed = num_samples * max_new_tokens / total
    speedup = 1
    if uncached:
        pairs = zip(token_times[name], token_times['uncached'])
        speedup = statistics.median(sum(theirs) / sum(own) for own, theirs in pairs)
    prefill = statistics.median(prefill_speeds[name])
    linears_ms = statistics.median(linear_times[name]) * 1e3
    limit = ''
    if name != 'uncached':
        limit_ms = bytes_per_token(variants[name]) / bandwidth * 1e3
        limit = f'{limit_ms / ms:9.1%}'
    ends = f'{first_ms:.2f}, {last_ms:.2f}'
    share = f'{linears_ms:.2f} ({linears_ms / ms:.0%})'
    print(
        f'{name:10} {prefill:9.0f} {speed:9.1f} {ms:9.2f} {ends:>14} {total:8.2f} '
        f'{speedup:8.2f} {share:>18} {limit}'
    )


def draw_plot(curves):
    """Write the picture of tokens per second against position."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 4.5), dpi=150, layout='constrained')
    axes = figure.subplots()
    for name, curve in curves.items():
        positions = range(prompt_tokens + 1, prompt_tokens + 1 + len(curve))
        axes.plot(positions, [num_samples / seconds for seconds in curve], label=name)
    axes.set(xlabel='position', ylabel='tokens per second', yscale='log')
    axes.legend(frameon=False)
    with files.replacing(plot) as file:
        figure.savefig(file, format=plot.rpartition('.')[2])
    print(f"picture: {plot}")


with user_errors():
    config, _ = configure(globals(), sys.argv[1:], resolve_device, config_class)
    check_at_least(1, config, 'prompt_tokens max_new_tokens num_samples prefill_tokens rounds')
    check_at_least(0, config, 'seed')
    device = resolve_device(device)
    formats = formats_to_compare()
    if plot:
        path = Path(plot)
        if not path.parent.is_dir() or path.suffix not in ('.png', '.svg', '.pdf'):
            fail(f"plot={plot!r} must be a .png, .svg or .pdf in an existing folder")

    tune_for_speed()
    seed_everything(seed, 1, device=device)
    plain = build_model(config)
    plain.tokenizer = None  # all ids are drawn, padding too
    block_size = plain.config.block_size
    n_vocab = plain.config.vocab_size
    n_tokens = prompt_tokens + max_new_tokens
    if n_tokens >= block_size:
        fail(
            f"prompt_tokens + max_new_tokens = {n_tokens} must be below the context of {block_size}"
        )
    sampling = Sampling(temperature=0.8, top_k=min(200, n_vocab))
    variants = {}
    for dtype in formats:
        variants[dtype] = copy.deepcopy(plain)
        quantize.convert_weights(variants[dtype], dtype)
    if uncached:
        variants['uncached'] = plain
        plain.init_cache = lambda *args: None

    # {variant: [of each round]}
    token_times = {name: [] for name in variants}  # seconds of each token
    linear_times = {name: [] for name in variants}  # seconds
    prefill_speeds = {name: [] for name in variants}  # tokens per second
    bandwidth = measure_bandwidth()
    with (
        memory_errors("use fewer --num_samples, or a smaller model"),
        tqdm(total=rounds * len(variants), leave=False, disable=None, unit='run') as bar,
    ):
        for _ in range(rounds):
            for name, variant in variants.items():
                bar.set_description(name)
                token_times[name].append(measure_tokens(variant))
                with torch.inference_mode():
                    linears = [measure_linears(variant) for _ in range(5)]
                    linear_times[name].append(statistics.median(linears))
                    prefill_speeds[name].append(measure_prefill(variant))
                bar.update()

    print(
        f"{plain.num_params() / 1e6:.1f}M parameters, {device}, {torch.get_num_threads()} threads, "
        f"{bandwidth / 1e9:.1f} GB/s; {num_samples} x {max_new_tokens} tokens after "
        f"{prompt_tokens}, {rounds} rounds, medians"
    )
    print(
        f"{'':10} {'prompt/s':>9} {'tokens/s':>9} {'ms/token':>9} {'first, last ¹':>14} "
        f"{'total, s':>8} {'times ²':>8} {'linears, ms ³':>18} {'of limit':>9}"
    )
    curves = {}
    for name, runs in token_times.items():
        curves[name] = [statistics.median(position) for position in zip(*runs)]
        print_row(name, curves[name])
    print(
        f"¹ ms, mean of {max(1, max_new_tokens // 10)} tokens; ² as fast as uncached; "
        "³ one token's linear layers alone, and their share of its time"
    )
    if plot:
        draw_plot(curves)
