"""What the tests share: a small dataset, and the scripts run as a user runs them.

The suite runs on the CPU, whatever the machine has: GPUs are hidden here, before torch is imported,
from this process and all that it starts. A test that is marked `cuda` runs what needs a GPU in a
process of its own: `run(…, gpu=True)`.
"""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

# What the user had set, for `with_gpus`. With NANOGPT_TEST_DEVICE=cuda nothing is hidden, and tests
# that use the fixture `device` run on the GPU.
os.environ.setdefault('NANOGPT_TEST_GPUS', os.environ.get('CUDA_VISIBLE_DEVICES', 'all'))
if os.environ.get('NANOGPT_TEST_DEVICE', 'cpu') == 'cpu':
    os.environ['CUDA_VISIBLE_DEVICES'] = ''

import torch

# torch asks the driver once and keeps the answer: forks of this process inherit it, and one that
# has a limit on its memory could not load the driver.
torch.cuda.is_available()

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if 'PYTEST_XDIST_WORKER' in os.environ:  # a worker per core
    torch.set_num_threads(1)

# 4,000 characters of a file that does not change, since losses depend on it.
CORPUS = (ROOT / 'LICENSE').read_text(encoding='utf-8')[:1000] * 4

# The smallest run that still has every part: dropout, accumulation, several evaluations.
TINY = [
    '--model=gpt',
    '--n_layer=1',
    '--n_head=2',
    '--n_embd=16',
    '--block_size=16',
    '--batch_size=4',
    '--device=cpu',
    '--gradient_accumulation_steps=2',
    '--dropout=0.1',
    '--max_iters=6',
    '--lr_decay_iters=6',
    '--warmup_iters=2',
    '--eval_interval=3',
    '--eval_iters=2',
    '--learning_rate=1e-2',
    '--compile=False',
    '--dtype=float32',
]


def with_gpus(environment):
    """A copy of `environment` in which the GPUs are visible that the suite hides."""
    environment = dict(environment)
    visible = environment['NANOGPT_TEST_GPUS']
    if visible == 'all':
        environment.pop('CUDA_VISIBLE_DEVICES', None)
    else:
        environment['CUDA_VISIBLE_DEVICES'] = visible
    return environment


def run(
    script,
    *arguments,
    processes=1,
    torchrun=False,
    gpu=False,
    env=None,
    cwd=ROOT,
    timeout=120,
    stdin=None,
):
    """Run a script of the project on the text `stdin`; returns its CompletedProcess with text
    output.

    torchrun: by torchrun, also a single process. gpu: with the GPUs that the suite hides.
    """
    command = [sys.executable]
    environment = {**os.environ, 'PYTHONPATH': '', 'WANDB_MODE': 'offline', **(env or {})}
    if gpu:
        environment = with_gpus(environment)
    if torchrun or processes > 1:
        command += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}']
    else:
        environment.setdefault('OMP_NUM_THREADS', '1')  # tiny tensors: threads only cost
    return subprocess.run(
        [*command, script, *map(str, arguments)],
        capture_output=True,
        text=True,
        input=stdin,
        env=environment,
        cwd=cwd,
        timeout=timeout,
    )


@pytest.fixture(scope='session')
def warm(tmp_path_factory):
    """warm('train.py', '--seed=1') -> what `run` gives, in a tenth of the time. There is no
    network."""
    from test_errors import Forked

    forked = Forked(tmp_path_factory.mktemp('warm'))
    yield forked
    forked.close()


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


def write_text(folder, text):
    """Make `folder` a dataset of `text` by characters, nine tenths to train on."""
    from text.bins import write_bins
    from text.tokenizer import CharTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    cut = len(text) * 9 // 10
    write_bins(folder, CharTokenizer.of(text), {'train': [text[:cut]], 'val': [text[cut:]]})
    return folder


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


def same(a, b):
    """Whether two nested structures are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


COMMIT = 'c0ffee' * 6 + 'c0de'


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """({name: bytes}, requests): own/set on a server like the Hub's, and what that was asked;
    gated/set is closed."""
    served, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path.partition('?')[0]
            asked.append(f'{self.command} {path}')
            content, headers = None, {}
            if path in ('/api/datasets/own/set', f'/api/datasets/own/set/revision/{COMMIT}'):
                content = json.dumps(
                    {
                        'id': 'own/set',
                        'sha': COMMIT,
                        'siblings': [
                            {'rfilename': name, 'size': len(content)}
                            for name, content in served.items()
                        ],
                    }
                ).encode()
            elif path.startswith(f'/datasets/own/set/resolve/{COMMIT}/'):
                content = served.get(path.split('/', 6)[6])
                headers = {
                    'X-Repo-Commit': COMMIT,
                    'ETag': f'"{hashlib.sha256(content or b"").hexdigest()}"',
                }
            elif 'gated' in path:
                headers = {'X-Error-Code': 'GatedRepo'}
            else:
                headers = {'X-Error-Code': 'RepoNotFound'}
            self.send_response(200 if content is not None else 403 if 'gated' in path else 404)
            for key, value in {**headers, 'Content-Length': len(content or b'')}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == 'GET':
                self.wfile.write(content or b'')

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setenv('NANOGPT_MIRROR', f'http://127.0.0.1:{server.server_port}')
        monkeypatch.setenv('HF_HOME', str(tmp_path / 'hf'))
        yield served, asked
        server.shutdown()
