"""models/modern.py against its equations, written out plainly in float64, and the parts of
layers.py that it is made of."""

import json
import math

import pytest
import torch
from support.scripts import TINY, run

from models import build
from models.parts import layers
from system.device import autocast

SHAPE = dict(block_size=12, vocab_size=20, n_layer=3, n_head=2, n_embd=16, ngram=4, ngram_rows=50)


def shaken(**fields):
    """A small model in float64 whose weights are all away from their first values, which hide what
    they multiply."""
    torch.manual_seed(0)
    model = build('modern', **{**SHAPE, **fields}).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
        if model.config.ngram:
            model.transformer.ngram.weight[-1] = 0
    return model


def layer_norm(x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def turned(x):
    """RoPE by complex numbers: x (T, D), dimension d paired with d + D/2."""
    T, D = x.shape
    pairs = torch.complex(x[:, : D // 2], x[:, D // 2 :])
    angles = torch.arange(T).double()[:, None] * 10000.0 ** (-2 * torch.arange(D // 2).double() / D)
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], -1)


def by_hand(model, ids):
    """The logits of one sequence, from the state dict alone."""
    w, c = {k: v.double() for k, v in model.state_dict().items()}, model.config
    D, T = c.n_embd // c.n_head, len(ids)
    x = w['transformer.wte.weight'][ids]
    if c.ngram:
        x = x + model.transformer.ngram(ids[None])[0]
    x = layer_norm(x)
    for i in range(c.n_layer):
        of = {k.split('.', 3)[3]: v for k, v in w.items() if k.startswith(f'transformer.h.{i}.')}
        q, k, v = (layer_norm(x) @ of['attn.c_attn.weight'].T).split(c.n_embd, -1)
        out = []
        for h in range(c.n_head):
            part = slice(h * D, (h + 1) * D)
            scores = (
                turned(layer_norm(q[:, part])) @ turned(layer_norm(k[:, part])).T / math.sqrt(D)
            )
            scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            out.append(scores.softmax(-1) @ v[:, part])
        x = x + torch.cat(out, -1) @ of['attn.c_proj.weight'].T
        x = (
            x
            + (layer_norm(x) @ of['mlp.c_fc.weight'].T).clamp(min=0) ** 2
            @ of['mlp.c_proj.weight'].T
        )
    return 15 * torch.tanh(layer_norm(x) @ w['lm_head.weight'].T / 15)


@pytest.mark.parametrize('fields', [{}, dict(ngram=0), dict(n_head=1), dict(n_layer=1)])
def test_logits_are_the_equations(fields):
    model = shaken(**fields)
    idx = torch.randint(20, (2, 12))
    logits, _ = model(idx, idx)
    for row, ids in zip(logits, idx):
        assert torch.allclose(row, by_hand(model, ids), atol=1e-5)  # the angles are float32


def test_no_position_sees_the_future():
    model, idx = shaken(), torch.randint(20, (1, 12))
    before = model(idx, idx)[0]
    for t in (1, 6, 11):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 20
        after = model(changed, idx)[0]
        assert torch.allclose(before[:, :t], after[:, :t], atol=1e-12, rtol=0)
        assert not torch.allclose(before[:, t], after[:, t], atol=1e-6, rtol=0)


def test_attention_sees_distances_not_places():
    """Without n-grams, whose first ones know the start, the same text further on in the window
    looks the same."""
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.double).expand(2, 1, 1, 12, 8)
    rotary = layers.rotary_table(12, 8).double()
    scores = layers.apply_rotary(q, rotary) @ layers.apply_rotary(k, rotary).mT
    for distance in range(12):
        along = scores[0, 0].diagonal(-distance)
        assert torch.allclose(along, along[:1].expand_as(along), atol=1e-6)
    assert not torch.allclose(scores[0, 0, 5, 5], scores[0, 0, 5, 4], atol=1e-3)


def test_ngrams_are_those_of_the_tokens_before():
    """A row of the table depends on the last tokens alone, and on all of them; some n-grams may
    share a row."""
    torch.manual_seed(1)
    ngram = shaken(ngram_rows=100_003).transformer.ngram
    a, b = torch.randint(20, (2, 1, 12))
    b[:, 5:9] = a[:, 5:9]  # the same four tokens, in another context
    x, y = ngram(a)[0], ngram(b)[0]
    assert torch.equal(x[8], y[8]) and not torch.allclose(x[6], y[6])
    # order counts
    assert not torch.equal(x[8], ngram(torch.cat([a[:, 5:7], a[:, 8:9], a[:, 7:8]], 1))[0, 3])


def test_the_row_of_what_is_left_out_is_never_learned():
    model = build('modern', **{**SHAPE, 'ngram_dropout': 0.9}).train()
    optimizer = model.configure_optimizers(
        0.1, 0.01, (0.9, 0.95), 'cpu', lrs={'matrix': 0.02, 'embedding': 0.1}
    )
    for _ in range(3):
        idx = torch.randint(20, (4, 12))
        model(idx, idx)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    table = model.transformer.ngram.weight
    assert table[:-1].abs().sum() > 0 and table[-1].abs().sum() == 0


def test_dropout_leaves_out_branches_of_some_tokens_and_keeps_the_mean():
    torch.manual_seed(0)
    x, y = torch.randn(64, 64, 8), torch.ones(64, 64, 8)
    difference = layers.token_drop_add(x, y, 0.25) - x
    assert all(len(token.round(decimals=3).unique()) == 1 for token in difference.view(-1, 8)[:50])
    assert abs((difference == 0).float().mean() - 0.25) < 0.02 and abs(difference.mean() - 1) < 0.03
    assert torch.equal(layers.token_drop_add(x, y, 0.0), x + y)


@pytest.mark.parametrize(
    'f, plain',
    [
        (layers.squared_relu, lambda x: x.clamp(min=0) ** 2),
        (
            lambda x: layers.apply_rotary(x, layers.rotary_table(6, 8).double()),
            lambda x: torch.stack([turned(row) for row in x]),
        ),
    ],
)
def test_gradients_written_by_hand(f, plain):
    torch.manual_seed(0)
    x = torch.randn(3, 6, 8, dtype=torch.double, requires_grad=True)
    assert torch.allclose(f(x), plain(x), atol=1e-6)
    assert torch.autograd.gradcheck(f, x)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('attention', ['plain', 'sdpa'])
def test_each_number_format_with_each_attention(dtype, attention):
    model, idx = shaken().float(), torch.randint(20, (2, 12))
    expected = model(idx, idx)[0]
    model.set_attention(attention)
    with autocast('cpu', dtype):
        logits, loss = model.train()(idx, idx)
        loss.backward()
    tolerance = {'float32': 1e-5, 'bfloat16': 0.2, 'float16': 0.03}[dtype]
    assert (
        (logits - expected).norm() / expected.norm()
    ) < tolerance and logits.dtype == torch.float32


def test_recomputing_blocks_changes_nothing_with_masks_too():
    grads = []
    for recompute in (False, True):
        model = shaken(dropout=0.3, ngram_dropout=0.3).train()
        model.gradient_checkpointing = recompute
        idx = torch.arange(24).view(2, 12) % 20
        torch.manual_seed(3)
        model(idx, idx)[1].backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b) for a, b in zip(*grads))


def test_cropping_needs_no_weights():
    model, idx = shaken(), torch.randint(20, (1, 12))
    model.crop_block_size(24)
    assert model(torch.cat([idx, idx], 1))[0].shape == (1, 1, 20)
    assert torch.allclose(model(idx, idx)[0][0], by_hand(model, idx[0]), atol=1e-5)


def test_flops_count_products_only():
    model = build('modern', **{**SHAPE, 'ngram_rows': 10**5})
    matrices = 3 * 12 * 16 * 16 + 20 * 16
    assert model.flops_per_token(12) == 6 * matrices + 12 * 3 * 16 * 12


@pytest.mark.parametrize(
    'fields, part',
    [
        (dict(n_embd=18, n_head=2), 'pairs'),
        (dict(n_embd=18, n_head=6), 'pairs'),
        (dict(n_layer=0), 'n_layer=0'),
        (dict(ngram=1), 'ngram=1'),
        (dict(ngram=-2), 'ngram=-2'),
        (dict(ngram_dropout=1.0), 'ngram_dropout=1.0'),
        (dict(dropout=-0.1), 'dropout=-0.1'),
        (dict(ngram_rows=0), 'ngram_rows=0'),
    ],
)
def test_fields_that_make_no_sense(fields, part):
    with pytest.raises(ValueError, match=part):
        build('modern', **{**SHAPE, **fields})


MODERN = [
    *(word for word in TINY if 'learning_rate' not in word),
    '--min_lr=0',
    '--model=modern',
    '--ngram=3',
    '--ngram_rows=100',
    '--ngram_dropout=0.3',
    '--muon_lr=0.02',
    '--embed_lr=0.05',
    '--head_lr=0.01',
    '--cooldown=0.5',
    '--max_iters=20',
    '--lr_decay_iters=20',
    '--eval_interval=10',
]


def test_trains_and_samples_from_the_command_line(text_folder, tmp_path):
    done = run('train.py', *MODERN, f'--dataset={text_folder}', f'--out_dir={tmp_path}')
    assert done.returncode == 0, done.stderr
    losses = [
        float(line.split('val loss ')[1].split()[0])
        for line in done.stdout.splitlines()
        if 'val loss' in line
    ]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.3
    done = run(
        'train.py',
        '--init_from=resume',
        f'--out_dir={tmp_path}',
        '--max_iters=22',
        '--ngram_dropout=0.1',
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['ngram_dropout'] == 0.1 and config['ngram'] == 3 and config['model'] == 'modern'
    done = run(
        'sample.py',
        f'--out_dir={tmp_path}',
        '--device=cpu',
        '--num_samples=1',
        '--max_new_tokens=20',
    )
    assert done.returncode == 0 and len(done.stdout) > 20, done.stderr
