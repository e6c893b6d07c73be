"""What is read of a dataset's folder: shards, masks of the targets that count, a test split,
mixtures of folders."""

import gc
import json
import runpy
import signal
from fractions import Fraction

import numpy as np
import pytest
from support.outcomes import same
from support.scripts import ROOT, TINY

from text.bins import write_bins
from text.dataset import Dataset, Documents
from text.dataset_option import open_dataset, open_unmixed
from text.mixture import Mixture, deal, parse
from text.tokenizer import CharTokenizer
from training import checkpoint


def write(folder, bins=None, masks=None, **meta):
    """Make `folder` a dataset of uint16 ids {file: ids}, with masks {file: bytes}."""
    folder.mkdir(exist_ok=True)
    for name, ids in (bins or {'train': range(1003), 'val': range(203)}).items():
        np.array(ids, np.uint16).tofile(folder / f'{name}.bin')
    for name, mask in (masks or {}).items():
        np.array(mask, np.uint8).tofile(folder / f'{name}.mask')
    meta = {
        'tokenizer': None,
        'vocab_size': 2000,
        'dtype': 'uint16',
        **({'masked': True} if masks else {}),
        **meta,
    }
    (folder / 'meta.json').write_text(json.dumps(meta))
    return folder


def cut(ids, *ends, name='train'):
    """{shard: ids}: cut in front of `ends`."""
    ids = list(ids)
    return {
        f'{name}-{i:05}': ids[start:end]
        for i, (start, end) in enumerate(zip([0, *ends], [*ends, len(ids)]))
    }


def all_batches(data, steps=40):
    """What training sees in some steps, and a whole evaluation."""
    for step in range(steps):
        yield from (data.train_batch(step, micro) for micro in range(data.batches_per_step))
    for split in sorted(data.tokens):
        yield from (data.eval_batch(split, i) for i in range(data.eval_batches(split)))


def equal(some, others):
    return all(
        np.array_equal(x, y)
        for a, b in zip(some, others, strict=True)
        for x, y in zip(a, b, strict=True)
    )


# ---- shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'ends', [(400,), (8, 16, 24), (1, 2, 3, 5, 7, 500), (300, 300, 1003), range(1, 1003)], ids=str
)
def test_shards_are_one_stream(tmp_path, ends, monkeypatch):
    """Windows lie across them; some are shorter than a window, or empty; there are more than may be
    open at once."""
    whole = write(
        tmp_path / 'whole', {'train': range(1003), 'val': range(203), 'test': range(50, 90)}
    )
    shards = write(
        tmp_path / 'shards',
        {**cut(range(1003), *ends), **cut(range(203), 9, name='val'), 'test': range(50, 90)},
    )
    one, other = (Dataset(folder, 8, 5, 2) for folder in (whole, shards))
    assert other.tokens == one.tokens == {'train': 1003, 'val': 203, 'test': 40}
    assert equal(all_batches(one), all_batches(other))
    assert other.first('train', 500).tolist() == list(range(500))
    assert other.shards['train']._open.cache_info().currsize <= 32


def test_documents_lie_across_shards(tmp_path):
    tokenizer = CharTokenizer.of('\nabc')
    write_bins(tmp_path, tokenizer, {'train': ['\nab\nc\nbbca\n'], 'val': ['\na\n']}, separator=0)
    expected = list(all_batches(open_dataset(tmp_path, 8, 3)))
    ids = np.fromfile(tmp_path / 'train.bin', np.uint16)
    (tmp_path / 'train.bin').unlink()
    for name, some in cut(ids, 2, 9).items():
        np.array(some, np.uint16).tofile(tmp_path / f'{name}.bin')
    data = open_dataset(tmp_path, 8, 3)
    assert isinstance(data, Documents) and equal(all_batches(data), expected)


@pytest.mark.parametrize(
    'bins, meta, message',
    [
        (
            {'train-00000': range(20), 'train-00002': range(20)},
            {},
            r'train-00001\.bin is missing: train-00002\.bin is there',
        ),
        ({'train-00001': range(20)}, {}, r'train-00000\.bin is missing'),
        (
            {'train': range(20), 'train-00000': range(20)},
            {},
            r'holds both train\.bin and train-00000\.bin',
        ),
        (
            {'train-00000': range(20), 'train-00001': [2000]},
            {},
            r'train-00000\.bin … train-00001\.bin holds the id 2000',
        ),
        (
            {'train-00000': range(20), 'train-00001': [1]},
            {'splits': {'train': {'tokens': 22, 'bytes': 9}}},
            r'holds 21 tokens, meta\.json says 22',
        ),
        ({'train': range(20), 'test': [1]}, {}, r'test\.bin holds 1 token'),
    ],
)
def test_shards_that_cannot_be_read_are_named(tmp_path, bins, meta, message):
    with pytest.raises(ValueError, match=message):
        Dataset(write(tmp_path, {'val': range(9), **bins}, **meta), 8, 2)


def test_a_shard_that_was_cut_off_is_named(tmp_path):
    write(tmp_path, {**cut(range(100), 50), 'val': range(9)})
    (tmp_path / 'train-00001.bin').write_bytes(b'123')
    with pytest.raises(
        ValueError, match=r'train-00001\.bin is not a whole number of uint16 ids long'
    ):
        Dataset(tmp_path, 8, 2)


# ---- masks ---------------------------------------------------------------------------------------


def is_learned(n, seed=0):
    """A mask of long and short runs."""
    return np.repeat(np.random.default_rng(seed).random(n // 7 + 1) < 0.4, 7)[:n].astype(np.uint8)


@pytest.mark.parametrize('ends', [(3,), (500, 501)], ids=str)
def test_only_tokens_of_the_mask_are_targets(tmp_path, ends):
    """Every token is its own id. The mask may be one file where the tokens are shards."""
    train, val, mask = range(1003), range(1003, 1206), is_learned(1206)
    plain = Dataset(write(tmp_path / 'plain', {'train': train, 'val': val}), 8, 5, 2)
    masks = {'train': mask[:1003], **cut(mask[1003:], 100, name='val')}
    data = Dataset(write(tmp_path / 'masked', {**cut(train, *ends), 'val': val}, masks), 8, 5, 2)
    for (idx, targets, _), (tokens, every, _) in zip(
        all_batches(data), all_batches(plain), strict=True
    ):
        assert np.array_equal(idx, tokens)
        assert np.array_equal(targets, np.where((every >= 0) & (mask[every] == 1), every, -1))
    assert data.bits_per_byte('val', 1.0) is None


@pytest.mark.parametrize('kind', ['stream', 'masked', 'documents', 'masked documents'])
def test_shares_and_counts_are_those_of_the_targets(tmp_path, kind):
    ids, meta = list(range(1, 1004)), {}
    if 'documents' in kind:
        ids[::9], meta = [0] * len(ids[::9]), dict(separator=0)
        ids[-1] = 0
    masks = {split: is_learned(1003, 3) for split in ('train', 'val')} if 'masked' in kind else None
    data = open_dataset(write(tmp_path, {'train': ids, 'val': ids}, masks, **meta), 8, 2, 3)
    for step in range(100):
        batches = [data.train_batch(step, micro) for micro in (2, 0, 1)]
        counts = [(targets >= 0).sum() for _, targets, _ in batches]
        assert [share for *_, share in batches] == pytest.approx(
            [count / max(1, sum(counts)) for count in counts]
        )
    for limit in (None, 7):
        batches = [data.eval_batch('val', i, limit) for i in range(data.eval_batches('val', limit))]
        assert [valid for *_, valid in batches] == [
            (targets >= 0).sum() for _, targets, _ in batches
        ]
        assert data.eval_targets('val', limit) == sum(valid for *_, valid in batches)


def test_a_step_without_targets_has_shares_of_nothing(tmp_path):
    mask = np.zeros(1003, np.uint8)
    mask[100] = 1
    data = Dataset(write(tmp_path, masks={'train': mask, 'val': is_learned(203)}), 8, 2, 3)
    shares = [
        sum(data.train_batch(step, micro)[2] for micro in range(3))
        for step in range(data.windows // 6)
    ]
    assert sorted(set(shares)) == [0.0, 1.0] and sum(shares) <= 1


@pytest.mark.parametrize(
    'masks, meta, message',
    [
        ({'train': [1] * 40}, {}, r'val\.mask is missing, and meta\.json says that there is one'),
        ({'train': [1] * 39, 'val': [1] * 9}, {}, r'train\.mask has 39 bytes for 40 tokens'),
        ({'train': [1] * 40, 'val': [1] + [0] * 8}, {}, r'val\.mask leaves no token to learn'),
        (
            {'train': [1] * 40, 'val': [1] * 9},
            dict(masked=False),
            r'\.mask is there, but meta\.json does not say',
        ),
    ],
)
def test_masks_that_cannot_be_used_are_named(tmp_path, masks, meta, message):
    with pytest.raises(ValueError, match=message):
        Dataset(write(tmp_path, {'train': range(40), 'val': range(9)}, masks, **meta), 8, 2)


# ---- mixtures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'weights', [(1, 1), (7, 3), (1, 999_999), (5, 3, 2), (1, 1, 1), (2, 9, 4, 7, 1)], ids=str
)
def test_every_dataset_gets_its_share_of_any_rows_one_after_the_other(weights):
    for start in (0, 10**12 + 3):
        which, numbers = deal(np.arange(start, start + 3000), weights)
        for k, weight in enumerate(weights):
            own = numbers[which == k]
            # none left out, none twice
            assert np.array_equal(own, np.arange(len(own)) + (own[0] if len(own) else 0))
            for row, number in zip(np.flatnonzero(which == k).tolist(), own.tolist()):
                assert abs(number - (start + row) * Fraction(weight, sum(weights))) < len(weights)
        some = np.array([2999, 5, 1234])  # whoever asks
        assert all(
            np.array_equal(a, b[some])
            for a, b in zip(deal(some + start, weights), (which, numbers))
        )


@pytest.mark.parametrize(
    'words, expected',
    [
        ('a:0.7,b:0.3', [('a', 7), ('b', 3)]),
        ('a:1, /x/b:.5 ,c:2', [('a', 2), ('/x/b', 1), ('c', 4)]),
        (r'C:\a:1,C:\b:1', [(r'C:\a', 1), (r'C:\b', 1)]),
        ('a', [('a', 1)]),
        (r'C:\a', [(r'C:\a', 1)]),
    ],
)
def test_how_a_mixture_is_said(words, expected):
    assert parse(words) == expected


def test_a_folder_that_is_there_is_no_mixture_whatever_its_name(tmp_path):
    for name in ('a,b', 'a:1,b:2', 'a,b:2'):
        (tmp_path / name).mkdir()
        assert parse(str(tmp_path / name)) == [(str(tmp_path / name), 1)]
    with pytest.raises(ValueError, match='a name in it has no comma'):
        parse(f'{tmp_path}/a,b:1,{tmp_path}/c:1')


@pytest.mark.parametrize(
    'words, message',
    [
        ('a:0.7,b', 'a mixture is NAME:WEIGHT,NAME:WEIGHT'),
        ('a,b', 'a weight behind each name'),
        ('a:1,b:0', 'weights must be above 0'),
        ('a:0,b:0', 'above 0'),
        ('a:1,a:2', 'names a dataset twice'),
        ('a:0.1234567,b:1', 'use fewer digits'),
        ('a:1,b:-1', 'a weight behind each name'),
    ],
)
def test_a_mixture_that_makes_no_sense(words, message):
    with pytest.raises(ValueError, match=message):
        parse(words)


def test_a_dataset_is_also_a_path_from_where_one_is(tmp_path, monkeypatch):
    (tmp_path / 'here').mkdir()
    write(tmp_path / 'here/set, too', {'train': range(99), 'val': range(99)})
    monkeypatch.chdir(tmp_path / 'here')
    for name in ('set, too', '../here/set, too', str(tmp_path / 'here/set, too')):
        assert open_dataset(name, 8, 2).tokens['train'] == 99


@pytest.fixture
def three(tmp_path):
    """A stream with every token below 1,003, a masked one with those up to 1,205, and one of
    documents above, by weight."""
    tokens, documents = {'bytes': 9}, np.arange(1206, 1506)
    documents[::7], documents[-1] = 1206, 1206
    splits = {split: {**tokens, 'tokens': 203} for split in ('val',)}
    write(tmp_path / 'a', {'train': range(1003), 'val': range(203)}, splits=splits)
    write(
        tmp_path / 'b',
        {'train': range(1003, 1206), 'val': range(1003, 1206)},
        {'train': is_learned(203, 1), 'val': is_learned(203, 2)},
        template={'user': ['', '']},
    )
    write(tmp_path / 'c', {'train': documents, 'val': documents[:43]}, separator=1206)
    return f"{tmp_path / 'a'}:5,{tmp_path / 'b'}:3,{tmp_path / 'c'}:2"


def part_of(idx):
    return np.searchsorted([1003, 1206], idx[:, 0], 'right')


def test_each_dataset_of_a_mixture_keeps_its_own_epochs(three):
    data = open_dataset(three, 8, 4, 3, 7)
    assert (
        isinstance(data, Mixture)
        and data.tokenizer is None
        and data.tokens == {'train': 1506, 'val': 449}
    )
    rows = [data.train_batch(step, micro) for step in range(60) for micro in range(3)]
    idx, targets = (np.concatenate(parts) for parts in list(zip(*rows))[:2])
    for k, weight in enumerate((5, 3, 2)):
        part, mine = data.parts[k], part_of(idx) == k
        assert mine.sum() == 720 * weight // 10
        alone = part.train_rows(np.arange(mine.sum()))
        assert np.array_equal(idx[mine], alone[0]) and np.array_equal(targets[mine], alone[1])
    for k, seen in enumerate(('0.16', '0.473', '0.187')):  # 40 rows: 20, 12 and 8
        assert f'{seen} epochs of {data.parts[k].name}' in data.epochs(10 * data.batch_tokens)
    assert data.meta['template'] == {'user': ['', '']}  # only one has it


def test_a_mixture_does_not_depend_on_how_steps_are_cut(three):
    def batch(step, batch_size, batches_per_step):
        parts = [
            open_dataset(three, 8, batch_size, batches_per_step).train_batch(step, i)
            for i in range(batches_per_step)
        ]
        counts = [(targets >= 0).sum() for _, targets, _ in parts]
        assert [share for *_, share in parts] == pytest.approx(
            [count / sum(counts) for count in counts]
        )
        return np.concatenate([idx for idx, *_ in parts])

    for step in (0, 7, 1000):
        assert all(
            np.array_equal(batch(step, 12, 1), batch(step, *cut))
            for cut in ((6, 2), (3, 4), (1, 12))
        )


@pytest.mark.parametrize('limit', [None, 2, 9])
def test_the_loss_of_a_mixture_is_the_mean_of_theirs(three, limit):
    """A loss that says whose token it is, and is not the same for all of one dataset."""

    def loss(data, limit):
        total = weight = 0
        for i in range(data.eval_batches('val', limit)):
            idx, targets, valid = data.eval_batch('val', i, limit)
            weight += valid
            if valid:
                total = total + valid * (targets[targets >= 0] ** 2).mean()
        return total / weight, weight

    data = open_dataset(three, 8, 4)
    found, weight = loss(data, limit)
    assert weight == pytest.approx(1)
    limits = [None] * 3 if limit is None else {2: [1, 1, 1], 9: [4, 3, 2]}[limit]
    each = [loss(part, n)[0] for part, n in zip(data.parts, limits)]
    assert found == pytest.approx(0.5 * each[0] + 0.3 * each[1] + 0.2 * each[2])
    assert data.bits_per_byte('val', found) is None  # the second one is masked


def test_bits_per_byte_of_a_mixture_are_those_of_a_text_that_is_mixed_so(tmp_path):
    for name, n_bytes in (('a', 10), ('b', 30)):
        write(
            tmp_path / name,
            {'train': range(20), 'val': range(10)},
            splits={'val': {'tokens': 10, 'bytes': n_bytes}},
        )
    data = open_dataset(f"{tmp_path / 'a'}:3,{tmp_path / 'b'}:1", 8, 2)
    assert data.bits_per_byte('val', np.log(2)) == pytest.approx(1 / (0.75 * 1 + 0.25 * 3))


def test_counted_models_see_every_dataset_whole(three):
    data = open_dataset(three, 8, 4)
    rows = np.concatenate([idx for idx, _ in data.epoch()])
    counts = np.bincount(part_of(rows))
    assert [n >= part.windows for n, part in zip(counts, data.parts)] == [True] * 3 and len(
        rows
    ) == data.windows
    assert [n - 1 < part.windows for n, part in zip(counts, data.parts)].count(True) == 1
    assert data.epoch_tokens == pytest.approx(data.windows * data.batch_tokens / 4, abs=1)


def test_what_can_not_be_mixed_is_named(three, tmp_path):
    write(
        tmp_path / 'd',
        tokenizer={'kind': 'byte'},
        vocab_size=256,
        bins={'train': [1] * 20, 'val': [1] * 9},
    )
    with pytest.raises(ValueError, match='a and .*d were prepared with different tokenizers'):
        open_dataset(f"{three},{tmp_path / 'd'}:1", 8, 4)
    with pytest.raises(ValueError, match='is a mixture: give one of them, as --dataset=.*a$'):
        open_unmixed(three)
    with pytest.raises(FileNotFoundError, match=r'nowhere/train\.bin is missing'):
        open_dataset(f"{three},{tmp_path / 'nowhere'}:1", 8, 4)
    with pytest.raises(ValueError, match='a has no token behind each document'):
        print(open_dataset(three, 8, 4).eot)
    for name, eot in (('e', 5), ('f', 6)):
        write(tmp_path / name, eot=eot)
    assert open_dataset(f"{tmp_path / 'e'}:1,{tmp_path / 'e/'}/:1", 8, 4).eot == 5
    with pytest.raises(ValueError, match='the documents of .* end with different tokens'):
        print(open_dataset(f"{tmp_path / 'e'}:1,{tmp_path / 'f'}:1", 8, 4).eot)


def train(monkeypatch, *arguments):
    """train.py in this process."""
    monkeypatch.setattr('sys.argv', ['train.py', *map(str, arguments)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    runpy.run_path(str(ROOT / 'train.py'), run_name='__main__')
    for number, handler in handlers.items():
        signal.signal(number, handler)
    gc.collect()  # its lock on out_dir


def test_a_run_on_a_mixture_with_a_mask_and_boundaries_resumes_bit_for_bit(
    three, tmp_path, monkeypatch, capsys
):
    names = three.split(',')
    settings = [
        *TINY,
        f'--dataset={names[0]},{names[1]}',
        '--document_boundaries=True',
        '--eval_interval=2',
        '--seed=7',
    ]
    for name in 'ab':
        write(
            tmp_path / name,
            eot=1000,
            template={'user': ['', '']},
            masks={'train': is_learned(1003), 'val': is_learned(203)} if name == 'b' else None,
        )
    train(monkeypatch, *settings, f"--out_dir={tmp_path / 'whole'}")
    assert 'epochs of' in capsys.readouterr().out
    train(monkeypatch, *settings, '--max_iters=3', f"--out_dir={tmp_path / 'cut'}")
    train(monkeypatch, '--init_from=resume', '--max_iters=6', f"--out_dir={tmp_path / 'cut'}")
    whole, cut = (checkpoint.read(tmp_path / name / 'ckpt.pt') for name in ('whole', 'cut'))
    assert same(whole['model'], cut['model']) and same(whole['optimizer'], cut['optimizer'])
    assert whole['model_args']['eot'] == cut['model_args']['eot'] == 1000 and cut['template'] == {
        'user': ['', '']
    }
