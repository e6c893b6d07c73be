"""Nothing is lost: runs that are killed at any moment, told to stop, short of disk, left by another process, or fed with
what makes their loss no number, end as if nothing had happened; and checks of these checks, with one mechanism broken.

`python -m pytest -n 0 -s -m campaign tests/test_faults.py` prints the figures of the long forms.
"""
import functools
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
from conftest import ROOT, TINY, same
from forked import (
    Run,
    around_saves,
    outcome,
    processes_of,
    ranks,
    torchrun,
    train,
    wait_for,
)

import checkpoint
import runtime

if sys.platform == 'win32':
    pytest.skip("no fork here", allow_module_level=True)
import resource

campaign = pytest.mark.campaign
LONG = [*TINY, '--max_iters=100000', '--lr_decay_iters=2000', '--eval_interval=100', '--eval_iters=1']


def steps_logged(out_dir):
    """How many steps metrics.jsonl tells of."""
    try:
        return max([int(n) for n in re.findall(rb'"iter": (\d+), "loss"', (out_dir / 'metrics.jsonl').read_bytes())],
                   default=-1) + 1
    except FileNotFoundError:
        return 0


# ---- kill -9: at every point of a save -------------------------------------------------------------------------------

def state_of(step):
    generator = torch.Generator().manual_seed(step)
    return dict(model={'w': torch.randn(3000, generator=generator)}, model_args={}, config={}, iter_num=step,
                best_val_loss=1.0, optimizer=None)


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


def is_io(function):
    """Whether a function of C's makes system calls on files."""
    return getattr(function, '__module__', '') in ('posix', 'io', '_io') or isinstance(
        getattr(function, '__self__', None), (__import__('io').IOBase,))


def save_step_3(folder, save=None, on_io=None, limit=None):
    """In a process of its own: save step 3. on_io(number, name) is called in front of each system call of Python's; with
    `limit` the kernel ends the process where a file would grow larger, in the middle of a write."""
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    calls = iter(range(10_000))
    if on_io:
        sys.setprofile(lambda frame, event, arg: event == 'c_call' and is_io(arg) and on_io(next(calls), arg.__name__))
    (save or checkpoint.save)(folder, 'ckpt.pt', state_of(3))
    sys.setprofile(None)


def die_at(point, number, name):
    if number == point:
        os.kill(os.getpid(), signal.SIGKILL)


def check_after_death(folder):
    """Step 2 or 3 is there, whole; the next save works and leaves nothing of the one that was cut. Returns the step."""
    state = checkpoint.read_latest(folder)
    assert state['iter_num'] in (2, 3) and same(state, state_of(state['iter_num']))
    checkpoint.save(folder, 'ckpt.pt', state_of(4))
    assert same(checkpoint.read_latest(folder), state_of(4))
    assert sorted(os.listdir(folder)) == ['ckpt.prev.pt', 'ckpt.pt', 'sums.json']
    return state['iter_num']


def test_a_save_that_is_killed_in_front_of_any_system_call(saved):
    found = []
    while True:
        folder = saved()
        done = Run(None, hook=functools.partial(save_step_3, folder, None, functools.partial(die_at, len(found)))).wait()
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.output
        found.append(check_after_death(folder))
    print(f"\nkilled in front of {len(found)} system calls: step 2 is there {found.count(2)} times, 3 {found.count(3)} times")
    assert len(found) > 20 and found == sorted(found) and set(found) == {2, 3}


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
    """A kill does not show it, a power cut does: each file is on the disk before it takes a name, each name at the end."""
    calls = []
    for name, real in dict(fsync=os.fsync, replace=os.replace).items():
        def call(*args, real=real, name=name):
            calls.append((name, Path(f'/proc/self/fd/{args[0]}').resolve() if name == 'fsync' else Path(args[0])))
            real(*args)
        monkeypatch.setattr(os, name, call)
    folder = saved()
    calls.clear()
    checkpoint.save(folder, 'ckpt.pt', state_of(3))
    if not Path('/proc/self/fd').exists():
        pytest.skip("no /proc here")
    synced = set()
    for name, path in calls:
        assert name == 'fsync' or path.name == 'ckpt.pt' or path in synced or path.name == '.ckpt.pt.new'
        synced.add(path)
    assert calls[-1] == ('fsync', folder) and {'..ckpt.pt.new.tmp', '.sums.json.tmp'} <= {path.name for path in synced}


# ---- kill -9: a run, again and again ---------------------------------------------------------------------------------

class Board:
    """A number that a process writes and that outlives it: how often it has gone into a save or out of one."""

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
    """Start a run blindly and kill it, `kills` times, half of them inside a save, then let it end; returns figures.

    AssertionError, ValueError: there was no good checkpoint, or one that is too old."""
    rng, board = random.Random(seed), Board(out_dir.with_name('board'))
    start = lambda: Run('train.py', *settings, '--init_from=auto', f'--out_dir={out_dir}',       # noqa: E731
                        hook=functools.partial(watch_saves, board, save))
    inside, worst, took, restarts = 0, 0, 0.02, []
    for number in range(kills):
        board.set(0)
        run, began = start(), time.monotonic()
        if inside < (number + 1) // 2:
            entry = 2 * rng.randrange(4) + 1
            wait_for(lambda: board.get() >= entry or not run.is_alive(), step=5e-4)     # noqa: B023
            restarts.append(time.monotonic() - began)
            time.sleep(rng.uniform(0, took))
        else:
            time.sleep(rng.uniform(0, 1.5 * max(restarts, default=0.5)))
        run.kill()
        done = run.wait()
        assert done.returncode == -signal.SIGKILL, f"it was over before it was killed:\n{done.output}"
        inside += board.get() % 2
        if (out_dir / 'ckpt.pt').exists() or (out_dir / 'ckpt.prev.pt').exists() or steps_logged(out_dir) > interval:
            lost = steps_logged(out_dir) - checkpoint.read_latest(out_dir)['iter_num']
            assert lost <= interval, f"{lost} steps are lost"
            worst = max(worst, lost)
    end = checkpoint.read_latest(out_dir)['iter_num'] + 20
    said = train(out_dir, *settings, '--init_from=auto', '--save_minutes=0', f'--max_iters={end}')
    assert 'starting afresh' not in said and not list(out_dir.glob('earlier-*'))
    return f"{kills} kills, {inside} inside a save, at most {worst} step(s) lost of an interval of {interval}", end


@pytest.mark.parametrize('kills, interval', [
    (10, 1), pytest.param(200, 1, marks=campaign), pytest.param(100, 5, marks=campaign)])
def test_killed_again_and_again_a_run_ends_where_it_would_have(text_folder, tmp_path, kills, interval):
    saves = ['--save_minutes=1e-9'] if interval == 1 else [f'--eval_interval={interval}', '--save_minutes=0']
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


# ---- told to stop ----------------------------------------------------------------------------------------------------

class Torchrun:
    """What forked.torchrun is, with the real command."""

    def __init__(self, n, *words, restarts=0, script=('train.py',)):
        command = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}', f'--max-restarts={restarts}',
                   '--signals-to-handle=SIGTERM,SIGINT,SIGUSR1', *script]
        self.said = tempfile.TemporaryFile('w+')
        self.process = subprocess.Popen([sys.executable, *command, *words], cwd=ROOT, start_new_session=True,
                                        stdout=self.said, stderr=subprocess.STDOUT,
                                        env={**os.environ, 'OMP_NUM_THREADS': '1'})
        self.pid, self.kill = self.process.pid, self.process.send_signal

    def is_alive(self):
        return self.process.poll() is None

    def wait(self, timeout=120):
        code = self.process.wait(timeout)
        self.said.seek(0)
        return SimpleNamespace(returncode=code, output=self.said.read())


def starters(settings):
    """{name: function that starts training blindly -> (processes to wait for, function -> ids of those that train)}"""
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


def stop_again_and_again(how, to, out_dir, settings, stops, seed):
    """Start a run blindly and tell it to stop, `stops` times, by each signal in turn; returns figures.

    to: 'all' processes that train, any 'one' of them, or their 'agent'."""
    rng, start = random.Random(seed), starters([*settings, '--init_from=auto', f'--out_dir={out_dir}'])[how]
    late, waited = 0, []
    for number in [(signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)[i % 3] for i in range(stops)]:
        before, (runs, trainers) = steps_logged(out_dir), start()
        wait_for(lambda: steps_logged(out_dir) > before + rng.randrange(3) or not runs[0].is_alive())      # noqa: B023
        assert not (out_dir / 'preempted').exists()
        time.sleep(rng.uniform(0, 0.02))
        trains = trainers()
        for pid in trains:      # frozen, so that the step it is at is known
            os.kill(pid, signal.SIGSTOP)
        logged, told = steps_logged(out_dir), {'all': trains, 'one': [rng.choice(trains)], 'agent': [runs[0].pid]}[to]
        began = time.monotonic()
        for pid in told:
            os.kill(pid, number)
        if to == 'agent':
            time.sleep(0.5)     # for it to pass the signal on
        for pid in trains:
            os.kill(pid, signal.SIGCONT)
        done = [run.wait() for run in runs]
        waited.append(time.monotonic() - began)
        step = checkpoint.read_latest(out_dir)['iter_num']
        assert step <= logged + 1 and (out_dir / 'preempted').read_text() == f'saved at step {step}\n', done[0].output
        late = max(late, step - logged)
        codes = {done.returncode for done in done}
        if how in ('agent', 'torchrun'):
            assert codes == {1 if to == 'agent' else 0}, done[0].output
        else:
            assert 128 + number in codes and codes <= {128 + number, 128 + signal.SIGTERM}, done[0].output
        assert all('Traceback' not in done.output or to == 'agent' for done in done), done[0].output
        wait_for(lambda: not any(processes_of(session=run.pid) for run in runs), 10)        # noqa: B023
    done = [run.wait() for run in start()[0]]
    assert {done.returncode for done in done} == {0}, done[0].output
    assert not (out_dir / 'preempted').exists()
    return (f"{how}, to {to}: {stops} of {stops} saved, at most {late} step(s) after the last one logged; gone within "
            f"{max(waited):.1f} s")


@pytest.mark.parametrize('how, to, stops', [
    ('direct', 'all', 3), ('two', 'one', 1), ('agent', 'agent', 2),
    *[pytest.param(*case, marks=campaign) for case in [
        ('direct', 'all', 50), ('two', 'one', 50), ('agent', 'all', 50), ('agent', 'one', 50), ('agent', 'agent', 50),
        ('torchrun', 'all', 25), ('torchrun', 'agent', 25)]]])
def test_told_to_stop_again_and_again_a_run_ends_where_it_would_have(text_folder, tmp_path, how, to, stops):
    settings = [*LONG, f'--max_iters={60 * stops}', f'--dataset={text_folder}']
    figures = stop_again_and_again(how, to, tmp_path / 'stopped', settings, stops, 1)
    train(tmp_path / 'whole', *settings, processes=1 if how == 'direct' else 2)
    assert outcome(tmp_path / 'stopped') == outcome(tmp_path / 'whole')
    print(f"\n{figures}")


def hang_in_saves(grace):
    runtime.GRACE = grace
    around_saves(lambda *args: time.sleep(60))


def test_a_save_that_hangs_after_a_signal_is_given_up(text_folder, tmp_path):
    run = Run('train.py', *LONG, f'--dataset={text_folder}', f'--out_dir={tmp_path}',
              hook=functools.partial(hang_in_saves, 0.5))
    wait_for(lambda: steps_logged(tmp_path) > 2)
    run.kill(signal.SIGTERM)
    began = time.monotonic()
    done = run.wait(10)
    assert done.returncode == 128 + signal.SIGTERM and 0.4 < time.monotonic() - began < 10
    assert 'error: not saved within 0.5 s of the signal: ending without' in done.output


def test_a_second_signal_ends_at_once(text_folder, tmp_path):
    run = Run('train.py', *LONG, f'--dataset={text_folder}', f'--out_dir={tmp_path}',
              hook=functools.partial(hang_in_saves, 60))
    wait_for(lambda: steps_logged(tmp_path) > 2)
    run.kill(signal.SIGTERM)
    wait_for(lambda: 'once more ends without saving' in run.text())
    time.sleep(2.1)     # sooner, it counts as the same one
    run.kill(signal.SIGTERM)
    assert run.wait(5).returncode == 128 + signal.SIGTERM


# ---- a process is lost -----------------------------------------------------------------------------------------------

def lose_again_and_again(kind, out_dir, settings, losses, seed):
    """Kill -9 one of two processes that train under torchrun, `losses` times; returns (return code, output, figures)."""
    rng = random.Random(seed)
    run = kind(2, *settings, '--init_from=auto', f'--out_dir={out_dir}', restarts=losses)
    workers, took = [], []
    for _ in range(losses):
        gone = workers
        wait_for(lambda: len(now := processes_of(parent=run.pid)) == 2 and not {*now} & {*gone})        # noqa: B023
        before = steps_logged(out_dir)
        wait_for(lambda: steps_logged(out_dir) not in (0, before))       # noqa: B023
        time.sleep(rng.uniform(0, 0.1))
        workers, lost_at = processes_of(parent=run.pid), time.monotonic()
        took and took.append(lost_at - took.pop())
        os.kill(rng.choice(workers), signal.SIGKILL)
        took.append(lost_at)
    done = run.wait(120)
    took.append(time.monotonic() - took.pop())
    wait_for(lambda: not processes_of(session=run.pid), 10)
    return done, f"{losses} processes lost; from one to the next, or to the end, at most {max(took):.1f} s"


@pytest.mark.parametrize('kind, n', [(torchrun, 1), pytest.param(torchrun, 20, marks=campaign),
                                     pytest.param(Torchrun, 20, marks=campaign)])
def test_processes_that_are_lost_again_and_again_change_nothing(text_folder, tmp_path, kind, n):
    settings = [*LONG, f'--max_iters={100 * n}', '--save_minutes=1e-9', f'--dataset={text_folder}']
    done, figures = lose_again_and_again(kind, tmp_path / 'lossy', settings, n, 1)
    assert done.returncode == 0, done.output
    train(tmp_path / 'whole', *settings, '--save_minutes=0', processes=2)
    assert outcome(tmp_path / 'lossy') == outcome(tmp_path / 'whole')
    print(f"\n{kind.__name__}: {figures}")
