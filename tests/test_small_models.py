"""Bigram, trigram, MLP and WaveNet against plain equations and known figures, and the mistakes
easily made in them."""

import itertools
import math
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models import build
from models.parts import batchnorm, kv_cache, ngrams
from text.bins import write_bins
from text.dataset_option import open_dataset
from text.tokenizer import CharTokenizer


def text(name):
    """A text of the folder NANOGPT_MIRROR, or a skipped test."""
    path = Path(os.environ.get('NANOGPT_MIRROR', ''), name)
    if not path.is_file():
        pytest.skip(f"NANOGPT_MIRROR has no {name}")
    return path.read_text()


def ids_of(text, alphabet=None):
    table = {c: i for i, c in enumerate(sorted(set(alphabet or text)))}
    return torch.tensor([table[c] for c in text])


def shaken(name, **fields):
    """A model in float64 and eval mode whose weights are all away from their first values."""
    torch.manual_seed(0)
    model = build(name, **{'block_size': 24, 'vocab_size': 11, **fields}).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
        for module in model.modules():
            if isinstance(module, batchnorm.BatchNorm):
                module.mean.normal_()
                module.var.uniform_(0.5, 2)
    return model


# ---- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'name, k, expected',
    [
        ('bigram', 1e-9, 2.454014),
        ('bigram', 1.0, 2.454577),
        ('trigram', 1e-9, 2.185743),
        ('trigram', 1.0, 2.212582),
    ],
)
def test_names_have_the_known_losses(name, k, expected):
    """Each name alone between two dots; the trigram's first context is '..', the last letters'
    padding is not counted."""
    rows = ['.' + word + '.' for word in text('names/names.txt').split()]
    ids = ids_of(''.join(rows)).split([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=-1)
    idx, targets = ids[:, :-1].clamp(min=0), ids[:, 1:]
    assert (targets >= 0).sum() == 228_146
    model = build(name, block_size=idx.size(1), vocab_size=27, k=k)
    model.fit((a.numpy(), b.numpy()) for a, b in zip(idx.split(5000), targets.split(5000)))
    assert model(idx, targets)[1].item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    'name, k, expected',
    [
        ('bigram', 1.0, 2.48189),
        ('trigram', 1.0, 2.06842),
        ('trigram', 0.1, 2.04580),
        ('trigram', 0.01, 2.06576),
    ],
)
def test_shakespeare_has_the_known_losses(name, k, expected, tmp_path):
    """Over the whole text as one row, and nearly so over windows, each of which begins without what
    was before it."""
    whole = text('shakespeare/input.txt')
    ids = ids_of(whole)
    train, val = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    model = build(name, block_size=len(train), vocab_size=65, k=k)
    model.fit([(train[None, :-1], train[None, 1:])])
    assert model(val[None, :-1], val[None, 1:])[1].item() == pytest.approx(expected, abs=1e-4)
    cut = len(whole) * 9 // 10
    write_bins(tmp_path, CharTokenizer.of(whole), {'train': [whole[:cut]], 'val': [whole[cut:]]})
    data = open_dataset(tmp_path, 256, 64)  # what train.py counts and scores
    model.fit(data.epoch())
    batches = [data.eval_batch('val', i) for i in range(data.eval_batches('val'))]
    losses = [
        model(torch.as_tensor(idx), torch.as_tensor(targets))[1].item() * n
        for idx, targets, n in batches
    ]
    assert sum(losses) / sum(n for *_, n in batches) == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize('name, n', [('bigram', 2), ('trigram', 3)])
def test_probabilities_are_the_equation(name, n):
    """Against counting by hand, n-grams that cross from one row to the next excepted; rows of
    probabilities sum to one."""
    rows = torch.randint(5, (7, 12), generator=torch.Generator().manual_seed(0))
    model = shaken(name, vocab_size=6, k=0.3)
    assert torch.allclose(
        model(rows, rows)[0].exp(), torch.full((7, 12, 6), 1 / 6, dtype=torch.float64)
    )
    model.fit([(rows[:3, :-1], rows[:3, 1:].numpy()), (rows[3:, :-1].numpy(), rows[3:, 1:])])
    grams = {
        m: Counter(tuple(row[i : i + m]) for row in rows.tolist() for i in range(13 - m))
        for m in (2, 3)
    }
    for context in itertools.chain(
        itertools.product(range(6), repeat=n - 1), [(a,) for a in range(6)]
    ):
        counts = torch.tensor([grams[len(context) + 1][*context, c] for c in range(6)]).double()
        probs = model(torch.tensor([context]))[0][0, 0].exp()
        assert (
            torch.allclose(probs, (counts + 0.3) / (counts.sum() + 6 * 0.3))
            and abs(probs.sum() - 1) < 1e-12
        )


def test_counting_anew_forgets_and_counting_in_parts_is_counting(monkeypatch):
    model, rows = build('trigram', block_size=12, vocab_size=4), torch.randint(4, (6, 13))
    model.fit([(rows, rows)])
    model.fit([(rows[:, :-1], rows[:, 1:])])
    whole = model.lm_head.keys, model.lm_head.sums
    monkeypatch.setattr(ngrams, 'MAX_PENDING', 50)  # two rows, then two more, …
    model.fit([(row[None, :-1], row[None, 1:]) for row in rows])
    assert all(map(torch.equal, whole, (model.lm_head.keys, model.lm_head.sums)))


def test_counts_of_a_large_vocabulary_keep_only_what_occurs():
    model = build('trigram', block_size=8)
    idx = torch.tensor([[50256, 50303, 0, 50256, 50303, 0, 50256, 50303]])
    model.fit([(idx[:, :-1], idx[:, 1:])])
    probs = model(idx)[0][0, 0].exp()  # after (50256, 50303), which is followed by 0 twice
    assert probs[0].item() == pytest.approx(3 / (2 + 50304)) and model.lm_head.keys.numel() == 3 + 3


@pytest.mark.parametrize(
    'name, n, rank', [('bigram', 1, 0), ('bigram', 1, 4), ('trigram', 2, 0), ('trigram', 2, 16)]
)
def test_a_learned_table_ends_where_the_counts_are(name, n, rank):
    """At a row's first place the trigram's counts are those of all pairs, which a table learns of
    first places alone."""
    rows = torch.randint(4, (8, 13), generator=torch.Generator().manual_seed(2))
    idx, targets = rows[:, :-1], rows[:, 1:]
    counted = build(name, block_size=12, vocab_size=4, k=1e-9)
    counted.fit([(idx, targets)])
    learned = build(name, block_size=12, vocab_size=4, table='learned', rank=rank)
    optimizer = torch.optim.LBFGS(learned.parameters(), max_iter=200, line_search_fn='strong_wolfe')

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(
            learned(idx, targets)[0][:, n - 1 :].flatten(0, 1), targets[:, n - 1 :].flatten()
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    expected, found = (
        F.cross_entropy(
            m(idx, targets)[0][:, n - 1 :].flatten(0, 1), targets[:, n - 1 :].flatten()
        ).item()
        for m in (counted, learned)
    )
    assert found == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize('rank', [0, 3])
def test_a_learned_trigram_is_a_table_or_the_product_of_three_matrices(rank):
    """Its first index is a token or, with nothing before, 0."""
    model, idx = shaken('trigram', table='learned', rank=rank), torch.randint(11, (1, 9))
    parts = [p.detach().numpy() for p in model.parameters()]
    # (V + 1, V, V)
    table = np.einsum('ar,br,cr->abc', *parts) if rank else parts[0].reshape(12, 11, 11)
    for t, row in enumerate(model(idx, idx)[0][0].detach().numpy()):
        assert np.allclose(row, table[idx[0, t - 1] + 1 if t else 0, idx[0, t]])


# ---- the MLP -------------------------------------------------------------------------------------


@pytest.mark.parametrize('direct', [False, True])
@pytest.mark.parametrize('batchnorm', ['', 'ema'])
def test_mlp_is_the_equation(direct, batchnorm):
    model = shaken('mlp', context=4, n_embd=3, n_hidden=7, direct=direct, batchnorm=batchnorm)
    w = {k: v.detach() for k, v in model.state_dict().items()}
    idx = torch.randint(11, (2, 9))
    logits = model(idx, idx)[0]
    for row, ids in zip(logits, idx.tolist()):
        for t in range(9):
            last = ([11] * 4 + ids[: t + 1])[-4:]  # 11: padding
            x = torch.cat([w['transformer.wte.weight'][i] for i in last])
            h = w['transformer.h.c_fc.weight'] @ x + (
                0 if batchnorm else w['transformer.h.c_fc.bias']
            )
            if batchnorm:
                of = {k.rpartition('.')[2]: v for k, v in w.items() if '.norm.' in k}
                h = (h - of['mean']) / (of['var'] + 1e-5).sqrt() * of['weight'] + of['bias']
            U, W = w['lm_head.weight'][:, :7], w['lm_head.weight'][:, 7:]
            y = w['lm_head.bias'] + U @ torch.tanh(h) + (W @ x if direct else 0)
            assert torch.allclose(row[t], y, atol=1e-10)


@pytest.mark.parametrize(
    'fields, expected',
    [
        # those of makemore, and the padding's embedding
        (dict(), 11_897 + 10),
        (dict(batchnorm='ema'), 12_097 + 10),
        (dict(direct=True), 11_897 + 10 + 30 * 27),
        (dict(context=5), 11_897 + 10 + 2 * 10 * 200),
    ],
)
def test_mlp_has_the_parameters_of_the_formula(fields, expected):
    assert build('mlp', vocab_size=27, **fields).num_params() == expected


# ---- batch norms ---------------------------------------------------------------------------------


def norm_of(kind, C=3):
    torch.manual_seed(0)
    norm = batchnorm.BATCH_NORMS[kind](C).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm


@pytest.mark.parametrize('kind', ['ema', 'precise', 'batch'])
def test_batch_statistics_are_over_batch_and_time_without_padding(kind):
    """torch's own on the valid places alone is the oracle, in training, and of the moving averages
    after it."""
    norm, valid = norm_of(kind), torch.rand(4, 5) < 0.6
    theirs = torch.nn.BatchNorm1d(3, momentum=0.1).double()
    theirs.load_state_dict({'weight': norm.weight, 'bias': norm.bias}, strict=False)
    for _ in range(3):
        x = torch.randn(4, 5, 3, dtype=torch.float64) * 2 + 1
        assert torch.allclose(norm(x, valid)[valid], theirs(x[valid]))
    if kind == 'ema':
        assert torch.allclose(norm.mean, theirs.running_mean) and torch.allclose(
            norm.var, theirs.running_var
        )
        assert torch.allclose(norm.eval()(x), theirs.eval()(x.transpose(1, 2)).transpose(1, 2))
    if kind == 'batch':
        assert torch.equal(norm.eval()(x, valid), norm.train()(x, valid))


def batches_of(sizes, T=8):
    generator = torch.Generator().manual_seed(0)
    for B in sizes:
        ids = torch.randint(11, (B, T + 1), generator=generator)
        yield ids[:, :-1].numpy(), ids[:, 1:].where(torch.arange(T) < 6, -1).numpy()


def test_precise_statistics_are_those_of_all_examples_together():
    """Of mini-batches of different sizes, for the first norm exactly: that of one batch of all;
    moving averages are not."""
    found = {}
    for kind in ('precise', 'ema'):
        model = shaken('mlp', batchnorm=kind)
        for idx, targets in batches_of([2, 7, 1, 30]):
            model.train()(torch.as_tensor(idx), torch.as_tensor(targets))
        model.eval().calibrate(batches_of([2, 7, 1, 30]))
        assert not model.training
        idx, targets = (
            torch.cat([torch.as_tensor(batch[i]) for batch in batches_of([2, 7, 1, 30])])
            for i in (0, 1)
        )
        x = model.transformer.wte(
            (kv_cache.with_previous_ids(idx, 2) % 12).unfold(1, 3, 1)
        ).flatten(2)
        x = model.transformer.h.c_fc(x)[targets >= 0]
        norm = model.transformer.h.norm
        found[kind] = torch.allclose(norm.mean, x.mean(0)) and torch.allclose(
            norm.var, x.var(0, correction=0)
        )
    assert found == {'precise': True, 'ema': False}


def test_measuring_stops_after_enough_examples_and_leaves_the_weights():
    model, taken = shaken('mlp', batchnorm='precise'), []
    before = [p.clone() for p in model.parameters()]
    batchnorm.measure_statistics(
        model, (taken.append(1) or batch for batch in batches_of([10] * 50)), samples=100
    )
    assert len(taken) == 2 and all(map(torch.equal, before, model.parameters()))  # 60 targets each


@pytest.mark.parametrize('is_calibrated', [True, False])
def test_frozen_statistics_stay_while_all_else_learns(is_calibrated):
    model = build('mlp', vocab_size=11, batchnorm='frozen', n_hidden=5)
    if is_calibrated:
        model.calibrate(batches_of([20]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first, kept = [p.clone() for p in model.parameters()], None
    for idx, targets in batches_of([5, 6, 7]):
        idx, targets = torch.as_tensor(idx), torch.as_tensor(targets)
        model(idx, targets)[1].backward()
        optimizer.step()
        norm = model.transformer.h.norm
        kept = kept or (norm.mean.clone(), norm.var.clone())
        assert (
            torch.equal(kept[0], norm.mean)
            and torch.equal(kept[1], norm.var)
            and kept[0].abs().sum() > 0
        )
        loss = model(idx, targets)[1]
        # the same in training and in use
        assert loss.item() == model.eval()(idx, targets)[1].item()
        model.train().calibrate(batches_of([9]))  # measured is measured
    assert not any(map(torch.equal, first, model.parameters()))
    again = build('mlp', vocab_size=11, batchnorm='frozen', n_hidden=5)
    again.load_state_dict(model.state_dict())
    assert not again.transformer.h.norm.is_due()


@pytest.mark.parametrize(
    'name, fields', [('mlp', {}), ('wavenet', dict(form='hierarchical', n_layer=2))]
)
def test_a_norm_by_batches_lets_rows_see_each_other(name, fields):
    idx = torch.randint(11, (4, 8))
    for kind in ('ema', 'precise', 'frozen', 'batch'):
        model = shaken(name, batchnorm=kind, **fields)
        alone, together = model(idx[:1], idx[:1])[0], model(idx, idx)[0][:1]
        assert torch.allclose(alone, together) == (kind != 'batch')
        assert ('causality' in model.exemptions) == (kind == 'batch')


# ---- WaveNet -------------------------------------------------------------------------------------

WAVENETS = [
    dict(n_layer=3, n_stack=2, n_embd=16, n_skip=20),
    dict(n_layer=2, kernel=3, n_embd=16),
    dict(n_layer=1, n_embd=16),
    dict(form='hierarchical', n_layer=3, n_embd=3, n_hidden=6, batchnorm='ema'),
]


@pytest.mark.parametrize('fields, expected', list(zip(WAVENETS, [15, 7, 2, 8])))
def test_the_receptive_field_is_exact(fields, expected):
    """To the token, and on one side only; the left edge, where there is less to see, is no
    exception."""
    model, idx = shaken('wavenet', **fields), torch.randint(11, (1, 24))
    assert model.receptive_field == expected
    before = model(idx, idx)[0]
    for t in (0, 3, 8):
        changed = idx.clone()
        changed[0, t] = (idx[0, t] + 1) % 11
        moved = (model(changed, idx)[0] - before)[0].abs().amax(-1) > 1e-12
        assert moved.nonzero()[:, 0].tolist() == list(range(t, min(24, t + expected)))


@pytest.mark.parametrize('fields', WAVENETS[:3])
def test_wavenet_is_the_equation(fields):
    """Gate, residual, skips and head, place by place; a convolution is torch's conv1d."""
    model, idx = shaken('wavenet', **fields), torch.randint(11, (1, 24))
    w, c = (
        {k.removeprefix('transformer.'): v.detach() for k, v in model.state_dict().items()},
        model.config,
    )
    n, C = c.n_layer * c.n_stack, c.n_embd
    x, skips = w['wte.weight'][idx[0]].T, 0  # (C, T)
    for i in range(n):
        of = {k.split('.', 2)[2]: v for k, v in w.items() if k.startswith(f'h.{i}.')}
        dilation = 2 ** (i % c.n_layer)
        conv = of['c_fc.weight'].view(2, C, c.kernel, C).transpose(2, 3)  # (2, out, in, kernel)
        padded = F.pad(x, ((c.kernel - 1) * dilation, 0))
        f, g = (
            F.conv1d(padded[None], conv[j], of['c_fc.bias'].view(2, C)[j], dilation=dilation)[0]
            for j in (0, 1)
        )
        z = f.tanh() / (1 + (-g).exp())
        skips = skips + of['c_skip.weight'] @ z + of['c_skip.bias'][:, None]
        if i < n - 1:
            x = x + of['c_proj.weight'] @ z + of['c_proj.bias'][:, None]
    x = (w['c_proj.weight'] @ skips.clamp(min=0) + w['c_proj.bias'][:, None]).clamp(min=0)
    logits = w['lm_head.weight'] @ x + w['lm_head.bias'][:, None]
    assert torch.allclose(model(idx, idx)[0][0], logits.T, atol=1e-10)


@pytest.mark.parametrize('batchnorm', ['', 'ema'])
def test_the_stack_of_convolutions_is_a_tree_over_the_last_tokens(batchnorm):
    """At each place a tree over 8 tokens, padding included, built as a tree: pairs, pairs of pairs,
    and so on."""
    model = shaken(
        'wavenet', form='hierarchical', n_layer=3, n_embd=3, n_hidden=6, batchnorm=batchnorm
    )
    idx = torch.randint(11, (2, 12))
    logits = model(idx, idx)[0]
    for row, ids in zip(logits, idx.tolist()):
        for t in range(12):
            nodes = model.transformer.wte(torch.tensor(([11] * 8 + ids[: t + 1])[-8:]))  # (8, C)
            for level in model.transformer.h:
                x = level.c_fc(nodes.view(len(nodes) // 2, -1))
                if batchnorm:
                    x = F.batch_norm(
                        x, level.norm.mean, level.norm.var, level.norm.weight, level.norm.bias
                    )
                nodes = x.tanh()
            assert torch.allclose(row[t], model.lm_head(nodes)[0], atol=1e-10)


def test_a_level_is_normalised_over_all_pairs_that_trees_are_made_of():
    """Those in the padding before a row too; not those with what stands behind its last target."""
    model = shaken('wavenet', form='hierarchical', n_layer=2, n_embd=3, batchnorm='precise')
    idx = torch.arange(10).view(2, 5)
    model.calibrate([(idx, torch.tensor([[1] * 5, [1, 1, -1, -1, -1]]))])
    rows = [11, 11, 11, 0, 1, 2, 3, 4], [11, 11, 11, 5, 6]  # 11: padding
    pairs = torch.tensor([pair for row in rows for pair in itertools.pairwise(row)])
    x = model.transformer.h[0].c_fc(model.transformer.wte(pairs).flatten(1))
    norm = model.transformer.h[0].norm
    assert torch.allclose(norm.mean, x.mean(0)) and torch.allclose(norm.var, x.var(0, correction=0))


def test_the_hierarchical_form_has_the_published_size():
    model = build(
        'wavenet',
        vocab_size=27,
        form='hierarchical',
        n_layer=3,
        n_embd=24,
        n_hidden=128,
        batchnorm='ema',
    )
    assert model.num_params() == 76_579 + 24  # the padding's embedding


def test_dropout_is_in_training_only():
    model, idx = shaken('wavenet', n_layer=2, n_embd=8, dropout=0.5), torch.randint(11, (1, 24))
    assert torch.equal(model(idx, idx)[0], model(idx, idx)[0])
    model.train()
    assert not torch.equal(model(idx, idx)[0], model(idx, idx)[0])


def test_muon_takes_filter_and_gate_as_two_matrices():
    matrices = build('wavenet', vocab_size=11, n_layer=2, n_embd=8).param_groups()['matrix']
    assert [p.n_matrices for p in matrices if p.shape == (16, 16)] == [2, 2]


# ---- initialisation and mistakes -----------------------------------------------------------------


@pytest.mark.parametrize(
    'init, std', [('kaiming', 5 / 3 / math.sqrt(300)), ('xavier', 5 / 3 * math.sqrt(2 / 1300))]
)
def test_initialisations(init, std):
    assert build(
        'mlp', vocab_size=50, n_embd=100, n_hidden=1000, init=init
    ).transformer.h.c_fc.weight.std().item() == pytest.approx(std, rel=0.01)


@pytest.mark.parametrize(
    'name, fields, message',
    [
        ('bigram', dict(k=0.0), 'k=0.0 must be above 0'),
        ('trigram', dict(k=math.nan), 'k=nan must be above 0'),
        ('bigram', dict(table='count'), "table='count' is unknown"),
        ('trigram', dict(rank=4), 'rank=4'),
        ('bigram', dict(table='learned'), 'use --rank=64'),
        ('trigram', dict(table='learned', vocab_size=1000), '--rank=64'),
        ('trigram', dict(vocab_size=10**7), 'too large to count 3'),
        ('mlp', dict(context=0), 'context=0'),
        ('mlp', dict(batchnorm='layer'), "use ema, precise, frozen or batch"),
        ('mlp', dict(init='zero'), 'or xavier'),
        ('wavenet', dict(form='tree'), 'gated or hierarchical'),
        ('wavenet', dict(kernel=1), 'kernel=1'),
        ('wavenet', dict(batchnorm='ema'), 'form=gated has no batchnorm'),
        ('wavenet', dict(n_layer=30), 'n_layer=30'),
        (
            'wavenet',
            dict(form='hierarchical', n_stack=2),
            'form=hierarchical has no n_stack: omit n_stack=2',
        ),
        ('wavenet', dict(form='hierarchical', dropout=0.1), 'has no dropout'),
        ('wavenet', dict(dropout=1.0), 'dropout=1.0'),
    ],
)
def test_fields_that_make_no_sense(name, fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(name, **fields)
    assert '\n' not in str(caught.value)


def test_tables_of_bytes_are_learned_whole():
    assert build('bigram', vocab_size=256, table='learned').num_params() == 2**16
