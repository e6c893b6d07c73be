"""Marks of tests that need what is not on every machine: optional packages, and files that tests may
not download."""

import importlib.util
import os
from pathlib import Path

import pytest

MIRROR = Path(os.environ.get('NANOGPT_MIRROR') or '/nowhere')
VOCABULARY = Path(os.environ.get('TIKTOKEN_CACHE_DIR') or '/nowhere')

needs_shakespeare = pytest.mark.skipif(
    not (MIRROR / 'shakespeare/input.txt').is_file(), reason="NANOGPT_MIRROR has no Shakespeare"
)
needs_gpt2 = pytest.mark.skipif(
    not VOCABULARY.is_dir(), reason="TIKTOKEN_CACHE_DIR has no vocabulary"
)


def needs(package):
    """A mark: the test is skipped where an optional package is not installed."""
    is_missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(is_missing, reason=f"could not import '{package}'")
