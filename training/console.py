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
        """Show that one step is done; `record` is its line of the log, or None.

        record: with loss, lr, grad_norm, ms, tokens_per_second and mfu.
        """
        if not self.is_on:
            return
        if record:
            text = (
                f"loss {record['loss']:.4f}, lr {record['lr']:.2e}, "
                f"grad norm {record['grad_norm']:.3f}, {record['ms']:.1f} ms, "
                f"{short(record['tokens_per_second'])} tokens/s"
            )
            if record['mfu']:
                text += f", mfu {record['mfu']:.1%}"
            if self.bar is None:
                seconds_left = steps_left * record['ms'] / 1e3
                self.print(f"iter {record['iter']}: {text}, {seconds(seconds_left)} left")
            else:
                self.bar.set_postfix_str(text, refresh=False)
        if self.bar is not None:
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
            f"diverged before step {progress.diverged_at}: back to the checkpoint of step "
            f"{iter_num}; the data continue {progress.data_offset} steps ahead"
        )
        if self.bar is not None:
            self.bar.reset(self.bar.total)
            self.bar.update(iter_num)

    def stopped(self, out_dir, iter_num):
        """Print how to continue a run that a signal has stopped."""
        command = f"python train.py --init_from=resume --out_dir={out_dir}"
        if os.environ.get('WORLD_SIZE', '1') != '1':
            command = "the same command with --init_from=auto"
        self.print(f"saved at step {iter_num}; to continue: {command}")

    def close(self):
        if self.bar is not None:
            self.bar.close()


# ---- before and beside the training loop ---------------------------------------------------------


def progress_bar(items, what):
    """Iterate over `items` with a bar on a terminal, which disappears at the end; rank 0 only."""
    is_off = None  # unless this is a terminal
    if os.environ.get('RANK', '0') != '0':
        is_off = True
    return tqdm(items, what, leave=False, dynamic_ncols=True, disable=is_off)


def plan(config, model, data, machine, *, tokens_per_step, max_iters, iter_num):
    """What a run with the settings `config` will do: its model, data, steps and machine, a line
    each.

    data: the opened dataset. machine: the Machine of the run. iter_num: the step it begins with.
    """
    n_params = f"{short(model.num_params())} parameters"
    if config.get('lora_rank'):
        n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        n_params += f", {short(n_trained)} of them trained (lora_rank={config['lora_rank']})"

    n_tokens = f"{data.tokens['train']:,} tokens to train on"
    n_learned = data.meta.get('splits', {}).get('train', {}).get('learned')  # chats mask some
    if n_learned:
        n_tokens += f" ({n_learned:,} of them learned)"

    batch = f"{config['batch_size']} x {config['block_size']}"
    if config['eval_only']:
        steps = (
            f"evaluation: of each split {config['eval_iters']} x {batch} tokens, "
            "or all where that is less"
        )
    elif model.fit:
        steps = f"one pass, which counts: {tokens_per_step:,} tokens"
    else:
        steps = _steps(config, batch, tokens_per_step, max(0, max_iters - iter_num))
        steps += f", {data.epochs(max_iters * tokens_per_step)} in all"

    n_processes = os.environ.get('WORLD_SIZE', 1)
    return '\n'.join(
        [
            f"model: {config['model']}, {n_params}, from {config['init_from']}",
            f"data: {config['dataset']}, {n_tokens}, {data.tokens['val']:,} to validate on",
            steps,
            f"machine: {n_processes} x {machine.device_type}, {machine.dtype}, "
            f"{machine.threads} threads",
        ]
    )


def _steps(config, batch, tokens_per_step, n_steps):
    """How many steps there are, and of how many tokens each."""
    n_micros = config['gradient_accumulation_steps']
    places = n_micros * config['batch_size'] * config['block_size']
    size = f"{tokens_per_step:,} tokens"
    if tokens_per_step != places:  # windows are padded
        size = f"{places:,} places, of which about {size}"
    return f"steps: {n_steps:,} of {n_micros} x {batch} = {size}"


def evaluation_table(name, model, losses, data):
    """The losses {split: nats per token} of `model`, called `name`, on `data` as an aligned table.

    On OpenWebText with GPT-2's tokenizer and context the published figures stand beside them.
    """
    published = {}
    if (data.folder.name, data.vocab_size, data.block_size) == ('openwebtext', 50257, 1024):
        published = PUBLISHED
    measured = {f'{split} loss': f"{loss:.4f}" for split, loss in losses.items()}
    val_bpb = data.bits_per_byte('val', losses['val'])
    if val_bpb:
        measured['bits per byte'] = f"{val_bpb:.4f}"

    header = ['model', 'parameters', *measured]
    if published:
        header += ['published: train', 'val']
    rows = [header]
    names = list(published)
    if name not in names:
        names.append(name)
    for row_name in names:
        n_params, *figures = published.get(row_name, (None, '-', '-'))
        if row_name == name:
            row = [name, short(model.num_params()), *measured.values()]
        else:
            row = [row_name, short(n_params), *['-'] * len(measured)]
        if published:
            row += [str(figure) for figure in figures]
        rows.append(row)
    return _aligned(rows)


def _aligned(rows):
    """Rows of strings as text, the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        lines.append('  '.join(cells))
    return '\n'.join(lines)


# ---- numbers for people --------------------------------------------------------------------------


def seconds(t):
    """A duration in seconds for people: 41 s, 3:25 min, 7:03 h."""
    t = round(t)
    if t < 60:
        return f"{t} s"
    if t < 3600:
        return f"{t // 60}:{t % 60:02} min"
    return f"{t // 3600}:{t % 3600 // 60:02} h"


def short(n):
    """A count for people: 950, 12.3k, 1.24M, 3.1B."""
    for size, unit in ((1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.0f}"
