"""What a run prints: its plan, a line or a progress bar while it trains, the table of an
evaluation."""

import os
import sys

from tqdm import tqdm

# OpenAI's models: parameters, and nanoGPT's figures for them on OpenWebText (README.md there,
# "baselines"): train and validation loss, nats per token in windows of 1,024.
PUBLISHED = {
    'gpt2': (124_439_808, 3.11, 3.12),
    'gpt2-medium': (354_823_168, 2.85, 2.84),
    'gpt2-large': (774_030_080, 2.66, 2.67),
    'gpt2-xl': (1_557_611_200, 2.56, 2.54),
}


class Console:
    """What a run prints while it trains; with `is_on` false, nothing.

    On a terminal a progress bar shows the steps, elsewhere each logged step is a line.
    """

    def __init__(self, is_on, max_iters, start_iter=0):
        self.is_on = is_on
        self.bar = None
        if is_on and sys.stderr.isatty():
            self.bar = tqdm(
                total=max_iters, initial=start_iter, unit='it', dynamic_ncols=True, smoothing=0.05
            )

    def print(self, text):
        """Print a line, above the progress bar where there is one."""
        if not self.is_on:
            return
        if self.bar is not None:
            tqdm.write(text)
        else:
            print(text, flush=True)

    def step(self, record, steps_left):
        """Show that one step is done; `record` is its line of the log, or None."""
        text = ''
        if self.is_on and record:
            mfu = f", mfu {record['mfu']:.1%}" if record['mfu'] else ''
            text = (
                f"loss {record['loss']:.4f}, lr {record['lr']:.2e}, "
                f"grad norm {record['grad_norm']:.3f}, {record['ms']:.1f} ms, "
                f"{short(record['tokens_per_second'])} tokens/s{mfu}"
            )
            if self.bar is None:
                seconds_left = steps_left * record['ms'] / 1e3
                self.print(f"iter {record['iter']}: {text}, {seconds(seconds_left)} left")
        if self.bar is not None:
            if text:
                self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()

    def evaluation(self, record):
        """Print the losses of an evaluation; `record` is its line of the log."""
        bits = ''
        if record['val_bpb']:
            bits = f" ({record['val_bpb']:.4f} bits per byte)"
        self.print(
            f"step {record['iter']}: train loss {record['train_loss']:.4f}, "
            f"val loss {record['val_loss']:.4f}{bits}, "
            f"{seconds(record['train_seconds'])} of training"
        )

    def skipped_update(self, step, loss, reason, n_skipped):
        """Print that the update of `step` was skipped, the last of n_skipped so far."""
        self.print(f"step {step}: loss {loss:.4f}, update skipped: {reason} ({n_skipped} so far)")

    def rewind(self, iter_num, progress):
        """Print that the run has diverged and continues from the checkpoint of step iter_num."""
        self.print(
            f"diverged before step {progress.diverged_at}: back to the checkpoint of step {iter_num}; "
            f"the data continue {progress.data_offset} steps ahead"
        )
        if self.bar is not None:
            self.bar.reset(self.bar.total)
            self.bar.update(iter_num)

    def stopped(self, out_dir, iter_num):
        """Print how a run that a signal has stopped is continued."""
        command = f"python train.py --init_from=resume --out_dir={out_dir}"
        if os.environ.get('WORLD_SIZE', '1') != '1':
            command = "the same command with --init_from=auto"
        self.print(f"saved at step {iter_num}; to go on: {command}")

    def close(self):
        if self.bar is not None:
            self.bar.close()


def progress_bar(items, what):
    """`items`, with a bar on a terminal that is gone when they are done."""
    return tqdm(
        items,
        what,
        leave=False,
        dynamic_ncols=True,
        disable=None if os.environ.get('RANK', '0') == '0' else True,
    )


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
