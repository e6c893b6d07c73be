"""From text to batches: what data/NAME/prepare.py writes, which windows a step sees, and what goes
wrong in words."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
from support.datasets import assert_meta_is_true, bin_of, contents, write_text
from support.scripts import ROOT, TINY

from system import errors
from text import dataset, meta_pkl, wide_ids
from text.bins import write_bins
from text.dataset import Dataset, RandomDataset
from text.shuffle import permute
from text.tokenizer import ByteTokenizer, CharTokenizer


class Words:
    """A tokenizer with more entries than uint16 can count: one id per character, its code point."""

    vocab_size, eot = sys.maxunicode + 1, 0

    def encode(self, text):
        return [ord(c) for c in text]

    encode_ordinary = encode

    def describe(self):
        return {'kind': 'byte'}


# ---- preparing -----------------------------------------------------------------------------------


def test_bins_are_uint32_where_the_vocabulary_needs_it(tmp_path):
    texts = {'train': 'plain', 'val': 'häßlich 🎉'}
    assert (
        write_bins(tmp_path, Words(), {split: [text] for split, text in texts.items()})['dtype']
        == 'uint32'
    )
    assert bin_of(tmp_path, 'val', 'uint32').tolist() == [ord(c) for c in texts['val']]
    assert_meta_is_true(tmp_path, texts)
    assert Dataset(tmp_path, block_size=2, batch_size=1).eval_batch('val', 0)[0].tolist() == [
        [ord('h'), ord('ä')]
    ]


def test_several_texts_of_a_split_stand_one_after_the_other(tmp_path):
    write_bins(
        tmp_path,
        ByteTokenizer(),
        {'train': ['to be, ', 'or not ', 'to be'], 'val': iter(['é', '!'])},
    )
    assert bytes(bin_of(tmp_path, 'train').tolist()) == b'to be, or not to be'
    assert_meta_is_true(tmp_path, {'train': 'to be, or not to be', 'val': 'é!'})


def test_a_prepare_that_fails_leaves_the_old_bins(tmp_path):
    before = contents(write_text(tmp_path, 'the old text'))
    with pytest.raises(ValueError, match="'X' at position 4"):
        write_bins(tmp_path, CharTokenizer('abc'), {'train': ['abc', 'abcaX'], 'val': ['c']})
    assert contents(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == len(before)


# ---- nanoGPT's meta.pkl --------------------------------------------------------------------------


def with_meta_pkl(folder, content):
    write_text(folder, 'some text, written twice: some text')
    (folder / 'meta.json').unlink()
    (folder / 'meta.pkl').write_bytes(content)
    return folder


def test_nanogpt_meta_pkl_is_read(tmp_path):
    chars = sorted(set('some text, written twice: some text'))
    content = pickle.dumps(
        {
            'vocab_size': len(chars),
            'itos': dict(enumerate(chars)),
            'stoi': {c: i for i, c in enumerate(chars)},
        }
    )
    data = Dataset(with_meta_pkl(tmp_path, content), block_size=4, batch_size=1)
    assert data.tokenizer == {'kind': 'char', 'chars': ''.join(chars)} and data.vocab_size == len(
        chars
    )
    assert data.bits_per_byte('val', 1.0) is None  # it doesn't say how many bytes


CHARS = sorted(set('some text, written twice: some text'))


@pytest.mark.parametrize(
    'meta, chars, vocab_size',
    [
        ({'itos': CHARS}, CHARS, len(CHARS)),  # a list; no vocab_size
        ({'itos': dict(enumerate(CHARS)), 'vocab_size': 64}, CHARS, 64),  # padded
        (
            {
                'itos': {np.int64(i): np.str_(c) for i, c in enumerate(CHARS)},
                'vocab_size': np.int32(len(CHARS)),
            },
            CHARS,
            len(CHARS),
        ),
        ({'vocab_size': np.int64(65)}, None, 65),
        ({'vocab_size': 65}, None, 65),
        ({'vocab_size': 65.0}, None, 65),
        ({'vocab_size': 65, 'itos': {}}, None, 65),
        ({'vocab_size': 65, 'itos': 7}, None, 65),
        ({'itos': np.array(CHARS), 'vocab_size': 65}, None, 65),
        ({'itos': np.array(CHARS, object), 'vocab_size': np.int64(65)}, None, 65),
        ({'itos': OrderedDict(enumerate(CHARS))}, CHARS, len(CHARS)),
        (OrderedDict(itos=dict(enumerate(CHARS)), stoi=defaultdict(int, a=1)), CHARS, len(CHARS)),
        (
            {'itos': defaultdict(str, enumerate(CHARS)), 'stoi': defaultdict(None)},
            CHARS,
            len(CHARS),
        ),
        ({'vocab_size': 65, 'itos': {1: 'a', 2: 'b'}}, None, 65),  # not from 0 on
        ({'itos': ['the', ' ', 'of'] * 9}, None, 27),  # words
        ({'itos': dict(enumerate(range(60, 87))), 'vocab_size': 27}, None, 27),  # notes of a piano
    ],
)
def test_what_a_meta_pkl_may_say(tmp_path, meta, chars, vocab_size):
    """vocab_size is enough to train; a table of single characters is a tokenizer."""
    data = Dataset(with_meta_pkl(tmp_path, pickle.dumps(meta)), block_size=4, batch_size=1)
    assert data.vocab_size == vocab_size and type(data.vocab_size) is int
    if chars:
        assert (
            data.tokenizer == {'kind': 'char', 'chars': ''.join(chars)}
            and type(data.tokenizer['chars']) is str
        )
    else:
        assert (
            data.tokenizer is None and f"{tmp_path / 'meta.pkl'} has " in data.meta['no_tokenizer']
        )


@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_meta_pkl_may_hold_other_dictionaries_and_arrays_in_each_protocol(protocol):
    meta = {
        'itos': OrderedDict(enumerate(CHARS)),
        'stoi': defaultdict(int, a=1),
        'counts': np.arange(65),
        'vocab_size': 65,
    }
    found = meta_pkl.describe_meta_pkl(pickle.dumps(meta, protocol))
    assert found == ({'kind': 'char', 'chars': ''.join(CHARS)}, 65, None)


@pytest.mark.parametrize('version', [1, 2])
def test_numpys_numbers_of_both_versions(version):
    """NumPy 2 has another name for the module that its scalars come from. They become plain
    ones."""
    values = [
        np.int64(-5),
        np.uint8(200),
        np.array(7, '>i4')[()],
        np.float32(0.5),
        np.bool_(True),
        np.str_('é'),
    ]
    content = pickle.dumps({'vocab_size': values}, protocol=4)
    content = content[:2] + content[11:]  # without the frame, which has a length
    names = {1: b'\x8c\x15numpy.core.multiarray', 2: b'\x8c\x16numpy._core.multiarray'}
    for name in names.values():
        content = content.replace(name, names[version])
    assert names[version] in content
    found = meta_pkl._RestrictedUnpickler(io.BytesIO(content)).load()['vocab_size']
    assert found == [-5, 200, 7, 0.5, True, 'é'] and [type(x) for x in found] == [
        int,
        int,
        int,
        float,
        bool,
        str,
    ]


@pytest.mark.parametrize(
    'meta, message',
    [
        ({'vocab_size': 5, 'itos': CHARS}, f'vocab_size=5, but its itos has {len(CHARS)} entries'),
        ({'vocab_size': '65'}, 'vocab_size=65: it must be a whole number from 1 to 65,536'),
        ({'vocab_size': 65.5}, 'vocab_size=65.5: it must be'),
        ({'vocab_size': 100_000}, 'a larger vocabulary needs a meta.json that says uint32'),
        ({'vocab_size': np.array([65])}, 'vocab_size=a NumPy array: it must be'),
        (
            {'vocab_size': 65, 'itos': Path('a')},
            r'meta.pkl asks for pathlib.*; it may hold only numbers, strings, lists and',
        ),
        ({}, 'meta.pkl has no vocab_size, and no itos: add vocab_size, how many ids there are'),
        (
            {'itos': {0: 'a', 2: 'b'}},
            'no vocab_size, and its itos of 2 entries does not have one for each id from 0 to 1: add',
        ),
        ({'itos': []}, 'no vocab_size, and its itos is empty: add'),
        ({'itos': 3}, 'no vocab_size, and its itos is not a table: add'),
        (
            {'itos': np.array(CHARS)},
            'no vocab_size, and its itos is a NumPy array, which is not read: add',
        ),
    ],
)
def test_a_meta_pkl_that_does_not_fit_is_refused(tmp_path, meta, message):
    with pytest.raises(ValueError, match=message) as caught:
        Dataset(with_meta_pkl(tmp_path, pickle.dumps(meta)), block_size=4, batch_size=1)
    assert str(tmp_path) in str(caught.value)


def test_ids_beyond_a_table_of_characters_are_a_replacement_character():
    assert CharTokenizer('ab').decode([0, 1, 2, 63]) == 'ab\ufffd\ufffd'


@pytest.mark.parametrize(
    'meta, reason',
    [
        ({'vocab_size': 40}, 'has no itos, the table with a character for each id'),
        (
            {'itos': np.array(CHARS), 'vocab_size': 40},
            'has an itos that is a NumPy array, which is not read: save itos.tolist()',
        ),
        (
            {'itos': ['the', 'of'] * 20},
            'has an itos that is not a single character for each id from 0 on, and no other is '
            'read',
        ),
    ],
)
def test_a_run_without_a_tokenizer_trains_and_says_what_sampling_lacks(
    warm, tmp_path, meta, reason
):
    folder = with_meta_pkl(tmp_path / 'data', pickle.dumps(meta))
    done = warm(
        'train.py', *TINY, f'--dataset={folder}', f'--out_dir={tmp_path / "out"}', sample=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"no sample: {folder / 'meta.pkl'} {reason}"
    for script in ('sample.py', 'evaluate.py'):
        done = warm(script, f'--out_dir={tmp_path / "out"}', '--device=cpu')
        (line,) = done.stderr.splitlines()
        assert (
            done.returncode == 2
            and f"{tmp_path / 'out'} does not say which tokenizer its 40 ids belong to" in line
        )
        assert 'or meta.pkl (itos, one character per id)' in line


def test_a_run_without_a_tokenizer_goes_on_with_data_of_as_many_entries_only(warm, tmp_path):
    """With as many, its ids may be those that it learned, which is printed."""
    folder = with_meta_pkl(tmp_path / 'data', pickle.dumps({'vocab_size': 40}))
    out_dir = tmp_path / 'out'
    assert (
        warm(
            'train.py', *TINY, '--max_iters=1', f'--dataset={folder}', f'--out_dir={out_dir}'
        ).returncode
        == 0
    )

    def resume(itos=None):
        if itos:
            (folder / 'meta.pkl').write_bytes(pickle.dumps({'itos': itos}))
        return warm(
            'train.py',
            *TINY,
            '--max_iters=2',
            f'--dataset={folder}',
            f'--out_dir={out_dir}',
            '--init_from=resume',
        )

    assert 'ids belong to' not in resume().stdout
    done = resume([chr(65 + i) for i in range(30)])
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line == (
        f"error: {folder} has a tokenizer of 30 entries, the model of {out_dir} has 40 and does not say which tokenizer "
        "they belong to: use the dataset that it was trained on"
    )
    done = resume([chr(65 + i) for i in range(40)])
    assert done.returncode == 0, done.stderr
    assert (
        f"{out_dir} does not say which tokenizer its 40 ids belong to; assuming those of {folder}"
        in done.stdout.splitlines()
    )


def test_a_run_with_a_padded_table_samples_characters_only(warm, tmp_path):
    folder = with_meta_pkl(tmp_path / 'data', pickle.dumps({'itos': CHARS, 'vocab_size': 500}))
    done = warm(
        'train.py',
        *TINY,
        '--max_iters=1',
        f'--dataset={folder}',
        f'--out_dir={tmp_path / "out"}',
        sample=True,
    )
    assert done.returncode == 0, done.stderr
    done = warm(
        'sample.py',
        f'--out_dir={tmp_path / "out"}',
        '--device=cpu',
        '--start=some',
        '--num_samples=1',
    )
    assert done.returncode == 0 and set(done.stdout.splitlines()[0]) <= set(CHARS)


# ---- ids of another width ------------------------------------------------------------------------


def ids_like(kind, n=4000):
    """Ids of a small vocabulary as real data have them; 0 is the line end or the space, the most
    frequent one."""
    random = np.random.default_rng(1)
    lines = np.where(np.arange(n) % 2, 0, random.integers(1, 65, n))
    return {
        'text': np.minimum(random.geometric(0.3, n) - 1, 64),
        'lines of one character': lines,
        '1, 0, 1, 0': (np.arange(n) + 1) % 2,
        'zeros': np.zeros(n, int),
        'without 0': random.integers(1, 65, n),
        'mostly 0': (random.random(n) < 0.02).astype(int),
        'GPT-2': random.integers(0, 50257, n),
        'short': np.array([3, 0, 0, 0, 5, 0] * 6),
    }[kind]


def with_bins(folder, ids, dtype, meta=None):
    """A dataset of these ids, written as `dtype`, with nanoGPT's meta.pkl of characters or the
    meta.json `meta`."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ('train', 'val'):
        ids.astype(dtype).tofile(folder / f'{split}.bin')
    if meta is None:
        (folder / 'meta.pkl').write_bytes(
            pickle.dumps({'itos': [chr(10 + i) for i in range(65)], 'vocab_size': 65})
        )
    elif meta:
        (folder / 'meta.json').write_text(
            json.dumps({'tokenizer': None, 'vocab_size': 60000, **meta})
        )
    return folder


def run_conversion(message, path):
    """Do what the message says: run its command, and rename the file that this writes."""
    line = errors.one_line(message)
    command, name = re.search(
        '`(python -c .*)` writes (.*) beside it, to be renamed to', line
    ).groups()
    before = path.read_bytes()
    done = subprocess.run(
        command.replace('python', sys.executable, 1), shell=True, capture_output=True, text=True
    )
    assert path.read_bytes() == before
    if done.returncode == 0:
        path.with_name(name).replace(path)
    return done


@pytest.mark.parametrize(
    'kind, dtype, meta',
    [
        ('text', 'int64', None),
        ('text', 'int32', None),
        ('text', 'uint32', None),
        ('without 0', 'int64', None),
        ('mostly 0', 'int64', None),
        ('GPT-2', 'int64', {}),
        ('GPT-2', 'int32', {}),
        ('without 0', 'int32', {'dtype': 'uint16'}),
        ('GPT-2', 'int64', {'dtype': 'uint16', 'splits': {}}),
        ('GPT-2', 'int64', {'dtype': 'uint32'}),
    ],
)
def test_ids_of_another_width_are_noticed_and_what_is_said_mends_them(tmp_path, kind, dtype, meta):
    ids = ids_like(kind)
    folder, read_as = with_bins(tmp_path, ids, dtype, meta), (meta or {}).get('dtype', 'uint16')
    for split in ('train', 'val'):
        wide = 'int64' if dtype == 'int64' else 'int32'
        with pytest.raises(
            ValueError, match=f"{split}.bin seems to hold {wide} ids: read as {read_as}, each"
        ) as caught:
            Dataset(folder, block_size=8, batch_size=2)
        assert '\n' not in str(caught.value)
        run_conversion(str(caught.value), folder / f'{split}.bin')
    data = Dataset(folder, block_size=8, batch_size=2)
    assert np.array_equal(data.first('train', len(ids) + 1), ids) and data.tokens['val'] == len(ids)


@pytest.mark.parametrize(
    'name',
    [
        "it's here",
        'two  spaces',
        '$HOME `id` !x',
        'a"b',
        'données',
        'deep/' * 40 + 'er',
        'tab\tinside',
    ],
)
def test_the_command_that_converts_works_in_any_folder(tmp_path, name):
    ids = ids_like('text')
    folder = with_bins(tmp_path / name, ids, 'int64')
    with pytest.raises(ValueError) as caught:
        Dataset(folder, block_size=8, batch_size=2)
    assert run_conversion(str(caught.value), folder / 'train.bin').returncode == 0
    assert np.array_equal(np.fromfile(folder / 'train.bin', 'uint16'), ids)


@pytest.mark.parametrize('odd', [65536, -1])
def test_the_command_that_converts_refuses_ids_that_do_not_fit(tmp_path, odd):
    """They come behind those that are looked at to guess the width."""
    folder = with_bins(tmp_path, np.append(ids_like('text', wide_ids.LOOKED_AT), odd), 'int64')
    with pytest.raises(ValueError) as caught:
        Dataset(folder, block_size=8, batch_size=2)
    done = run_conversion(str(caught.value), folder / 'train.bin')
    assert done.returncode == 1 and done.stderr == 'error: an id is not from 0 to 65535\n'
    assert not (folder / 'train-uint16.bin').exists()


def test_right_ids_that_look_wide_are_read_once_meta_json_counts_them(tmp_path):
    """As the message says, which needs no bytes of text."""
    ids = np.where(np.arange(400) % 2, 0, np.arange(400))
    folder = with_bins(tmp_path, ids, 'uint16', {'dtype': 'uint16'})
    meta = json.loads((folder / 'meta.json').read_text())
    for split in ('train', 'val'):
        with pytest.raises(ValueError) as caught:
            Dataset(folder, block_size=8, batch_size=2)
        facts = re.search(
            f'put "splits": {{("{split}": {{.*}})}} into meta.json', str(caught.value)
        )[1]
        meta['splits'] = {**meta.get('splits', {}), **json.loads('{' + facts + '}')}
        (folder / 'meta.json').write_text(json.dumps(meta))
    data = Dataset(folder, block_size=8, batch_size=2)
    assert np.array_equal(data.first('train', 500), ids) and data.bits_per_byte('val', 1.0) is None


def chars_from(first):
    """nanoGPT's meta.pkl with a vocabulary of 65 characters that begins with this one."""
    return pickle.dumps({'itos': [first, *(chr(97 + i) for i in range(64))], 'vocab_size': 65})


@pytest.mark.parametrize('first', ['\n', ' ', ','])
def test_zeros_that_may_separate_characters_are_printed(tmp_path, capsys, first):
    """One character in each line, or int32 ids of a text without line ends: both are possible."""
    folder = with_bins(tmp_path, ids_like('without 0'), 'int32')
    (folder / 'meta.pkl').write_bytes(chars_from(first))
    Dataset(folder, block_size=8, batch_size=2)
    line = capsys.readouterr().out.splitlines()[0]
    assert line.startswith(
        f"{folder / 'train.bin'}: every second id is 0, which is {first!r}. If these are int32 ids"
    )
    run_conversion(line, folder / 'train.bin')
    run_conversion(line.replace('train', 'val'), folder / 'val.bin')
    data = Dataset(folder, block_size=8, batch_size=2)
    assert (
        np.array_equal(data.first('train', 5000), ids_like('without 0'))
        and not capsys.readouterr().out
    )


def test_zeros_that_separate_nothing_are_int32(tmp_path):
    """No text has the same letter as every second character."""
    folder = with_bins(tmp_path, ids_like('without 0'), 'int32')
    (folder / 'meta.pkl').write_bytes(chars_from('A'))
    with pytest.raises(ValueError, match='seems to hold int32 ids'):
        Dataset(folder, block_size=8, batch_size=2)


def test_a_shard_of_another_width_is_named(tmp_path):
    folder, ids = with_bins(tmp_path, ids_like('text'), 'uint16'), ids_like('text')
    (folder / 'train.bin').unlink()
    ids.astype('uint16').tofile(folder / 'train-00000.bin')
    ids.astype('int64').tofile(folder / 'train-00001.bin')
    with pytest.raises(ValueError, match=r'train-00001\.bin seems to hold int64 ids'):
        Dataset(folder, block_size=8, batch_size=2)


@pytest.mark.parametrize(
    'kind',
    ['text', 'lines of one character', '1, 0, 1, 0', 'zeros', 'mostly 0', 'short', 'without 0'],
)
def test_real_ids_are_not_taken_for_wider_ones(tmp_path, kind):
    """Also where 0 is frequent, as the line end is."""
    data = Dataset(with_bins(tmp_path, ids_like(kind), 'uint16'), block_size=8, batch_size=2)
    assert np.array_equal(data.first('train', 5000), ids_like(kind))


def test_a_meta_json_that_counts_the_tokens_is_believed(tmp_path):
    """As every one does that this project writes."""
    ids = np.where(np.arange(400) % 2, 0, np.arange(400))
    splits = {split: {'tokens': 400, 'bytes': 1} for split in ('train', 'val')}
    with pytest.raises(ValueError, match='int32'):
        Dataset(with_bins(tmp_path, ids, 'uint16', {'dtype': 'uint16'}), block_size=8, batch_size=2)
    Dataset(
        with_bins(tmp_path, ids, 'uint16', {'dtype': 'uint16', 'splits': splits}),
        block_size=8,
        batch_size=2,
    )


@pytest.mark.parametrize('dtype', ['float32', 'float64', '>u2', '>i8', 'uint8'])
def test_ids_of_another_kind_are_beyond_the_vocabulary(tmp_path, dtype):
    with pytest.raises(
        ValueError,
        match=r'train\.bin holds the id \d+, but its vocabulary has 65 entries; prepare it '
        'again, with ids written as uint16',
    ):
        Dataset(with_bins(tmp_path, ids_like('text'), dtype), block_size=8, batch_size=2)


# ---- a meta.pkl that can't be read ---------------------------------------------------------------


def test_a_hostile_meta_pkl_is_refused_and_not_executed(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'executed'),)

    content = pickle.dumps({'itos': {0: 'a'}, 'stoi': Hostile()})
    with pytest.raises(ValueError, match=r'meta\.pkl asks for .*mkdir'):
        Dataset(with_meta_pkl(tmp_path / 'data', content), block_size=4, batch_size=1)
    assert not (tmp_path / 'executed').exists()
    pickle.loads(content)
    assert (tmp_path / 'executed').exists()  # so it was a hostile one


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'not a pickle',
        pickle.dumps([]),
        pickle.dumps({'itos': 3}),
        pickle.dumps({'itos': {1: 'a'}}),
    ],
)
def test_a_meta_pkl_of_another_form_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r'meta\.pkl'):
        Dataset(with_meta_pkl(tmp_path, content), block_size=4, batch_size=1)


# ---- training batches ----------------------------------------------------------------------------


def write_ids(folder, train, val, vocab_size=1 << 20):
    """Make `folder` a dataset of these token ids."""
    folder.mkdir(exist_ok=True)
    for split, ids in (('train', train), ('val', val)):
        np.array(ids, np.uint32).tofile(folder / f'{split}.bin')
    (folder / 'meta.json').write_text(
        json.dumps({'tokenizer': None, 'vocab_size': vocab_size, 'dtype': 'uint32'})
    )
    return folder


@pytest.fixture
def positions(tmp_path):
    """A dataset in which every token is its own position: a window's first token tells where it
    lies."""
    return write_ids(tmp_path / 'positions', range(1003), range(203))


@pytest.mark.parametrize('n', [*range(1, 70), 255, 256, 257, 1000, 65_537, 1_000_003])
def test_permute_is_a_permutation(n):
    keys = np.random.SeedSequence(n).generate_state(4, np.uint64)
    order = permute(np.arange(n), n, keys)
    assert np.array_equal(np.sort(order), np.arange(n))
    if n > 20:
        assert np.mean(np.diff(order) == 1) < 0.2  # and not nearly the identity


def test_permute_depends_on_its_keys():
    orders = {
        tuple(
            permute(np.arange(100), 100, np.random.SeedSequence(seed).generate_state(4, np.uint64))
        )
        for seed in range(50)
    }
    assert len(orders) == 50


def test_every_window_comes_once_per_epoch_in_a_new_order_from_a_new_offset(positions):
    data = Dataset(positions, block_size=8, batch_size=5)
    batches = [data.train_batch(step, 0) for step in range(6 * data.windows // 5 + 1)]
    starts = np.concatenate([idx[:, 0] for idx, _, _ in batches])
    epochs = [starts[i * data.windows : (i + 1) * data.windows] for i in range(6)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), epoch.min() + 8 * np.arange(data.windows))
        assert epoch.min() < 8 and epoch.max() + 8 < data.tokens['train']
    assert len({epoch.min() for epoch in epochs}) > 1
    assert len({tuple(epoch // 8) for epoch in epochs}) == 6


def test_targets_are_the_next_tokens(positions):
    idx, targets, share = Dataset(
        positions, block_size=8, batch_size=5, batches_per_step=2
    ).train_batch(3, 1)
    assert idx.shape == targets.shape == (5, 8) and idx.dtype == targets.dtype == np.int64
    assert np.array_equal(idx, idx[:, :1] + np.arange(8)) and np.array_equal(targets, idx + 1)
    assert share == 1 / 2


@pytest.mark.parametrize('kind', ['positions', 'random'])
def test_a_batch_is_a_function_of_seed_step_and_micro(positions, kind):
    def batch(seed, step, micro):  # each from a new object, so that nothing can be remembered
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

    for step in (0, 7, 20):  # 20 lies across the border of two epochs
        whole = global_batch(step, 12, 1)
        for batch_size, batches_per_step in ((6, 2), (4, 3), (1, 12)):
            assert np.array_equal(global_batch(step, batch_size, batches_per_step), whole)


# ---- evaluation batches --------------------------------------------------------------------------


@pytest.mark.parametrize('n', [2, 8, 9, 10, 64, 65, 66, 203])
@pytest.mark.parametrize('batch_size', [1, 4])
def test_a_whole_evaluation_predicts_every_token_but_the_first_once(tmp_path, n, batch_size):
    data = Dataset(
        write_ids(tmp_path / 'data', range(100), range(n)), block_size=8, batch_size=batch_size
    )
    batches = [data.eval_batch('val', i) for i in range(data.eval_batches('val'))]
    predicted = np.concatenate([targets[targets >= 0] for _, targets, _ in batches])
    assert np.array_equal(predicted, np.arange(1, n))
    for idx, targets, valid in batches:
        assert idx.shape == targets.shape == (batch_size, 8) and valid == (targets >= 0).sum() > 0
        assert np.array_equal(idx[targets >= 0] + 1, targets[targets >= 0])


def test_a_limited_evaluation_takes_fixed_windows_spread_evenly(positions):
    data = Dataset(positions, block_size=4, batch_size=3)
    assert data.eval_batches('train', limit=5) == 5 and data.eval_batches(
        'val', limit=1000
    ) == data.eval_batches('val')
    starts = np.concatenate([data.eval_batch('train', i, limit=5)[0][:, 0] for i in range(5)])
    gaps = np.diff([*starts, data.tokens['train']])
    assert starts[0] == 0 and gaps.min() >= (even := 1003 / 15) - 4 and gaps.max() <= even + 4

    other_seed = Dataset(positions, 4, 3, seed=7)
    other_seed.train_batch(3, 0)
    assert np.array_equal(
        other_seed.eval_batch('train', 2, limit=5)[0], data.eval_batch('train', 2, limit=5)[0]
    )


def test_bits_per_byte(tmp_path):
    # é is two bytes
    write_bins(tmp_path, CharTokenizer.of('aé'), {'train': ['aéa'], 'val': ['éé']})
    data = Dataset(tmp_path, block_size=1, batch_size=1)
    assert data.bits_per_byte('val', np.log(2)) == pytest.approx(1 / 2)
    assert data.bits_per_byte('train', np.log(2)) == pytest.approx(3 / 4)


# ---- what can be wrong with a dataset ------------------------------------------------------------


@pytest.mark.parametrize(
    'train, val, message',
    [
        ([], [1, 2, 3], r'train\.bin holds 0 token'),
        ([1] * 20, [1], r'val\.bin holds 1 token'),
        ([1] * 8, [1, 2], 'block_size=8 is larger than the train split'),
        ([1] * 19 + [100], [1, 2], r'train\.bin holds the id 100, but its vocabulary has 100'),
        ([1] * 20, [1, 2, 101], r'val\.bin holds the id 101'),
    ],
)
def test_bins_that_cannot_be_used_are_named(tmp_path, train, val, message):
    with pytest.raises(ValueError, match=message):
        Dataset(write_ids(tmp_path, train, val, vocab_size=100), block_size=8, batch_size=2)


def test_ids_beyond_the_vocabulary_are_found_when_a_bin_is_too_large_to_search(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(dataset, 'SCAN_LIMIT', 10)
    data = Dataset(
        write_ids(tmp_path, [100] * 20, [1, 2], vocab_size=100), block_size=8, batch_size=2
    )
    with pytest.raises(ValueError, match=r'train\.bin holds the id 100'):
        data.train_batch(0, 0)


@pytest.mark.parametrize('missing', ['train', 'val'])
def test_missing_bins_are_named_with_what_to_do(text_folder, tmp_path, missing):
    there = {'train': 'val', 'val': 'train'}[missing]
    for name in (f'{there}.bin', 'meta.json'):
        (tmp_path / name).write_bytes((text_folder / name).read_bytes())
    with pytest.raises(
        FileNotFoundError, match=rf'{missing}\.bin is missing: dataset= takes a folder'
    ):
        Dataset(tmp_path, block_size=8, batch_size=2)
    (tmp_path / 'prepare.py').touch()
    with pytest.raises(
        FileNotFoundError, match=rf'{missing}\.bin is missing: run `python .*prepare\.py`'
    ):
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
    os.truncate(tmp_path / 'train.bin', 1 << 30)  # zeros that take no space
    program = f"""if True:
        import os
        from text.dataset import Dataset
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
