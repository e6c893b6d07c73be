"""How fast training is: train.py itself is run, and what it measures is read.

    python bench.py                                 # GPT-2 124M on random tokens
    python bench.py config/train_shakespeare_char.py --versus="--dtype=float32 --attention=sdpa"
    python bench.py config/A.py --versus=config/B.py --target=1.9 --rounds=3    # whole runs
    python bench.py generation                      # generation: see generation/benchmark.py

Settings that are not bench.py's own are passed to train.py. With --versus, both sides get them, and
the second side those of `versus` on top; config files in `versus` replace the first side's. The two
sides take turns, so that a machine whose speed drifts is fair to both. With --target, each side
runs to its end, and the time is a user's: from the start of the command to its end (start-up lasts
until the loop begins). The loss that counts is the last one, over the whole validation split.
"""

from system.errors import begin_script

begin_script()  # before the imports, which take seconds

import contextlib
import functools
import json
import os
import runpy
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from configurator import configure, parse
from system.checks import check_at_least
from system.device import measured_peak_flops
from system.device import peak_flops as listed_peak_flops
from system.errors import fail, user_errors

# ---- settings ------------------------------------------------------------------------------------
steps = 20  # timed steps of each run
warmup = 10  # steps before them
seconds = 120.0  # end a run earlier after so long, with at least three timed steps
rounds = 1  # runs of each side
seed = 1337  # of the first round; each round takes the next, both sides the same
versus = ''  # settings of a second side to compare with, or its config files, in quotes
target = 0.0  # time whole runs, to this validation loss; 0: time steps
real_data = 'auto'  # False: random tokens; auto: random tokens where no config file says the data
profile = False  # also write a trace into out-bench/profile
# --------------------------------------------------------------------------------------------------

# ---- the command line ----------------------------------------------------------------------------

if sys.argv[1:2] == ['generation']:
    del sys.argv[1]
    runpy.run_module('generation.benchmark', run_name='__main__')
    sys.exit()

with user_errors():
    first = parse(sys.argv[1:])
    own = {key: text for key, text in first.settings.items() if key in globals() and key[0] != '_'}
    own_words = [f'--{key}={text}' for key, text in own.items()]
    if first.wants_help:
        own_words.append('--help')
    configure(globals(), own_words)
    try:
        second = parse(shlex.split(versus))
    except (ValueError, OSError) as error:
        fail(f"versus={versus!r}: {str(error).removeprefix('command line: ')}")

check_at_least(1, globals(), 'steps warmup rounds seconds')
check_at_least(0, globals(), 'seed target')
if real_data not in (True, False, 'auto'):
    fail(f"real_data={real_data!r} is unknown: use True, False or auto")
not_of_one_side = second.settings.keys() & globals().keys()
if second.wants_help:
    not_of_one_side |= {'help'}
if not_of_one_side:
    fail(f"versus={versus!r}: --{min(not_of_one_side)} can't be set for one side only")
if target:
    without_effect = own.keys() & {'steps', 'warmup', 'seconds', 'real_data', 'profile'}
    if without_effect:
        names = ', '.join(sorted(without_effect))
        fail(f"target={target:g} times whole runs as their configs define them: remove {names}")


def arguments(files, settings):
    """The words of train.py's command line for one side.

    Timed steps need neither gradient accumulation nor real text; whole runs keep their settings.
    """
    settings = dict(settings)
    if not target and not files:
        settings.setdefault('gradient_accumulation_steps', 1)
        if real_data == 'auto':
            settings.setdefault('dataset', 'random')
    if real_data is False:
        settings['dataset'] = 'random'
    words = [f'--{key}={text}' for key, text in settings.items() if key not in own]
    return [*files, *words]


# ---- running train.py ----------------------------------------------------------------------------


@dataclass
class Finished:
    """How a run of train.py ended."""

    seconds: float  # from the start of the command to its end
    start_up: float  # seconds until config.json was written, which is when the loop begins
    exit_code: int
    last_line: str  # of what it printed


def run_train(words, out_dir, name, is_over=lambda: False):
    """Run train.py to its end, or until is_over(); returns how it Finished."""
    out_dir.mkdir(exist_ok=True)
    (out_dir / 'metrics.jsonl').write_text('', encoding='utf-8')  # an earlier profile may have one
    script = str(Path(__file__).with_name('train.py'))
    command = [sys.executable, script, *words]
    command += [f'--out_dir={out_dir}', '--log_to=', '--wandb_log=False']
    environment = os.environ | {'PYTHONIOENCODING': 'utf-8'}  # of the log
    log = out_dir / 'train.log'
    last_line = ''
    with (
        open(log, 'wb') as output,
        open(log, encoding='utf-8', errors='replace') as written,
        # disable=None: only on a terminal
        tqdm(bar_format='{desc}', leave=False, dynamic_ncols=True, disable=None) as bar,
    ):
        began = time.time()
        run = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while run.poll() is None and not is_over():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.wait(0.2)
                for line in written:
                    last_line = line
                took = time.time() - began
                bar.set_description_str(f"{name}, {took:.0f} s: {last_line.strip()}")
            ended = time.time()
        finally:
            run.kill()
            run.wait()
        for line in written:
            last_line = line
    start_up = 0.0
    if (out_dir / 'config.json').exists():
        start_up = (out_dir / 'config.json').stat().st_mtime - began
    return Finished(ended - began, start_up, run.returncode, last_line)


def records_of(out_dir):
    """The complete lines of a run's metrics.jsonl."""
    text = (out_dir / 'metrics.jsonl').read_text(encoding='utf-8')
    return [json.loads(line) for line in text.split('\n')[:-1]]


def time_steps(words, out_dir, name):
    """Run train.py until enough steps are timed.

    Returns a line about them, and their median seconds per token.
    """
    least = warmup + min(steps, 3)
    began = time.monotonic()

    def is_over():
        done = (out_dir / 'metrics.jsonl').read_text(encoding='utf-8').count('"ms"')
        is_late = time.monotonic() - began > seconds
        return done >= warmup + steps or (is_late and done >= least)

    words = [*words, '--log_interval=1', '--eval_interval=0', '--save_minutes=0']
    words.append(f'--profile={profile}')
    finished = run_train(words, out_dir, name, is_over)
    timed = [record for record in records_of(out_dir) if 'ms' in record][warmup:]
    if len(timed) < least - warmup:
        fail(
            f"train.py ended before step {least} (set a larger --max_iters?): {finished.last_line}"
        )

    ms = sorted(record['ms'] for record in timed)
    median = statistics.median(ms)
    tenth = len(ms) // 10
    facts = json.loads((out_dir / 'config.json').read_text(encoding='utf-8'))['resolved']
    tokens_per_second = facts['tokens_per_step'] / median * 1e3
    peak_memory = timed[-1]['peak_memory'] / 2**30
    line = (
        f"{median:.2f} ms/step ({ms[tenth]:.2f} to {ms[-1 - tenth]:.2f}), "
        f"{tokens_per_second:,.0f} tokens/s, {peak_memory:.2f} GiB, "
        f"{facts['device']}, {facts['dtype']}"
    )
    peak = peak_flops(facts['device'], facts['dtype'])
    if peak:
        flops_per_second = facts['flops_per_token'] * tokens_per_second / facts['processes']
        line += f", mfu {flops_per_second / peak:.1%} of {peak / 1e12:.3g} TFLOP/s"
    return line, 1 / tokens_per_second


@functools.cache
def peak_flops(device, dtype):
    """Peak FLOP/s of the device: measured on a CPU, else from a table; None if it is not there."""
    if device == 'cpu':
        return measured_peak_flops(dtype)
    return listed_peak_flops(device, dtype)


def time_run(words, out_dir, name):
    """Run train.py to its end; returns a line about it, its seconds and its final loss."""
    finished = run_train(words, out_dir, name)
    evaluations = []
    if finished.exit_code == 0:
        evaluations = [record for record in records_of(out_dir) if 'val_loss' in record]
    if not evaluations:
        how = 'without training'
        if finished.exit_code:
            how = f'with exit code {finished.exit_code}'
        fail(f"{name}: train.py ended {how}: {finished.last_line}")

    log = (out_dir / 'train.log').read_text(encoding='utf-8', errors='replace')
    if 'is not prepared yet' in log[:1000]:
        print(f"{name}: this run prepared its data first; running it again", flush=True)
        return time_run(words, out_dir, name)

    last = evaluations[-1]
    loss = last['val_loss']
    sign = '≤' if loss <= target else '>'
    line = (
        f"val loss {loss:.4f} {sign} {target:g}, {finished.seconds:.1f} s in all, "
        f"{last['wall_seconds']:.1f} s until this was known; {finished.start_up:.1f} s of "
        f"start-up, {last['train_seconds']:.1f} s of steps"
    )
    return line, finished.seconds, loss


# ---- the verdict ---------------------------------------------------------------------------------


def verdict(ends):
    """The sentence about whole runs, whichever of them reach the target.

    ends: {side: [(seconds, loss) of each round]}.
    """
    clauses = []
    reached = []
    goal = f"val loss ≤ {target:g}"
    for side, rounds_of_side in ends.items():
        took = statistics.median(took for took, _ in rounds_of_side)
        loss = statistics.median(loss for _, loss in rounds_of_side)
        missed = sum(loss > target for _, loss in rounds_of_side)
        if not missed:
            reached.append(side)
            clauses.append(f"{side} reaches {goal} in {took:.1f} s")
        else:
            often = f" in {missed} of {rounds} rounds" if missed < rounds else ''
            end = f"it ends at {loss:.4f} after {took:.1f} s"
            clauses.append(f"{side} does not reach {goal}{often}: {end}")
        goal = 'it'
    sentence = ', '.join(clauses)
    if rounds > 1:
        sentence = f"medians of {rounds} rounds: {sentence}"
    if len(ends) == 2 and reached:
        faster = reached[0]
        (other,) = ends.keys() - {faster}
        whose = '' if other in reached else "'s whole run"
        sentence += f"; {ratio(ends, faster, other, whose)}"
    return sentence


def ratio(ends, side, other, whose=''):
    """The clause that says how many times as fast one side is, the median over the rounds."""
    ratios = sorted(b[0] / a[0] for a, b in zip(ends[side], ends[other]))
    clause = f"{side} is {statistics.median(ratios):.2f} times as fast as {other}{whose}"
    if rounds > 1:
        clause += f" ({rounds} rounds: {ratios[0]:.2f} to {ratios[-1]:.2f})"
    return clause


# ---- the rounds ----------------------------------------------------------------------------------

sides = {'A': arguments(first.files, first.settings)}
if versus:
    sides['B'] = arguments(second.files or first.files, first.settings | second.settings)
for side, words in sides.items():
    print(f"{side}: train.py {shlex.join(words)}", flush=True)

measure = time_run if target else time_steps
ends = {side: [] for side in sides}  # {side: [(seconds or seconds per token, …) of each round]}
with user_errors():
    for i in range(rounds):
        for side, words in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                out_dir = Path('out-bench' if profile else folder)
                words_of_round = [*words, f'--seed={seed + i}']
                line, *end = measure(words_of_round, out_dir, name=f"{side} {i + 1}")
            ends[side].append(end)
            print(f"{side} {i + 1}: {line}", flush=True)

if target:
    print(verdict(ends))
elif versus:
    print(ratio(ends, 'A', 'B'))
if profile:
    print(
        "trace: out-bench/profile, for tensorboard --logdir=out-bench/profile or chrome://tracing"
    )
