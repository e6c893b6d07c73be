"""export.py in this process, on a model of the test's own."""

import contextlib
import dataclasses
import io
import runpy
import sys
from types import SimpleNamespace
from unittest import mock

import torch

import models
from support.scripts import ROOT


def saved(path, model, description=None):
    """A checkpoint file of a model."""
    torch.save(
        {
            'model': model.state_dict(),
            'model_name': models.name_of(model),
            'tokenizer': description,
            'model_args': dataclasses.asdict(model.config),
        },
        path,
    )
    return path


def export(*words):
    """export.py as from the command line, in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, 'argv', ['export.py', *map(str, words)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(ROOT / 'export.py'), run_name='__main__')
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def exported(tmp_path, model, description=None, *words):
    """The folder that export.py makes of a model."""
    tmp_path.mkdir(exist_ok=True)
    done = export(
        f'--init_from={saved(tmp_path / "model.pt", model, description)}',
        f'--folder={tmp_path / "hf"}',
        *words,
    )
    assert done.returncode == 0, done.stderr
    return tmp_path / 'hf'
