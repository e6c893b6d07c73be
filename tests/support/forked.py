"""The project's scripts in processes forked from one that has torch loaded: 0.1 s each, where a new
process takes 3 s.

`Run` starts one and can watch, signal and kill it; `ranks` and `torchrun` start several that train
together; `run` and `train` wait for the end, and `Warm` does so where there is no network. A hook
breaks something inside a process: a function that can be pickled (functools.partial gives it
arguments), called before the script.
"""

import contextlib
import functools
import importlib
import multiprocessing
import os
import runpy
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

import torch
from tqdm.std import TqdmDefaultWriteLock

from support import scripts
from support.scripts import ROOT, is_of_the_project

# training.distributed is left out: it reads its rank when it is imported
PRELOAD = [
    'numpy.ma',
    'pytest',
    'support.forked',
    'support.hooks',
    'support.outcomes',
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

# torch asks the driver once and keeps the answer: forks of this process inherit it, and one that
# has a limit on its memory could not load the driver.
torch.cuda.is_available()


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
    """A script, or None for the hook alone, in a process and session of its own.

    SIGALRM ends it after `limit` seconds. is_apart: stderr is kept apart from stdout. has_sample: a
    run of train.py ends with its sample, which takes most of its time.
    """

    def __init__(
        self,
        script,
        *words,
        hook=None,
        env=(),
        cwd=ROOT,
        limit=60,
        is_apart=False,
        has_sample=False,
    ):
        self.outputs = [_empty_file()]
        if is_apart:
            self.outputs.append(_empty_file())
        call = dict(
            outputs=[str(path) for path in self.outputs],
            script=script and str(script),
            words=[str(word) for word in words],
            hook=hook,
            env=dict(env),
            cwd=str(cwd),
            limit=limit,
            has_sample=has_sample,
        )
        self.process = _context().Process(target=_main, kwargs=call)
        self.process.start()
        self.pid = self.process.pid
        self.limit = limit

    def kill(self, number=signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def is_alive(self):
        return self.process.is_alive()

    def text(self):
        """What it has written so far; to stdout alone where stderr is kept apart."""
        return self.outputs[0].read_text(errors='replace')

    def wait(self, timeout=None):
        """Its return code (the negative number of a signal), and what it wrote: `output`, or
        `stdout` and `stderr` where these are kept apart."""
        self.process.join(timeout or self.limit)
        assert self.process.exitcode is not None, (
            f"still running after {timeout or self.limit} s:\n{self.text()[-2000:]}"
        )
        texts = [path.read_text(errors='replace') for path in self.outputs]
        for path in self.outputs:
            path.unlink()
        code = self.process.exitcode
        if len(texts) == 1:
            return SimpleNamespace(returncode=code, output=texts[0])
        return SimpleNamespace(returncode=code, stdout=texts[0], stderr=texts[1])


def _empty_file():
    descriptor, name = tempfile.mkstemp()
    os.close(descriptor)
    return Path(name)


def _main(outputs, script, words, hook, env, cwd, limit, has_sample):
    """What the process of a Run does, from its start to its exit code."""
    signal.alarm(limit)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(outputs[0], os.O_WRONLY | os.O_APPEND), 1)
    os.dup2(os.open(outputs[-1], os.O_WRONLY | os.O_APPEND), 2)
    encoding = env.get('PYTHONIOENCODING')
    errors = 'strict' if encoding else 'replace'
    sys.stdout = os.fdopen(1, 'w', buffering=1, encoding=encoding, errors=errors)
    sys.stderr = os.fdopen(2, 'w', buffering=1, encoding=encoding, errors=errors)
    os.environ.update(env)
    os.chdir(cwd)
    if script:
        folder = Path(cwd, script).parent
        sys.path.insert(0, str(folder))
        if not folder.is_relative_to(ROOT):  # a copy of the project has modules of its own
            _forget_the_project()
    code = run_here(script, words, hook, has_sample)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _forget_the_project():
    for name, module in list(sys.modules.items()):
        if is_of_the_project(getattr(module, '__file__', None) or '/'):
            del sys.modules[name]


def run_here(script, words, hook=None, has_sample=False):
    """Run the script in this process, as its main module, and train.py without the sample at its
    end.

    Returns the exit code that `python SCRIPT` would have, its excepthook included.
    """
    if not has_sample:
        final_sample = importlib.import_module('generation.final_sample')
        final_sample.print_final_sample = lambda *args, **options: None
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
        done = scripts.run(script, *words, processes=processes)
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


class Warm:
    """warm('train.py', '--seed=1') -> what scripts.run gives: returncode, stdout and stderr.

    There is no network. After `seconds` the script gets a SIGTERM, two minutes later a SIGALRM.
    memory: how many bytes it may use beside what is loaded; disk: bytes of a file that it may
    write; 0: any number. sample: whether train.py ends with one.
    """

    def __init__(self, folder):
        self.environment = {
            'PYTHONPATH': '',
            'HF_HOME': f'{folder}/hf',
            'TIKTOKEN_CACHE_DIR': f'{folder}/bpe',
            'HTTPS_PROXY': 'http://127.0.0.1:9',
            'NANOGPT_MIRROR': '',
        }

    def __call__(
        self, script, *words, cwd=ROOT, seconds=60, memory=0, disk=0, env=None, sample=False
    ):
        run = Run(
            ROOT / script,
            *words,
            hook=functools.partial(_limit_resources, memory, disk),
            env={**self.environment, **(env or {})},
            cwd=cwd,
            limit=seconds + 120,
            is_apart=True,
            has_sample=sample,
        )
        run.process.join(seconds)
        if run.is_alive():
            run.kill(signal.SIGTERM)
        return run.wait()


def _limit_resources(memory, disk):
    """A hook for Warm."""
    import resource

    if memory:
        used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory,) * 2)
    if disk:
        resource.setrlimit(resource.RLIMIT_FSIZE, (disk,) * 2)


def wait_for(condition, timeout=60, step=0.01):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"nothing after {timeout} s"
        time.sleep(step)
