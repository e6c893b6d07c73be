"""How fast training is: train.py itself is run, and what it measures is read.

    python bench.py                                         # GPT-2 124M on random tokens
    python bench.py config/train_shakespeare_char.py        # any run, on its own data
    python bench.py config/train_shakespeare_char.py --versus="--dtype=float32 --attention=sdpa"
    python bench.py --profile=True --batch_size=4           # and a trace for TensorBoard or chrome://tracing

Settings that are not its own go to train.py. With --versus, both sides get them, the second also those of `versus`; the
two take turns, so that a machine whose speed drifts is fair to both.
"""
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import runtime
from configurator import configure, parse
from runtime import fail, user_errors

# ---- settings --------------------------------------------------------------------------------------------------------
steps = 20  # timed steps of each run
warmup = 10  # steps before them
seconds = 120.0  # end a run earlier after so long, with at least three timed steps; its --max_iters plays no part
rounds = 1  # runs of each side
versus = ''  # settings of a second side to compare with, in quotes
real_data = 'auto'  # False: random tokens; auto: random tokens where no config file says the data
profile = False  # also write a trace into out-bench/profile
# ----------------------------------------------------------------------------------------------------------------------

with user_errors():
    files, wishes, _wants_help = parse(sys.argv[1:])
    own = {k: v for k, v in wishes.items() if k in globals() and not k.startswith('_')}
    configure(globals(), [f'--{k}={v}' for k, v in own.items()] + ['--help'] * _wants_help)
    try:
        sides = {'A': []} | ({'B': shlex.split(versus)} if versus else {})
    except ValueError as error:
        fail(f"versus={versus!r}: {error}")
runtime.check_at_least(1, globals(), 'steps warmup rounds seconds')
if real_data not in (True, False, 'auto'):
    fail(f"real_data={real_data!r} is unknown: take True, False or auto")
arguments = [*files, *(f'--{k}={v}' for k, v in wishes.items() if k not in own)]
if not files and 'gradient_accumulation_steps' not in wishes:
    arguments.append('--gradient_accumulation_steps=1')
if real_data is False or (real_data == 'auto' and not files and 'dataset' not in wishes):
    arguments.append('--dataset=random')


def measure(extra, out_dir):
    """Run train.py until enough steps are timed; returns their lines of metrics.jsonl and the run's facts."""
    command = [sys.executable, str(Path(__file__).with_name('train.py')), *arguments, *extra, f'--out_dir={out_dir}',
               '--log_interval=1', '--eval_interval=0', '--save_minutes=0', '--wandb_log=False', f'--max_iters={10 ** 9}',
               f'--profile={profile}']
    log = Path(out_dir, 'train.log')
    with open(log, 'w') as output:
        run = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    enough = warmup + min(steps, 3)
    try:
        started, lines = None, []
        while len(lines) <= warmup + steps and run.poll() is None:      # the last line may be half written
            time.sleep(0.2)
            if Path(out_dir, 'metrics.jsonl').exists():
                lines = Path(out_dir, 'metrics.jsonl').read_text().splitlines()
                started = started or time.monotonic()
                if len(lines) > enough and time.monotonic() - started > seconds:
                    break
    finally:
        run.kill()
        run.wait()
    if len(lines) <= enough:
        fail(f"train.py ended before it had taken {enough} steps: {(log.read_text().splitlines() or [''])[-1]}")
    lines = [json.loads(line) for line in lines[warmup:-1]]
    return lines, json.loads(Path(out_dir, 'config.json').read_text())['resolved']


def summary(lines, facts, peaks):
    """One line on a run, and its median seconds per step."""
    ms = sorted(line['ms'] for line in lines)
    median, low, high = statistics.median(ms), ms[len(ms) // 10], ms[-1 - len(ms) // 10]
    speed = facts['tokens_per_step'] / median * 1e3
    device, dtype = facts['device'], facts['dtype']
    if (device, dtype) not in peaks:
        peaks[device, dtype] = runtime.peak_flops(device, dtype) or (
            runtime.measured_peak_flops(dtype) if device == 'cpu' else None)
    peak = peaks[device, dtype]
    text = (f"{median:.2f} ms/step ({low:.2f} to {high:.2f}), {speed:,.0f} tokens/s, "
            f"{lines[-1]['peak_memory'] / 2 ** 30:.2f} GiB, {device}, {dtype}")
    if peak:
        text += f", mfu {facts['flops_per_token'] * speed / peak / facts['processes']:.1%} of {peak / 1e12:.3g} TFLOP/s"
    return text, median


print(f"A: train.py {' '.join(arguments)}" + (f"\nB: the same with {versus}" if versus else ''))
medians, peaks = {side: [] for side in sides}, {}
for i in range(rounds):
    for side, extra in sides.items():
        with tempfile.TemporaryDirectory() as folder:
            lines, facts = measure(extra, 'out-bench' if profile else folder)
        text, median = summary(lines, facts, peaks)
        medians[side].append(median)
        print(f"{side} {i + 1}: {text}", flush=True)
if versus:
    ratios = sorted(b / a for a, b in zip(medians['A'], medians['B'], strict=True))
    print(f"A is {statistics.median(ratios):.2f} times as fast as B ({rounds} rounds: {ratios[0]:.2f} to {ratios[-1]:.2f})")
if profile:
    print("trace: out-bench/profile (tensorboard --logdir=out-bench/profile, or load it in chrome://tracing)")
