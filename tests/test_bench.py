"""bench.py: which command each side is, whole runs to a loss, and what is said of them."""

import re
import runpy
import shlex
import sys
from types import SimpleNamespace

import pytest
from support.scripts import ROOT, TINY, run

# A stand-in for train.py: it ends at the loss that its settings ask for and leaves the files that
# bench.py reads.
TRAIN = r"""
import json, sys, time
words = dict(word[2:].split('=', 1) for word in sys.argv[1:] if word.startswith('--'))
for path in sys.argv[1:]:
    if path.endswith('.py'):
        exec(open(path).read(), words)
if words.get('broken'):
    sys.exit("error: it is broken")
out = words['out_dir']
json.dump({}, open(out + '/config.json', 'w'))
loss = float(words['loss']) + float(words.get('slope', 0)) * int(words['seed'])
for iter, value in (0, 0.5), (5, loss):       # the early one is lower, and must not count
    record = dict(iter=iter, val_loss=value, wall_seconds=0.3, train_seconds=0.2)
    print(json.dumps(record), file=open(out + '/metrics.jsonl', 'a'))
time.sleep(float(words.get('sleep', 0)))
print(json.dumps(sorted(sys.argv[1:])))
"""


@pytest.fixture
def bench(monkeypatch, capsys, tmp_path):
    """bench(words…) -> the end of bench.py beside the stand-in for train.py, in a folder that has
    fast.py and slow.py."""
    (tmp_path / 'bench.py').symlink_to(ROOT / 'bench.py')
    (tmp_path / 'train.py').write_text(TRAIN)
    (tmp_path / 'fast.py').write_text('loss = 1.5\n')
    (tmp_path / 'slow.py').write_text('loss = 1.8\nsleep = 0.6\n')
    monkeypatch.chdir(tmp_path)

    def call(*words):
        monkeypatch.setattr(sys, 'argv', ['bench.py', *words])
        try:
            # in this process, which has torch loaded already
            code = runpy.run_path(str(tmp_path / 'bench.py')) and 0
        except SystemExit as end:
            code = end.code
        return SimpleNamespace(
            returncode=code, stdout=(texts := capsys.readouterr()).out, stderr=texts.err
        )

    return call


def test_a_config_in_versus_takes_the_place_of_the_first_sides(bench):
    done = bench(
        'fast.py',
        '--x=1',
        '--y=2',
        '--versus=slow.py --y=3',
        '--target=1.6',
        '--seed=7',
        '--rounds=2',
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ['A: train.py fast.py --x=1 --y=2', 'B: train.py slow.py --x=1 --y=3']
    assert [line[:4] for line in lines[2:6]] == ['A 1:', 'B 1:', 'A 2:', 'B 2:']
    assert re.fullmatch(
        r'medians of 2 rounds: A reaches val loss ≤ 1.6 in \S+ s, B does not reach it: it ends at 1.8000 '
        r"after \S+ s; A is (\S+) times as fast as B's whole run \(2 rounds: \S+ to \S+\)",
        lines[6],
    )
    assert float(re.search(r'A is (\S+) times', lines[6])[1]) > 1
    assert re.fullmatch(
        r'A 1: val loss 1.5000 ≤ 1.6, \S+ s in all, 0.3 s until this was known; \S+ s of start-up, '
        r'0.2 s of steps',
        lines[2],
    )


def test_settings_in_versus_come_on_top(bench):
    done = bench('fast.py', '--x=1', '--versus=--loss=9', '--target=1')
    assert done.stdout.splitlines()[1] == 'B: train.py fast.py --x=1 --loss=9'


@pytest.mark.parametrize(
    'words, sentence',
    [
        (
            ['--loss=1', '--versus=--sleep=0.6'],
            "A reaches val loss ≤ 2 in # s, B reaches it in # s; A is # times as fast as B",
        ),
        (
            ['--loss=3', '--versus=--loss=1'],
            "A does not reach val loss ≤ 2: it ends at 3.0000 after # s, B reaches it in # s; "
            "B is # times as fast as A's whole run",
        ),
        (
            ['--loss=3', '--versus=--loss=4'],
            "A does not reach val loss ≤ 2: it ends at 3.0000 after # s, "
            "B does not reach it: it ends at 4.0000 after # s",
        ),
        (['--loss=2'], "A reaches val loss ≤ 2 in # s"),
        (
            ['--loss=1', '--slope=1', '--seed=1', '--rounds=2'],  # 2, then 3
            "medians of 2 rounds: A does not reach val loss ≤ 2 in 1 of 2 rounds: it ends at 2.5000 after # s",
        ),
    ],
)
def test_the_sentence_is_true_whoever_reaches_the_target(bench, words, sentence):
    done = bench(*words, '--target=2')
    assert re.fullmatch(sentence.replace('#', r'\d+\.\d+'), done.stdout.splitlines()[-1]), (
        done.stdout + done.stderr
    )


@pytest.mark.parametrize(
    'words, message',
    [
        (['--versus=nope.py'], "versus='nope.py': there is no config file 'nope.py'"),
        (['--versus=--help'], "versus='--help': --help can't be set for one side only"),
        (['--versus=--seed=3'], "--seed can't be set for one side only"),
        (['--target=-1'], 'target=-1.0 must be at least 0'),
        (['--target=low'], "target takes a number, not 'low'"),
        (['--target=2', '--steps=5', '--warmup=1'], 'remove steps, warmup'),
        (['--seed=-1'], 'seed=-1 must be at least 0'),
        (['--target=2', '--broken=1'], 'A 1: train.py ended with exit code 1: error: it is broken'),
    ],
)
def test_a_mistake_ends_in_one_line(bench, words, message):
    done = bench(*words)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count('\n') == 1, (
        done.stderr
    )


def test_whole_runs_of_train_itself(text_folder):
    done = run(
        'bench.py', *TINY, f'--dataset={text_folder}', '--target=9', '--versus=--max_iters=3'
    )
    assert done.returncode == 0, done.stderr
    # nothing is added
    assert shlex.split(done.stdout.splitlines()[0])[2:] == [*TINY, f'--dataset={text_folder}']
    assert 'A reaches val loss ≤ 9 in' in done.stdout


def test_a_run_that_ends_before_the_steps_wanted_is_timed_by_those_it_has(text_folder):
    done = run('bench.py', *TINY, f'--dataset={text_folder}', '--steps=100', '--warmup=1')
    assert done.returncode == 0 and 'ms/step' in done.stdout, done.stderr
    done = run('bench.py', *TINY, f'--dataset={text_folder}', '--steps=100', '--warmup=10')
    assert done.returncode == 2 and "larger --max_iters" in done.stderr
