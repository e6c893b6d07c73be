"""The ready sets: what each data/NAME/prepare.py writes, from a local server in the place of its
host.

Shakespeare and GPT-2's vocabulary join in where NANOGPT_MIRROR and TIKTOKEN_CACHE_DIR have them.
"""

import ast
import hashlib
import io
import json
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support.datasets import assert_meta_is_true, bin_of, contents
from support.needs import MIRROR, needs, needs_gpt2, needs_shakespeare
from support.ready_sets import copied, definitions, prepared
from support.scripts import ROOT, run
from support.servers import COMMIT, FileServer

from system import hub as hub_module
from text import dataset, dataset_option, folders, tokenizer
from text.sources import cutting

READY = sorted(path.parent.name for path in ROOT.glob('data/*/prepare.py'))


def refused(capsys, name, folder, *options, **kwargs):
    """The one line with which it ends."""
    with pytest.raises(SystemExit) as end:
        prepared(name, folder, *options, **kwargs)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith('error: ') and error.count('\n') == 1
    return error


@pytest.mark.parametrize('name', READY)
def test_a_ready_set_says_its_command_and_its_licence(name):
    text = (ROOT / 'data' / name / 'prepare.py').read_text(encoding='utf-8')
    said = ast.get_docstring(ast.parse(text))
    assert f'    python data/{name}/prepare.py' in said and re.search(
        r'licence|public\s+domain', said, re.IGNORECASE
    )
    assert re.search(r'^DOWNLOAD_MB = [\d._]+\b', text, re.MULTILINE)


def test_only_small_datasets_are_prepared_unasked(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(folders, 'DATA_FOLDER', tmp_path)
    for name, size in (('small', 1.5), ('large', 100)):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'prepare.py').write_text(
            f"DOWNLOAD_MB = {size}\nimport pathlib\npathlib.Path(__file__).with_name('train.bin').touch()"
        )
    dataset_option.prepare_if_small('small')
    assert (
        tmp_path / 'small/train.bin'
    ).exists() and 'running data/small/prepare.py' in capfd.readouterr().out
    dataset_option.prepare_if_small('small')
    assert capfd.readouterr().out == ''
    with pytest.raises(FileNotFoundError, match=r'python data/large/prepare\.py'):
        dataset_option.prepare_if_small('large')
    assert 'DOWNLOAD_MB = 24_193\n' in (ROOT / 'data/openwebtext/prepare.py').read_text()


# ---- the Python standard library -----------------------------------------------------------------


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
    id_of_byte = np.zeros(128, np.uint16)  # the corpus is ASCII: a character is its byte
    id_of_byte[[ord(c) for c in chars]] = range(len(chars))
    for split, text in texts.items():
        assert np.array_equal(
            bin_of(folder, split), id_of_byte[np.frombuffer(text.encode(), np.uint8)]
        )
    assert json.loads((folder / 'meta.json').read_text())['tokenizer'] == {
        'kind': 'char',
        'chars': ''.join(chars),
    }
    assert_meta_is_true(folder, texts)


def test_stdlib_char_validates_on_about_a_tenth_and_has_no_file_in_both(stdlib):
    _, texts = stdlib
    assert 0.05 < len(texts['val']) / len(texts['train'] + texts['val']) < 0.2
    for module in ('argparse', 'json/decoder', 'os', 'pickle', 'subprocess', 'threading'):
        text = (Path(os.__file__).parent / f'{module}.py').read_text(encoding='utf-8')
        assert not text.isascii() or (text in texts['train']) != (text in texts['val'])


def test_a_second_prepare_gives_the_same_bytes(stdlib, tmp_path):
    # Another hash seed orders sets differently; what is written must not depend on it.
    script = copied('stdlib_char', tmp_path)
    done = run(script, env={'PYTHONPATH': str(ROOT), 'PYTHONHASHSEED': '7'})
    assert done.returncode == 0, done.stderr
    assert contents(script.parent) == contents(stdlib[0])


# ---- Shakespeare ---------------------------------------------------------------------------------


@pytest.fixture
def shakespeare():
    """{split: text}."""
    text = (MIRROR / 'shakespeare/input.txt').read_text(encoding='utf-8')
    return {'train': text[: int(0.9 * len(text))], 'val': text[int(0.9 * len(text)) :]}


@needs_shakespeare
def test_shakespeare_char_is_a_plain_encoding(shakespeare, tmp_path):
    folder = prepared('shakespeare_char', tmp_path)
    chars = sorted(set(shakespeare['train'] + shakespeare['val']))
    for split, text in shakespeare.items():
        assert np.array_equal(bin_of(folder, split), [chars.index(c) for c in text])
    assert (len(bin_of(folder, 'train')), len(bin_of(folder, 'val')), len(chars)) == (
        1_003_854,
        111_540,
        65,
    )
    assert_meta_is_true(folder, shakespeare)


@needs_shakespeare
@needs_gpt2
def test_shakespeare_is_what_tiktoken_says(shakespeare, tmp_path):
    import tiktoken

    folder = prepared('shakespeare', tmp_path)
    for split, text in shakespeare.items():
        assert bin_of(folder, split).tolist() == tiktoken.get_encoding('gpt2').encode_ordinary(text)
    assert (len(bin_of(folder, 'train')), len(bin_of(folder, 'val'))) == (301_966, 36_059)
    assert_meta_is_true(folder, shakespeare)


@needs_shakespeare
@pytest.mark.parametrize('name', ['byte', pytest.param('train:bpe:400', marks=needs('tokenizers'))])
def test_shakespeare_by_another_tokenizer_has_a_folder_of_its_own(
    shakespeare, tmp_path, monkeypatch, name
):
    parent, own = prepared('shakespeare', tmp_path, f'--tokenizer={name}'), name.replace(':', '-')
    assert {path.name for path in parent.iterdir()} == {'prepare.py', 'input.txt', own}
    monkeypatch.setattr(folders, 'DATA_FOLDER', parent.parent)
    data = dataset.Dataset(f'shakespeare/{own}', block_size=8, batch_size=1)
    for split, text in shakespeare.items():
        assert tokenizer.load(data.tokenizer).decode(bin_of(data.folder, split).tolist()) == text
    assert_meta_is_true(data.folder, shakespeare)


@needs_shakespeare
def test_shakespeare_by_a_tokenizer_of_the_hub(shakespeare, tmp_path, monkeypatch):
    tokenizers = pytest.importorskip('tokenizers')
    bert = tokenizers.BertWordPieceTokenizer()
    bert.train_from_iterator([shakespeare['val']], vocab_size=500, show_progress=False)
    for name, write in (
        (
            'shakespeare',
            lambda folder: (folder / 'input.txt').write_text(''.join(shakespeare.values())),
        ),
        ('bert-base-uncased', lambda folder: bert.save(str(folder / 'tokenizer.json'))),
    ):
        (tmp_path / 'mirror' / name).mkdir(parents=True)
        write(tmp_path / 'mirror' / name)
    monkeypatch.setenv('NANOGPT_MIRROR', str(tmp_path / 'mirror'))
    folder = (
        prepared('shakespeare', tmp_path, '--tokenizer=bert-base-uncased') / 'bert-base-uncased'
    )
    assert (
        bin_of(folder, 'val').tolist()
        == bert.encode(shakespeare['val'], add_special_tokens=False).ids
    )
    assert_meta_is_true(folder, shakespeare)  # bytes are those of the text, capitals and all


def test_a_prepare_without_network_ends_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('NANOGPT_MIRROR', '/nowhere')
    assert 'cannot download /nowhere/shakespeare/input.txt' in refused(
        capsys, 'shakespeare_char', tmp_path
    )


# ---- enwik8 --------------------------------------------------------------------------------------


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv('NANOGPT_MIRROR', raising=False)
    with FileServer() as server:
        yield server


def test_enwik8_is_bytes_cut_where_the_benchmark_cuts_them(server, tmp_path, monkeypatch):
    text = ('ä' + 'x€' * 250).encode()[:1000]  # both cuts are inside of characters
    with zipfile.ZipFile(archive := io.BytesIO(), 'w') as file:
        file.writestr('enwik8', text)
    server.content = archive.getvalue()
    folder = prepared(
        'enwik8',
        tmp_path,
        changes=[
            ('http://mattmahoney.net/dc/enwik8.zip', server.url),
            ('_000_000', '0'),
            (definitions('enwik8')['SHA256'], hashlib.sha256(server.content).hexdigest()),
        ],
    )
    bins = [bytes(bin_of(folder, split).tolist()) for split in ('train', 'val', 'test')]
    assert bins == [text[:900], text[900:950], text[950:]]
    monkeypatch.setattr(folders, 'DATA_FOLDER', folder.parent)
    data = dataset.Dataset('enwik8', block_size=8, batch_size=1)
    assert data.vocab_size == 256 and data.tokens['test'] == 50
    # a byte is a token: the usual bits per character
    assert data.bits_per_byte('val', np.log(2)) == pytest.approx(1)


def test_enwik8_of_another_content_is_not_used(server, tmp_path, capsys):
    server.content = b'a page that asks to log in'
    changes = [
        ('http://mattmahoney.net/dc/enwik8.zip', server.url),
        ('https://data.deepai.org/enwik8.zip', server.url),
    ]
    assert 'is not the expected file' in refused(capsys, 'enwik8', tmp_path, changes=changes)
    assert [path.name for path in (tmp_path / 'data/enwik8').iterdir()] == ['prepare.py']


# ---- datasets on the Hugging Face Hub ------------------------------------------------------------

SOURCE = Path(json.__file__).read_text(encoding='utf-8')
TEXTS = [SOURCE[i * 100 : i * 100 + 300] for i in range(56)] + [
    '<|endoftext|> as text',
    'ünï 🎉',
    SOURCE,
]
# name: (its files, by number; the repository; changes of the script that make it small)
OF_THE_HUB = {
    'openwebtext': (
        'plain_text/train-{:05d}-of-00080.parquet',
        'Skylion007/openwebtext',
        ["'0.9995', '0.0005'"],
    ),
    'fineweb_edu': (
        'sample/10BT/{:03d}_00000.parquet',
        'HuggingFaceFW/fineweb-edu',
        ["'0.9995', '0.0005'", '100_000_000'],
    ),
    'oscar': ('eo_meta/eo_meta_part_{}.jsonl.zst', 'oscar-corpus/OSCAR-2301', []),
}
SMALL = {"'0.9995', '0.0005'": "'0.9', '0.1'", '100_000_000': '1000'}


def file_of(name, texts):
    """The bytes of a file called so, with a row for each text."""
    if name.endswith('.parquet'):
        pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
        table = pyarrow.table({'id': list(range(len(texts))), 'text': texts})
        parquet.write_table(table, content := io.BytesIO(), row_group_size=7)
        return content.getvalue()
    rows = ''.join(
        json.dumps({'content': text, 'metadata': {'identification': {'label': 'eo'}}}) + '\n'
        for text in texts
    )
    return pytest.importorskip('zstandard').ZstdCompressor().compress(rows.encode())


def bins_in(folder, split=''):
    return sorted(folder.glob(f'{split}*.bin'))


def texts_of(folder):
    """{split: [the documents in its bins]}, each of which ends with <|endoftext|>."""
    meta = json.loads((folder / 'meta.json').read_text())
    own, found = tokenizer.load(meta['tokenizer']), {}
    for split in ('train', 'val'):
        ids = np.concatenate([np.fromfile(path, meta['dtype']) for path in bins_in(folder, split)])
        documents = np.split(ids, np.flatnonzero(ids == meta['eot']) + 1)
        assert len(documents.pop()) == 0
        found[split] = [own.decode(document[:-1].tolist()) for document in documents]
    return found


def changes_of(name, repo='own/set'):
    """What makes the script small, and ask for `repo` in the place of its own."""
    text, own = (
        (ROOT / 'data' / name / 'prepare.py').read_text(encoding='utf-8'),
        OF_THE_HUB[name][1],
    )
    pinned = re.search(rf"'{own}(@\w{{40}})?", text)
    return [
        (pinned[0], f"'{repo}" + f'@{COMMIT}' * bool(pinned[1])),
        *((old, SMALL[old]) for old in OF_THE_HUB[name][2]),
    ]


@pytest.fixture(params=OF_THE_HUB)
def of_the_hub(request, hub):
    """(name, its arguments, where its bins will be in its folder): a set whose files the server
    has."""
    name, (pattern, _, _) = request.param, OF_THE_HUB[request.param]
    for i in range(4):
        hub[0][pattern.format(i + 1)] = file_of(pattern, TEXTS[15 * i : 15 * i + 15])
    hub[0]['eo_meta/checksum.sha256'] = hub[0]['README.md'] = b'no document'
    return (
        name,
        ['eo', '--num_proc=1'] if name == 'oscar' else ['--num_proc=1'],
        'eo' if name == 'oscar' else '.',
    )


@needs_gpt2
@pytest.mark.parametrize('where', ['the Hub', 'a folder'])
def test_a_set_of_the_hub_is_its_documents(of_the_hub, hub, tmp_path, monkeypatch, where):
    name, words, inside = of_the_hub
    if where == 'a folder':
        for file, content in hub[0].items():
            path = tmp_path / 'mirror' / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        monkeypatch.setenv('NANOGPT_MIRROR', str(tmp_path / 'mirror'))
    folder = prepared(name, tmp_path, *words, changes=changes_of(name)) / inside
    found, meta = texts_of(folder), json.loads((folder / 'meta.json').read_text())
    assert (
        found == {split: [text for text in TEXTS if text in found[split]] for split in found}
        and found['val']
    )
    assert sorted(found['train'] + found['val']) == sorted(TEXTS)
    assert meta.get('hub') == ([f'own/set@{COMMIT}'] if where == 'the Hub' else None)
    assert not (folder / '.preparing').exists()
    for split, facts in meta['splits'].items():
        shards = [np.fromfile(path, meta['dtype']).size for path in bins_in(folder, split)]
        assert facts['documents'] == len(found[split]) and facts['tokens'] == sum(shards)
        assert shards == facts.get('shards', [facts['tokens']]) and (
            name != 'fineweb_edu' or {*shards[:-1]} <= {1000}
        )


@needs_gpt2
def test_a_set_of_the_hub_goes_on_where_it_was(of_the_hub, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cutting, 'PIECE', 1000)  # small files would share a piece
    name, words, inside = of_the_hub
    whole = prepared(name, tmp_path / 'at once', *words, changes=changes_of(name)) / inside
    first, last = (OF_THE_HUB[name][0].format(i) for i in (1, 4))
    download = hub_module.download

    def broken(repo, file, *args):
        if file == last:
            raise OSError("cannot download the last file")
        return download(repo, file, *args)

    monkeypatch.setattr(hub_module, 'download', broken)
    assert 'cannot download the last' in refused(
        capsys, name, tmp_path, *words, changes=changes_of(name)
    )
    monkeypatch.setattr(hub_module, 'download', download)
    hub[1].clear()
    folder = prepared(name, tmp_path, *words, changes=changes_of(name)) / inside
    assert [path.read_bytes() for path in bins_in(folder)] == [
        path.read_bytes() for path in bins_in(whole)
    ]
    assert not [request for request in hub[1] if first in request]


def test_a_set_that_is_closed_says_how_to_open_it(hub, tmp_path, capsys):
    error = refused(capsys, 'oscar', tmp_path, 'eo', changes=changes_of('oscar', 'gated/set'))
    assert 'accepted its terms' in error and 'hf auth login' in error


@pytest.mark.parametrize(
    'words, message',
    [
        (['eq'], "no language 'eq'; the nearest are eo, de; all of them: de eo zh"),
        (['xx'], 'all of them: de eo zh'),
        (['--max_bytes=1'], 'the first word is a LANGUAGE'),
    ],
)
def test_a_language_that_there_is_not(hub, tmp_path, capsys, words, message):
    for language in ('de', 'eo', 'zh'):
        hub[0][f'{language}_meta/{language}_meta_part_1.jsonl.zst'] = b''
    assert message in refused(capsys, 'oscar', tmp_path, *words, changes=changes_of('oscar'))


@needs_gpt2
def test_only_the_beginning_of_a_language(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(cutting, 'PIECE', 1000)
    files = [OF_THE_HUB['oscar'][0].format(i) for i in (1, 2, 3)]
    for i, file in enumerate(files):
        hub[0][file] = file_of(file, TEXTS[20 * i : 20 * i + 20])
    most = len(hub[0][files[0]]) + 1
    found = texts_of(
        prepared('oscar', tmp_path, 'eo', f'--max_bytes={most}', changes=changes_of('oscar')) / 'eo'
    )
    n = len(found['train']) + len(found['val'])
    assert 20 < n < 40 and set(found['train']) | set(found['val']) == set(TEXTS[:n])
    assert not [request for request in hub[1] if files[2] in request]
