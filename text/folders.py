"""Where datasets are: data/NAME, or any folder by its path."""

import os
import re
from pathlib import Path

DATA_FOLDER = Path(__file__).resolve().parents[1] / 'data'


def is_path(name):
    """Whether a dataset's name is a path from where the user stands, not a plain name in data/."""
    return re.search(r'[/\\]|^[.~]|^[A-Za-z]:', str(name)) is not None


def folder_of(name):
    """The folder of a dataset, data/NAME or a path (see is_path); the other if only that exists.

    A name with a dot in front is a path and nothing else: ./mine is not data/mine.
    """
    first, second = DATA_FOLDER / name, Path(name)
    if is_path(name):
        first, second = Path(os.path.expanduser(name)), DATA_FOLDER / name
    # Unlike Path.is_dir, os.path.isdir is False of a name that no folder can have.
    is_only_path = str(name).startswith('.')
    if os.path.isdir(second) and not os.path.isdir(first) and not is_only_path:
        return second
    return first
