"""Sharded training learns what DDP learns; its checkpoints are whole or not there, and fit any number of processes.

`together(n, function, …)` calls the function in n processes, which form a group; they are forked once, for all tests.
"""
import multiprocessing
import os
import pickle
import shutil
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, same

import files
import fsdp
import models
import optimizer as optimizers

GPT = 'gpt', dict(n_layer=2, n_head=2, n_embd=20, bias=True, dropout=0.1)      # 20 rows for 3 processes: 7, 7, 6
MODERN = 'modern', dict(n_layer=2, n_head=2, n_embd=16, ngram=3, ngram_rows=11)
ADAMW, SGD = dict(lrs=None), dict(lrs=None, name='sgd')
MUON = dict(lrs=dict(matrix=0.02, embedding=0.3, head=0.005))


# ---- the processes ---------------------------------------------------------------------------------------------------

class Together:
    def __init__(self, folder, n=3):
        methods = multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context('forkserver' if 'forkserver' in methods else 'spawn')
        if 'forkserver' in methods:
            context.set_forkserver_preload(['test_fsdp', 'torch._dynamo'])
        os.environ['PYTHONPATH'], before = os.pathsep.join([str(ROOT), str(ROOT / 'tests')]), os.environ.get('PYTHONPATH')
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
        answers = [pipe.recv() if pipe.poll(100) else (False, "no answer") for pipe in self.pipes[:n]]
        assert all(is_good for is_good, _ in answers), '\n'.join(text for is_good, text in answers if not is_good)
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
            dist.init_process_group('gloo', init_method=f'file://{place}', rank=rank, world_size=n,
                                    timeout=timedelta(seconds=60))
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


# ---- what they do ----------------------------------------------------------------------------------------------------

class Run:
    """A small model in training: by DDP, by FSDP, or (plain) by one process."""

    def __init__(self, kind, model, options, compile=False, **fields):
        torch.manual_seed(0)
        name, own = model
        self.model = self.wrapped = models.build(name, **dict(block_size=8, vocab_size=13) | own | fields)
        if kind == 'fsdp':
            assert fsdp.shard(self.model, 'cpu') is self.model
        elif kind == 'ddp':
            self.wrapped = torch.nn.parallel.DistributedDataParallel(self.model)
        self.optimizer = self.model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), 'cpu', **options)
        self.kind, self.steps = kind, 0

    def backward(self, micros=2, rank=None):
        """Gradients of this process's micro-batches; returns the mean loss of all processes'."""
        loss, rank = torch.zeros(()), dist.get_rank() if rank is None else rank
        for micro in range(micros):
            if self.kind == 'fsdp':
                self.model.set_requires_gradient_sync(micro == micros - 1)
            elif self.kind == 'ddp':
                self.wrapped.require_backward_grad_sync = micro == micros - 1
            torch.manual_seed(1 + rank + 10 * micro + 100 * self.steps)
            ids = torch.randint(3, (2, 9)).cumsum(1) % 13
            part = self.wrapped(ids[:, :-1], ids[:, 1:])[1] / micros
            part.backward()
            loss += part.detach()
        if self.kind != 'plain':
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        return loss.item()

    def step(self, **micros):
        loss = self.backward(**micros)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return loss

    def state(self):
        """Whole copies of all that is learned, and of the moments."""
        def own(tensor):
            return (tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor).detach().clone()
        state = self.optimizer.state_dict()
        return dict(model={name: own(tensor) for name, tensor in self.model.state_dict().items()}, optimizer=dict(
            state={i: {key: own(value) for key, value in values.items()} for i, values in state['state'].items()},
            param_groups=state['param_groups']))


def learn(kind, model, options, steps=3, micros=2, **how):
    """(losses, {name: gradient of the first step}, weights)"""
    run = Run(kind, model, options, **how)
    run.backward(micros)
    gradients = {name: p.grad.full_tensor() if kind == 'fsdp' else p.grad.clone()
                 for name, p in run.model.named_parameters() if p.grad is not None}
    run.optimizer.zero_grad()
    losses = [run.step(micros=micros) for _ in range(steps)]
    return losses, gradients, fsdp.full(run.model) if kind == 'fsdp' else run.model.state_dict()


def close(a, b, atol=1e-5):
    return a.keys() == b.keys() and all(torch.allclose(a[key], b[key], atol=atol) for key in a)


def problems(a, b, steps):
    """What two results of `learn` differ in."""
    return [name for name, is_good in (
        ('losses', len(a[0]) == steps and a[0] == pytest.approx(b[0], abs=1e-5)), ('gradients', close(a[1], b[1], 1e-6)),
        ('weights', close(a[2], b[2], 2e-4))) if not is_good]


# ---- training --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('n, model, options', [(2, GPT, ADAMW), (3, MODERN, MUON | dict(max_norm=0.9)), (1, GPT, SGD)])
def test_it_learns_what_ddp_learns(together, n, model, options):
    ddp, sharded = (together(n, learn, kind, model, options) for kind in ('ddp', 'fsdp'))
    assert problems(sharded[0], ddp[0], 3) == []
    assert all(others == [] for _, _, others in [(0, 0, list(weights)) for _, _, weights in sharded[1:]])


# ---- checkpoints -----------------------------------------------------------------------------------------------------

def train_and_write(folder, model, options, steps=2, after=1):
    """(index, whole state then, whole state `after` more steps)"""
    run = Run('fsdp', model, options)
    for _ in range(steps):
        run.step()
    index = fsdp.write(folder, steps, run.model, run.optimizer)
    then = run.state()
    for _ in range(after):
        run.step()
    return index, then, run.state()


def read_and_go_on(folder, state, model, options, steps=2, after=1):
    """(whole state as loaded, whole state `after` more steps, the index of what is written in between)"""
    run = Run('fsdp', model, options, **dict(vocab_size=13))
    with torch.no_grad():
        for p in run.model.parameters():
            p.zero_()
    fsdp.load(state, run.model, run.optimizer)
    run.steps = steps
    index = fsdp.write(folder, steps, run.model, run.optimizer)
    then = run.state()
    for _ in range(after):
        run.step()
    return index, then, run.state()


def shards(folder, index):
    fsdp.verify(folder, index)
    return dict(shards=index | dict(out_dir=str(folder)))


@pytest.mark.parametrize('model, options', [(GPT, ADAMW), (MODERN, MUON)])
def test_any_number_of_processes_reads_what_any_other_wrote(together, tmp_path, model, options):
    index, then, after = together(2, train_and_write, tmp_path, model, options)[0]
    assert index['folder'] == 'shards-2' and same(fsdp.whole(tmp_path, index), then)
    for n in (2, 3, 1):
        again, loaded, gone_on = together(n, read_and_go_on, tmp_path, shards(tmp_path, index), model, options)[-1]
        assert same(loaded, then)
        assert n != 2 or same(gone_on, after)
        assert again['folder'] == f'shards-2-{ {2: 2, 3: 3, 1: 4}[n] }' and same(fsdp.whole(tmp_path, again), then)
        index = again
