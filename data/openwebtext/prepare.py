"""OpenWebText by GPT-2's byte-pair encoding: the open copy of the pages that GPT-2 was trained on.

    python data/openwebtext/prepare.py --num_proc=8

Downloads 24.2 GB of parquet, 80 shards with 8,013,769 documents, into the Hugging Face cache (HF_HOME), and needs 36 GB
beside this file until it is done; a run that was stopped goes on where it was. After each document comes <|endoftext|>.
About one document in 2,000 validates, chosen by its sha256, so that copies of a document stay on one side. The result:
about 9.0 billion tokens to train on (18 GB) and 4.4 million to validate on (9 MB), the same for any --num_proc.
Licence: the collection is CC0; the texts belong to their authors. NANOGPT_MIRROR may be a URL that serves the Hub's
paths, or a folder with openwebtext/plain_text/train-*.parquet, all of which are then taken.
"""
import argparse
import hashlib
import os
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from bins import prepare
from mistakes import fail, user_errors
from tokenizer import TiktokenTokenizer

DOWNLOAD_MB = 24_193
REPO, REVISION = 'Skylion007/openwebtext', '79d93d786212f7344586290adb811d4ae6a1762c'
MIRROR = os.environ.get('NANOGPT_MIRROR', '')
FOLDER = Path(MIRROR, 'openwebtext/plain_text') if MIRROR and '://' not in MIRROR else None
SEED = 1337

try:
    from pyarrow import parquet
except ImportError:
    fail("OpenWebText comes as parquet files, which pyarrow reads: pip install pyarrow")


def download(file):
    from huggingface_hub import hf_hub_download, logging
    logging.set_verbosity_error()   # it would tell of each retry
    try:
        return hf_hub_download(REPO, file, repo_type='dataset', revision=REVISION, endpoint=MIRROR or None)
    except Exception as error:      # the library raises its own errors and those of two HTTP libraries
        raise OSError(f"cannot download {file} of {REPO} ({type(error).__name__}): check the network, or set "
                      "NANOGPT_MIRROR to a folder or URL that has it; finished shards are kept") from None


class RowGroup(NamedTuple):
    file: int           # the shard's number
    path: str
    i: int


def documents(row_group):
    """(split, text) of each document in a row group."""
    file = parquet.ParquetFile(row_group.path)
    for text in file.read_row_group(row_group.i, columns=['text'], use_threads=False)['text'].to_pylist():
        number = int(hashlib.sha256(f'{SEED}/{text}'.encode()).hexdigest(), 16)
        yield 'val' if number % 2000 == 0 else 'train', text


class Shards:
    """The shards as bins.prepare takes them."""

    def __init__(self, names):
        self.names, self.fingerprint, self.size = names, f'{FOLDER} {REVISION} {names}', None

    def pieces(self, first=0):
        for number, name in enumerate(self.names[first:], first):
            path = FOLDER / f'{name}.parquet' if FOLDER else download(f'plain_text/{name}.parquet')
            for i in range(parquet.ParquetFile(path).num_row_groups):
                yield RowGroup(number, path, i)

    read = staticmethod(documents)


if __name__ == '__main__':
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument('--num_proc', type=int, help="processes that encode; default: one per core")
    num_proc = options.parse_args().num_proc
    with user_errors():
        shards = [f'train-{i:05d}-of-00080' for i in range(80)]
        if FOLDER and not (shards := sorted(path.stem for path in FOLDER.glob('train-*.parquet'))):
            raise FileNotFoundError(f"NANOGPT_MIRROR={MIRROR} has no openwebtext/plain_text/train-*.parquet")
        prepare(HERE, Shards(shards), TiktokenTokenizer('gpt2'), num_proc=num_proc)
