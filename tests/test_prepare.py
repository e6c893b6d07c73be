"""data/prepare.py: from any text to bins. What must come out is computed here in the plainest way,
from whole documents."""

import csv
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import time
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support.needs import MIRROR, needs, needs_gpt2, needs_shakespeare
from support.preparing import COMMAND, failure, interrupt_at, prepare
from support.scripts import ROOT
from support.servers import COMMIT

from system import files
from text import folders, journal, sources
from text.dataset import Dataset
from text.documents import Part, Remark
from text.sources import conversion, cutting
from text.sources.hub_dataset import is_wanted
from text.tokenizer import load

DOCUMENTS = [
    f"Document {i}: {'ü€🎉 ' * (i % 4)}\n{'line ' * (1 + i * 7 % 50)}\r\nend {i % 90}"
    for i in range(100)
]


def contents(folder):
    """{name: bytes} of everything in a folder, but for the lock, which stays."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob('*')
        if path.is_file() and path.name != '.lock'
    }


def split_of(document, shares=('0.9', '0.1'), seed=1337):
    """The split of a document, a text or the digest of a large one's first part."""
    content = document if isinstance(document, bytes) else document.encode()
    number = Fraction(int.from_bytes(hashlib.sha256(b'%d/' % seed + content).digest()[:8]), 2**64)
    for split, share in zip(('train', 'val', 'test'), map(Fraction, shares)):
        if number < share:
            return split
        number -= share


def expected(documents, shares=('0.9', '0.1'), seed=1337, end='\n'):
    """{split: bytes} of these documents by ByteTokenizer, `end` behind each that does not end with
    a newline."""
    found = dict.fromkeys(('train', 'val', 'test')[: len(shares)], b'')
    for document in documents:
        found[split_of(document, shares, seed)] += (
            document + end * (not document.endswith('\n') or end != '\n')
        ).encode()
    return found


def decoded(folder, suffix='.bin'):
    """{split: bytes} of the bins that ByteTokenizer wrote, in shards or not."""
    meta = json.loads((folder / 'meta.json').read_text())
    found = {}
    for split, facts in meta['splits'].items():
        paths = sorted(folder.glob(f'{split}*{suffix}'))
        raw = b''.join(path.read_bytes() for path in paths)
        tokens = np.frombuffer(raw, meta['dtype'] if suffix == '.bin' else 'u1')
        assert len(tokens) == facts['tokens']
        assert suffix != '.bin' or hashlib.sha256(raw).hexdigest() == facts['sha256']
        found[split] = bytes(tokens.astype('u1'))
    return found


def write_rows(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    return path


# ---- one text alone ------------------------------------------------------------------------------


@needs_shakespeare
@needs_gpt2
@pytest.mark.parametrize(
    'tokenizer, tokens', [('gpt2', (301_966, 36_059)), ('char', (1_003_854, 111_540))]
)
def test_shakespeare_is_what_the_ready_sets_make_of_it(tmp_path, tokenizer, tokens):
    path = MIRROR / 'shakespeare/input.txt'
    prepare(tmp_path, path, f'--tokenizer={tokenizer}')
    text = path.read_text(encoding='utf-8')
    cut, own = (
        int(0.9 * len(text)),
        load(json.loads((tmp_path / 'meta.json').read_text())['tokenizer']),
    )
    for split, part, n in (('train', text[:cut], tokens[0]), ('val', text[cut:], tokens[1])):
        ids = np.fromfile(tmp_path / f'{split}.bin', np.uint16)
        assert len(ids) == n and np.array_equal(ids, own.encode(part))


@pytest.mark.parametrize('shares', ['0.9,0.1', '0.8,0.1,0.1', '0.5,0.5'])
@pytest.mark.parametrize(
    'text',
    ['0123456789' * 3, 'é€🎉x\r\n' * 1000, ' ' * 2000, '\ufeff' + 'ab ' * 99],
    ids=['short', 'several pieces', 'no place to cut', 'byte order mark'],
)
def test_one_text_is_divided_at_a_character(tmp_path, small_pieces, text, shares):
    (tmp_path / 'text.txt').write_text(text, encoding='utf-8', newline='')
    prepare(tmp_path / 'out', tmp_path / 'text.txt', '--tokenizer=byte', f'--split={shares}')
    text = text.removeprefix('\ufeff')
    cuts = [
        0,
        *(
            int(sum(map(Fraction, shares.split(',')[: i + 1])) * len(text))
            for i in range(shares.count(',') + 1)
        ),
    ]
    assert list(decoded(tmp_path / 'out').values()) == [
        text[a:b].encode() for a, b in pairwise(cuts)
    ]


@needs_gpt2
@pytest.mark.parametrize('pattern', ['gpt2', 'cl100k_base', 'o200k_base'])
def test_a_text_encoded_in_parts_has_the_ids_of_the_whole(small_pieces, pattern):
    import tiktoken
    import tiktoken_ext.openai_public as public

    own = tiktoken.get_encoding('gpt2')
    # its way to split text into words, with GPT-2's vocabulary, which is at hand
    if pattern != 'gpt2':
        found = {}
        public.load_tiktoken_bpe, before = (
            lambda *args, **kwargs: own._mergeable_ranks,
            public.load_tiktoken_bpe,
        )
        try:
            found = getattr(public, pattern)()
        finally:
            public.load_tiktoken_bpe = before
        own = tiktoken.Encoding(
            pattern,
            pat_str=found['pat_str'],
            mergeable_ranks=own._mergeable_ranks,
            special_tokens={},
        )
    rng = random.Random(1)
    signs = [
        '\n',
        '\n\n',
        '\r\n',
        ' ',
        '  ',
        '\u3000',
        '\xa0',
        '/',
        '.',
        "'s",
        '漢字',
        'Word',
        'x9',
        '\t',
        '!\n/',
        '\n ',
        'é',
        '\x1c',
    ]
    texts = [
        Path(ROOT / 'text/sources/source.py').read_text(),
        'no line end ' * 999,
        ''.join(rng.choices(signs, k=9000)),
    ]
    for text in texts:
        data, parts = text.encode(), []
        while data:
            n = cutting.safe_end(data[:1024]) if len(data) > 1024 else len(data)
            parts.append(data[:n].decode())
            data = data[n:]
        assert len(parts) > 5
        assert [i for part in parts for i in own.encode_ordinary(part)] == own.encode_ordinary(text)


# ---- documents -----------------------------------------------------------------------------------


def as_jsonl(folder):
    write_rows(folder / 'rows.jsonl', [{'n': 1, 'text': text} for text in DOCUMENTS])
    return [folder / 'rows.jsonl']


def as_packed(suffix):
    def write(folder):
        content = as_jsonl(folder)[0].read_bytes()
        if suffix == '.gz':
            packed = gzip.compress(content[:2000]) + gzip.compress(content[2000:])
        else:
            zstandard = pytest.importorskip('zstandard')
            packed = b''.join(
                zstandard.ZstdCompressor().compress(part)
                for part in (content[:2000], content[2000:])
            )
        (folder / f'packed.jsonl{suffix}').write_bytes(packed)
        return [folder / f'packed.jsonl{suffix}']

    return write


def as_parquet(folder):
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    parquet.write_table(
        pyarrow.table({'n': range(100), 'a': [{'b': text} for text in DOCUMENTS]}),
        folder / 'rows.parquet',
        row_group_size=30,
    )
    return [folder / 'rows.parquet', '--field=a.b']


def as_folder(folder):
    for i, text in enumerate(DOCUMENTS):
        path = folder / 'texts' / f'{i // 10}' / f'{i:02d}.{("md", "py", "unknown")[i % 3]}'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8', newline='')
    (folder / 'texts/.hidden').write_text('not this')
    (folder / 'texts/5/empty.txt').touch()
    (folder / 'texts/5/picture.png').write_bytes(b'\x89PNG\0\0')
    return [folder / 'texts']


def as_glob(folder):
    as_folder(folder)
    return [folder / 'texts/**/*']


def as_paragraphs(folder):
    (folder / 'a.txt').write_text('\n \n'.join([*DOCUMENTS[:40], '']), encoding='utf-8', newline='')
    (folder / 'b.txt').write_text(
        '\r\n\r\n\n' + '\n\n\n'.join(DOCUMENTS[40:]), encoding='utf-8', newline=''
    )
    return [folder / 'a.txt', folder / 'b.txt', '--document=paragraph']


KINDS = {
    'jsonl': as_jsonl,
    'gz': as_packed('.gz'),
    'zst': as_packed('.zst'),
    'parquet': as_parquet,
    'folder': as_folder,
    'glob': as_glob,
    'paragraphs': as_paragraphs,
}


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_of_source_gives_its_documents(tmp_path, small_pieces, capsys, kind):
    prepare(
        tmp_path / 'out',
        *KINDS[kind](tmp_path),
        '--tokenizer=byte',
        '--split=0.7,0.2,0.1',
        '--seed=5',
    )
    assert decoded(tmp_path / 'out') == expected(DOCUMENTS, ('0.7', '0.2', '0.1'), 5)
    said = capsys.readouterr().out
    assert ('1 of 102 files left out' in said and 'picture.png' in said) == (
        kind in ('folder', 'glob')
    )
    assert (
        'shards'
        not in (meta := json.loads((tmp_path / 'out/meta.json').read_text()))['splits']['train']
    )
    assert sum(facts['documents'] for facts in meta['splits'].values()) == 100
    assert sorted(contents(tmp_path / 'out')) == ['meta.json', 'test.bin', 'train.bin', 'val.bin']
    assert Dataset(tmp_path / 'out', 8, 2).vocab_size == 256


@pytest.mark.parametrize(
    'options, end', [([], '\n'), (['--separator=<|>'], '<|>'), (['--separator='], '')]
)
def test_lines_and_what_stands_behind_them(tmp_path, small_pieces, options, end):
    lines = [f'name {i}' for i in range(500)]
    (tmp_path / 'names.txt').write_text('\n'.join(lines) + '\r\n\n', newline='')
    prepare(
        tmp_path / 'out', tmp_path / 'names.txt', '--tokenizer=char', '--document=line', *options
    )
    own = load(json.loads((tmp_path / 'out/meta.json').read_text())['tokenizer'])
    assert own.describe()['chars'] == ''.join(sorted(set(''.join(lines) + end)))
    texts = {
        s: own.decode(np.fromfile(tmp_path / f'out/{s}.bin', np.uint16)).encode()
        for s in ('train', 'val')
    }
    assert texts == expected(lines, end=end)


@needs_gpt2
def test_the_end_of_text_stands_behind_each_document_and_never_comes_from_its_text(tmp_path):
    texts = [f'<|endoftext|> is text here: {i}' for i in range(40)]
    write_rows(tmp_path / 'rows.jsonl', [{'text': text} for text in texts])
    prepare(tmp_path / 'out', tmp_path / 'rows.jsonl')
    meta, own = (
        json.loads((tmp_path / 'out/meta.json').read_text()),
        load({'kind': 'tiktoken', 'name': 'gpt2'}),
    )
    assert meta['eot'] == own.eot
    for split in ('train', 'val'):
        ids, of = (
            np.fromfile(tmp_path / f'out/{split}.bin', np.uint16),
            [t for t in texts if split_of(t) == split],
        )
        assert ids.tolist() == [i for text in of for i in [*own.encode_ordinary(text), own.eot]]
        assert meta['splits'][split]['bytes'] == sum(map(len, of))


@pytest.mark.parametrize('document', ['paragraph', 'line'])
def test_documents_do_not_depend_on_where_a_text_is_read_in_pieces(tmp_path, monkeypatch, document):
    rng = random.Random(document)
    text = (
        ''.join(rng.choices(['\n', '\r\n', ' ', '\t', 'a', '\n\n', 'word', 'é'], k=2000)).strip()
        + '\n'
    )
    (tmp_path / 'text.txt').write_text(text, encoding='utf-8', newline='')
    lines, documents = [line.removesuffix('\r') for line in text.split('\n')], ['']
    if document == 'paragraph':
        for line in text.split('\n'):
            documents = (
                [*documents[:-1], documents[-1] + line + '\n'] if line.strip() else [*documents, '']
            )
        lines = [paragraph.rstrip() for paragraph in documents]
    for size in range(20, 60):
        monkeypatch.setattr(cutting, 'PIECE', size)
        source = sources.open([tmp_path / 'text.txt'], document=document)
        assert [text for piece in source.pieces() for _, text in source.read(piece)] == [
            x for x in lines if x.strip()
        ]


@pytest.mark.parametrize('document', ['file', 'paragraph', 'line'])
def test_a_large_document_goes_to_one_split_in_parts(tmp_path, small_pieces, document):
    filler = {'file': ' word\nmore', 'paragraph': ' word\nmore', 'line': ' word more'}[document]
    large = [f'{i}{filler * 400}' for i in range(12)]
    if document == 'file':
        for i, text in enumerate(large):
            (tmp_path / f'{i:02d}.txt').write_text(text)
    else:
        (tmp_path / 'all.txt').write_text(('\n\n' if document == 'paragraph' else '\n').join(large))
    prepare(
        tmp_path / 'out',
        tmp_path / '*.txt',
        '--tokenizer=byte',
        f'--document={document}',
        '--split=0.5,0.5',
    )
    keys = {
        text: hashlib.sha256(text.encode()[: cutting.safe_end(text.encode()[:1024])]).digest()[:16]
        for text in large
    }
    found = dict.fromkeys(('train', 'val'), b'')
    for text in large:
        found[split_of(keys[text], ('0.5', '0.5'))] += text.encode() + b'\n'
    assert decoded(tmp_path / 'out') == found and all(found.values())


def test_copies_are_dropped_and_stay_on_one_side_without_that(tmp_path, small_pieces, capsys):
    rows = write_rows(
        tmp_path / 'rows.jsonl', [{'text': text} for text in DOCUMENTS[:60] + DOCUMENTS[20:]]
    )
    for options, documents in (([], DOCUMENTS[:60] + DOCUMENTS[20:]), (['--dedup'], DOCUMENTS)):
        prepare(tmp_path / 'out', rows, '--tokenizer=byte', *options)
        assert decoded(tmp_path / 'out') == expected(documents)
        assert ('40 duplicate(s) dropped' in capsys.readouterr().out) == bool(options)


def test_standard_input(tmp_path, small_pieces, monkeypatch):
    class Input:
        buffer = None

    for options, content, documents in (
        ([], 'a b\n' * 500, None),
        (['--field=t'], ''.join(json.dumps({'t': text}) + '\n' for text in DOCUMENTS), DOCUMENTS),
    ):
        Input.buffer = io.BytesIO(content.encode())
        monkeypatch.setattr(sys, 'stdin', Input)
        prepare(tmp_path, '-', '--tokenizer=char', *options)
        own = load(json.loads((tmp_path / 'meta.json').read_text())['tokenizer'])
        texts = {
            s: own.decode(np.fromfile(tmp_path / f'{s}.bin', np.uint16)).encode()
            for s in ('train', 'val')
        }
        divided = {'train': content[:1800].encode(), 'val': content[1800:].encode()}
        assert texts == (expected(documents) if documents else divided)


def test_a_new_text_s_folder_can_be_where_the_bins_go(tmp_path, small_pieces):
    as_folder(tmp_path)
    for _ in range(2):  # the second time there are bins beside the texts
        prepare(tmp_path / 'texts', tmp_path / 'texts', '--tokenizer=byte')
        assert decoded(tmp_path / 'texts') == expected(DOCUMENTS)


# ---- documents between separators ----------------------------------------------------------------

MARK = '<|endoftext|>'


def documents_of(folder, words, **options):
    """The documents that a source has, those in Parts put together."""
    source = sources.open(words, folder=folder / 'out', **options)
    found, parts = [], []
    for piece in source.pieces():
        for _, document in source.read(piece):
            if isinstance(document, Remark):
                continue
            if isinstance(document, Part):
                parts.append(document.text)
                if document.is_last:
                    found.append(''.join(parts))
                    parts = []
            else:
                assert not parts
                found.append(document)
    return found


def test_documents_stand_between_separators_and_line_ends_around_these_belong_to_none(tmp_path):
    text = f'first\n\nstory\n{MARK}\n\n  second\r\n{MARK}{MARK}third {MARK} fourth\n'
    (tmp_path / 'a.txt').write_text(text, newline='')
    (tmp_path / 'b.txt').write_text('a file ends a document')
    found = documents_of(tmp_path, [tmp_path / 'a.txt', tmp_path / 'b.txt'], document=MARK)
    assert found == ['first\n\nstory', '  second', 'third ', ' fourth', 'a file ends a document']


def test_a_line_end_in_a_separator_is_cr_lf_too(tmp_path):
    (tmp_path / 'a.txt').write_text('a --- b\n---\nc\r\n---\r\nd', newline='')
    assert documents_of(tmp_path, [tmp_path / 'a.txt'], document='\n---\n') == ['a --- b', 'c', 'd']


@pytest.mark.parametrize('separator', [MARK, '\n---\n', '\n', 'é'])
@pytest.mark.parametrize('large', [1 << 22, 200], ids=['whole', 'in parts'])
def test_separators_are_found_wherever_a_text_is_read_in_pieces(
    tmp_path, monkeypatch, separator, large
):
    """Among these sizes of pieces are some whose borders cut a separator."""
    rng = random.Random(separator)
    words = ['\n', '\r\n', ' ', 'a', '---', '<|', 'word', 'é', 'some words', separator, separator]
    text = ''.join(rng.choices(words, k=700)) + 'long words ' * 150
    (tmp_path / 'text.txt').write_text(text, encoding='utf-8', newline='')
    wanted = re.split(re.escape(separator).replace('\\\n', '\r?\n'), text)
    wanted = [document.strip('\r\n') for document in wanted if document.strip()]
    monkeypatch.setattr(cutting, 'LARGE', large)
    for size in range(20, 60):
        monkeypatch.setattr(cutting, 'PIECE', size)
        assert documents_of(tmp_path, [tmp_path / 'text.txt'], document=separator) == wanted


@pytest.mark.parametrize('line_end', ['', '\n', '\r\n'])
def test_a_separator_where_a_large_document_is_cut_is_found(tmp_path, monkeypatch, line_end):
    """The last byte that fits into a part is any of those of the separator and around it."""
    large = 300
    monkeypatch.setattr(cutting, 'LARGE', large)
    for n in range(large - 30, large + 20):
        document = ('word ' * large)[: n - 1] + '.'
        text = f'{document}{line_end}{MARK}{line_end}{document}{line_end}{MARK}the end'
        (tmp_path / 'text.txt').write_text(text, newline='')
        for size in (20, 33, large):
            monkeypatch.setattr(cutting, 'PIECE', size)
            found = documents_of(tmp_path, [tmp_path / 'text.txt'], document=MARK)
            assert found == [document, document, 'the end']


def test_the_bins_do_not_depend_on_where_a_text_is_read_in_pieces(tmp_path, monkeypatch):
    large = 'a line of a long story\n' * 30
    text = f'\n{MARK}\n'.join(f'{i} {large if i % 9 == 0 else "short"}' for i in range(80))
    (tmp_path / 'text.txt').write_text(text)
    monkeypatch.setattr(cutting, 'LARGE', 256)
    found = []
    for size in (20, 33, 256):
        monkeypatch.setattr(cutting, 'PIECE', size)
        words = [tmp_path / 'out', tmp_path / 'text.txt', f'--document={MARK}', '--tokenizer=byte']
        prepare(*words)
        found.append(contents(tmp_path / 'out'))
    assert found[0] == found[1] == found[2]


def test_escapes_in_a_separator(tmp_path, capsys):
    (tmp_path / 'text.txt').write_text('---\n'.join(f'{i}\n' for i in range(40)) + '\\newpage\n41')
    words = [tmp_path / 'out', tmp_path / 'text.txt', '--tokenizer=byte']
    prepare(*words, r'--document=\n---\n', r'--separator=\t')
    assert decoded(tmp_path / 'out') == expected(
        [*map(str, range(39)), '39\n\\newpage\n41'], end='\t'
    )
    prepare(*words, r'--document=\\newpage', '--split=0.5,0.5', '--seed=4')
    assert sum(text.count(b'41') for text in decoded(tmp_path / 'out').values()) == 1
    assert 'notice: ' not in capsys.readouterr().out


def test_a_separator_that_is_nowhere_is_one_line(tmp_path, capsys):
    for i in range(40):
        (tmp_path / f'{i}.txt').write_text(f'text {i}')
    prepare(tmp_path / 'out', tmp_path / '*.txt', '--tokenizer=byte', r'--document=\n---\n')
    said = capsys.readouterr().out
    assert said.count('notice: ') == 1
    assert (
        r"notice: the separator --document='\n---\n' is nowhere in the sources: each file is "
        "one document"
    ) in said


# ---- special tokens ------------------------------------------------------------------------------


@needs_gpt2
def test_marks_that_separate_documents_get_the_ids_that_sample_py_reads(tmp_path):
    text = ''.join(f'story {i}, which ends here.{MARK}' for i in range(50))
    (tmp_path / 'text.txt').write_text(text)
    (tmp_path / 'val.txt').write_text(text[:200])
    val = f"--val={tmp_path / 'val.txt'}"
    prepare(tmp_path / 'out', tmp_path / 'text.txt', f'--document={MARK}', val)
    own = load(json.loads((tmp_path / 'out/meta.json').read_text())['tokenizer'])
    assert np.fromfile(tmp_path / 'out/train.bin', np.uint16).tolist() == own.encode(text)


@needs_gpt2
def test_special_tokens_in_a_text_are_told_once_whatever_the_number_of_processes(tmp_path, capsys):
    for name in ('a', 'b', 'c'):
        marks = '' if name == 'a' else f'A story.\n{MARK}\n' * 7
        (tmp_path / f'{name}.txt').write_text(marks + 'some words\n' * 110_000)
    for n in (1, 2):
        prepare(tmp_path / f'by {n}', tmp_path / '*.txt', f'--num_proc={n}', '--document=line')
        notices = re.findall('notice: .*', capsys.readouterr().out)
        assert notices == [
            "notice: special tokens of the tokenizer were encoded as ordinary text: '<|endoftext|>' "
            f"14 time(s), first in {tmp_path}/b.txt; --document='<|endoftext|>' divides a text there"
        ]
    assert contents(tmp_path / 'by 1') == contents(tmp_path / 'by 2')


@needs_gpt2
def test_special_tokens_are_counted_right_when_a_run_was_stopped(
    tmp_path, small_pieces, monkeypatch, capsys
):
    write_rows(tmp_path / 'rows.jsonl', [{'text': f'{i} {MARK} {MARK}'} for i in range(200)])
    words = [tmp_path / 'out', tmp_path / 'rows.jsonl']
    interrupt_at(monkeypatch, 5, 9)
    for _ in range(2):
        with pytest.raises(SystemExit):
            prepare(*words)
    assert 'notice: ' not in capsys.readouterr().out
    prepare(*words)
    notices = re.findall('notice: .*', capsys.readouterr().out)
    assert len(notices) == 1
    assert f"'{MARK}' 400 time(s), first in {tmp_path}/rows.jsonl, while" in notices[0]


@needs_gpt2
def test_there_is_no_notice_where_nothing_is_amiss(tmp_path, capsys):
    (tmp_path / 'text.txt').write_text(f'A story.\n{MARK}\n' * 60)
    rows = [{'q': f'what? {i}', 'a': 'that'} for i in range(60)]
    write_rows(tmp_path / 'rows.jsonl', rows)
    template = {'user': ['Q: ', '\n'], 'assistant': ['A: ', MARK]}  # there the mark is the token
    (tmp_path / 'template.json').write_text(json.dumps(template))
    (tmp_path / 'val.txt').write_text('Another story.')
    val = f"--val={tmp_path / 'val.txt'}"
    prepare(tmp_path / '1', tmp_path / 'text.txt', f'--document={MARK}', val)
    prepare(tmp_path / '2', tmp_path / 'text.txt', '--tokenizer=byte')  # has no special tokens
    prepare(
        tmp_path / '3',
        tmp_path / 'rows.jsonl',
        '--field=q,a',
        f"--template={tmp_path / 'template.json'}",
    )
    assert 'notice: ' not in capsys.readouterr().out


@needs_gpt2
def test_special_tokens_in_a_conversation_are_told_and_those_of_its_template_are_not(
    tmp_path, capsys
):
    template = {'user': [MARK, '\n'], 'assistant': ['A: ', '\nEND\n']}
    (tmp_path / 'template.json').write_text(json.dumps(template))
    rows = [{'q': f'what? {i}', 'a': MARK.removesuffix('>')} for i in range(60)]
    rows[7]['a'] = MARK
    words = [write_rows(tmp_path / 'rows.jsonl', rows), '--field=q,a']
    with pytest.raises(SystemExit):
        prepare(tmp_path / 'out', *words, f"--template={tmp_path / 'template.json'}")
    assert f"contains '{MARK}', which marks turns" in capsys.readouterr().err
    prepare(tmp_path / 'out', *words)
    assert f"'{MARK}' 1 time(s), first in {words[0]}, while sample.py" in capsys.readouterr().out


def test_marks_of_a_template_that_the_tokenizer_lacks_are_reported(tmp_path, capsys):
    marks = {'user': ['<|im_start|>user\n', '<|im_end|>\n'], 'assistant': ['A: ', '<|im_end|>\n']}
    (tmp_path / 'template.json').write_text(json.dumps(marks))
    rows = write_rows(
        tmp_path / 'rows.jsonl', [{'q': f'what? {i}', 'a': 'that'} for i in range(60)]
    )
    words = [rows, '--field=q,a', f"--template={tmp_path / 'template.json'}", '--tokenizer=byte']
    prepare(tmp_path / 'out', *words)
    assert (
        'notice: the tokenizer has no special tokens <|im_start|>, <|im_end|>, which the template '
        'writes: they were encoded as ordinary text\n'
    ) in capsys.readouterr().out


def test_that_nothing_divides_rows_is_said(tmp_path, capsys):
    rows = write_rows(tmp_path / 'rows.jsonl', [{'text': text} for text in DOCUMENTS])
    prepare(tmp_path / 'out', rows, '--document=line', '--tokenizer=byte')
    assert decoded(tmp_path / 'out') == expected(DOCUMENTS)
    assert "notice: --document='line' divides text files" in capsys.readouterr().out


# ---- tables --------------------------------------------------------------------------------------

ROWS = [{'n': str(i), 'text': f'row {i}, "quoted"\nand\tmore'} for i in range(40)]
ROWS[7]['text'] *= 10_000  # more than csv reads unless it is told to


def as_table(delimiter):
    content = io.StringIO(newline='')
    writer = csv.DictWriter(content, ['n', 'text'], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return content.getvalue().encode()


TABLES = {
    '.csv': as_table(','),
    '.tsv': as_table('\t'),
    '.json': json.dumps(ROWS, indent=1).encode(),
    'key.json': json.dumps({'KEY': ROWS}, indent=1).encode(),
}


@pytest.mark.parametrize('packed', ['', '.gz', '.zst'])
@pytest.mark.parametrize('kind', TABLES)
def test_a_table_is_refused_with_a_command_that_makes_rows_of_it(
    tmp_path, monkeypatch, capsys, kind, packed
):
    content = TABLES[kind]
    if packed == '.gz':
        content = gzip.compress(content)
    elif packed == '.zst':
        content = pytest.importorskip('zstandard').compress(content)
    monkeypatch.chdir(tmp_path)
    Path(f'a b{kind}{packed}').write_bytes(content)
    error = failure(capsys, './out', f'a b{kind}{packed}', '--tokenizer=byte')
    assert f'a b{kind}{packed} is ' in error and 'not text' in error and '--as_text' in error
    command = re.search('`(.*)`', error)[1]
    if not shutil.which('bash'):
        pytest.skip("there is no bash")
    here = {**os.environ, 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}
    subprocess.run(['bash', '-c', command], check=True, env=here)
    prepare('./out', shlex.split(command)[-1], '--tokenizer=byte')
    assert decoded(Path('out')) == expected([row['text'] for row in ROWS])


def test_the_command_that_converts_a_table_replaces_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path('a.csv').write_bytes(TABLES['.csv'])
    for name in ('a.jsonl', 'a-rows.jsonl', 'a-rows-2.jsonl'):
        assert f'> {name}` writes' in failure(capsys, './out', 'a.csv')
        Path(name).touch()


def test_rows_in_a_json_file_are_read_where_a_field_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(Path('rows.json'), [{'text': text} for text in DOCUMENTS])
    error = failure(capsys, './out', 'rows.json')
    assert 'rows.json holds a row on each line: --field=KEY' in error
    prepare('./out', 'rows.json', '--field=text', '--tokenizer=byte')
    assert decoded(Path('out')) == expected(DOCUMENTS)


@pytest.mark.parametrize('word', ['texts', 'texts/**/*'])
def test_tables_in_a_folder_are_not_lost_in_silence(tmp_path, monkeypatch, capsys, word):
    monkeypatch.chdir(tmp_path)
    as_folder(tmp_path)
    for name in ('1/x.csv', '2/x.json', '2/x.tsv.gz'):
        Path('texts', name).write_bytes(b'id,text\n1,one\n')
    error = failure(capsys, './out', word, '--tokenizer=byte')
    assert f'{word}: 3 of 105 files are .csv, .tsv or .json, not text' in error
    assert 'the first is texts/1/x.csv.' in error


def test_as_text_reads_a_table_as_it_is(tmp_path):
    for name in ('a.csv', 'b.json'):
        (tmp_path / name).write_bytes(TABLES[name[1:]])
    for name, option in (('a.csv', '--as_text'), ('b.json', '--as_text=True')):
        prepare(tmp_path / 'out', tmp_path / name, '--tokenizer=byte', option, '--dedup=False')
        assert b''.join(decoded(tmp_path / 'out').values()) == TABLES[name[1:]]


# ---- files of one's own for val and test ---------------------------------------------------------


def test_texts_for_each_split_become_these_splits_whole(tmp_path):
    texts = {'train': 'to train on, ü\n' * 40, 'val': 'some w\u00f6rds', 'test': 'a test\n'}
    for split, text in texts.items():
        (tmp_path / f'{split}.txt').write_text(text, encoding='utf-8')
    prepare(
        tmp_path / 'out',
        tmp_path / 'train.txt',
        f"--val={tmp_path / 'val.txt'}",
        '--test',
        tmp_path / 'test.txt',
        '--tokenizer=char',
    )
    meta = json.loads((tmp_path / 'out/meta.json').read_text())
    own = load(meta['tokenizer'])  # its characters are those of all splits
    assert own.describe()['chars'] == ''.join(sorted(set(''.join(texts.values()))))
    for split, text in texts.items():
        assert own.decode(np.fromfile(tmp_path / f'out/{split}.bin', np.uint16)) == text
        assert meta['splits'][split]['documents'] == 1


@pytest.mark.parametrize(
    'options, shares',
    [
        (['--val=val'], None),
        (['--val=val', '--test=test'], None),
        (['--test=test'], ('0.9', '0.1')),
        (['--test=test', '--split=0.5,0.5'], ('0.5', '0.5')),
    ],
)
def test_documents_of_files_for_val_and_test(tmp_path, small_pieces, monkeypatch, options, shares):
    monkeypatch.chdir(tmp_path)
    groups = {'train': DOCUMENTS[:60], 'val': DOCUMENTS[60:80], 'test': DOCUMENTS[70:]}
    for split, documents in groups.items():
        Path(split).mkdir()
        write_rows(Path(split, 'a.jsonl'), [{'text': text} for text in documents[:10]])
        write_rows(Path(split, 'b.jsonl'), [{'text': text} for text in documents[10:]])
    prepare('./out', 'train', *options, '--tokenizer=byte')
    wanted = {split: ''.join(f'{text}\n' for text in groups[split]).encode() for split in groups}
    if '--val=val' not in options:
        wanted |= expected(groups['train'], shares)
    if '--test=test' not in options:
        del wanted['test']
    assert decoded(Path('out')) == wanted


def test_of_copies_dedup_keeps_those_to_test_and_to_validate_on(tmp_path, small_pieces, capsys):
    words = []
    for split, some in (('train', DOCUMENTS), ('val', DOCUMENTS[:20]), ('test', DOCUMENTS[10:15])):
        words.append(write_rows(tmp_path / f'{split}.jsonl', [{'text': text} for text in some]))
    prepare(
        tmp_path / 'out',
        words[0],
        f'--val={words[1]}',
        f'--test={words[2]}',
        '--tokenizer=byte',
        '--dedup',
    )
    splits = json.loads((tmp_path / 'out/meta.json').read_text())['splits']
    assert [splits[split]['documents'] for split in ('train', 'val', 'test')] == [80, 15, 5]
    assert '25 duplicate(s) dropped' in capsys.readouterr().out


def test_a_file_of_the_sources_that_is_in_val_is_not_trained_on(tmp_path, capsys):
    as_folder(tmp_path)
    prepare(
        tmp_path / 'out', tmp_path / 'texts', f"--val={tmp_path / 'texts/3'}", '--tokenizer=byte'
    )
    splits = json.loads((tmp_path / 'out/meta.json').read_text())['splits']
    said = capsys.readouterr().out
    assert '10 file(s) of the sources are in val or test, and so not in train' in said
    assert (splits['train']['documents'], splits['val']['documents']) == (90, 10)


def test_max_bytes_leaves_val_whole(tmp_path, small_pieces):
    as_folder(tmp_path)
    prepare(
        tmp_path / 'out',
        tmp_path / 'texts',
        f"--val={tmp_path / 'texts/9'}",
        '--tokenizer=byte',
        '--max_bytes=500',
    )
    splits = json.loads((tmp_path / 'out/meta.json').read_text())['splits']
    assert splits['val']['documents'] == 10 and 1 < splits['train']['documents'] < 20


@needs_gpt2
def test_conversations_to_validate_on_are_masked_too(tmp_path):
    for name in ('train', 'val'):
        rows = [{'q': f'{name} {i}?', 'a': f'{i}.'} for i in range(9)]
        write_rows(tmp_path / f'{name}.jsonl', rows)
    prepare(
        tmp_path / 'out', tmp_path / 'train.jsonl', f"--val={tmp_path / 'val.jsonl'}", '--field=q,a'
    )
    val = json.loads((tmp_path / 'out/meta.json').read_text())['splits']['val']
    assert val['documents'] == 9 and 0 < val['learned'] < val['tokens']


# ---- shards, masks -------------------------------------------------------------------------------


def test_shards_hold_so_many_tokens_each_and_replace_what_was_there(tmp_path, small_pieces):
    rows = as_jsonl(tmp_path)
    texts = expected(DOCUMENTS)
    for n in (1000, 0, 700, len(texts['train'])):
        prepare(tmp_path / 'out', *rows, '--tokenizer=byte', f'--shard_tokens={n}')
        assert decoded(tmp_path / 'out') == texts
        meta = json.loads((tmp_path / 'out/meta.json').read_text())
        sizes = {
            split: [
                (tmp_path / 'out' / name).stat().st_size // 2
                for name in sorted(contents(tmp_path / 'out'))
                if name.startswith(split)
            ]
            for split in texts
        }
        for split in texts if n else ():
            assert meta['splits'][split]['shards'] == sizes[split]
            assert set(sizes[split][:-1]) <= {n} and 0 < sizes[split][-1] <= n
            assert (tmp_path / f'out/{split}-00000.bin').exists()
        assert n or sorted(contents(tmp_path / 'out')) == ['meta.json', 'train.bin', 'val.bin']


@needs_gpt2
@pytest.mark.parametrize('form', ['fields', 'messages'])
@pytest.mark.parametrize('shard_tokens', [0, 64])
def test_of_conversations_only_the_answers_are_learned(tmp_path, small_pieces, form, shard_tokens):
    template = {'user': ['Q: ', '\n'], 'assistant': ['A: ', '#\n']}
    (tmp_path / 'template.json').write_text(json.dumps(template))
    pairs = [(f'What is {i} and {i}?', f'It is {2 * i}.') for i in range(60)]
    rows = [
        {'q': q, 'a': a}
        if form == 'fields'
        else {'messages': [{'role': 'user', 'content': q}, {'role': 'assistant', 'content': a}]}
        for q, a in pairs
    ]
    options = ['--field=q,a'] if form == 'fields' else []
    prepare(
        tmp_path / 'out',
        write_rows(tmp_path / 'rows.jsonl', rows),
        *options,
        f'--shard_tokens={shard_tokens}',
        f'--template={tmp_path / "template.json"}',
    )
    meta, own = (
        json.loads((tmp_path / 'out/meta.json').read_text()),
        load({'kind': 'tiktoken', 'name': 'gpt2'}),
    )
    assert meta['masked'] is True and meta['template'] == template
    for split in ('train', 'val'):
        ids, mask = [], []
        for q, a in pairs:
            if split_of(f'Q: {q}\nA: {a}#\n') == split:
                for text, learned in (
                    ('Q: ', 0),
                    (q, 0),
                    ('\n', 0),
                    ('A: ', 0),
                    (a, 1),
                    ('#\n', 1),
                ):
                    new = own.encode_ordinary(text)
                    ids, mask = [*ids, *new], mask + [learned] * len(new)
                ids, mask = [*ids, own.eot], [*mask, 1]
        for kind, dtype, wanted in (('bin', 'u2', ids), ('mask', 'u1', mask)):
            raw = b''.join(
                path.read_bytes() for path in sorted((tmp_path / 'out').glob(f'{split}*.{kind}'))
            )
            assert np.frombuffer(raw, dtype).tolist() == wanted
        assert meta['splits'][split]['learned'] == sum(mask) > 0


# ---- the same bins whatever happens --------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path):
    """A folder with files of all sizes in pieces, and the words that prepare it."""
    folder = tmp_path / 'corpus'
    folder.mkdir()
    write_rows(folder / 'a.jsonl', [{'text': text} for text in DOCUMENTS + DOCUMENTS[:30]])
    (folder / 'b.txt').write_text('one large text\n' * 300)
    for i in range(20):
        (folder / f'c{i:02d}.txt').write_text(f'{i} small\n' * i)
    (folder / 'd.jsonl.gz').write_bytes(
        gzip.compress((folder / 'a.jsonl').read_bytes().replace(b'Document', b'Text'))
    )
    return [
        folder,
        '--tokenizer=byte',
        '--dedup',
        '--shard_tokens=3000',
        '--document=paragraph',
        '--split=0.6,0.4',
    ]


class Stop(BaseException):
    """As sudden as kill -9: nothing is saved on the way out."""


OWN_FILES = ['--document=one', '--val=corpus/c07.txt', '--test=corpus/a.jsonl']


@pytest.mark.parametrize('options', [[], OWN_FILES], ids=['hashed', 'own files'])
@pytest.mark.parametrize('seed', range(2))
def test_a_run_that_is_stopped_anywhere_goes_on_to_the_same_bins(
    tmp_path, small_pieces, corpus, monkeypatch, seed, options
):
    monkeypatch.chdir(tmp_path)
    corpus += options
    if options:
        corpus.remove('--split=0.6,0.4')
    prepare(tmp_path / 'whole', *corpus)
    rng, stops, real = random.Random(seed), 0, {'fsync': os.fsync, 'replace': os.replace}

    def sometimes(name):
        def call(*args):
            nonlocal stops
            if rng.random() < 0.04:
                stops += 1
                if rng.random() < 0.5:  # before or after it was done
                    real[name](*args)
                raise Stop
            return real[name](*args)

        return call

    for name in real:
        monkeypatch.setattr(os, name, sometimes(name))
    while True:
        try:
            prepare(tmp_path / 'stopped', *corpus)
            break
        except Stop:
            continue
    monkeypatch.undo()
    assert stops > 5 and contents(tmp_path / 'stopped') == contents(tmp_path / 'whole')


def test_ctrl_c_keeps_what_is_done(tmp_path, small_pieces, corpus, monkeypatch, capsys):
    prepare(tmp_path / 'whole', *corpus)
    calls = interrupt_at(monkeypatch, 20)
    monkeypatch.setattr(journal, 'SAVE_SECONDS', 1000)
    with pytest.raises(SystemExit) as end:
        prepare(tmp_path / 'stopped', *corpus)
    assert end.value.code == 130 and 'the same command continues' in capsys.readouterr().err
    prepare(tmp_path / 'stopped', *corpus)
    assert 'continuing after' in capsys.readouterr().out
    pieces = len([*sources.open(corpus[:1], document='paragraph').pieces()])
    assert len(calls) == pieces + 1 and contents(tmp_path / 'stopped') == contents(
        tmp_path / 'whole'
    )


def test_another_command_starts_anew_and_says_so(
    tmp_path, small_pieces, corpus, monkeypatch, capsys
):
    prepare(tmp_path / 'whole', *corpus, '--seed=2')
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(
            journal.Output, 'finish', lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        prepare(tmp_path / 'stopped', *corpus)
    prepare(tmp_path / 'stopped', *corpus, '--seed=2')
    assert 'starting anew' in capsys.readouterr().out and contents(
        tmp_path / 'stopped'
    ) == contents(tmp_path / 'whole')


def test_bins_that_lost_something_since_are_begun_anew(
    tmp_path, small_pieces, corpus, monkeypatch, capsys
):
    prepare(tmp_path / 'whole', *corpus)
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(
            journal.Output, 'finish', lambda *args: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        prepare(tmp_path / 'stopped', *corpus)
    os.truncate(tmp_path / 'stopped/.preparing/bins/train-00001.bin', 10)
    prepare(tmp_path / 'stopped', *corpus)
    assert 'starting anew' in capsys.readouterr().out and contents(
        tmp_path / 'stopped'
    ) == contents(tmp_path / 'whole')


def test_bins_that_are_replaced_only_in_part_are_refused(
    tmp_path, small_pieces, corpus, monkeypatch
):
    prepare(tmp_path / 'out', *corpus[:2], '--document=line')
    real = os.replace

    def stopped(source, target):
        if Path(target).name == 'val-00000.bin':
            raise Stop
        real(source, target)

    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(os, 'replace', stopped)
        prepare(tmp_path / 'out', *corpus)
    with pytest.raises(ValueError, match='replaced only in part'):
        Dataset(tmp_path / 'out', 8, 2)
    prepare(tmp_path / 'out', *corpus)
    assert 'train.bin' not in contents(tmp_path / 'out')


SCRIPT = f"""if True:
    import os, runpy, sys, time
    sys.path.insert(0, {str(ROOT)!r})
    from text import journal
    from text.sources import cutting
    save = journal.Output.save
    journal.Output.save = lambda output: (save(output), time.sleep(0.01))       # or it would be done before it is killed
    cutting.PIECE, cutting.LARGE, journal.SAVE_SECONDS, os.fsync = 256, 1024, -1, lambda descriptor: None
    sys.argv[0] = {str(ROOT / 'data/prepare.py')!r}
    runpy.run_path(sys.argv[0], run_name='__main__')"""


def test_kill_9_at_any_time(tmp_path, corpus, small_pieces):
    prepare(tmp_path / 'whole', *corpus)
    rng, kills = random.Random(3), 0
    while True:
        run = subprocess.Popen(
            [sys.executable, '-c', SCRIPT, str(tmp_path / 'out'), *map(str, corpus)],
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            assert run.wait(0.3 + 0.3 * rng.random() if kills < 5 else 60) == 0
            break
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
            kills += 1
    assert contents(tmp_path / 'out') == contents(tmp_path / 'whole') and kills


def test_the_bins_do_not_depend_on_the_number_of_processes(tmp_path):
    rows = [{'text': f'{i} {"ü some text " * (i % 500)}'} for i in range(2000)]
    rows = write_rows(tmp_path / 'rows.jsonl', rows)
    for n in (1, 2):
        prepare(tmp_path / f'by {n}', rows, '--tokenizer=byte', f'--num_proc={n}', '--dedup')
    assert contents(tmp_path / 'by 1') == contents(tmp_path / 'by 2')


def test_a_worker_that_is_killed_costs_nothing_that_was_done(tmp_path, monkeypatch, capsys):
    rows = write_rows(
        tmp_path / 'rows.jsonl', [{'text': f'{i} {"some text " * 300}'} for i in range(2000)]
    )
    real = journal.Output.add

    def kill(output, piece, encoded):
        size = real(output, piece, encoded)
        for process in multiprocessing.active_children():
            process.kill()
        return size

    monkeypatch.setattr(journal.Output, 'add', kill)
    assert 'use a smaller --num_proc' in failure(
        capsys, tmp_path / 'out', rows, '--tokenizer=byte', '--num_proc=2'
    )
    monkeypatch.undo()
    prepare(tmp_path / 'out', rows, '--tokenizer=byte', '--num_proc=1')
    assert 'continuing after' in capsys.readouterr().out
    assert decoded(tmp_path / 'out') == expected(
        [json.loads(line)['text'] for line in rows.read_text().splitlines()]
    )


@pytest.mark.skipif(sys.platform == 'win32', reason="no ulimit")
def test_a_full_disk_is_one_line_and_leaves_the_old_bins(tmp_path, corpus, small_pieces):
    prepare(tmp_path / 'out', *corpus)
    before, words = (
        contents(tmp_path / 'out'),
        [str(tmp_path / 'out'), *map(str, corpus[:2]), '--split=0.5,0.5'],
    )
    limit = 'import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n'
    done = subprocess.run(
        [sys.executable, '-c', limit + SCRIPT, *words], capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith('error: cannot write')
        and done.stderr.count('\n') == 1
    )
    assert {
        name: content for name, content in contents(tmp_path / 'out').items() if '/' not in name
    } == before
    prepare(*words)
    prepare(tmp_path / 'again', *words[1:])
    assert contents(tmp_path / 'out') == contents(tmp_path / 'again')


def test_what_lies_in_the_folder_already_stays_and_is_a_source_like_others(tmp_path):
    (tmp_path / 'parts').mkdir()
    for i in range(40):
        (tmp_path / f'parts/{i}.txt').write_text(DOCUMENTS[i])
    before = contents(tmp_path)
    for _ in range(2):
        # named twice, taken once
        prepare(tmp_path, tmp_path, tmp_path / 'parts', '--tokenizer=byte')
        splits = json.loads((tmp_path / 'meta.json').read_text())['splits']
        assert splits['train']['documents'] + splits['val']['documents'] == 40
        assert before.items() <= contents(tmp_path).items()


@pytest.mark.parametrize('field', ['messages', 'a.messages'])
def test_an_empty_file_says_nothing_about_the_rows_of_others(tmp_path, field):
    row = {'messages': [{'role': 'user', 'content': 'a?'}, {'role': 'assistant', 'content': 'b.'}]}
    (tmp_path / 'in').mkdir()
    (tmp_path / 'in/a.jsonl').write_text('')
    (tmp_path / 'in/b.jsonl').write_text(json.dumps({'a': row, **row}) + '\n')
    assert sources.open([tmp_path / 'in'], field, folder=tmp_path / 'out').facts['masked']


def test_a_row_without_a_text_is_passed_over_and_no_batch_is_larger_than_its_row_group(tmp_path):
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    texts = [*'abcdefgh', None, *(letter * 500_000 for letter in 'ijkl')]
    parquet.write_table(pyarrow.table({'text': texts}), tmp_path / 'a.parquet', row_group_size=3)
    source = sources.open([tmp_path / 'a.parquet'], folder=tmp_path / 'out')
    pieces = list(source.pieces())
    assert [text for piece in pieces for _, text in source.read(piece)] == [
        text or '' for text in texts
    ]
    assert max(len(chunk.data) for piece in pieces for chunk in piece.chunks) <= 3


@pytest.mark.parametrize(
    'name', ['../../private.txt', '/private.txt', 'a/../../private.txt', 'C:\\private.txt']
)
def test_a_servers_names_lead_nowhere_else(name):
    assert is_wanted('a..b/private.txt') and not is_wanted(name)


def test_max_bytes_ends_at_the_same_piece_wherever_it_goes_on(tmp_path):
    for i in range(4):
        (tmp_path / f'{i}.txt').write_text('\n' * 3_000_000 if i == 1 else 'word\n' * 500_000)
    source = sources.open([tmp_path], document='line', folder=tmp_path / 'out', max_bytes=6_500_000)
    pieces = list(source.pieces())
    for first in {piece.file for piece in pieces}:
        assert list(source.pieces(first)) == [piece for piece in pieces if piece.file >= first]
    assert {piece.file for piece in pieces} == {0, 2} and sum(
        len(chunk.data) for p in pieces for chunk in p.chunks
    ) > 2e6


def test_a_name_in_data_may_be_a_link_to_another_disk(tmp_path, monkeypatch):
    (tmp_path / 'disk').mkdir()
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data/big').symlink_to(tmp_path / 'disk')
    monkeypatch.setitem(COMMAND['folder_of'].__globals__, 'DATA', tmp_path / 'data')
    assert COMMAND['folder_of']('big') == tmp_path / 'data/big'


# ---- what can be wrong ---------------------------------------------------------------------------

FILES = {
    'empty.txt': b'',
    'latin.txt': 'für'.encode('latin-1'),
    'utf16.txt': 'text'.encode('utf-16'),
    'zero.bin': b'a\0b',
    'late.txt': b'x' * 99_999 + b'\xff\n',
    'no.jsonl': b'{"text": "a"}\n\nno\n',
    'list.jsonl': b'[{"text": "a"}]',
    'number.jsonl': b'1\n',
    'other.jsonl': b'{"body": "a", "id": 1}\n',
    'null.jsonl': b'{"text": null}\n',
    'broken.txt.gz': gzip.compress(b'some text' * 99)[:-20],
    'not.txt.gz': b'text',
    'not.parquet': b'text',
    'chat.jsonl': b'{"messages": [{"role": "robot", "content": "x"}]}\n',
    'good.txt': b'word\n' * 99,
    'short.txt': b'x',
    'deep.jsonl': b'{"text": "a"}\n' * 9999 + b'{"text": 5}\n',
    'one.jsonl': b'{"text": "just one"}\n',
}


@pytest.mark.parametrize(
    'words, message',
    [
        (['empty.txt'], 'no text in the sources'),
        (['latin.txt'], r'latin\.txt is not UTF-8 at byte 1: `iconv'),
        (['utf16.txt'], r'utf16\.txt is UTF-16'),
        (['zero.bin'], r'zero\.bin is a binary file'),
        (['late.txt'], r'late\.txt is not UTF-8 at byte 99,999'),
        (
            ['no.jsonl'],
            r'no\.jsonl, line 3: not JSON .*: no; --skip_bad_rows leaves such rows out$',
        ),
        (['list.jsonl'], r'list\.jsonl is one JSON array: `python'),
        (['number.jsonl'], r'number\.jsonl, line 1: not a row but 1'),
        (
            ['other.jsonl'],
            r"other\.jsonl, line 1: there is no field 'text', only body, id: --field=NAME says which",
        ),
        (['other.jsonl', '--field=body.x'], r"no field 'body\.x'"),
        (['other.jsonl', '--field=a,,c'], 'must be a name, or names with commas between'),
        (['other.jsonl', '--field=body,b,c'], "the first rows have no field 'b', only body, id"),
        (['null.jsonl'], 'no text in the sources'),
        (['deep.jsonl'], r"deep\.jsonl, line 10000: its 'text' is not text but 5"),
        (['broken.txt.gz'], r'broken\.txt\.gz is damaged'),
        (['not.txt.gz'], r'not\.txt\.gz is damaged'),
        pytest.param(
            ['not.parquet'], r"not\.parquet can't be read as parquet", marks=needs('pyarrow')
        ),
        (['chat.jsonl'], r"chat\.jsonl, line 1: message 1 has the role 'robot'"),
        (
            ['one.jsonl'],
            r'none of the 1 row\(s\) fell to val, whose share is 0.1: add rows, or use '
            r'another --split or --seed, or your own files \(--val=FILE\)$',
        ),
        (
            ['short.txt', '--document=line'],
            r'none of the 1 document\(s\) fell to val, whose share is '
            r'0.1: use smaller ones \(--document=paragraph or line\), or make them one text',
        ),
        (
            ['good.txt', '--split=8,1,1'],
            'split=8,1,1 must be two or three shares above 0 that add up to 1',
        ),
        (['good.txt', '--split=0.9'], 'must be two or three shares'),
        (['good.txt', '--num_proc=0'], 'num_proc=0 must be at least 1'),
        (['good.txt', '--tokenizer=gpt3'], 'gpt3'),
        (['good.txt', '--byte_fallback=True'], 'byte_fallback'),
        (['good.txt', '--byte_fallback=true'], 'byte_fallback'),
        (['good.txt', '--template=good.txt'], r'good\.txt is not JSON'),
        (['good.txt', '--fiel=x'], 'unrecognized arguments: --fiel=x; did you mean --field\\?$'),
        (['good.txt', '--document=Lines'], "document='Lines' looks like 'line': write that"),
        (['good.txt', '--document='], "document='' must be file, paragraph, line, or the text"),
        (['good.txt', '--val=nothing.txt'], r'there is no file or folder .*nothing\.txt'),
        (['good.txt', '--val=empty'], 'there is no file to read for val'),
        (['good.txt', '--val=good.txt'], 'no file to train on: val and test name all'),
        (
            ['good.txt', '--val=one.jsonl', '--test=one.jsonl'],
            r'one\.jsonl is both in val and in test',
        ),
        (
            ['good.txt', '--val=short.txt'],
            r'the files for val hold 1 token\(s\) of text: at least 2',
        ),
        (
            ['good.txt', '--val=short.txt', '--split=0.9,0.1'],
            'which all go to train where --val names',
        ),
        (
            ['good.txt', '--test=short.txt', '--split=0.8,0.1,0.1'],
            'has a share for test, whose files',
        ),
        (['good.txt', '--val'], 'expected one argument'),
        (['good.txt', '--val=--'], '--val has no value; write --val=VALUE$'),
        (['good.txt', '--seed=--'], '--seed has no value; write --seed=VALUE$'),
        (['good.txt', '--dedup=--'], '--dedup has no value; write --dedup=VALUE$'),
        (['-', '--val=-'], 'standard input .* only one of the sources'),
        ([''], 'a source has an empty name'),
        (['nothing.txt'], r'there is no file or folder .*nothing\.txt'),
        (['*.nothing'], r'there is no file like .*\.nothing'),
        (['empty'], 'there is no file to read'),
    ],
)
def test_what_is_wrong_is_one_line_and_the_old_bins_stay(
    tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.setenv('NANOGPT_MIRROR', '/nowhere')
    monkeypatch.setattr(conversion, 'SNIFF', 1000)
    (tmp_path / 'in/empty').mkdir(parents=True)
    for name, content in FILES.items():
        (tmp_path / 'in' / name).write_bytes(content)
    prepare(tmp_path / 'out', tmp_path / 'in/good.txt', '--tokenizer=byte')
    before = contents(tmp_path / 'out')
    monkeypatch.chdir(tmp_path / 'in')
    options = [] if any(word.startswith('--tokenizer') for word in words) else ['--tokenizer=byte']
    error = failure(capsys, tmp_path / 'out', *words, *options)
    assert re.search(message, error.strip())
    assert contents(tmp_path / 'out') == before


@pytest.mark.parametrize(
    'name, message',
    [
        ('shakespeare', 'belongs to .*prepare.py'),
        ('', 'NAME is empty'),
        ('in.txt', 'is a file'),
        ('./in.txt', 'is a file'),
    ],
)
def test_names_that_are_not_to_be_written(tmp_path, monkeypatch, capsys, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'in.txt').write_text('text ' * 99)
    assert re.search(message, failure(capsys, name, 'in.txt', '--tokenizer=byte'))


@pytest.mark.parametrize(
    'name, folder',
    [
        ('./x', 'here/x'),
        ('out/x', 'here/out/x'),
        ('../x', 'x'),
        ('.', 'here'),
        ('{here}/y', 'here/y'),
        ('x', 'data/x'),
    ],
)
def test_a_name_with_a_slash_or_a_dot_is_a_path_and_a_plain_one_is_in_data(
    tmp_path, monkeypatch, capsys, name, folder
):
    """And what the command prints for train.py finds the dataset from there."""
    (tmp_path / 'here').mkdir()
    (tmp_path / 'data').mkdir()
    monkeypatch.chdir(tmp_path / 'here')
    monkeypatch.setitem(COMMAND['folder_of'].__globals__, 'DATA', tmp_path / 'data')
    monkeypatch.setattr(folders, 'DATA_FOLDER', tmp_path / 'data')
    Path('text.txt').write_text('some text ' * 99)
    prepare(name.format(here=tmp_path / 'here'), 'text.txt', '--tokenizer=byte')
    assert (tmp_path / folder / 'train.bin').is_file()
    said = capsys.readouterr().out
    words = shlex.split(said.splitlines()[-1].partition(': ')[2])
    shown = next(word for word in words if word.startswith('--dataset=')).removeprefix('--dataset=')
    assert Dataset(shown, 8, 2).folder.resolve() == tmp_path / folder
    assert words[:2] == ['python', f'{tmp_path}/train.py']
    assert f'--out_dir=out-{Path(folder).name}' in words
    is_told = f'x is a plain name: the dataset goes to {tmp_path}/data/x; for a folder here' in said
    assert is_told == (name == 'x')


def test_in_the_repository_the_printed_command_is_short(tmp_path, monkeypatch, capsys):
    (tmp_path / 'data').mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(COMMAND['folder_of'].__globals__, 'DATA', tmp_path / 'data')
    Path('text.txt').write_text('some text ' * 99)
    prepare('mine', 'text.txt', '--tokenizer=byte')
    said = capsys.readouterr().out
    assert 'plain name' not in said
    assert said.endswith(
        'now, for example: python train.py config/train_shakespeare_char.py '
        '--dataset=mine --out_dir=out-mine\n'
    )


@pytest.mark.parametrize(
    'name, there, folder',
    [
        ('x', ['data/x', 'here/x'], 'data/x'),
        ('./x', ['data/x', 'here/x'], 'here/x'),
        ('a/x', ['data/a/x', 'here/a/x'], 'here/a/x'),
        ('a/x', ['data/a/x'], 'data/a/x'),
        ('x', ['here/x'], 'here/x'),  # there is only one
        ('x', [], 'data/x'),
        ('./x', [], 'here/x'),
        ('./x', ['data/x'], 'here/x'),
        ('out\\x', [], 'here/out\\x'),
    ],
)
def test_the_same_rule_finds_a_dataset(tmp_path, monkeypatch, name, there, folder):
    for path in ('data', 'here', *there):
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / 'here')
    monkeypatch.setattr(folders, 'DATA_FOLDER', tmp_path / 'data')
    assert folders.folder_of(name).resolve() == tmp_path / folder


def test_a_zst_without_its_end_is_damaged(tmp_path, capsys):
    packed = (
        pytest.importorskip('zstandard')
        .ZstdCompressor()
        .compress(random.Random(0).randbytes(200_000).hex().encode())
    )
    (tmp_path / 'a.txt.zst').write_bytes(packed[: len(packed) // 2])
    assert 'a.txt.zst is damaged: its end is missing' in failure(
        capsys, tmp_path / 'out', tmp_path / 'a.txt.zst', '--tokenizer=byte'
    )
    assert not (tmp_path / 'out').exists()


def test_a_folder_is_prepared_by_one_process_at_a_time(tmp_path, capsys):
    (tmp_path / 'a.txt').write_text('some words\n' * 99)
    (tmp_path / 'out').mkdir()
    held = files.lock(tmp_path / 'out/.lock')
    assert 'another process is preparing' in failure(
        capsys, tmp_path / 'out', tmp_path / 'a.txt', '--tokenizer=byte'
    )
    assert list(contents(tmp_path / 'out')) == []
    held.close()
    prepare(tmp_path / 'out', tmp_path / 'a.txt', '--tokenizer=byte')


@pytest.mark.parametrize('package', ['zstandard', 'pyarrow'])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, capsys, package):
    path = tmp_path / {'zstandard': 'a.txt.zst', 'pyarrow': 'a.parquet'}[package]
    path.write_bytes(b'x')
    monkeypatch.setitem(sys.modules, package, None)
    assert f'pip install {package}' in failure(capsys, tmp_path / 'out', path, '--tokenizer=byte')


def test_half_a_surrogate_becomes_the_replacement_character(tmp_path):
    rows = '{"text": "a\\ud83d"}\n{"text": "b\\ud83c\\udf89"}\n{"text": "c"}\n{"text": "d"}\n'
    (tmp_path / 'rows.jsonl').write_text(rows)
    prepare(tmp_path / 'out', tmp_path / 'rows.jsonl', '--tokenizer=byte', '--split=0.5,0.5')
    assert decoded(tmp_path / 'out') == expected(['a\ufffd', 'b🎉', 'c', 'd'], ('0.5', '0.5'))


def test_preparing_does_without_torch():
    program = f'import sys; sys.path.insert(0, {str(ROOT / "data")!r}); import prepare; print("torch" in sys.modules)'
    assert (
        subprocess.run([sys.executable, '-c', program], capture_output=True, text=True).stdout
        == 'False\n'
    )


# ---- the Hugging Face Hub ------------------------------------------------------------------------


def test_a_dataset_on_the_hub_is_read_file_by_file(
    tmp_path, hub, small_pieces, monkeypatch, capsys
):
    served, asked = hub
    for i in range(4):
        text = ''.join(
            json.dumps({'text': text}) + '\n' for text in DOCUMENTS[i * 25 : i * 25 + 25]
        )
        served[f'data/{i}.jsonl.gz'] = gzip.compress(text.encode())
    served['README.md'], served['other/9.jsonl'] = b'# A set', b'{"text": "not this"}\n'
    words = [tmp_path / 'out', 'own/set:data', '--tokenizer=byte']
    real, most = journal.Output.add, 0

    def stopped(output, piece, encoded):
        nonlocal most
        most = max(most, len([*(tmp_path / 'out/.preparing/hub').rglob('*.gz')]))
        if piece.file == 2:
            raise KeyboardInterrupt
        return real(output, piece, encoded)

    monkeypatch.setattr(journal.Output, 'add', stopped)
    with pytest.raises(SystemExit):
        prepare(*words)
    assert f'commit {COMMIT}, 4 file(s)' in capsys.readouterr().out and 1 <= most <= 3
    asked.clear()
    monkeypatch.setattr(journal.Output, 'add', real)
    prepare(*words)
    fetched = [
        request.rpartition('/')[2] for request in asked if request.startswith('GET /datasets')
    ]
    assert fetched and '0.jsonl.gz' not in fetched
    assert decoded(tmp_path / 'out') == expected(DOCUMENTS)
    assert json.loads((tmp_path / 'out/meta.json').read_text())['hub'] == [f'own/set@{COMMIT}']
    assert sorted(contents(tmp_path / 'out')) == ['meta.json', 'train.bin', 'val.bin']


@pytest.mark.parametrize(
    'word, message',
    [
        ('own/sett', "neither a file nor a folder here, and .* no dataset 'own/sett'"),
        ('gated/set', 'hf auth login'),
        ('own/set:data/*.csv', 'none is called .parquet, .jsonl or .txt'),
        ('texts/boook.txt', 'there is no file or folder'),
    ],
)
def test_a_word_that_is_no_path_and_no_dataset_is_one_line(tmp_path, hub, capsys, word, message):
    hub[0]['data/a.csv'] = b'a'
    assert re.search(message, failure(capsys, tmp_path / 'out', word, '--tokenizer=byte'))


def test_a_mirror_s_folder_stands_for_a_dataset(tmp_path, small_pieces, monkeypatch):
    (tmp_path / 'mirror/own/set').mkdir(parents=True)
    as_jsonl(tmp_path / 'mirror/own/set')
    monkeypatch.setenv('NANOGPT_MIRROR', str(tmp_path / 'mirror'))
    prepare(tmp_path / 'out', 'own/set', '--tokenizer=byte')
    assert decoded(tmp_path / 'out') == expected(DOCUMENTS)


# ---- speed ---------------------------------------------------------------------------------------


@pytest.mark.campaign
@needs_gpt2
@pytest.mark.parametrize('kind', ['text', 'folder', 'jsonl', 'parquet', 'gz'])
def test_one_process_is_nearly_as_fast_as_the_tokenizer_alone(tmp_path, capsys, kind):
    """Processor seconds of both, in turns, on the installed packages' source; run with -s to see
    them."""
    own, texts = load({'kind': 'tiktoken', 'name': 'gpt2'}), []
    for path in sorted(Path(np.__file__).parents[1].rglob('*.py')):
        if sum(map(len, texts)) < 8e6 and path.stat().st_size:
            texts.append(path.read_bytes().decode(errors='replace'))
    rows = [{'text': text} for text in texts]
    if kind == 'text':
        (source := tmp_path / 'all.txt').write_text(
            '\n\n'.join(texts), encoding='utf-8', newline=''
        )
        texts = ['\n\n'.join(texts)]
    elif kind == 'folder':
        (source := tmp_path / 'texts').mkdir()
        for i, text in enumerate(texts):
            (source / f'{i:05d}.py').write_text(text, encoding='utf-8', newline='')
    elif kind == 'parquet':
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({'text': texts}), source := tmp_path / 'rows.parquet')
    else:
        source = write_rows(tmp_path / 'rows.jsonl', rows)
        if kind == 'gz':
            source.with_name('rows.jsonl.gz').write_bytes(gzip.compress(source.read_bytes()))
            source = source.with_name('rows.jsonl.gz')
    seconds = {'tokenizer': [], 'prepare': []}
    for _ in range(3):
        start = time.process_time()
        for text in texts:
            own.encoding.encode_ordinary(text)
        middle = time.process_time()
        prepare(tmp_path / 'out', source, '--num_proc=1')
        seconds['tokenizer'].append(middle - start)
        seconds['prepare'].append(time.process_time() - middle)
    size = sum(len(text.encode()) for text in texts) / 1e6
    speeds = ', '.join(f'{name} {size / min(times):.2f} MB/s' for name, times in seconds.items())
    with capsys.disabled():
        print(f"\n{kind}: {size:.1f} MB; {speeds}")
    assert min(seconds['prepare']) < min(seconds['tokenizer']) / 0.8
