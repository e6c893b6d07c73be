"""32,033 first names: 228 kB, the most frequent ones of newborns in the USA in 2018 (Social
Security Administration, public domain), as https://github.com/karpathy/makemore has them.

    python data/names/prepare.py

Downloads names.txt (sha256 below; NANOGPT_MIRROR may hold it as names/names.txt). Shuffled by
Python's generator with seed 42: the first 80 % train, the next 10 % validate, the last 10 % are for
a test, which nothing here reads: 182,625, 22,655 and 22,866 letters and line ends to predict. A
line end stands before and after each name; each is a window of its own.
"""

import argparse
import random
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from system.errors import begin_script

if __name__ == '__main__':
    begin_script()  # before the imports, which take a second

from system.errors import fail, user_errors
from system.files import download
from text.bins import write_bins
from text.tokenizer import CharTokenizer

DOWNLOAD_MB = 0.2
URL = 'https://raw.githubusercontent.com/karpathy/makemore/master/names.txt'
SHA256 = '0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d'


def text_of(names):
    """The names, with a line end before and after each."""
    return '\n'.join(['', *names, ''])


if __name__ == '__main__':
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.error = fail
    options.parse_args()
    with user_errors():
        path = download(URL, HERE / 'names.txt', SHA256, mirrored_as='names/names.txt')
        names = path.read_text(encoding='utf-8').split('\n')
        tokenizer = CharTokenizer.of('\n'.join(names))
        random.Random(42).shuffle(names)
        train_end = int(0.8 * len(names))
        val_end = int(0.9 * len(names))
        splits = {
            'train': [text_of(names[:train_end])],
            'val': [text_of(names[train_end:val_end])],
            'test': [text_of(names[val_end:])],
        }
        write_bins(HERE, tokenizer, splits, separator=tokenizer.ids['\n'])
