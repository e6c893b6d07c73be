"""OpenWebText by GPT-2's byte-pair encoding: the open copy of the pages that GPT-2 was trained on.

    python data/openwebtext/prepare.py --num_proc=8

Reads 24.2 GB of parquet from the Hugging Face Hub, 80 files with 8,013,769 documents, each deleted
once it is read, and needs 20 GB beside this file; a run that was stopped continues where it was.
<|endoftext|> follows each document. One document in 2,000 validates, chosen by its sha256, so
that copies of a document stay on one side. The result: about 9.0 billion tokens to train on (18 GB)
and 4.5 million to validate on (9 MB), the same for any --num_proc. Licence: the collection is CC0;
the texts belong to their authors. Revision: below. NANOGPT_MIRROR may be a URL that serves the
Hub's paths, or a folder with openwebtext/plain_text/train-*.parquet, all of which are then read.
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

DOWNLOAD_MB = 24_193
HUB = 'Skylion007/openwebtext@79d93d786212f7344586290adb811d4ae6a1762c:plain_text'

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
        mirror = hub.mirror_folder('openwebtext')
        files = HUB
        if mirror:
            files = mirror / 'plain_text' / 'train-*.parquet'
        bins.prepare(
            HERE,
            sources.open([files], folder=HERE),
            TiktokenTokenizer('gpt2'),
            ('0.9995', '0.0005'),
            num_proc=num_proc,
        )
