"""data/prepare.py in this process, and stopped on its way."""

import runpy

import pytest

from support.scripts import ROOT
from system.errors import user_errors
from text import journal

COMMAND = runpy.run_path(str(ROOT / 'data/prepare.py'), run_name='data/prepare.py')


def prepare(*words):
    """The command, in this process."""
    with user_errors():
        COMMAND['main']([str(word) for word in words])


def failure(capsys, *words):
    """What the command says when it fails, which is one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        prepare(*words)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith('error: ') and error.count('\n') == 1
    return error


def interrupt_at(monkeypatch, *numbers):
    """Press Ctrl-C before the pieces with these numbers, counted from 1, are added to the bins.

    Returns the list of pieces that were there to be added, which grows.
    """
    add, pieces = journal.Output.add, []

    def interrupted(output, piece, encoded):
        pieces.append(piece)
        if len(pieces) in numbers:
            raise KeyboardInterrupt
        return add(output, piece, encoded)

    monkeypatch.setattr(journal.Output, 'add', interrupted)
    return pieces
