"""enwik8: the first 100,000,000 bytes of the English Wikipedia's dump of 3 March 2006, XML and all,
byte by byte.

    python data/enwik8/prepare.py

Downloads enwik8.zip, 36.4 MB (sha256 below; NANOGPT_MIRROR may hold it as enwik8/enwik8.zip). The
benchmark's usual split: 90 million bytes train, 5 million validate, and 5 million are for `python
evaluate.py --out_dir=RUN --split=test`. What it calls bits per character is bits per byte, here
val_bpb. The text is under the licence that Wikipedia had then, the GFDL. More:
http://mattmahoney.net/dc/textdata.html.
"""

import argparse
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from system.errors import begin_script

if __name__ == '__main__':
    begin_script()  # before the imports, which take a second

import numpy as np

from system.errors import fail, user_errors
from system.files import download
from text.bins import write_ids
from text.tokenizer import ByteTokenizer

DOWNLOAD_MB = 36.4
URLS = 'http://mattmahoney.net/dc/enwik8.zip', 'https://data.deepai.org/enwik8.zip'
SHA256 = '547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc'
# Where each split ends, in bytes: a character may be cut in two.
ENDS = {'train': 90_000_000, 'val': 95_000_000, 'test': 100_000_000}

if __name__ == '__main__':
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.error = fail
    options.parse_args()
    with user_errors():
        path = download(URLS, HERE / 'enwik8.zip', SHA256, mirrored_as='enwik8/enwik8.zip')
        ids = np.frombuffer(zipfile.ZipFile(path).read('enwik8'), np.uint8)
        splits = {}
        start = 0
        for split, end in ENDS.items():
            splits[split] = [(ids[start:end], end - start)]
            start = end
        write_ids(HERE, ByteTokenizer(), splits)
