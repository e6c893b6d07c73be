"""Hostile and broken input. Whatever stands on a command line, in a config file, a checkpoint or a dataset: a script takes
it as it stands, or ends with one line and exit code 2. No code of a file's is run, nothing hangs, nothing is lost.
"""
import ast
import dataclasses
import json
import math
from collections import Counter
from random import Random

import pytest
from conftest import ROOT, TINY
from test_config import train_settings
from test_errors import Forked

import models

MEMORY = 1 << 30        # bytes that a script may take beside what torch has; with more asked for, it has to say so


# ---- generated command lines and config files ------------------------------------------------------------------------

ZOO = ['gpt', *sorted(path.stem for path in (ROOT / 'models').glob('[a-z]*.py'))]
SETTINGS = train_settings()
FIELDS = {name: {f.name: f.default for f in dataclasses.fields(models.architecture(name).Config)} for name in ZOO}
COUNTS = [0, 1, 2, 3, 4, 8, 16, 64, -1, -2 ** 63, 127, 10 ** 4, 10 ** 9, 2 ** 31 - 1, 2 ** 31, 2 ** 32, 2 ** 40,
          2 ** 62, 2 ** 63 - 1, 2 ** 63]
RATES = [0.0, 0.1, 0.5, 0.9, 1.0, 1e-3, 3.0, -0.0, -1e-300, 5e-324, 1e-45, 1e-8, 1e38, 1e39, 1e300, 1e308, -1e308, math.nan]
NAMES = ['', ' ', '.', '..', '-', '--', '~', '/dev/null', '/dev/zero', '/dev/full', '/proc/self/mem', '/nowhere/x', 'a/b',
         '../x', 'C:\\x', '\\\\host\\share', 'a\nb', 'a\tb', '%s%n', '{}', '$HOME', '`id`', 'x' * 300, 'x/' * 3000, 'é',
         '\u202e', '🚀', 'None', 'True', '0', 'a:1,b:1', 'a:0.5', ':', ',', 'a:1e999,b:1', 'random:1,random:2', 'random',
         'openwebtext', 'resume', 'scratch', 'gpt2', 'auto', 'auto:gpt2', "__import__('os').system('id')"]
KNOWN = {'model': ZOO, 'device': ['cpu', 'cuda', 'cuda:0', 'mps', 'meta', 'cpu:0', 'xla', 'cuda:99999999999999999999'],
         'dtype': ['float32', 'bfloat16', 'float16', 'float64', 'int8'], 'compile': ['False', 'auto', 'None', '1'],
         'attention': ['sdpa', 'plain'], 'optimizer': ['adamw', 'sgd'], 'lr_schedule': ['cosine', 'step'],
         'gelu': ['exact', 'tanh'], 'log_to': ['tensorboard', ',', 'tensorboard,tensorboard'],
         'attention_kind': ['mha', 'gqa', 'mqa', 'sliding', 'banded', 'differential', 'mla', 'gated', 'sinks', 'alibi']}
ODD = ['', 'auto', 'None', '[]', '()', '{}', "'8'", '1e999', '0x10', '1_0', '1j', '9' * 5000, '(' * 2000, '-' * 3000 + '1',
       '\ufeff1', '1\n', 'nan', 'inf', '-inf', 'True', 'False', '4.0', '1if 1', '\\d', '\x1b[2J', 'lambda: 1', '10**9', '½']
PROGRAMS = ['import math', 'max_iters = max_iters', 'batch_size *= 2', 'block_size = batch_size // 2', '_x = 1', 'x',
            'del seed', 'seed = None', 'seed = b"x"', 'bias = ...', 'raise SystemExit',
            'exit()', '1 / 0', 'raise BaseException("no")', 'def f(): f()\nf()', 'globals().clear()',
            'n_layer = n_head = True', 'while 0: pass', 'out_dir = device', 'import numpy\nn_head = numpy.int64(2)',
            'n_embd = 1.6e1', 'class seed: pass', 'seed = [1] * 3', 'print("hello")', 'dataset = "\\0"',
            'dataset = "\\ud800"', 'out_dir = "\\ud800"', 'out_dir = "a\\0b"', 'wandb_project = "\\ud800"',
            'model = "\\0"', 'seed = -True', 'from nowhere import *', 'return', 'await x']
LEFT_OUT = {'profile', 'wandb_log', 'vocab_size'}       # seconds of start-up each, and a login


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
        words += [f'--{key}={text}'] if random.random() > mistakes else random.choice([
            [f'--{key}', text], [f'{key}={text}'], [f'--{key}'], [f'--{key[:-1]}={text}'], [f'-{key}={text}'], [text],
            [f'--{key.replace("_", "-")}={text}'], [f'--{key} ={text}'], [f'--{key}=='], [random.choice(ODD)]])
    return [word for word in words if word not in ('-h', '--help') and '\0' not in word]


def case(number):
    """(words, lines of a config file or None): the same for a number everywhere."""
    random = Random(number)
    name = random.choice(['gpt', 'gpt', 'gpt', *ZOO])
    keys = {k: v for k, v in {**SETTINGS, **FIELDS[name]}.items() if k not in LEFT_OUT}
    body, words = None, [f'--model={name}', *words_for(random, keys)]
    if random.random() < 0.25:
        body = [random.choice(PROGRAMS) if random.random() < 0.4 else
                f'{key} = {text!r}' if random.random() < 0.4 else f'{key} = {text}' for _ in range(random.randint(1, 3))
                for key in [random.choice(sorted(keys))] for text in [text_for(random, key, keys[key])]]
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
    """What of the command line's plain --key=value words a run has in another form than it was written, or None."""
    asked = dict(word[2:].split('=', 1) for word in words if word.startswith('--') and '=' in word)
    for key, text in asked.items():
        if key == 'init_from':      # what auto came to
            continue
        value = config.get(key)
        if type(value) is str:
            is_same = text == value or text in (repr(value), f'"{value}"')
        else:
            is_same = type(ast.literal_eval(text)) in (type(value), int) and ast.literal_eval(text) == value
        if not is_same or type(SETTINGS.get(key, value)) not in (type(value), str):
            return f"{key}={text!r} became {value!r}"


def run_case(forked, folder, dataset, number, seconds=8):
    """(verdict, what the script said) of a case, run in a new folder."""
    words, body = case(number)
    place = folder / 'a' / 'b'
    place.mkdir(parents=True)
    line = words
    if body is not None:
        (place / 'fuzz.py').write_text('\n'.join(body), encoding='utf-8', errors='surrogatepass')
        line = ['fuzz.py', *words]
    fields = FIELDS[words[0].removeprefix('--model=')]
    base = [word for word in TINY if word[2:].split('=')[0] in {*SETTINGS, *fields} - ({'dropout', 'bias'} - fields.keys())]
    done = forked('train.py', *base, '--max_iters=1', '--eval_iters=1', f'--dataset={dataset}', *line, cwd=place, seconds=seconds, memory=MEMORY)
    if done.returncode == -15 and seconds < 60:     # it was no further than its start: slow, or hanging?
        return run_case(forked, folder / 'slow', dataset, number, 60)
    verdict, config = verdict_of(done), place / 'out' / 'config.json'
    if verdict == 'accepted' and body is None and config.is_file():
        verdict = coercion(words, json.loads(config.read_text())) or verdict
    return verdict, done
