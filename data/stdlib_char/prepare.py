"""The Python standard library's source by characters: on every machine already, so nothing is
downloaded.

    python data/stdlib_char/prepare.py

All .py files of the running interpreter's own library that are pure ASCII, its tests left out:
some 15 MB, under the PSF licence. Whole files go to a split, one in ten to validation, by the
sha256 of the seed and their name; in each split they stand in the order of their names. The corpus
is this Python version's: its sha256 is printed.
"""

import argparse
import hashlib
import sys
import sysconfig
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from system.errors import begin_script

if __name__ == '__main__':
    begin_script()  # before the imports, which take a second

from system.errors import fail, user_errors
from text.bins import write_bins
from text.tokenizer import CharTokenizer

DOWNLOAD_MB = 0
SEED = 1337
SKIPPED_FOLDERS = {
    'test',
    'tests',
    'idle_test',
    'site-packages',
    'dist-packages',
    '__pycache__',
    'lib2to3',
    'ensurepip',
}


def sources(root):
    """(name, text) of the corpus's files, in the order of their names."""
    for path in sorted(root.rglob('*.py'), key=lambda p: p.relative_to(root).as_posix()):
        name = path.relative_to(root).as_posix()
        content = path.read_bytes()
        is_skipped = SKIPPED_FOLDERS & set(name.split('/')) or path.is_symlink()
        if content and content.isascii() and not is_skipped:
            yield name, content.decode().replace('\r\n', '\n')


def in_val(name):
    """Whether the file belongs to the validation split."""
    return int(hashlib.sha256(f'{SEED}/{name}'.encode()).hexdigest(), 16) % 10 == 0


if __name__ == '__main__':
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.error = fail
    options.parse_args()
    with user_errors():
        corpus = list(sources(Path(sysconfig.get_path('stdlib'))))
        text = ''.join(text for _, text in corpus)
        fingerprint = hashlib.sha256(text.encode()).hexdigest()
        print(f"{len(corpus):,} files, {len(text):,} characters, sha256 {fingerprint}")
        splits = {
            'train': (text for name, text in corpus if not in_val(name)),
            'val': (text for name, text in corpus if in_val(name)),
        }
        write_bins(HERE, CharTokenizer.of(text), splits)
