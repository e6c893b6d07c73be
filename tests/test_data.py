"""From text to batches: what data/NAME/prepare.py writes, which windows a step sees, and what goes wrong in words."""
import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, write_text

import dataset
from bins import write_bins
from dataset import Dataset, RandomDataset
from tokenizer import ByteTokenizer, CharTokenizer


def bin_of(folder, split, dtype='uint16'):
    return np.fromfile(folder / f'{split}.bin', dtype)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in ('train.bin', 'val.bin', 'meta.json')}


def assert_meta_is_true(folder, texts):
    """meta.json against the bins and the {split: text} that they were made from."""
    meta = json.loads((folder / 'meta.json').read_text())
    for split, text in texts.items():
        content = (folder / f'{split}.bin').read_bytes()
        assert meta['splits'][split].items() >= {
            'tokens': len(content) // np.dtype(meta['dtype']).itemsize,
            'bytes': len(text.encode()),
            'sha256': hashlib.sha256(content).hexdigest()}.items()


class Words:
    """A tokenizer with more entries than uint16 can count: one id per character, its code point."""

    vocab_size, eot = sys.maxunicode + 1, 0

    def encode(self, text):
        return [ord(c) for c in text]

    encode_ordinary = encode

    def describe(self):
        return {'kind': 'byte'}


# ---- preparing -------------------------------------------------------------------------------------------------------

def test_bins_are_uint32_where_the_vocabulary_needs_it(tmp_path):
    texts = {'train': 'plain', 'val': 'häßlich 🎉'}
    assert write_bins(tmp_path, Words(), {split: [text] for split, text in texts.items()})['dtype'] == 'uint32'
    assert bin_of(tmp_path, 'val', 'uint32').tolist() == [ord(c) for c in texts['val']]
    assert_meta_is_true(tmp_path, texts)
    assert Dataset(tmp_path, block_size=2, batch_size=1).eval_batch('val', 0)[0].tolist() == [[ord('h'), ord('ä')]]


def test_several_texts_of_a_split_stand_one_after_the_other(tmp_path):
    write_bins(tmp_path, ByteTokenizer(), {'train': ['to be, ', 'or not ', 'to be'], 'val': iter(['é', '!'])})
    assert bytes(bin_of(tmp_path, 'train').tolist()) == b'to be, or not to be'
    assert_meta_is_true(tmp_path, {'train': 'to be, or not to be', 'val': 'é!'})


def test_a_prepare_that_fails_leaves_the_old_bins(tmp_path):
    before = contents(write_text(tmp_path, 'the old text'))
    with pytest.raises(ValueError, match="'X' at position 4"):
        write_bins(tmp_path, CharTokenizer('abc'), {'train': ['abc', 'abcaX'], 'val': ['c']})
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == len(before)


# ---- nanoGPT's meta.pkl ----------------------------------------------------------------------------------------------

def with_meta_pkl(folder, content):
    write_text(folder, 'some text, written twice: some text')
    (folder / 'meta.json').unlink()
    (folder / 'meta.pkl').write_bytes(content)
    return folder


def test_nanogpt_meta_pkl_is_read(tmp_path):
    chars = sorted(set('some text, written twice: some text'))
    content = pickle.dumps({'vocab_size': len(chars), 'itos': dict(enumerate(chars)),
                            'stoi': {c: i for i, c in enumerate(chars)}})
    data = Dataset(with_meta_pkl(tmp_path, content), block_size=4, batch_size=1)
    assert data.tokenizer == {'kind': 'char', 'chars': ''.join(chars)} and data.vocab_size == len(chars)
    assert data.bits_per_byte('val', 1.0) is None       # it doesn't say how many bytes


def test_a_hostile_meta_pkl_is_refused_and_not_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'executed'),)
    content = pickle.dumps({'itos': {0: 'a'}, 'stoi': Hostile()})
    with pytest.raises(ValueError, match=r'meta\.pkl asks for .*mkdir'):
        Dataset(with_meta_pkl(tmp_path / 'data', content), block_size=4, batch_size=1)
    assert not (tmp_path / 'executed').exists()
    pickle.loads(content)
    assert (tmp_path / 'executed').exists()     # so it was a hostile one


@pytest.mark.parametrize('content', [b'', b'not a pickle', pickle.dumps([]), pickle.dumps({'itos': {0: 'two'}}),
                                     pickle.dumps({'itos': {1: 'a'}})])
def test_a_meta_pkl_of_another_form_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r'meta\.pkl'):
        Dataset(with_meta_pkl(tmp_path, content), block_size=4, batch_size=1)


# ---- training batches ------------------------------------------------------------------------------------------------

def write_ids(folder, train, val, vocab_size=1 << 20):
    """Make `folder` a dataset of these token ids."""
    folder.mkdir(exist_ok=True)
    for split, ids in (('train', train), ('val', val)):
        np.array(ids, np.uint32).tofile(folder / f'{split}.bin')
    (folder / 'meta.json').write_text(json.dumps({'tokenizer': None, 'vocab_size': vocab_size, 'dtype': 'uint32'}))
    return folder


@pytest.fixture
def positions(tmp_path):
    """A dataset in which every token is its own position: a window's first token tells where it lies."""
    return write_ids(tmp_path / 'positions', range(1003), range(203))


@pytest.mark.parametrize('n', [*range(1, 70), 255, 256, 257, 1000, 65_537, 1_000_003])
def test_permute_is_a_permutation(n):
    keys = np.random.SeedSequence(n).generate_state(4, np.uint64)
    order = dataset.permute(np.arange(n), n, keys)
    assert np.array_equal(np.sort(order), np.arange(n))
    if n > 20:
        assert np.mean(np.diff(order) == 1) < 0.2       # and not nearly the identity


def test_permute_depends_on_its_keys():
    orders = {tuple(dataset.permute(np.arange(100), 100, np.random.SeedSequence(seed).generate_state(4, np.uint64)))
              for seed in range(50)}
    assert len(orders) == 50


def test_every_window_comes_once_per_epoch_in_a_new_order_from_a_new_offset(positions):
    data = Dataset(positions, block_size=8, batch_size=5)
    batches = [data.train_batch(step, 0) for step in range(6 * data.windows // 5 + 1)]
    starts = np.concatenate([idx[:, 0] for idx, _, _ in batches])
    epochs = [starts[i * data.windows:(i + 1) * data.windows] for i in range(6)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), epoch.min() + 8 * np.arange(data.windows))
        assert epoch.min() < 8 and epoch.max() + 8 < data.tokens['train']
    assert len({epoch.min() for epoch in epochs}) > 1
    assert len({tuple(epoch // 8) for epoch in epochs}) == 6


def test_targets_are_the_next_tokens(positions):
    idx, targets, share = Dataset(positions, block_size=8, batch_size=5, batches_per_step=2).train_batch(3, 1)
    assert idx.shape == targets.shape == (5, 8) and idx.dtype == targets.dtype == np.int64
    assert np.array_equal(idx, idx[:, :1] + np.arange(8)) and np.array_equal(targets, idx + 1)
    assert share == 1 / 2


@pytest.mark.parametrize('kind', ['positions', 'random'])
def test_a_batch_is_a_function_of_seed_step_and_micro(positions, kind):
    def batch(seed, step, micro):       # each from a new object, so that nothing can be remembered
        make = RandomDataset if kind == 'random' else lambda *args: Dataset(positions, *args)
        return make(8, 4, 3, seed).train_batch(step, micro)[0]
    assert np.array_equal(batch(1, 50, 2), batch(1, 50, 2))
    others = [batch(1, 50, 1), batch(1, 51, 2), batch(2, 50, 2)]
    assert not any(np.array_equal(batch(1, 50, 2), other) for other in others)

    data, asked_before = (Dataset(positions, 8, 4) for _ in range(2))
    for step in (9, 2, 300):
        asked_before.train_batch(step, 0)
    assert np.array_equal(data.train_batch(5, 0)[0], asked_before.train_batch(5, 0)[0])


def test_micro_batches_and_ranks_are_slices_of_the_same_global_batch(positions):
    def global_batch(step, batch_size, batches_per_step):
        data = Dataset(positions, 8, batch_size, batches_per_step)
        parts = [data.train_batch(step, micro) for micro in range(batches_per_step)]
        assert sum(share for _, _, share in parts) == pytest.approx(1)
        return np.concatenate([np.concatenate([idx, targets], 1) for idx, targets, _ in parts])
    for step in (0, 7, 20):     # 20 lies across the border of two epochs
        whole = global_batch(step, 12, 1)
        for batch_size, batches_per_step in ((6, 2), (4, 3), (1, 12)):
            assert np.array_equal(global_batch(step, batch_size, batches_per_step), whole)


# ---- evaluation batches ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n', [2, 8, 9, 10, 64, 65, 66, 203])
@pytest.mark.parametrize('batch_size', [1, 4])
def test_a_whole_evaluation_predicts_every_token_but_the_first_once(tmp_path, n, batch_size):
    data = Dataset(write_ids(tmp_path / 'data', range(100), range(n)), block_size=8, batch_size=batch_size)
    batches = [data.eval_batch('val', i) for i in range(data.eval_batches('val'))]
    predicted = np.concatenate([targets[targets >= 0] for _, targets, _ in batches])
    assert np.array_equal(predicted, np.arange(1, n))
    for idx, targets, valid in batches:
        assert idx.shape == targets.shape == (batch_size, 8) and valid == (targets >= 0).sum() > 0
        assert np.array_equal(idx[targets >= 0] + 1, targets[targets >= 0])


def test_a_limited_evaluation_takes_fixed_windows_spread_evenly(positions):
    data = Dataset(positions, block_size=4, batch_size=3)
    assert data.eval_batches('train', limit=5) == 5 and data.eval_batches('val', limit=1000) == data.eval_batches('val')
    starts = np.concatenate([data.eval_batch('train', i, limit=5)[0][:, 0] for i in range(5)])
    gaps = np.diff([*starts, data.tokens['train']])
    assert starts[0] == 0 and gaps.min() >= (even := 1003 / 15) - 4 and gaps.max() <= even + 4

    other_seed = Dataset(positions, 4, 3, seed=7)
    other_seed.train_batch(3, 0)
    assert np.array_equal(other_seed.eval_batch('train', 2, limit=5)[0], data.eval_batch('train', 2, limit=5)[0])


def test_bits_per_byte(tmp_path):
    write_bins(tmp_path, CharTokenizer.of('aé'), {'train': ['aéa'], 'val': ['éé']})     # é is two bytes
    data = Dataset(tmp_path, block_size=1, batch_size=1)
    assert data.bits_per_byte('val', np.log(2)) == pytest.approx(1 / 2)
    assert data.bits_per_byte('train', np.log(2)) == pytest.approx(3 / 4)


# ---- what can be wrong with a dataset --------------------------------------------------------------------------------

@pytest.mark.parametrize('train, val, message', [
    ([], [1, 2, 3], r'train\.bin holds 0 token'),
    ([1] * 20, [1], r'val\.bin holds 1 token'),
    ([1] * 8, [1, 2], 'block_size=8 is larger than the train split'),
    ([1] * 19 + [100], [1, 2], r'train\.bin holds the id 100, but its vocabulary has 100'),
    ([1] * 20, [1, 2, 101], r'val\.bin holds the id 101')])
def test_bins_that_cannot_be_used_are_named(tmp_path, train, val, message):
    with pytest.raises(ValueError, match=message):
        Dataset(write_ids(tmp_path, train, val, vocab_size=100), block_size=8, batch_size=2)


def test_ids_beyond_the_vocabulary_are_found_when_a_bin_is_too_large_to_search(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, 'SCAN_LIMIT', 10)
    data = Dataset(write_ids(tmp_path, [100] * 20, [1, 2], vocab_size=100), block_size=8, batch_size=2)
    with pytest.raises(ValueError, match=r'train\.bin holds the id 100'):
        data.train_batch(0, 0)


@pytest.mark.parametrize('missing', ['train', 'val'])
def test_missing_bins_are_named_with_what_to_do(text_folder, tmp_path, missing):
    there = {'train': 'val', 'val': 'train'}[missing]
    for name in (f'{there}.bin', 'meta.json'):
        (tmp_path / name).write_bytes((text_folder / name).read_bytes())
    with pytest.raises(FileNotFoundError, match=rf'{missing}\.bin is missing: dataset= takes a folder'):
        Dataset(tmp_path, block_size=8, batch_size=2)
    (tmp_path / 'prepare.py').touch()
    with pytest.raises(FileNotFoundError, match=rf'{missing}\.bin is missing: run `python .*prepare\.py`'):
        Dataset(tmp_path, block_size=8, batch_size=2)


@pytest.mark.parametrize('content', [b'', b'{"vocab_size": 5}', b'\xff'])
def test_a_broken_meta_json_is_named(text_folder, tmp_path, content):
    for name in ('train.bin', 'val.bin'):
        (tmp_path / name).write_bytes((text_folder / name).read_bytes())
    (tmp_path / 'meta.json').write_bytes(content)
    with pytest.raises(ValueError, match=r'meta\.json cannot be read'):
        Dataset(tmp_path, block_size=8, batch_size=2)


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason="no /proc")
def test_a_large_bin_does_not_fill_the_memory(tmp_path):
    write_ids(tmp_path, [], [1, 2], vocab_size=10)
    os.truncate(tmp_path / 'train.bin', 1 << 30)    # zeros that take no space
    program = f"""if True:
        import os
        from dataset import Dataset
        def resident():
            return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
        data = Dataset({str(tmp_path)!r}, block_size=256, batch_size=16)
        for step in range(1010):
            data.train_batch(step, 0)
            if step == 10:
                before = resident()
        print(resident() - before)"""
    done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 10 << 20
