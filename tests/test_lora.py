"""LoRA: what is trained, what stays, and that in the end there is a plain model again."""

import contextlib
import gc
import json
import runpy
import signal
import sys
from types import SimpleNamespace

import pytest
import torch
from support.outcomes import same
from support.scripts import ROOT, TINY, run
from support.zoo import ZOO, batch, prepared
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import models
from training import checkpoint, lora, optimizer, pretrained
from training.watch import Watch


def linears(model):
    return {
        name
        for name, m in model.named_modules()
        if name.startswith('transformer.h') and isinstance(m, nn.Linear)
    }


@pytest.mark.parametrize('name', ZOO)
def test_it_stands_beside_every_matrix_of_the_blocks_and_is_merged_into_them(name):
    model, (idx, targets) = prepared(name), batch()
    before, base, weights = (
        model(idx, targets)[0],
        linears(model),
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    if not base:
        with pytest.raises(ValueError, match=f'{type(model).__name__} has no matrices in blocks'):
            lora.add(model, 2)
        return
    lora.add(model, 2)
    assert torch.equal(model(idx, targets)[0], before)  # B is zero
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    assert trained == {f'{linear}.lora_{letter}' for linear in base for letter in 'AB'}
    assert same({k: v for k, v in model.state_dict().items() if k not in trained}, weights)
    for k, p in model.named_parameters():
        if k.endswith('lora_B'):
            nn.init.normal_(p)
    model.train()(idx, targets)[1].backward()
    assert {
        k for k, p in model.named_parameters() if p.grad is not None and p.grad.any()
    } == trained
    model.load_state_dict(weights, strict=False)  # batch norm has counted
    learned = model.eval()(idx, targets)[0]
    assert (learned - before).abs().max() > 0.01
    assert lora.merge(model) is model and model.state_dict().keys() == weights.keys()
    assert torch.allclose(model(idx, targets)[0], learned, atol=1e-10)
    assert all(p.requires_grad for p in model.parameters())


def test_a_change_is_twice_b_times_a_whatever_the_rank():
    for rank in (1, 3):
        model = models.build('gpt', block_size=8, vocab_size=12, n_layer=1, n_head=2, n_embd=16)
        lora.add(model, rank)
        linear = model.transformer.h[0].mlp.c_fc
        assert linear.lora_A.shape == (rank, 16) and linear.lora_B.shape == (64, rank)
        assert 0.1 < linear.lora_A.abs().max() <= 16**-0.5
        before, a, b = linear.weight.clone(), linear.lora_A, nn.init.normal_(linear.lora_B)
        lora.merge(model)
        assert torch.allclose(linear.weight, before + 2 * b @ a, atol=1e-6)


def test_muon_is_refused_and_max_norm_leaves_frozen_matrices_alone():
    model = models.build('gpt', block_size=8, vocab_size=12, n_layer=1, n_head=2, n_embd=16)
    lora.add(model, 2)
    with pytest.raises(
        ValueError, match='muon_lr is for whole matrices, and lora_rank trains only thin factors'
    ):
        model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu', {'matrix': 0.02})
    own = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu', max_norm=1e-3)
    before = {k: v.clone() for k, v in model.state_dict().items() if 'lora' not in k}
    model(*[torch.arange(8).view(1, 8)] * 2)[1].backward()
    own.step()
    assert same({k: v for k, v in model.state_dict().items() if 'lora' not in k}, before)
    assert sum(len(group['params']) for group in own.param_groups) == 8


def test_a_step_takes_no_products_for_gradients_of_frozen_matrices():
    model, idx = (
        models.build('gpt', block_size=64, vocab_size=512, n_layer=2, n_head=2, n_embd=64),
        torch.arange(64)[None],
    )
    model.set_attention('plain')  # which is counted
    for rank in (0, 4):
        lora.add(model, rank)
        with FlopCounterMode(display=False) as counted:
            model(idx, idx)[1].backward()
        assert counted.get_total_flops() / idx.numel() == pytest.approx(
            model.flops_per_token(64), rel=0.1
        )


def test_watch_looks_at_what_is_trained(tmp_path):
    model = models.build('gpt', block_size=8, vocab_size=12, n_layer=1, n_head=2, n_embd=16)
    idx = torch.arange(8).view(1, 8)
    lora.add(model, 2)
    data = SimpleNamespace(train_batch=lambda step, micro: (idx.numpy(),))
    watcher = Watch(True, model, tmp_path, 1.0, contextlib.nullcontext(), data)
    model(idx, idx)[1].backward()
    watcher.before_step(True)
    seen = watcher.after_step(dict(iter=0, grad_norm=1.0))
    assert {name.rpartition('.')[2] for name in seen if name.startswith('update_ratio/')} == {
        'lora_A',
        'lora_B',
    }


# ---- a run ---------------------------------------------------------------------------------------


def script(name, *words):
    """Run a script in this process."""
    handlers, words = (
        {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)},
        [str(word) for word in words],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [name, *words])
        try:
            runpy.run_path(str(ROOT / name), run_name='__main__')
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            gc.collect()  # its lock on out_dir


@pytest.fixture(scope='module')
def runs(text_folder, tmp_path_factory):
    """A folder with a run `base`, and one that finetunes it, `lora`."""
    root, words = tmp_path_factory.mktemp('runs'), [*TINY, f'--dataset={text_folder}']
    script('train.py', *words, f'--out_dir={root}/base')
    script('train.py', *finetune(words), f'--init_from={root}/base', f'--out_dir={root}/lora')
    return root


def finetune(words):
    return [
        *words,
        '--lora_rank=2',
        '--gradient_checkpointing=True',
        '--weight_decay=0.5',
        '--max_norm=0.4',
    ]


def logits(model):
    idx = torch.arange(16).view(1, 16)
    return model.eval()(idx, idx)[0]


def test_a_run_leaves_the_base_as_it_is_and_learns_beside_it(runs):
    base, state = (
        checkpoint.read(runs / 'base' / 'ckpt.pt')['model'],
        checkpoint.read(runs / 'lora' / 'ckpt.pt'),
    )
    own = {k: v for k, v in state['model'].items() if '.lora_' in k}
    assert same({k: v for k, v in state['model'].items() if k not in own}, base)
    assert len(own) == 8 and all(v.any() for v in own.values())
    assert len(state['optimizer']['state']) == 8  # no moments of what is frozen
    frozen = pretrained.load_model(runs / 'base')
    assert (logits(pretrained.load_model(runs / 'lora')) - logits(frozen)).abs().max() > 1e-3


def test_what_reads_a_run_gets_a_plain_model_with_the_same_logits(runs, tmp_path):
    unmerged, _ = pretrained.restore_model(checkpoint.read(runs / 'lora' / 'ckpt.pt'))
    merged = pretrained.load_model(runs / 'lora' / 'ckpt.pt')
    assert merged.state_dict().keys() == checkpoint.read(runs / 'base' / 'ckpt.pt')['model'].keys()
    assert torch.allclose(logits(merged), logits(unmerged), atol=1e-6)
    script('export.py', runs / 'lora' / 'ckpt.pt', tmp_path / 'hf')
    assert same(logits(pretrained.load_model(tmp_path / 'hf')), logits(merged))


def test_a_resumed_run_is_the_uninterrupted_one(runs, text_folder, tmp_path):
    words = finetune([*TINY, f'--dataset={text_folder}'])
    script('train.py', *words, f'--init_from={runs}/base', f'--out_dir={tmp_path}', '--max_iters=4')
    script('train.py', '--init_from=resume', f'--out_dir={tmp_path}', '--max_iters=6')
    ours, theirs = (
        [checkpoint.read(folder / 'ckpt.pt')[key] for key in ('model', 'optimizer', 'iter_num')]
        for folder in (tmp_path, runs / 'lora')
    )
    assert same(ours, theirs)


def test_a_run_that_begins_with_what_another_learned_so_may_have_another_rank(
    runs, text_folder, tmp_path
):
    words = [
        *TINY,
        f'--dataset={text_folder}',
        f'--init_from={runs}/lora/ckpt.pt',
        '--max_iters=1',
        '--learning_rate=0',
    ]
    for rank in (0, 3):
        script('train.py', *words, f'--lora_rank={rank}', f'--out_dir={tmp_path}/{rank}')
        weights = checkpoint.read(tmp_path / str(rank) / 'ckpt.pt')['model']
        assert lora.rank_of(weights) == rank
        merged = pretrained.load_model(runs / 'lora' / 'ckpt.pt').state_dict()
        assert same({k: v for k, v in weights.items() if '.lora_' not in k}, merged)
    first, second = (
        (tmp_path / rank / 'metrics.jsonl').read_text().splitlines()[0] for rank in '03'
    )
    assert json.loads(first)['val_loss'] == json.loads(second)['val_loss']  # to the bit


@pytest.mark.parametrize(
    'words, message',
    [
        (
            ['--lora_rank=4', '--init_from=scratch'],
            "lora_rank=4 finetunes a trained model, and init_from='scratch' has none",
        ),
        (
            ['--lora_rank=4', '--init_from=resume', '--out_dir=lora'],
            'the run has lora_rank=2, not 4: remove this setting',
        ),
        (
            ['--lora_rank=0', '--init_from=resume', '--out_dir=lora'],
            'the run has lora_rank=2, not 0: remove this setting',
        ),
        (
            ['--lora_rank=4', '--init_from=resume', '--out_dir=base'],
            'the run has lora_rank=0, not 4: remove this setting',
        ),
        (['--lora_rank=-1', '--init_from=base'], 'lora_rank=-1 must be at least 0'),
        (['--lora_rank=4', '--init_from=base', '--muon_lr=0.1'], 'muon_lr is for whole matrices'),
    ],
)
def test_what_can_not_be_is_said_in_one_line(
    runs, text_folder, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(runs)
    with pytest.raises(SystemExit) as end:
        script(
            'train.py', *([] if 'resume' in words[1] else TINY), f'--dataset={text_folder}', *words
        )
    error = capsys.readouterr().err
    assert (
        end.value.code == 2
        and error.startswith('error: ')
        and message in error
        and error.count('\n') == 1
    )


@pytest.mark.campaign
def test_two_processes_learn_what_one_does(runs, text_folder, tmp_path):
    words = [
        *finetune([*TINY, f'--dataset={text_folder}', f'--init_from={runs}/base']),
        '--learning_rate=1e-3',
    ]
    for n in (1, 2):
        done = run('train.py', *words, f'--out_dir={tmp_path}/{n}', processes=n)
        assert done.returncode == 0, done.stderr
    one, two = (checkpoint.read(tmp_path / f'{n}/ckpt.pt')['model'] for n in (1, 2))
    assert all(torch.allclose(one[k], two[k], atol=1e-6) for k in one)


def test_frozen_parameters_are_no_business_of_any_optimizer():
    frozen, free = (nn.Parameter(torch.ones(2, 2), requires_grad=flag) for flag in (False, True))
    assert optimizer.build_optimizer({'matrix': [frozen]}, 0.1, 1e-3, (0.9, 0.95), 'cpu') is None
    own = optimizer.build_optimizer(
        {'matrix': [frozen, free]}, 0.1, 1e-3, (0.9, 0.95), 'cpu', name='sgd'
    )
    assert [len(group['params']) for group in own.param_groups] == [1, 0]
