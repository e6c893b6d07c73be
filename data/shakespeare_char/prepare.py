"""Tiny Shakespeare by characters: 1.1 MB, 40,000 lines of Shakespeare's plays, in the public
domain.

    python data/shakespeare_char/prepare.py

Downloads input.txt as data/shakespeare/prepare.py does (NANOGPT_MIRROR may hold it as
shakespeare/input.txt). The first 90 % train, the last 10 % validate: 1,003,854 and 111,540
characters of 65 kinds.
"""

import argparse
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from system.errors import begin_script, fail, user_errors

DOWNLOAD_MB = 1.1

if __name__ == '__main__':
    begin_script()
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.error = fail
    options.parse_args()
    shakespeare = runpy.run_path(str(HERE.parent / 'shakespeare' / 'prepare.py'))
    with user_errors():
        shakespeare['prepare'](HERE, HERE, 'char')
