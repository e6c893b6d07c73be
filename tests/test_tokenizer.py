"""Tokenizers: every kind says what a text was, token by token too, comes back from its description,
and goes to Hugging Face's format with the same ids; a vocabulary is found by its name, or trained;
what a lossy kind loses is not counted."""

import base64
import functools
import importlib
import io
import json
import math
import random
import runpy
import sys

import pytest
import torch
from support.generated import given, settings, st
from support.needs import needs
from support.scripts import ROOT
from support.servers import COMMIT, Hub

import models
from generation.decode import TextStream
from text import tokenizer, tokenizer_files, tokenizer_json, vocabulary
from text.bins import write_bins

TEXT = ''.join((ROOT / name).read_text(encoding='utf-8') for name in ('train.py', 'README.md'))
HARD = [
    "  two  spaces, \t\ttabs\n\n\nand lines \n ",
    "I've we'll THEY'RE 'quoted' 1234567890 3.14e-5",
    '',
    ' ',
    '\n\n x\n',
    "naïve 日本語 🚀👩\u200d👧 ﷽ \u200d\ufeff e\u0301 ﬁ Ａ",
    "\r\n\x00\x7f\x85\xa0\u2028",
    " lead, trail ",
    "<0x41> <unk>",
]


def sentencepiece(**options):
    """A model of the library itself."""
    library, model = pytest.importorskip('sentencepiece'), io.BytesIO()
    pieces = [TEXT[i : i + 1000] for i in range(0, len(TEXT), 1000)]
    library.SentencePieceTrainer.train(
        sentence_iterator=iter(pieces),
        model_writer=model,
        vocab_size=700,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return tokenizer.SentencePieceTokenizer(base64.b64encode(model.getvalue()).decode())


def wordpiece():
    """One like bert-base-uncased's: no capitals, no accents, no line ends."""
    words = sorted({word for word in TEXT.lower().split() if word.isalpha()})[:500]
    letters = sorted({c for c in TEXT.lower() if not c.isspace()} - set('àé'))
    vocab = [
        '[PAD]',
        '[UNK]',
        '[CLS]',
        '[SEP]',
        '[MASK]',
        *letters,
        *words,
        *(f'##{c}' for c in letters if c.isalnum()),
    ]
    return tokenizer.HuggingFaceTokenizer(tokenizer_json.wordpiece(list(dict.fromkeys(vocab))))


IDENTITY = dict(
    byte_fallback=True,
    normalization_rule_name='identity',
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
)
NO_PREFIX = IDENTITY | dict(add_dummy_prefix=False)
LOSSLESS = {
    'byte': tokenizer.ByteTokenizer,
    'gpt2': lambda: tokenizer.TiktokenTokenizer('gpt2'),
    'cut': lambda: tokenizer.TiktokenTokenizer('gpt2', 700),
    'bpe': lambda: vocabulary.open('train:bpe:700', lambda: [TEXT]),
    'sentencepiece': lambda: vocabulary.open('train:sentencepiece:700', lambda: [TEXT]),
    'unigram': lambda: vocabulary.open(
        'train:sentencepiece:700', lambda: [TEXT], model_type='unigram'
    ),
    'as Llama': lambda: sentencepiece(model_type='bpe', **IDENTITY),
    'defined': lambda: sentencepiece(
        model_type='bpe', user_defined_symbols=['\n', '<x>'], **NO_PREFIX
    ),
}
KINDS = LOSSLESS | {
    'as T5': sentencepiece,
    'as BERT': wordpiece,
    'merged': lambda: sentencepiece(model_type='bpe', normalization_rule_name='nfkc'),
}


@functools.cache
def make(name):
    pytest.importorskip('tokenizers')
    pytest.importorskip('sentencepiece')
    try:
        return KINDS[name]()
    except OSError:
        pytest.skip("tiktoken's gpt2 is not in TIKTOKEN_CACHE_DIR, and there is no network")


def texts(own):
    """Texts of hard pieces, special tokens among them."""
    marks = [own.decode([own.eot])] if own.eot is not None else []
    pieces = [
        ' ',
        '\n',
        '\t',
        "'s",
        'the',
        ' The',
        '0',
        '.',
        'é',
        'e\u0301',
        '日',
        '🚀',
        '\u00a0',
        *marks,
    ]
    some = st.text(
        st.characters(exclude_categories=['Cs'], exclude_characters='\u2581'), max_size=4
    )
    return st.lists(some | st.sampled_from(pieces), max_size=20).map(''.join)


# ---- text and ids --------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize('name', LOSSLESS)
def test_a_text_comes_back(name, data):
    own = make(name)
    assert own.lossless
    for text in (data.draw(texts(own)), *HARD):
        assert own.decode([int(i) for i in own.encode_ordinary(text)]) == text
        # which sees the text behind a special token as another text's beginning
        if name != 'as Llama':
            assert own.decode(own.encode(text)) == text


def test_whole_files_come_back():
    for name in ('bpe', 'sentencepiece', 'unigram'):
        own = make(name)
        ids = own.encode(TEXT)
        assert own.decode(ids) == TEXT and len(TEXT) / len(ids) > 1.8, name  # and are shorter


def test_a_byte_pair_encoding_is_faster_as_tiktokens():
    own = make('bpe')
    slow = tokenizer.HuggingFaceTokenizer(
        own.json.replace('"ignore_merges": true', '"ignore_merges": false')
    )
    assert own.as_tiktoken and not slow.as_tiktoken
    for text in (*HARD, *fuzz('<|endoftext|>', n=1000), TEXT):
        assert (
            own.encode_ordinary(text).tolist()
            == own._encode(text, special_is_plain=True)
            == slow.encode_ordinary(text)
        )


@pytest.mark.parametrize('name', KINDS)
def test_a_special_token_is_plain_text_in_a_document(name):
    own = make(name)
    if own.eot is None:
        return
    mark = own.decode([own.eot])
    assert own.encode(f'a {mark} b').count(own.eot) == 1
    assert own.eot not in list(own.encode_ordinary(f'a {mark} b'))
    assert mark in {'<|endoftext|>', '</s>', '[SEP]'}


@pytest.mark.parametrize('name', KINDS)
def test_it_comes_back_from_its_description(name):
    own = make(name)
    back = tokenizer.load(json.loads(json.dumps(own.describe())))
    assert back.describe() == own.describe()
    assert (back.vocab_size, back.eot, back.lossless) == (own.vocab_size, own.eot, own.lossless)
    assert back.encode(TEXT[:3000]) == own.encode(TEXT[:3000])


@pytest.mark.parametrize('name', KINDS)
def test_a_text_that_comes_token_by_token_is_the_text_that_they_are(name):
    own = make(name)
    for text in (*HARD, TEXT[:300], '日本語 naïve 🚀. The end!'):
        ids = own.encode(text)
        for start in range(1, len(ids), 7):
            out, prompt = TextStream(own), own.decode(ids[:start])
            if '\ufffd' not in prompt:  # else half of a character is in it
                said = ''.join(out.add([i]) for i in ids[start:]) + out.add([], final=True)
                assert prompt + said == own.decode(ids)


def test_what_stands_behind_a_word():
    """A token's text at a beginning, and behind another."""
    for name, first, second in (
        ('as Llama', 'the', ' the'),
        ('as BERT', 'the', ' the'),
        ('gpt2', 'the', 'the'),
    ):
        i = make(name).encode('the')
        assert (make(name).decode(i), make(name).decode_bytes(i).decode()) == (first, second)


def test_spaces_behind_words():
    """GPT-1's kind."""
    bpe = pytest.importorskip('tokenizers').CharBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=400, show_progress=False)
    own = tokenizer.HuggingFaceTokenizer(bpe._tokenizer.to_str())
    ids = own.encode('the end is near')
    assert (
        own.decode(ids)
        == 'the end is near '
        == own.decode(ids[:1]) + own.decode_bytes(ids[1:]).decode()
    )


def test_what_a_lossy_kind_loses():
    assert make('as BERT').decode(make('as BERT').encode(' The\n\nÉND ')) == 'the end'
    assert make('as T5').decode(make('as T5').encode(' two  spaces\nｅnd')) == 'two spaces end'
    assert not make('as BERT').lossless and not make('as T5').lossless


# ---- out and in ----------------------------------------------------------------------------------


def written(folder, own):
    """`folder`, with the files of a tokenizer."""
    folder.mkdir(exist_ok=True)
    for name, value in tokenizer_files.to_files(own, 64).items():
        text = value if type(value) in (str, bytes) else json.dumps(value)
        (folder / name).write_bytes(text if type(text) is bytes else text.encode())
    return folder


def assert_same_there(own, folder, fuzz):
    """transformers gives the same ids and texts with what is exported."""
    other = pytest.importorskip('transformers').AutoTokenizer.from_pretrained(written(folder, own))
    other.model_max_length = 10**9
    for text in (*HARD, *fuzz, *(TEXT[i : i + 500] for i in range(0, 30_000, 500))):
        ids = own.encode(text)
        assert other(text, add_special_tokens=False)['input_ids'] == ids
        assert other.decode(ids) == own.decode(ids)
    assert other.eos_token_id == own.eot


def fuzz(*more, n=300):
    draw = random.Random(1)
    pieces = [
        ' ',
        '\n',
        '\t',
        "'s",
        "'LL",
        "'ſ",
        'the',
        ' The',
        'A',
        '0',
        '12345',
        '.',
        'é',
        '日',
        '🚀',
        '\u00a0',
        '\u2029',
        '!!',
        '\r\n',
        '    ',
        '_x',
        '//\n',
        '٣٤',
        '\u3000',
        'ǅ',
        *more,
    ]
    return [''.join(draw.choices(pieces, k=draw.randint(1, 25))) for _ in range(n)]


@pytest.mark.parametrize('name', sorted(KINDS.keys() - {'byte', 'gpt2', 'cut', 'unigram', 'as T5'}))
def test_ids_and_texts_are_the_same_in_transformers(tmp_path, name):
    own = make(name)
    ends = []
    if own.eot is not None:
        ends.append(own.decode([own.eot]))
    assert_same_there(own, tmp_path, fuzz(*ends, '<0x41>', '<unk>', '\u2581'))
    assert tokenizer_files.from_files(tmp_path) == own.describe()


@pytest.mark.parametrize('name', ['unigram', 'as T5'])
def test_a_unigram_model_there_says_the_same_as_often(tmp_path, name):
    """Where two ways to cut a text are as likely, another one may be taken there."""
    own, differ = make(name), 0
    other = tokenizer.HuggingFaceTokenizer(own.to_json())
    for text in (*HARD, *fuzz('</s>', '<0x41>', '<unk>')):
        ids, theirs = own.encode(text), other.encode(text)
        assert other.decode(theirs) == own.decode(ids) and sorted(theirs) == sorted(ids)
        differ += theirs != ids
    assert differ < 10 and other.eot == own.eot


@pytest.mark.parametrize('name', ['p50k_base', 'cl100k_base', 'o200k_base'])
def test_tiktokens_other_ways_to_divide_a_text(tmp_path, monkeypatch, name):
    """The encoding's own pattern and special tokens, with some of GPT-2's entries: its own file is
    a large download."""
    public, ranks = (
        pytest.importorskip('tiktoken_ext.openai_public'),
        make('cut').encoding._mergeable_ranks,
    )
    monkeypatch.setattr(public, 'load_tiktoken_bpe', lambda *args, **kwargs: ranks)
    facts = {**getattr(public, name)(), 'explicit_n_vocab': None}
    facts['special_tokens'] = {text: 700 + 2 * i for i, text in enumerate(facts['special_tokens'])}
    import tiktoken

    monkeypatch.setattr(tiktoken, 'get_encoding', lambda _: tiktoken.Encoding(**facts))
    assert_same_there(
        tokenizer.TiktokenTokenizer(name),
        tmp_path,
        fuzz('<|endoftext|>', "'RE", '\x85', '²', n=1000),
    )


@pytest.mark.parametrize(
    'options, what',
    [
        (dict(model_type='char'), 'single characters'),
        (dict(treat_whitespace_as_suffix=True), 'spaces that end a word'),
        (dict(user_defined_symbols=['<x>']), 'behind a dummy prefix'),
    ],
)
def test_a_model_that_no_tokenizer_json_can_say(options, what):
    with pytest.raises(ValueError, match=f"can't be exported: .*{what}"):
        sentencepiece(**options).to_json()


def test_folders_from_elsewhere(tmp_path):
    """sentencepiece's file alone; BERT's vocab.txt; an end of a text that only
    tokenizer_config.json knows."""
    llama, bert, bpe = (
        written(tmp_path / name, make(name)) for name in ('as Llama', 'as BERT', 'bpe')
    )
    (llama / 'tokenizer.json').unlink()
    assert vocabulary.open(llama).describe() == make('as Llama').describe()
    assert vocabulary.open(llama / 'tokenizer.model').describe() == make('as Llama').describe()
    vocab = json.loads((bert / 'tokenizer.json').read_text(encoding='utf-8'))['model']['vocab']
    (bert / 'vocab.txt').write_text('\n'.join(vocab) + '\n', encoding='utf-8')
    (bert / 'tokenizer.json').unlink()
    assert vocabulary.open(bert).describe() == make('as BERT').describe()
    (bert / 'tokenizer_config.json').write_text('{"do_lower_case": false}')
    assert (
        vocabulary.open(bert).encode('É')
        == vocabulary.open(bert).encode('日')
        != make('as BERT').encode('É')
    )
    text = (bpe / 'tokenizer.json').read_text(encoding='utf-8').replace('<|endoftext|>', '<|stop|>')
    (bpe / 'tokenizer.json').write_text(text, encoding='utf-8')
    assert vocabulary.open(bpe).eot is None
    (bpe / 'tokenizer_config.json').write_text('{"eos_token": {"content": "<|stop|>"}}')
    own = vocabulary.open(bpe)
    assert (
        own.describe()['eot'] == '<|stop|>' and tokenizer.load(own.describe()).eot == own.eot == 699
    )
    assert (
        json.loads((written(tmp_path / 'again', own) / 'tokenizer_config.json').read_text())[
            'eos_token'
        ]
        == '<|stop|>'
    )


# ---- names ---------------------------------------------------------------------------------------


def test_names(tmp_path):
    assert vocabulary.open('char', lambda: iter(['ba', 'ca'])).describe() == {
        'kind': 'char',
        'chars': 'abc',
    }
    assert vocabulary.open('byte').describe() == {'kind': 'byte'}
    write_bins(tmp_path, make('bpe'), {'train': ['some text'], 'val': ['text']})
    assert vocabulary.open(tmp_path).describe() == make('bpe').describe()


@pytest.mark.parametrize(
    'name',
    [
        pytest.param('train:bpe:400', marks=needs('tokenizers')),
        pytest.param('train:sentencepiece:400', marks=needs('sentencepiece')),
    ],
)
def test_a_text_trains_the_same_vocabulary_again(name, monkeypatch):
    pieces = [TEXT[i : i + 5000] for i in range(0, 40_000, 5000)]
    first, again = (vocabulary.open(name, lambda: iter(pieces)) for _ in range(2))
    assert first.vocab_size == 400 and first.describe() == again.describe()
    monkeypatch.setattr(tokenizer, 'TRAINING_THREADS', 3)
    fewer = vocabulary.open(name, lambda: iter(pieces))
    assert [fewer.decode_bytes([i]) for i in range(400)] == [
        first.decode_bytes([i]) for i in range(400)
    ]


def test_a_trained_vocabulary_is_the_users(capsys):
    bpe, pieces = make('bpe'), make('sentencepiece').processor
    assert bpe.eot == 699 and set(bpe.bytes.values()) >= {bytes([b]) for b in range(256)}
    assert pieces.id_to_piece(1) == '</s>' and pieces.is_byte(2) and pieces.is_byte(257)
    long = 'abcdefghijklmnopqrstuvwxyz0123456789 ' * 200
    for n in (27, 5):
        own = vocabulary.open('train:sentencepiece:400', lambda: [long], max_piece_length=n)
        assert max(map(len, (own.decode([i]) for i in range(258, own.vocab_size)))) == n
    assert (
        'train:sentencepiece:400: the text has enough for a vocabulary of '
        in capsys.readouterr().out
    )
    assert vocabulary.open('train:bpe:9999', lambda: ['a few words']).vocab_size < 280
    assert capsys.readouterr().out == (
        'train:bpe:9999: the text has enough for a vocabulary of 265 entries, not 9,999\n'
    )
    rare = vocabulary.open(
        'train:sentencepiece:400', lambda: ['no such sign here ' * 99], byte_fallback=False
    )
    assert not rare.lossless and rare.decode(rare.encode('日')) == '<unk>'


@pytest.mark.parametrize(
    'name, options, message',
    [
        ('train:bpe:256', {}, 'has at least 257 entries, the bytes and'),
        pytest.param(
            'train:sentencepiece:257',
            {},
            r'at least \d+ entries, for its characters, the bytes, <unk> and </s>',
            marks=needs('sentencepiece'),
        ),
        ('train:bpe:many', {}, 'say train:bpe:VOCAB or train:sentencepiece:VOCAB'),
        ('train:words:300', {}, 'say train:bpe:VOCAB or train:sentencepiece:VOCAB'),
        (
            'train:bpe:300',
            {'model_type': 'unigram'},
            'has no option model_type, but max_piece_length',
        ),
        ('train:sentencepiece:300', {'model_type': 'word'}, 'use bpe or unigram'),
        pytest.param(
            'train:sentencepiece:300',
            {'character_coverage': 7},
            'character_coverage',
            marks=needs('sentencepiece'),
        ),
        (
            'byte',
            {'max_piece_length': 9},
            "only a tokenizer that is trained has such options, not 'byte'",
        ),
        ('no/where/tokenizer.json', {}, 'there is no such file or folder'),
        ('nowhere.model', {}, 'there is no such file or folder'),
        ('two words', {}, "is not a tokenizer's name: use char, byte, gpt2"),
        ('cl100', {}, "looked for on the Hugging Face Hub: NANOGPT_MIRROR=.* has no folder cl100"),
        (ROOT / 'tests', {}, 'has no tokenizer: no tokenizer.json'),
        (ROOT / 'train.py', {}, 'damaged'),
    ],
)
def test_a_name_that_stands_for_nothing(monkeypatch, tmp_path, name, options, message):
    monkeypatch.setenv('NANOGPT_MIRROR', str(tmp_path))
    with pytest.raises((ValueError, OSError), match=message) as caught:
        vocabulary.open(name, lambda: iter([TEXT[:5000]]), **options)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'name',
    [
        pytest.param('train:bpe:300', marks=needs('tokenizers')),
        pytest.param('train:sentencepiece:300', marks=needs('sentencepiece')),
        'char',
    ],
)
def test_what_is_wrong_with_the_text_is_said_as_it_is(name):
    def broken():
        yield 'some words ' * 50
        raise ValueError('line 7 is not UTF-8')

    with pytest.raises(ValueError, match='^line 7 is not UTF-8$'):
        vocabulary.open(name, broken)


@pytest.mark.parametrize(
    'package, description',
    [
        ('tokenizers', {'kind': 'huggingface', 'json': '{}'}),
        ('sentencepiece', {'kind': 'sentencepiece', 'model': ''}),
    ],
)
def test_without_the_package(monkeypatch, package, description):
    monkeypatch.setitem(sys.modules, package, None)
    for call in (
        lambda: tokenizer.load(description),
        lambda: vocabulary.open(
            f"train:{'bpe' if package == 'tokenizers' else package}:300", lambda: [TEXT]
        ),
    ):
        with pytest.raises(ValueError, match=f'pip install {package}'):
            call()


# ---- the Hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The folder whose files a server answers for as the Hub does."""
    with Hub(tmp_path / 'served') as server:
        monkeypatch.setenv('NANOGPT_MIRROR', server.url)
        constants = importlib.import_module('huggingface_hub.constants')
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
        monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
        yield server.models


@needs('tokenizers')
@needs('sentencepiece')
def test_a_models_tokenizer_on_the_hub(hub, capsys):
    hub.mkdir()
    bert = written(hub / 'bert-of-a-kind', make('as BERT'))
    assert vocabulary.open('bert-of-a-kind').describe() == make('as BERT').describe()
    assert f"from the Hugging Face Hub, revision {COMMIT}" in capsys.readouterr().out
    (hub / 'some').mkdir()
    written(hub / 'some' / 'llama', make('as Llama'))
    (hub / 'some' / 'llama' / 'tokenizer.json').unlink()
    assert vocabulary.open('some/llama').describe() == make('as Llama').describe()
    (bert / 'tokenizer.json').rename(hub / 'other.json')
    for name, message in (
        ('closed/model', 'open only to those who accepted its terms: .*`hf auth login`'),
        ('no-such-model', "the Hugging Face Hub has no model 'no-such-model'"),
    ):
        with pytest.raises(OSError, match=message):
            vocabulary.open(name)


def test_a_folder_in_place_of_the_hub(monkeypatch, tmp_path):
    written(tmp_path / 'bert-base-uncased', make('as BERT'))
    monkeypatch.setenv('NANOGPT_MIRROR', str(tmp_path))
    assert vocabulary.open('bert-base-uncased').describe() == make('as BERT').describe()


# ---- figures per byte ----------------------------------------------------------------------------


@pytest.fixture
def results(monkeypatch, tmp_path):
    """results(words…) -> {metric: value} of evaluate.py's bpb, of a random model of BERT's
    tokens."""
    torch.manual_seed(1)
    own = make('as BERT')
    model = models.build(
        'gpt', block_size=16, vocab_size=own.vocab_size, n_layer=1, n_head=2, n_embd=16
    )
    torch.save(
        {
            'model': model.state_dict(),
            'model_args': vars(model.config),
            'model_name': 'gpt',
            'tokenizer': own.describe(),
        },
        tmp_path / 'model.pt',
    )

    def call(*words):
        monkeypatch.setattr(
            sys,
            'argv',
            [
                'evaluate.py',
                '--device=cpu',
                f'--init_from={tmp_path}/model.pt',
                '--tasks=bpb',
                *words,
            ],
        )
        return runpy.run_path(str(ROOT / 'evaluate.py'))['results']['bpb']

    return call


def test_a_lossy_tokenizers_bytes_are_the_texts(results, tmp_path):
    text = 'The  ÉND,\n\n\n of it all. ' * 40
    (tmp_path / 'text.txt').write_text(text, encoding='utf-8')
    (tmp_path / 'data').mkdir()
    write_bins(
        tmp_path / 'data', make('as BERT'), {'train': [text], 'val': ['other text'], 'test': [text]}
    )
    n_ids = len(make('as BERT').encode(text))
    whole, limited = (
        results(f'--dataset={tmp_path}/text.txt'),
        results(f'--dataset={tmp_path}/text.txt', '--limit=5'),
    )
    assert whole['bytes'] == len(text.encode()) and whole['tokens'] == n_ids - 1
    assert limited['bytes'] == len(text.encode()) * 80 // n_ids  # of a part, its share
    assert whole['word_perplexity'] == pytest.approx(
        math.exp(whole['loss'] * n_ids / 201), rel=1e-4
    )  # 5 words, 40 times
    bins = results(f'--dataset={tmp_path}/data', '--split=test')
    assert 'word_perplexity' not in bins and bins.items() <= whole.items()
