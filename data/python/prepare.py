"""The Python source of this environment by GPT-2's byte-pair encoding: real text in plenty, on
every machine already.

    python data/python/prepare.py --vocab_size=8192

All .py files of the running interpreter's standard library and of the packages installed beside it
that are UTF-8 and at most 1 MB (larger ones are generated tables), each content once. Beside torch
and transformers that is some 200 MB in 12,000 files, encoded in a minute or two, each under its own
package's licence; only GPT-2's vocabulary is downloaded. Whole files go to a split, one in a
hundred to validation, by the sha256 of the seed and their content, in the order of their names,
<|endoftext|> after each. Near copies, such as vendored packages, may lie on both sides. The corpus
is this environment's: losses compare where its sha256, which is printed, is the same.
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
from text.bins import prepare
from text.tokenizer import TiktokenTokenizer

DOWNLOAD_MB = 1.5
SEED = 1337
LARGEST = 1_000_000  # bytes
# Folders to skip inside a root: this environment's own packages are a root themselves.
SKIPPED_FOLDERS = {'site-packages', 'dist-packages'}


def text_of(path):
    """A file's text; '' if the file is too large for the corpus, or not UTF-8."""
    if path.stat().st_size > LARGEST:
        return ''
    try:
        return path.read_bytes().decode().replace('\r\n', '\n')
    except UnicodeDecodeError:
        return ''


def sources(roots):
    """{sha256 of its text: path} of the corpus's files, in the order of the roots and of their
    names."""
    found = {}
    for root in roots:
        names = [(path.relative_to(root).as_posix(), path) for path in root.rglob('*.py')]
        for name, path in sorted(names):
            if not path.is_file() or path.is_symlink() or SKIPPED_FOLDERS & set(name.split('/')):
                continue
            text = text_of(path).encode()
            if text:
                found.setdefault(hashlib.sha256(text).digest(), path)
    return found


class Files:
    """The corpus's files, as a source for bins.prepare."""

    def __init__(self, roots):
        found = sources(roots)
        self.paths = list(found.values())
        self.fingerprint = hashlib.sha256(b''.join(found)).hexdigest()
        self.size = sum(path.stat().st_size for path in self.paths)

    def pieces(self):
        return (self.paths[i : i + 50] for i in range(0, len(self.paths), 50))

    def read(self, paths):
        for text in map(text_of, paths):
            number = int(hashlib.sha256(f'{SEED}/{text}'.encode()).hexdigest(), 16)
            split = 'val' if number % 100 == 0 else 'train'
            yield split, text


if __name__ == '__main__':
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.error = fail
    options.add_argument(
        '--vocab_size', type=int, help="only so many of GPT-2's 50,257 entries; default: all"
    )
    options.add_argument(
        '--num_proc', type=int, help="processes that encode; default: one per core"
    )
    options = options.parse_args()
    with user_errors():
        tokenizer = TiktokenTokenizer('gpt2', options.vocab_size)
        keys = ('stdlib', 'purelib', 'platlib')
        roots = [Path(sysconfig.get_path(key)).resolve() for key in keys]
        files = Files(dict.fromkeys(roots))  # purelib and platlib may be the same folder
        print(
            f"{len(files.paths):,} files, sha256 {files.fingerprint}; encoding them takes a minute "
            "or two",
            flush=True,
        )
        prepare(HERE, files, tokenizer, num_proc=options.num_proc)
