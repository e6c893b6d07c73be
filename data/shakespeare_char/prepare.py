"""Tiny Shakespeare by characters: 1.1 MB, 40,000 lines of Shakespeare's plays, in the public domain.

    python data/shakespeare_char/prepare.py

Downloads input.txt (sha256 below; NANOGPT_MIRROR may hold it as shakespeare/input.txt). The first 90 % train, the last
10 % validate: 1,003,854 and 111,540 characters of 65 kinds.
"""
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from bins import write_bins
from files import download
from runtime import user_errors
from tokenizer import CharTokenizer

DOWNLOAD_MB = 1.1
URL = ('https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/'
       'data/tinyshakespeare/input.txt')
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'

if __name__ == '__main__':
    with user_errors():
        path = download(URL, HERE / 'input.txt', SHA256, mirrored_as='shakespeare/input.txt')
        text = path.read_text(encoding='utf-8')
        split = int(0.9 * len(text))
        write_bins(HERE, CharTokenizer.of(text), {'train': [text[:split]], 'val': [text[split:]]})
