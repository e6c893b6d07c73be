"""Muon against its definition, matrix by matrix; groups by role; the schedules."""

import copy
import math

import pytest
import torch
from support.outcomes import same
from support.scripts import TINY, run
from torch import nn

from models import build
from training import checkpoint, optimizer
from training.schedule import learning_rate_at

LRS = {'matrix': 0.02, 'embedding': 0.3, 'head': 0.005}


def small(**fields):
    torch.manual_seed(0)
    model = build(
        'gpt',
        **{
            **dict(block_size=8, vocab_size=12, n_layer=2, n_head=2, n_embd=16, bias=False),
            **fields,
        },
    )
    model.lm_head.weight = nn.Parameter(torch.randn(12, 16))  # untied, so that there is a head
    return model


def muon(model, weight_decay=0.0, **options):
    return model.configure_optimizers(weight_decay, 1e-3, (0.9, 0.95), 'cpu', lrs=LRS, **options)


def test_orthogonalize():
    torch.manual_seed(0)
    for shape in ((5, 24, 48), (3, 16, 64), (2, 64, 16)):
        batch = torch.randn(shape)
        out = optimizer.orthogonalize(batch)
        values = torch.linalg.svdvals(out)
        assert out.shape == batch.shape and values.min() > 0.6 and values.max() < 1.25
        u, _, vh = torch.linalg.svd(batch, full_matrices=False)
        assert ((out - u @ vh).norm() / (u @ vh).norm()) < 0.3  # the same directions
        alone = torch.cat([optimizer.orthogonalize(one[None]) for one in batch])
        assert torch.allclose(out, alone, atol=1e-4)


def test_steps_are_the_definition():
    """Momentum from 0.85 up, Nesterov's look ahead, each matrix on its own (q, k and v too), scaled
    by its shape."""
    model = small()
    opt, average = muon(model, weight_decay=0.5), {}
    watched = {
        'c_attn': model.transformer.h[1].attn.c_attn.weight,
        'c_fc': model.transformer.h[0].mlp.c_fc.weight,
        'c_proj': model.transformer.h[0].mlp.c_proj.weight,
    }
    for step in range(3):
        expected = {}
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        for name, p in watched.items():
            momentum = 0.85 + 0.10 * step / 300
            average[name] = momentum * average.get(name, 0) + (1 - momentum) * p.grad
            update = (1 - momentum) * p.grad + momentum * average[name]
            parts = update.chunk(3) if name == 'c_attn' else [update]
            update = torch.cat(
                [
                    optimizer.orthogonalize(part[None])[0]
                    * math.sqrt(max(1, part.size(0) / part.size(1)))
                    for part in parts
                ]
            )
            decay = 0.5 * p.detach() * (update * p.detach() > 0)  # cautious
            expected[name] = p.detach() - 0.02 * (update + decay)
        for group in opt.param_groups:
            group['lr'] = 1e-3 * group['lr_ratio']
        opt.step()
        for name, p in watched.items():
            assert torch.allclose(p, expected[name], atol=1e-5), (step, name)


def test_groups_by_role_and_width():
    model = small(n_embd=192, n_head=2)
    model.lm_head.weight = nn.Parameter(torch.randn(12, 192))
    groups = muon(model, weight_decay=0.1).param_groups
    role_of = {id(p): role for role, ps in model.param_groups().items() for p in ps}
    seen = {}
    for group in groups:
        for p in group['params']:
            seen[role_of[id(p)]] = (
                round(1e-3 * group['lr_ratio'], 6),
                group['weight_decay'],
                group['muon'],
            )
    assert seen == {
        'matrix': (0.02, 0.1, True),
        'embedding': (0.6, 0.1, False),
        'head': (0.01, 0.1, False),
        # 192 is a quarter of 768: twice the rate, where it is scaled
        'vector': (1e-3, 0.0, False),
    }
    assert sum(len(group['params']) for group in groups) == len(list(model.parameters()))


def test_without_rates_of_their_own_it_is_nanogpts_adamw():
    model = small()
    opt = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu', lrs=dict.fromkeys(LRS, 0.0))
    assert type(opt) is optimizer.AdamW and [g['weight_decay'] for g in opt.param_groups] == [
        0.1,
        0.0,
    ]
    assert {g['lr_ratio'] for g in opt.param_groups} == {1.0}


def test_groups_do_not_depend_on_the_values_of_rates_and_decay():
    """Or a run could not be resumed with others."""

    def sizes(weight_decay, lrs):
        opt = small().configure_optimizers(weight_decay, 1e-3, (0.9, 0.95), 'cpu', lrs=lrs)
        return [len(group['params']) for group in opt.param_groups]

    assert sizes(0.0, None) == sizes(0.1, {}) and len(sizes(0.0, None)) == 2
    assert (
        sizes(0.0, LRS)
        == sizes(0.1, LRS)
        == sizes(0.1, dict.fromkeys(LRS, 0.1))
        == sizes(0.1, {'head': 1e-3})
    )


@pytest.mark.parametrize('first, then', [('sgd', 'adamw'), ('adamw', 'sgd')])
def test_a_state_of_the_other_optimizer_is_refused(first, then):
    one, other = (
        small().configure_optimizers(0.1, 0.5, (0.9, 0.95), 'cpu', name=name)
        for name in (first, then)
    )
    with pytest.raises(ValueError, match="another optimizer's"):
        optimizer.load_optimizer_state(other, one.state_dict())


@pytest.mark.parametrize(
    'first, then', [(LRS, {**LRS, 'matrix': 0}), ({**LRS, 'matrix': 0}, LRS), ({}, LRS), (LRS, {})]
)
def test_a_state_of_other_optimizers_is_refused(first, then):
    def opt(lrs):
        return small().configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu', lrs=lrs)

    with pytest.raises(ValueError, match='muon_lr, embed_lr or head_lr'):
        optimizer.load_optimizer_state(opt(then), opt(first).state_dict())


def test_a_stack_of_matrices_is_orthogonalised_one_by_one():
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 8, 16))
    alone = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    grads = torch.randn(3, 8, 16)
    for params, grad in (([stack], [grads]), (alone, grads)):
        opt = optimizer.build_optimizer(
            {'matrix': params}, 0.1, 1e-3, (0.9, 0.95), 'cpu', {'matrix': 0.02}
        )
        for p, g in zip(params, grad):
            p.grad = g.clone()
        opt.step()
    assert torch.allclose(stack, torch.stack(list(alone)), atol=1e-5)


def test_a_rate_without_learning_rate_is_refused():
    with pytest.raises(ValueError, match='learning_rate=0'):
        small().configure_optimizers(0.1, 0.0, (0.9, 0.95), 'cpu', lrs=LRS)


def test_state_goes_through_a_state_dict():
    torch.manual_seed(0)
    model, twin = small(), small()
    opt, other = muon(model), muon(twin)

    def step(model, opt, seed):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        opt.step()

    for seed in range(2):
        step(model, opt, seed)
    twin.load_state_dict(model.state_dict())
    optimizer.load_optimizer_state(other, copy.deepcopy(opt.state_dict()))
    step(model, opt, 2)
    step(twin, other, 2)
    assert same(model.state_dict(), twin.state_dict())


def test_float16_skips_a_step_whose_gradients_are_not_finite():
    model = small()
    opt = muon(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for p in model.parameters():
        p.grad = torch.full_like(p, float('nan'))
    opt.grad_scale, opt.found_inf = None, torch.tensor(1.0)  # as GradScaler sets them
    opt.step()
    assert same(before, model.state_dict())
    opt.found_inf = torch.tensor(0.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    assert not same(before, model.state_dict())


OPTIMIZERS = {
    'adamw': {},
    'sgd': dict(name='sgd', max_norm=0.5),
    'muon': dict(lrs=LRS, max_norm=0.5),
}


def forbidden_steps(name):
    """Whether one that `found_inf` forbids left all as it was: the very first step, and the
    third."""
    model, steady = small(), small()
    opt, other = (
        m.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu', **OPTIMIZERS[name])
        for m in (model, steady)
    )

    def step(m, optimizer, found_inf, grad):
        optimizer.found_inf = torch.tensor(found_inf)
        for i, p in enumerate(m.parameters()):
            p.grad = torch.full_like(p, grad) + torch.arange(p.numel()).view(p.shape) * i
        optimizer.step()

    def kept():
        moments = {
            i: {k: v.clone() for k, v in state.items() if k != 'step'}
            for i, state in enumerate(opt.state.values())
        }
        return {k: v.clone() for k, v in model.state_dict().items()}, moments

    found = []
    for grad in (0.5, -0.25):
        weights, moments = kept()
        step(model, opt, 1.0, math.nan)
        found.append(
            same(kept(), (weights, moments))
            if moments
            else same(kept()[0], weights)
            and not any(v.any() for state in kept()[1].values() for v in state.values())
        )
        step(model, opt, 0.0, grad)
        step(steady, other, 0.0, grad)
    return *found, same(model.state_dict(), steady.state_dict())


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_forbidden_step_changes_nothing(name):
    assert forbidden_steps(name) == (True, True, True)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_on_a_gpu_it_changes_nothing_either_and_nobody_waits(name, monkeypatch):
    """Nothing is read there, not even whether it is forbidden. Muon's momentum warms up all the
    same."""
    monkeypatch.setattr(optimizer, 'READ_AT_ONCE', ())
    monkeypatch.setattr(optimizer, 'MUON_MOMENTUM', (0.9, 0.9, 1))
    assert forbidden_steps(name) == (True, True, True)
    monkeypatch.setattr(torch, 'where', lambda condition, a, b: b)
    # the only one that leaves it to torch alone
    assert all(forbidden_steps(name)[:2]) == (name == 'adamw')


@pytest.mark.parametrize('own, first', [(torch.optim.SGD, math.nan), (optimizer.SGD, 0.0)])
def test_where_the_first_step_is_forbidden_torchs_sgd_has_moments_of_anything(own, first):
    """Its kernel takes memory for them as that is, which is filled with NaN here; ours begin with
    zeros."""
    p = nn.Parameter(torch.zeros(4))
    opt = own([p], lr=0.1, momentum=0.9, fused=True)
    p.grad, opt.found_inf = torch.ones(4), torch.tensor(1.0)
    torch.use_deterministic_algorithms(True)
    try:
        opt.step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(opt.state[p]['momentum_buffer'].isnan(), torch.full((4,), first).isnan())


def test_cooldown_is_a_straight_line_after_a_plateau():
    def lr(step):
        return learning_rate_at(
            step, peak=1.0, floor=0.1, warmup_steps=10, decay_steps=100, cooldown=0.4
        )

    assert lr(0) == pytest.approx(1 / 11) and lr(10) == lr(60) == 1.0
    assert lr(80) == pytest.approx(0.55) and lr(100) == lr(1000) == 0.1
    assert lr(70) - lr(75) == pytest.approx(lr(90) - lr(95))


MUON = [
    *(word for word in TINY if 'learning_rate' not in word),
    '--min_lr=0',
    '--muon_lr=0.02',
    '--embed_lr=0.01',
    '--head_lr=0.01',
    '--cooldown=0.5',
    '--weight_decay=0.2',
    '--n_embd=32',
]


@pytest.mark.parametrize(
    'model, dtype, atol',
    [
        ('gpt', 'float32', 2e-4),
        ('modern', 'bfloat16', 5e-2),
        pytest.param('modern', 'float32', 2e-4, marks=pytest.mark.campaign),
    ],
)
def test_two_processes_learn_what_one_does(text_folder, tmp_path, model, dtype, atol):
    """They share the matrices to orthogonalise; the result is one process's, but for the order of
    sums."""
    for processes in (1, 2):
        done = run(
            'train.py',
            *MUON,
            f'--model={model}',
            '--n_layer=3',
            f'--dataset={text_folder}',
            f'--dtype={dtype}',
            f'--out_dir={tmp_path}/{processes}',
            processes=processes,
        )
        assert done.returncode == 0, done.stderr
    one, two = (checkpoint.read(tmp_path / f'{n}/ckpt.pt')['model'] for n in (1, 2))
    assert all(torch.allclose(one[k], two[k], atol=atol) for k in one)
    assert any(
        not torch.equal(one[k], p)
        for k, p in build(model, **checkpoint.read(tmp_path / '1/ckpt.pt')['model_args'])
        .state_dict()
        .items()
        if k in one
    )


@pytest.mark.parametrize('dtype', [pytest.param('float32', marks=pytest.mark.campaign), 'bfloat16'])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(text_folder, tmp_path, dtype):
    settings = [
        *MUON,
        f'--dtype={dtype}',
        '--model=modern',
        '--ngram=3',
        '--ngram_rows=64',
        '--ngram_dropout=0.5',
        f'--dataset={text_folder}',
    ]
    assert run('train.py', *settings, f'--out_dir={tmp_path}/whole').returncode == 0
    assert run('train.py', *settings, '--max_iters=4', f'--out_dir={tmp_path}/cut').returncode == 0
    assert (
        run(
            'train.py', '--init_from=resume', '--max_iters=6', f'--out_dir={tmp_path}/cut'
        ).returncode
        == 0
    )
    whole, cut = (checkpoint.read(tmp_path / f'{name}/ckpt.pt') for name in ('whole', 'cut'))
    assert same(whole['model'], cut['model']) and same(
        whole['optimizer']['state'], cut['optimizer']['state']
    )


def test_a_step_falls_all_at_once_and_a_warm_up_starts_where_it_is_told():
    def lr(step, shape):
        return learning_rate_at(
            step, 1.0, 0.1, warmup_steps=9, decay_steps=100, start=0.5, shape=shape
        )

    assert lr(0, 'step') == pytest.approx(0.55) and lr(8, 'step') == pytest.approx(0.95)
    assert lr(9, 'step') == lr(99, 'step') == 1.0 and lr(100, 'step') == 0.1
    assert 0.1 < lr(99, 'cosine') < 0.101 and lr(0, 'cosine') == lr(0, 'step')


def test_sgd_is_its_equation_and_no_row_gets_longer_than_max_norm():
    model = small()
    own = model.configure_optimizers(0.1, 0.5, (0.9, 0), 'cpu', name='sgd', max_norm=0.12)
    groups = model.param_groups()
    expected = {p: (p.detach().clone(), torch.zeros_like(p)) for p in model.parameters()}
    for seed in range(3):
        torch.manual_seed(seed)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
            w, v = expected[p]
            decay = 0.0 if any(p is q for q in groups['vector']) else 0.1
            v = 0.9 * v + p.grad + decay * w if seed else p.grad + decay * w
            w = w - 0.5 * v
            if any(p is q for q in (*groups['matrix'], *groups['head'])):
                w = w * (0.12 / w.norm(dim=1, keepdim=True)).clamp(max=1)
            expected[p] = w, v
        own.step()
    for p, (w, _) in expected.items():
        assert torch.allclose(p, w, atol=1e-5)
    assert max(p.norm(dim=1).max() for p in groups['matrix']) <= 0.12 + 1e-6
    # a table is not limited: its rows are no unit's weights
    assert groups['embedding'][0].norm(dim=1).max() > 1


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(name='adam'), "optimizer='adam' is unknown: use adamw or sgd"),
        (dict(name='sgd', lrs=LRS), 'muon_lr is for optimizer=adamw'),
    ],
)
def test_optimizers_that_are_not_there(options, message):
    with pytest.raises(ValueError, match=message):
        small().configure_optimizers(0.1, 0.5, (0.9, 0.95), 'cpu', **options)


def test_a_schedule_of_an_unknown_shape_is_refused_with_the_known_ones():
    done = run('train.py', '--lr_schedule=stairs')
    assert done.returncode == 2
    assert "lr_schedule='stairs' is unknown: use cosine or step" in done.stderr
