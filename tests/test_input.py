"""Hostile and broken input. Whatever stands on a command line, in a config file, a checkpoint or a
dataset: a script takes it as it stands, or ends with one line and exit code 2. No code of a file's
is run, nothing hangs, nothing is lost.
"""

import ast
import contextlib
import copyreg
import dataclasses
import io
import itertools
import json
import math
import pickle
import re
import shutil
import time
import tracemalloc
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from support.mistakes import check
from support.needs import needs
from support.outcomes import same
from support.scripts import ROOT, TINY
from support.settings import train_settings

import models
from interop import huggingface
from model import GPTConfig
from models.parts import construction
from text import (
    dataset,
    dataset_option,
    folders,
    meta_pkl,
    sources,
    tokenizer,
    tokenizer_files,
    vocabulary,
)
from text.meta import read_meta
from text.shards import Shards
from text.sources import cutting
from text.sources.compression import opened
from text.sources.formats import JsonLines, source_file
from text.sources.hub_dataset import is_wanted
from training import checkpoint, metrics, pretrained, resume

# bytes that a script may take beside what torch has; with more asked for, it has to say so
MEMORY = 1 << 30


# ---- generated command lines and config files ----------------------------------------------------

ZOO = ['gpt', *sorted(path.stem for path in (ROOT / 'models').glob('[a-z]*.py'))]
SETTINGS = train_settings()
FIELDS = {
    name: {f.name: f.default for f in dataclasses.fields(models.architecture(name).Config)}
    for name in ZOO
}
COUNTS = [
    0,
    1,
    2,
    3,
    4,
    8,
    16,
    64,
    -1,
    -(2**63),
    127,
    10**4,
    10**9,
    2**31 - 1,
    2**31,
    2**32,
    2**40,
    2**62,
    2**63 - 1,
    2**63,
]
RATES = [
    0.0,
    0.1,
    0.5,
    0.9,
    1.0,
    1e-3,
    3.0,
    -0.0,
    -1e-300,
    5e-324,
    1e-45,
    1e-8,
    1e38,
    1e39,
    1e300,
    1e308,
    -1e308,
    math.nan,
]
NAMES = [
    '',
    ' ',
    '.',
    '..',
    '-',
    '--',
    '~',
    '/dev/null',
    '/dev/zero',
    '/dev/full',
    '/proc/self/mem',
    '/proc/x/y',
    'a/b',
    '../x',
    'C:\\x',
    '\\\\host\\share',
    'a\nb',
    'a\tb',
    '%s%n',
    '{}',
    '$HOME',
    '`id`',
    'x' * 300,
    'x/' * 3000,
    'é',
    '\u202e',
    '🚀',
    'None',
    'True',
    '0',
    'a:1,b:1',
    'a:0.5',
    ':',
    ',',
    'a:1e999,b:1',
    'random:1,random:2',
    'random',
    'openwebtext',
    'resume',
    'scratch',
    'gpt2',
    'auto',
    'auto:gpt2',
    "__import__('os').system('id')",
]
KNOWN = {
    'model': ZOO,
    'device': ['cpu', 'cuda', 'cuda:0', 'mps', 'meta', 'cpu:0', 'xla', 'cuda:99999999999999999999'],
    'dtype': ['float32', 'bfloat16', 'float16', 'float64', 'int8'],
    'compile': ['False', 'auto', 'None', '1'],
    'attention': ['sdpa', 'plain'],
    'optimizer': ['adamw', 'sgd'],
    'lr_schedule': ['cosine', 'step'],
    'gelu': ['exact', 'tanh', 'relu'],
    'rope_scaling': ['none', 'linear', 'llama3'],
    'log_to': ['tensorboard', ',', 'tensorboard,tensorboard'],
    'attention_kind': [
        'mha',
        'gqa',
        'mqa',
        'sliding',
        'banded',
        'differential',
        'mla',
        'gated',
        'sinks',
        'alibi',
    ],
}
ODD = [
    '',
    'auto',
    'None',
    '[]',
    '()',
    '{}',
    "'8'",
    '1e999',
    '0x10',
    '1_0',
    '1j',
    '9' * 5000,
    '(' * 2000,
    '-' * 3000 + '1',
    '\ufeff1',
    '1\n',
    'nan',
    'inf',
    '-inf',
    'True',
    'False',
    '4.0',
    '1if 1',
    '\\d',
    '\x1b[2J',
    'lambda: 1',
    '10**9',
    '½',
]
PROGRAMS = [
    'import math',
    'max_iters = max_iters',
    'batch_size *= 2',
    'block_size = batch_size // 2',
    '_x = 1',
    'x',
    'del seed',
    'seed = None',
    'seed = b"x"',
    'bias = ...',
    'raise SystemExit',
    'exit()',
    '1 / 0',
    'raise BaseException("no")',
    'def f(): f()\nf()',
    'globals().clear()',
    'n_layer = n_head = True',
    'while 0: pass',
    'out_dir = device',
    'import numpy\nn_head = numpy.int64(2)',
    'n_embd = 1.6e1',
    'class seed: pass',
    'seed = [1] * 3',
    'print("hello")',
    'dataset = "\\0"',
    'dataset = "\\ud800"',
    'out_dir = "\\ud800"',
    'out_dir = "a\\0b"',
    'wandb_project = "\\ud800"',
    'model = "\\0"',
    'seed = -True',
    'from nowhere import *',
    'return',
    'await x',
    'max_iters = 1e0',
    'bias = 1',
    'lr = 1e-3\nlearning_rate = lr',
    'lr = 1e-3',
    'vocab_size = 65',
    'for i in range(2): seed = i',
    'from pathlib import Path\nwandb_project = Path("a")',
    'from math import *',
    'from config.names import *',
    'from config.nope import *',
    'import torch\ndtype = torch.float32',
    'import torch\ndevice = torch.device("cpu")',
]
SAME_NUMBER = {(int, float), (float, int), (int, bool)}  # 1 for 1.0, 1e3 for 1000, 1 for True
LEFT_OUT = {'profile', 'wandb_log', 'vocab_size'}  # seconds of start-up each, and a login


def text_for(random, key, default):
    """A value on the command line: most of its type, some of any."""
    if random.random() < 0.1:
        return random.choice([*ODD, *NAMES, ''.join(map(chr, random.sample(range(1, 0x3000), 3)))])
    if key in KNOWN and random.random() < 0.7:
        return random.choice(KNOWN[key])
    if type(default) is str:
        return random.choice(NAMES)
    if type(default) is bool:
        return random.choice(['True', 'False'])
    if random.random() < 0.4:
        return str(random.randint(0, 40) if type(default) is int else round(random.random(), 3))
    return repr(random.choice(COUNTS if type(default) is int else RATES))


def words_for(random, keys, mistakes=0.07):
    """One to four words of a command line over the settings {key: default}."""
    words = []
    for _ in range(random.randint(1, 4)):
        key, default = random.choice(sorted(keys.items()))
        text = text_for(random, key, default)
        words += (
            [f'--{key}={text}']
            if random.random() > mistakes
            else random.choice(
                [
                    [f'--{key}', text],
                    [f'{key}={text}'],
                    [f'--{key}'],
                    [f'--{key[:-1]}={text}'],
                    [f'-{key}={text}'],
                    [text],
                    [f'--{key.replace("_", "-")}={text}'],
                    [f'--{key} ={text}'],
                    [f'--{key}=='],
                    [random.choice(ODD)],
                ]
            )
        )
    return [word for word in words if word not in ('-h', '--help') and '\0' not in word]


def case(number):
    """(words, lines of a config file or None): the same for a number everywhere."""
    random = Random(number)
    name = random.choice(['gpt', 'gpt', 'gpt', *ZOO])
    keys = {k: v for k, v in {**SETTINGS, **FIELDS[name]}.items() if k not in LEFT_OUT}
    body, words = None, [f'--model={name}', *words_for(random, keys)]
    if random.random() < 0.25:
        body = [
            random.choice(PROGRAMS)
            if random.random() < 0.4
            else f'{key} = {text!r}'
            if random.random() < 0.4
            else f'{key} = {text}'
            for _ in range(random.randint(1, 3))
            for key in [random.choice(sorted(keys))]
            for text in [text_for(random, key, keys[key])]
        ]
    return words, body


def verdict_of(done):
    """accepted or refused, as a user may see it; else what is wrong."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith('SIGTERM: ')]
    if 'Traceback' in done.stderr or 'panicked at' in done.stderr:
        return 'a traceback'
    if done.returncode == 2:
        is_line = len(lines) == 1 and lines[0].startswith('error: ') and len(lines[0]) < 700
        return 'refused' if is_line and len(lines[0]) > 15 else 'not one line'
    return 'accepted' if done.returncode in (0, 143) else f'exit code {done.returncode}'


def coercion(words, config):
    """What of the command line's plain --key=value words a run has in another form than it was
    written, or None."""
    asked = dict(word[2:].split('=', 1) for word in words if word.startswith('--') and '=' in word)
    for key, text in asked.items():
        if key == 'init_from':  # what auto came to
            continue
        value = config.get(key)
        if type(value) is str:
            is_same = text == value or text in (repr(value), f'"{value}"')
        else:
            literal = ast.literal_eval(text)
            is_same = literal == value and (
                type(literal) is type(value) or (type(literal), type(value)) in SAME_NUMBER
            )
        if not is_same or type(SETTINGS.get(key, value)) not in (type(value), str):
            return f"{key}={text!r} became {value!r}"


def run_case(warm, folder, dataset, number, seconds=8):
    """(verdict, what the script said) of a case, run in a new folder."""
    words, body = case(number)
    place = folder / 'a' / 'b'
    place.mkdir(parents=True)
    line = words
    if body is not None:
        (place / 'fuzz.py').write_text('\n'.join(body), encoding='utf-8', errors='surrogatepass')
        line = ['fuzz.py', *words]
    fields = FIELDS[words[0].removeprefix('--model=')]
    base = [word for word in TINY if '--dropout' not in word or 'dropout' in fields]
    done = warm(
        'train.py',
        *base,
        '--max_iters=1',
        '--eval_iters=1',
        f'--dataset={dataset}',
        *line,
        cwd=place,
        seconds=seconds,
        memory=MEMORY,
        sample=not number % 10,
    )
    # it was no further than its start: slow, or hanging?
    if done.returncode == -15 and seconds < 60:
        return run_case(warm, folder / 'slow', dataset, number, 60)
    verdict, config = verdict_of(done), place / 'out' / 'config.json'
    if verdict == 'accepted' and body is None and config.is_file():
        verdict = coercion(words, json.loads(config.read_text())) or verdict
    return verdict, done


def run_cases(warm, folder, dataset, numbers):
    """Run the cases with these numbers; returns how many were accepted and refused. All others are
    in the error."""
    counts, wrong = Counter(), {}
    for number in numbers:
        verdict, done = run_case(warm, folder / str(number), dataset, number)
        counts[verdict] += 1
        if verdict not in ('accepted', 'refused'):
            wrong[number] = f"{verdict}: {case(number)}\n{done.stderr[-1500:]}"
        shutil.rmtree(folder / str(number))
    assert not wrong, '\n'.join(f"case({number}): {what}" for number, what in wrong.items())
    return counts


def test_generated_lines_and_files_are_accepted_or_refused_in_one_line(warm, tmp_path, text_folder):
    counts = run_cases(warm, tmp_path, text_folder, range(12))
    assert counts['accepted'] > 1 < counts['refused']


@pytest.mark.campaign
@pytest.mark.parametrize('hundred', range(100))
def test_ten_thousand_generated_lines_and_files(warm, tmp_path, text_folder, hundred):
    counts = run_cases(warm, tmp_path, text_folder, range(100 * hundred, 100 * hundred + 100))
    assert counts['accepted'] > 5 and counts['refused'] > 40


@pytest.mark.parametrize(
    'done, verdict',
    [
        (dict(returncode=2, stderr='error: batch_size=0 must be at least 1\n'), 'refused'),
        (dict(returncode=0, stderr=''), 'accepted'),
        (dict(returncode=143, stderr='SIGTERM: saving after this step\n'), 'accepted'),
        (
            dict(returncode=1, stderr='Traceback (most recent call last):\n  …\nKeyError: 3\n'),
            'a traceback',
        ),
        (
            dict(
                returncode=2,
                stderr='Traceback (most recent call last):\n  …\nerror: no such thing\n',
            ),
            'a traceback',
        ),
        (dict(returncode=2, stderr='one thing\nerror: another thing\n'), 'not one line'),
        (dict(returncode=2, stderr='error: 3\n'), 'not one line'),
        (dict(returncode=2, stderr=f'error: {"x" * 1000}\n'), 'not one line'),
        (dict(returncode=1, stderr=''), 'exit code 1'),
        (dict(returncode=-9, stderr=''), 'exit code -9'),
    ],
)
def test_the_judge_of_a_case(done, verdict):
    assert verdict_of(SimpleNamespace(stdout='', **done)) == verdict


@pytest.mark.parametrize(
    'word, kept',
    [
        ('--batch_size=4', 4),
        ('--batch_size=4e0', 4),
        ('--learning_rate=1', 1.0),
        ('--bias=0', False),
        ('--compile=False', False),
        ('--out_dir=1', '1'),
    ],
)
def test_the_judge_of_what_was_kept(word, kept):
    key = word[2:].split('=')[0]
    assert coercion([word], {key: kept}) is None
    for other in (0 if kept is False else False, 5, '4', None, 1.5):
        assert coercion([word], {key: other})


def said(call):
    """The one line of the ValueError or OSError that call() ends with."""
    with pytest.raises((ValueError, OSError)) as caught:
        call()
    (line,) = str(caught.value).splitlines()
    assert line.strip()
    return line


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'model, fields, message',
    [
        ('gpt', dict(n_layer=10**9), 'n_layer=1000000000 must be at most 10000'),
        ('gpt', dict(n_layer=9999, n_embd=12288), 'a GPT of these sizes has 72,'),
        ('gpt', dict(n_embd=12 * 2**40), 'a GPT of these sizes has inf GB of weights'),
        ('gpt', dict(vocab_size=2**63 - 1), 'a GPT of these sizes has inf GB of weights'),
        ('modern', dict(block_size=2**40), 'a Modern of these sizes has inf GB of weights'),
        ('modern', dict(ngram=4, ngram_rows=2**40), 'a Modern of these sizes has 3,'),
        ('transformerpp', dict(n_hidden=2**40), 'a Transformerpp of these sizes has 121,'),
        ('wavenet', dict(kernel=2**31), 'a Wavenet of these sizes has'),
        ('mlp', dict(n_hidden=2**40), 'a MLP of these sizes has'),
    ],
)
def test_a_model_too_large_for_the_machine_is_not_begun(model, fields, message):
    began = time.process_time()
    with pytest.raises(ValueError, match=re.escape(message)):
        models.build(model, **fields)
    assert time.process_time() - began < 2


@pytest.mark.parametrize('name', ZOO)
def test_weights_are_counted_without_being_made(name, monkeypatch):
    fields = {
        k: v
        for k, v in dict(n_layer=5, n_embd=24, n_head=2, block_size=16).items()
        if k in FIELDS[name]
    }
    model = models.build(name, vocab_size=50, **fields)
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    monkeypatch.setattr(construction, 'memory_bytes', lambda: size)
    models.build(name, vocab_size=50, **fields)
    monkeypatch.setattr(construction, 'memory_bytes', lambda: size - 1)
    with pytest.raises(ValueError, match='use a smaller model'):
        models.build(name, vocab_size=50, **fields)


def test_counting_leaves_the_random_numbers_as_they_are():
    torch.manual_seed(1)
    one = models.architecture('gpt')(
        models.architecture('gpt').Config(n_layer=3, n_embd=24, n_head=2, vocab_size=50)
    )
    torch.manual_seed(1)
    assert same(
        models.build('gpt', n_layer=3, n_embd=24, n_head=2, vocab_size=50).state_dict(),
        one.state_dict(),
    )


OVERFLOWS = [
    (
        '--gradient_accumulation_steps=4611686018427387904',
        'are more windows in a step than 134,217,728',
    ),
    ('--batch_size=9223372036854775807', 'are more windows in a step'),
    ('--block_size=9223372036854775807', 'is larger than the train split'),
    ('--n_head=9223372036854775807', 'n_embd=16 is not divisible by n_head'),
    ('--lora_rank=9223372036854775807', "init_from='scratch' has none"),
    ('--learning_rate=1e308', 'learning_rate=1e+308 must be at most 1e+30'),
    ('--muon_lr=1e39', 'muon_lr=1e+39 must be at most'),
    ('--weight_decay=1e300', 'weight_decay=1e+300 must be at most'),
    ('--beta1=1e308', 'Invalid beta parameter at index 0: 1e+308'),
    ('--beta2=-1', 'Invalid beta parameter at index 1: -1.0'),
    ('--seed=9223372036854775808', 'seed takes a whole number'),
    ('--dataset=a:1,b:' + '9' * 5000, 'has a weight of more than 20 digits'),
]


@pytest.mark.parametrize('word, message', OVERFLOWS, ids=[word[:40] for word, _ in OVERFLOWS])
def test_numbers_beyond_all_measure(warm, text_folder, tmp_path, word, message):
    check(
        warm('train.py', *TINY, f'--dataset={text_folder}', word, cwd=tmp_path, memory=MEMORY),
        message,
    )
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'word',
    [
        '--eval_iters=9223372036854775807',
        '--seed=9223372036854775807',
        '--eval_interval=2147483648',
        '--min_lr=5e-324',
        '--warmup_iters=9223372036854775807',
        '--early_stop=4611686018427387904',
    ],
)
@pytest.mark.campaign
def test_large_numbers_that_are_right(warm, text_folder, tmp_path, word):
    done = warm('train.py', *TINY, '--max_iters=1', f'--dataset={text_folder}', word, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    'script, word, message',
    [
        ('sample.py', '--num_samples=1000000000', 'num_samples=1000000000 must be at most 1000000'),
        (
            'sample.py',
            '--num_beams=9223372036854775807',
            'num_beams=9223372036854775807 must be at most 10000',
        ),
        (
            'sample.py',
            '--num_beams=2 --length_penalty=1e308',
            'length_penalty=1e+308 must be from -100 to 100',
        ),
        ('sample.py', '--seed=9223372036854775808', 'seed takes a whole number'),
        (
            'sample.py',
            '--top_k=-9223372036854775807',
            'top_k=-9223372036854775807 must be at least 1',
        ),
        (
            'evaluate.py',
            '--stride=9223372036854775807',
            'stride=9223372036854775807 must be from 1 to 16',
        ),
        ('evaluate.py', '--batch_size=-1', 'batch_size=-1 must be at least 1'),
        ('export.py', '--folder=' + 'x/' * 3000, ''),
    ],
)
def test_numbers_beyond_all_measure_elsewhere(warm, trained, tmp_path, script, word, message):
    check(warm(script, f'--out_dir={trained}', *word.split(), cwd=tmp_path, memory=MEMORY), message)


@pytest.mark.parametrize(
    'script, word',
    [
        ('sample.py', '--top_k=9223372036854775807'),
        ('sample.py', '--seed=9223372036854775807'),
        ('sample.py', '--temperature=1e308'),
        ('evaluate.py', '--limit=9223372036854775807'),
    ],
)
def test_large_numbers_that_are_right_elsewhere(warm, trained, text_folder, tmp_path, script, word):
    more = (
        [word, '--max_new_tokens=2']
        if script == 'sample.py'
        else [word, f'--dataset={text_folder}', '--out=/dev/null']
    )
    done = warm(script, f'--out_dir={trained}', *more, cwd=tmp_path, memory=MEMORY)
    assert done.returncode == 0, done.stderr
    assert Path('/dev/null').is_char_device()  # not replaced by a file


@pytest.mark.parametrize(
    'words, message',
    [
        (['--num_proc=1000000000'], 'num_proc=1000000000 must be at most 1024'),
        (
            ['--tokenizer=train:bpe:99999999999999999999'],
            'use a vocabulary of less than ten million entries',
        ),
        (
            ['--tokenizer=train:bpe:300', '--max_piece_length=9223372036854775808'],
            'must be at most 1048576',
        ),
        (['--seed=' + '9' * 5000], 'argument --seed: invalid int value'),
        (['--split=1e999,1'], 'split=1e999,1 must be two or three shares'),
        (['--split=0.5,' + '9' * 5000], 'split=0.5,999'),
        (['--max_bytes=-1'], 'max_bytes=-1 must be at least 1'),
        (['--shard_tokens=-5'], 'shard_tokens=-5 must be at least 0'),
        (['~nobody-of-this-name/x.txt'], 'there is no such user here'),
        (['--template={}'], '{}: No such file'),
        (['--seed=--'], '--seed has no value; write --seed=VALUE'),
    ],
)
def test_preparing_beyond_all_measure(warm, tmp_path, words, message):
    (tmp_path / 'text.txt').write_text('some text\n' * 99)
    check(
        warm('data/prepare.py', tmp_path / 'made', *words, tmp_path / 'text.txt', memory=MEMORY),
        message,
    )
    assert not (tmp_path / 'made').exists()


def test_shards_may_be_larger_than_any_file(warm, tmp_path):
    (tmp_path / 'text.txt').write_text('some text\n' * 99)
    words = [
        tmp_path / 'made',
        tmp_path / 'text.txt',
        '--tokenizer=byte',
        f'--shard_tokens={2**70}',
    ]
    done = warm('data/prepare.py', *words)
    assert (
        done.returncode == 0 and (tmp_path / 'made' / 'train-00000.bin').stat().st_size == 2 * 891
    ), done.stderr


# ---- code that waits in a file -------------------------------------------------------------------

COMMAND = b"S'touch %s'\n"
PICKLES = {  # what `pickle.loads` would run, as bytes in which %s is a file's name
    'GLOBAL and REDUCE': b'cposix\nsystem\n(' + COMMAND + b'tR.',
    'INST': b'(' + COMMAND + b'iposix\nsystem\n.',
    'OBJ': b'(cposix\nsystem\n' + COMMAND + b'o.',
    'BUILD': b"ccollections\nOrderedDict\n)R}S'__setstate__'\ncposix\nsystem\nsb" + COMMAND + b'b.',
    'STACK_GLOBAL': b"\x80\x04\x8c\x05posix\x8c\x06system\x93" + COMMAND + b'\x85R.',
    'EXT1': b'\x80\x02\x82\xf0' + COMMAND + b'\x85R.',
    'EXT4': b'\x80\x02\x84\xf0\0\0\0' + COMMAND + b'\x85R.',
    'eval': b"cbuiltins\neval\n(S'__import__(\"os\").system(\"touch %s\")'\ntR.",
    'getattr': b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR("
    + COMMAND
    + b'tR.',
    'a partial': b'cfunctools\npartial\n(cposix\nsystem\n' + COMMAND + b'tR)R.',
    'a program': b"csubprocess\ncall\n((S'touch'\nS'%s'\nltR.",
    'a key': b'}(cposix\nsystem\n(' + COMMAND + b"tRS'value'\nu.",
    'behind a NumPy type': b"cnumpy\ndtype\n(S'i8'\ntRcposix\nsystem\n(" + COMMAND + b'tR0.',
    'protocol 5 in a frame': b'\x80\x05\x95\x1e\0\0\0\0\0\0\0\x8c\x05posix\x8c\x06system\x93'
    + COMMAND
    + b'\x85R.',
}


@pytest.fixture(params=PICKLES)
def payload(request, tmp_path):
    """(bytes, the file that is there once they were unpickled): one that does it, to begin with."""
    copyreg.add_extension('posix', 'system', 0xF0)
    content, marker = PICKLES[request.param] % str(tmp_path / 'pwned').encode(), tmp_path / 'pwned'
    content = content.replace(
        b'\x95\x1e\0\0\0\0\0\0\0', b'\x95' + (len(content) - 11).to_bytes(8, 'little')
    )
    pickle.loads(content)
    copyreg.clear_extension_cache()
    assert marker.exists()
    marker.unlink()
    yield content, marker
    copyreg.remove_extension('posix', 'system', 0xF0)


def in_archive(content):
    """A checkpoint's zip archive with this pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name, data in (
            ('archive/data.pkl', content),
            ('archive/byteorder', b'little'),
            ('archive/version', b'3\n'),
        ):
            archive.writestr(name, data)
    return buffer.getvalue()


def test_no_file_runs_code(payload, tmp_path, text_folder):
    content, marker = payload
    (tmp_path / 'meta.pkl').write_bytes(content)
    for name, data in (
        ('ckpt.pt', in_archive(content)),
        ('best.pt', content),
        ('pytorch_model.bin', in_archive(content)),
    ):
        (tmp_path / name).write_bytes(data)
    (tmp_path / 'config.json').write_text(json.dumps(SMALL))
    for read in (
        lambda: read_meta(tmp_path),
        lambda: meta_pkl.describe_meta_pkl(content),
        lambda: checkpoint.read_latest(tmp_path),
        lambda: pretrained.load_model(tmp_path),
        lambda: pretrained.open_model(str(tmp_path / 'ckpt.pt')),
        lambda: huggingface.read(str(tmp_path)),
        lambda: checkpoint.read(tmp_path / 'best.pt'),
    ):
        said(read)
    assert not marker.exists()


def test_the_checks_are_what_holds_code_back(payload, tmp_path, monkeypatch):
    """Without weights_only, and with an unpickler that finds everything, each payload runs."""
    content, marker = payload
    (tmp_path / 'ckpt.pt').write_bytes(in_archive(content))
    load = torch.load
    monkeypatch.setattr(
        torch, 'load', lambda *args, **options: load(*args, **{**options, 'weights_only': False})
    )
    with contextlib.suppress(ValueError):
        checkpoint.read(tmp_path / 'ckpt.pt')
    assert marker.exists()
    marker.unlink()
    monkeypatch.setattr(meta_pkl._RestrictedUnpickler, 'find_class', pickle._Unpickler.find_class)
    with contextlib.suppress(ValueError):
        meta_pkl.describe_meta_pkl(content)
    assert marker.exists()


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'.',
        b'N.',
        b'\x80\xff.',
        b'\x80\x04K\x01.',
        b'}.',
        b']q\0h\0a.',
        b'Pid\n.',
        b'\x80\x02Q.',
        b'(' * 100_000,
        b'\x80\x02Nr\xff\xff\xff\x7f.',  # an entry of the memo that would take 16 GB
        b'\x80\x04\x8e' + (1 << 60).to_bytes(8, 'little') + b'x.',  # bytes without an end
        b'\x80\x05\x96' + (1 << 60).to_bytes(8, 'little') + b'x.',
        b'\x80\x02\x8b\xff\xff\xff\x7fx.',
        b"I" + b'9' * 100_000 + b'\n.',
        pickle.dumps({'itos': 'abc'})[:-3],
        pickle.dumps({'itos': 7}),
        pickle.dumps({'itos': {0: 'a', 2: 'b'}}),
    ],
    ids=lambda content: repr(content[:12]),
)
def test_a_meta_pkl_that_is_none(content):
    tracemalloc.start()
    assert 'meta.pkl' in said(lambda: meta_pkl.describe_meta_pkl(content))
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


@pytest.mark.parametrize(
    'content',
    [
        b"cnumpy\nfromfile\n(S'/etc/passwd'\ntR.",
        # an address as an object
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O'\ntRC\x0812345678tR.",
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'V8'\ntRC\x0812345678tR.",
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'i8'\ntRC\x02abtR.",  # less than a number
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'i8'\ntRC\x1012345678abcdefghtR.",
        b"cnumpy.core.multiarray\nscalar\n(S'i8'\nC\x0812345678tR.",  # not a type
        # attributes of the stand-ins
        b"cnumpy.core.multiarray\nscalar\n(N}S'__doc__'\nS'changed'\nstb.",
        b"cnumpy\ndtype\n(N}S'__init__'\nS'changed'\nstb.",
        b"cnumpy\nndarray\n(N}S'__init__'\nS'changed'\nstb.",
        b"ccollections\nOrderedDict\n(N}S'get'\nS'changed'\nstb.",
        b"ccollections\ndefaultdict\n(N}S'__new__'\nS'changed'\nstb.",
        b"ccollections\ndefaultdict\n(cposix\nsystem\ntRS'itos'\nS'ab'\ns.",  # a function of another's
        b"ccollections\nOrderedDict\n)RN}S'get'\nS'changed'\nstb.",
        # An array of two billion numbers that does not hold them; 200 dictionaries of one list.
        b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I2000000000\ntC\x01btR(I1\n(I2000000000\nttb.",
        b"("
        + b"".join(b"(I%d\nI0\nl" % i for i in range(2000))
        + b"lp0\n0("
        + b"ccollections\nOrderedDict\n(g0\ntR" * 200
        + b"l.",
    ],
    ids=lambda content: repr(content[:12]),
)
def test_a_meta_pkl_has_no_more_of_numpy_than_plain_numbers(content):
    stand_ins = set(meta_pkl._RestrictedUnpickler.STAND_INS.values())
    before = {stand_in: {**vars(stand_in)} for stand_in in stand_ins}
    tracemalloc.start()
    assert 'meta.pkl' in said(lambda: meta_pkl.describe_meta_pkl(content))
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    assert before == {stand_in: {**vars(stand_in)} for stand_in in stand_ins}


def test_an_old_optimizer_state_runs_no_code(payload, trained, tmp_path):
    """nanoGPT's checkpoints hold the optimizer's state: there too only plain types are made."""
    content, marker = payload
    with zipfile.ZipFile(trained / 'ckpt.pt') as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    (name,) = (name for name in members if name.endswith('/data.pkl'))
    inside = members[name]
    at = inside.index(b'optimizer') + len(b'optimizer')
    at = inside.index(b'}', at)  # the dictionary behind it
    members[name] = (
        inside[:at] + content.removesuffix(b'.').removeprefix(b'\x80\x02') + inside[at + 1 :]
    )
    with zipfile.ZipFile(tmp_path / 'ckpt.pt', 'w') as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    with pytest.raises(ValueError, match='ckpt.pt'):
        checkpoint.read_latest(tmp_path)
    assert not marker.exists()


# ---- names that lead elsewhere -------------------------------------------------------------------


@pytest.mark.parametrize(
    'name', ['{outside}', '../{up}', 'x:1,{outside}:2', 'x/../../{up}', './../{up}']
)
def test_only_what_lies_in_data_prepares_itself(tmp_path, monkeypatch, name):
    """A folder from elsewhere may be trained on, but its prepare.py is not run."""
    root, outside = tmp_path / 'data', tmp_path / 'outside'
    for folder in (root / 'x', outside):
        folder.mkdir(parents=True)
        (folder / 'prepare.py').write_text("DOWNLOAD_MB = 1\nopen(__file__ + '.ran', 'w')\n")
    monkeypatch.setattr(folders, 'DATA_FOLDER', root)
    with contextlib.suppress(SystemExit):
        dataset_option.prepare_if_small(name.format(outside=outside, up='outside'))
    assert not (outside / 'prepare.py.ran').exists()
    dataset_option.prepare_if_small('x')
    assert (root / 'x' / 'prepare.py.ran').exists()


@pytest.mark.parametrize(
    'name, is_taken',
    [
        ('a.txt', True),
        ('below/a.jsonl', True),
        ('a..b.txt', True),
        ('../a.txt', False),
        ('x/../../a.txt', False),
        ('/etc/a.txt', False),
        ('C:/a.txt', False),
        ('C:\\a.txt', False),
        ('\\\\host\\a.txt', False),
        ('a\0.txt', False),
        ('a\nb.txt', False),
        ('a\x1b[2J.txt', False),
        ('a.py', False),
        ('..', False),
        ('', False),
    ],
)
def test_names_in_a_listing_of_the_hub(name, is_taken):
    assert is_wanted(name) is is_taken


@pytest.mark.parametrize(
    'name',
    [
        '../secret.safetensors',
        '/etc/secret.safetensors',
        'a/../../secret.bin',
        'config.json',
        'model.safetensors.index.json',
        '',
        3,
        None,
        ['a.safetensors'],
    ],
)
def test_names_in_an_index_of_weights(tmp_path, name):
    safetensors.torch.save_file({'w': torch.ones(3)}, tmp_path / 'secret.safetensors')
    (tmp_path / 'hf').mkdir()
    (tmp_path / 'hf' / 'config.json').write_text(json.dumps(SMALL))
    (tmp_path / 'hf' / 'model.safetensors.index.json').write_text(
        json.dumps({'weight_map': {'w': name}})
    )
    with pytest.raises(ValueError, match='index.json is damaged or not plain weights'):
        pretrained.open_model(str(tmp_path / 'hf'))


@pytest.mark.parametrize(
    'name',
    [
        'train-00000.bin.bin',
        'train--1.bin',
        'train-1e9.bin',
        'train-\u0661.bin',
        'train-0.bin',
        'train-00001.bin',
        'train-99999999999999999999.bin',
        'train-00000.bin',
    ],
)
def test_names_of_shards(text_folder, tmp_path, name):
    """Only train-00000.bin, train-00001.bin and so on are taken; what looks like them is named, or
    none of ours."""
    folder = shutil.copytree(text_folder, tmp_path / 'text')
    (folder / name).write_bytes(b'\1\0' * 40)
    try:
        assert len(Shards(folder, 'train', 'bin', 'uint16')) == 3600
    except ValueError as error:
        assert name in str(error) or 'train-00000.bin is missing' in str(error)


# ---- texts, numbers and archives that are too much -----------------------------------------------

NESTED = '[' * 100_000, '{"a":' * 100_000, '[' * 100_000 + ']' * 100_000
SMALL = dict(model_type='gpt2', n_embd=16, n_layer=1, n_head=2, n_positions=16, vocab_size=65)
LLAMA = dict(
    model_type='llama',
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=16,
    vocab_size=65,
)


UNREADABLE_JSON = [*NESTED, '9' * 5000, 'NaN', '"', '\ufeff{}', '\\ud800']


@needs('tokenizers')
@pytest.mark.parametrize('text', UNREADABLE_JSON, ids=lambda text: text[:9])
def test_a_tokenizer_of_json_that_no_reader_takes(text):
    assert 'tokenizer.json is damaged' in said(
        lambda: tokenizer.load({'kind': 'huggingface', 'json': text})
    )


@pytest.mark.parametrize('text', UNREADABLE_JSON, ids=lambda text: text[:9])
def test_json_that_no_reader_takes(text, tmp_path, trained):
    for name in (
        'meta.json',
        'config.json',
        'tokenizer.json',
        'tokenizer_config.json',
        'vocab.json',
        'sums.json',
    ):
        (tmp_path / name).write_text(text)
    (tmp_path / 'merges.txt').write_text('a b')
    (tmp_path / 'model.safetensors').write_bytes(b'')
    assert 'meta.json cannot be read' in said(lambda: read_meta(tmp_path))
    assert 'meta.json' in said(lambda: vocabulary.open(tmp_path))
    assert 'config.json' in said(lambda: huggingface.read(str(tmp_path)))
    if text != '\ufeff{}':  # Hugging Face's files may begin with a byte order mark
        assert 'the tokenizer in' in said(lambda: tokenizer_files.from_files(tmp_path))
        assert 'the tokenizer in' in said(
            lambda: tokenizer_files.from_file(tmp_path / 'merges.txt')
        )
    assert 'does not say what the run was trained on' in said(
        lambda: pretrained.dataset_of(tmp_path)
    )
    assert (
        checkpoint._read_sums(tmp_path) == {}
        and pretrained._preferred_checkpoints(tmp_path)[0] == 'best.pt'
    )
    assert (
        resume.model_config(dict(model='gpt', init_from='resume', out_dir=str(tmp_path)))
        is GPTConfig
    )
    assert not metrics._is_before(text, 9, 9)
    assert 'not JSON' in said(lambda: JsonLines.parse(b'{"text": ' + text.encode()))


@pytest.mark.parametrize(
    'change',
    [
        dict(vocab_size=-1),
        dict(vocab_size=0),
        dict(vocab_size=2**70),
        dict(vocab_size=True),
        dict(vocab_size=65.0),
        dict(dtype='uint8'),
        dict(dtype=None),
        dict(separator=-1),
        dict(separator='x'),
        dict(eot=10**9),
        dict(eot=1.5),
        dict(splits={'train': {'tokens': 3600, 'bytes': 10**400}}),
        dict(splits={'train': {'tokens': -1, 'bytes': 1}}),
        dict(splits={'train': {'tokens': 3600, 'bytes': 0}}),
        dict(splits={'train': 3}),
        dict(splits={'val': {'tokens': '3'}}),
        dict(tokenizer={'kind': 'tiktoken', 'name': 'gpt2', 'size': 10**400}),
        dict(tokenizer={'kind': [], 'chars': ''}),
        dict(tokenizer={'kind': 'sentencepiece', 'model': 3}),
        dict(masked=True),
    ],
    ids=str,
)
def test_a_meta_json_with_other_numbers(change, text_folder, tmp_path):
    folder = shutil.copytree(text_folder, tmp_path / 'text')
    meta = json.loads((folder / 'meta.json').read_text())
    (folder / 'meta.json').write_text(json.dumps(meta | change))
    assert str(folder) in said(lambda: dataset.Dataset(str(folder), 16, 4))


@pytest.mark.parametrize(
    'base, change',
    [
        (base, {key: value})
        for base in (SMALL, LLAMA)
        for key in base
        for value in (0, -1, 10**9, 2**63, 1.5, '16', None, [16], True)
    ]
    + [(LLAMA, {'num_key_value_heads': value}) for value in (-1, 3, 10**9, '1', [1])]
    + [(LLAMA, {'rope_theta': value}) for value in ('x', [1], {})]
    + [(LLAMA, {'rope_scaling': value}) for value in (3, 'x', [1])],
    ids=str,
)
def test_a_config_json_of_hugging_faces_with_other_numbers(base, change, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(base | change))
    safetensors.torch.save_file(
        {'model.norm.weight': torch.ones(16), 'wte.weight': torch.ones(65, 16)},
        tmp_path / 'model.safetensors',
    )
    said(lambda: pretrained.open_model(str(tmp_path)))


def header(size=None, **entries):
    """A .safetensors file: the length of its header, the header, 16 bytes."""
    text = json.dumps(entries).encode()
    return (len(text) if size is None else size).to_bytes(8, 'little') + text + bytes(16)


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'\0' * 7,
        header(2**63),
        header(2**30),
        header(0),
        header(w=3),
        header(w={}),
        b'\x05\0\0\0\0\0\0\0{{{{{',
        header(w=dict(dtype='F32', shape=[4], data_offsets=[0, 1 << 40])),
        header(w=dict(dtype='F32', shape=[4], data_offsets=[16, 0])),
        header(w=dict(dtype='F32', shape=[1 << 62], data_offsets=[0, 16])),
        header(w=dict(dtype='F32', shape=[2**32, 2**32], data_offsets=[0, 16])),
        header(w=dict(dtype='F99', shape=[4], data_offsets=[0, 16])),
        header(
            v=dict(dtype='F32', shape=[4], data_offsets=[0, 16]),
            w=dict(dtype='F32', shape=[4], data_offsets=[0, 16]),
        ),
        (100_000).to_bytes(8, 'little') + b'[' * 100_000,
    ],
    ids=lambda content: repr(content[8:50]),
)
def test_safetensors_with_a_false_header(content, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(SMALL))
    (tmp_path / 'model.safetensors').write_bytes(content)
    assert 'model.safetensors' in said(lambda: pretrained.open_model(str(tmp_path)))


@pytest.mark.parametrize(
    'stored',
    [
        {'wte.weight': torch.ones(3)},
        {'wte.weight': torch.ones(1).expand(1 << 40, 16)},
        {1: torch.ones(3)},
        {'wte.weight': 3},
        {'h.0.attn.c_attn.weight': torch.ones(1, 1, 1)},
        {'wte.weight': torch.eye(3).to_sparse()},
        {},
        [1],
        torch.ones(3),
    ],
    ids=lambda stored: str(stored)[:30],
)
@pytest.mark.parametrize('base', [SMALL, LLAMA], ids=['gpt2', 'llama'])
def test_weights_of_hugging_faces_that_are_others(base, stored, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(base))
    torch.save(stored, tmp_path / 'pytorch_model.bin')
    said(lambda: pretrained.open_model(str(tmp_path)))


def packed(kind, content, times):
    """`content` so many times, packed."""
    if kind == 'gz':
        packer = zlib.compressobj(9, wbits=31)
    else:
        packer = pytest.importorskip('zstandard').ZstdCompressor().compressobj()
    return b''.join([*(packer.compress(content) for _ in range(times)), packer.flush()])


@pytest.mark.parametrize('kind', ['gz', 'zst'])
@pytest.mark.parametrize('name', ['bomb.txt', 'bomb.jsonl'])
def test_a_bomb_is_read_in_pieces(kind, name, tmp_path, monkeypatch):
    """A small file that unpacks to 300 MB on one line is never whole in memory; as a row it is
    refused."""
    monkeypatch.setattr(cutting, 'LONGEST_ROW', 1 << 24)
    path = tmp_path / f'{name}.{kind}'
    path.write_bytes(packed(kind, b'x' * (1 << 20), 300))
    assert path.stat().st_size < 400_000
    file = source_file(path.name, path)
    tracemalloc.start()
    with opened(file) as (_, stream):
        head = stream.read(cutting.PIECE + 1)
        chunks = cutting.cut(file, stream, head, cutting.DIVISIONS['line'])
        if name == 'bomb.jsonl':
            assert 'is a row of more than 16,777,216 bytes' in said(lambda: list(chunks))
        else:
            assert sum(len(chunk.data) for chunk in itertools.islice(chunks, 3)) > 10e6
    assert tracemalloc.get_traced_memory()[1] < 200e6
    tracemalloc.stop()


@pytest.mark.parametrize('kind', ['gz', 'zst'])
def test_damaged_archives_of_texts(kind, tmp_path):
    whole = packed(kind, b'some text\n' * 10_000, 20)
    for content in (b'', b'text', whole[:20], whole[:-3], whole[:30] + bytes(9) + whole[39:]):
        (tmp_path / f'text.txt.{kind}').write_bytes(content)
        try:
            found = sources.open([tmp_path / f'text.txt.{kind}'], document='line')
            list(found.texts())
        except ValueError as error:
            assert f'text.txt.{kind}' in str(error) and '\n' not in str(error)
        else:
            assert (
                content in (b'', whole[:30] + bytes(9) + whole[39:]) and kind == 'gz'
            ) or content == b''


# ---- generated command lines of the other scripts ------------------------------------------------

SCRIPTS = {  # script: what it is given anyway
    'sample.py': '--out_dir={run} --max_new_tokens=2',
    'evaluate.py': '--out_dir={run} --dataset={text} --out={here}/e.json --limit=2',
    'export.py': '--out_dir={run} --folder={here}/hf',
    'plot.py': '{run} --out={here}/p.png',
    'bench.py generation': '--n_layer=1 --n_embd=12 --n_head=2 --block_size=8 --max_new_tokens=2 --prefill_tokens=2 '
    '--rounds=1 --device=cpu --dtypes=float32',
    'bench.py': '--steps=1 --warmup=1 --n_layer=1 --n_embd=12 --n_head=2 --block_size=8 --batch_size=1 --device=cpu',
    'data/prepare.py': '{here}/made {here}/text.txt --tokenizer=byte --num_proc=1',
}
FLAGS = [
    '--tokenizer',
    '--field',
    '--document',
    '--separator',
    '--template',
    '--split',
    '--seed',
    '--dedup',
    '--max_bytes',
    '--num_proc',
    '--shard_tokens',
    '--train_bytes',
    '--model_type',
    '--character_coverage',
    '--max_piece_length',
    '--byte_fallback',
    '--val',
    '--test',
    '--as_text',
    '--nope',
    '-x',
]
VALUES = {
    '--document': ['line', 'paragraph', 'file', r'\n', 'by'],
    '--split': ['0.5,0.5', '0.8,0.1,0.1', '1,0'],
    '--tokenizer': [
        'byte',
        'char',
        'train:bpe:300',
        'train:sentencepiece:300',
        'train:',
        'train:bpe:x',
        '..',
    ],
}


def settings_of(script):
    """{name: default} of a script, out of its source."""
    path = 'generation/benchmark.py' if script == 'bench.py generation' else script
    text = (ROOT / path).read_text(encoding='utf-8')
    found = {}
    begin = text.index('# ---- settings')
    exec(text[begin : text.index('# -----------', begin + 120)], found)
    return {key: value for key, value in found.items() if not key.startswith('_')}


def line_for(script, number):
    """Words of a command line of a script that is not train.py: the same for a number
    everywhere."""
    random = Random(f'{script} {number}')
    words = SCRIPTS[script].split()
    if script != 'data/prepare.py':
        keys = {
            k: v for k, v in settings_of(script).items() if k not in ('compile', 'max_new_tokens')
        }  # minutes
        return words + words_for(random, keys)
    for _ in range(random.randint(0, 3)):
        flag = random.choice(FLAGS)
        values = VALUES.get(flag, COUNTS) if random.random() < 0.6 else [*ODD, *NAMES]
        words += random.choice(
            [[f'{flag}={random.choice(values)}']] * 8 + [[flag, str(random.choice(values))], [flag]]
        )
    return [word for word in words if word not in ('-h', '--help')]


def run_lines(warm, folder, text_folder, trained, script, numbers):
    """`run_cases` of another script."""
    counts, wrong = Counter(), []
    for number in numbers:
        (place := folder / str(number) / 'a' / 'b').mkdir(parents=True)
        (place / 'text.txt').write_text('some text, line by line\n' * 200)
        words = [
            word.replace('{text}', str(text_folder))
            .replace('{run}', str(trained))
            .replace('{here}', str(place))
            for word in line_for(script, number)
        ]
        done = warm(*script.split(), *words, cwd=place, seconds=120, memory=MEMORY)
        counts[verdict := verdict_of(done)] += 1
        if verdict not in ('accepted', 'refused'):
            wrong.append(f"{script} {words}: {verdict}\n{done.stderr[-1500:]}")
        shutil.rmtree(folder / str(number))
    assert not wrong, '\n'.join(wrong)
    return counts


@pytest.mark.campaign
@pytest.mark.parametrize(
    'script, n',
    [
        ('sample.py', 300),
        ('evaluate.py', 300),
        ('export.py', 200),
        ('plot.py', 100),
        ('bench.py generation', 200),
        ('bench.py', 60),
        ('data/prepare.py', 300),
    ],
)
def test_generated_lines_of_the_other_scripts(warm, tmp_path, text_folder, trained, script, n):
    run = shutil.copytree(trained, tmp_path / 'run')
    counts = run_lines(warm, tmp_path, text_folder, run, script, range(n))
    assert counts['accepted'] > n // 50 and counts['refused'] > n // 4
