"""Tiny Shakespeare by characters: 1.1 MB, 40,000 lines of Shakespeare's plays, in the public domain.

    python data/shakespeare_char/prepare.py

Downloads input.txt as data/shakespeare/prepare.py does (NANOGPT_MIRROR may hold it as shakespeare/input.txt). The first
90 % train, the last 10 % validate: 1,003,854 and 111,540 characters of 65 kinds.
"""
import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from mistakes import begin_script, user_errors

DOWNLOAD_MB = 1.1

if __name__ == '__main__':
    begin_script()
    shakespeare = runpy.run_path(str(HERE.parent / 'shakespeare' / 'prepare.py'))
    with user_errors():
        shakespeare['prepare'](HERE, HERE, 'char')
