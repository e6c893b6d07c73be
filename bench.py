"""How fast training is: train.py itself is run, and what it measures is read.

    python bench.py                                         # GPT-2 124M on random tokens
    python bench.py config/train_shakespeare_char.py --versus="--dtype=float32 --attention=sdpa"
    python bench.py config/train_shakespeare_char.py --versus=config/baseline_shakespeare_char.py --target=1.9 --rounds=3
    python bench.py generation                              # generation instead, see generation/benchmark.py

Settings that are not its own go to train.py. With --versus, both sides get them, the second also
those of `versus`; config files there take the place of the first side's. The two take turns, so
that a machine whose speed drifts is fair to both. With --target, each side runs to its own end, and
the clock is a user's, from the start of the command (start-up lasts until the loop begins) to its
end. The loss that counts is the last one, over the whole validation split.
"""

from system.errors import begin_script

begin_script()  # before the imports, which take seconds

import contextlib
import json
import os
import runpy
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from configurator import configure, parse
from system import device as runtime
from system.device import fail, user_errors

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

if sys.argv[1:2] == ['generation']:
    del sys.argv[1]
    runpy.run_module('generation.benchmark', run_name='__main__')
    sys.exit()
with user_errors():
    files, wishes, _wants_help = parse(sys.argv[1:])
    own = {k: v for k, v in wishes.items() if k in globals() and not k.startswith('_')}
    configure(globals(), [f'--{k}={v}' for k, v in own.items()] + ['--help'] * _wants_help)
    try:
        other_files, other_wishes, _wants_help = parse(shlex.split(versus))
    except (ValueError, OSError) as error:
        fail(f"versus={versus!r}: {str(error).removeprefix('command line: ')}")
runtime.check_at_least(1, globals(), 'steps warmup rounds seconds')
runtime.check_at_least(0, globals(), 'seed target')
if real_data not in (True, False, 'auto'):
    fail(f"real_data={real_data!r} is unknown: take True, False or auto")
if wrong := (other_wishes.keys() & globals().keys()) | ({'help'} if _wants_help else set()):
    fail(f"versus={versus!r}: --{min(wrong)} is no setting of one side")
if target and (idle := own.keys() & {'steps', 'warmup', 'seconds', 'real_data', 'profile'}):
    fail(
        f"target={target:g} times whole runs, which are as their configs say: leave out {', '.join(sorted(idle))}"
    )


def arguments(files, wishes):
    """What train.py of one side is given: a whole run just that; timed steps need no accumulation
    and no real text."""
    if not target and not files:
        wishes = {
            'gradient_accumulation_steps': 1,
            **({'dataset': 'random'} if real_data == 'auto' else {}),
            **wishes,
        }
    if real_data is False:
        wishes = {**wishes, 'dataset': 'random'}
    return [*files, *(f'--{k}={v}' for k, v in wishes.items() if k not in own)]


def train(words, out_dir, name, is_over=lambda: False):
    """Run train.py to its end or until is_over(); returns when it began and ended, its exit code
    and its last words."""
    out_dir.mkdir(exist_ok=True)
    # there may be an earlier profile's
    (out_dir / 'metrics.jsonl').write_text('', encoding='utf-8')
    script, lines = str(Path(__file__).with_name('train.py')), ['']
    words = [script, *words, f'--out_dir={out_dir}', '--log_to=', '--wandb_log=False']
    with (
        open(out_dir / 'train.log', 'wb') as output,
        open(out_dir / 'train.log', encoding='utf-8', errors='replace') as log,
        # on a terminal only
        tqdm(bar_format='{desc}', leave=False, dynamic_ncols=True, disable=None) as bar,
    ):
        began = time.time()
        environment = os.environ | {'PYTHONIOENCODING': 'utf-8'}  # of the log
        run = subprocess.Popen(
            [sys.executable, *words], stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while run.poll() is None and not is_over():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.wait(0.2)
                lines = log.readlines() or lines
                bar.set_description_str(f"{name}, {time.time() - began:.0f} s: {lines[-1].strip()}")
            ended = time.time()
        finally:
            run.kill()
            run.wait()
        return began, ended, run.returncode, (log.readlines() or lines)[-1]


def time_steps(words, out_dir, name):
    """Run train.py until enough steps are timed; returns a line on them and their median seconds
    per token."""
    path, enough, began = out_dir / 'metrics.jsonl', warmup + min(steps, 3), time.monotonic()

    def is_over():
        done = path.read_text(encoding='utf-8').count('"ms"')
        return done >= warmup + steps or (done >= enough and time.monotonic() - began > seconds)

    words += ['--log_interval=1', '--eval_interval=0', '--save_minutes=0', f'--profile={profile}']
    *_, last_words = train(words, out_dir, name, is_over)
    lines = [
        json.loads(line)
        for line in path.read_text(encoding='utf-8').split('\n')[:-1]
        if '"ms"' in line
    ][warmup:]
    if len(lines) < enough - warmup:
        fail(
            f"train.py ended before it had taken {enough} steps (a larger --max_iters?): {last_words}"
        )
    facts = json.loads((out_dir / 'config.json').read_text(encoding='utf-8'))['resolved']
    ms = sorted(line['ms'] for line in lines)
    median, low, high = statistics.median(ms), ms[len(ms) // 10], ms[-1 - len(ms) // 10]
    speed, device, dtype = facts['tokens_per_step'] / median * 1e3, facts['device'], facts['dtype']
    if (device, dtype) not in peaks:
        peaks[device, dtype] = (
            runtime.measured_peak_flops(dtype)
            if device == 'cpu'
            else runtime.peak_flops(device, dtype)
        )
    peak = peaks[device, dtype]
    mfu = (
        peak
        and f", mfu {facts['flops_per_token'] * speed / peak / facts['processes']:.1%} of {peak / 1e12:.3g} TFLOP/s"
    )
    return (
        f"{median:.2f} ms/step ({low:.2f} to {high:.2f}), {speed:,.0f} tokens/s, "
        f"{lines[-1]['peak_memory'] / 2**30:.2f} GiB, {device}, {dtype}{mfu or ''}"
    ), 1 / speed


def time_run(words, out_dir, name):
    """Run train.py to its end; returns a line on it, its seconds and its final loss."""
    began, ended, code, last_words = train(words, out_dir, name)
    records = []
    if not code:
        lines = (out_dir / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
        records = [json.loads(line) for line in lines]
    evaluations = [record for record in records if 'val_loss' in record]
    if not evaluations:
        fail(
            f"{name}: train.py ended {f'with exit code {code}' if code else 'without training'}: {last_words}"
        )
    log = (out_dir / 'train.log').read_text(encoding='utf-8', errors='replace')
    if 'is not prepared yet' in log[:1000]:
        print(f"{name}: its data had to be prepared first; once more without that", flush=True)
        return time_run(words, out_dir, name)
    last, took, start_up = (
        evaluations[-1],
        ended - began,
        (out_dir / 'config.json').stat().st_mtime - began,
    )
    loss, known, training = (last[key] for key in ('val_loss', 'wall_seconds', 'train_seconds'))
    return (
        (
            f"val loss {loss:.4f} {'≤' if loss <= target else '>'} {target:g}, {took:.1f} s in all, {known:.1f} s until "
            f"this was known; {start_up:.1f} s of start-up, {training:.1f} s of steps"
        ),
        took,
        loss,
    )


def verdict():
    """The sentence on whole runs, whichever of them reach the target."""
    clauses, reached = [], [side for side in sides if all(loss <= target for _, loss in ends[side])]
    for side, goal in zip(sides, (f"val loss ≤ {target:g}", "it")):
        took, loss = map(statistics.median, zip(*ends[side]))
        missed = sum(loss > target for _, loss in ends[side])
        often = f" in {missed} of {rounds} rounds" if missed < rounds else ''
        clauses.append(
            f"{side} reaches {goal} in {took:.1f} s"
            if side in reached
            else f"{side} does not reach {goal}{often}: it ends at {loss:.4f} after {took:.1f} s"
        )
    if versus and reached:
        other = 'B' if reached[0] == 'A' else 'A'
        clauses[-1] += "; " + ratio(reached[0], other, "" if other in reached else "'s whole run")
    return (f"medians of {rounds} rounds: " if rounds > 1 else '') + ', '.join(clauses)


def ratio(side, other, whose=''):
    ratios = sorted(b / a for (a, *_), (b, *_) in zip(ends[side], ends[other]))
    among = f" ({rounds} rounds: {ratios[0]:.2f} to {ratios[-1]:.2f})" if rounds > 1 else ''
    return f"{side} is {statistics.median(ratios):.2f} times as fast as {other}{whose}{among}"


sides = {'A': arguments(files, wishes), 'B': arguments(other_files or files, wishes | other_wishes)}
sides = sides if versus else {'A': sides['A']}
ends, peaks = {side: [] for side in sides}, {}
print(
    '\n'.join(f"{side}: train.py {shlex.join(words)}" for side, words in sides.items()), flush=True
)
with user_errors():  # Ctrl-C too ends in a line
    for i in range(rounds):
        for side, words in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                text, *end = (time_run if target else time_steps)(
                    [*words, f'--seed={seed + i}'],
                    Path('out-bench' if profile else folder),
                    f"{side} {i + 1}",
                )
            ends[side].append(end)
            print(f"{side} {i + 1}: {text}", flush=True)
if target or versus:
    print(verdict() if target else ratio('A', 'B'))
if profile:
    print(
        "trace: out-bench/profile (tensorboard --logdir=out-bench/profile, or load it in chrome://tracing)"
    )
