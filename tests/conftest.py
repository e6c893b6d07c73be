"""The fixtures of all tests. Functions and constants that several test files need are in support/.

The suite runs on the CPU, whatever the machine has: GPUs are hidden here, before torch is imported,
from this process and all that it starts. A test that is marked `cuda` runs what needs a GPU in a
process of its own: `run(…, gpu=True)`.
"""

import os
import sys
from pathlib import Path

import pytest

# What the user had set, for `with_gpus`. With NANOGPT_TEST_DEVICE=cuda nothing is hidden, and tests
# that use the fixture `device` run on the GPU.
os.environ.setdefault('NANOGPT_TEST_GPUS', os.environ.get('CUDA_VISIBLE_DEVICES', 'all'))
if os.environ.get('NANOGPT_TEST_DEVICE', 'cpu') == 'cpu':
    os.environ['CUDA_VISIBLE_DEVICES'] = ''
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from support.datasets import CORPUS, write_text
from support.forked import Warm
from support.scripts import TINY, run
from support.servers import Hub

from text import journal
from text.sources import cutting

if 'PYTEST_XDIST_WORKER' in os.environ:  # a worker per core
    torch.set_num_threads(1)


@pytest.fixture(scope='session')
def warm(tmp_path_factory):
    """warm('train.py', '--seed=1') -> what `run` gives, in a tenth of the time. There is no
    network."""
    return Warm(tmp_path_factory.mktemp('warm'))


NAME_OF_THE_GPU = '''
import torch
if torch.cuda.is_available():
    print(torch.cuda.get_device_name())
'''


@pytest.fixture(scope='session')
def gpu():
    """The name of the GPU for `run(…, gpu=True)`. Where there is none, the test is skipped."""
    if not torch.backends.cuda.is_built():
        pytest.skip("this torch is built without CUDA")
    name = run('-c', NAME_OF_THE_GPU, gpu=True).stdout.strip()
    if not name:
        pytest.skip("there is no GPU here that this torch can use")
    return name


@pytest.fixture(scope='session')
def device():
    """The device of tests that can run on several: cpu, or NANOGPT_TEST_DEVICE."""
    return os.environ.get('NANOGPT_TEST_DEVICE', 'cpu')


@pytest.fixture(scope='session')
def text_folder(tmp_path_factory):
    """A dataset folder of CORPUS, for --dataset=PATH."""
    return write_text(tmp_path_factory.mktemp('data') / 'text', CORPUS)


@pytest.fixture(scope='session')
def trained(text_folder, tmp_path_factory):
    """The out_dir of a tiny finished run. Tests that change it copy it first."""
    out_dir = tmp_path_factory.mktemp('trained') / 'out'
    done = run('train.py', *TINY, f'--dataset={text_folder}', f'--out_dir={out_dir}')
    assert done.returncode == 0, done.stderr
    return out_dir


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """({name: bytes} of the dataset own/set, requests) of a server that stands for the Hub."""
    with Hub(tmp_path / 'models') as server:
        monkeypatch.setenv('NANOGPT_MIRROR', server.url)
        monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
        yield server.files, server.requests


@pytest.fixture
def small_pieces(monkeypatch):
    """Pieces so small that a few kilobytes have all there is: many pieces, large documents."""
    monkeypatch.setattr(cutting, 'PIECE', 256)
    monkeypatch.setattr(cutting, 'LARGE', 1024)
    monkeypatch.setattr(journal, 'SAVE_SECONDS', -1)  # a journal after every piece
    monkeypatch.setattr(os, 'fsync', lambda descriptor: None)  # which takes its time
