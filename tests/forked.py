"""The project's scripts in processes forked from one that has torch loaded: 0.1 s each, where a new
process takes 3 s.

So runs can be killed by the hundred, ranks form without torchrun, and a hook breaks something
inside one of them: a function that can be pickled (functools.partial gives it arguments), called in
the new process before the script.
"""

import contextlib
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import conftest
import torch
from conftest import ROOT
from tqdm.std import TqdmDefaultWriteLock

from training import checkpoint

# training.distributed is left out: it reads its rank when it is imported
PRELOAD = [
    'conftest',
    'forked',
    'torch.distributed.launcher.api',
    'torch._dynamo',
    'configurator',
    'generation.final_sample',
    'models',
    'system.device',
    'text.mixture',
    'training.checkpoint',
    'training.lora',
    'training.console',
    'training.metrics',
    'training.optimizer',
    'training.resume',
    'training.watch',
]
TqdmDefaultWriteLock.mp_lock = None  # a semaphore that a killed process would leave behind


@functools.cache
def _context():
    """multiprocessing's fork server, with everything loaded and one thread."""
    context = multiprocessing.get_context('forkserver')
    before = dict(os.environ)
    os.environ.update(
        PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / 'tests')]),
        OMP_NUM_THREADS='1',
        HF_HUB_OFFLINE='1',
        WANDB_MODE='offline',
    )
    try:
        context.set_forkserver_preload(PRELOAD)
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


class Run:
    """A script, or None for the hook alone, in a process and session of its own. SIGALRM ends it
    after `limit` seconds."""

    def __init__(self, script, *words, hook=None, env=(), cwd=ROOT, limit=60):
        self.said = Path(tempfile.mkstemp()[1])
        call = (
            str(self.said),
            script,
            [str(word) for word in words],
            hook,
            dict(env),
            str(cwd),
            limit,
        )
        self.process = _context().Process(target=_main, args=call)
        self.process.start()
        self.pid, self.limit = self.process.pid, limit

    def kill(self, number=signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def is_alive(self):
        return self.process.is_alive()

    def text(self):
        return self.said.read_text(errors='replace')

    def wait(self, timeout=None):
        """Its return code (the negative number of a signal), and what it wrote to stdout and
        stderr."""
        self.process.join(timeout or self.limit)
        assert self.process.exitcode is not None, (
            f"still running after {timeout or self.limit} s:\n{self.text()[-2000:]}"
        )
        done = SimpleNamespace(returncode=self.process.exitcode, output=self.text())
        self.said.unlink()
        return done


def is_of_the_project(path):
    """Whether a module's file is a part of nanogpt, and not a test or a library."""
    path = Path(path)
    folders = ['system', 'text', 'models', 'interop', 'generation', 'training']
    return path.parent == ROOT or any(path.is_relative_to(ROOT / folder) for folder in folders)


def _main(said, script, words, hook, env, cwd, limit):
    signal.alarm(limit)
    os.setsid()
    descriptor = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (
        os.fdopen(number, 'w', buffering=1, errors='replace') for number in (1, 2)
    )
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[0:0] = [cwd]
    if cwd != str(ROOT):  # a copy of the project has modules of its own
        for name, module in list(sys.modules.items()):
            if is_of_the_project(getattr(module, '__file__', None) or '/'):
                del sys.modules[name]
    code = run_here(script, words, hook)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def run_here(script, words, hook=None):
    """Run the script in this process, as its main module, without the sample at the end.

    Returns the exit code that `python SCRIPT` would have, its excepthook included.
    """
    importlib.import_module('generation.final_sample').print_final_sample = lambda *args: None
    sys.argv = [script, *words]
    try:
        try:
            if hook:
                hook()
            if script:
                runpy.run_path(script, run_name='__main__')
        except SystemExit:
            raise
        except BaseException:
            sys.excepthook(*sys.exc_info())
            return 1
    except SystemExit as end:
        if isinstance(end.code, int):
            return end.code
        return int(end.code is not None)
    return 0


def ranks(n, script, *words, hook=None, **options):
    """n Runs that are each other's ranks; hook: of all, or a list with one for each."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = probe.getsockname()[1]
    hooks = hook if isinstance(hook, list) else [hook] * n
    world = dict(
        MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(n), LOCAL_WORLD_SIZE=str(n)
    )
    return [
        Run(
            script,
            *words,
            hook=hooks[rank],
            env={**world, 'RANK': str(rank), 'LOCAL_RANK': str(rank)},
            **options,
        )
        for rank in range(n)
    ]


def torchrun(n, *words, hook=None, restarts=0, **options):
    """A Run of torchrun's agent, whose n workers on train.py, started anew up to `restarts` times,
    are forks too."""
    return Run(
        None,
        hook=functools.partial(_agent, n, [str(word) for word in words], hook, restarts),
        **options,
    )


def _agent(n, words, hook, restarts):
    from torch.distributed.elastic.multiprocessing.api import MultiprocessContext
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    close, closing = MultiprocessContext._close, _closing(os.getpid())

    def tell_and_close(*args, **kwargs):
        closing.touch()
        return close(*args, **kwargs)

    MultiprocessContext._close = tell_and_close
    config = LaunchConfig(
        1,
        1,
        n,
        max_restarts=restarts,
        rdzv_backend='c10d',
        rdzv_endpoint='localhost:0',
        run_id='forked',
        start_method='fork',
        signals_to_handle='SIGTERM,SIGINT,SIGUSR1',
    )
    try:
        elastic_launch(config, _worker)(words, hook)
    finally:
        closing.unlink(missing_ok=True)


def _closing(agent):
    return Path(tempfile.gettempdir()) / f'closing-{agent}'


def _worker(words, hook):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)  # not the agent's, which a fork inherits
    _closing(os.getppid()).unlink(missing_ok=True)  # of the attempt before
    code = run_here('train.py', words, hook)
    sys.stdout.flush(), sys.stderr.flush()
    if code:
        os._exit(code)
    threading.Thread(target=_leave, args=[_closing(os.getppid())], daemon=True).start()


def _leave(closing):
    """End when the agent waits for that; a forked worker, unlike a real one, would wait for the
    agent."""
    while not closing.exists():
        time.sleep(0.05)
    os._exit(0)


def processes_of(parent=None, session=None):
    """The ids of the processes with this parent, or in this session, that have not ended."""
    return sorted(
        pid
        for pid, state, its_parent, its_session in _processes()
        if (its_parent == parent or its_session == session) and state[0] != 'Z'
    )


def _processes():
    """[(id, state, parent, session)] of all processes: from /proc, since small containers have no
    ps."""
    found = []
    if not Path('/proc/self/stat').exists():
        command = ['ps', '-eo', 'pid=,stat=,ppid=,sess=']
        table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for line in table.splitlines():
            pid, state, parent, session = line.split()
            found.append((int(pid), state, int(parent), int(session)))
    for path in Path('/proc').glob('[0-9]*/stat'):
        try:
            pid, _, rest = path.read_text(errors='replace').partition(' ')
        except OSError:  # it has ended meanwhile
            continue
        after_name = rest.rpartition(')')[2]  # the name, in brackets, may hold anything
        state, parent, _group, session, *_ = after_name.split()
        found.append((int(pid), state, int(parent), int(session)))
    return found


def run(script, *words, processes=1, **options):
    """Run it to its end; returns the (master's) Run.wait()."""
    if sys.platform == 'win32':  # no fork: a process as any other
        done = conftest.run(script, *words, processes=processes)
        return SimpleNamespace(returncode=done.returncode, output=done.stdout + done.stderr)
    runs = (
        [Run(script, *words, **options)]
        if processes == 1
        else ranks(processes, script, *words, **options)
    )
    results = [each.wait() for each in runs]
    return results[0]


def train(out_dir, *words, **options):
    """Train to the end, which must be a good one; returns what it said."""
    done = run('train.py', *words, f'--out_dir={out_dir}', **options)
    assert done.returncode == 0, done.output
    return done.output


# ---- what a run leaves ---------------------------------------------------------------------------


def metrics(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / 'metrics.jsonl').read_text().splitlines()]


def losses(out_dir):
    """What a run measured, without the times."""
    keep = ('iter', 'loss', 'lr', 'grad_norm', 'tokens', 'train_loss', 'val_loss', 'skipped')
    return [{k: line[k] for k in keep if k in line} for line in metrics(out_dir)]


def sha256(value):
    """One sum over a nested structure of plain types and tensors, to the bit."""
    digest = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            digest.update(f'{value.dtype} {tuple(value.shape)}'.encode())
            digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(f'{key!r}:'.encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            digest.update(f'[{len(value)}'.encode())
            for item in value:
                add(item)
        else:
            digest.update(f'{value!r},'.encode())

    add(value)
    return digest.hexdigest()


def learned(out_dir):
    """All of a run's last state that training changes, times left out."""
    state = checkpoint.read(Path(out_dir) / 'ckpt.pt')
    if shards := state.pop('shards', None):
        from training import fsdp

        state |= fsdp.read_whole_state(shards['out_dir'], shards)
    kept = {k: state[k] for k in ('model', 'optimizer', 'scaler', 'iter_num', 'best_val_loss')}
    times = ('wall_seconds', 'train_seconds', 'wandb_id')
    return kept | {'progress': {k: v for k, v in state['progress'].items() if k not in times}}


def outcome(out_dir):
    """What must be equal where nothing was lost: the sum of all that was learned, and every line
    that was measured."""
    return sha256(learned(out_dir)), losses(out_dir)


# ---- hooks ---------------------------------------------------------------------------------------


def both(*hooks):
    for hook in hooks:
        hook()


class AskedForCuda(BaseException):
    """Not an Exception: nothing recovers from it."""


def forbid_cuda():
    """Be on a machine whose GPU must be left alone, because another program has all of it, say.

    torch itself may ask whether there is one; the project may not, and whatever would initialize
    CUDA ends the process.
    """

    def is_available():
        path = Path(sys._getframe(1).f_code.co_filename).resolve()
        if is_of_the_project(path):
            raise AskedForCuda(f"torch.cuda.is_available, by {path.name}")
        return True

    def forbidden(name):
        def function(*args, **kwargs):
            raise AskedForCuda(f"torch.cuda.{name}")

        return function

    harmless = dict(
        is_available=is_available,
        is_initialized=lambda: False,
        device_count=lambda: 1,
        is_current_stream_capturing=lambda: False,
    )
    for name, value in list(vars(torch.cuda).items()):
        is_its_own = str(getattr(value, '__module__', '')).startswith('torch.cuda')
        if callable(value) and is_its_own and (name[0] != '_' or name == '_lazy_init'):
            setattr(torch.cuda, name, harmless.get(name) or forbidden(name))
    torch.backends.cuda.is_built = lambda: True


def around_saves(before=None, after=None):
    """Call before(out_dir, name, state) and after(…) around every checkpoint.save."""
    save = checkpoint.save

    def wrapped(out_dir, name, state):
        if before:
            before(out_dir, name, state)
        save(out_dir, name, state)
        if after:
            after(out_dir, name, state)

    checkpoint.save = wrapped


def keep_each(folder, out_dir, name, state):
    """For `around_saves`: out_dir as a kill would leave it behind this save, as folder/STEP."""
    if name == 'ckpt.pt':
        shutil.copytree(
            out_dir,
            Path(folder) / str(state['iter_num']),
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns('.lock', 'earlier-*'),
        )


def wait_for(condition, timeout=60, step=0.01):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"nothing after {timeout} s"
        time.sleep(step)
