"""Texts that know nothing of each other: short ones, each a window of its own with each letter a
target once; and streams, where many lie in a window, which a model keeps apart."""

import json
import os

import numpy as np
import pytest
import torch
from support.outcomes import same
from support.scripts import TINY, run

from generation.decode import Context
from models import build
from models.parts import attention
from text.bins import write_bins
from text.dataset import Documents
from text.dataset_option import open_dataset
from text.tokenizer import CharTokenizer
from training import checkpoint

NAMES = ['ada', 'bo', 'christopherson', 'dee', 'x', 'maximiliana', 'yu', 'li', 'wu']


@pytest.fixture
def folder(tmp_path):
    tokenizer = CharTokenizer.of('\n'.join(NAMES))
    text = '\n'.join(['', *NAMES, ''])
    write_bins(tmp_path, tokenizer, {'train': [text], 'val': [text], 'test': [text]}, separator=0)
    return tmp_path


def texts(idx, targets):
    """(context, what is to be predicted after it) of each target that counts."""
    chars = CharTokenizer.of('\n'.join(NAMES)).chars
    for row, aims in zip(idx, targets):
        for t in np.flatnonzero(aims >= 0):
            yield ''.join(chars[i] for i in row[: t + 1]), chars[aims[t]]


@pytest.mark.parametrize('block_size', [16, 4])
@pytest.mark.parametrize('way', ['train', 'val', 'epoch'])
def test_each_letter_is_a_target_once_and_sees_its_own_document_only(folder, block_size, way):
    data = open_dataset(folder, block_size, 3, 1, 7)
    assert isinstance(data, Documents)
    batches = {
        'train': lambda: (data.train_batch(step, 0)[:2] for step in range(data.windows // 3)),
        'val': lambda: (data.eval_batch('val', i)[:2] for i in range(data.eval_batches('val'))),
        'epoch': data.epoch,
    }[way]()
    seen = sorted(pair for idx, targets in batches for pair in texts(idx, targets))
    expected = []
    for name in NAMES:
        whole = f'\n{name}\n'
        for t in range(1, len(whole)):  # a window that would not fit ends with its document instead
            start = (t - 1) // block_size * block_size
            start = max(0, min(start, len(whole) - 1 - block_size))
            expected.append((whole[start:t], whole[t]))
    # its number of windows is no multiple of 3: some come with the next epoch
    if block_size == 4 and way == 'train':
        assert set(seen) <= set(expected) and len(seen) >= len(expected) - 8
    else:
        assert seen == sorted(expected)


def test_the_shares_of_a_step_are_those_of_its_targets(folder):
    data = open_dataset(folder, 16, 2, 3, 7)
    batches = [data.train_batch(1, micro) for micro in range(3)]
    counts = [(targets >= 0).sum() for _, targets, _ in batches]
    assert [share for *_, share in batches] == pytest.approx(
        [count / sum(counts) for count in counts]
    )
    assert len(set(counts)) > 1


def test_every_document_comes_once_per_epoch_in_a_new_order(folder):
    data = open_dataset(folder, 16, 3, 1, 7)
    epochs = [[], []]
    for step in range(6):
        rows = data.train_batch(step, 0)[0]
        epochs[step // 3] += [tuple(row) for row in rows]
    assert (
        epochs[0] != epochs[1]
        and sorted(epochs[0]) == sorted(epochs[1])
        and len(set(epochs[0])) == 9
    )


@pytest.mark.parametrize(
    'separator, message',
    [
        (99, 'separator 99'),
        (-1, 'separator -1'),
        ('a', 'meta.json'),
        (3, 'does not begin and end with its separator, the id 3'),
    ],
)
def test_a_separator_that_makes_no_sense(folder, separator, message):
    meta = json.loads((folder / 'meta.json').read_text())
    (folder / 'meta.json').write_text(json.dumps({**meta, 'separator': separator}))
    with pytest.raises(ValueError, match=message):
        open_dataset(folder, 16, 2)


def test_names_are_those_of_the_published_split(tmp_path):
    if not os.environ.get('NANOGPT_MIRROR'):
        pytest.skip("needs names.txt")
    done = run('data/names/prepare.py')
    assert done.returncode == 0, done.stderr
    data = open_dataset('names', 16, 64)
    facts = data.meta['splits']
    assert [facts[split]['tokens'] - 1 for split in ('train', 'val', 'test')] == [
        182_625,
        22_655,
        22_866,
    ]
    assert data.windows == 25_626 and data.vocab_size == 27
    chars = data.meta['tokenizer']['chars']
    assert ''.join(chars[i] for i in data.first('train', 13)) == '\nyuheng\ndiond'


def test_a_run_shows_documents(folder, tmp_path):
    done = run('train.py', *TINY, f'--dataset={folder}', f'--out_dir={tmp_path / "out"}')
    assert done.returncode == 0, done.stderr
    shown = done.stdout.split('---- ten samples; for more: ')[1]
    assert "--start=$'\\n' --stop=$'\\n'" in shown.splitlines()[0]
    done = run(
        'sample.py',
        f'--out_dir={tmp_path / "out"}',
        '--start=\n',
        '--stop=\n',
        '--num_samples=2',
        '--device=cpu',
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    'name', ['study_mlp', 'study_wavenet', 'study_transformer', 'names', 'zoo']
)
def test_the_configs_of_small_models_run(folder, tmp_path, name):
    """And evaluate.py finds the loss that the run has reported, each name on its own."""
    done = run(
        'train.py',
        f'config/{name}.py',
        '--model=mlp' if name == 'names' else '--eval_iters=1',
        '--max_iters=2',
        '--lr_decay_iters=2',
        '--warmup_iters=1',
        '--eval_interval=0',
        '--dtype=float32',
        f'--dataset={folder}',
        '--batch_size=2',
        '--device=cpu',
        f'--out_dir={tmp_path / "out"}',
        *(['--block_size=16'] if name == 'zoo' else []),
    )
    assert done.returncode == 0, done.stderr
    if name == 'names':
        told = json.loads((tmp_path / 'out' / 'metrics.jsonl').read_text().splitlines()[-1])[
            'val_loss'
        ]
        done = run('evaluate.py', f'--out_dir={tmp_path / "out"}', '--device=cpu')
        assert done.returncode == 0, done.stderr
        results = json.loads((tmp_path / 'out' / 'evaluation.json').read_text())['results']
        assert results['bpb']['loss'] == pytest.approx(told, rel=1e-5)
        assert results['perplexity']['loss'] == pytest.approx(told, rel=1e-5)


def test_sgd_and_batch_norm_resume_bit_for_bit(folder, tmp_path):
    settings = [
        *TINY,
        '--model=mlp',
        '--dropout=0',
        '--batchnorm=ema',
        '--optimizer=sgd',
        '--max_norm=1',
        '--lr_schedule=step',
        '--lr_decay_iters=4',
        '--warmup_lr=1e-3',
        f'--dataset={folder}',
    ]
    for out, steps in (('whole', 6), ('cut', 3)):
        done = run('train.py', *settings, f'--max_iters={steps}', f'--out_dir={tmp_path / out}')
        assert done.returncode == 0, done.stderr
    done = run('train.py', '--init_from=resume', '--max_iters=6', f'--out_dir={tmp_path / "cut"}')
    assert done.returncode == 0, done.stderr
    a, b = (checkpoint.read(tmp_path / out / 'ckpt.pt') for out in ('whole', 'cut'))
    assert same(a['model'], b['model']) and same(a['optimizer'], b['optimizer'])


def test_precise_statistics_are_those_of_the_saved_weights(folder, tmp_path):
    """A run that is stopped between two evaluations has them too."""
    done = run(
        'train.py',
        *TINY,
        '--model=mlp',
        '--dropout=0',
        '--batchnorm=precise',
        '--eval_interval=0',
        '--save_minutes=1e-9',
        f'--dataset={folder}',
        '--max_iters=3',
        f'--out_dir={tmp_path}',
    )
    assert done.returncode == 0, done.stderr
    before = checkpoint.read(tmp_path / 'ckpt.prev.pt')
    assert before['iter_num'] == 2 and before['model']['transformer.h.norm.is_measured']


# ---- documents in a stream -----------------------------------------------------------------------

EOT = 7
KEEP_APART = {
    'gpt': dict(),
    'modern-ngram': dict(ngram=3, ngram_rows=50),
    'modern-post': dict(norm_place='post'),
    **{f'transformerpp-{kind}': dict(attention_kind=kind, window=4) for kind in attention.KINDS},
}


def keeping_apart(name, eot=EOT, dtype=torch.float64, **fields):
    """A small model whose weights are all large enough to count."""
    torch.manual_seed(0)
    model = (
        build(
            name.partition('-')[0],
            **dict(block_size=24, vocab_size=50, n_layer=2, n_head=4, n_embd=32, eot=eot),
            **KEEP_APART[name],
            **fields,
        )
        .to(dtype)
        .eval()
    )
    for key, p in model.named_parameters():
        torch.nn.init.normal_(p, 1.0 if 'ln_' in key else 0.0, std=0.3)
    return model


def packed_row():
    """idx (1, 24) of four documents, and where they begin; the first one goes on from an earlier
    window, one is empty."""
    idx, starts = (
        torch.randint(8, 49, (1, 24), generator=torch.Generator().manual_seed(3)),
        [0, 6, 7, 15],
    )
    idx[0, starts[1:]] = EOT
    return idx, starts


@pytest.mark.parametrize('kernel', ['auto', 'plain'])
@pytest.mark.parametrize('name', KEEP_APART)
def test_nothing_is_seen_of_an_earlier_document(name, kernel):
    """Not a bit; and all that is seen elsewhere, the eot itself among it."""
    model, (idx, starts) = keeping_apart(name), packed_row()
    model.set_attention(kernel)
    before = model(idx, idx)[0][0]
    for t in range(24):
        changed = idx.clone()
        changed[0, t] = (idx[0, t] - 7) % 43 + 8 if t not in starts[1:] else EOT
        after, end = model(changed, idx)[0][0], next((start for start in starts if start > t), 24)
        assert torch.equal(before[:t], after[:t]) and torch.equal(before[end:], after[end:])
        assert t in starts[1:] or not (before[t:end] == after[t:end]).all(-1)[:3].any()
    changed = idx.clone()
    changed[0, 7] = 8  # no eot: one document with the one before it
    after = model(changed, idx)[0][0]
    assert torch.equal(before[:7], after[:7]) and not (before[7:15] == after[7:15]).all(-1).any()
    assert torch.equal(before[15:], after[15:])


@pytest.mark.parametrize('name', KEEP_APART)
def test_a_row_of_documents_is_as_good_as_rows_of_one(name):
    model, (idx, starts) = keeping_apart(name), packed_row()
    targets = torch.cat([idx[:, 1:], torch.tensor([[-1]])], 1)
    _, loss = model.train()(idx, targets)
    loss.backward()
    packed = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    apart = keeping_apart(name, eot=-1).train()
    for start, end in zip(starts, [*starts[1:], 24]):
        n = (targets[:, start:end] >= 0).sum().item()
        (apart(idx[:, start:end], targets[:, start:end])[1] * n / 23).backward()
    assert all(
        torch.allclose(grad, p.grad, atol=1e-12)
        for grad, p in zip(packed, apart.parameters(), strict=True)
    )


@pytest.mark.parametrize('name', KEEP_APART)
def test_documents_are_kept_apart_while_generating(name):
    """The cache against the whole context, in rows of different lengths, with an eot now and
    then."""
    model, prompts = (
        keeping_apart(name),
        [[1, 2, EOT, 4, 5, 6], [8, 9], [1, 2, EOT, 4, 5, 6], [EOT]],
    )
    context = Context(model, prompts, 24)
    for step in range(12):
        for row, logits in zip(context.rows, context.logits()):
            assert (logits - model(torch.tensor([row]))[0][0, -1]).abs().max() < 1e-9
        context.add(
            torch.tensor(
                [[8 + step], [EOT if step in (2, 3) else 9], [EOT if step == 9 else 9], [11]]
            )
        )
    cache, at, (idx, _) = model.init_cache(1, 24, dtype=torch.float64), 0, packed_row()
    whole = model(idx, idx)[0]
    for T in (5, 1, 1, 4, 9, 4):
        at += T
        assert (
            model(idx[:, at - T : at], cache=cache)[0][:, 0] - whole[:, at - 1]
        ).abs().max() < 1e-9


@pytest.mark.parametrize('name', ['modern-ngram', 'transformerpp-mla'])
def test_documents_are_kept_apart_compiled_and_recomputed(name):
    """With a whole graph, as train.py compiles it."""
    (idx, _), expected = packed_row(), None
    for change in (
        lambda model: model,
        lambda model: setattr(model, 'gradient_checkpointing', True) or model,
        lambda model: torch.compile(model, backend='eager', fullgraph=True),
    ):
        model = keeping_apart(name).train()
        change(model)(idx, idx)[1].backward()
        grads = [p.grad for p in model.parameters()]
        assert expected is None or all(map(torch.allclose, expected, grads))
        expected = grads


@pytest.mark.parametrize('name', KEEP_APART)
def test_without_boundaries_nothing_changes(name):
    idx = packed_row()[0]
    plain, other = keeping_apart(name, eot=-1), keeping_apart(name, eot=49)
    assert (plain(idx, idx)[0] - other(idx, idx)[0]).abs().max() < 1e-12  # no 49 in it
    other.keep_documents_apart(-1)
    assert torch.equal(plain(idx, idx)[0], other(idx, idx)[0])


def test_who_can_not_keep_documents_apart(folder):
    with pytest.raises(
        ValueError, match="Bigram can't keep documents apart: omit document_boundaries"
    ):
        build('bigram', vocab_size=9).keep_documents_apart(3)
    with pytest.raises(ValueError, match='eot=50: use -1, or an id below vocab_size=50'):
        keeping_apart('gpt', eot=50)
    with pytest.raises(
        ValueError, match='document_boundaries=True: .* has no token behind each document'
    ):
        print(open_dataset(folder, 16, 2).eot)
    assert open_dataset('random', 16, 2).eot == 50256


@pytest.mark.campaign
@pytest.mark.parametrize(
    'arguments, train_loss, val_loss',
    [
        (['--model=mlp'], 2.126, 2.170),
        (['--model=wavenet'], 1.769, 1.994),
        (
            ['--model=mlp', '--batchnorm=ema', '--max_iters=5500', '--lr_decay_iters=5500'],
            2.067,
            2.105,
        ),
    ],
)
def test_names_are_learned_as_published(tmp_path, arguments, train_loss, val_loss):
    """The figures of the lectures that go with https://github.com/karpathy/makemore."""
    done = run(
        'train.py',
        'config/names.py',
        *arguments,
        f'--out_dir={tmp_path}',
        '--device=cpu',
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr
    last = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[-1])
    assert abs(last['train_loss'] - train_loss) < 0.02 and abs(last['val_loss'] - val_loss) < 0.02
