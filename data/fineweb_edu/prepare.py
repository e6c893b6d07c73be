"""FineWeb-Edu's sample of 10 billion tokens by GPT-2's byte-pair encoding: web pages that teach
something.

    python data/fineweb_edu/prepare.py --num_proc=8

Reads 28.5 GB of parquet from the Hugging Face Hub (HuggingFaceFW/fineweb-edu, sample-10BT), 14
files with 9,672,101 documents, each deleted once it is read, and needs 25 GB beside this file; a
run that was stopped continues where it was. <|endoftext|> follows each document. The result: about
9.98 billion tokens (20 GB), in files of 100 million; one document in 2,000 validates, chosen by its
sha256, about 5 million tokens. The same for any --num_proc. Licence: ODC-By 1.0, and Common Crawl's
terms of use. Revision: below, v1.4.0. NANOGPT_MIRROR may be a URL that serves the Hub's paths, or a
folder with fineweb_edu/sample/10BT/*.parquet, all of which are then read.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from system.errors import begin_script

if __name__ == '__main__':
    begin_script()  # before the imports, which take a second

from system import hub
from system.errors import fail, user_errors
from text import bins, sources
from text.tokenizer import TiktokenTokenizer

DOWNLOAD_MB = 28_518
HUB = 'HuggingFaceFW/fineweb-edu@87f09149ef4734204d70ed1d046ddc9ca3f2b8f9:sample/10BT'
SHARD = 100_000_000  # tokens per file

if __name__ == '__main__':
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.error = fail
    options.add_argument(
        '--num_proc', type=int, help="processes that encode; default: one per core"
    )
    num_proc = options.parse_args().num_proc
    with user_errors():
        mirror = hub.mirror_folder('fineweb_edu')
        files = HUB
        if mirror:
            files = mirror / 'sample' / '10BT' / '*.parquet'
        bins.prepare(
            HERE,
            sources.open([files], folder=HERE),
            TiktokenTokenizer('gpt2'),
            ('0.9995', '0.0005'),
            num_proc=num_proc,
            shard_tokens=SHARD,
        )
