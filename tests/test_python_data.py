"""data/python, on a small environment made up for it, and the cut vocabulary that it can be written
with.

What encodes joins in where TIKTOKEN_CACHE_DIR has GPT-2's vocabulary.
"""

import hashlib
import itertools
import json
import os
import random
import runpy
import sys
import sysconfig

import numpy as np
import pytest
from support.datasets import assert_meta_is_true, bin_of, contents
from support.needs import needs_gpt2
from support.ready_sets import copied, definitions
from support.scripts import ROOT, run

from text.dataset import Dataset
from text.tokenizer import TiktokenTokenizer, check_description, load

SIZE = 8192
AWKWARD = (
    "'<|endoftext|>' as text, ünï 🎉 日本語\n\n\n    # \t  trailing \n" + 'ab' * 300 + ' ' * 300
)
SMALL = [f'number = {i}\n' for i in range(400)]


@pytest.fixture
def roots(tmp_path):
    """The standard library and the packages of an environment, many of their files not for the
    corpus."""

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    for i, text in enumerate(SMALL):
        write(f'lib/{"many" if i % 2 else "more"}/{i:03d}.py', text.encode())
    write('lib/awkward.py', AWKWARD.encode())
    write('lib/copy_of_7.py', SMALL[7].encode())
    write('packages/one/copy_of_awkward.py', AWKWARD.encode())
    write('packages/one/copy_by_windows.py', SMALL[9].replace('\n', '\r\n').encode())
    write('packages/one/windows.py', b'x = 1\r\ny = 2\r\n')
    write('packages/one/largest.py', b'#' * 1_000_000)
    write('packages/one/too_large.py', b'##' * 500_001)
    write('packages/one/latin.py', 'ü = 1\n'.encode('latin-1'))
    write('packages/one/empty.py', b'')
    write('packages/one/data.txt', b'not Python')
    write('packages/one/folder.py/inside.py', b'in_a_folder_with_a_name_like_a_file = True\n')
    write('lib/site-packages/other.py', b'of_another_environment = True\n')
    write('elsewhere/other.py', b'elsewhere = True\n')
    (tmp_path / 'packages/one/link.py').symlink_to(tmp_path / 'elsewhere/other.py')
    (tmp_path / 'packages/one/link').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'packages/one/dangling.py').symlink_to(tmp_path / 'nowhere.py')
    (tmp_path / 'packages64').symlink_to(tmp_path / 'packages')  # as lib64 often is
    return {
        'stdlib': tmp_path / 'lib',
        'purelib': tmp_path / 'packages',
        'platlib': tmp_path / 'packages64',
    }


# What the corpus of `roots` is, in its order. 7 and 9 stand where the first of their copies stands.
CORPUS = [
    AWKWARD,
    SMALL[7],
    *(text for i, text in enumerate(SMALL) if i % 2 and i != 7),
    *SMALL[::2],
    'in_a_folder_with_a_name_like_a_file = True\n',
    '#' * 1_000_000,
    'x = 1\ny = 2\n',
]


def split_of(text):
    return (
        'val'
        if int(hashlib.sha256(f'1337/{text}'.encode()).hexdigest(), 16) % 100 == 0
        else 'train'
    )


def test_each_text_of_the_environment_is_taken_once(roots):
    files = definitions('python')['Files'](roots.values())
    assert [text for piece in files.pieces() for _, text in files.read(piece)] == CORPUS


def test_a_text_s_split_depends_on_nothing_else(roots):
    files = definitions('python')['Files'](roots.values())
    splits = {text: split for split, text in files.read(files.paths)}
    assert splits == {text: split for split, text in files.read(reversed(files.paths))}
    assert splits == {text: split_of(text) for text in CORPUS}
    assert 1 <= list(splits.values()).count('val') <= 12  # of 403, one in a hundred


@needs_gpt2
def test_the_bins_are_plain_encodings_for_any_number_of_processes(roots, tmp_path):
    # The scripts' processes find this environment where sitecustomize.py, which Python runs as it
    # starts, says so.
    (tmp_path / 'sitecustomize.py').write_text(f"""if True:
        import sysconfig
        roots, get_path = { ({key: str(path) for key, path in roots.items()}) }, sysconfig.get_path
        sysconfig.get_path = lambda name, *args, **kwargs: roots.get(name) or get_path(name, *args, **kwargs)""")
    bins = []
    for num_proc in (1, 2):
        script = copied('python', tmp_path / f'by {num_proc}')
        done = run(
            script,
            f'--vocab_size={SIZE}',
            f'--num_proc={num_proc}',
            env={'PYTHONPATH': f'{ROOT}{os.pathsep}{tmp_path}', 'PYTHONHASHSEED': str(num_proc)},
        )
        assert done.returncode == 0, done.stderr
        assert f'{len(CORPUS)} files, sha256 ' in done.stdout
        bins.append(contents(script.parent))
    assert bins[0] == bins[1] and not (script.parent / '.preparing').exists()

    ranks = first_ranks(SIZE)
    for split in ('train', 'val'):
        texts = [text for text in CORPUS if split_of(text) == split]
        documents = np.split(
            ids := bin_of(script.parent, split), np.flatnonzero(ids == SIZE - 1) + 1
        )
        # the end of text stands after the last
        assert len(documents.pop()) == 0 and len(documents) == len(texts)
        for text, document in zip(texts, documents):
            if len(text) < 10_000:  # the plain encoding is slow
                assert document.tolist() == [*plain_encoding(text, ranks), SIZE - 1]
        assert load({'kind': 'tiktoken', 'name': 'gpt2', 'size': SIZE}).decode(
            ids
        ) == '<|endoftext|>'.join([*texts, ''])
    assert_meta_is_true(
        script.parent,
        {
            split: ''.join(text for text in CORPUS if split_of(text) == split)
            for split in ('train', 'val')
        },
    )
    data = Dataset(script.parent, block_size=8, batch_size=2)
    assert data.vocab_size == SIZE and load(data.tokenizer).vocab_size == SIZE


@needs_gpt2
@pytest.mark.parametrize('size', [0, 256, 50258])
def test_a_vocabulary_that_cannot_be_cut_so_is_one_line(roots, tmp_path, monkeypatch, capsys, size):
    monkeypatch.setattr(sysconfig, 'get_path', roots.get)
    monkeypatch.setattr(sys, 'argv', ['prepare.py', f'--vocab_size={size}'])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(copied('python', tmp_path)), run_name='__main__')
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count('\n') == 1
    assert (
        error.startswith(f'error: {size} entries') and 'between 257' in error and '50257' in error
    )
    assert [path.name for path in (tmp_path / 'data/python').iterdir()] == ['prepare.py']


# ---- the cut vocabulary --------------------------------------------------------------------------


def first_ranks(size):
    """{bytes: id} of the first size - 1 entries of GPT-2."""
    import tiktoken

    gpt2 = tiktoken.get_encoding('gpt2')
    return {gpt2.decode_single_token_bytes(i): i for i in range(size - 1)}


def merged(piece, ranks):
    """The ids of a piece of text (bytes): again and again the pair of the lowest rank, the leftmost
    first."""
    parts = [bytes([byte]) for byte in piece]
    while True:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        if min(pairs, default=len(ranks)) == len(ranks):
            return [ranks[part] for part in parts]
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def plain_encoding(text, ranks):
    """Byte-pair encoding as GPT-2's paper has it, with nothing done for speed."""
    import regex  # tiktoken needs it too

    pieces = regex.findall(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", text
    )
    return [i for piece in pieces for i in merged(piece.encode(), ranks)]


@needs_gpt2
def test_gpt2s_entries_are_the_bytes_and_then_what_those_before_make():
    ranks = first_ranks(SIZE)
    assert sorted(list(ranks)[:256]) == [bytes([byte]) for byte in range(256)]
    assert all(merged(entry, ranks) == [rank] for entry, rank in ranks.items())


@needs_gpt2
@pytest.mark.parametrize('size', [257, 258, 1000, SIZE, 50256, 50257])
def test_a_cut_vocabulary_is_the_byte_pair_encoding_of_its_entries(size):
    tokenizer, ranks = TiktokenTokenizer('gpt2', size), first_ranks(size)
    signs = ''.join(
        map(chr, random.Random(size).sample([*range(0xD800), *range(0xE000, 0x110000)], 300))
    )
    for text in (AWKWARD, signs, json.decoder.JSONDecoder.__doc__ * 2, ''):
        ids = tokenizer.encode_ordinary(text).tolist()
        assert ids == plain_encoding(text, ranks)
        assert tokenizer.decode(ids) == text and tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.vocab_size == size and tokenizer.eot == size - 1
    assert tokenizer.encode('a<|endoftext|>') == [ranks[b'a'], size - 1]
    assert tokenizer.decode([ranks[b'a'], size - 1]) == 'a<|endoftext|>'


@needs_gpt2
def test_a_description_says_the_size_only_where_it_is_cut():
    whole, cut = (
        {'kind': 'tiktoken', 'name': 'gpt2'},
        {'size': SIZE, 'name': 'gpt2', 'kind': 'tiktoken'},
    )
    assert load(cut).describe() == cut and load(cut).vocab_size == SIZE
    assert load(whole).describe() == load({**whole, 'size': 50257}).describe() == whole
    with pytest.raises(ValueError, match="50258 entries of 'gpt2'"):
        load({**whole, 'size': 50258})


@pytest.mark.parametrize('size', [256, 0, -1, True, 8192.0, '8192', None, [8192]])
def test_a_description_with_a_senseless_size_is_refused(size):
    with pytest.raises(
        ValueError, match='a tiktoken tokenizer of the size .* whole number from 257 on'
    ):
        check_description({'kind': 'tiktoken', 'name': 'gpt2', 'size': size})
