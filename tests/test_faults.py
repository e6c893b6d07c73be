"""Nothing is lost: runs that are killed at any moment, told to stop, short of disk, left by another
process, or fed with what makes their loss no number, end as if nothing had happened; and checks of
these checks, with one mechanism broken.

`python -m pytest -n 0 -s -m campaign tests/test_faults.py` prints the figures of the long forms.
"""

import errno
import functools
import importlib
import io
import itertools
import json
import math
import mmap
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.datasets import write_text
from support.forked import Run, processes_of, ranks, run, torchrun, train, wait_for
from support.hooks import around_saves, both, keep_each
from support.outcomes import learned, metrics, outcome, same, sha256
from support.scripts import ROOT, TINY

import model
from text import dataset
from training import checkpoint, guard, stop

if sys.platform == 'win32':
    pytest.skip("no fork here", allow_module_level=True)
import resource

campaign = pytest.mark.campaign
LONG = [
    *TINY,
    '--max_iters=100000',
    '--lr_decay_iters=2000',
    '--eval_interval=100',
    '--eval_iters=1',
]


def steps_logged(out_dir):
    """How many steps metrics.jsonl tells of."""
    try:
        return (
            max(
                [
                    int(n)
                    for n in re.findall(
                        rb'"iter": (\d+), "loss"', (out_dir / 'metrics.jsonl').read_bytes()
                    )
                ],
                default=-1,
            )
            + 1
        )
    except FileNotFoundError:
        return 0


# ---- kill -9: at every point of a save -----------------------------------------------------------


def state_of(step):
    generator = torch.Generator().manual_seed(step)
    return dict(
        model={'w': torch.randn(3000, generator=generator)},
        model_args={},
        config={},
        iter_num=step,
        best_val_loss=1.0,
        optimizer=None,
    )


@pytest.fixture
def saved(tmp_path):
    """saved() -> a new folder with the checkpoints of steps 1 and 2."""
    checkpoint.save(tmp_path, 'ckpt.pt', state_of(1))
    checkpoint.save(tmp_path, 'ckpt.pt', state_of(2))
    names, numbers = os.listdir(tmp_path), iter(range(10_000))

    def copy():
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        for name in names:
            shutil.copy(tmp_path / name, folder)
        return folder

    return copy


CHANGES = {
    'open',
    'write',
    'writelines',
    'flush',
    'fsync',
    'replace',
    'rename',
    'unlink',
    'remove',
    'mkdir',
    'rmdir',
}


def is_io(function):
    """Whether a function of C's makes system calls on files."""
    return function.__module__ in ('posix', 'io', '_io') or isinstance(
        getattr(function, '__self__', None), io.IOBase
    )


def save_step_3(folder, save=None, on_io=None, limit=None):
    """In a process of its own: save step 3. on_io(name) is called in front of each system call of
    Python's; with `limit` the kernel ends the process where a file would grow larger, in the middle
    of a write."""
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if on_io:
        sys.setprofile(
            lambda frame, event, arg: event == 'c_call' and is_io(arg) and on_io(arg.__name__)
        )
    (save or checkpoint.save)(folder, 'ckpt.pt', state_of(3))
    sys.setprofile(None)


class DieAt:
    """Dies by kill -9 in front of the point-th call of one of these names, or of any."""

    def __init__(self, point, names):
        self.left, self.names = point, names

    def __call__(self, name):
        self.left -= not self.names or name in self.names
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def check_after_death(folder):
    """Step 2 or 3 is there, whole; the next save works and leaves nothing of the one that was cut.
    Returns the step."""
    state = checkpoint.read_latest(folder)
    assert state['iter_num'] in (2, 3) and same(state, state_of(state['iter_num']))
    checkpoint.save(folder, 'ckpt.pt', state_of(4))
    assert same(checkpoint.read_latest(folder), state_of(4))
    assert sorted(os.listdir(folder)) == ['ckpt.prev.pt', 'ckpt.pt', 'sums.json']
    return state['iter_num']


@pytest.mark.parametrize('names', [CHANGES, pytest.param(None, marks=campaign)])
def test_a_save_that_is_killed_in_front_of_any_system_call(saved, names):
    found = []
    while True:
        folder = saved()
        done = Run(
            None, hook=functools.partial(save_step_3, folder, None, DieAt(len(found), names))
        ).wait()
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.output
        found.append(check_after_death(folder))
    print(
        f"\nkilled in front of {len(found)} system calls: step 2 is there {found.count(2)}, 3 {found.count(3)} times"
    )
    assert len(found) > 15 and found == sorted(found) and set(found) == {2, 3}


@pytest.mark.parametrize('pieces', [6, pytest.param(60, marks=campaign)])
def test_a_save_that_is_killed_in_the_middle_of_a_write(saved, pieces):
    size = (saved() / 'ckpt.pt').stat().st_size
    for limit in [size * i // pieces for i in range(pieces)]:
        folder = saved()
        done = Run(None, hook=functools.partial(save_step_3, folder, None, None, limit)).wait()
        assert done.returncode == -signal.SIGXFSZ, done.output
        assert check_after_death(folder) == 2


def save_in_place(out_dir, name, state):
    torch.save(state, Path(out_dir) / name)


def test_that_a_save_in_place_would_be_found_out(saved):
    folder = saved()
    (folder / 'sums.json').unlink()
    (folder / 'ckpt.prev.pt').unlink()
    done = Run(None, hook=functools.partial(save_step_3, folder, save_in_place, None, 7000)).wait()
    assert done.returncode == -signal.SIGXFSZ
    with pytest.raises(ValueError, match='damaged'):
        check_after_death(folder)


def test_what_is_renamed_has_been_synced(saved, monkeypatch):
    """A kill does not show it, a power cut does: each file is on the disk before it takes a name,
    each name at the end."""
    calls = []
    for name, real in dict(fsync=os.fsync, replace=os.replace).items():

        def call(*args, real=real, name=name):
            calls.append(
                (
                    name,
                    Path(f'/proc/self/fd/{args[0]}').resolve()
                    if name == 'fsync'
                    else Path(args[0]),
                )
            )
            real(*args)

        monkeypatch.setattr(os, name, call)
    folder = saved()
    calls.clear()
    checkpoint.save(folder, 'ckpt.pt', state_of(3))
    if not Path('/proc/self/fd').exists():
        pytest.skip("no /proc here")
    synced = set()
    for name, path in calls:
        assert (
            name == 'fsync'
            or path.name == 'ckpt.pt'
            or path in synced
            or path.name == '.ckpt.pt.new'
        )
        synced.add(path)
    assert calls[-1] == ('fsync', folder) and {'..ckpt.pt.new.tmp', '.sums.json.tmp'} <= {
        path.name for path in synced
    }


# ---- kill -9: a run, again and again -------------------------------------------------------------


class Board:
    """A number that a process writes and that outlives it: how often it has gone into a save or out
    of one."""

    def __init__(self, path):
        self.path = path
        if not path.exists():
            path.write_bytes(bytes(8))
        self.memory = mmap.mmap(os.open(path, os.O_RDWR), 8)

    def __reduce__(self):
        return Board, (self.path,)

    def get(self):
        return struct.unpack('q', self.memory[:8])[0]

    def set(self, value):
        self.memory[:8] = struct.pack('q', value)

    def count(self, *args):
        self.set(self.get() + 1)


def watch_saves(board, save=None):
    """Hook: count on the board, odd numbers are inside a save."""
    if save:
        checkpoint.save = save
    around_saves(board.count, board.count)


def kill_again_and_again(out_dir, settings, kills, seed, interval, save=None):
    """Start a run blindly and kill it, `kills` times, half of them inside a save, then let it end;
    returns figures.

    AssertionError, ValueError: there was no good checkpoint, or one that is too old."""
    rng, board = random.Random(seed), Board(out_dir.with_name('board'))

    def start():
        return Run(
            'train.py',
            *settings,
            '--init_from=auto',
            f'--out_dir={out_dir}',
            hook=functools.partial(watch_saves, board, save),
        )

    inside, worst, took, restarts = 0, 0, 0.02, []
    for number in range(kills):
        board.set(0)
        run, began = start(), time.monotonic()
        if inside < (number + 1) // 2:
            entry = 2 * rng.randrange(4) + 1
            wait_for(lambda: board.get() >= entry or not run.is_alive(), step=5e-4)
            restarts.append(time.monotonic() - began)
            time.sleep(rng.uniform(0, took))
        else:
            time.sleep(rng.uniform(0, 1.5 * max(restarts, default=0.5)))
        run.kill()
        done = run.wait()
        assert done.returncode == -signal.SIGKILL, (
            f"it was over before it was killed:\n{done.output}"
        )
        inside += board.get() % 2
        if (
            (out_dir / 'ckpt.pt').exists()
            or (out_dir / 'ckpt.prev.pt').exists()
            or steps_logged(out_dir) > interval
        ):
            lost = steps_logged(out_dir) - checkpoint.read_latest(out_dir)['iter_num']
            assert lost <= interval, f"{lost} steps are lost"
            worst = max(worst, lost)
    end = checkpoint.read_latest(out_dir)['iter_num'] + 20
    said = train(out_dir, *settings, '--init_from=auto', '--save_minutes=0', f'--max_iters={end}')
    assert 'starting afresh' not in said and not list(out_dir.glob('earlier-*'))
    return (
        f"{kills} kills, {inside} inside a save, at most {worst} step(s) lost of an interval of {interval}",
        end,
    )


@pytest.mark.parametrize(
    'kills, interval',
    [(6, 1), pytest.param(200, 1, marks=campaign), pytest.param(100, 5, marks=campaign)],
)
def test_killed_again_and_again_a_run_ends_where_it_would_have(
    text_folder, tmp_path, kills, interval
):
    saves = (
        ['--save_minutes=1e-9']
        if interval == 1
        else [f'--eval_interval={interval}', '--save_minutes=0']
    )
    settings = [*LONG, '--eval_interval=25', f'--dataset={text_folder}', *saves]
    began = time.monotonic()
    figures, n = kill_again_and_again(tmp_path / 'killed', settings, kills, 1, interval)
    train(tmp_path / 'whole', *settings, '--save_minutes=0', f'--max_iters={n}', limit=600)
    assert outcome(tmp_path / 'killed') == outcome(tmp_path / 'whole')
    print(f"\n{figures}; {n} steps end at the same bits; {time.monotonic() - began:.0f} s")


@campaign
def test_that_kills_find_out_a_save_in_place(text_folder, tmp_path):
    settings = [*LONG, f'--dataset={text_folder}', '--save_minutes=1e-9']
    with pytest.raises((ValueError, AssertionError)) as caught:
        kill_again_and_again(tmp_path / 'killed', settings, 100, 1, 1, save_in_place)
    print(f"\na save in place: {str(caught.value)[:200]}")


# ---- told to stop --------------------------------------------------------------------------------


class Torchrun:
    """What forked.torchrun is, with the real command."""

    def __init__(self, n, *words, restarts=0, script=('train.py',), limit=120):
        command = [
            '-m',
            'torch.distributed.run',
            '--standalone',
            f'--nproc_per_node={n}',
            f'--max-restarts={restarts}',
            '--signals-to-handle=SIGTERM,SIGINT,SIGUSR1',
            *script,
        ]
        self.said = tempfile.NamedTemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, *command, *words],
            cwd=ROOT,
            start_new_session=True,
            stdout=self.said,
            stderr=subprocess.STDOUT,
            env={**os.environ, 'OMP_NUM_THREADS': '1'},
        )
        self.pid, self.limit = self.process.pid, limit

    def is_alive(self):
        return self.process.poll() is None

    def wait(self):
        code = self.process.wait(self.limit)
        return SimpleNamespace(returncode=code, output=self.text())

    def text(self):
        return Path(self.said.name).read_text(errors='replace')


def starters(settings):
    """{name: function that starts training blindly -> (processes to wait for, function -> ids of
    those that train)}"""

    def direct():
        run = Run('train.py', *settings)
        return [run], lambda: [run.pid]

    def two():
        runs = ranks(2, 'train.py', *settings)
        return runs, lambda: [run.pid for run in runs]

    def agent(kind=torchrun):
        run = kind(2, *settings)
        return [run], lambda: processes_of(parent=run.pid)

    return dict(direct=direct, two=two, agent=agent, torchrun=functools.partial(agent, Torchrun))


def passed_on(agent):
    """The lines in which torchrun's agent says that it passes a signal on, one for each process."""
    return re.findall('(?:Closing|Sending) process', agent.text())


def stop_again_and_again(how, to, out_dir, settings, stops, seed):
    """Start a run blindly and tell it to stop, `stops` times, by each signal in turn; returns
    figures.

    to: 'all' processes that train, any 'one' of them, or their 'agent'."""
    rng, start = (
        random.Random(seed),
        starters([*settings, '--init_from=auto', f'--out_dir={out_dir}'])[how],
    )
    late, waited = 0, []
    for number in [(signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)[i % 3] for i in range(stops)]:
        before, (runs, trainers) = steps_logged(out_dir), start()
        wait_for(
            lambda: steps_logged(out_dir) > before + rng.randrange(3) or not runs[0].is_alive()
        )
        assert not (out_dir / 'preempted').exists()
        time.sleep(rng.uniform(0, 0.02))
        trains = trainers()
        for pid in trains:  # frozen, so that the step it is at is known
            os.kill(pid, signal.SIGSTOP)
        logged, told = (
            steps_logged(out_dir),
            {'all': trains, 'one': [rng.choice(trains)], 'agent': [runs[0].pid]}[to],
        )
        began = time.monotonic()
        for pid in told:
            os.kill(pid, number)
        if to == 'agent':  # which passes it on, saying so for each process
            wait_for(lambda: len(passed_on(runs[0])) == len(trains), 10)
        for pid in trains:
            os.kill(pid, signal.SIGCONT)
        done = [run.wait() for run in runs]
        waited.append(time.monotonic() - began)
        step = checkpoint.read_latest(out_dir)['iter_num']
        # the one that is told may be a step ahead of the master, which logs
        most = logged + 1 + (to == 'one')
        assert step <= most and (out_dir / 'preempted').read_text() == f'saved at step {step}\n', (
            done[0].output
        )
        late = max(late, step - logged)
        codes = {done.returncode for done in done}
        if how in ('agent', 'torchrun'):
            assert codes == {1 if to == 'agent' else 0}, done[0].output
        else:
            assert 128 + number in codes and codes <= {128 + number, 128 + signal.SIGTERM}, done[
                0
            ].output
        assert all('Traceback' not in done.output or to == 'agent' for done in done), done[0].output
        wait_for(lambda: not any(processes_of(session=run.pid) for run in runs), 10)
    train(
        out_dir,
        *settings,
        '--init_from=auto',
        f'--max_iters={step + 20}',
        processes=1 if how == 'direct' else 2,
    )
    assert not (out_dir / 'preempted').exists()
    return (
        f"{how}, to {to}: {stops} of {stops} saved, at most {late} step(s) after the last one logged; gone within "
        f"{max(waited):.1f} s"
    ), step + 20


@pytest.mark.parametrize(
    'how, to, stops',
    [
        ('direct', 'all', 3),
        ('two', 'one', 1),
        ('agent', 'agent', 1),
        *[
            pytest.param(*case, marks=campaign)
            for case in [
                ('direct', 'all', 50),
                ('two', 'one', 50),
                ('agent', 'all', 50),
                ('agent', 'one', 50),
                ('agent', 'agent', 50),
                ('torchrun', 'all', 25),
                ('torchrun', 'agent', 25),
            ]
        ],
    ],
)
def test_told_to_stop_again_and_again_a_run_ends_where_it_would_have(
    text_folder, tmp_path, how, to, stops
):
    settings = [*LONG, f'--dataset={text_folder}']
    figures, n = stop_again_and_again(how, to, tmp_path / 'stopped', settings, stops, 1)
    train(
        tmp_path / 'whole',
        *settings,
        f'--max_iters={n}',
        processes=1 if how == 'direct' else 2,
        limit=600,
    )
    assert outcome(tmp_path / 'stopped') == outcome(tmp_path / 'whole')
    print(f"\n{figures}")


def be_deaf():
    stop.STOP_SIGNALS = []


def test_that_a_run_which_does_not_listen_loses_everything(text_folder, tmp_path):
    run = Run('train.py', *LONG, f'--dataset={text_folder}', f'--out_dir={tmp_path}', hook=be_deaf)
    wait_for(lambda: steps_logged(tmp_path) > 2)
    run.kill(signal.SIGTERM)
    assert run.wait().returncode == -signal.SIGTERM and not (tmp_path / 'preempted').exists()
    with pytest.raises(FileNotFoundError):
        checkpoint.read_latest(tmp_path)


def hang_in_saves(grace):
    stop.GRACE_SECONDS = grace
    around_saves(lambda *args: time.sleep(60))


def test_a_save_that_hangs_after_a_signal_is_given_up(text_folder, tmp_path):
    run = Run(
        'train.py',
        *LONG,
        f'--dataset={text_folder}',
        f'--out_dir={tmp_path}',
        hook=functools.partial(hang_in_saves, 0.5),
    )
    wait_for(lambda: steps_logged(tmp_path) > 2)
    run.kill(signal.SIGTERM)
    began = time.monotonic()
    done = run.wait(10)
    assert done.returncode == 128 + signal.SIGTERM and 0.4 < time.monotonic() - began < 10
    assert 'error: not saved within 0.5 s of the signal: ending without' in done.output


def slow_evaluations():
    """Each batch of an evaluation takes its time, and SIGTERM comes in the first one behind step
    0."""
    from text import dataset

    usual, seen = dataset.Dataset.eval_batch, []

    def eval_batch(self, *args):
        seen.append(args)
        if len(seen) == 5:  # 2 batches of 2 splits are step 0's
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2 if len(seen) > 4 else 0)
        return usual(self, *args)

    dataset.Dataset.eval_batch = eval_batch


def test_a_signal_in_a_long_evaluation_loses_nothing_and_the_run_that_goes_on_evaluates(
    text_folder, tmp_path
):
    settings = [
        *TINY,
        f'--dataset={text_folder}',
        '--max_iters=3',
        '--lr_decay_iters=3',
        '--eval_interval=0',
    ]
    done = Run(
        'train.py',
        *settings,
        '--eval_interval=3',
        f'--out_dir={tmp_path / "cut"}',
        hook=slow_evaluations,
    ).wait()
    assert done.returncode == 128 + signal.SIGTERM and 'saved at step 3' in done.output
    assert checkpoint.read_latest(tmp_path / 'cut')['progress']['evaluated'] == 0
    train(tmp_path / 'cut', '--init_from=resume')
    train(tmp_path / 'whole', *settings, '--eval_interval=3')
    assert outcome(tmp_path / 'cut') == outcome(tmp_path / 'whole')


def test_a_second_signal_ends_at_once(text_folder, tmp_path):
    run = Run(
        'train.py',
        *LONG,
        f'--dataset={text_folder}',
        f'--out_dir={tmp_path}',
        hook=functools.partial(hang_in_saves, 60),
    )
    wait_for(lambda: steps_logged(tmp_path) > 2)
    run.kill(signal.SIGTERM)
    wait_for(lambda: 'a second signal ends without saving' in run.text())
    time.sleep(2.1)  # sooner, it counts as the same one
    run.kill(signal.SIGTERM)
    assert run.wait(5).returncode == 128 + signal.SIGTERM


# ---- a process is lost ---------------------------------------------------------------------------


def lose_again_and_again(kind, out_dir, settings, losses, seed):
    """Kill -9 one of two processes that train under torchrun, `losses` times; returns (return code,
    output, figures)."""
    rng = random.Random(seed)
    run = kind(2, *settings, '--init_from=auto', f'--out_dir={out_dir}', restarts=losses, limit=900)
    workers, took, lost_at = [], [], 0.0
    for number in range(losses + 1):
        gone = workers
        wait_for(
            lambda: len(now := processes_of(parent=run.pid)) == 2 and not {*now} & {*gone}, step=0.1
        )
        before = steps_logged(out_dir)
        wait_for(lambda: steps_logged(out_dir) not in (0, before))
        if number:
            took.append(time.monotonic() - lost_at)
        if number < losses:
            time.sleep(rng.uniform(0, 0.1))
            workers, lost_at = processes_of(parent=run.pid), time.monotonic()
            os.kill(rng.choice(workers), signal.SIGKILL)
    done = run.wait()
    wait_for(lambda: not processes_of(session=run.pid), 10)
    return (
        done,
        f"{losses} processes lost; the next step followed after {min(took):.1f} to {max(took):.1f} s",
    )


@pytest.mark.parametrize(
    'kind, n',
    [
        (torchrun, 1),
        pytest.param(torchrun, 20, marks=campaign),
        pytest.param(Torchrun, 20, marks=campaign),
    ],
)
def test_processes_that_are_lost_again_and_again_change_nothing(text_folder, tmp_path, kind, n):
    settings = [
        *LONG,
        f'--max_iters={40 * n + 20}',
        '--save_minutes=1e-9',
        f'--dataset={text_folder}',
    ]
    done, figures = lose_again_and_again(kind, tmp_path / 'lossy', settings, n, 1)
    assert done.returncode == 0, done.output
    train(tmp_path / 'whole', *settings, '--save_minutes=0', processes=2, limit=600)
    assert outcome(tmp_path / 'lossy') == outcome(tmp_path / 'whole')
    print(f"\n{kind.__name__}: {figures}")


def test_a_lost_process_without_restarts_ends_the_run(text_folder, tmp_path):
    """What the test above is about: torchrun alone does not go on, and says which process it
    lost."""
    run = torchrun(2, *LONG, f'--dataset={text_folder}', f'--out_dir={tmp_path}')
    wait_for(lambda: steps_logged(tmp_path) > 2)
    os.kill(processes_of(parent=run.pid)[1], signal.SIGKILL)
    began, done = time.monotonic(), run.wait()
    assert done.returncode == 1 and time.monotonic() - began < 30
    assert 'error: process 0 lost contact with another one' in done.output and not processes_of(
        session=run.pid
    )


# ---- an error in one of several processes --------------------------------------------------------


def failing(rank, where, number, error):
    """Hook: on this rank the number-th call of `where`, as module:name, raises the error."""
    if os.environ.get('RANK') != str(rank):
        return
    module, name = where.split(':')
    owner = functools.reduce(getattr, name.split('.')[:-1], importlib.import_module(module))
    name, calls = name.split('.')[-1], iter(range(10**9))
    real = getattr(owner, name)

    def call(*args, **kwargs):
        if next(calls) == number:
            raise error
        return real(*args, **kwargs)

    setattr(owner, name, call)


FULL = OSError(errno.ENOSPC, 'No space left on device', 'ckpt.pt')
GONE = OSError('data/here is missing on this machine')
FAILURES = [  # on which rank, where, at which call, what; words in the output
    (0, 'text.dataset_option:open_dataset', 0, GONE, 'error: data/here is missing on this machine'),
    (1, 'text.dataset_option:open_dataset', 0, GONE, 'error: data/here is missing on this machine'),
    (
        0,
        'training.checkpoint:make_out_dir',
        0,
        OSError("out_dir='x' can't be written to"),
        "error: out_dir='x' can't be written to",
    ),
    (0, 'training.checkpoint:save', 0, FULL, 'error: ckpt.pt: No space left on device'),
    (0, 'training.metrics:Metrics.log', 3, FULL, 'error: ckpt.pt: No space left on device'),
    (0, 'text.dataset:Dataset.eval_batch', 2, GONE, 'error: data/here is missing'),
    (1, 'text.dataset:Dataset.eval_batch', 2, GONE, 'error: data/here is missing'),
    (1, 'text.dataset:Dataset.train_batch', 2, GONE, 'error: data/here is missing'),
    (
        0,
        'model:GPT.forward',
        5,
        RuntimeError('an unforeseen end'),
        'RuntimeError: an unforeseen end',
    ),
    (
        1,
        'model:GPT.forward',
        5,
        RuntimeError('an unforeseen end'),
        'RuntimeError: an unforeseen end',
    ),
    (1, 'model:GPT.forward', 5, RuntimeError('out of memory'), 'error: out of memory: '),
]


@pytest.mark.parametrize(
    'rank, where, number, error, words',
    [
        FAILURES[i] if i in (1, 3, 7, 8) else pytest.param(*FAILURES[i], marks=campaign)
        for i in range(len(FAILURES))
    ],
)
def test_an_error_in_one_process_ends_all(text_folder, tmp_path, rank, where, number, error, words):
    hook = functools.partial(failing, rank, where, number, error)
    began = time.monotonic()
    runs = ranks(
        2, 'train.py', *TINY, f'--dataset={text_folder}', f'--out_dir={tmp_path}', hook=hook
    )
    done = [run.wait(60) for run in runs]
    took = time.monotonic() - began
    assert took < 30 and all(done.returncode not in (0, -signal.SIGALRM) for done in done)
    # torch.distributed's excepthook writes the rank in front of each line of a traceback
    lines = [line.removeprefix(f'[rank{rank}]: ') for line in done[rank].output.splitlines()]
    assert any(line.startswith(words) for line in lines), done[rank].output
    assert f'error: process {1 - rank} lost contact with another one' in done[1 - rank].output


@campaign
@pytest.mark.parametrize('case', range(len(FAILURES)))
def test_torchrun_names_the_process_with_the_error(text_folder, tmp_path, case):
    rank, where, *_, words = FAILURES[case]
    (tmp_path / 'stub.py').write_text(f"""
import functools, sys
sys.path[0:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]
import test_faults
from support import forked
hook = functools.partial(test_faults.failing, *test_faults.FAILURES[{case}][:4])
sys.exit(forked.run_here('train.py', sys.argv[1:], hook))
""")
    began = time.monotonic()
    run = Torchrun(
        2,
        *TINY,
        f'--dataset={text_folder}',
        f'--out_dir={tmp_path / "out"}',
        script=[tmp_path / 'stub.py'],
    )
    done = run.wait()
    summary = done.output.partition('Root Cause')[2]
    print(
        f"\n{where} on {rank}: exit code {done.returncode} after {time.monotonic() - began:.1f} s, imports included;",
        ' '.join(' '.join(summary.split()).split()[6:40]),
    )
    assert done.returncode == 1 and words in done.output and not processes_of(session=run.pid)
    assert f'rank      : {rank} ' in summary and words.removeprefix('error: ') in summary


# ---- losses that are no number, and spikes -------------------------------------------------------

EVIL = {
    'a loss that is no number': lambda loss: loss * math.nan,
    'an infinite loss': lambda loss: loss * math.inf,
    'gradients that are no numbers': lambda loss: (
        loss.register_hook(lambda grad: grad * math.nan) and loss
    ),
    'a spike': lambda loss: loss * 10,
}


def poison(kind, steps, rank='0', note=None, **guards):
    """Hook: on this rank the data of these steps (counted in the data, not in the run) do this to
    the loss.

    Each call of the optimizer's step writes the sum of weights and moments into a file of the
    rank's in the folder `note`. guards: constants of guard.py."""
    for name, value in guards.items():
        setattr(guard, name, value)
    me, at = os.environ.get('RANK', '0'), [0]
    train_batch, forward, step = (
        dataset.Dataset.train_batch,
        model.GPT.forward,
        torch.optim.AdamW.step,
    )

    def remember(self, step, micro):
        at[0] = step
        return train_batch(self, step, micro)

    def do_evil(self, idx, targets=None, cache=None):
        logits, loss = forward(self, idx, targets, cache)
        return logits, EVIL[kind](loss) if self.training and at[0] in steps and me == rank else loss

    def write(self, *args):
        done = step(self, *args)
        with open(note / me, 'a') as file:
            weights = [p for group in self.param_groups for p in group['params']]
            print(sha256([weights, self.state_dict()['state']]), file=file)
        return done

    dataset.Dataset.train_batch, model.GPT.forward = remember, do_evil
    if note:
        torch.optim.AdamW.step = write


def lines_with(out_dir, key):
    return [line for line in metrics(out_dir) if key in line]


@pytest.mark.parametrize(
    'kind',
    [
        kind if 'numbers' in kind or 'spike' in kind else pytest.param(kind, marks=campaign)
        for kind in EVIL
    ],
)
def test_one_bad_step_costs_its_own_update_and_no_more(text_folder, tmp_path, kind):
    hook = functools.partial(poison, kind, {5}, note=tmp_path, MEMORY=4)
    out = train(tmp_path / 'out', *LONG, '--max_iters=8', f'--dataset={text_folder}', hook=hook)
    sums = (tmp_path / '0').read_text().split()
    assert [i for i in range(1, 8) if sums[i] == sums[i - 1]] == [5]  # to the bit
    assert [
        (line['iter'], line['skipped']) for line in lines_with(tmp_path / 'out', 'skipped')
    ] == [(5, 1)]
    assert out.count('update skipped') == 1
    assert [line['iter'] for line in lines_with(tmp_path / 'out', 'lr')] == [*range(8)]
    assert all(tensor.isfinite().all() for tensor in learned(tmp_path / 'out')['model'].values())


def test_all_processes_leave_it_out(text_folder, tmp_path):
    hook = functools.partial(poison, 'a loss that is no number', {5}, '1', tmp_path)
    train(
        tmp_path / 'out', *LONG, '--max_iters=8', f'--dataset={text_folder}', hook=hook, processes=2
    )
    sums = [(tmp_path / rank).read_text().split() for rank in '01']
    assert sums[0] == sums[1] and [i for i in range(1, 8) if sums[0][i] == sums[0][i - 1]] == [5]


def no_guard():
    guard.Guard.mark_if_bad = lambda self, *args: None


def test_that_without_the_guard_the_weights_are_lost(text_folder, tmp_path):
    hook = functools.partial(
        both, functools.partial(poison, 'a loss that is no number', {5}), no_guard
    )
    done = run(
        'train.py',
        *LONG,
        '--max_iters=8',
        f'--dataset={text_folder}',
        f'--out_dir={tmp_path}',
        hook=hook,
    )
    # the data of step 6 are good
    assert lines_with(tmp_path, 'skipped') == [] and 'iter 6: loss nan' in done.output


ROLLED = [*TINY, '--max_iters=20', '--save_minutes=0']  # evaluates, and saves, every third step


@pytest.mark.parametrize(
    'kind, processes',
    [
        ('a loss that is no number', 2),
        pytest.param('gradients that are no numbers', 1, marks=campaign),
    ],
)
def test_a_run_that_diverges_goes_back_and_past_the_data_that_did_it(
    text_folder, tmp_path, kind, processes
):
    evil = functools.partial(poison, kind, {*range(7, 12)}, str(processes - 1))
    keep = functools.partial(around_saves, after=functools.partial(keep_each, tmp_path / 'cuts'))
    first = functools.partial(around_saves, after=functools.partial(keep_first, tmp_path / 'good'))
    settings = [*ROLLED, f'--dataset={text_folder}']
    out = train(
        tmp_path / 'out',
        *settings,
        processes=processes,
        hook=functools.partial(both, evil, first, keep),
    )
    assert 'diverged before step 12: back to the checkpoint of step 6' in out
    (line,) = lines_with(tmp_path / 'out', 'diverged_at')
    assert (line['iter'], line['diverged_at'], line['data_offset']) == (5, 12, 6)
    before, after = (
        checkpoint.read(tmp_path / name / '6' / 'ckpt.pt') for name in ('good', 'cuts')
    )
    assert same(before['model'], after['model']) and same(
        before['optimizer']['state'], after['optimizer']['state']
    )
    assert (before['progress']['data_offset'], after['progress']['data_offset']) == (0, 6)
    assert [line['iter'] for line in lines_with(tmp_path / 'out', 'lr')] == [*range(20)]
    # resumed behind the rollback, it is the same run
    for cut in ('6', '9', '18') if processes == 1 else ('6',):
        train(tmp_path / 'cuts' / cut, '--init_from=resume', processes=processes, hook=evil)
        assert outcome(tmp_path / 'cuts' / cut) == outcome(tmp_path / 'out')


def keep_first(folder, out_dir, name, state):
    """For `around_saves`: like keep_each, but what is there stays."""
    if not (folder / str(state['iter_num'])).exists():
        keep_each(folder, out_dir, name, state)


def forget_offset():
    real = guard.skip_data

    def forgetful(stored, progress, iter_num, out_dir):
        stored = real(stored, progress, iter_num, out_dir)
        stored['progress'] |= dict(data_offset=progress.data_offset)
        return stored

    guard.skip_data = forgetful


@pytest.mark.parametrize(
    'bad, hook, end, step',
    [
        # the same data again
        (range(7, 12), forget_offset, 'had been rolled back from step 12 to 6 already', 6),
        (range(7, 99), None, 'had been rolled back from step 12 to 6 already', 6),
        (range(99), None, 'no checkpoint to go back to', 5),  # it has saved what it had
    ],
)
def test_what_other_data_do_not_help_ends_with_one_line(
    text_folder, tmp_path, bad, hook, end, step
):
    evil = functools.partial(poison, 'a loss that is no number', {*bad})
    done = run(
        'train.py',
        *ROLLED,
        f'--dataset={text_folder}',
        f'--out_dir={tmp_path}',
        hook=functools.partial(both, evil, hook) if hook else evil,
    )
    (line,) = [line for line in done.output.splitlines() if line.startswith('error: ')]
    assert done.returncode == 2 and end in line and 'Traceback' not in done.output
    state = checkpoint.read_latest(tmp_path)
    assert state['iter_num'] == step and all(
        tensor.isfinite().all() for tensor in state['model'].values()
    )
    if not state['progress'].get('rolled_back_to', -1) >= 0:  # with a cure, the saved state goes on
        train(tmp_path, '--init_from=resume')


def test_where_nothing_is_left_to_save_a_line_says_so(text_folder, tmp_path):
    """Without clipping nobody looks at the gradients of steps that are not logged: NaN reaches the
    weights."""
    hook = functools.partial(poison, 'gradients that are no numbers', {3})
    done = run(
        'train.py',
        *LONG,
        '--grad_clip=0',
        '--log_interval=1000',
        f'--dataset={text_folder}',
        f'--out_dir={tmp_path}',
        hook=hook,
    )
    (line,) = [line for line in done.output.splitlines() if line.startswith('error: ')]
    assert done.returncode == 2 and 'its weights are NaN, so nothing is saved' in line
    assert not (tmp_path / 'ckpt.pt').exists()


def test_a_loss_that_stays_high_is_let_through_and_ends_no_run(text_folder, tmp_path):
    """Skipping every update would keep the loss where it is."""
    hook = functools.partial(poison, 'a spike', {*range(6, 99)}, note=tmp_path, MEMORY=4)
    train(tmp_path / 'out', *LONG, '--max_iters=30', f'--dataset={text_folder}', hook=hook)
    sums = (tmp_path / '0').read_text().split()
    skipped = [i for i in range(1, 30) if sums[i] == sums[i - 1]]
    assert skipped[:4] == [6, 7, 8] and len(lines_with(tmp_path / 'out', 'skipped')) == 3


def diverge(step, factor):
    """Hook: in front of this step the weights are multiplied, as by an update far too large."""
    real = guard.Guard.mark_if_bad
    calls = itertools.count()

    def spoil(self, optimizer, *args):
        if next(calls) == step:
            with torch.no_grad():
                for group in optimizer.param_groups:
                    for p in group['params']:
                        p.mul_(factor)
        return real(self, optimizer, *args)

    guard.Guard.mark_if_bad = spoil
    guard.LEAST_STEPS = 10


def test_losses_that_stay_far_above_the_lowest_end_a_run_which_has_saved_all(text_folder, tmp_path):
    settings = [
        *TINY,
        '--max_iters=300',
        '--learning_rate=3e-2',
        '--lr_schedule=step',
        '--lr_decay_iters=90',
        f'--dataset={text_folder}',
    ]
    hook = functools.partial(diverge, 100, 100.0)
    done = run('train.py', *settings, '--min_lr=1e-5', f'--out_dir={tmp_path}', hook=hook)
    (line,) = [line for line in done.output.splitlines() if line.startswith('error: ')]
    assert (
        done.returncode == 2 and 'the run diverged: for ' in line and 'Traceback' not in done.output
    )
    state = checkpoint.read_latest(tmp_path)
    assert (
        100 < state['iter_num'] < 300
        and f"ckpt.pt has the state of step {state['iter_num']}" in line
    )
    assert (tmp_path / 'best.pt').exists()
    # and a run that recovers from the same goes on
    done = run('train.py', *settings, '--min_lr=3e-2', f'--out_dir={tmp_path}', hook=hook)
    assert done.returncode == 0, done.output


# 28 characters, of which windows of 32 see 7 phases an epoch
GREETING = 'Hi, world! How are you? ok!\n'


def memorised(folder, text):
    return write_text(folder, text * (40_000 // len(text)))


SMALL = [
    '--model=gpt',
    '--n_layer=1',
    '--n_head=2',
    '--n_embd=16',
    '--block_size=32',
    '--batch_size=4',
    '--device=cpu',
    '--gradient_accumulation_steps=1',
    '--warmup_iters=0',
    '--eval_iters=1',
    '--eval_interval=0',
    '--dtype=float32',
    '--compile=False',
]


def test_a_run_that_memorises_its_text_is_not_ended(tmp_path):
    """Its loss is 0.0000 until the next epoch cuts the text at other places, where it jumps to 4
    for some steps."""
    data = memorised(tmp_path / 'text', GREETING)
    train(tmp_path / 'out', *SMALL, '--max_iters=1700', f'--dataset={data}')
    losses = [line['loss'] for line in lines_with(tmp_path / 'out', 'lr')]
    assert max(losses[1350:]) > 1 and min(losses[-200:]) < 0.1  # there was a jump, and it recovered


def widest(path):
    """Hook: write the largest z of a loss that the guard has judged."""
    real, found = guard.Guard.mark_if_bad, [0.0]

    def judge(self, optimizer, scaler, loss, grad_norm=None):
        if self.now.seen >= guard.MEMORY:
            deviation = max(math.sqrt(self.now.variance), guard.FLOOR)
            found[0] = max(found[0], (loss.item() - self.now.average) / deviation)
            path.write_text(str(found[0]))
        return real(self, optimizer, scaler, loss, grad_norm)

    guard.Guard.mark_if_bad = judge


CLEAN = [
    ([f'--learning_rate={lr}', *words], seed)
    for seed, (lr, words) in enumerate(
        itertools.product(
            (1e-3, 1e-2, 3e-2, 1e-1),
            (
                ['--dropout=0'],
                ['--dropout=0.2', '--batch_size=2'],
                ['--dtype=bfloat16'],
                ['--model=modern', '--muon_lr=0.02'],
                ['--optimizer=sgd', '--warmup_iters=50'],
            ),
        )
    )
]


@campaign
def test_no_false_alarm_in_clean_runs(tmp_path):
    text = '\n'.join(path.read_text() for path in sorted(ROOT.glob('*.py')))
    data, found = write_text(tmp_path / 'text', text), []
    for words, seed in CLEAN:
        out_dir = tmp_path / str(seed)
        train(
            out_dir,
            *LONG,
            '--max_iters=500',
            *words,
            f'--seed={seed}',
            f'--dataset={data}',
            limit=600,
            hook=functools.partial(widest, tmp_path / f'z{seed}'),
        )
        found.append(
            (len(lines_with(out_dir, 'skipped')), float((tmp_path / f'z{seed}').read_text()))
        )
        print(words, found[-1], f"loss {lines_with(out_dir, 'lr')[-1]['loss']:.3f}", flush=True)
    alarms, widths = zip(*found)
    print(
        f"\n{len(CLEAN)} clean runs of 500 steps: {sum(alarms)} alarms, largest z {max(widths):.2f}"
    )
    assert not any(alarms)


# Runs whose losses jump for a while, and that recover: the guard may skip updates, but must not end
# them.


def conversations(folder, n=400):
    """A dataset of short questions and answers, most of whose answers are one digit: few targets a
    batch."""
    rows = [
        dict(
            messages=[
                dict(role='user', content=f'{i % 7} + {i % 3}? ' * 9),
                dict(role='assistant', content=str(i % 7 + i % 3)),
            ]
        )
        for i in range(n)
    ]
    source = folder.with_suffix('.jsonl')
    source.write_text('\n'.join(map(json.dumps, rows)))
    done = run('data/prepare.py', folder, source, '--tokenizer=byte', '--num_proc=1')
    assert done.returncode == 0, done.output
    return folder


ROUGH = [*SMALL, '--max_iters=3000', '--eval_interval=100']
FEW_TARGETS = [*ROUGH, '--dataset={chats}', '--batch_size=1', '--eval_iters=50']
ROUGH_RUNS = {  # {folder} stands for a dataset or a run of `rough_folders`
    'memorises 28 characters': [*ROUGH, '--dataset={greeting}'],
    'memorises the alphabet': [*ROUGH, '--dataset={alphabet}'],
    'memorises one letter': [*ROUGH, '--dataset={letter}'],
    'rate 0.03': [*ROUGH, '--dataset={code}', '--learning_rate=0.03'],
    'rate 0.1': [*ROUGH, '--dataset={code}', '--learning_rate=0.1'],
    'rate 0.3': [*ROUGH, '--dataset={code}', '--learning_rate=0.3'],
    'rate 1': [*ROUGH, '--dataset={code}', '--learning_rate=1'],
    'SGD, rate 3': [*ROUGH, '--dataset={code}', '--optimizer=sgd', '--learning_rate=3'],
    'SGD, rate 3, decaying': [
        *ROUGH,
        '--dataset={code}',
        '--optimizer=sgd',
        '--learning_rate=3',
        '--lr_decay_iters=3000',
        '--min_lr=0.01',
    ],
    'Muon, rate 0.3': [
        *ROUGH,
        '--model=modern',
        '--dataset={code}',
        '--muon_lr=0.3',
        '--embed_lr=1',
    ],
    'float16': [*ROUGH, '--dtype=float16', '--dataset={code}', '--learning_rate=0.03'],
    'float16 memorises': [*ROUGH, '--dtype=float16', '--dataset={alphabet}'],
    'few targets': FEW_TARGETS,
    'few targets, rate 0.1': [*FEW_TARGETS, '--learning_rate=0.1'],
    'LoRA': [
        *ROUGH,
        '--dataset={code}',
        '--init_from={base}',
        '--lora_rank=2',
        '--learning_rate=0.1',
    ],
}


@pytest.fixture(scope='module')
def rough_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp('rough')
    code = '\n'.join(path.read_text() for path in sorted(ROOT.glob('*.py')))
    folders = {
        'greeting': memorised(folder / 'greeting', GREETING),
        'alphabet': memorised(folder / 'alphabet', 'abcdefghijklmnopqrstuvwxyz\n'),
        'letter': memorised(folder / 'letter', 'a' * 99 + '\n'),
        'code': write_text(folder / 'code', code),
        'chats': conversations(folder / 'chats'),
        'base': folder / 'base',
    }
    train(folder / 'base', *SMALL, '--max_iters=500', f"--dataset={folders['code']}")
    return folders


@campaign
@pytest.mark.parametrize('name', ROUGH_RUNS)
def test_no_run_that_recovers_is_ended(rough_folders, tmp_path, name):
    """Prints where it ends with the guard and without: `python -m pytest -n 0 -s -m campaign -k
    recovers_is_ended`."""
    words = [word.format(**rough_folders) for word in ROUGH_RUNS[name]]
    for sigmas in (6.0, 0.0):
        out_dir = tmp_path / str(sigmas)
        train(out_dir, *words, f'--spike_sigmas={sigmas}', limit=600)
        losses = [line['val_loss'] for line in lines_with(out_dir, 'val_loss')]
        skipped = len(lines_with(out_dir, 'skipped'))
        print(
            f"{name}, spike_sigmas={sigmas}: {skipped} updates skipped, validation loss {losses[-1]:.4f} at the end, "
            f"{min(losses):.4f} at its lowest",
            flush=True,
        )


@campaign
def test_a_change_of_data_is_not_ended(tmp_path):
    """From a text that was memorised to another, in one run, whose settings changed, and in a
    mixture."""
    one = memorised(tmp_path / 'one', 'abcdefghijklm\n')
    two = memorised(tmp_path / 'two', 'mlkjihgfedcba\n')
    out_dir = tmp_path / 'out'
    train(out_dir, *SMALL, '--max_iters=1500', f'--dataset={one}')
    train(out_dir, '--init_from=resume', '--max_iters=3000', f'--dataset={two}')
    train(out_dir, '--init_from=resume', '--max_iters=4500', f'--dataset={one}:0.98,{two}:0.02')


@campaign
@pytest.mark.parametrize(
    'words', [['--learning_rate=1e4'], ['--optimizer=sgd', '--learning_rate=1e4', '--grad_clip=0']]
)
def test_a_real_divergence_is_caught(tmp_path, words):
    data = write_text(
        tmp_path / 'text', '\n'.join(path.read_text() for path in sorted(ROOT.glob('*.py')))
    )
    done = run(
        'train.py',
        *SMALL,
        '--max_iters=6000',
        '--eval_interval=100',
        '--decay_lr=False',
        *words,
        f'--dataset={data}',
        f"--out_dir={tmp_path / 'out'}",
        limit=600,
    )
    assert (
        done.returncode == 2
        and 'the run diverged' in done.output
        and 'Traceback' not in done.output
    )
    assert checkpoint.read_latest(tmp_path / 'out')['iter_num'] > 0


# ---- a full disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize('sizes', [20, pytest.param(200, marks=campaign)])
def test_a_full_disk_leaves_the_checkpoint_before_and_no_litter(saved, sizes):
    """In a process whose files may grow to some size only, as on a disk that is full there."""
    folder = saved()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    limits = [len(before['ckpt.pt']) * i // sizes for i in range(sizes)]
    done = Run(None, hook=functools.partial(save_within, folder, limits)).wait()
    assert done.returncode == 0, done.output
    lines = done.output.splitlines()
    assert len(lines) == sizes and all(
        f'cannot write {folder}/.ckpt.pt.new: ' in line for line in lines
    )
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert same(checkpoint.read_latest(folder), state_of(2))


def save_within(folder, limits):
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            checkpoint.save(folder, 'ckpt.pt', state_of(3))
        except OSError as error:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )
            print(error)


@pytest.mark.parametrize(
    'kilobytes', [36, pytest.param(40, marks=campaign), pytest.param(44, marks=campaign)]
)
def test_a_file_system_without_room(saved, tmp_path, kilobytes):
    """The same for real, where this user may mount one: two checkpoints fit into it, and a part of
    the third."""
    folder = tmp_path / 'small'
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', f'size={kilobytes}k', 'none', str(folder)]
    if (
        os.geteuid()
        or not shutil.which('mount')
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("this user may not mount a file system")
    try:
        for path in saved().iterdir():
            shutil.copy(path, folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(
            OSError, match=r'cannot write .*ckpt\.pt\.new: (is the disk full|No space left)'
        ):
            checkpoint.save(folder, 'ckpt.pt', state_of(3))
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert same(checkpoint.read_latest(folder), state_of(2))
    finally:
        subprocess.run(['umount', str(folder)], check=True)
