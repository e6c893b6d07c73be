"""What a run tells: console lines and progress bars, metrics.jsonl, wandb, TensorBoard. On the
master process only."""

import difflib
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from system import files
from system.device import synchronize

LOGGERS = 'tensorboard', 'wandb'  # each also the name of its package

# OpenAI's models: parameters, and nanoGPT's figures for them on OpenWebText (README.md there,
# "baselines"): train and validation loss, nats per token in windows of 1,024.
PUBLISHED = {
    'gpt2': (124_439_808, 3.11, 3.12),
    'gpt2-medium': (354_823_168, 2.85, 2.84),
    'gpt2-large': (774_030_080, 2.66, 2.67),
    'gpt2-xl': (1_557_611_200, 2.56, 2.54),
}


class Metrics:
    """The log of one run in `out_dir`; `on` is false on processes that stay silent.

    start_iter, done_eval: of a resumed run, whose earlier lines of metrics.jsonl are kept up to
    there.
    """

    def __init__(self, out_dir, on, max_iters, start_iter=0, done_eval=-1):
        self.on, self.start_iter, self.loggers, self.wandb_id, self.bar = (
            on,
            start_iter,
            [],
            None,
            None,
        )
        if not on:
            return
        self.path = Path(out_dir) / 'metrics.jsonl'
        self.kept = self._keep_until(start_iter, done_eval)
        if sys.stderr.isatty():
            self.bar = tqdm(
                total=max_iters, initial=start_iter, unit='it', dynamic_ncols=True, smoothing=0.05
            )

    def _lines(self):
        return (
            self.path.read_text(encoding='utf-8', errors='replace').splitlines()
            if self.path.exists()
            else []
        )

    def _keep_until(self, start_iter, done_eval):
        kept = [line for line in self._lines() if _is_before(line, start_iter, done_eval)]
        with files.replacing(self.path) as file:
            file.writelines(line.encode() + b'\n' for line in kept)
        return kept

    def start(self, config, loggers, wandb_id=None):
        """Write config.json, and log to `loggers` too: a line says which can't be had. wandb_id: of
        a resumed run.

        One that has nothing of this run yet gets what metrics.jsonl has.
        """
        if not self.on:
            return
        with files.replacing(self.path.with_name('config.json')) as file:
            file.write(json.dumps(config, indent=1).encode())
        for name in loggers:
            try:
                write, close, since = (
                    self._open_wandb(config, wandb_id)
                    if name == 'wandb'
                    else self._open_tensorboard(self.path.with_name('tensorboard'))
                )
            except ImportError:
                self.say(
                    f"{name} is not installed (pip install {name}): going on without it; metrics.jsonl has everything"
                )
            except RuntimeError as error:
                self.say(
                    f"{name} does not start ({' '.join(str(error).split())[:120]}): going on without it"
                )
            else:
                for record in map(json.loads, self.kept):
                    if record['iter'] >= since:
                        write(record)
                self.loggers.append((write, close))
        del self.kept

    def _open_wandb(self, config, run_id):
        """(write, close, the first step to write); without a login offline, which is said."""
        import wandb

        mode = None
        if 'WANDB_MODE' not in os.environ and not _has_login(wandb):
            mode = 'offline'
            self.say(
                "wandb has no login (`wandb login` makes one): going on offline; `wandb sync` sends the run later"
            )
        try:
            run = wandb.init(
                project=config['wandb_project'],
                name=config['wandb_run_name'],
                config=config,
                id=run_id,
                resume='allow',
                mode=mode,
            )
        except wandb.errors.Error as error:
            raise RuntimeError(error) from None
        self.wandb_id = run.id

        def write(record):
            run.log(
                {
                    k: wandb.Histogram(v) if isinstance(v, np.ndarray) else v
                    for k, v in record.items()
                    if v is not None
                },
                step=record['iter'],
            )

        return write, run.finish, self.start_iter if run_id else 0

    def _open_tensorboard(self, folder):
        """(write, close, the first step to write); what the folder has of later steps is hidden
        from now on."""
        from torch.utils.tensorboard import SummaryWriter

        since = self.start_iter if folder.exists() else 0
        writer = SummaryWriter(folder, purge_step=since)

        def write(record):
            for key in record.keys() - {'iter'}:
                if record[key] is not None:
                    add = (
                        writer.add_histogram
                        if isinstance(record[key], np.ndarray)
                        else writer.add_scalar
                    )
                    add(key, record[key], record['iter'])
            writer.flush()  # a run that is killed loses no point

        return write, writer.close, since

    def say(self, text):
        """Print a line, above the progress bar where there is one."""
        if self.on:
            tqdm.write(text) if self.bar else print(text, flush=True)

    def log(self, record):
        """Add one line to metrics.jsonl, and the record to the loggers; numbers that are not finite
        become null."""
        if not self.on:
            return
        record = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        try:
            with open(self.path, 'a', encoding='utf-8') as file:
                file.write(json.dumps(record) + '\n')
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror}") from None
        for write, _ in self.loggers:
            write(record)

    def histograms(self, step, samples):
        """Show the loggers how the values of {name: array} are distributed."""
        for write, _ in self.loggers if samples else ():
            write({'iter': step} | samples)

    def step(self, record, steps_left):
        """One step is done; `record` is its line for the log, or None."""
        text = ''
        if self.on and record:
            mfu = f", mfu {record['mfu']:.1%}" if record['mfu'] else ''
            text = (
                f"loss {record['loss']:.4f}, lr {record['lr']:.2e}, grad norm {record['grad_norm']:.3f}, "
                f"{record['ms']:.1f} ms, {short(record['tokens_per_second'])} tokens/s{mfu}"
            )
            self.log(record)
            if self.bar is None:
                self.say(
                    f"iter {record['iter']}: {text}, {seconds(steps_left * record['ms'] / 1e3)} left"
                )
        if self.bar is not None:
            if text:
                self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()

    def evaluation(self, iter_num, tokens_per_step, losses, data, train_seconds, wall_seconds):
        """Print and log what an evaluation found: losses is {'train': nats per token, 'val': …} on
        `data`."""
        val_bpb = data.bits_per_byte('val', losses['val'])
        bpb = f" ({val_bpb:.4f} bits per byte)" if val_bpb else ''
        self.say(
            f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}{bpb}, "
            f"{seconds(train_seconds)} of training"
        )
        self.log(
            dict(
                iter=iter_num,
                tokens=iter_num * tokens_per_step,
                train_loss=losses['train'],
                val_loss=losses['val'],
                val_bpb=val_bpb,
                train_seconds=train_seconds,
                wall_seconds=wall_seconds,
            )
        )

    def stopped(self, out_dir, iter_num):
        """A signal has ended the run: say how it goes on, and leave the file `preempted` for
        whoever started it."""
        command = f"python train.py --init_from=resume --out_dir={out_dir}"
        if os.environ.get('WORLD_SIZE', '1') != '1':
            command = "the same command with --init_from=auto"
        self.say(f"saved at step {iter_num}; to go on: {command}")
        if self.on:
            with files.replacing(self.path.with_name('preempted')) as file:
                file.write(f"saved at step {iter_num}\n".encode())

    def skipped(self, step, guard):
        """Print and log the update of `step` if the guard finds now that it was skipped."""
        skipped = guard.last_skipped()
        if skipped is None:
            return
        n = guard.now.skipped
        self.say(
            f"step {step}: loss {skipped.loss:.4f}, update skipped: {skipped.reason} ({n} so far)"
        )
        self.log(dict(iter=step, bad_loss=skipped.loss, skipped=n))

    def rewind(self, iter_num, progress):
        """The run goes on from iter_num again: what was logged since is taken back, and a line says
        why."""
        if not self.on:
            return
        at, offset = progress['diverged_at'], progress['data_offset']
        self._keep_until(iter_num, progress['evaluated'])
        self.say(
            f"diverged before step {at}: back to the checkpoint of step {iter_num}; the data continue {offset} steps "
            "ahead"
        )
        self.log(dict(iter=iter_num - 1, diverged_at=at, data_offset=offset))
        if self.bar is not None:
            self.bar.reset(self.bar.total)
            self.bar.update(iter_num)

    def close(self):
        if self.bar is not None:
            self.bar.close()
        for _, close in self.loggers:
            close()


def loggers(log_to, wandb_log=False):
    """The names in `log_to`, which commas separate, and wandb if nanoGPT's setting wants it. Raises
    ValueError."""
    names = [name.strip() for name in log_to.split(',') if name.strip()]
    for name in names:
        if name not in LOGGERS:
            (near,) = difflib.get_close_matches(name.lower(), LOGGERS, n=1, cutoff=0)
            raise ValueError(
                f"log_to={log_to!r}: there is no {name!r}; the nearest is {near!r} (metrics.jsonl is always "
                "written)"
            )
    return sorted({*names, 'wandb'} if wandb_log else set(names))


def progress_bar(items, what):
    """`items`, with a bar on a terminal that is gone when they are done."""
    return tqdm(
        items,
        what,
        leave=False,
        dynamic_ncols=True,
        disable=None if os.environ.get('RANK', '0') == '0' else True,
    )


def _has_login(wandb):
    try:
        return wandb.login(prompt=False, verify=False)
    except TypeError:  # wandb < 0.30 has no prompt=
        return bool(wandb.api.api_key)
    except wandb.errors.Error:
        return False


def plan(config, model, data, tokens_per_step, max_iters, iter_num, machine):
    """What a run with the settings `config` will do, as lines. machine: (type of device, dtype,
    threads)."""
    c, windows = config, f"{config['batch_size']} x {config['block_size']}"
    if c['eval_only']:
        todo = f"evaluation: of each split {c['eval_iters']} x {windows} tokens, or all where that is less"
    elif model.fit:
        todo = f"one pass, which counts: {tokens_per_step:,} tokens"
    else:
        places = c['gradient_accumulation_steps'] * c['batch_size'] * c['block_size']
        padded = '' if tokens_per_step == places else f"{places:,} places, of which about "
        todo = (
            f"steps: {max(0, max_iters - iter_num):,} of {c['gradient_accumulation_steps']} x {windows} = "
            f"{padded}{tokens_per_step:,} tokens, {data.epochs(max_iters * tokens_per_step)} in all"
        )
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    part = (
        f", {short(n_trained)} of them trained (lora_rank={c['lora_rank']})"
        if c.get('lora_rank')
        else ''
    )
    learned = data.meta.get('splits', {}).get('train', {}).get('learned')
    learned = f" ({learned:,} of them learned)" if learned else ''
    return '\n'.join(
        [
            f"model: {c['model']}, {short(model.num_params())} parameters{part}, from {c['init_from']}",
            f"data: {c['dataset']}, {data.tokens['train']:,} tokens to train on{learned}, {data.tokens['val']:,} to "
            "validate on",
            todo,
            "machine: {} x {}, {}, {} threads".format(os.environ.get('WORLD_SIZE', 1), *machine),
        ]
    )


def evaluation_table(name, model, losses, data):
    """The losses of `model` on `data` as aligned lines, beside the published figures where those
    are of such data."""
    known = (
        PUBLISHED
        if (data.folder.name, data.vocab_size, data.block_size) == ('openwebtext', 50257, 1024)
        else {}
    )
    found = {f'{split} loss': f"{loss:.4f}" for split, loss in losses.items()}
    if bpb := data.bits_per_byte('val', losses['val']):
        found['bits per byte'] = f"{bpb:.4f}"
    rows = [['model', 'parameters', *found, *(['published: train', 'val'] if known else [])]]
    for row in {**known, name: None}:
        n, *figures = known.get(row, (0, '-', '-') if known else (0,))
        cells = (
            [short(model.num_params()), *found.values()]
            if row == name
            else [short(n), *'-' * len(found)]
        )
        rows.append([row, *cells, *map(str, figures)])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join(
        '  '.join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


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


def _is_before(line, start_iter, done_eval):
    """Whether a line of metrics.jsonl tells of what a run that resumes at start_iter has behind
    it."""
    try:
        record = json.loads(line)
        return record['iter'] <= done_eval if 'val_loss' in record else record['iter'] < start_iter
    except (ValueError, KeyError, TypeError, RecursionError):
        return False  # the half line of a run that was killed


def seconds(t):
    """A duration for people: 41 s, 3:25 min, 7:03 h."""
    t = round(t)
    return (
        f"{t} s"
        if t < 60
        else f"{t // 60}:{t % 60:02} min"
        if t < 3600
        else f"{t // 3600}:{t % 3600 // 60:02} h"
    )


def short(n):
    """A count for people: 950, 12.3k, 1.24M, 3.1B."""
    for size, unit in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"
