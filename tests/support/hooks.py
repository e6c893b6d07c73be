"""Functions that break or watch something inside a process of `forked`, before its script runs."""

import shutil
import sys
from pathlib import Path

import torch

from support.scripts import is_of_the_project
from training import checkpoint


def both(*hooks):
    for hook in hooks:
        hook()


class AskedForCuda(BaseException):
    """Not an Exception: nothing recovers from it."""


def forbid_cuda():
    """Be on a machine whose GPU must be left alone, because another program has all of it, say.

    torch itself may ask whether there is one; the project may not, and whatever would initialize
    CUDA ends the process.
    """

    def is_available():
        path = Path(sys._getframe(1).f_code.co_filename).resolve()
        if is_of_the_project(path):
            raise AskedForCuda(f"torch.cuda.is_available, by {path.name}")
        return True

    def forbidden(name):
        def function(*args, **kwargs):
            raise AskedForCuda(f"torch.cuda.{name}")

        return function

    harmless = dict(
        is_available=is_available,
        is_initialized=lambda: False,
        device_count=lambda: 1,
        is_current_stream_capturing=lambda: False,
    )
    for name, value in list(vars(torch.cuda).items()):
        is_its_own = str(getattr(value, '__module__', '')).startswith('torch.cuda')
        if callable(value) and is_its_own and (name[0] != '_' or name == '_lazy_init'):
            setattr(torch.cuda, name, harmless.get(name) or forbidden(name))
    torch.backends.cuda.is_built = lambda: True


def around_saves(before=None, after=None):
    """Call before(out_dir, name, state) and after(…) around every checkpoint.save."""
    save = checkpoint.save

    def wrapped(out_dir, name, state):
        if before:
            before(out_dir, name, state)
        save(out_dir, name, state)
        if after:
            after(out_dir, name, state)

    checkpoint.save = wrapped


def keep_each(folder, out_dir, name, state):
    """For `around_saves`: out_dir as a kill would leave it behind this save, as folder/STEP."""
    if name == 'ckpt.pt':
        shutil.copytree(
            out_dir,
            Path(folder) / str(state['iter_num']),
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns('.lock', 'earlier-*'),
        )
