"""The machine's part: devices, formats, peaks, compilation and what stands in for it where it can't
be had."""

import json
import math
import sys

import pytest
import torch
from support.scripts import TINY, run

from system.compilation import compile_model
from system.device import (
    cpu_has_bfloat16,
    gpu_peak_flops,
    measured_peak_flops,
    memory_errors,
    resolve_device,
    resolve_dtype,
    seed_everything,
)
from training.console import seconds, short
from training.schedule import learning_rate_at


def test_devices_and_formats():
    assert resolve_device('cpu') == 'cpu'
    assert resolve_dtype('auto', 'cpu') == ('bfloat16' if cpu_has_bfloat16() else 'float32')
    for wrong in ('gpu', 'cuda:x', 'cpu1', 'tpu', ''):
        with pytest.raises(ValueError, match='unknown'):
            resolve_device(wrong)
    with pytest.raises(ValueError, match='float8'):
        resolve_dtype('float8', 'cpu')


def test_an_old_gpu_gets_no_emulated_bfloat16(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: (7, 5))
    assert resolve_dtype('auto', 'cuda') == 'float16'
    with pytest.raises(ValueError, match='float16'):
        resolve_dtype('bfloat16', 'cuda')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: (8, 0))
    assert resolve_dtype('auto', 'cuda') == 'bfloat16'


def test_a_gpu_that_the_wheel_has_no_kernels_for_is_passed_over(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device=None: 'GeForce GTX 1080')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device=None: (6, 1))
    monkeypatch.setattr(
        torch.cuda, 'get_arch_list', lambda: ['sm_75', 'sm_80', 'sm_90', 'compute_90']
    )
    assert resolve_device('auto') in ('cpu', 'mps') and '1080' in capsys.readouterr().err
    with pytest.raises(ValueError, match='no kernels'):
        resolve_device('cuda')
    for capability in ((8, 6), (9, 0), (12, 0)):  # by a smaller minor version, exactly, by PTX
        monkeypatch.setattr(
            torch.cuda, 'get_device_capability', lambda device=None, c=capability: c
        )
        assert resolve_device('auto') == 'cuda'


@pytest.mark.parametrize(
    'name, tflops',
    [
        ('NVIDIA A100-SXM4-80GB', 312),
        ('NVIDIA H100 80GB HBM3', 989),
        ('NVIDIA H100 PCIe', 756),
        ('NVIDIA H200', 989),
        ('NVIDIA GeForce RTX 4090', 165.2),
        ('Tesla T4', 65),
        ('NVIDIA L4', 121),
        ('NVIDIA L40S', 362),
        ('NVIDIA A10G', 70),
    ],
)
def test_known_gpus_have_their_own_peak(name, tflops):
    assert gpu_peak_flops(name, 'bfloat16') == tflops * 1e12


@pytest.mark.parametrize(
    'name',
    [
        'NVIDIA GeForce RTX 4090 Laptop GPU',
        'NVIDIA GeForce RTX 3090 Ti',
        'NVIDIA H1000',
        'AMD Instinct MI300X',
        'NVIDIA A100-SXM4-40GB MIG 1g.5gb',
        'NVIDIA GeForce GTX 1080',
    ],
)
def test_an_unknown_gpu_has_none(name):
    assert gpu_peak_flops(name, 'bfloat16') is None


def test_out_of_memory_is_one_line_of_advice(capsys):
    with pytest.raises(SystemExit) as end, memory_errors("halve it"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …\nmore")
    assert end.value.code == 2 and capsys.readouterr().err == 'error: out of memory: halve it\n'
    with pytest.raises(RuntimeError, match='another'), memory_errors("halve it"):
        raise RuntimeError("another")


@pytest.mark.skipif(sys.platform != 'linux', reason="limits memory by RLIMIT_DATA")
def test_out_of_memory_in_a_real_run(text_folder, tmp_path):
    done = run(
        '-c',
        LITTLE_MEMORY,
        *TINY,
        f'--dataset={text_folder}',
        f'--out_dir={tmp_path}',
        '--batch_size=100000',
    )
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert (
        'out of memory: halve --batch_size=100000 and double --gradient_accumulation_steps=2'
        in done.stderr
    )


LITTLE_MEMORY = '''
import resource, runpy, sys
sys.path.insert(0, '.')
import system.device
in_use = int(open('/proc/self/statm').read().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (in_use + 2 ** 30, in_use + 2 ** 30))
runpy.run_path('train.py', run_name='__main__')
'''


@pytest.mark.skipif(sys.platform == 'win32', reason="the compiler is found differently")
@pytest.mark.parametrize('wish, code', [('auto', 0), ('True', 2)])
def test_without_a_compiler_a_run_goes_on_eagerly_unless_told_to_compile(
    text_folder, tmp_path, wish, code
):
    done = run(
        '-c',
        COMPILE_ALWAYS,
        *TINY,
        f'--dataset={text_folder}',
        f'--out_dir={tmp_path}',
        f'--compile={wish}',
        env={'CXX': '/nowhere/c++', 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache')},
    )
    assert done.returncode == code, done.stderr
    assert 'torch.compile does not work here' in done.stderr and 'Traceback' not in done.stderr


# `auto` compiles only where the run is long; this one compiles however short it is.
COMPILE_ALWAYS = '''
import runpy, sys
sys.path.insert(0, '.')
import system.compilation
system.compilation.resolve_compile = lambda mode, device: mode in (True, 'auto')
runpy.run_path('train.py', run_name='__main__')
'''


@pytest.mark.parametrize(
    'steps, others, is_compiled', [(10, False, False), (10**9, False, True), (10, True, True)]
)
def test_auto_compiles_where_the_run_is_long_enough(steps, others, is_compiled):
    """`others`: another process has decided so."""

    class Model(torch.nn.Linear):
        def compile(self):
            self._compiled_call_impl = self.forward

    model = Model(4, 4)
    model.register_buffer('seen', torch.zeros(()))

    def try_step():
        model.seen += 1
        model(torch.randn(2, 4)).sum().backward()

    compiled = compile_model(
        model,
        [model],
        mode='auto',
        is_required=False,
        try_step=try_step,
        steps=steps,
        device='cpu',
        any_rank=lambda flag: flag or others,
    )
    assert compiled == is_compiled and model.seen == 0 and model.weight.grad is None


def test_a_decision_to_compile_is_kept_on_resume(text_folder, tmp_path):
    settings = [
        *(word for word in TINY if 'compile' not in word),
        f'--dataset={text_folder}',
        f'--out_dir={tmp_path}',
    ]
    code = COMPILE_IN_NAME_ONLY.format(steps=1)
    assert run('-c', code, *settings).returncode == 0
    assert json.loads((tmp_path / 'config.json').read_text())['resolved']['compile'] is True
    code = COMPILE_IN_NAME_ONLY.format(steps=10**9)
    done = run('-c', code, '--init_from=resume', f'--out_dir={tmp_path}', '--max_iters=8')
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / 'config.json').read_text())['resolved']['compile'] is True


COMPILE_IN_NAME_ONLY = '''
import runpy, sys
sys.path.insert(0, '.')
import torch
import system.compilation
torch.nn.Module.compile = lambda self: setattr(self, '_compiled_call_impl', self._call_impl)
system.compilation.COMPILE_PAYS = {{'cpu': {steps} * 1e-9}}
runpy.run_path('train.py', run_name='__main__')
'''


def test_cosine_schedule():
    def lr(step):
        return learning_rate_at(step, peak=1.0, floor=0.1, warmup_steps=10, decay_steps=110)

    assert lr(0) == pytest.approx(1 / 11) and lr(9) == pytest.approx(10 / 11) and lr(10) == 1.0
    assert lr(60) == pytest.approx(0.55) and lr(110) == lr(10**6) == 0.1
    assert all(lr(i) >= lr(i + 1) for i in range(10, 120))


def test_seeds_are_functions_of_all_their_parts():
    def draw(*key):
        seed_everything(*key, device='cpu')
        return torch.rand(4).tolist()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert (
        len({tuple(draw(*key)) for key in ((1, 2, 3), (1, 3, 2), (2, 2, 3), (1, 2), (0, 1, 2, 3))})
        == 5
    )


def test_measured_peak_is_a_speed():
    assert 1e9 < measured_peak_flops('float32', size=256, seconds=0.05) < 1e15 and math.isfinite(
        measured_peak_flops('bfloat16', size=256, seconds=0.05)
    )


def test_numbers_for_people():
    assert [seconds(t) for t in (41, 205, 25380)] == ['41 s', '3:25 min', '7:03 h']
    assert [short(n) for n in (950, 12345, 1.24e6, 3.1e9)] == ['950', '12.3k', '1.24M', '3.1B']
