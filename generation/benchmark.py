"""How fast generation is: each number format, and nanoGPT's way, which reads the whole context for
every token, in float32.

    python bench.py generation                      # the shape of GPT-2 124M, random weights
    python bench.py generation --init_from=gpt2-xl --dtypes=bfloat16 --num_samples=8
    python bench.py generation --plot=speed.png     # tokens/s against position

The sides take turns, so that a machine whose speed drifts is fair to all; a token's time is the
median of the rounds. A token has to read the weights of every product, and the keys and values so
far: over the measured bandwidth, its limit.
"""

from system.errors import begin_script

begin_script()  # before the imports, which take seconds

import copy
import dataclasses
import functools
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
dtypes = 'auto'  # formats to compare: float32,bfloat16,float16,int8; auto: those that pay here
uncached = True  # also read the whole context for each token, in float32
prompt_tokens = 1  # random ones, before the first token
max_new_tokens = 256  # tokens to generate
num_samples = 1  # side by side
prefill_tokens = 512  # of the prompt whose reading is timed
rounds = 3  # runs of each side
seed = 1337  # of weights and tokens
device = 'auto'  # auto, cpu, cuda, cuda:1, mps
plot = ''  # a picture of tokens/s against position, .png, .svg or .pdf
# --------------------------------------------------------------------------------------------------


def clock(work):
    """Seconds that work() takes."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def bandwidth(size=2**26):
    """Bytes per second that the device reads at best: two vectors of `size` float32 in one
    product."""
    a, b = torch.ones(2, size, device=device)
    return 2 * 4 * size / min(clock(lambda: torch.dot(a, b)) for _ in range(10))


def token_times(side):
    """Seconds of each further token of num_samples rows, [float]."""
    tokens = torch.randint(n_vocab, (prompt_tokens,)).tolist()
    context, times = (
        decode.Context(side, [tokens] * num_samples, prompt_tokens + max_new_tokens),
        [],
    )
    context.logits()
    step = decode.stream(context, max_new_tokens + 1, sampling, range(num_samples))
    next(step)  # of the prompt, which is read
    for _ in range(max_new_tokens):
        times.append(clock(lambda: next(step)))
    return times


def products(side):
    """Seconds of the products of one token alone."""
    linears = [m for m in side.modules() if isinstance(m, (nn.Linear, quantize.WeightOnlyLinear))]
    rows = {
        n: torch.randn(num_samples, 1, n, device=device)
        for n in {m.weight.shape[1] for m in linears}
    }
    return clock(lambda: [m(rows[m.weight.shape[1]]) for m in linears])


def bytes_read(side):
    """Bytes of a token in the middle: all products' weights, and the keys and values so far."""
    tensors = [
        t
        for m in side.modules()
        if isinstance(m, (nn.Linear, quantize.WeightOnlyLinear))
        for t in (m.weight, *m.buffers())
    ]
    cache = side.init_cache(num_samples, 1, 'meta', side.cache_dtype)
    per_token = (
        sum(t.numel() * t.element_size() for kept in cache.kept for t in kept) if cache else 0
    )
    seen = prompt_tokens + max_new_tokens // 2
    return (
        sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
        + seen * per_token
    )


with user_errors():
    config, _ = configure(
        globals(),
        sys.argv[1:],
        resolve_device,
        lambda values: None if values['init_from'] else models.architecture(values['model']).Config,
    )
    check_at_least(1, config, 'prompt_tokens max_new_tokens num_samples prefill_tokens rounds')
    check_at_least(0, config, 'seed')
    device = resolve_device(device)
    auto = resolve_dtype('auto', device)
    wishes = (
        ['float32', auto, 'int8']
        if dtypes == 'auto'
        else [dtype for dtype in dtypes.split(',') if dtype]
    )
    if dtypes == 'auto' and not (device == 'cpu' and quantize.has_int8()):
        wishes.remove('int8')
    if unknown := set(wishes) - quantize.DTYPES.keys():
        fail(
            f"dtypes={dtypes!r}: {min(unknown)!r} is unknown; take some of {', '.join(quantize.DTYPES)}"
        )
    if plot and (
        not Path(plot).parent.is_dir() or Path(plot).suffix not in ('.png', '.svg', '.pdf')
    ):
        fail(f"plot={plot!r}: take a .png, .svg or .pdf in a folder that is there")
    tune_for_speed()
    seed_everything(seed, 1, device=device)
    if init_from:
        plain = pretrained.load_model(init_from, device)
    else:
        fields = {
            f.name for f in dataclasses.fields(models.architecture(model).Config)
        } & config.keys()
        plain = (
            models.build(model, vocab_size=50257, **{name: config[name] for name in fields})
            .to(device)
            .eval()
        )
    block_size, n_vocab = plain.config.block_size, plain.config.vocab_size
    if prompt_tokens + max_new_tokens >= block_size:
        fail(
            f"prompt_tokens + max_new_tokens = {prompt_tokens + max_new_tokens} must be below the context of {block_size}"
        )
    plain.tokenizer, sampling, sides = None, Sampling(0.8, min(200, n_vocab)), {}
    for dtype in dict.fromkeys(wishes):
        sides[dtype] = copy.deepcopy(plain)
        quantize.convert_weights(sides[dtype], dtype)
if uncached:
    sides['uncached'] = plain
    plain.init_cache = lambda *args: None

times = {name: [] for name in sides}
alone, prefill = ({name: [] for name in sides} for _ in range(2))
peak = bandwidth()
with (
    user_errors(),
    memory_errors("take fewer --num_samples, or a smaller model"),
    tqdm(total=rounds * len(sides), leave=False, disable=None, unit='run') as bar,
):
    for _ in range(rounds):
        for name, side in sides.items():
            bar.set_description(name)
            times[name].append(token_times(side))
            with torch.inference_mode():
                alone[name].append(statistics.median(products(side) for _ in range(5)))
                prompt = torch.randint(n_vocab, (1, min(prefill_tokens, block_size)), device=device)
                prefill[name].append(prompt.numel() / clock(functools.partial(side, prompt)))
            bar.update()

print(
    f"{plain.num_params() / 1e6:.1f}M parameters, {device}, {torch.get_num_threads()} threads, {peak / 1e9:.1f} GB/s; "
    f"{num_samples} x {max_new_tokens} tokens after {prompt_tokens}, {rounds} rounds, medians"
)
print(
    "{:10} {:>9} {:>9} {:>9} {:>14} {:>8} {:>8} {:>18} {:>9}".format(
        '',
        'prompt/s',
        'tokens/s',
        'ms/token',
        'first, last ¹',
        'total, s',
        'times ²',
        'products, ms ³',
        'of limit',
    )
)
curves = {name: [statistics.median(some) for some in zip(*runs)] for name, runs in times.items()}
for name, curve in curves.items():
    total, tenth = statistics.median(map(sum, times[name])), max(1, len(curve) // 10)
    ms, own = statistics.median(curve) * 1e3, statistics.median(alone[name]) * 1e3
    ratio = (
        statistics.median(sum(b) / sum(a) for a, b in zip(times[name], times['uncached']))
        if uncached
        else 1
    )
    ends = (
        f"{statistics.mean(curve[:tenth]) * 1e3:.2f}, {statistics.mean(curve[-tenth:]) * 1e3:.2f}"
    )
    limit = f"{bytes_read(sides[name]) / peak * 1e3 / ms:9.1%}" if name != 'uncached' else ''
    speed = num_samples * max_new_tokens / total
    share = f"{own:.2f} ({own / ms:.0%})"
    print(
        f"{name:10} {statistics.median(prefill[name]):9.0f} {speed:9.1f} {ms:9.2f} {ends:>14} {total:8.2f} {ratio:8.2f} "
        f"{share:>18} {limit}"
    )
print(
    f"¹ mean of {tenth} tokens, ms; ² as fast as uncached; ³ of one token's Linears alone, and their share of its time"
)
if plot:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 4.5), dpi=150, layout='constrained')
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(
            range(prompt_tokens + 1, prompt_tokens + 1 + len(curve)),
            [num_samples / t for t in curve],
            label=name,
        )
    axes.set(xlabel='position', ylabel='tokens per second', yscale='log')
    axes.legend(frameon=False)
    with user_errors(), files.replacing(plot) as file:
        figure.savefig(file, format=plot.rpartition('.')[2])
    print(f"picture: {plot}")
