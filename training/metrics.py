"""The log of a run, metrics.jsonl, and the loggers that get its records too: TensorBoard, wandb."""

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
    """The log of the run in `out_dir`; with `is_on` false, as on all ranks but one, nothing.

    start_iter, done_eval: the step from which a resumed run continues, and that of its last
    evaluation; its lines of metrics.jsonl up to there are kept, the others removed.
    """

    def __init__(self, out_dir, is_on, start_iter=0, done_eval=-1):
        self.is_on = is_on
        self.start_iter = start_iter
        self.loggers = []
        self.path = Path(out_dir) / 'metrics.jsonl'
        if is_on:
            self._keep_until(start_iter, done_eval)

    def start(self, config, loggers, wandb_id=None):
        """Write config.json, and open `loggers`, names in LOGGERS; print which can't be opened.

        A logger that is new to a resumed run gets the run's earlier records. wandb_id: the run's id
        at wandb if it is resumed, else None.
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
                    f"{name} is not installed (pip install {name}): continuing without it; "
                    "metrics.jsonl has everything",
                    flush=True,
                )
                continue
            except RuntimeError as error:
                reason = ' '.join(str(error).split())[:120]
                print(f"{name} does not start ({reason}): continuing without it", flush=True)
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
        """Add `record`, with its step as 'iter', to metrics.jsonl and the loggers.

        NaN and infinity become null, as JSON has neither. Raises OSError.
        """
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
        """Send the loggers the `samples` {name: array of values} of step `step`, as histograms."""
        if not samples:
            return
        for logger in self.loggers:
            logger.log({'iter': step} | samples)

    def rewind(self, iter_num, progress):
        """Remove the records since step iter_num, to which a run that diverged was rolled back.

        A record of the step before says so, of the run's Progress `progress`.
        """
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
        """Remove the lines of later steps and evaluations."""
        kept = [line for line in self._lines() if _is_before(line, start_iter, done_eval)]
        with files.replacing(self.path) as file:
            file.writelines(line.encode() + b'\n' for line in kept)


def _is_before(line, start_iter, done_eval):
    """Whether a line of metrics.jsonl is of a step before start_iter, or an evaluation up to
    done_eval."""
    try:
        record = json.loads(line)
        if 'val_loss' in record:
            return record['iter'] <= done_eval
        return record['iter'] < start_iter
    except (ValueError, KeyError, TypeError, RecursionError):
        return False  # the half line of a run that was killed


# ---- loggers -------------------------------------------------------------------------------------
#
# A logger is a class with these methods, and an entry in LOGGERS under the name of its package. Its
# arguments are the run's settings, its out_dir as a Path, the step from which the run starts or
# resumes, and a resumed run's id at wandb. `first_step` is the first step whose records it does not
# have yet. It raises ImportError where its package is missing, RuntimeError where it can't start.


class TensorBoard:
    """Event files in out_dir/tensorboard; a resumed run hides what they have of later steps."""

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
        self.writer.flush()  # a run that is killed loses nothing

    def close(self):
        self.writer.close()


class Wandb:
    """A run at Weights & Biases; without a login it is kept offline, and a line says so."""

    def __init__(self, config, out_dir, start_iter, wandb_id):
        import wandb

        mode = None
        if 'WANDB_MODE' not in os.environ and not _has_login(wandb):
            mode = 'offline'
            print(
                "wandb has no login (`wandb login` sets one up): continuing offline; "
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
    """The names in `log_to`, separated by commas, sorted; with wandb_log, nanoGPT's setting, also
    wandb. Raises ValueError."""
    names = [name.strip() for name in log_to.split(',') if name.strip()]
    for name in names:
        if name not in LOGGERS:
            (near,) = difflib.get_close_matches(name.lower(), LOGGERS, n=1, cutoff=0)
            raise ValueError(
                f"log_to={log_to!r}: there is no {name!r}; the nearest is {near!r} "
                "(metrics.jsonl is always written)"
            )
    if wandb_log:
        names.append('wandb')
    return sorted(set(names))


# ---- time ----------------------------------------------------------------------------------------


class Stopwatch:
    """Measures the time that steps take, without what happens between `pause` and `go_on`."""

    def __init__(self, device, total=0.0):
        self.device = device
        self.total = total  # seconds of training, those of a resumed run included
        self.steps = 0  # since the last lap
        self.since = time.perf_counter()

    def step(self):
        """Count a step."""
        self.steps += 1

    def lap(self):
        """Seconds per step since the last lap; waits until the device has finished them."""
        synchronize(self.device)
        now = time.perf_counter()
        took = now - self.since
        steps = max(1, self.steps)
        self.since = now
        self.steps = 0
        self.total += took
        return took / steps

    pause = lap

    def go_on(self):
        """Start measuring again after `pause`."""
        self.since = time.perf_counter()
