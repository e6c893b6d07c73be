"""What a user at a terminal sees of every script: Ctrl-C is one line, a closed pipe none, an
encoding never a traceback."""

import io
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from support import forked
from support.scripts import ROOT, TINY, run

from system import errors
from text import prompts

SCRIPTS = [
    'train.py',
    'sample.py',
    'evaluate.py',
    'export.py',
    'bench.py',
    'bench.py generation',
    'plot.py',
    'compare.py',
    'data/prepare.py',
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob('data/*/prepare.py')),
]
NARROW = ['ascii', 'cp1252']  # which have no Cyrillic
# as by default: a short text is written at the end of the script
BUFFERED = {**os.environ, 'PYTHONUNBUFFERED': ''}


def a_script(body, **options):
    """The end of a script that is this body after begin_script: 0.1 s, where the real ones load
    torch."""
    lines = [
        'import os, signal, subprocess, sys',
        'from system.errors import begin_script, user_errors',
        'begin_script()',
        body,
    ]
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) | options
    return subprocess.run([sys.executable, '-c', '\n'.join(lines)], cwd=ROOT, timeout=60, **options)


# ---- Ctrl-C --------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == 'win32', reason="Windows has no SIGINT for another process")
@pytest.mark.parametrize('script', SCRIPTS)
def test_an_interrupt_during_the_imports_is_one_line(script):
    command = [
        sys.executable,
        '-X',
        'importtime',
        *script.split(),
        'words',
        'for',
        'data/prepare.py',
    ]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        lines = iter(process.stderr.readline, '')
        while not next(lines).rstrip().endswith(' system.errors'):
            pass
        next(lines)  # of another module: begin_script has been called
        process.send_signal(signal.SIGINT)
        told = [line for line in lines if not line.startswith('import time:')]
    assert (process.returncode, told) == (130, ['stopped\n'])


@pytest.mark.parametrize(
    'body',
    [
        'raise KeyboardInterrupt',
        'with user_errors(): raise KeyboardInterrupt',
        # what C code and libraries make of it
        'try: raise KeyboardInterrupt\nexcept KeyboardInterrupt as error: raise ImportError("failed") from error',
        'class A:\n  def __del__(self): raise KeyboardInterrupt\nA()\nprint("goes on")',
        'import atexit\natexit.register(signal.raise_signal, signal.SIGINT)',
    ],
)
def test_an_interrupt_is_one_line_wherever_it_comes(body):
    done = a_script(body)
    assert (done.returncode, done.stdout, done.stderr) == (130, '', 'stopped\n')


def test_a_second_interrupt_ends_the_cleaning_up_of_the_first_without_a_word():
    done = a_script(
        "import atexit\natexit.register(signal.raise_signal, signal.SIGINT)\nwith user_errors():\n"
        "    raise KeyboardInterrupt"
    )
    assert (done.returncode, done.stderr) == (130, 'stopped\n')


@pytest.mark.skipif(sys.platform == 'win32', reason="there os.kill with SIGINT ends the process")
def test_an_interrupt_once_all_is_done_changes_nothing():
    """While Python tears its modules down, without its handlers: with torch loaded that takes a
    while."""
    done = a_script(
        "class Late:\n"
        "    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGINT, write=os.write):\n"
        "        kill(pid, number)\n"
        "        write(1, b'torn down')\n"
        "late = Late()\n"
        "print('all done')"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, 'all done\ntorn down', '')


@pytest.mark.skipif(sys.platform == 'win32', reason="Windows has no SIGINT for another process")
def test_an_interrupt_reaches_a_script_and_the_one_that_started_it_and_one_of_them_says_so(
    tmp_path,
):
    (tmp_path / 'prepare.py').write_text(
        f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from system.errors import begin_script
begin_script()
print('preparing', flush=True)
time.sleep(30)
""",
        encoding='utf-8',
    )
    starter = (
        f"import sys\nfrom system.errors import begin_script\nbegin_script()\nfrom text import dataset_option\n"
        f"sys.exit(dataset_option.run_script({str(tmp_path / 'prepare.py')!r}))"
    )
    with subprocess.Popen(
        [sys.executable, '-c', starter],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout.readline() == 'preparing\n'
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, '', 'stopped\n')


@pytest.mark.skipif(sys.platform == 'win32', reason="there is no fork")
@pytest.mark.parametrize(
    'script, words, sign',
    [
        (
            'train.py',
            ['--eval_only=True', '--eval_iters=1000000', '--batch_size=1', '--block_size=1'],
            'machine: ',
        ),
        (
            'train.py',
            ['--max_iters=100000', '--eval_iters=1000000', '--batch_size=1', '--block_size=1'],
            'machine: ',
        ),
        ('sample.py', ['--max_new_tokens=1000000', '--start=def'], 'def'),
    ],
)
def test_an_interrupt_ends_an_evaluation_and_a_sample(
    trained, text_folder, tmp_path, script, words, sign
):
    settings = (
        [*TINY, f'--dataset={text_folder}']
        if script == 'train.py'
        else ['--num_samples=1', '--device=cpu']
    )
    out_dir = tmp_path / 'out' if script == 'train.py' else trained
    process = forked.Run(script, *settings, f'--out_dir={out_dir}', *words)
    forked.wait_for(lambda: sign in process.text())
    process.kill(signal.SIGINT)
    done = process.wait()
    assert done.returncode == 130 and 'Traceback' not in done.output
    assert done.output.endswith('stopped\n') or 'SIGINT: saving after this step' in done.output


# ---- closed pipes --------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == 'win32', reason="the shell is another")
@pytest.mark.parametrize(
    'words', ['plot.py --help', 'data/prepare.py --help', 'data/names/prepare.py --help']
)
def test_a_reader_that_is_gone_is_no_error(words):
    done = subprocess.run(
        f'{sys.executable} {words} | true',
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=BUFFERED,
    )
    assert not done.stderr


@pytest.mark.skipif(sys.platform == 'win32', reason="the shell is another")
def test_a_run_whose_plan_nobody_reads_is_no_error(text_folder, tmp_path):
    words = ' '.join([*TINY, f'--dataset={text_folder}', f'--out_dir={tmp_path}/out'])
    done = subprocess.run(
        f'{sys.executable} train.py {words} | true',
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert not done.stderr


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason="there is no such device")
def test_a_full_disk_behind_standard_output_is_one_line():
    with open('/dev/full', 'wb') as full:
        done = a_script("print('text')", stdout=full, env=BUFFERED)
    assert (done.returncode, done.stderr) == (
        2,
        'error: cannot write to standard output: No space left on device\n',
    )


# ---- encodings of standard output ----------------------------------------------------------------


@pytest.mark.parametrize('encoding', NARROW)
@pytest.mark.parametrize('script', SCRIPTS)
def test_help_can_be_printed_in_any_encoding(warm, script, encoding):
    done = warm(*script.split(), '--help', env={'PYTHONIOENCODING': encoding})
    assert (done.returncode, done.stderr) == (0, '') and len(done.stdout) > 100


@pytest.fixture(scope='module')
def cyrillic(tmp_path_factory):
    """A folder with a text that narrow encodings lack, its dataset, and a run on that."""
    folder = tmp_path_factory.mktemp('кириллица')
    (folder / 'текст.txt').write_text('Привет, мир! Как дела? → ok\n' * 100, encoding='utf-8')
    return folder


@pytest.mark.parametrize('encoding', NARROW)
def test_a_finished_run_prints_its_sample_in_any_encoding(warm, cyrillic, encoding):
    """A dataset is prepared, trained on, sampled from and evaluated, all with names and texts that
    can't be printed."""
    folder, env = cyrillic / encoding, {'PYTHONIOENCODING': encoding}
    done = warm(
        'data/prepare.py',
        folder / 'данные',
        cyrillic / 'текст.txt',
        '--tokenizer=char',
        '--num_proc=1',
        env=env,
    )
    assert (done.returncode, done.stderr) == (0, '') and '/??????: ' in done.stdout
    words = [*TINY, f'--dataset={folder / "данные"}', f'--out_dir={folder / "опыт"}']
    done = warm('train.py', *words, env=env, sample=True)
    assert (done.returncode, done.stderr) == (
        0,
        '',
    ) and '??????, ???! ??? ????? ? ok' in done.stdout
    for script, *words in (
        ['sample.py', '--start=Привет', '--max_new_tokens=5'],
        ['evaluate.py'],
        ['export.py', f'--folder={folder / "папка"}'],
        ['plot.py', folder / 'опыт'],
    ):
        if script != 'plot.py':
            words.append(f'--out_dir={folder / "опыт"}')
        done = warm(script, *words, env=env)
        assert done.returncode == 0 and 'error' not in done.stderr, done.stderr


def test_a_sample_that_cannot_be_printed_is_said_to_be_replaced(text_folder, tmp_path):
    """As a user runs it: the one real process of these."""
    (tmp_path / 'text').write_text('мир → ok\n' * 100, encoding='utf-8')
    env = {'PYTHONIOENCODING': 'ascii'}
    done = run(
        'data/prepare.py',
        tmp_path / 'данные',
        tmp_path / 'text',
        '--tokenizer=char',
        '--num_proc=1',
        env=env,
    )
    assert (done.returncode, done.stderr) == (
        0,
        "? stands for characters that standard output can't encode, as it is ascii; "
        "to print them, set PYTHONIOENCODING=utf-8\n",
    )
    assert '/??????: ' in done.stdout


@pytest.mark.parametrize(
    'encoding, text, printed',
    [
        ('cp1252', 'é → ß', 'é ? ß'),
        ('ascii', 'é → ß', '? ? ?'),
        ('utf-8', 'é → ß', 'é → ß'),
        ('utf-8', 'caf\udce9.txt', 'caf?.txt'),  # a file's name that is no UTF-8
        ('ascii:xmlcharrefreplace', '→', '&#8594;'),  # the user's wish
    ],
)
def test_what_an_encoding_lacks_is_printed_as_a_question_mark(encoding, text, printed):
    done = a_script(
        f'print({text!a})', env={**os.environ, 'PYTHONIOENCODING': encoding}, text=False
    )
    assert (done.returncode, done.stdout.decode(encoding.partition(':')[0]).splitlines()) == (
        0,
        [printed],
    )
    assert ('? stands for characters' in done.stderr.decode()) == ('?' in printed)


def test_the_plain_locale_prints_everything_or_question_marks():
    """LC_ALL=C as it was before Python made UTF-8 of it."""
    env = {**os.environ, 'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0'}
    done = a_script("print('a \\u2192 b')\nprint('a \\u2192 b', file=sys.stderr)", env=env)
    assert (done.returncode, done.stdout) == (0, 'a ? b\n') and done.stderr.startswith(
        'a \\u2192 b\n'
    )


def test_an_error_about_a_name_that_cannot_be_printed_is_one_line():
    done = a_script(
        "with user_errors(): raise ValueError('мир \\udce9')",
        env={**os.environ, 'PYTHONIOENCODING': 'ascii'},
    )
    assert done.returncode == 2 and re.fullmatch(
        r'error: (\\u[0-9a-f]{4}){3} \\ufffd\n', done.stderr
    )


def test_notebooks_have_streams_of_their_own(monkeypatch):
    monkeypatch.setattr(sys, 'stdout', SimpleNamespace(write=print, flush=lambda: None))
    for name in ('excepthook', 'unraisablehook'):
        monkeypatch.setattr(sys, name, getattr(sys, name))
    handler = signal.getsignal(signal.SIGINT)
    try:
        errors.begin_script()
    finally:
        signal.signal(signal.SIGINT, handler)


# ---- standard input ------------------------------------------------------------------------------


@pytest.fixture
def typed(monkeypatch):
    """typed(content, encoding) puts these bytes on standard input."""

    def put(content, encoding='utf-8'):
        monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(content), encoding))

    return put


@pytest.mark.parametrize(
    'content, encoding, message',
    [
        (
            'мир: '.encode() + b'\xff',
            'utf-8',
            'standard input is not utf-8 text at byte 8: `iconv -f ITS_ENCODING -t UTF-8`',
        ),
        (
            'a: мир'.encode(),
            'ascii',
            'standard input is not ascii text at byte 3: PYTHONIOENCODING=utf-8 reads UTF-8',
        ),
        ('é'.encode('utf-16'), 'utf-8', 'standard input is not utf-8 text at byte 0'),
    ],
)
def test_a_prompt_that_cannot_be_decoded_is_one_line(typed, content, encoding, message):
    typed(content, encoding)
    with pytest.raises(ValueError, match=re.escape(message)):
        prompts.read_prompts('-')


def test_a_line_that_cannot_be_decoded_is_an_error_and_the_next_one_is_read(typed, capsys):
    typed('один\r\n'.encode() + b'\xe9\n' + 'два'.encode())
    assert list(prompts.typed_lines()) == ['один', 'два']
    assert capsys.readouterr().err == (
        "error: the line is not utf-8 text at byte 0: `iconv -f ITS_ENCODING -t UTF-8` "
        "converts it\n"
    )


def test_a_word_of_the_command_line_that_cannot_be_decoded():
    with pytest.raises(ValueError, match='the prompt is not utf-8 text at byte 3'):
        prompts.read_prompts('caf\udce9')
