"""OSCAR 23.01, the web's pages by language, one of them: data/oscar/LANGUAGE, for train.py
--dataset=oscar/LANGUAGE.

    python data/oscar/prepare.py eo --tokenizer=train:sentencepiece:32000
    python data/oscar/prepare.py de --max_bytes=10_000_000_000

LANGUAGE is a code, such as de, eo or zh; an unknown one prints the list of all. Further words are
options of data/prepare.py: GPT-2's vocabulary, the default, suits English. The files, each deleted
once it is read, are compressed with zstandard (pip install zstandard) and hold up to terabytes:
--max_bytes reads only the beginning, and a run that was stopped continues where it was. Accept the
terms at https://huggingface.co/datasets/oscar-corpus/OSCAR-2301 first, then set HF_TOKEN or run
`hf auth login`. The commit that was read is printed and kept in meta.json. Licence: the collection
is CC0; the texts belong to their authors. NANOGPT_MIRROR may be a URL that serves the Hub's paths,
or a folder with oscar/de_meta/*.jsonl.zst.
"""

import difflib
import runpy
import sys
from pathlib import Path

DATA = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(DATA.parent))

from system.errors import begin_script

if __name__ == '__main__':
    begin_script()  # before the imports, which take a second

from system import hub
from system.errors import fail, user_errors

DOWNLOAD_MB = 1_000_000  # some languages much less: never downloaded unasked
REPO = 'oscar-corpus/OSCAR-2301'


def main(words):
    if words[:1] in (['-h'], ['--help']):
        print(__doc__)
        return
    if not words or words[0].startswith('-'):
        fail("the first word is a LANGUAGE, such as de; --help says more")
    language, *options = words
    mirror = hub.mirror_folder('oscar')
    if mirror:
        folders = [path.name for path in mirror.iterdir()]
        source = mirror / f'{language}_meta' / '*.jsonl.zst'
    else:
        _, files = hub.listing(REPO)
        folders = [name.split('/')[0] for name in files]
        source = f'{REPO}:{language}_meta'

    known = sorted({name.removesuffix('_meta') for name in folders if name.endswith('_meta')})
    if language not in known:
        message = f"OSCAR has no language {language!r}"
        nearest = difflib.get_close_matches(language, known, n=5, cutoff=0.4)
        if nearest:
            message += f"; the nearest are {', '.join(nearest)}"
        fail(f"{message}; all of them: {' '.join(known)}")

    words = [str(DATA / 'oscar' / language), str(source), '--field=content', *options]
    runpy.run_path(str(DATA / 'prepare.py'))['main'](words)


if __name__ == '__main__':
    with user_errors():
        main(sys.argv[1:])
