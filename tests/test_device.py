"""Which device a script uses, and that it asks about no other one.

A run on the CPU must work where another program has all of the GPU.
"""

import functools
import json
import shutil

import pytest
import torch
from support.forked import ranks, run, train
from support.hooks import both, forbid_cuda
from support.scripts import TINY

import configurator
from system.device import resolve_device, resolve_dtype, seed_everything
from training import checkpoint, fsdp, pretrained

NO_DEVICE = [word for word in TINY if not word.startswith('--device')]


# ---- nothing is asked of CUDA --------------------------------------------------------------------


@pytest.mark.parametrize(
    'words',
    [
        [],
        ['--dtype=float16'],
        ['--dtype=bfloat16', '--model=modern', '--muon_lr=0.01', '--gradient_checkpointing=True'],
        ['--deterministic=True', '--watch=True', '--profile=True', '--max_iters=16'],
        ['--eval_only=True'],
    ],
    ids=' '.join,
)
def test_a_run_on_the_cpu_leaves_the_gpu_alone(text_folder, tmp_path, words):
    train(tmp_path, *TINY, f'--dataset={text_folder}', *words, hook=forbid_cuda)


def test_a_run_resumed_on_the_cpu_leaves_the_gpu_alone(trained, tmp_path):
    out_dir = shutil.copytree(trained, tmp_path / 'out')
    train(out_dir, '--init_from=resume', '--max_iters=8', hook=forbid_cuda)


@pytest.mark.parametrize('kind, n', [('ddp', 2), ('fsdp', 1)])
def test_several_processes_on_the_cpu_leave_the_gpu_alone(text_folder, tmp_path, kind, n):
    settings = [*TINY, f'--dataset={text_folder}', f'--parallel={kind}', f'--out_dir={tmp_path}']
    for words in (['--max_iters=3'], ['--max_iters=6', '--init_from=resume']):
        runs = ranks(n, 'train.py', *settings, *words, hook=forbid_cuda)
        for each in runs:
            done = each.wait()
            assert done.returncode == 0, done.output
    if kind == 'fsdp':
        assert checkpoint.read_latest(tmp_path)['shards']['folder'] == 'shards-6'


def read_parts(out_dir):
    """In a process of its own: the whole weights of a checkpoint in parts."""
    forbid_cuda()
    shards = checkpoint.read_latest(out_dir)['shards']
    print(len(fsdp.read_whole_state(shards['out_dir'], shards)['model']))


def test_a_checkpoint_in_parts_is_read_without_cuda(text_folder, tmp_path):
    settings = [*TINY, f'--dataset={text_folder}', '--parallel=fsdp', f'--out_dir={tmp_path}']
    (only,) = ranks(1, 'train.py', *settings, '--max_iters=3')
    only.wait()
    done = run(None, hook=functools.partial(read_parts, tmp_path))
    assert done.returncode == 0, done.output
    assert int(done.output) == len(pretrained.open_model(tmp_path)[0].state_dict())


@pytest.mark.parametrize(
    'script, words',
    [
        ('sample.py', ['--device=cpu', '--num_samples=2', '--max_new_tokens=20']),
        ('sample.py', ['--device=cpu', '--num_beams=2', '--max_new_tokens=5', '--dtype=float32']),
        ('evaluate.py', ['--device=cpu', '--limit=100']),
        ('export.py', ['--folder={tmp_path}/hf']),
    ],
    ids=['sample', 'beams', 'evaluate', 'export'],
)
def test_scripts_that_use_a_model_on_the_cpu_leave_the_gpu_alone(
    trained, text_folder, tmp_path, script, words
):
    out_dir = shutil.copytree(trained, tmp_path / 'out')
    words = [word.format(tmp_path=tmp_path) for word in words]
    if script == 'evaluate.py':
        words.append(f'--dataset={text_folder}')
    done = run(script, f'--out_dir={out_dir}', *words, hook=forbid_cuda)
    assert done.returncode == 0, done.output


def choose_a_device():
    resolve_device('auto')


def use_it():
    torch.zeros(1, device='cuda')


def seed_it():
    seed_everything(1, device='cuda')


@pytest.mark.parametrize('ask', [choose_a_device, use_it, seed_it])
def test_that_a_question_would_be_noticed(ask):
    done = run(None, hook=functools.partial(both, forbid_cuda, ask))
    assert done.returncode == 1 and 'AskedForCuda' in done.output


# ---- which device --------------------------------------------------------------------------------


def never(*args):
    raise AssertionError("asked")


def test_a_named_device_is_the_only_one_asked_about(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', never)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert resolve_device('cpu') == 'cpu' and resolve_device('mps') == 'mps'
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', never)
    with pytest.raises(ValueError, match="device='cuda' is not available here: "):
        resolve_device('cuda')


def test_auto_goes_on_where_a_run_was(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', never)
    assert resolve_device('auto', 'cpu') == 'cpu'  # though there may be a GPU
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert resolve_device('auto', 'mps') == 'mps' and capsys.readouterr().out == ''
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: False)
    assert resolve_device('auto', 'cuda') == 'cpu'
    (line,) = capsys.readouterr().out.splitlines()
    assert (
        line
        == "the run used device='cuda', which can't be used here: it continues with device='cpu'"
    )


def test_a_config_file_sees_the_device_and_the_setting_stays_auto(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text("out_dir = 'out-' + device")

    def configure(*words, resolve=lambda device: 'mps'):
        settings = dict(device='auto', out_dir='out')
        return configurator.configure(settings, list(words), resolve)[0]

    assert configure(str(path)) == dict(device='auto', out_dir='out-mps')
    path.write_text("device = 'cpu' if device == 'mps' else device")
    assert configure(str(path))['device'] == 'cpu'
    assert configure(str(path), '--device=auto')['device'] == 'auto'
    assert configure(resolve=never)['device'] == 'auto'  # there is no file that would see it


@pytest.fixture(scope='module')
def automatic(text_folder, tmp_path_factory):
    """The out_dir of a run that nobody told its device: here it was the CPU."""
    out_dir = tmp_path_factory.mktemp('automatic') / 'out'
    train(out_dir, *NO_DEVICE, f'--dataset={text_folder}')
    return out_dir


def test_auto_is_kept_as_the_wish_it_is(automatic):
    config = json.loads((automatic / 'config.json').read_text())
    assert (config['device'], config['resolved']['device']) == ('auto', 'cpu')
    state = checkpoint.read_latest(automatic)
    assert (state['config']['device'], state['resolved']['device']) == ('auto', 'cpu')


def test_a_run_of_a_cpu_that_comes_to_a_machine_with_a_gpu_goes_on_as_it_was(automatic, tmp_path):
    out_dir = shutil.copytree(automatic, tmp_path / 'out')
    out = train(out_dir, '--init_from=resume', '--max_iters=8', hook=forbid_cuda)
    assert 'machine: 1 x cpu' in out and 'it continues with' not in out


def test_a_run_of_a_gpu_that_comes_to_a_machine_without_goes_on_on_the_cpu(automatic, tmp_path):
    state = checkpoint.read_latest(automatic)
    state['resolved'] |= dict(device='cuda', dtype='float16')  # which no CPU chooses
    state['config']['dtype'] = 'auto'
    (tmp_path / 'out').mkdir()
    checkpoint.save(tmp_path / 'out', 'ckpt.pt', state)
    out = train(tmp_path / 'out', '--init_from=resume', '--max_iters=8')
    assert "the run used device='cuda'" in out and "it continues with device='cpu'" in out
    assert f"machine: 1 x cpu, {resolve_dtype('auto', 'cpu')}" in out
