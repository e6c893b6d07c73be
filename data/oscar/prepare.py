"""OSCAR 23.01, the web's pages by language, one of them: data/oscar/LANGUAGE, for train.py
--dataset=oscar/LANGUAGE.

    python data/oscar/prepare.py eo --tokenizer=train:sentencepiece:32000
    python data/oscar/prepare.py de --max_bytes=10_000_000_000

LANGUAGE is a code, such as de, eo or zh; another one prints those that there are. Further words
are options of data/prepare.py: GPT-2's vocabulary, the default, suits English. The files, each gone
when it is read, are zstandard's (pip install zstandard) and up to terabytes: --max_bytes takes the
beginning, a run that was stopped goes on where it was. Accept the terms at
https://huggingface.co/datasets/oscar-corpus/OSCAR-2301 first, then give HF_TOKEN or `hf auth
login`. The commit taken is printed and kept in meta.json. Licence: the collection is CC0; the texts
belong to their authors. NANOGPT_MIRROR may be a URL that serves the Hub's paths, or a folder with
oscar/de_meta/*.jsonl.zst.
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

DOWNLOAD_MB = 1_000_000  # by language, some much less: never unasked
REPO = 'oscar-corpus/OSCAR-2301'


def main(words):
    if words[:1] in (['-h'], ['--help']):
        print(__doc__)
        return
    if not words or words[0].startswith('-'):
        fail("the first word is a LANGUAGE, such as de; --help says more")
    language, *options = words
    mirror = hub.mirror_folder('oscar')
    names = (
        [path.name for path in mirror.iterdir()]
        if mirror
        else [name.split('/')[0] for name in hub.listing(REPO)[1]]
    )
    known = sorted({name.removesuffix('_meta') for name in names if name.endswith('_meta')})
    if language not in known:
        near = difflib.get_close_matches(language, known, n=5, cutoff=0.4)
        fail(
            f"OSCAR has no language {language!r}"
            + f"; the nearest are {', '.join(near)}" * bool(near)
            + f"; all of them: {' '.join(known)}"
        )
    source = mirror / f'{language}_meta' / '*.jsonl.zst' if mirror else f'{REPO}:{language}_meta'
    words = [str(DATA / 'oscar' / language), str(source), '--field=content', *options]
    runpy.run_path(str(DATA / 'prepare.py'))['main'](words)


if __name__ == '__main__':
    with user_errors():
        main(sys.argv[1:])
