"""sample.py as a user runs it, and bench.py generation."""

import io
import re
import subprocess
import sys

import pytest
import torch
from support.scripts import ROOT, run

import models
from generation import quantize
from text import prompts
from text.tokenizer import HuggingFaceTokenizer
from text.tokenizer_json import BYTE_OF, byte_level
from training import checkpoint

RULE = '-' * 15


@pytest.fixture
def sample(trained):
    """The standard output of sample.py with these words, and its standard error."""

    def sample(*words, stdin=None):
        words = '--num_samples=1', '--max_new_tokens=8', '--device=cpu', '--dtype=float32', *words
        done = run('sample.py', f'--out_dir={trained}', *words, stdin=stdin)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return sample


def test_samples_stand_side_by_side_and_each_has_its_seed(sample):
    out, err = sample('--start=def', '--num_samples=3', '--seed=5')
    texts = out.split(f'\n{RULE}\n')
    assert (
        len(texts) == 4
        and texts[-1] == ''
        and all(len(text) == 11 and text.startswith('def') for text in texts[:3])
    )
    assert sample('--start=def', '--seed=6')[0] == f'{texts[1]}\n{RULE}\n'
    assert re.fullmatch(r'prompts in [\d.]+ s; 24 tokens in [\d.]+ s, [\d.]+ tokens/s\n', err)


def test_a_prompt_comes_from_a_word_a_file_standard_input_or_lines(sample, tmp_path):
    (tmp_path / 'prompt').write_text('import', encoding='utf-8')
    (tmp_path / 'prompts').write_text('import\ndef\n', encoding='utf-8')
    expected, _ = sample('--start=import')
    assert sample('--prompt=import')[0] == sample(f'--start=FILE:{tmp_path}/prompt')[0] == expected
    assert sample('--start=-', stdin='import')[0] == expected
    assert (
        sample(f'--start=LINES:{tmp_path}/prompts')[0]
        == expected + sample('--start=def', '--seed=1338')[0]
    )


def test_a_prompt_that_is_not_utf8_is_told_in_words(tmp_path, monkeypatch):
    (tmp_path / 'prompt').write_bytes('für'.encode('latin-1'))
    for kind in ('FILE', 'LINES'):
        with pytest.raises(ValueError, match=r'prompt is not UTF-8 at byte 1: `iconv -f ITS_ENC'):
            prompts.read_prompts(f'{kind}:{tmp_path}/prompt')
    for errors in ('strict', 'surrogateescape'):  # the C locale has the latter
        stdin = io.TextIOWrapper(io.BytesIO(b'f\xfcr'), encoding='utf-8', errors=errors)
        monkeypatch.setattr(sys, 'stdin', stdin)
        with pytest.raises(ValueError, match='standard input is not utf-8 text at byte 1: `iconv'):
            prompts.read_prompts('-')


def test_line_ends_of_a_prompt_are_those_of_standard_input(tmp_path):
    (tmp_path / 'prompt').write_bytes(b'\xef\xbb\xbfone\r\ntwo\r\n')
    assert prompts.read_prompts(f'FILE:{tmp_path}/prompt') == ['one\ntwo\n']
    assert prompts.read_prompts(f'LINES:{tmp_path}/prompt') == ['one', 'two']


def test_a_stop_ends_a_sample(sample):
    whole = sample('--start=def', '--seed=2')[0].split(f'\n{RULE}')[0]
    out, err = sample('--start=def', '--seed=2', f'--stop=no such text|{whole[5]}')
    assert out == f'{whole[: 3 + whole[3:].index(whole[5])]}\n{RULE}\n' and re.search(
        r'; [1-3] tokens in', err
    )


def test_stops_are_repeated_or_a_list(sample):
    whole = sample('--start=def', '--seed=2')[0].split(f'\n{RULE}')[0]
    cut = f'{whole[: 3 + whole[3:].index(whole[5])]}\n{RULE}\n'
    assert sample('--start=def', '--seed=2', '--stop=no such text', f'--stop={whole[5]}')[0] == cut
    assert sample('--start=def', '--seed=2', f"--stop={['no|such|text', whole[5]]}")[0] == cut


@pytest.fixture(scope='module')
def marks():
    """A tokenizer with two special tokens."""
    pytest.importorskip('tokenizers')
    vocabulary = {**BYTE_OF, '<|im_end|>': 256, '[|end|]': 257}
    return HuggingFaceTokenizer(byte_level(vocabulary, [], ['<|im_end|>', '[|end|]']))


@pytest.mark.parametrize(
    'value, texts',
    [
        ('', []),
        ('a', ['a']),
        ('a|b', ['a', 'b']),
        ('<|im_end|>', ['<|im_end|>']),
        ('[|end|]', ['[|end|]']),
        ('<|of_another_model|>', ['<|of_another_model|>']),
        ('User:|<|im_end|>', ['User:', '<|im_end|>']),
        ('<|im_end|>|[|end|]|\n', ['<|im_end|>', '[|end|]', '\n']),
        ('<|im_end|>\n', ['<|im_end|>\n']),
        ('|', ['|']),
        ('||', ['||']),
        (['a|b', 'c'], ['a|b', 'c']),
        (['<|', ''], ['<|']),
    ],
)
def test_how_stops_are_said(marks, value, texts):
    assert prompts.parse_stops(value, marks) == texts


@pytest.mark.parametrize(
    'value, parts',
    [
        ('a|', ['a']),
        ('|a', ['a']),
        ('a||b', ['a', 'b']),
        ('<|', ['<']),
        ('<|im_end', ['<', 'im_end']),
        ('im_end|>', ['im_end', '>']),
        ('<|two words|>', ['<', 'two words', '>']),
        ('<|a|b|>', ['<', 'a', 'b', '>']),
    ],
)
def test_stops_that_may_mean_two_things_are_an_error_with_both_as_lists(marks, value, parts):
    with pytest.raises(
        ValueError, match=re.escape(f'as a list, --stop="{[value]}" or --stop="{parts}"')
    ):
        prompts.parse_stops(value, marks)


def test_a_stop_that_is_a_special_token_ends_a_sample_at_its_id(warm, marks, tmp_path):
    """A bigram that has learned `ab<|im_end|>c` over and over."""
    model = models.build('bigram', block_size=8, vocab_size=258)
    ids = torch.tensor(marks.encode('ab<|im_end|>c' * 50))
    model.fit([(ids[None, :-1], ids[None, 1:])])
    checkpoint.save(
        tmp_path,
        'ckpt.pt',
        dict(
            model=model.state_dict(),
            model_name='bigram',
            model_args=vars(model.config),
            tokenizer=marks.describe(),
        ),
    )
    words = [
        f'--init_from={tmp_path / "ckpt.pt"}',
        '--start=a',
        '--temperature=0',
        '--max_new_tokens=6',
        '--num_samples=1',
        '--device=cpu',
    ]
    assert warm('sample.py', *words).stdout == f'ab<|im_end|>cab<|im_end|>\n{RULE}\n'
    for stop in (
        ['--stop=<|im_end|>'],
        ['--stop=zz', '--stop=<|im_end|>'],
        ["--stop=['<|im_end|>']"],
        ['--stop=<|im_end|>c'],
    ):  # the last one as a text, of two tokens
        done = warm('sample.py', *words, *stop)
        assert done.stdout == f'ab\n{RULE}\n' and done.stderr.startswith('prompts in ')
    done = warm('sample.py', *words, '--stop=zz|<|im_end|>')
    assert done.stdout == f'ab\n{RULE}\n' and done.stderr.startswith(
        "a sample ends at 'zz' or '<|im_end|>'\n"
    )
    assert warm('sample.py', *words, '--stop=<|im_end|>', '--num_beams=2').stdout.startswith(
        f'ab\n{RULE} -'
    )


def test_a_full_context_is_told(sample):
    out, err = sample('--start=def', '--max_new_tokens=40')
    assert len(out.split(f'\n{RULE}')[0]) == 43
    assert 'tokens/s; the context filled up 6 times; its last 12 tokens were kept' in err


def test_beams_are_printed_best_first_with_their_scores(sample):
    out, _ = sample('--start=def', '--num_beams=4', '--num_samples=3')
    scores = [float(score) for score in re.findall(rf'\n{RULE} (-[\d.]+)\n', out)]
    assert len(scores) == 3 and scores == sorted(scores, reverse=True) and out.startswith('def')


def test_a_conversation_keeps_its_context_and_survives_a_mistake(sample):
    out, err = sample(
        '--interactive=True', '--temperature=0', '--max_new_tokens=4', stdin='def\nß\nif\n\n'
    )
    first, second, third = re.fullmatch(
        r'((?:.|\n){4})\n((?:.|\n){4})\n((?:.|\n){4})\n', out
    ).groups()
    assert re.fullmatch(
        r"error: the character 'ß' at position 0 is not among the \d+ that this model knows\n"
        r"the context filled up once; its last 12 tokens were kept\n",
        err,
    )
    told = f'def{first}\nif'
    assert sample(f'--start={told}', '--temperature=0', '--max_new_tokens=3')[0].startswith(
        told + second[:3]
    )


def test_words_come_as_they_are_made(trained):
    words = f'--out_dir={trained}', '--num_samples=1', '--max_new_tokens=100000', '--device=cpu'
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen([sys.executable, 'sample.py', *words], cwd=ROOT, **pipes) as process:
        assert len(process.stdout.read(50)) == 50  # long before the end
        process.kill()


def test_a_reader_that_has_seen_enough_is_no_error(trained):
    command = f'{sys.executable} sample.py --out_dir={trained} --max_new_tokens=100000 --device=cpu | head -c 5'
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert len(done.stdout) == 5 and not done.stderr


@pytest.mark.skipif(not quantize.has_int8(), reason="there is no C compiler")
@pytest.mark.parametrize('dtype', ['bfloat16', 'int8'])
def test_a_sample_of_any_format_does_not_change_with_its_batch(sample, dtype):
    texts = sample(f'--dtype={dtype}', '--num_samples=4')[0].split(f'\n{RULE}\n')
    assert sample(f'--dtype={dtype}', '--seed=1340')[0].split(f'\n{RULE}\n')[0] == texts[3]


def test_generation_is_measured(tmp_path):
    done = run(
        'bench.py',
        'generation',
        '--n_layer=1',
        '--n_embd=24',
        '--block_size=64',
        '--max_new_tokens=20',
        '--rounds=1',
        '--device=cpu',
        '--dtypes=float32,bfloat16',
        f'--plot={tmp_path}/speed.png',
    )
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()[1:]}
    assert {'float32', 'bfloat16', 'uncached'} <= rows.keys() and len(rows['float32']) == len(
        rows['uncached']
    ) + 1 == 11
    assert (
        '1 x 20 tokens after 1' in done.stdout
        and (tmp_path / 'speed.png').read_bytes()[1:4] == b'PNG'
    )
