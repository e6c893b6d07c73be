"""What a run tells: console lines and a progress bar, metrics.jsonl, wandb. On the master process only."""
import json
import math
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

import files
from runtime import synchronize


class Metrics:
    """The log of one run in `out_dir`; `on` is false on processes that stay silent.

    start_iter, done_eval: of a resumed run, whose earlier lines of metrics.jsonl are kept up to there.
    """

    def __init__(self, out_dir, on, max_iters, start_iter=0, done_eval=-1):
        self.on, self.wandb, self.wandb_id, self.bar = on, None, None, None
        if not on:
            return
        self.path = Path(out_dir) / 'metrics.jsonl'
        kept = [line for line in self._lines() if _is_before(line, start_iter, done_eval)]
        with files.replacing(self.path) as file:
            file.writelines(line.encode() + b'\n' for line in kept)
        if sys.stderr.isatty():
            self.bar = tqdm(total=max_iters, initial=start_iter, unit='it', dynamic_ncols=True, smoothing=0.05)

    def _lines(self):
        return self.path.read_text(encoding='utf-8', errors='replace').splitlines() if self.path.exists() else []

    def start_wandb(self, project, name, config, run_id=None):
        """Log to Weights & Biases too; without a login offline, without the package not at all: each is said."""
        if not self.on:
            return
        try:
            import wandb
        except ImportError:
            self.say("wandb is not installed (pip install wandb): going on without it; metrics.jsonl has everything")
            return
        mode = None
        if 'WANDB_MODE' not in os.environ and not _has_login(wandb):
            mode = 'offline'
            self.say("wandb has no login (`wandb login` makes one): going on offline; `wandb sync` sends the run later")
        try:
            self.wandb = wandb.init(project=project, name=name, config=config, id=run_id, resume='allow', mode=mode)
        except wandb.errors.Error as error:
            self.say(f"wandb does not start ({' '.join(str(error).split())[:120]}): going on without it")
            return
        self.wandb_id = self.wandb.id

    def say(self, text):
        """Print a line, above the progress bar where there is one."""
        if self.on:
            tqdm.write(text) if self.bar else print(text, flush=True)

    def log(self, record):
        """Add one line to metrics.jsonl, and the record to wandb; numbers that are not finite become null."""
        if not self.on:
            return
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        try:
            with open(self.path, 'a', encoding='utf-8') as file:
                file.write(json.dumps(record) + '\n')
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror}") from None
        if self.wandb:
            self.wandb.log({k: v for k, v in record.items() if v is not None}, step=record['iter'])

    def step(self, record, steps_left):
        """One step is done; `record` is its line for the log, or None."""
        text = ''
        if self.on and record:
            mfu = f", mfu {record['mfu']:.1%}" if record['mfu'] else ''
            text = (f"loss {record['loss']:.4f}, lr {record['lr']:.2e}, grad norm {record['grad_norm']:.3f}, "
                    f"{record['ms']:.1f} ms, {short(record['tokens_per_second'])} tokens/s{mfu}")
            self.log(record)
            if self.bar is None:
                self.say(f"iter {record['iter']}: {text}, {seconds(steps_left * record['ms'] / 1e3)} left")
        if self.bar is not None:
            if text:
                self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()

    def evaluation(self, record):
        """Print and log what an evaluation found."""
        bpb = f" ({record['val_bpb']:.4f} bits per byte)" if record['val_bpb'] else ''
        self.say(f"step {record['iter']}: train loss {record['train_loss']:.4f}, val loss {record['val_loss']:.4f}{bpb}, "
                 f"{seconds(record['train_seconds'])} of training")
        self.log(record)

    def close(self):
        if self.bar is not None:
            self.bar.close()
        if self.wandb:
            self.wandb.finish()


def _has_login(wandb):
    try:
        return wandb.login(prompt=False, verify=False)
    except TypeError:       # wandb < 0.30 has no prompt=
        return bool(wandb.api.api_key)
    except wandb.errors.Error:
        return False


class Stopwatch:
    """The time that steps take, without what happens between `pause` and `go_on`; `total` is in seconds."""

    def __init__(self, device, total=0.0):
        self.device, self.total, self.steps, self.since = device, total, 0, time.perf_counter()

    def step(self):
        self.steps += 1

    def lap(self):
        """Seconds per step since the last lap; waits until the device is done with them."""
        synchronize(self.device)
        now, steps = time.perf_counter(), max(1, self.steps)
        took, self.since, self.steps = now - self.since, now, 0
        self.total += took
        return took / steps

    pause = lap

    def go_on(self):
        self.since = time.perf_counter()


def _is_before(line, start_iter, done_eval):
    """Whether a line of metrics.jsonl tells of what a run that resumes at start_iter has behind it."""
    try:
        record = json.loads(line)
        return record['iter'] <= done_eval if 'val_loss' in record else record['iter'] < start_iter
    except (ValueError, KeyError, TypeError):
        return False    # the half line of a run that was killed


def seconds(t):
    """A duration for people: 41 s, 3:25 min, 7:03 h."""
    t = round(t)
    return f"{t} s" if t < 60 else f"{t // 60}:{t % 60:02} min" if t < 3600 else f"{t // 3600}:{t % 3600 // 60:02} h"


def short(n):
    """A count for people: 950, 12.3k, 1.24M, 3.1B."""
    for size, unit in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"
