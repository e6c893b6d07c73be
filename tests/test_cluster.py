"""Several machines: the files of cluster/ start train.py rightly; a run over two nodes outlives
notices, kills and cuts.

SLURM is a stand-in: `srun` starts a task per node on this machine, `scancel` signals processes as
SLURM's process tracking does, `scontrol` keeps a log. In the normal run torchrun and train.py are
stand-ins too: it tries the scripts' logic. In the campaign they and gloo are real; two network
namespaces joined by a virtual cable are two machines (root only).
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.outcomes import same
from support.scripts import ROOT, TINY, run
from support.settings import gpt, train_settings

from configurator import configure

sys.path.insert(0, str(ROOT / 'cluster'))
import arithmetic

CLUSTER = ROOT / 'cluster'
FILES = ('slurm.sh', 'trainjob.yaml', 'skypilot.yaml')
LONGER = [
    '--max_iters=120',
    '--lr_decay_iters=120',
    '--eval_interval=60',
    '--save_minutes=0.05',
    '--log_interval=10',
]
HAS_TOOLS = all(shutil.which(tool) for tool in ('bash', 'pgrep', 'pkill'))
HAS_PROC = Path('/proc/self').exists()
needs_bash = pytest.mark.skipif(not (HAS_TOOLS and HAS_PROC), reason="needs Linux's bash and pkill")

# ---- stand-ins -----------------------------------------------------------------------------------

SRUN = """
nodes = int(os.environ['SLURM_NNODES'])
say('srun', *sys.argv[1:])
command = [word for word in sys.argv[1:] if word != '--kill-on-bad-exit=1']
tasks = [subprocess.Popen(command, env=os.environ | dict(SLURM_NODEID=str(node), PET_LOCAL_ADDR='127.0.0.1'))
         for node in range(nodes)]
(FOLDER / 'tasks').write_text(' '.join(str(task.pid) for task in tasks))
while any(task.poll() is None for task in tasks):
    if any(task.poll() for task in tasks) and len(command) < len(sys.argv) - 1:     # --kill-on-bad-exit
        time.sleep(1)
        [task.terminate() for task in tasks if task.poll() is None]
        break
    time.sleep(0.05)
sys.exit(max(task.wait() for task in tasks))
"""
SCANCEL = """
number = getattr(signal, 'SIG' + sys.argv[1].removeprefix('--signal='))
todo = [int(pid) for pid in (FOLDER / 'tasks').read_text().split()]
for pid in todo:
    if os.environ['TRACKING'] == 'every process':       # as by its cgroup; else the tasks alone
        todo += map(int, subprocess.run(['pgrep', '-P', str(pid)], capture_output=True, text=True).stdout.split())
for pid in todo:
    os.kill(pid, number)
"""
SCONTROL = """
if sys.argv[1:3] == ['show', 'hostnames']:
    os.write(1, b'localhost\\nlocalhost\\n')
else:
    say('scontrol', *sys.argv[1:])
"""
TORCHRUN = """
say('torchrun', *sys.argv[1:])
sys.exit(subprocess.run([sys.executable, '-S', FOLDER / 'train.py']).returncode)
"""
TRAIN = """
def receive(*args):
    say('signals', 'SIGUSR1')
    if behaviour == 'saves':
        (pathlib.Path(os.environ['OUT_DIR']) / 'preempted').touch()
    if behaviour != 'hangs':
        os._exit(behaviour == 'can not save')
behaviour = os.environ['BEHAVIOUR']
signal.signal(signal.SIGUSR1, receive)
say('train', os.getpid())
time.sleep(0.3)
while behaviour not in ('finishes', 'fails'):
    time.sleep(0.05)
sys.exit(behaviour == 'fails')
"""
COMMON = """#!{python} -S
import os, pathlib, signal, subprocess, sys, time
FOLDER = pathlib.Path({folder!r})
def say(name, *words):
    with open(FOLDER / (name + '.log'), 'a') as log:
        log.write(' '.join(map(str, words)) + chr(10))
"""


def eventually(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def step_of(out_dir):
    """The last step that metrics.jsonl tells of, 0 before the first."""
    try:
        return max(
            (
                json.loads(line)['iter']
                for line in (out_dir / 'metrics.jsonl').read_text().splitlines()
            ),
            default=0,
        )
    except (OSError, ValueError):
        return 0


def learned(out_dir):
    """What has to be equal, bit for bit, between a run that was interrupted and one that was
    not."""
    state = torch.load(out_dir / 'ckpt.pt', weights_only=True)
    return {key: state[key] for key in ('model', 'optimizer', 'iter_num', 'best_val_loss')}


def copy_project(folder, edit=None):
    """What training on several machines needs, in `folder`, files changed by {name: (from, to)}."""
    for path in [
        *ROOT.glob('*.py'),
        *ROOT.glob('models/**/*.py'),
        *ROOT.glob('system/*.py'),
        *ROOT.glob('text/*.py'),
        *ROOT.glob('training/*.py'),
        *ROOT.glob('generation/*.py'),
        *ROOT.glob('interop/*.py'),
        *ROOT.glob('cluster/*.sh'),
        ROOT / 'config/train_gpt2.py',
    ]:
        to = folder / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text(encoding='utf-8')
        for old, new in [(edit or {}).get(path.name)] if path.name in (edit or {}) else []:
            assert old in text
            text = text.replace(old, new)
        to.write_text(text, encoding='utf-8')
    return folder


class Slurm:
    """A stand-in for SLURM with two nodes of one process each; `submit` runs cluster/slurm.sh as
    sbatch would."""

    def __init__(self, folder, tracking='every process', stand_ins=True, project=ROOT):
        self.folder, self.out_dir, self.jobs = folder, folder / 'out', []
        texts = dict(srun=SRUN, scancel=SCANCEL, scontrol=SCONTROL)
        for name, text in (
            texts | {'torchrun': TORCHRUN, 'train.py': TRAIN} if stand_ins else texts
        ).items():
            (folder / name).write_text(
                COMMON.format(python=sys.executable, folder=str(folder)) + text
            )
            (folder / name).chmod(0o755)
        self.env = dict(
            os.environ,
            PATH=f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            TRACKING=tracking,
            PYTHONPATH='',
            SLURM_JOB_ID=str(os.getpid()),
            SLURM_NNODES='2',
            SLURM_JOB_NODELIST='node[0-1]',
            SLURM_SUBMIT_DIR=str(project),
            GPUS='1',
            OMP_NUM_THREADS='2',
            RESTARTS='0',
            OUT_DIR=str(self.out_dir),
        )
        self.out_dir.mkdir()

    def submit(self, *arguments, **env):
        self.jobs.append(
            subprocess.Popen(
                ['bash', CLUSTER / 'slurm.sh', *arguments],
                stderr=subprocess.STDOUT,
                text=True,
                stdout=open(self.folder / 'out.log', 'a'),
                env=self.env | env,
                start_new_session=True,
            )
        )
        return self.jobs[-1]

    def log(self, name):
        path = self.folder / f'{name}.log'
        return path.read_text().splitlines() if path.exists() else []

    def close(self):
        for job in self.jobs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)


@pytest.fixture
def slurm(tmp_path):
    made = []

    def make(*args, **options):
        made.append(Slurm(tmp_path, *args, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


# ---- the scripts' logic --------------------------------------------------------------------------


@needs_bash
@pytest.mark.parametrize(
    'behaviour, tracking, code, requeued, tries',
    [
        ('saves', 'every process', 75, 1, 1),
        ('saves', 'tasks', 75, 1, 1),
        ('can not save', 'tasks', 1, 1, 1),  # on from the save before
        ('finishes', 'tasks', 0, 0, 1),
        ('fails', 'tasks', 1, 0, 2),  # a mistake is not tried for ever
    ],
)
def test_slurm_queues_again_what_is_not_finished(slurm, behaviour, tracking, code, requeued, tries):
    one = slurm(tracking)
    (one.out_dir / 'preempted').touch()  # of the attempt before
    job = one.submit('config/train_gpt2.py', BEHAVIOUR=behaviour, TRIES='2')
    is_noticed = behaviour not in ('finishes', 'fails')
    if is_noticed:
        eventually(lambda: len(one.log('train')) == 2)
        job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == code
    assert one.log('scontrol') == [f"requeue {one.env['SLURM_JOB_ID']}"] * requeued
    assert one.log('signals') == ['SIGUSR1'] * (2 * is_noticed)  # each worker heard of it once
    assert len(one.log('srun')) == tries


@needs_bash
def test_slurm_queues_again_what_hangs(slurm):
    one = slurm()
    job = one.submit('config/train_gpt2.py', BEHAVIOUR='hangs', LAST_CALL='1')
    eventually(lambda: len(one.log('train')) == 2)
    job.send_signal(signal.SIGUSR1)
    eventually(lambda: one.log('scontrol') == [f"requeue {one.env['SLURM_JOB_ID']}"])
    assert job.poll() is None


@needs_bash
def test_that_a_signalled_torchrun_would_lose_the_save(slurm, tmp_path):
    """The control: were torchrun not made deaf to the signals, it would die of them before the
    workers have saved."""
    project = copy_project(tmp_path / 'project', {'node.sh': ("trap '' USR1 USR2; exec", 'exec')})
    one = slurm(project=project)
    job = one.submit('config/train_gpt2.py', BEHAVIOUR='hangs', LAST_CALL='60')
    eventually(lambda: len(one.log('train')) == 2)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) not in (0, 75)


def commands(name, project, folder):
    """torchrun's command line, as this file of cluster/ has a node run it: words."""
    yaml = pytest.importorskip('yaml') if name.endswith('.yaml') else None
    env = dict(
        os.environ,
        PATH=f"{folder}:{os.environ['PATH']}",
        PET_NNODES='8',
        PET_NODE_RANK='3',
        PET_MASTER_ADDR='n0',
        PET_MASTER_PORT='29400',
        SKYPILOT_NUM_NODES='8',
        SKYPILOT_NODE_RANK='3',
        SKYPILOT_NODE_IPS='n0\nn1',
        SKYPILOT_NUM_GPUS_PER_NODE='8',
        SLURM_NODEID='3',
        SLURM_JOB_ID='9400',
        SLURM_JOB_NODELIST='n[0-7]',
        SLURM_NNODES='8',
        SLURM_SUBMIT_DIR=str(project),
        OUT_DIR='/shared/out-gpt2',
        BASH_ENV='',
    )
    for tool, text in dict(
        torchrun='printf "%s\\n" "$@"', srun='shift; exec "$@"', scontrol='echo n0; echo n1'
    ).items():
        (folder / tool).write_text(f'#!/usr/bin/env bash\n{text}\n')
        (folder / tool).chmod(0o755)
    (project / '.venv/bin').mkdir(parents=True)
    (project / '.venv/bin/activate').touch()
    if name == 'slurm.sh':
        usage = next(
            line
            for line in (CLUSTER / name).read_text().splitlines()
            if 'sbatch cluster/slurm.sh ' in line
        )
        command = ['bash', CLUSTER / name, *usage.split('`')[1].split()[2:]]
    else:
        documents = list(yaml.safe_load_all((CLUSTER / name).read_text()))
        command = (
            documents[0]['spec']['trainer']['command'] + documents[0]['spec']['trainer']['args']
            if name == 'trainjob.yaml'
            else ['bash', '-c', documents[0]['run']]
        )
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=project, timeout=20)
    assert (done.returncode, done.stderr) == (0, '')
    return done.stdout.splitlines()


@needs_bash
@pytest.mark.parametrize('name', FILES)
def test_torchrun_and_train_understand_each_command_line(name, tmp_path, monkeypatch):
    from torch.distributed.run import parse_args

    words = commands(name, copy_project(tmp_path / 'project'), tmp_path)
    launch = parse_args(words)
    assert (launch.nnodes, launch.nproc_per_node, launch.rdzv_backend, launch.max_restarts) == (
        '8',
        '8',
        'c10d',
        3,
    )
    assert launch.rdzv_endpoint.startswith('n0:2') and 'is_host=0' in launch.rdzv_conf
    assert launch.training_script == 'train.py'
    monkeypatch.chdir(ROOT)
    config, given = configure(
        train_settings(), launch.training_script_args, lambda device: 'cpu', gpt
    )
    assert (config['init_from'], config['out_dir']) == ('auto', '/shared/out-gpt2')
    assert config['gradient_accumulation_steps'] % 64 == 0, "the 64 processes cannot share that"
    with pytest.raises(ValueError, match='there is no setting'):  # the control
        configure(
            train_settings(),
            [*launch.training_script_args, '--out_dri=x'],
            lambda device: 'cpu',
            gpt,
        )
    with pytest.raises(SystemExit):
        parse_args(['--max_restart_s=3', *words])


def test_the_yaml_files_agree_with_themselves():
    yaml = pytest.importorskip('yaml')
    job, runtime = yaml.safe_load_all((CLUSTER / 'trainjob.yaml').read_text())
    assert (job['kind'], runtime['kind']) == ('TrainJob', 'TrainingRuntime')
    assert {job['apiVersion'], runtime['apiVersion']} == {'trainer.kubeflow.org/v1alpha1'}
    assert job['spec']['runtimeRef']['name'] == runtime['metadata']['name']
    trainer, mounts = (
        job['spec']['trainer'],
        runtime['spec']['template']['spec']['replicatedJobs'][0],
    )
    pod = mounts['template']['spec']['template']['spec']
    mounted = {mount['name'] for mount in pod['containers'][0]['volumeMounts']}
    assert trainer['numProcPerNode'] == trainer['resourcesPerNode']['limits']['nvidia.com/gpu']
    assert f"GPUS={trainer['numProcPerNode']}" in trainer['args'][0]
    assert mounted == {volume['name'] for volume in pod['volumes']}
    sky = yaml.safe_load((CLUSTER / 'skypilot.yaml').read_text())
    assert sky['num_nodes'] == trainer['numNodes'] and sky['resources']['job_recovery'][
        'recover_on_exit_codes'
    ] == [75]
    assert all(
        f'OUT_DIR={folder}/' in text for folder, text in zip(sky['file_mounts'], [sky['run']])
    )


@needs_bash
def test_shells_read_the_scripts():
    for path in CLUSTER.glob('*.sh'):
        assert subprocess.run(['bash', '-n', path]).returncode == 0
        if shutil.which('shellcheck'):
            done = subprocess.run(['shellcheck', path], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout


# ---- arithmetic ----------------------------------------------------------------------------------


def test_the_page_of_arithmetic_is_what_the_models_own_sizes_give():
    lines = (CLUSTER / 'README.md').read_text(encoding='utf-8').splitlines()
    computed = [
        line
        for line in arithmetic.page(arithmetic.options([]))
        if line and not line.startswith('|---')
    ]
    assert [line for line in computed if line not in lines] == []
    # the control
    assert any(line not in lines for line in arithmetic.page(arithmetic.options(['--mfu=0.41'])))


@pytest.mark.parametrize('recompute', [False, True])
def test_activations_are_those_that_autograd_keeps(recompute):
    """Counted on a small model in bfloat16, per token and block; within 5 %: a CPU's attention
    keeps a little less."""

    def kept(n_layer, C=64, T=17):
        model = arithmetic.GPT(arithmetic.GPTConfig(T, 96, n_layer, 2, C, bias=False))
        model.gradient_checkpointing = recompute
        weights = {
            tuple(shape)
            for p in model.parameters()
            if p.dim() == 2
            for shape in (p.shape, p.t().shape)
        }
        tensors = {}

        def pack(tensor):
            if tuple(tensor.shape) not in weights:
                tensors[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        idx = torch.zeros(3, T, dtype=torch.long)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast('cpu', torch.bfloat16),
        ):
            model(idx, idx)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values()) / idx.numel()

    block, start, _ = arithmetic.activation_bytes(arithmetic.options(['--n_embd=64']))
    assert (kept(3) - kept(1)) / 2 == pytest.approx(start if recompute else block, rel=0.05)


def test_the_best_interval_is_the_one_that_loses_least():
    o = arithmetic.options([])
    best = arithmetic.best_interval(20, 86400)
    assert all(
        arithmetic.lost_share(o, best, 20, 86400)
        < arithmetic.lost_share(o, other * best, 20, 86400)
        for other in (0.5, 0.9, 1.1, 2)
    )


@pytest.mark.parametrize('n', [2, 3, 8])
def test_traffic_is_what_a_ring_sends(n):
    """A ring of n sums S bytes by sending a part of S/n in each of 2 (n - 1) rounds; collecting
    takes n - 1 rounds."""
    o, n_params = arithmetic.options([f'--nodes={n}', '--gpus=1']), 1000
    part = 4 * n_params / n
    assert arithmetic.traffic(o, n_params, 'DDP') == pytest.approx(
        sum(part for _ in range(2 * (n - 1)))
    )
    assert arithmetic.traffic(o, n_params, 'FSDP') == pytest.approx(
        3 * sum(part for _ in range(n - 1))
    )


def test_the_readmes_variables_are_read():
    known, text = (
        (CLUSTER / 'node.sh').read_text(),
        (CLUSTER / 'README.md').read_text(encoding='utf-8'),
    )
    for name in ('NODES', 'NODE_RANK', 'HEAD', 'OUT_DIR', 'GPUS', 'PORT', 'RESTARTS', 'RUN_ID'):
        assert name in text and f'${{{name}:' in known


# ---- the campaign: real training -----------------------------------------------------------------


@pytest.fixture(scope='module')
def uninterrupted(text_folder, tmp_path_factory):
    """What two processes learn when nothing happens."""
    out_dir = tmp_path_factory.mktemp('clean') / 'out'
    done = run(
        'train.py',
        *TINY,
        *LONGER,
        f'--dataset={text_folder}',
        f'--out_dir={out_dir}',
        processes=2,
        env={'OMP_NUM_THREADS': '2'},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return learned(out_dir)


@needs_bash
@pytest.mark.campaign
@pytest.mark.parametrize('tracking', ['every process', 'tasks'])
def test_a_job_that_is_queued_again_learns_what_one_does_that_is_not(
    slurm, tracking, text_folder, uninterrupted
):
    one, arguments = slurm(tracking, stand_ins=False), [*TINY, *LONGER, f'--dataset={text_folder}']
    for times, step in enumerate((20, 70), 1):
        job = one.submit(*arguments)
        eventually(lambda: step_of(one.out_dir) >= step, 300)
        start = time.monotonic()
        job.send_signal(signal.SIGUSR1)
        assert job.wait(120) == 75
        print(
            f"{tracking}: noticed at step {step_of(one.out_dir)}, saved and ended after {time.monotonic() - start:.1f} s"
        )
        assert (one.out_dir / 'preempted').exists() and len(one.log('scontrol')) == times
    assert one.submit(*arguments).wait(600) == 0
    assert not (one.out_dir / 'preempted').exists() and len(one.log('scontrol')) == 2
    assert same(learned(one.out_dir), uninterrupted)


def may_make_namespaces():
    if sys.platform != 'linux' or os.geteuid() or not shutil.which('ip'):
        return False
    name = f'gpt{os.getpid()}'
    made = subprocess.run(['ip', 'netns', 'add', name], capture_output=True).returncode == 0
    return made and subprocess.run(['ip', 'netns', 'del', name]).returncode == 0


class Machines:
    """Two machines: network namespaces joined by a virtual cable, whose nodes see the same files.

    Each runs cluster/node.sh again and again until it succeeds, as a scheduler would.
    """

    def __init__(self, project, out_dir, log, **env):
        self.names, self.project, self.log, self.running = (
            [f'gpt{os.getpid()}n{i}' for i in (0, 1)],
            project,
            log,
            {},
        )
        self.env = dict(
            os.environ,
            PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            PYTHONPATH='',
            NODES='2',
            HEAD='10.99.0.1',
            GPUS='1',
            OUT_DIR=str(out_dir),
            OMP_NUM_THREADS='2',
            **env,
        )
        for name in self.names:
            self.ip('netns', 'add', name)
        self.ip(
            'link',
            'add',
            'cable0',
            'netns',
            self.names[0],
            'type',
            'veth',
            'peer',
            'name',
            'cable1',
            'netns',
            self.names[1],
        )
        for i, name in enumerate(self.names):
            self.ip('-n', name, 'addr', 'add', f'10.99.0.{i + 1}/24', 'dev', f'cable{i}')
            for device in ('lo', f'cable{i}'):
                self.ip('-n', name, 'link', 'set', device, 'up')

    @staticmethod
    def ip(*words):
        return subprocess.run(['ip', *words], check=True, capture_output=True, text=True).stdout

    def start(self, node, *arguments):
        command = 'until bash cluster/node.sh "$@"; do echo "node $NODE_RANK again"; sleep 1; done'
        env = self.env | dict(
            NODE_RANK=str(node),
            PET_LOCAL_ADDR=f'10.99.0.{node + 1}',
            GLOO_SOCKET_IFNAME=f'cable{node}',
        )
        self.running[node] = subprocess.Popen(
            ['ip', 'netns', 'exec', self.names[node], 'bash', '-c', command, 'bash', *arguments],
            stdout=open(self.log, 'a'),
            stderr=subprocess.STDOUT,
            cwd=self.project,
            env=env,
            start_new_session=True,
        )

    def pids(self, node):
        return [int(pid) for pid in self.ip('netns', 'pids', self.names[node]).split()]

    def power_off(self, node):
        """kill -9 of all that runs there, training, torchrun and what would start it again."""
        for pid in self.pids(node):
            os.kill(pid, signal.SIGKILL)
        self.running.pop(node).wait()

    def cable(self, state):
        self.ip('-n', self.names[1], 'link', 'set', 'cable1', state)

    def wait(self, seconds):
        end = time.monotonic() + seconds
        return [job.wait(end - time.monotonic()) for job in self.running.values()]

    def close(self):
        for node, name in enumerate(self.names):
            for pid in self.pids(node):
                os.kill(pid, signal.SIGKILL)
            self.ip('netns', 'del', name)


@pytest.mark.campaign
@pytest.mark.parametrize(
    'fault, node, away, timeout',
    [
        ('kill', 0, 0, 600),  # the node that has the rendezvous
        ('kill', 1, 0, 600),
        ('kill', 1, 20, 600),
        ('cut', 1, 10, 600),  # the network's own retries bridge it
        ('cut', 1, 60, 15),  # longer than processes wait for each other
    ],
)
def test_two_machines_outlive(fault, node, away, timeout, text_folder, tmp_path, uninterrupted):
    if not may_make_namespaces():
        pytest.skip("needs root and network namespaces")
    project = copy_project(
        tmp_path / 'project', {'distributed.py': ('TIMEOUT = 600', f'TIMEOUT = {timeout}')}
    )
    out_dir, log = tmp_path / 'out', tmp_path / 'log'
    arguments = [*TINY, *LONGER, f'--dataset={text_folder}']
    machines = Machines(project, out_dir, log, RDZV_SECONDS='300' if timeout == 600 else '20')
    try:
        for i in (0, 1):
            machines.start(i, *arguments)
        eventually(lambda: step_of(out_dir) >= 40, 300)
        start, step = time.monotonic(), step_of(out_dir)
        if fault == 'kill':
            machines.power_off(node)
            time.sleep(away)
            machines.start(node, *arguments)
        else:
            machines.cable('down')
            time.sleep(away)
            machines.cable('up')
        back = time.monotonic()
        eventually(lambda: step_of(out_dir) > step + 10, 400)
        print(
            f"\n{fault} of node {node} at step {step}, {back - start:.0f} s away: 10 steps further "
            f"{time.monotonic() - back:.0f} s after it was back, begun {log.read_text().count('machine: ')} times"
        )
        assert machines.wait(600) == [0, 0], log.read_text()[-3000:]
    finally:
        machines.close()
    assert same(learned(out_dir), uninterrupted)


@pytest.mark.campaign
@pytest.mark.skipif(not torch.__version__.startswith('2.13.'), reason="known of this torch")
def test_that_a_node_would_not_come_back_to_a_shared_store(text_folder, tmp_path):
    """The control of the variable that node.sh sets, and the day this fails it can go."""
    if not may_make_namespaces():
        pytest.skip("needs root and network namespaces")
    project = copy_project(
        tmp_path / 'project', {'node.sh': ('export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1', '')}
    )
    arguments = [*TINY, *LONGER, f'--dataset={text_folder}']
    machines = Machines(project, tmp_path / 'out', tmp_path / 'log')
    try:
        for i in (0, 1):
            machines.start(i, *arguments)
        eventually(lambda: step_of(tmp_path / 'out') >= 20, 300)
        machines.power_off(1)
        machines.start(1, *arguments)
        time.sleep(90)
        assert (tmp_path / 'log').read_text().count('machine: ') == 1, "it does come back"
    finally:
        machines.close()
