"""The ready sets' scripts, data/NAME/prepare.py, run in copies of their folders."""

import runpy
import sys

from support.scripts import ROOT


def copied(name, folder, *changes):
    """data/NAME/prepare.py in `folder`, beside the other ready sets; changes: (old, new) of its
    text."""
    for own in (ROOT / 'data').glob('**/prepare.py'):
        script = folder / own.relative_to(ROOT)
        script.parent.mkdir(parents=True, exist_ok=True)
        script.write_bytes(own.read_bytes())
    script = folder / 'data' / name / 'prepare.py'
    text = script.read_text(encoding='utf-8')
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    script.write_text(text, encoding='utf-8')
    return script


def prepared(name, folder, *options, changes=()):
    """The folder with the bins that a copy of data/NAME/prepare.py makes, in this process: that is
    faster."""
    script = copied(name, folder, *changes)
    argv, sys.argv = sys.argv, [str(script), *options]
    try:
        runpy.run_path(str(script), run_name='__main__')
    finally:
        sys.argv = argv
    return script.parent


def definitions(name):
    """What data/NAME/prepare.py defines, without running it."""
    return runpy.run_path(str(ROOT / 'data' / name / 'prepare.py'))
