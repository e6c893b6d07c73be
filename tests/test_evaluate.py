"""evaluate.py: figures equal to lm-evaluation-harness's, to training's, and to sums done by hand;
how mistakes end.

tests/fixtures has a few made-up examples of LAMBADA and HellaSwag; the model that sees them is a
GPT-2 of random weights.
"""

import dataclasses
import gzip
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.datasets import CORPUS, write_text
from support.needs import VOCABULARY, needs_gpt2
from support.scripts import ROOT, run

import models

FIXTURES = ROOT / 'tests' / 'fixtures'


@pytest.fixture
def evaluate(monkeypatch, capsys, tmp_path):
    """evaluate(words…) -> (exit code, stdout, stderr, the script's globals); it runs in this
    process, in tmp_path."""

    def call(*words):
        monkeypatch.setattr(sys, 'argv', ['evaluate.py', '--device=cpu', *map(str, words)])
        monkeypatch.chdir(tmp_path)
        try:
            code, made = 0, runpy.run_path(str(ROOT / 'evaluate.py'))
        except SystemExit as end:
            code, made = end.code, {}
        return code, *capsys.readouterr(), made

    return call


@pytest.fixture
def results(evaluate):
    """results(words…) -> {task: {metric: value}}, of a run of evaluate.py that goes well."""

    def call(*words):
        code, out, err, made = evaluate(*words)
        assert code == 0, err
        return made['results']

    return call


def byte_model(path, block_size=16, vocab_size=260, tokenizer='byte'):
    """A checkpoint of a random GPT on bytes, with four ids of padding; returns the model."""
    torch.manual_seed(1)
    model = models.build(
        'gpt', block_size=block_size, vocab_size=vocab_size, n_layer=1, n_head=2, n_embd=16
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    torch.save(
        {
            'model': model.state_dict(),
            'model_args': dataclasses.asdict(model.config),
            'model_name': 'gpt',
            'tokenizer': {'kind': tokenizer} if tokenizer else None,
        },
        path,
    )
    return model.eval()


@pytest.fixture
def model(tmp_path):
    """The model of tmp_path/model.pt: 16 bytes of context."""
    return byte_model(tmp_path / 'model.pt')


def nats(model, ids, n):
    """Minus the log-probability of the last n of `ids`, given those before them."""
    logits, _ = model(torch.tensor([ids[:-1]]), torch.tensor([ids[1:]]))
    return -logits[0].double().log_softmax(-1)[range(len(ids) - 1), ids[1:]][-n:].sum().item()


# ---- the same as training ------------------------------------------------------------------------


def test_bits_per_byte_are_those_of_the_run(results, trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'out')
    # out is the default out_dir, and its config.json says the dataset
    found = results('--tasks=bpb')['bpb']
    records = [json.loads(line) for line in (trained / 'metrics.jsonl').read_text().splitlines()]
    best = min(
        (record for record in records if 'val_loss' in record),
        key=lambda record: record['val_loss'],
    )
    assert found['loss'] == pytest.approx(best['val_loss'], rel=1e-6)
    assert found['bits_per_byte'] == pytest.approx(best['val_bpb'], rel=1e-6)
    assert (found['tokens'], found['bytes']) == (399, 400)
    written = json.loads((tmp_path / 'out' / 'evaluation.json').read_text())
    assert (
        written['results'] == {'bpb': found}
        and written['dtype'] == 'float32'
        and written['tasks'] == 'bpb'
    )


def test_bits_per_byte_of_a_dataset_and_of_its_text_are_the_same(
    results, trained, text_folder, tmp_path
):
    (tmp_path / 'val.txt').write_text(CORPUS[3600:])
    of_bins, of_text = (
        results('--tasks=bpb', f'--out_dir={trained}', f'--dataset={name}', '--out=x.json')
        for name in (text_folder, 'val.txt')
    )
    assert of_bins == of_text


# ---- the same as by hand -------------------------------------------------------------------------

TEXT = "Naïve: “one”  two\nthree\tfour, and a last one."


@pytest.mark.parametrize('stride', [1, 5, 16])
def test_each_token_is_scored_once_with_enough_context(results, model, tmp_path, stride):
    (tmp_path / 'text.txt').write_text(TEXT, encoding='utf-8')
    ids, T = list(TEXT.encode()), 16
    found = results(
        '--init_from=model.pt', '--tasks=perplexity', '--dataset=text.txt', f'--stride={stride}'
    )['perplexity']
    total, before = 0, 0
    while before < len(ids) - 1:
        end = min(before + (stride if before else T), len(ids) - 1)
        total += nats(model, ids[max(0, end - T) : end + 1], end - before)
        before = end
    # bytes have no end-of-text token: nothing comes before the first one
    mean = total / (len(ids) - 1)
    assert found['loss'] == pytest.approx(mean, rel=1e-6)
    assert found['token_perplexity'] == pytest.approx(math.exp(mean), rel=1e-5)
    assert found['word_perplexity'] == pytest.approx(math.exp(mean * len(ids) / 9), rel=1e-4)
    # a token is a byte
    assert found['bits_per_byte'] == pytest.approx(mean / math.log(2), rel=1e-6)
    assert (found['tokens'], found['bytes']) == (len(ids) - 1, len(ids))


def test_a_text_may_be_packed_and_begin_with_a_byte_order_mark(results, model, tmp_path):
    (tmp_path / 'text.txt').write_text(TEXT, encoding='utf-8')
    (tmp_path / 'text.txt.gz').write_bytes(gzip.compress(b'\xef\xbb\xbf' + TEXT.encode()))
    plain, packed = (
        results('--init_from=model.pt', '--tasks=bpb', f'--dataset={name}')
        for name in ('text.txt', 'text.txt.gz')
    )
    assert plain == packed


def test_windows_side_by_side(results, model, tmp_path):
    (tmp_path / 'text.txt').write_text(TEXT, encoding='utf-8')
    ids = list(TEXT.encode())
    found = results('--init_from=model.pt', '--tasks=bpb', '--dataset=text.txt')['bpb']
    windows = [ids[i : i + 17] for i in range(0, len(ids) - 1, 16)]
    assert found['loss'] == pytest.approx(
        sum(nats(model, w, len(w) - 1) for w in windows) / (len(ids) - 1), rel=1e-6
    )


def test_limit_takes_the_beginning(results, model, tmp_path):
    (tmp_path / 'text.txt').write_text(TEXT, encoding='utf-8')
    found = results('--init_from=model.pt', '--dataset=text.txt', '--limit=2')
    ids = list(TEXT.encode())[:32]
    assert found['bpb']['bytes'] == 32
    assert found['bpb']['loss'] == pytest.approx(
        (nats(model, ids[:17], 16) + nats(model, ids[16:], 15)) / 31, rel=1e-6
    )


def test_last_words_by_hand(results, model, tmp_path):
    """A context too long for the model loses its beginning; white space at its end belongs to what
    is scored."""
    (tmp_path / 'l.jsonl').write_text(
        '\n'.join(
            json.dumps({'text': text})
            for text in ("short one", "a much longer context than sixteen bytes", "two  spaces")
        )
        + '\n\n'
    )
    found = results(
        '--init_from=model.pt', '--tasks=lambada', '--lambada=l.jsonl', '--batch_size=2'
    )['lambada']
    total = sum(
        nats(model, list(text.encode())[-17:], n)
        for text, n in (
            ("short one", 4),
            ("a much longer context than sixteen bytes", 6),
            ("two  spaces", 8),
        )
    )
    assert found['perplexity'] == pytest.approx(math.exp(total / 3), rel=1e-4)
    assert (found['examples'], found['cut_contexts'], found['acc']) == (3, 1, 0)


def test_what_is_scored_of_hellaswag(evaluate, tmp_path):
    byte_model(tmp_path / 'model.pt', block_size=256)
    code, _, err, made = evaluate(
        '--init_from=model.pt',
        '--tasks=hellaswag',
        f'--hellaswag={FIXTURES}/hellaswag.jsonl',
        '--limit=2',
    )
    rows = made['todo']['hellaswag'].rows
    texts = [(bytes(ids[:-n]).decode(), bytes(ids[-n:]).decode()) for ids, n in rows]
    assert texts[0] == (
        "Making tea: A woman fills a kettle with water and puts it on the stove. She",
        " waits until the water boils and pours it over the leaves.",
    )
    assert texts[4][0] == (
        "How to fold a paper boat: How to fold a paper boat. Begin with a sheet of paper. Lay the sheet "
        "on a table, with the long side towards you."
    )
    assert [text for _, text in texts[4:6]] == [  # two spaces, as the harness leaves them
        "  Fold it in half from top to bottom. Press the fold with your thumb.",
        " Set fire to the table. and begin again with another one.",
    ]


# ---- the same as lm-evaluation-harness -----------------------------------------------------------


def gpt2_folder(folder):
    """A GPT-2 in Hugging Face's format with 48 tokens of context and random weights, the same ones
    everywhere."""
    C, T, random = 32, 48, np.random.RandomState(48)  # a stream that NumPy promised to keep
    shapes = {
        'wte.weight': (50257, C),
        'wpe.weight': (T, C),
        'ln_f.weight': (C,),
        'ln_f.bias': (C,),
    }
    for i in range(2):
        for name, n_in, n_out in (
            ('attn.c_attn', C, 3 * C),
            ('attn.c_proj', C, C),
            ('mlp.c_fc', C, 4 * C),
            ('mlp.c_proj', 4 * C, C),
        ):
            shapes |= {f'h.{i}.{name}.weight': (n_in, n_out), f'h.{i}.{name}.bias': (n_out,)}
        shapes |= {f'h.{i}.ln_{k}.{name}': (C,) for k in (1, 2) for name in ('weight', 'bias')}
    # embeddings so large that a token repeated is a likely guess: some last words are right
    scales = {name: 0.5 if name == 'wte.weight' else 0.07 for name in shapes}
    weights = {
        name: ('ln_' in name and 'weight' in name) + scales[name] * random.standard_normal(shape)
        for name, shape in shapes.items()
    }
    folder.mkdir()
    save_file(
        {
            f'transformer.{name}': torch.tensor(w, dtype=torch.float32)
            for name, w in weights.items()
        },
        folder / 'model.safetensors',
        {'format': 'pt'},
    )
    (folder / 'config.json').write_text(
        json.dumps(
            {
                'model_type': 'gpt2',
                'architectures': ['GPT2LMHeadModel'],
                'vocab_size': 50257,
                'n_positions': T,
                'n_layer': 2,
                'n_head': 2,
                'n_embd': C,
            }
        )
    )
    return folder


@pytest.fixture(scope='module')
def gpt2(tmp_path_factory):
    return gpt2_folder(tmp_path_factory.mktemp('hf') / 'gpt2')


@pytest.fixture
def page(tmp_path):
    """tmp_path/page.txt: the passages of the fixture, one below the other."""
    lines = (FIXTURES / 'lambada.jsonl').read_text(encoding='utf-8').splitlines()
    text = '\n'.join(json.loads(line)['text'] for line in lines)
    (tmp_path / 'page.txt').write_text(text, encoding='utf-8')
    return text


@pytest.fixture
def ours(results, gpt2, page):
    """What evaluate.py finds, under the harness's names."""
    found = results(
        f'--init_from={gpt2}',
        '--tasks=perplexity,lambada,hellaswag',
        '--dataset=page.txt',
        '--stride=48',
        f'--lambada={FIXTURES}/lambada.jsonl',
        f'--hellaswag={FIXTURES}/hellaswag.jsonl',
        '--out=x.json',
    )
    assert (found['lambada']['cut_contexts'], found['hellaswag']['cut_contexts']) == (2, 9)
    text = found['perplexity']
    return {
        'lambada': {key: found['lambada'][key] for key in ('acc', 'acc_stderr', 'perplexity')},
        'hellaswag': {
            key: found['hellaswag'][key]
            for key in ('acc', 'acc_stderr', 'acc_norm', 'acc_norm_stderr')
        },
        'text': {
            'word_perplexity': text['word_perplexity'],
            'byte_perplexity': 2 ** text['bits_per_byte'],
            'bits_per_byte': text['bits_per_byte'],
        },
    }


# What lm_eval 0.4.13 wrote (transformers 5.23.0, torch 2.13.0, a CPU) when test_the_harness_itself
# ran it. With the seed of these weights, acc_norm by bytes would be 0.1: the harness goes by
# characters.
HARNESS = {
    'lambada': {
        'acc': 0.3333333333333333,
        'acc_stderr': 0.14213381090374033,
        'perplexity': 146602.9128331665,
    },
    'hellaswag': {
        'acc': 0.3,
        'acc_stderr': 0.15275252316519466,
        'acc_norm': 0.2,
        'acc_norm_stderr': 0.13333333333333333,
    },
    'text': {
        'word_perplexity': 87211521.75885575,
        'byte_perplexity': 36.38228304499436,
        'bits_per_byte': 5.185164172080878,
    },
}


def assert_equal(ours, theirs):
    for task, figures in theirs.items():
        assert ours[task] == pytest.approx(figures, rel=1e-5), task


@needs_gpt2
def test_figures_are_those_that_the_harness_printed(ours):
    assert_equal(ours, HARNESS)


@needs_gpt2
@pytest.mark.campaign
@pytest.mark.skipif(
    not shutil.which('lm_eval'), reason="lm_eval is not on the PATH: pip install 'lm_eval[hf]'"
)
def test_the_harness_itself(ours, gpt2, page, tmp_path):
    """Its own tasks, on the files of this test. To install it apart: a virtual environment whose
    bin is last in PATH."""
    folder = shutil.copytree(gpt2, tmp_path / 'gpt2')
    for path in VOCABULARY.iterdir():
        text = path.read_text(encoding='utf-8')
        # what tiktoken keeps of GPT-2 are OpenAI's own two files
        if text.startswith(('#version', '{"!"')):
            (folder / ('merges.txt' if text[0] == '#' else 'vocab.json')).write_text(
                text, encoding='utf-8'
            )
    special = dict.fromkeys(('bos_token', 'eos_token', 'unk_token'), '<|endoftext|>')
    (folder / 'tokenizer_config.json').write_text(
        json.dumps({'tokenizer_class': 'GPT2Tokenizer', **special})
    )
    (tmp_path / 'page.jsonl').write_text(json.dumps({'page': page}))
    python = Path(shutil.which('lm_eval')).with_name('python')
    where = [python, '-c', 'import lm_eval.tasks; print(lm_eval.tasks.__path__[0])']
    tasks = Path(subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip())
    (tmp_path / 'tasks').mkdir()
    for name, task in {
        'lambada': {
            'include': f'{tasks}/lambada/lambada_openai.yaml',
            'dataset_name': None,
            'dataset_kwargs': {'data_files': {'test': f'{FIXTURES}/lambada.jsonl'}},
        },
        'hellaswag': {
            'include': f'{tasks}/hellaswag/hellaswag.yaml',
            'dataset_kwargs': {
                'data_files': dict.fromkeys(('train', 'validation'), f'{FIXTURES}/hellaswag.jsonl')
            },
        },
        'text': {
            'output_type': 'loglikelihood_rolling',
            'test_split': 'test',
            'doc_to_text': '',
            'doc_to_target': '{{page}}',
            'dataset_kwargs': {'data_files': {'test': f'{tmp_path}/page.jsonl'}},
            'metric_list': [
                {'metric': m} for m in ('word_perplexity', 'byte_perplexity', 'bits_per_byte')
            ],
        },
    }.items():
        # which is YAML too
        content = json.dumps({**task, 'task': f'own_{name}', 'dataset_path': 'json'})
        (tmp_path / 'tasks' / f'{name}.yaml').write_text(content)
    offline = {
        'HF_HUB_OFFLINE': '1',
        'HF_DATASETS_OFFLINE': '1',
        'HF_HOME': str(tmp_path / 'home'),
        'PYTHONPATH': '',
    }
    command = (
        f'lm_eval --model hf --model_args pretrained={folder},dtype=float32 --device cpu --batch_size 4 --tasks '
        f'own_lambada,own_hellaswag,own_text --include_path {tmp_path}/tasks --output_path {tmp_path}/results'
    )
    done = subprocess.run(
        command.split(), env={**os.environ, **offline}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (tmp_path / 'results').rglob('results*.json')
    theirs = json.loads(path.read_text())['results']
    theirs = {
        task: {key: theirs[f'own_{task}'][f'{key},none'] for key in figures}
        for task, figures in ours.items()
    }
    print(json.dumps(theirs, indent=1))
    assert_equal(ours, theirs)


@needs_gpt2
def test_the_first_token_follows_the_end_of_a_text(results, gpt2, page, tmp_path):
    (tmp_path / 'two.txt').write_text('one<|endoftext|>two three')
    found = results(f'--init_from={gpt2}', '--dataset=two.txt')
    assert (found['bpb']['tokens'], found['perplexity']['tokens']) == (3, 4)
    # the mark between two texts is not text
    assert found['perplexity']['bytes'] == len('onetwo three')
    loss = found['perplexity']['loss']
    assert found['perplexity']['word_perplexity'] == pytest.approx(math.exp(loss * 4 / 3))
    assert found['perplexity']['bits_per_byte'] == pytest.approx(loss * 4 / math.log(2) / 12)


# ---- batches, numbers, the table -----------------------------------------------------------------


def test_padding_changes_nothing(results, tmp_path):
    byte_model(tmp_path / 'model.pt', block_size=256)
    words = (
        '--init_from=model.pt',
        '--tasks=lambada,hellaswag',
        f'--lambada={FIXTURES}/lambada.jsonl',
        f'--hellaswag={FIXTURES}/hellaswag.jsonl',
    )
    alone, together = (results(*words, f'--batch_size={n}') for n in (1, 7))
    for task in alone:
        assert alone[task] == pytest.approx(together[task], rel=1e-6)


def test_bfloat16_is_near(results, model, tmp_path):
    (tmp_path / 'text.txt').write_text(TEXT, encoding='utf-8')
    exact, near = (
        results('--init_from=model.pt', '--dataset=text.txt', f'--dtype={dtype}')['bpb']['loss']
        for dtype in ('float32', 'bfloat16')
    )
    assert near != exact and near == pytest.approx(exact, rel=0.01)


def test_a_table_whose_columns_are_aligned(evaluate, model, tmp_path):
    (tmp_path / 'text.txt').write_text(TEXT, encoding='utf-8')
    (tmp_path / 'l.jsonl').write_text('{"text": "a b"}\n{"text": "c d"}\n')
    _, out, err, made = evaluate(
        '--init_from=model.pt', '--tasks=bpb,lambada', '--dataset=text.txt', '--lambada=l.jsonl'
    )
    head, *lines = out.splitlines()
    assert not err and head.split() == ['task', 'metric', 'value']
    assert all(len(line.partition(' ±')[0]) == len(head) for line in lines)
    assert lines[0].split() == ['bpb', 'loss', f"{made['results']['bpb']['loss']:.6g}"]
    assert ['lambada', 'acc', '0', '±', '0.0000'] in [line.split() for line in lines]
    # a run would have had its own
    assert not [path for path in tmp_path.iterdir() if path.suffix == '.json']


def test_numbers_that_are_not_finite(evaluate, tmp_path):
    model = byte_model(tmp_path / 'model.pt')
    state = torch.load(tmp_path / 'model.pt')
    torch.save(
        {**state, 'model': {k: v * math.nan for k, v in model.state_dict().items()}},
        tmp_path / 'model.pt',
    )
    (tmp_path / 'text.txt').write_text(TEXT, encoding='utf-8')
    code, out, err, _ = evaluate(
        '--init_from=model.pt', '--tasks=bpb', '--dataset=text.txt', '--out=x.json'
    )
    assert (code, err) == (0, '') and 'not finite' in out
    assert json.loads((tmp_path / 'x.json').read_text())['results']['bpb']['loss'] is None


def test_the_script_by_itself(trained, tmp_path):
    out_dir = shutil.copytree(trained, tmp_path / 'out')
    done = run('evaluate.py', f'--out_dir={out_dir}', '--tasks=perplexity', '--device=cpu')
    assert done.returncode == 0 and not done.stderr, done.stderr
    # half of block_size
    assert json.loads((out_dir / 'evaluation.json').read_text())['stride'] == 8


# ---- mistakes ------------------------------------------------------------------------------------

HELLASWAG = {
    'activity_label': 'x',
    'ctx_a': 'a',
    'ctx_b': 'b',
    'endings': ['1', '2', '3', '4'],
    'label': 0,
}


@pytest.mark.parametrize(
    'words, content, message',
    [
        (['--tasks=bpb,lambda'], '', "there is no task 'lambda'; the nearest is 'lambada'"),
        (['--tasks='], '', "there is no task ''"),
        (['--stride=17'], '', "stride=17 must be from 1 to 16, the model's block_size"),
        (['--stride=0'], '', 'stride=0 must be from 1 to 16'),
        (['--batch_size=0'], '', 'batch_size=0 must be at least 1'),
        (['--limit=-1'], '', 'limit=-1 must be at least 0'),
        (['--init_from=nowhere'], '', "'nowhere'"),
        (['--init_from=resume', '--out_dir=.'], '', "'.' holds no checkpoint"),
        (['--init_from=bare.pt'], '', 'bare.pt does not say which tokenizer its 260 ids belong to'),
        (['--dataset=nowhere'], '', 'train.bin is missing'),
        (
            ['--dataset=chars'],
            '',
            "was made with another tokenizer than the model's: evaluate the text itself",
        ),
        (
            ['--dataset=file'],
            '',
            'file has 0 bytes of text, 0 token(s): too few to predict one from another',
        ),
        (['--dataset=file'], b'\xff\xfe', "file is UTF-16, not UTF-8: `iconv -f UTF-16 -t UTF-8`"),
        (['--dataset=file'], 'für'.encode('latin-1'), "file is not UTF-8 at byte 1: `iconv -f ITS"),
        (['--dataset=file'], b'x' * 99_999 + b'\xff', "file is not UTF-8 at byte 99,999: `iconv"),
        (['--dataset=file'], b'PAR1\0\1', "file is a binary file (there are zero bytes in it)"),
        (['--dataset=file.gz'], 'not packed', "file.gz is damaged: Not a gzipped file"),
        (
            ['--dataset=file.parquet'],
            'x',
            "holds rows, not text: `python data/prepare.py NAME file.pa",
        ),
        (['--dataset=file.jsonl'], '{"text": "x"}', "file.jsonl holds rows, not text"),
        (['--dataset=file.csv'], 'a,b', "file.csv holds rows, not text"),
        (
            ['--init_from=chars.pt', '--dataset=file'],
            'abcé',
            "file: the character 'é' at position 3 is not among the 3",
        ),
        (['--tasks=lambada', '--lambada=nowhere'], '', 'nowhere: No such file or directory'),
        (['--tasks=lambada', '--lambada=file'], '', 'file holds no examples'),
        (
            ['--tasks=lambada', '--lambada=file'],
            '{"text": "a b"}\n{"text": "a',
            'file, line 2: it is not JSON (Unterminated',
        ),
        (
            ['--tasks=lambada', '--lambada=file'],
            '\n{"txt": "a b"}',
            'file, line 2: an example of LAMBADA has a "text"',
        ),
        (
            ['--tasks=lambada', '--lambada=file'],
            '{"text": " word"}',
            'an example of LAMBADA has a "text" of several words',
        ),
        (
            ['--tasks=lambada', '--lambada=file'],
            '{"text": "a bcdefghijklmnopqrs"}',
            'is 19 tokens long, more than',
        ),
        (
            ['--tasks=lambada', '--lambada=file'],
            b'{"text": "a \xff"}',
            "file, line 1: it is not UTF-8 at byte 12",
        ),
        (
            ['--tasks=lambada', '--lambada=file', '--init_from=chars.pt'],
            '{"text": "a é"}',
            "line 1: the character ' '",
        ),
        (
            ['--tasks=hellaswag', '--hellaswag=file'],
            json.dumps({**HELLASWAG, 'label': ''}),
            '1: an example of HellaSwag has',
        ),
        (
            ['--tasks=hellaswag', '--hellaswag=file'],
            json.dumps({**HELLASWAG, 'endings': ['1']}),
            'four "endings"',
        ),
        (['--tasks=hellaswag', '--hellaswag=file'], '[]', '"activity_label", "ctx_a", "ctx_b"'),
        (['--out=no/where.json'], '', 'out=no/where.json: there is no folder no'),
    ],
)
def test_a_mistake_ends_in_one_line(evaluate, model, tmp_path, words, content, message):
    byte_model(tmp_path / 'bare.pt', tokenizer=None)
    state = torch.load(tmp_path / 'model.pt')
    torch.save({**state, 'tokenizer': {'kind': 'char', 'chars': 'abc'}}, tmp_path / 'chars.pt')
    name = 'file'
    if words[0].startswith('--dataset=file.'):
        name = words[0].partition('=')[2]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    if '--dataset=chars' in words:
        words = [f"--dataset={write_text(tmp_path / 'chars', 'some characters ' * 20)}"]
    code, out, err, _ = evaluate('--init_from=model.pt', *words)
    assert code == 2 and err.startswith('error: ') and message in err, err
    assert err.count('\n') == 1


def test_a_run_whose_data_nobody_knows(evaluate, trained, tmp_path):
    shutil.copytree(trained, tmp_path / 'out')
    (tmp_path / 'out' / 'config.json').unlink()
    code, _, err, _ = evaluate()
    assert (
        code == 2
        and 'out/config.json does not say what the run was trained on: give --dataset' in err
    )


@pytest.mark.parametrize(
    'task, name', [('lambada', 'lambada_test.jsonl'), ('hellaswag', 'hellaswag_val.jsonl')]
)
def test_a_download_has_to_be_the_known_file(evaluate, model, monkeypatch, tmp_path, task, name):
    if (ROOT / 'data' / name).exists():
        pytest.skip(f"data/{name} is there")
    monkeypatch.setenv('NANOGPT_MIRROR', str(tmp_path))
    code, _, err, _ = evaluate('--init_from=model.pt', f'--tasks={task}')
    assert code == 2 and f'cannot download {tmp_path}/{task}/{name}' in err and 'by hand' in err
    (tmp_path / task).mkdir()
    (tmp_path / task / name).write_text('{"text": "not the file"}')
    code, _, err, _ = evaluate('--init_from=model.pt', f'--tasks={task}')
    assert code == 2 and 'is not the expected file' in err and not (ROOT / 'data' / name).exists()
