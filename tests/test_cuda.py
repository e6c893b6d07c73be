"""What only a GPU can show, with the scripts run as a user runs them, on cuda.

    python -m pytest -m cuda                # some two minutes; skipped where there is no GPU
    python -m pytest -n 0 -m cuda -s        # one after the other, on a GPU with little memory

The suite hides GPUs (conftest.py), so each test runs in processes of its own. Starting one takes
seconds: `scripts` runs several commands in one.
"""

import json
import math
import shutil
import socket

import pytest
from support.forked import train as train_without_gpu
from support.outcomes import learned, losses, metrics, sha256
from support.scripts import ROOT, TINY, run

from models.parts import attention
from system.device import DTYPES, gpu_peak_flops

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures('gpu')]
COMPILERS = ('c++', 'g++', 'clang++')  # which compile C too
needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in COMPILERS), reason="torch.compile needs a compiler"
)
CUDA = [*TINY, '--device=cuda']  # the last --device counts
# Compilers of tests that run side by side would each start a process per core.
FEW_COMPILERS = {'TORCHINDUCTOR_COMPILE_THREADS': '4'}

# The commands are JSON, [[script, word, …], …]. What comes first in the program may change torch.
SCRIPTS = '''
import gc, json, runpy, sys
for script, *words in json.loads(sys.argv[1]):
    sys.argv = [script, *words]
    try:
        runpy.run_path(script, run_name='__main__')
    except SystemExit as end:
        if end.code:
            print('in', script, *words, file=sys.stderr)
            raise
    gc.collect()        # closes the lock on out_dir
    if 'torch._dynamo' in sys.modules:
        sys.modules['torch._dynamo'].reset()
'''


def scripts(*commands, before='', env=None, timeout=120):
    """Run several commands in one process that has a GPU; returns its CompletedProcess."""
    words = [[str(word) for word in command] for command in commands]
    program = f"import sys\nsys.path.insert(0, '.')\n{before}\n{SCRIPTS}"
    return run('-c', program, json.dumps(words), gpu=True, env=env, timeout=timeout)


def succeed(*commands, **options):
    done = scripts(*commands, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert 'Traceback' not in done.stderr, done.stderr
    return done


def resolved(out_dir):
    return json.loads((out_dir / 'config.json').read_text())['resolved']


def column(out_dir, key):
    """What metrics.jsonl has of `key`, which is measured at every step."""
    return [line[key] for line in metrics(out_dir) if 'lr' in line]


# ---- training ------------------------------------------------------------------------------------


@pytest.fixture(scope='module', params=['gpt', 'modern', 'transformerpp'])
def uncompiled(request, text_folder, tmp_path_factory):
    """(settings without dtype, {dtype: out_dir}) of short runs of a model."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = [*CUDA, f'--model={request.param}', '--dropout=0', f'--dataset={text_folder}']
    out_dirs = {dtype: folder / dtype for dtype in DTYPES}
    succeed(
        *(
            ['train.py', *settings, f'--dtype={dtype}', f'--out_dir={out_dir}']
            for dtype, out_dir in out_dirs.items()
        )
    )
    return settings, out_dirs


def test_every_number_format_learns(uncompiled, gpu):
    for dtype, out_dir in uncompiled[1].items():
        facts = resolved(out_dir)
        assert (facts['device'], facts['dtype'], facts['compile']) == ('cuda', dtype, False)
        loss = column(out_dir, 'loss')
        assert all(map(math.isfinite, loss)) and loss[-1] < loss[0]
        assert all(size > 0 for size in column(out_dir, 'peak_memory'))
        if gpu_peak_flops(gpu, dtype):
            assert all(0 < mfu < 1 for mfu in column(out_dir, 'mfu'))


@needs_compiler
def test_a_compiled_run_learns_the_same(uncompiled, tmp_path):
    """Losses and gradient norms match: a correct loss alone would not reveal a wrong gradient."""
    settings, out_dirs = uncompiled
    succeed(
        *(
            [
                'train.py',
                *settings,
                f'--dtype={dtype}',
                '--compile=True',
                f'--out_dir={tmp_path / dtype}',
            ]
            for dtype in out_dirs
        ),
        env=FEW_COMPILERS,
        timeout=300,
    )
    for dtype, out_dir in out_dirs.items():
        assert resolved(tmp_path / dtype)['compile'] is True
        tolerance = 5e-3 if dtype == 'float32' else 5e-2  # TF32, and 8 or 11 bits
        for key in ('loss', 'grad_norm'):
            expected = pytest.approx(column(out_dir, key), rel=tolerance, nan_ok=True)
            assert column(tmp_path / dtype, key) == expected, (dtype, key)


@needs_compiler
def test_compiled_gradients_are_right(gpu):
    """tests/test_compiled.py, of which every architecture is part, with `device` on the GPU."""
    path = ROOT / 'tests' / 'test_compiled.py'
    done = run(
        '-m',
        'pytest',
        path,
        '-n',
        '4',
        '-p',
        'no:cacheprovider',
        gpu=True,
        timeout=600,
        env={'NANOGPT_TEST_DEVICE': 'cuda', **FEW_COMPILERS},
    )
    assert done.returncode == 0, done.stdout[-5000:]


KINDS = sorted(attention.KINDS.keys() - {'mha'})
PLAIN = ['--dropout=0', '--max_iters=3']
OTHERS = [
    *([*PLAIN, '--model=transformerpp', f'--attention_kind={kind}'] for kind in KINDS),
    [*PLAIN, '--model=mlp', '--batchnorm=precise'],
    [*PLAIN, '--model=wavenet'],
    [*PLAIN, '--model=bigram'],
    [*PLAIN, '--model=bigram', '--table=learned'],
    [*PLAIN, '--model=modern', '--ngram=3', '--muon_lr=0.02'],
    ['--optimizer=sgd', '--max_norm=1', '--gradient_checkpointing=True', '--attention=plain'],
]


def test_every_model_and_optimizer_runs_and_writes(text_folder, tmp_path):
    """Each run ends with a sample, from a cache where the model has one."""
    settings = [*CUDA, '--dtype=bfloat16', f'--dataset={text_folder}']
    succeed(
        *(
            ['train.py', *settings, *words, f'--out_dir={tmp_path / str(i)}']
            for i, words in enumerate(OTHERS)
        ),
        timeout=240,
    )
    for i, words in enumerate(OTHERS):
        assert resolved(tmp_path / str(i))['device'] == 'cuda'
        assert all(map(math.isfinite, column(tmp_path / str(i), 'loss'))), words


def test_a_deterministic_run_is_resumed_to_the_bit(text_folder, tmp_path):
    settings = [
        'train.py',
        *CUDA,
        '--dtype=bfloat16',
        '--deterministic=True',
        f'--dataset={text_folder}',
    ]
    succeed(
        [*settings, f'--out_dir={tmp_path}/whole'],
        [*settings, f'--out_dir={tmp_path}/cut', '--max_iters=3'],
    )
    # in a new process, and without --device: auto is the one that the run had
    succeed(['train.py', '--init_from=resume', f'--out_dir={tmp_path}/cut', '--max_iters=6'])
    assert resolved(tmp_path / 'cut')['device'] == 'cuda'
    cut, whole = tmp_path / 'cut', tmp_path / 'whole'
    assert sha256(learned(cut)['model']) == sha256(learned(whole)['model'])
    assert sha256(learned(cut)['optimizer']) == sha256(learned(whole)['optimizer'])
    for key in ('loss', 'grad_norm'):
        assert column(cut, key) == column(whole, key)


def test_lora(text_folder, tmp_path):
    settings = [*CUDA, f'--dataset={text_folder}', '--dtype=bfloat16']
    base, tuned = tmp_path / 'base', tmp_path / 'tuned'
    succeed(
        ['train.py', *settings, f'--out_dir={base}'],
        ['train.py', *settings, f'--init_from={base}', f'--out_dir={tuned}', '--lora_rank=2'],
        ['train.py', '--init_from=resume', f'--out_dir={tuned}', '--max_iters=8'],
        [
            'sample.py',
            f'--out_dir={tuned}',
            '--device=cuda',
            '--num_samples=1',
            '--max_new_tokens=20',
        ],
    )
    assert len(column(tuned, 'loss')) == 8 and resolved(tuned)['device'] == 'cuda'


WITHOUT_NUMBERS = '''
import model
forward, calls = model.GPT.forward, [0]

def spoilt(self, idx, targets=None, cache=None):
    logits, loss = forward(self, idx, targets, cache)
    if self.training:
        calls[0] += 1
        if calls[0] in (7, 8):      # step 3 has these two micro-batches
            loss = loss * float('nan')
    return logits, loss
model.GPT.forward = spoilt
'''


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_an_update_of_nan_is_skipped_on_the_device(text_folder, tmp_path, dtype):
    settings = [
        'train.py',
        *CUDA,
        f'--dtype={dtype}',
        f'--dataset={text_folder}',
        f'--out_dir={tmp_path}',
    ]
    succeed(settings, before=WITHOUT_NUMBERS)
    loss = column(tmp_path, 'loss')
    assert [i for i, value in enumerate(loss) if value is None] == [3]  # JSON has no NaN
    assert any(line.get('skipped') and line['iter'] == 3 for line in metrics(tmp_path))
    assert loss[5] < loss[0]


LITTLE_MEMORY = '''
import torch
torch.cuda.set_per_process_memory_fraction(0.001)
'''


def test_out_of_memory_is_one_line(text_folder, tmp_path):
    done = scripts(
        [
            'train.py',
            *CUDA,
            f'--dataset={text_folder}',
            f'--out_dir={tmp_path}',
            '--batch_size=100000',
        ],
        before=LITTLE_MEMORY,
    )
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    assert 'error: out of memory: halve --batch_size=100000' in done.stderr


def test_a_profile_has_the_kernels(text_folder, tmp_path):
    succeed(
        [
            'train.py',
            *CUDA,
            f'--dataset={text_folder}',
            f'--out_dir={tmp_path}',
            '--max_iters=16',
            '--profile=True',
            '--watch=True',
        ]
    )
    (trace,) = (tmp_path / 'profile').glob('*.json')
    assert '"kernel"' in trace.read_text() and (tmp_path / 'health.png').exists()


# ---- processes -----------------------------------------------------------------------------------


def test_torchrun_with_one_process(text_folder, tmp_path):
    """DDP and FSDP learn, by NCCL, what a plain run learns; a save in parts is resumed and read."""
    settings = [*CUDA, '--dropout=0', f'--dataset={text_folder}']
    succeed(['train.py', *settings, f'--out_dir={tmp_path}/plain'])
    for kind, words in (
        ('ddp', [*settings, '--backend=nccl']),
        ('fsdp', [*settings, '--max_iters=3']),
        ('fsdp', ['--init_from=resume', '--max_iters=6']),
    ):
        done = run(
            'train.py',
            *words,
            f'--parallel={kind}',
            f'--out_dir={tmp_path / kind}',
            torchrun=True,
            gpu=True,
        )
        assert done.returncode == 0, done.stderr
        assert resolved(tmp_path / kind)['device'] == 'cuda:0'
    for kind in ('ddp', 'fsdp'):
        expected = column(tmp_path / 'plain', 'loss')
        assert column(tmp_path / kind, 'loss') == pytest.approx(expected, rel=5e-3)
    succeed(['sample.py', f'--out_dir={tmp_path}/fsdp', '--num_samples=1', '--max_new_tokens=20'])


# ---- using models --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'words',
    [
        [],
        ['--dtype=float16'],
        ['--dtype=float32', '--num_beams=3'],
        pytest.param(['--compile=True'], marks=needs_compiler),
    ],
    ids=' '.join,
)
def test_sample(trained, words):
    done = succeed(
        [
            'sample.py',
            f'--out_dir={trained}',
            '--device=cuda',
            '--num_samples=2',
            '--max_new_tokens=40',
            *words,
        ],
        env=FEW_COMPILERS,
    )
    assert len(done.stdout) > 40


def test_int8_is_for_a_cpu(trained):
    done = scripts(['sample.py', f'--out_dir={trained}', '--device=cuda', '--dtype=int8'])
    assert done.returncode == 2 and "error: dtype='int8' is for a CPU" in done.stderr


def test_evaluate_gives_the_figures_of_a_cpu(trained, text_folder, tmp_path):
    words = ['evaluate.py', f'--out_dir={trained}', f'--dataset={text_folder}', '--dtype=float32']
    succeed(
        *(
            [*words, f'--device={device}', f'--out={tmp_path / device}']
            for device in ('cpu', 'cuda')
        )
    )
    cpu, cuda = (
        json.loads((tmp_path / device).read_text())['results'] for device in ('cpu', 'cuda')
    )
    for task, figures in cpu.items():
        assert cuda[task] == pytest.approx(figures, rel=2e-3), task


def test_bench_generation():
    done = succeed(
        [
            'bench.py',
            'generation',
            '--n_layer=1',
            '--n_embd=24',
            '--n_head=2',
            '--block_size=64',
            '--max_new_tokens=20',
            '--prefill_tokens=20',
            '--rounds=1',
            '--device=cuda',
        ]
    )
    assert 'bfloat16' in done.stdout


def test_a_wrong_gpu_is_one_line(text_folder, tmp_path):
    done = scripts(
        ['train.py', *TINY, '--device=cuda:99', f'--dataset={text_folder}', f'--out_dir={tmp_path}']
    )
    assert done.returncode == 2 and done.stderr.startswith(
        "error: device='cuda:99': this machine has "
    )


# ---- between a GPU and a CPU ---------------------------------------------------------------------


def test_a_run_of_the_gpu_is_resumed_and_used_where_there_is_none(text_folder, tmp_path):
    no_device = [word for word in TINY if not word.startswith('--device')]
    succeed(['train.py', *no_device, f'--dataset={text_folder}', f'--out_dir={tmp_path}'])
    assert resolved(tmp_path)['device'] == 'cuda'  # as auto is the fastest
    out = train_without_gpu(tmp_path, '--init_from=resume', '--max_iters=8')
    assert "the run used device='cuda'" in out and "it continues with device='cpu'" in out
    assert len(losses(tmp_path)) > 8
    done = run('sample.py', f'--out_dir={tmp_path}', '--num_samples=1', '--max_new_tokens=5')
    assert done.returncode == 0, done.stderr


def test_a_run_of_a_cpu_stays_there(trained, tmp_path):
    out_dir = shutil.copytree(trained, tmp_path / 'out')
    succeed(['train.py', '--init_from=resume', f'--out_dir={out_dir}', '--max_iters=8'])
    assert resolved(out_dir)['device'] == 'cpu'
    succeed(
        [
            'train.py',
            '--init_from=resume',
            f'--out_dir={out_dir}',
            '--max_iters=10',
            '--device=cuda',
        ]
    )
    assert resolved(out_dir)['device'] == 'cuda'


# At its end, whether the process has used the GPU; a context takes hundreds of megabytes of it.
REPORT = '''
import atexit, torch
atexit.register(lambda: print('context:', torch._C._cuda_hasPrimaryContext(0)))
'''


@pytest.mark.parametrize(
    'words',
    [
        [],
        ['--dtype=bfloat16', '--profile=True', '--max_iters=16'],
        ['--parallel=fsdp'],
        pytest.param(['--compile=True'], marks=needs_compiler),
    ],
    ids=' '.join,
)
def test_a_run_on_the_cpu_opens_no_context(text_folder, tmp_path, words):
    env = dict(FEW_COMPILERS)
    if '--parallel=fsdp' in words:
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
        env.update(
            RANK='0',
            WORLD_SIZE='1',
            LOCAL_RANK='0',
            LOCAL_WORLD_SIZE='1',
            MASTER_ADDR='127.0.0.1',
            MASTER_PORT=str(port),
        )
    done = succeed(
        ['train.py', *TINY, f'--dataset={text_folder}', f'--out_dir={tmp_path}', *words],
        before=REPORT,
        env=env,
        timeout=240,
    )
    assert 'context: False' in done.stdout


def test_scripts_that_use_a_model_on_the_cpu_open_no_context(trained, text_folder, tmp_path):
    done = succeed(
        [
            'sample.py',
            f'--out_dir={trained}',
            '--device=cpu',
            '--num_samples=1',
            '--max_new_tokens=5',
        ],
        [
            'evaluate.py',
            f'--out_dir={trained}',
            '--device=cpu',
            f'--dataset={text_folder}',
            f'--out={tmp_path}/figures.json',
        ],
        ['export.py', trained, tmp_path / 'hf'],
        before=REPORT,
    )
    assert 'context: False' in done.stdout
