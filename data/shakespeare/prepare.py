"""Tiny Shakespeare: 1.1 MB, 40,000 lines of Shakespeare's plays, in the public domain, by GPT-2's
byte-pair encoding.

    python data/shakespeare/prepare.py
    python data/shakespeare/prepare.py --tokenizer=p50k_base    # --dataset=shakespeare/p50k_base

Downloads input.txt (sha256 below; NANOGPT_MIRROR may hold it as shakespeare/input.txt) and,
through tiktoken, GPT-2's vocabulary. The first 90 % of the characters train, the last 10 %
validate: 301,966 and 36,059 tokens.

Any other tokenizer of text/vocabulary.py makes a dataset in a folder of its own in this one:
p50k_base; bert-base-uncased, which drops capitals and line ends (NANOGPT_MIRROR may hold it as
bert-base-uncased/tokenizer.json); train:sentencepiece:32000, as
shakespeare/train-sentencepiece-32000, about 241,000 tokens to train on; and so on.
"""

import argparse
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from system.errors import begin_script

if __name__ == '__main__':
    begin_script()  # before the imports, which take a second

from system.errors import fail, user_errors
from system.files import download
from text import bins, sources, vocabulary

DOWNLOAD_MB = 2.6
URL = (
    'https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/'
    'data/tinyshakespeare/input.txt'
)
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def prepare(text_folder, folder, tokenizer):
    """Write the bins to `folder`, after downloading the text to `text_folder`."""
    path = download(URL, text_folder / 'input.txt', SHA256, mirrored_as='shakespeare/input.txt')
    source = sources.open([path])
    bins.prepare(folder, source, vocabulary.open(tokenizer, source.texts))


if __name__ == '__main__':
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.error = fail
    options.add_argument(
        '--tokenizer',
        default='gpt2',
        help="a name that text/vocabulary.py lists; default: gpt2, in this folder",
    )
    name = options.parse_args().tokenizer
    with user_errors():
        folder = HERE
        if name != 'gpt2':
            folder = HERE / re.sub(r'[^\w.-]+', '-', name).strip('.-')
        prepare(HERE, folder, name)
