"""Sharded training learns what DDP learns; its checkpoints are whole or not there, and fit any
number of processes.

`together(n, function, …)` calls the function in n processes, which form a group; they are forked
once, for all tests.
"""

import contextlib
import copy
import json
import multiprocessing
import os
import pickle
import shutil
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.outcomes import same
from support.scripts import ROOT, TINY, run

import models
from system import files
from training import fsdp, lora
from training.fsdp import dcp, metadata
from training.optimizer import load_optimizer_state, orthogonalize

# 20 rows for 3 processes: 7, 7, 6
GPT = 'gpt', dict(n_layer=2, n_head=2, n_embd=20, bias=True, dropout=0.1)
MODERN = 'modern', dict(n_layer=2, n_head=2, n_embd=16, ngram=3, ngram_rows=11)
ADAMW, SGD = dict(lrs=None), dict(lrs=None, name='sgd')
MUON = dict(lrs=dict(matrix=0.02, embedding=0.3, head=0.005))


# ---- the processes -------------------------------------------------------------------------------


class Together:
    def __init__(self, folder, n=3):
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context('forkserver' if 'forkserver' in methods else 'spawn')
        if 'forkserver' in methods:
            context.set_forkserver_preload(['test_fsdp', 'torch._dynamo'])
        os.environ['PYTHONPATH'], before = (
            os.pathsep.join([str(ROOT), str(ROOT / 'tests')]),
            os.environ.get('PYTHONPATH'),
        )
        self.folder, self.calls, self.pipes, self.processes = folder, 0, [], []
        for rank in range(n):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            self.processes.append(context.Process(target=serve, args=(rank, theirs), daemon=True))
            self.processes[-1].start()
        os.environ.update(PYTHONPATH=before or '')

    def __call__(self, n, function, *arguments):
        """What function(*arguments) returns in each of n processes."""
        self.calls += 1
        for pipe in self.pipes[:n]:
            pipe.send((f'{self.folder}/{self.calls}', n, function, arguments))
        answers = [
            pipe.recv() if pipe.poll(100) else (False, "no answer") for pipe in self.pipes[:n]
        ]
        assert all(is_good for is_good, _ in answers), '\n'.join(
            text for is_good, text in answers if not is_good
        )
        return [result for _, result in answers]

    def close(self):
        for pipe, process in zip(self.pipes, self.processes):
            pipe.close()
            process.join(5)
            process.kill()


def serve(rank, pipe):
    torch.set_num_threads(1)
    while True:
        try:
            place, n, function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            dist.init_process_group(
                'gloo',
                init_method=f'file://{place}',
                rank=rank,
                world_size=n,
                timeout=timedelta(seconds=60),
            )
            answer = True, function(*arguments)
        except BaseException:
            answer = False, f'process {rank}: {traceback.format_exc()}'
        dist.destroy_process_group()
        pipe.send(answer)


@pytest.fixture(scope='module')
def together(tmp_path_factory):
    pool = Together(tmp_path_factory.mktemp('groups'))
    yield pool
    pool.close()


# ---- what they do --------------------------------------------------------------------------------


def source():
    """Which data a process has."""
    return dist.get_rank() if dist.is_initialized() else 0


class Run:
    """A small model in training: by DDP, by FSDP, or (plain) by one process."""

    def __init__(self, kind, model, options, how=''):
        torch.manual_seed(0)
        name, own = model
        self.model = self.wrapped = models.build(name, **dict(block_size=8, vocab_size=13) | own)
        self.model.gradient_checkpointing = how == 'recomputed'
        lora.add(self.model, 2 if how == 'lora' else 0)
        if kind == 'fsdp':
            assert fsdp.shard_model(self.model, 'cpu') is self.model
        elif kind == 'ddp':
            self.wrapped = torch.nn.parallel.DistributedDataParallel(self.model)
        assert models.name_of(self.model) == name
        if how == 'compiled':
            for part in self.model.transformer.h if kind == 'fsdp' else [self.model]:
                part.compile()
        self.optimizer = self.model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu', **options)
        self.kind, self.steps = kind, 0

    def backward(self, micros=2):
        """Gradients of this process's micro-batches; returns the mean loss of all processes'."""
        loss = torch.zeros(())
        for micro in range(micros):
            if self.kind == 'fsdp':
                self.model.set_requires_gradient_sync(micro == micros - 1)
            elif self.kind == 'ddp':
                self.wrapped.require_backward_grad_sync = micro == micros - 1
            torch.manual_seed(1 + source() + 10 * micro + 100 * self.steps)
            ids = torch.randint(3, (2, 9)).cumsum(1) % 13
            part = self.wrapped(ids[:, :-1], ids[:, 1:])[1] / micros
            part.backward()
            loss += part.detach()
        if self.kind != 'plain':
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        return loss.item()

    def step(self, micros=2):
        loss = self.backward(micros)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return loss

    def state(self):
        """Whole copies of all that is learned, and of the moments."""

        def own(tensor):
            return (
                (tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor)
                .detach()
                .clone()
            )

        state = self.optimizer.state_dict()
        return dict(
            model={name: own(tensor) for name, tensor in self.model.state_dict().items()},
            optimizer=dict(
                state={
                    i: {key: own(value) for key, value in values.items()}
                    for i, values in state['state'].items()
                },
                param_groups=state['param_groups'],
            ),
        )


def learn(kind, model, options, steps=3, micros=2, how=''):
    """(losses, {name: gradient of the first step}, weights)"""
    run = Run(kind, model, options, how)
    run.backward(micros)
    gradients = {
        name: p.grad.full_tensor() if kind == 'fsdp' else p.grad.clone()
        for name, p in run.model.named_parameters()
        if p.grad is not None
    }
    run.optimizer.zero_grad()
    losses = [run.step(micros) for _ in range(steps)]
    return (
        losses,
        gradients,
        fsdp.full_state_dict(run.model) if kind == 'fsdp' else run.model.state_dict(),
    )


def close(a, b, atol=1e-5):
    return a.keys() == b.keys() and all(torch.allclose(a[key], b[key], atol=atol) for key in a)


def problems(a, b, steps):
    """What two results of `learn` differ in."""
    return [
        name
        for name, is_good in (
            ('losses', len(a[0]) == steps and a[0] == pytest.approx(b[0], abs=1e-5)),
            ('gradients', close(a[1], b[1], 1e-6)),
            ('weights', close(a[2], b[2], 2e-4)),
        )
        if not is_good
    ]


# ---- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'n, model, options', [(2, GPT, ADAMW), (3, MODERN, MUON | dict(max_norm=0.9)), (1, GPT, SGD)]
)
def test_it_learns_what_ddp_learns(together, n, model, options):
    ddp, sharded = (together(n, learn, kind, model, options) for kind in ('ddp', 'fsdp'))
    assert problems(sharded[0], ddp[0], 3) == []
    assert all(weights == {} for _, _, weights in sharded[1:])


# Without biases: those of keys have gradients of 0, but for rounding, which Adam makes steps of.
SMALL = dict(n_layer=2, n_head=2, n_embd=20)
EVERY = [
    ('gpt', SMALL | dict(bias=False, dropout=0.1)),
    MODERN,
    ('transformerpp', SMALL | dict(n_embd=24)),
    ('transformerpp', SMALL | dict(tied=False)),
    ('mlp', dict(n_embd=8, n_hidden=20, direct=True)),
    ('mlp', dict(n_embd=8, n_hidden=20, batchnorm='ema')),
    ('wavenet', dict(n_layer=3, n_embd=8)),
    ('wavenet', dict(form='hierarchical', n_layer=3, n_embd=8, n_hidden=20)),
    ('bigram', dict(table='learned')),
    ('bigram', dict(table='learned', rank=4)),
    ('trigram', dict(table='learned')),
    ('trigram', dict(table='learned', rank=4)),
]


@pytest.mark.campaign
@pytest.mark.parametrize('n', [2, 3])
@pytest.mark.parametrize('options', [ADAMW, MUON, SGD], ids=['adamw', 'muon', 'sgd'])
@pytest.mark.parametrize(
    'model', EVERY, ids=lambda model: '-'.join(map(str, (model[0], *model[1].values())))
)
def test_every_model_learns_what_it_learns_by_ddp(together, n, model, options):
    ddp, sharded = (together(n, learn, kind, model, options, 50, 3) for kind in ('ddp', 'fsdp'))
    assert problems(sharded[0], ddp[0], 50) == []


@pytest.mark.campaign
@pytest.mark.parametrize('how', ['compiled', 'recomputed', 'lora'])
def test_compiled_recomputed_and_with_lora_too(together, how):
    # compiled: other random numbers
    model = 'gpt', SMALL | dict(bias=False, dropout=0.0 if how == 'compiled' else 0.1)
    ddp, sharded = (together(2, learn, kind, model, ADAMW, 10, 2, how) for kind in ('ddp', 'fsdp'))
    assert problems(sharded[0], ddp[0], 10) == []


def patched(name, value, function, *arguments):
    """function(*arguments) while the object called `name`, as in 'training.fsdp.load_state', is
    another."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(name, value)
        return function(*arguments)


def of_each_shard(self, items, rows, columns):
    """Orthogonal on its own, which is what Muon on shards must not do."""
    return [orthogonalize(update[None])[0] for _, update in items]


def first():
    """Each process has the same data, so that no exchange of gradients would be missed."""
    return 0


@pytest.mark.parametrize(
    'name, value, seen',
    [
        ('training.optimizer.ShardedMuon._orthogonal', of_each_shard, ['losses', 'weights']),
        ('test_fsdp.source', first, ['losses', 'gradients', 'weights']),
    ],
)
def test_the_comparison_sees_what_is_wrong(together, name, value, seen):
    right = together(2, learn, 'fsdp', MODERN, MUON)[0]
    wrong = together(2, patched, name, value, learn, 'fsdp', MODERN, MUON)[0]
    assert problems(wrong, right, 3) == seen


def test_a_process_orthogonalises_its_share(together):
    """Of two blocks' c_attn, c_proj, c_fc and c_proj, 3 + 1 + 1 + 1 matrices each, one of two
    processes has one block's."""
    assert together(2, count_matrices) == [6, 6]


def count_matrices():
    counts = []

    def counting(batch):
        counts.append(len(batch))
        return batch

    patched('training.optimizer.orthogonalize', counting, Run('fsdp', ('gpt', SMALL), MUON).step)
    return sum(counts)


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ValueError, match="parallel='fsdp': Bigram has no parameters to train"):
        fsdp.shard_model(models.build('bigram', block_size=8, vocab_size=5), 'cpu')


# ---- steps that are left out ---------------------------------------------------------------------


def leave_out(options, waits):
    """Whether steps that found_inf forbids change nothing, the very first among them, and the run
    goes on as without."""
    with pytest.MonkeyPatch.context() as patch:
        if not waits:
            patch.setattr('training.optimizer.READ_AT_ONCE', ())
        one, other = (Run('fsdp', MODERN, options) for _ in range(2))
        for step in range(2):
            before = copy.deepcopy(one.state())
            one.backward()
            for p in one.model.parameters():
                p.grad.fill_(float('nan'))
            one.optimizer.found_inf = torch.ones(())
            one.optimizer.step()
            now = one.state()
            is_same = same(before['model'], now['model']) and all(
                not value.any() if step == 0 else same(value, before['optimizer']['state'][i][key])
                for i, state in now['optimizer']['state'].items()
                for key, value in state.items()
                if key != 'step'
            )
            one.optimizer.zero_grad()
            one.optimizer.found_inf = torch.zeros(())
            for run in (one, other):
                run.step()
            if not is_same or (waits and not same(one.state(), other.state())):
                return False
        return True


@pytest.mark.parametrize(
    'options, waits',
    [
        (ADAMW, True),
        (SGD, True),
        (MUON | dict(max_norm=0.5), True),
        (MUON | dict(max_norm=0.5), False),
    ],
)
def test_a_step_that_is_left_out_changes_nothing(together, options, waits):
    assert together(2, leave_out, options, waits) == [True, True]


def overflow():
    """(scale before, after a step in which one process's gradients overflow, after a good one;
    whether weights changed)"""
    run, scaler = Run('fsdp', GPT, ADAMW), torch.amp.GradScaler('cpu', init_scale=8.0)
    seen, found = [scaler.get_scale()], []
    for factor in (float('inf') if dist.get_rank() else 1.0, 1.0):
        before = run.state()['model']
        with torch.autocast('cpu', torch.float16):
            ids = torch.arange(8)[None]
            scaler.scale(run.wrapped(ids, ids)[1] * factor).backward()
        scaler.unscale_(run.optimizer)
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
        seen.append(scaler.get_scale())
        found.append(same(before, run.state()['model']))
    return seen, found


def test_float16_leaves_a_step_out_in_all_processes(together):
    assert together(2, overflow) == [([8.0, 4.0, 4.0], [True, False])] * 2


# ---- checkpoints ---------------------------------------------------------------------------------


def train_and_write(folder, model, options, steps=2):
    """(index, whole state then, whole state one step later)"""
    run = Run('fsdp', model, options)
    for _ in range(steps):
        run.step()
    index, then = fsdp.write_shards(folder, steps, run.model, run.optimizer), run.state()
    run.step()
    return index, then, run.state()


def load_and_go_on(folder, state, model, options, steps=2):
    """The same of a run that loads `state` after it has learned something else."""
    run = Run('fsdp', model, options)
    run.step()
    fsdp.load_state(copy.deepcopy(state), run.model, run.optimizer)  # which the processes share
    run.steps = steps
    index, then = fsdp.write_shards(folder, steps, run.model, run.optimizer), run.state()
    run.step()
    return index, then, run.state()


def shards(folder, index):
    """The content of a ckpt.pt, as checkpoint.read has verified it."""
    fsdp.verify_shards(folder, index)
    return dict(shards=index | dict(out_dir=str(folder)))


@pytest.mark.parametrize(
    'model, options',
    [
        (MODERN, MUON),
        *(pytest.param(GPT, options, marks=pytest.mark.campaign) for options in (ADAMW, SGD)),
    ],
)
def test_any_number_of_processes_reads_what_any_other_wrote(together, tmp_path, model, options):
    index, then, after = together(2, train_and_write, tmp_path, model, options)[0]
    assert index['folder'] == 'shards-2' and same(fsdp.read_whole_state(tmp_path, index), then)
    for n, number in ((3, 2), (1, 3), (2, 4)):
        index, loaded, gone_on = together(
            n, load_and_go_on, tmp_path, shards(tmp_path, index), model, options
        )[-1]
        assert same(loaded, then)
        assert index['folder'] == f'shards-2-{number}' and same(
            fsdp.read_whole_state(tmp_path, index), then
        )
    assert same(gone_on, after)
    # a ckpt.pt with all in it
    assert same(together(2, load_and_go_on, tmp_path, then, model, options)[1][2], after)


def test_what_is_whole_is_what_one_process_without_shards_keeps(together, tmp_path):
    index = together(1, train_and_write, tmp_path, MODERN, MUON)[0][0]
    plain, whole = Run('plain', MODERN, MUON), fsdp.read_whole_state(tmp_path, index)
    for _ in range(2):
        plain.step()
    expected = plain.state()

    def form(values):
        return {
            key: form(value)
            if isinstance(value, dict)
            else (value.dtype, value.shape)
            if isinstance(value, torch.Tensor)
            else value
            for key, value in values.items()
        }

    assert form(whole) == form(expected) and list(whole['model']) == list(expected['model'])
    assert close(whole['model'], expected['model'])
    load_optimizer_state(plain.optimizer, whole['optimizer'])


def test_tied_weights_are_kept_once(together, tmp_path):
    whole = fsdp.read_whole_state(
        tmp_path, together(1, train_and_write, tmp_path, GPT, ADAMW)[0][0]
    )['model']
    assert whole['lm_head.weight'] is whole['transformer.wte.weight']


@pytest.fixture(scope='module')
def written(together, tmp_path_factory):
    """(folder, index, whole state, whole state one step later) of a run of two processes."""
    folder = tmp_path_factory.mktemp('written')
    return folder, *together(2, train_and_write, folder, GPT, ADAMW)[0]


@pytest.fixture
def saved(written, tmp_path):
    """(folder, index) of a checkpoint, to be damaged."""
    shutil.copytree(written[0], tmp_path, dirs_exist_ok=True)
    return tmp_path, copy.deepcopy(written[1])


def test_moments_that_are_not_restored_are_missed(together, written, saved):
    state, then, after = shards(*saved), *written[2:]
    assert same(together(2, load_and_go_on, saved[0], state, GPT, ADAMW)[0][1:], (then, after))
    _, loaded, gone_on = together(
        2,
        patched,
        'training.fsdp.load_optimizer_state',
        forget,
        load_and_go_on,
        saved[0],
        state,
        GPT,
        ADAMW,
    )[0]
    assert (
        same(loaded['model'], then['model'])
        and not same(loaded, then)
        and not same(gone_on['model'], after['model'])
    )


def forget(optimizer, state):
    optimizer.state.clear()


@pytest.mark.parametrize(
    'model, options, message',
    [
        (GPT, SGD, "it is another model's, or another optimizer's"),
        (('gpt', SMALL | dict(n_layer=3)), ADAMW, "another model's weights"),
        (('gpt', SMALL | dict(n_embd=24)), ADAMW, 'Size mismatch'),
    ],
)
def test_another_models_checkpoint_is_refused_by_all(together, saved, model, options, message):
    assert all(
        message in line for line in together(2, refused, saved[0], shards(*saved), model, options)
    )


def refused(folder, state, model, options):
    with pytest.raises(ValueError) as error:
        load_and_go_on(folder, state, model, options)
    return str(error.value)


def flip(content):
    return content[:5000] + bytes([content[5000] ^ 4]) + content[5001:]


@pytest.mark.parametrize(
    'name, damage',
    [
        ('__0_0.distcp', flip),
        ('__1_0.distcp', flip),
        ('__1_0.distcp', lambda content: content[:-1]),
        ('__0_0.distcp', lambda content: b''),
        ('__1_0.distcp', None),
        ('.metadata', lambda content: content[:-1]),
        ('.metadata', None),
    ],
)
def test_a_damaged_file_is_named(saved, name, damage):
    folder, index = saved
    fsdp.verify_shards(folder, index)
    path = folder / 'shards-2' / name
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    with pytest.raises(
        ValueError, match=rf"shards-2.{name} (is damaged: it is not what was saved|is missing)"
    ):
        fsdp.verify_shards(folder, index)


@pytest.mark.parametrize(
    'change',
    [
        dict(folder='../shards-2'),
        dict(folder='shards-2/..'),
        dict(folder=7),
        dict(folder=None),
        dict(files={}),
        dict(files=None),
        dict(files={'.metadata': '', '../../x': ''}),
        dict(model=[]),
        dict(model={'x': []}),
        dict(optimizer=None),
        dict(optimizer=dict(state=3, param_groups=[])),
    ],
)
def test_a_damaged_index_is_refused(saved, change):
    folder, index = saved
    with pytest.raises(ValueError, match='index is damaged'):
        fsdp.verify_shards(folder, index | change)


class Payload:
    """Pickled, it makes the file `marker` when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def hide_in_metadata(folder, known, marker):
    known.planner_data = Payload(marker)


def hide_in_bytes(folder, known, marker):
    """DCP loads what is no tensor with pickle, whatever its metadata's loader allows."""
    name = 'model.transformer.wpe.weight'
    known.state_dict_metadata[name] = metadata.BytesStorageMetadata()
    torch.save(Payload(marker), folder / '__0_0.distcp')
    places = [place for place in known.storage_data if place.fqn == name]
    place = known.storage_data.pop(places[0])
    place.relative_path, place.offset, place.length = (
        '__0_0.distcp',
        0,
        (folder / '__0_0.distcp').stat().st_size,
    )
    known.storage_data[metadata.MetadataIndex(name)] = place


def point_outside(folder, known, marker):
    next(iter(known.storage_data.values())).relative_path = '../secret'


@pytest.mark.filterwarnings('ignore:torch.distributed is disabled')
@pytest.mark.parametrize('hide', [hide_in_metadata, hide_in_bytes, point_outside])
def test_no_code_in_a_checkpoint_runs(saved, tmp_path, hide):
    """Though its sums are right, as those of a file from a stranger are."""
    (folder, index), marker = saved, tmp_path / 'marker'
    path = folder / 'shards-2'
    known = pickle.loads((path / '.metadata').read_bytes())
    hide(path, known, marker)
    (path / '.metadata').write_bytes(pickle.dumps(known))
    index['files'] = {name: files.sha256(path / name) for name in index['files']}
    fsdp.verify_shards(folder, index)
    with pytest.raises(
        ValueError, match='.metadata is damaged, and not loaded: it (holds|describes)'
    ) as error:
        fsdp.read_whole_state(folder, index)
    assert not marker.exists() and len(str(error.value).splitlines()) == 1
    with contextlib.suppress(Exception, dcp.CheckpointException):  # the control: DCP as it comes
        dcp.load(
            {'model.transformer.wpe.weight': torch.empty(8, 20)},
            storage_reader=dcp.FileSystemReader(path),
            planner=fsdp.DefaultLoadPlanner(False),
            no_dist=True,
        )
    assert marker.exists() == (hide is not point_outside)


class Crash(BaseException):
    pass


STEPS = [
    (Path, 'mkdir'),
    (shutil, 'rmtree'),
    (os, 'fsync'),
    (Path, 'rename'),
    (files, 'sha256'),
    (files, 'sync_folder'),
    (os, 'replace'),
    (torch, 'save'),
]


def crash_everywhere(folder):
    """Interrupt a save before each of its steps, one after the other; returns the steps."""
    run, count, seen = Run('fsdp', ('bigram', dict(table='learned', rank=4)), SGD), 0, []
    run.step()
    index, then = fsdp.write_shards(folder, 1, run.model, run.optimizer), run.state()
    run.step()

    def counted(name, function):
        def step(*arguments, **options):
            seen.append(name)
            if len(seen) > count:
                raise Crash
            return function(*arguments, **options)

        return step

    while True:
        seen.clear()
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Crash):
            for place, name in STEPS:
                patch.setattr(place, name, counted(name, getattr(place, name)))
            newer = fsdp.write_shards(folder, 1, run.model, run.optimizer)
            break
        fsdp.verify_shards(folder, index)
        fsdp.remove_other_shards(folder, {index['folder']})
        assert os.listdir(folder) == [index['folder']], seen
        count += 1
    assert same(fsdp.read_whole_state(folder, index), then) and same(
        fsdp.read_whole_state(folder, newer), run.state()
    )
    return list(seen)


def test_a_crash_between_any_two_steps_leaves_the_checkpoint_before(together, tmp_path):
    steps = together(1, crash_everywhere, tmp_path)[0]
    at = steps.index('replace')
    assert set(steps[:at]) >= {'mkdir', 'save', 'fsync', 'rename', 'sha256', 'sync_folder'}
    assert steps[at:] == ['replace', 'sync_folder', 'fsync'] and steps[at - 2 : at] == [
        'sync_folder',
        'fsync',
    ]


def fail_on_one(folder, name, error):
    """What all processes hear where the second one fails in the function `name`; then all is well
    again."""
    run = Run('fsdp', ('gpt', SMALL), ADAMW)
    run.step()
    fsdp.write_shards(folder, 1, run.model, run.optimizer)

    def fail(*arguments, **options):
        raise error

    with pytest.raises(OSError) as caught:
        if dist.get_rank():
            patched(name, fail, fsdp.write_shards, folder, 2, run.model, run.optimizer)
        else:
            fsdp.write_shards(folder, 2, run.model, run.optimizer)
    dist.barrier()
    left = sorted(os.listdir(folder))
    dist.barrier()
    return str(caught.value), left, fsdp.write_shards(folder, 2, run.model, run.optimizer)['folder']


@pytest.mark.parametrize('name', ['system.files.sha256', 'torch.save'])
def test_one_process_that_cannot_write_is_heard_by_all(together, tmp_path, name):
    error = OSError(28, 'No space left on device')
    for line, left, folder in together(2, fail_on_one, tmp_path, name, error):
        assert 'No space left on device' in line and len(line.splitlines()) == 1
        assert left == ['shards-1'] and folder == 'shards-2'


def write_apart(folder):
    """What a process hears where each writes to a disk of its own, and what is left there."""
    folder, run = (
        folder / str(dist.get_rank()),
        Run('fsdp', ('bigram', dict(table='learned', rank=4)), SGD),
    )
    folder.mkdir()
    run.step()
    with pytest.raises(OSError) as caught:
        fsdp.write_shards(folder, 1, run.model, run.optimizer)
    return str(caught.value), os.listdir(folder)


def test_machines_that_share_no_disk_are_told_so(together, tmp_path):
    for line, left in together(2, write_apart, tmp_path):
        assert (
            'has no __1_0.distcp, which another process wrote: out_dir must be on a disk' in line
            and left == []
        )


def test_what_no_checkpoint_refers_to_goes_and_nothing_else(tmp_path):
    stay, go = (
        ['shards-7', 'shards-8-2', 'shards-mine', 'my-shards-3', 'x'],
        ['shards-6', 'shards-8', '.shards-9.new'],
    )
    for name in stay + go:
        (tmp_path / name).mkdir()
        (tmp_path / name / '__0_0.distcp').touch()
    fsdp.remove_other_shards(tmp_path, {'shards-7', 'shards-8-2'})
    assert sorted(os.listdir(tmp_path)) == sorted(stay)


# ---- train.py ------------------------------------------------------------------------------------


def losses(out_dir):
    lines = map(json.loads, (out_dir / 'metrics.jsonl').read_text().splitlines())
    return [line['loss'] for line in lines if 'loss' in line]


@pytest.mark.campaign
def test_a_run_is_ddps_and_goes_on_with_other_numbers_of_processes(text_folder, tmp_path):
    settings = [*TINY, f'--dataset={text_folder}']
    for kind in ('ddp', 'fsdp'):
        done = run(
            'train.py', *settings, f'--parallel={kind}', f'--out_dir={tmp_path}/{kind}', processes=2
        )
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / 'fsdp') == pytest.approx(losses(tmp_path / 'ddp'), abs=1e-5)
    whole = losses(tmp_path / 'fsdp')
    done = run(
        'train.py',
        *settings,
        '--parallel=fsdp',
        '--max_iters=4',
        f'--out_dir={tmp_path}/cut',
        processes=2,
    )
    assert done.returncode == 0, done.stderr
    for processes, words in ((2, []), (1, ['--parallel=ddp'])):
        out_dir = shutil.copytree(tmp_path / 'cut', tmp_path / f'cut-{processes}')
        done = run(
            'train.py',
            '--init_from=resume',
            '--max_iters=6',
            f'--out_dir={out_dir}',
            *words,
            processes=processes,
        )
        assert done.returncode == 0, done.stderr
        assert losses(out_dir) == pytest.approx(whole, abs=0 if processes == 2 else 1e-5)
    done = run(
        'sample.py',
        f'--out_dir={tmp_path}/fsdp',
        '--num_samples=1',
        '--max_new_tokens=5',
        '--device=cpu',
    )
    assert done.returncode == 0, done.stderr
