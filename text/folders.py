"""Where datasets are: data/NAME, or any folder by its path."""

import os
import re
from pathlib import Path

DATA_FOLDER = Path(__file__).resolve().parents[1] / 'data'


def is_path(name):
    """Whether a dataset's name is a path from the current folder, not a plain name in data/."""
    return re.search(r'[/\\]|^[.~]|^[A-Za-z]:', str(name)) is not None


def folder_of(name):
    """The folder of a dataset, data/NAME or a path (see is_path); the other one if only that
    exists.

    A name that begins with a dot is a path and nothing else: ./mine is not data/mine.
    """
    if is_path(name):
        first = Path(os.path.expanduser(name))
        second = DATA_FOLDER / name
    else:
        first = DATA_FOLDER / name
        second = Path(name)
    if str(name).startswith('.'):
        return first
    # Unlike Path.is_dir, os.path.isdir returns False for a name that no folder can have.
    if os.path.isdir(second) and not os.path.isdir(first):
        return second
    return first
