"""What the tests share: a small dataset, and the scripts run as a user runs them."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if 'PYTEST_XDIST_WORKER' in os.environ:     # a worker per core
    torch.set_num_threads(1)

# The smallest run that still has every part: dropout, accumulation, several evaluations.
TINY = ['--model=gpt', '--n_layer=1', '--n_head=2', '--n_embd=16', '--block_size=16', '--batch_size=4', '--device=cpu',
        '--gradient_accumulation_steps=2', '--dropout=0.1', '--max_iters=6', '--lr_decay_iters=6', '--warmup_iters=2',
        '--eval_interval=3', '--eval_iters=2', '--learning_rate=1e-2', '--compile=False', '--dtype=float32']


def run(script, *arguments, processes=1, env=None, cwd=ROOT, timeout=120, stdin=None):
    """Run a script of the project on the text `stdin`; returns its CompletedProcess with text output."""
    command = [sys.executable] if processes == 1 else [
        sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    environment = {**os.environ, 'PYTHONPATH': '', 'WANDB_MODE': 'offline', **(env or {})}
    if processes == 1:
        environment.setdefault('OMP_NUM_THREADS', '1')      # tiny tensors: threads only cost
    return subprocess.run([*command, script, *map(str, arguments)], capture_output=True, text=True, input=stdin,
                          env=environment, cwd=cwd, timeout=timeout)


def write_text(folder, text):
    """Make `folder` a dataset of `text` by characters, nine tenths to train on."""
    from bins import write_bins
    from tokenizer import CharTokenizer
    folder.mkdir(parents=True, exist_ok=True)
    cut = len(text) * 9 // 10
    write_bins(folder, CharTokenizer.of(text), {'train': [text[:cut]], 'val': [text[cut:]]})
    return folder


@pytest.fixture(scope='session')
def text_folder(tmp_path_factory):
    """A dataset folder of 4,000 characters of this file, for --dataset=PATH."""
    return write_text(tmp_path_factory.mktemp('data') / 'text', Path(__file__).read_text()[:2000] * 2)


@pytest.fixture(scope='session')
def trained(text_folder, tmp_path_factory):
    """The out_dir of a tiny finished run. Tests that change it copy it first."""
    out_dir = tmp_path_factory.mktemp('trained') / 'out'
    done = run('train.py', *TINY, f'--dataset={text_folder}', f'--out_dir={out_dir}')
    assert done.returncode == 0, done.stderr
    return out_dir


def same(a, b):
    """Whether two nested structures are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b
