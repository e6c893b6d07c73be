"""From text to batches: what data/NAME/prepare.py writes, which windows a step sees, and what goes wrong in words.

Texts come from the standard library's own source, which is everywhere; Shakespeare and GPT-2's vocabulary join in where
NANOGPT_MIRROR and TIKTOKEN_CACHE_DIR have them.
"""
import hashlib
import json
import os
import pickle
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run, write_text

import dataset
from bins import write_bins
from dataset import Dataset, RandomDataset
from tokenizer import ByteTokenizer, CharTokenizer

MIRROR = Path(os.environ.get('NANOGPT_MIRROR') or '/nowhere')
VOCABULARY = Path(os.environ.get('TIKTOKEN_CACHE_DIR') or '/nowhere')
needs_shakespeare = pytest.mark.skipif(not (MIRROR / 'shakespeare/input.txt').is_file(),
                                       reason="NANOGPT_MIRROR has no Shakespeare")
needs_gpt2 = pytest.mark.skipif(not VOCABULARY.is_dir(), reason="TIKTOKEN_CACHE_DIR has no vocabulary")


def copied(name, folder):
    """data/NAME/prepare.py in `folder`, beside which it writes its bins."""
    script = folder / 'data' / name / 'prepare.py'
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_bytes((ROOT / 'data' / name / 'prepare.py').read_bytes())
    return script


def prepare(name, folder, *options, **env):
    """Run a copy of data/NAME/prepare.py as a user does; returns its CompletedProcess."""
    return run(copied(name, folder), *options, env={'PYTHONPATH': str(ROOT), **env})


def prepared(name, folder):
    """The folder with the bins that a copy of data/NAME/prepare.py makes, in this process: that is faster."""
    script = copied(name, folder)
    runpy.run_path(str(script), run_name='__main__')
    return script.parent


def definitions(name):
    """What data/NAME/prepare.py defines, without running it."""
    return runpy.run_path(str(ROOT / 'data' / name / 'prepare.py'))


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

@pytest.fixture(scope='module')
def stdlib(tmp_path_factory):
    """(folder, {split: text}) of data/stdlib_char."""
    folder = prepared('stdlib_char', tmp_path_factory.mktemp('stdlib'))
    script = definitions('stdlib_char')
    texts = {'train': [], 'val': []}
    for name, text in script['sources'](Path(os.__file__).parent):
        texts['val' if script['in_val'](name) else 'train'].append(text)
    return folder, {split: ''.join(texts[split]) for split in texts}


def test_stdlib_char_is_a_plain_encoding_of_whole_files(stdlib):
    folder, texts = stdlib
    chars = sorted(set(texts['train'] + texts['val']))
    id_of_byte = np.zeros(128, np.uint16)       # the corpus is ASCII: a character is its byte
    id_of_byte[[ord(c) for c in chars]] = range(len(chars))
    for split, text in texts.items():
        assert np.array_equal(bin_of(folder, split), id_of_byte[np.frombuffer(text.encode(), np.uint8)])
    assert json.loads((folder / 'meta.json').read_text())['tokenizer'] == {'kind': 'char', 'chars': ''.join(chars)}
    assert_meta_is_true(folder, texts)


def test_stdlib_char_validates_on_about_a_tenth_and_has_no_file_in_both(stdlib):
    _, texts = stdlib
    assert 0.05 < len(texts['val']) / len(texts['train'] + texts['val']) < 0.2
    for module in ('argparse', 'json/decoder', 'os', 'pickle', 'subprocess', 'threading'):
        text = (Path(os.__file__).parent / f'{module}.py').read_text(encoding='utf-8')
        assert not text.isascii() or (text in texts['train']) != (text in texts['val'])


def test_a_second_prepare_gives_the_same_bytes(stdlib, tmp_path):
    # Another hash seed orders sets differently; what is written must not depend on it.
    done = prepare('stdlib_char', tmp_path, PYTHONHASHSEED='7')
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / 'data/stdlib_char') == contents(stdlib[0])


@needs_shakespeare
def test_shakespeare_char_is_a_plain_encoding(tmp_path):
    folder = prepared('shakespeare_char', tmp_path)
    text = (MIRROR / 'shakespeare/input.txt').read_text(encoding='utf-8')
    chars = sorted(set(text))
    ids = np.array([chars.index(c) for c in text], np.uint16)
    cut = int(0.9 * len(text))
    assert np.array_equal(bin_of(folder, 'train'), ids[:cut]) and np.array_equal(bin_of(folder, 'val'), ids[cut:])
    assert (len(bin_of(folder, 'train')), len(bin_of(folder, 'val')), len(chars)) == (1_003_854, 111_540, 65)
    assert_meta_is_true(folder, {'train': text[:cut], 'val': text[cut:]})


@needs_shakespeare
@needs_gpt2
def test_shakespeare_is_what_tiktoken_says(tmp_path):
    import tiktoken
    folder = prepared('shakespeare', tmp_path)
    text = (MIRROR / 'shakespeare/input.txt').read_text(encoding='utf-8')
    cut = int(0.9 * len(text))
    for split, part in (('train', text[:cut]), ('val', text[cut:])):
        assert bin_of(folder, split).tolist() == tiktoken.get_encoding('gpt2').encode_ordinary(part)
    assert (len(bin_of(folder, 'train')), len(bin_of(folder, 'val'))) == (301_966, 36_059)
    assert_meta_is_true(folder, {'train': text[:cut], 'val': text[cut:]})


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


def test_only_small_datasets_are_prepared_unasked(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(dataset, 'ROOT', tmp_path)
    for name, size in (('small', 1.5), ('large', 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'prepare.py').write_text(
            f"DOWNLOAD_MB = {size}\nimport pathlib\npathlib.Path(__file__).with_name('train.bin').touch()")
    dataset.prepare_if_small('small')
    assert (tmp_path / 'small/train.bin').exists() and 'running data/small/prepare.py' in capfd.readouterr().out
    dataset.prepare_if_small('small')
    assert capfd.readouterr().out == ''
    with pytest.raises(FileNotFoundError, match=r'python data/large/prepare\.py'):
        dataset.prepare_if_small('large')
    assert 'DOWNLOAD_MB = 24_193\n' in (ROOT / 'data/openwebtext/prepare.py').read_text()


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


def test_a_prepare_without_network_ends_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('NANOGPT_MIRROR', '/nowhere')
    with pytest.raises(SystemExit) as end:
        prepared('shakespeare_char', tmp_path)
    out, error = capsys.readouterr()
    assert end.value.code == 2 and out == ''
    assert error.startswith('error: cannot download') and error.count('\n') == 1
