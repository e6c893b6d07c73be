"""The log of a run: metrics.jsonl, and the loggers that it is also sent to: TensorBoard, wandb."""

import difflib
import json
import math
import os
import time
from pathlib import Path

import numpy as np

from system import files
from system.device import synchronize


class Metrics:
    """The log of one run in `out_dir`; with `is_on` false, as on all processes but one, it does
    nothing.

    start_iter, done_eval: of a resumed run, whose earlier lines of metrics.jsonl are kept up to
    there.
    """

    def __init__(self, out_dir, is_on, start_iter=0, done_eval=-1):
        self.is_on = is_on
        self.start_iter = start_iter
        self.loggers = []
        self.path = Path(out_dir) / 'metrics.jsonl'
        if is_on:
            self._keep_until(start_iter, done_eval)

    def start(self, config, loggers, wandb_id=None):
        """Write config.json, and open `loggers`, names of LOGGERS; print which can't be opened.

        A logger that has nothing of this run yet gets what metrics.jsonl has. wandb_id: of a
        resumed run.
        """
        if not self.is_on:
            return
        with files.replacing(self.path.with_name('config.json')) as file:
            file.write(json.dumps(config, indent=1).encode())
        for name in loggers:
            try:
                logger = LOGGERS[name](config, self.path.parent, self.start_iter, wandb_id)
            except ImportError:
                print(
                    f"{name} is not installed (pip install {name}): going on without it; "
                    "metrics.jsonl has everything",
                    flush=True,
                )
                continue
            except RuntimeError as error:
                reason = ' '.join(str(error).split())[:120]
                print(f"{name} does not start ({reason}): going on without it", flush=True)
                continue
            for record in map(json.loads, self._lines()):
                if record['iter'] >= logger.first_step:
                    logger.log(record)
            self.loggers.append(logger)

    @property
    def wandb_id(self):
        """The run's id at wandb, under which it continues there when it is resumed, or None."""
        for logger in self.loggers:
            if isinstance(logger, Wandb):
                return logger.run.id
        return None

    def log(self, record):
        """Add one line to metrics.jsonl, and the record to the loggers; numbers that are not finite
        become null."""
        if not self.is_on:
            return
        record = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        try:
            with open(self.path, 'a', encoding='utf-8') as file:
                file.write(json.dumps(record) + '\n')
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror}") from None
        for logger in self.loggers:
            logger.log(record)

    def histograms(self, step, samples):
        """Show the loggers how the values of {name: array} are distributed."""
        if not samples:
            return
        for logger in self.loggers:
            logger.log({'iter': step} | samples)

    def rewind(self, iter_num, progress):
        """Remove what was logged since step iter_num, from which the run continues after it
        diverged."""
        if not self.is_on:
            return
        self._keep_until(iter_num, progress.evaluated)
        self.log(
            dict(
                iter=iter_num - 1,
                diverged_at=progress.diverged_at,
                data_offset=progress.data_offset,
            )
        )

    def close(self):
        for logger in self.loggers:
            logger.close()

    def _lines(self):
        if not self.path.exists():
            return []
        return self.path.read_text(encoding='utf-8', errors='replace').splitlines()

    def _keep_until(self, start_iter, done_eval):
        kept = [line for line in self._lines() if _is_before(line, start_iter, done_eval)]
        with files.replacing(self.path) as file:
            file.writelines(line.encode() + b'\n' for line in kept)


def _is_before(line, start_iter, done_eval):
    """Whether a line of metrics.jsonl tells of what a run that resumes at start_iter has behind
    it."""
    try:
        record = json.loads(line)
        return record['iter'] <= done_eval if 'val_loss' in record else record['iter'] < start_iter
    except (ValueError, KeyError, TypeError, RecursionError):
        return False  # the half line of a run that was killed


# ---- loggers -------------------------------------------------------------------------------------
#
# Each is a class with an entry in LOGGERS; the name there is that of its package. It is made of the
# run's settings, its out_dir, the step that the run starts or resumes from, and the id that wandb
# knows a resumed run by; ImportError: its package is missing; RuntimeError: it does not start.
# `first_step`: the logger has the records of earlier steps already.


class TensorBoard:
    """Event files in out_dir/tensorboard; when a run is resumed, what they have of later steps is
    hidden."""

    def __init__(self, config, out_dir, start_iter, wandb_id):
        from torch.utils.tensorboard import SummaryWriter

        folder = out_dir / 'tensorboard'
        self.first_step = start_iter if folder.exists() else 0
        self.writer = SummaryWriter(folder, purge_step=self.first_step)

    def log(self, record):
        for key, value in record.items():
            if key == 'iter' or value is None:
                continue
            if isinstance(value, np.ndarray):
                self.writer.add_histogram(key, value, record['iter'])
            else:
                self.writer.add_scalar(key, value, record['iter'])
        self.writer.flush()  # a run that is killed loses no point

    def close(self):
        self.writer.close()


class Wandb:
    """Weights & Biases; without a login offline, which a line says."""

    def __init__(self, config, out_dir, start_iter, wandb_id):
        import wandb

        mode = None
        if 'WANDB_MODE' not in os.environ and not _has_login(wandb):
            mode = 'offline'
            print(
                "wandb has no login (`wandb login` makes one): going on offline; "
                "`wandb sync` sends the run later",
                flush=True,
            )
        try:
            self.run = wandb.init(
                project=config['wandb_project'],
                name=config['wandb_run_name'],
                config=config,
                id=wandb_id,
                resume='allow',
                mode=mode,
            )
        except wandb.errors.Error as error:
            raise RuntimeError(error) from None
        self.first_step = start_iter if wandb_id else 0
        self.wandb = wandb

    def log(self, record):
        values = {}
        for key, value in record.items():
            if isinstance(value, np.ndarray):
                value = self.wandb.Histogram(value)
            if value is not None:
                values[key] = value
        self.run.log(values, step=record['iter'])

    def close(self):
        self.run.finish()


LOGGERS = {'tensorboard': TensorBoard, 'wandb': Wandb}


def _has_login(wandb):
    try:
        return wandb.login(prompt=False, verify=False)
    except TypeError:  # wandb < 0.30 has no prompt=
        return bool(wandb.api.api_key)
    except wandb.errors.Error:
        return False


def logger_names(log_to, wandb_log=False):
    """The names in `log_to`, which commas separate, and wandb if nanoGPT's setting wants it. Raises
    ValueError."""
    names = {name.strip() for name in log_to.split(',') if name.strip()}
    for name in names:
        if name not in LOGGERS:
            (near,) = difflib.get_close_matches(name.lower(), LOGGERS, n=1, cutoff=0)
            raise ValueError(
                f"log_to={log_to!r}: there is no {name!r}; the nearest is {near!r} "
                "(metrics.jsonl is always written)"
            )
    if wandb_log:
        names.add('wandb')
    return sorted(names)


# ---- time ----------------------------------------------------------------------------------------


class Stopwatch:
    """The time that steps take, without what happens between `pause` and `go_on`; `total` is in
    seconds."""

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
