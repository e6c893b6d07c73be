"""What a run leaves behind, and whether two runs left the same, to the bit."""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch

from training import checkpoint


def same(a, b):
    """Whether two nested structures are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def metrics(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / 'metrics.jsonl').read_text().splitlines()]


def losses(out_dir):
    """What a run measured, without the times."""
    keep = ('iter', 'loss', 'lr', 'grad_norm', 'tokens', 'train_loss', 'val_loss', 'skipped')
    return [{k: line[k] for k in keep if k in line} for line in metrics(out_dir)]


def sha256(value):
    """One sum over a nested structure of plain types and tensors, to the bit."""
    digest = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            digest.update(f'{value.dtype} {tuple(value.shape)}'.encode())
            digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(f'{key!r}:'.encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            digest.update(f'[{len(value)}'.encode())
            for item in value:
                add(item)
        else:
            digest.update(f'{value!r},'.encode())

    add(value)
    return digest.hexdigest()


def learned(out_dir):
    """All of a run's last state that training changes, times left out."""
    state = checkpoint.read(Path(out_dir) / 'ckpt.pt')
    if shards := state.pop('shards', None):
        from training import fsdp

        state |= fsdp.read_whole_state(shards['out_dir'], shards)
    kept = {k: state[k] for k in ('model', 'optimizer', 'scaler', 'iter_num', 'best_val_loss')}
    progress = dict(state['progress'])
    for field in dataclasses.fields(checkpoint.Progress):
        if 'without_effect' in field.metadata:
            progress.pop(field.name, None)
    return kept | {'progress': progress}


def outcome(out_dir):
    """What must be equal where nothing was lost: the sum of all that was learned, and every line
    that was measured."""
    return sha256(learned(out_dir)), losses(out_dir)
