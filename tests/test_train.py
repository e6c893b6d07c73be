"""train.py as a user runs it: processes and accumulation change nothing but rounding, and another
architecture needs no change in it. tests/test_resume.py has what resuming promises,
tests/test_faults.py what comes between."""

import json
import shutil

import pytest
import torch
from support.forked import train
from support.outcomes import learned, losses, metrics, same
from support.scripts import ROOT, TINY, run

from model import GPT, GPTConfig
from training import checkpoint, pretrained

# ---- processes, accumulation ---------------------------------------------------------------------


def close(a, b, tolerance=1e-6):
    pairs = zip(learned(a)['model'].values(), learned(b)['model'].values(), strict=True)
    assert all((x - y).abs().max() <= tolerance for x, y in pairs)
    for x, y in zip(losses(a), losses(b), strict=True):
        assert x == pytest.approx(y, abs=10 * tolerance)


def test_two_processes_equal_one(text_folder, tmp_path):
    settings = [
        *TINY,
        f'--dataset={text_folder}',
        '--gradient_accumulation_steps=4',
        '--learning_rate=1e-3',
    ]
    train(tmp_path / '1', *settings)
    train(tmp_path / '2', *settings, processes=2)
    close(tmp_path / '1', tmp_path / '2')


def test_accumulation_equals_the_big_batch(text_folder, tmp_path):
    settings = [
        *TINY,
        f'--dataset={text_folder}',
        '--dropout=0.0',
        '--learning_rate=1e-3',
        '--eval_iters=200',
    ]
    train(tmp_path / '1', *settings, '--gradient_accumulation_steps=1', '--batch_size=8')
    train(tmp_path / '4', *settings, '--gradient_accumulation_steps=4', '--batch_size=2')
    close(tmp_path / '1', tmp_path / '4')


# ---- what a run does and leaves ------------------------------------------------------------------


def test_what_a_run_leaves(trained):
    lines = metrics(trained)
    evaluations = [line for line in lines if 'val_loss' in line]
    assert [line['iter'] for line in evaluations] == [0, 3, 6]
    for line in evaluations:
        assert set(line) == {
            'iter',
            'tokens',
            'train_loss',
            'val_loss',
            'val_bpb',
            'train_seconds',
            'wall_seconds',
        }
    assert evaluations[-1]['tokens'] == 6 * 2 * 4 * 16
    steps = [line for line in lines if 'loss' in line]
    assert [line['iter'] for line in steps] == list(range(6))
    assert {'lr', 'grad_norm', 'ms', 'tokens_per_second', 'mfu', 'peak_memory'} <= set(steps[0])
    assert {'ckpt.pt', 'ckpt.prev.pt', 'best.pt', 'sums.json', 'config.json', 'metrics.jsonl'} == {
        path.name for path in trained.iterdir()
    } - {'.lock'}
    config = json.loads((trained / 'config.json').read_text())
    assert config['n_embd'] == 16 and config['resolved']['dtype'] == 'float32'
    state = torch.load(trained / 'ckpt.pt', weights_only=True)
    # nanoGPT's keys
    assert {'model', 'optimizer', 'model_args', 'iter_num', 'best_val_loss', 'config'} <= set(state)


def test_a_finished_run_is_not_trained_again_and_goes_on_when_asked(trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'out')
    assert 'larger --max_iters' in train(tmp_path / 'out', '--init_from=resume')
    assert same(learned(tmp_path / 'out'), learned(trained))
    train(tmp_path / 'out', '--init_from=resume', '--max_iters=8')
    assert metrics(tmp_path / 'out')[-1]['iter'] == 8


def test_the_command_line_wins_over_the_optimizers_stored_options(trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'out')
    train(
        tmp_path / 'out', '--init_from=resume', '--max_iters=7', '--weight_decay=0.7', '--beta2=0.5'
    )
    decay, keep = checkpoint.read(tmp_path / 'out' / 'ckpt.pt')['optimizer']['param_groups']
    assert (decay['weight_decay'], keep['weight_decay'], decay['betas']) == (0.7, 0.0, (0.9, 0.5))


def test_an_earlier_run_in_out_dir_is_set_aside(trained, text_folder, tmp_path):
    shutil.copytree(trained, tmp_path / 'out')
    out = train(
        tmp_path / 'out', *TINY, f'--dataset={text_folder}', '--max_iters=1', '--eval_interval=0'
    )
    assert 'earlier' in out
    assert same(learned(tmp_path / 'out' / 'earlier-1'), learned(trained))


def test_eval_only_and_finetuning_from_an_out_dir(trained, text_folder, tmp_path):
    out = train(
        tmp_path / 'none',
        f'--init_from={trained}',
        '--eval_only=True',
        f'--dataset={text_folder}',
        '--device=cpu',
        '--block_size=16',
        '--batch_size=4',
        '--dtype=float32',
        '--eval_iters=1000',
    )
    assert (
        f" {metrics(trained)[-1]['val_loss']:.4f} " in out.splitlines()[-1]
        and not (tmp_path / 'none').exists()
    )
    train(
        tmp_path / 'tuned',
        *TINY,
        f'--init_from={trained}',
        '--block_size=8',
        f'--dataset={text_folder}',
    )
    # not from scratch
    assert metrics(tmp_path / 'tuned')[0]['val_loss'] < metrics(trained)[0]['val_loss'] - 0.04
    assert pretrained.load_model(tmp_path / 'tuned').config.block_size == 8


def test_early_stop(text_folder, tmp_path):
    train(
        tmp_path,
        *TINY,
        f'--dataset={text_folder}',
        '--learning_rate=0',
        '--min_lr=0',
        '--eval_interval=1',
        '--max_iters=50',
        '--early_stop=2',
    )
    evaluations = [line['iter'] for line in metrics(tmp_path) if 'val_loss' in line]
    assert evaluations == [0, 1, 2]


def test_sampling_takes_the_best_weights_or_the_latest(trained, tmp_path):
    latest, best = (checkpoint.read(trained / name)['model'] for name in ('ckpt.pt', 'best.pt'))
    shutil.copytree(trained, tmp_path / 'out')
    state = checkpoint.read(trained / 'best.pt')
    state['model'] = {k: v + 1 for k, v in best.items()}  # so that they differ
    checkpoint.save(tmp_path / 'out', 'best.pt', state)
    # always_save_checkpoint
    assert same(dict(pretrained.load_model(tmp_path / 'out').state_dict()), dict(latest))
    (tmp_path / 'out' / 'config.json').write_text('{"always_save_checkpoint": false}')
    assert same(dict(pretrained.load_model(tmp_path / 'out').state_dict()), state['model'])


def test_sample_needs_no_data_folder(trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'out')
    done = run(
        'sample.py',
        f'--out_dir={tmp_path / "out"}',
        '--start=def',
        '--num_samples=2',
        '--max_new_tokens=20',
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split('-' * 15 + '\n')) == 3 and done.stdout.startswith('def')
    again = run(
        'sample.py',
        f'--out_dir={tmp_path / "out"}',
        '--start=def',
        '--num_samples=2',
        '--max_new_tokens=20',
    )
    assert again.stdout == done.stdout  # seeded


def test_random_data_and_bench(tmp_path):
    done = run('bench.py', *TINY, '--versus=--dtype=bfloat16', '--steps=5', '--warmup=2')
    assert done.returncode == 0, done.stderr
    assert 'A is' in done.stdout and 'tokens/s' in done.stdout and 'mfu' in done.stdout


# ---- nanoGPT's checkpoints -----------------------------------------------------------------------


@pytest.mark.parametrize('prefix', [pytest.param('', marks=pytest.mark.campaign), '_orig_mod.'])
def test_a_nanogpt_checkpoint_samples_and_resumes(text_folder, tmp_path, prefix):
    from text.meta import read_meta

    vocab_size = read_meta(text_folder)[1]
    args = dict(
        n_layer=1,
        n_head=2,
        n_embd=16,
        block_size=16,
        bias=False,
        vocab_size=vocab_size,
        dropout=0.0,
    )
    model = GPT(GPTConfig(**args))
    decay, keep = (
        [p for p in model.parameters() if p.dim() >= 2],
        [p for p in model.parameters() if p.dim() < 2],
    )
    optimizer = torch.optim.AdamW(
        [dict(params=decay, weight_decay=0.1), dict(params=keep, weight_decay=0.0)], lr=1e-3
    )
    idx = torch.zeros(1, 4, dtype=torch.long)
    model(idx, idx)[1].backward()
    optimizer.step()
    torch.save(
        {
            'model': {prefix + k: v for k, v in model.state_dict().items()},
            'optimizer': optimizer.state_dict(),
            'model_args': args,
            'iter_num': 1,
            'best_val_loss': torch.tensor(3.0),
            'config': {
                'dataset': str(text_folder),
                'batch_size': 4,
                'block_size': 16,
                'device': 'cpu',
                'dtype': 'float32',
                'compile': False,
                'gradient_accumulation_steps': 1,
                'eval_iters': 1,
            },
        },
        tmp_path / 'ckpt.pt',
    )
    loaded = pretrained.load_model(tmp_path)
    assert (
        same(dict(loaded.state_dict()), dict(model.state_dict()))
        and loaded.tokenizer.vocab_size == vocab_size
    )
    train(tmp_path, '--init_from=resume', '--max_iters=3')
    assert [line['iter'] for line in metrics(tmp_path)] == [1, 2, 3]


def test_a_nanogpt_checkpoint_whose_data_is_gone_says_no_tokenizer(tmp_path):
    args = dict(
        n_layer=1, n_head=2, n_embd=16, block_size=16, bias=False, vocab_size=65, dropout=0.0
    )
    torch.save(
        {
            'model': GPT(GPTConfig(**args)).state_dict(),
            'model_args': args,
            'config': {'dataset': 'gone'},
        },
        tmp_path / 'ckpt.pt',
    )
    assert pretrained.load_model(tmp_path).tokenizer is None


# ---- another architecture ------------------------------------------------------------------------

FAKE = '''
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F
from model import LanguageModel

@dataclass
class FakeConfig:
    block_size: int = 16
    vocab_size: int = 32
    width: int = 8  # channels

class Fake(LanguageModel):
    Config = FakeConfig

    def __init__(self, config):
        super().__init__(config)
        self.emb = nn.Embedding(config.vocab_size, config.width)
        self.lm_head = nn.Linear(config.width, config.vocab_size)
        self.register_buffer('steps', torch.zeros((), dtype=torch.long))

    def forward(self, idx, targets=None, cache=None):
        logits = self.lm_head(self.emb(idx))
        if targets is None:
            return logits[:, -1:], None
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return (None if self.training else logits), loss

    def after_step(self):
        self.steps += 1
'''

COUNTS = '''
from dataclasses import dataclass
import torch
from model import LanguageModel

@dataclass
class CountsConfig:
    block_size: int = 16
    vocab_size: int = 32

class Counts(LanguageModel):
    Config = CountsConfig

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer('counts', torch.ones(config.vocab_size))

    def fit(self, batches):
        for _, targets in batches:
            targets = torch.as_tensor(targets)
            self.counts += torch.bincount(targets[targets >= 0], minlength=len(self.counts))

    def forward(self, idx, targets=None, cache=None):
        logits = self.counts.log().expand(*idx.shape, -1)
        if targets is None:
            return logits[:, -1:], None
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
'''


@pytest.fixture
def project(tmp_path):
    """A copy of the project with two more models in models/."""
    root = tmp_path / 'project'
    shutil.copytree(
        ROOT,
        root,
        ignore=shutil.ignore_patterns('.git', '.venv', 'out*', 'data', 'tests', '__pycache__'),
    )
    (root / 'models' / 'fake.py').write_text(FAKE)
    (root / 'models' / 'counts.py').write_text(COUNTS)
    return root


def test_another_architecture_needs_no_change_in_train(project, text_folder, tmp_path):
    settings = [
        '--model=fake',
        '--width=4',
        '--block_size=16',
        '--batch_size=4',
        '--gradient_accumulation_steps=1',
        '--device=cpu',
        '--eval_interval=2',
        '--eval_iters=2',
        f'--dataset={text_folder}',
        '--learning_rate=0.1',
        '--warmup_iters=0',
        '--dtype=float32',
    ]
    train(tmp_path / 'whole', *settings, '--max_iters=4', cwd=project)
    train(tmp_path / 'cut', *settings, '--max_iters=2', cwd=project)
    train(tmp_path / 'cut', '--init_from=resume', '--max_iters=4', cwd=project)
    a, b = learned(tmp_path / 'whole'), learned(tmp_path / 'cut')
    assert same(a, b) and a['model']['steps'] == 4 and a['model']['emb.weight'].size(1) == 4
    done = run(
        'sample.py',
        f'--out_dir={tmp_path / "cut"}',
        '--max_new_tokens=5',
        '--num_samples=1',
        cwd=project,
    )
    assert done.returncode == 0, done.stderr


def test_a_finetuned_model_keeps_its_architecture_and_its_context(project, text_folder, tmp_path):
    settings = [
        '--block_size=16',
        '--batch_size=4',
        '--gradient_accumulation_steps=1',
        '--device=cpu',
        '--max_iters=2',
        '--eval_iters=2',
        f'--dataset={text_folder}',
        '--dtype=float32',
    ]
    train(tmp_path / 'a', '--model=fake', *settings, cwd=project)
    # without its name and context
    train(tmp_path / 'b', f'--init_from={tmp_path / "a"}', *settings[1:], cwd=project)
    train(tmp_path / 'b', '--init_from=resume', '--max_iters=3', cwd=project)
    state = checkpoint.read(tmp_path / 'b' / 'ckpt.pt')
    assert (
        state['model_name'] == 'fake'
        and state['model_args']['block_size'] == 16
        and state['config']['model'] == 'fake'
    )


def test_a_counted_model_has_no_optimizer(project, text_folder, tmp_path):
    train(
        tmp_path,
        '--model=counts',
        '--block_size=16',
        '--batch_size=4',
        '--gradient_accumulation_steps=1',
        '--device=cpu',
        f'--dataset={text_folder}',
        cwd=project,
    )
    before, after = metrics(tmp_path)
    # all there are, whatever the batch
    assert after['val_loss'] < before['val_loss'] and after['tokens'] == 3600
    counts = checkpoint.read(tmp_path / 'ckpt.pt')['model']['counts']
    assert counts.sum() == 3599 + len(counts)  # every one but the first, and the ones it began with
