"""What is read of a dataset's folder: shards, masks of the targets that count, a test split, mixtures of folders."""
import json

import numpy as np
import pytest

from bins import write_bins
from dataset import Dataset, Documents, open_dataset
from tokenizer import CharTokenizer


def write(folder, bins=None, masks=None, **meta):
    """Make `folder` a dataset of uint16 ids {file: ids}, with masks {file: bytes}."""
    folder.mkdir(exist_ok=True)
    for name, ids in (bins or {'train': range(1003), 'val': range(203)}).items():
        np.array(ids, np.uint16).tofile(folder / f'{name}.bin')
    for name, mask in (masks or {}).items():
        np.array(mask, np.uint8).tofile(folder / f'{name}.mask')
    meta = {'tokenizer': None, 'vocab_size': 2000, 'dtype': 'uint16', **({'masked': True} if masks else {}), **meta}
    (folder / 'meta.json').write_text(json.dumps(meta))
    return folder


def cut(ids, *ends, name='train'):
    """{shard: ids}: cut in front of `ends`."""
    ids = list(ids)
    return {f'{name}-{i:05}': ids[start:end] for i, (start, end) in enumerate(zip([0, *ends], [*ends, len(ids)]))}


def all_batches(data, steps=40):
    """What training sees in some steps, and a whole evaluation."""
    for step in range(steps):
        yield from (data.train_batch(step, micro) for micro in range(data.batches_per_step))
    for split in sorted(data.tokens):
        yield from (data.eval_batch(split, i) for i in range(data.eval_batches(split)))


def equal(some, others):
    return all(np.array_equal(x, y) for a, b in zip(some, others, strict=True) for x, y in zip(a, b, strict=True))


# ---- shards ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('ends', [(400,), (8, 16, 24), (1, 2, 3, 5, 7, 500), (300, 300, 1003), range(1, 1003)], ids=str)
def test_shards_are_one_stream(tmp_path, ends, monkeypatch):
    """Windows lie across them; some are shorter than a window, or empty; there are more than may be open at once."""
    whole = write(tmp_path / 'whole', {'train': range(1003), 'val': range(203), 'test': range(50, 90)})
    shards = write(tmp_path / 'shards', {**cut(range(1003), *ends), **cut(range(203), 9, name='val'),
                                         'test': range(50, 90)})
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


@pytest.mark.parametrize('bins, meta, message', [
    ({'train-00000': range(20), 'train-00002': range(20)}, {}, r'train-00001\.bin is missing: train-00002\.bin is there'),
    ({'train-00001': range(20)}, {}, r'train-00000\.bin is missing'),
    ({'train': range(20), 'train-00000': range(20)}, {}, r'holds both train\.bin and train-00000\.bin'),
    ({'train-00000': range(20), 'train-00001': [2000]}, {}, r'train-00000\.bin … train-00001\.bin holds the id 2000'),
    ({'train-00000': range(20), 'train-00001': [1]}, {'splits': {'train': {'tokens': 22, 'bytes': 9}}},
     r'holds 21 tokens, meta\.json says 22'),
    ({'train': range(20), 'test': [1]}, {}, r'test\.bin holds 1 token')])
def test_shards_that_cannot_be_read_are_named(tmp_path, bins, meta, message):
    with pytest.raises(ValueError, match=message):
        Dataset(write(tmp_path, {'val': range(9), **bins}, **meta), 8, 2)


def test_a_shard_that_was_cut_off_is_named(tmp_path):
    write(tmp_path, {**cut(range(100), 50), 'val': range(9)})
    (tmp_path / 'train-00001.bin').write_bytes(b'123')
    with pytest.raises(ValueError, match=r'train-00001\.bin is not a whole number of uint16 ids long'):
        Dataset(tmp_path, 8, 2)


# ---- masks -----------------------------------------------------------------------------------------------------------

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
    for (idx, targets, _), (same, every, _) in zip(all_batches(data), all_batches(plain), strict=True):
        assert np.array_equal(idx, same)
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
        assert [share for *_, share in batches] == pytest.approx([count / max(1, sum(counts)) for count in counts])
    for limit in (None, 7):
        batches = [data.eval_batch('val', i, limit) for i in range(data.eval_batches('val', limit))]
        assert [valid for *_, valid in batches] == [(targets >= 0).sum() for _, targets, _ in batches]
        assert data.eval_targets('val', limit) == sum(valid for *_, valid in batches)


def test_a_step_without_targets_has_shares_of_nothing(tmp_path):
    mask = np.zeros(1003, np.uint8)
    mask[100] = 1
    data = Dataset(write(tmp_path, masks={'train': mask, 'val': is_learned(203)}), 8, 2, 3)
    shares = [sum(data.train_batch(step, micro)[2] for micro in range(3)) for step in range(data.windows // 6)]
    assert sorted(set(shares)) == [0.0, 1.0] and sum(shares) <= 1


@pytest.mark.parametrize('masks, meta, message', [
    ({'train': [1] * 40}, {}, r'val\.mask is missing, and meta\.json says that there is one'),
    ({'train': [1] * 39, 'val': [1] * 9}, {}, r'train\.mask has 39 bytes for 40 tokens'),
    ({'train': [1] * 40, 'val': [1] + [0] * 8}, {}, r'val\.mask leaves no token to learn'),
    ({'train': [1] * 40, 'val': [1] * 9}, dict(masked=False), r'\.mask is there, but meta\.json does not say')])
def test_masks_that_cannot_be_used_are_named(tmp_path, masks, meta, message):
    with pytest.raises(ValueError, match=message):
        Dataset(write(tmp_path, {'train': range(40), 'val': range(9)}, masks, **meta), 8, 2)
