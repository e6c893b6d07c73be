"""The notebooks run from top to bottom, at a small size; and what is saved in them is what they
print and draw."""

import asyncio
import json
import os
import re
from pathlib import Path
from unittest import mock

import matplotlib
import pytest
from support.scripts import ROOT

nbformat, nbclient = pytest.importorskip('nbformat'), pytest.importorskip('nbclient')

NOTEBOOKS = {path.stem: path for path in sorted(ROOT.glob('notebooks/*.ipynb'))}
SMALL = dict(
    NOTEBOOK_STEPS='4', NOTEBOOK_VAL_TOKENS='1000', NOTEBOOK_WIDTH='48', OMP_NUM_THREADS='1'
)


def saved(name):
    return nbformat.read(NOTEBOOKS[name], as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == 'code']


def make_up_runs():
    """Runs of the scaling notebook's grid, which takes minutes, that obey a law; the one at its end
    it has to train."""
    its = {}
    with matplotlib.rc_context():
        for cell in code(saved('scaling_laws'))[:4]:
            exec(cell.source.replace('%matplotlib inline', ''), its)
    per_step = its['B'] * its['T']
    for run in (*its['plans'], *its['repeats']):
        every, last, capacity = (
            run['eval_interval'] or run['max_iters'],
            run['max_iters'],
            its['N_OF'][run['n_embd']],
        )
        evaluations = [
            dict(
                iter=i,
                tokens=i * per_step,
                train_seconds=1.0,
                val_loss=(
                    0.9
                    + 38 / capacity**0.43
                    + 1800 / (i * per_step) ** 0.65
                    + 0.001 * (run['seed'] % 1337)
                ),
            )
            for i in (*range(every, last, every), last)
        ]
        folder = its['folder_of'](run)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'config.json').write_text(json.dumps(run))
        (folder / 'metrics.jsonl').write_text('\n'.join(map(json.dumps, evaluations)))


@pytest.fixture(scope='module')
def executed(text_folder, tmp_path_factory):
    """{name: what running it came to}, the notebook or an error; all at once: most of it is waiting
    for kernels."""

    async def run(name):
        # an editor's working directory, and Jupyter's
        folder = ROOT if name == 'gpt_dev' else ROOT / 'notebooks'
        notebook = saved(name)
        await nbclient.NotebookClient(
            notebook,
            timeout=120,
            coalesce_streams=True,
            resources={'metadata': {'path': str(folder)}},
        ).async_execute()
        return notebook

    async def run_all():
        return await asyncio.gather(*map(run, NOTEBOOKS), return_exceptions=True)

    nothing_to_download = str(tmp_path_factory.mktemp('mirror'))
    with mock.patch.dict(
        os.environ,
        SMALL
        | dict(
            NANOGPT_MIRROR=nothing_to_download,
            NOTEBOOK_DATASET=str(text_folder),
            NOTEBOOK_RUNS=str(tmp_path_factory.mktemp('runs')),
        ),
    ):
        make_up_runs()
        return dict(zip(NOTEBOOKS, asyncio.run(run_all())))


def test_all_four_are_there():
    assert list(NOTEBOOKS) == ['gpt_dev', 'network_health', 'scaling_laws', 'transformer_sizing']


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_notebook_runs_and_its_cells_put_out_what_they_put_out_when_it_was_saved(name, executed):
    if isinstance(executed[name], BaseException):
        raise executed[name]
    then, now = (
        [
            [(output.output_type, output.get('name')) for output in cell.outputs]
            for cell in code(notebook)
        ]
        for notebook in (saved(name), executed[name])
    )
    assert then == now


@pytest.mark.parametrize('name', NOTEBOOKS)
def test_a_saved_notebook_is_of_one_run_and_of_no_particular_machine(name):
    cells, text = code(saved(name)), NOTEBOOKS[name].read_text(encoding='utf-8')
    nbformat.validate(saved(name))
    assert [cell.execution_count for cell in cells] == list(range(1, 1 + len(cells)))
    shows = re.compile(r'^(print\(|plt\.(?!rcParams)|figure)', re.MULTILINE)
    assert all(cell.outputs for cell in cells if shows.search(cell.source))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [
        output
        for output in outputs
        if output.output_type == 'error' or output.get('name') == 'stderr'
    ]
    assert not re.search(r'/(home|root|tmp|work|Users)/', text) and str(Path.home()) not in text
    assert len(text.encode()) < 700_000


def test_the_scaling_notebook_finds_the_law_that_its_runs_obey(executed):
    printed = ''.join(
        output.get('text', '') for cell in code(executed['scaling_laws']) for output in cell.outputs
    )
    assert 'L(N, D) = 0.900 + 38 / N^0.430 + 1800 / D^0.650' in printed
    assert 'reads 8,192 tokens' in printed
    measured = re.search(r'measured: (\d+\.\d+)', printed)  # train.py's own run, of 4 steps
    assert 2 < float(measured[1]) < 5, measured[0]
