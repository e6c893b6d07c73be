"""The project's scripts, run as a user runs them: each in a new process."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The smallest run that still has every part: dropout, accumulation, several evaluations.
TINY = [
    '--model=gpt',
    '--n_layer=1',
    '--n_head=2',
    '--n_embd=16',
    '--block_size=16',
    '--batch_size=4',
    '--device=cpu',
    '--gradient_accumulation_steps=2',
    '--dropout=0.1',
    '--max_iters=6',
    '--lr_decay_iters=6',
    '--warmup_iters=2',
    '--eval_interval=3',
    '--eval_iters=2',
    '--learning_rate=1e-2',
    '--compile=False',
    '--dtype=float32',
]


def with_gpus(environment):
    """A copy of `environment` in which the GPUs are visible that the suite hides."""
    environment = dict(environment)
    visible = environment['NANOGPT_TEST_GPUS']
    if visible == 'all':
        environment.pop('CUDA_VISIBLE_DEVICES', None)
    else:
        environment['CUDA_VISIBLE_DEVICES'] = visible
    return environment


def run(
    script,
    *arguments,
    processes=1,
    torchrun=False,
    gpu=False,
    env=None,
    cwd=ROOT,
    timeout=120,
    stdin=None,
):
    """Run a script of the project on the text `stdin`; returns its CompletedProcess with text
    output.

    torchrun: by torchrun, also a single process. gpu: with the GPUs that the suite hides.
    """
    command = [sys.executable]
    environment = {**os.environ, 'PYTHONPATH': '', 'WANDB_MODE': 'offline', **(env or {})}
    if gpu:
        environment = with_gpus(environment)
    if torchrun or processes > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    else:
        environment.setdefault('OMP_NUM_THREADS', '1')  # tiny tensors: threads only cost
    return subprocess.run(
        [*command, script, *map(str, arguments)],
        capture_output=True,
        text=True,
        input=stdin,
        env=environment,
        cwd=cwd,
        timeout=timeout,
    )


def is_of_the_project(path):
    """Whether a module's file is a part of nanogpt, and not a test or a library."""
    path = Path(path)
    folders = ['system', 'text', 'models', 'interop', 'generation', 'training']
    return path.parent == ROOT or any(path.is_relative_to(ROOT / folder) for folder in folders)
