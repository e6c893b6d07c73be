"""watch.py: what it tells of a network is true, and the network does not notice."""

import json
import math
import runpy
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.outcomes import same
from support.scripts import ROOT, TINY, run
from torch import nn
from torch.nn import functional as F

import models
from model import LanguageModel
from models.parts import layers
from training import watch
from training.metrics import Metrics
from training.watch import Watch, activation_stats

GPT = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=50, dropout=0.1, bias=True)
IDX = np.random.default_rng(0).integers(0, 50, (8, 16))
DATA = SimpleNamespace(train_batch=lambda step, micro: (IDX, IDX, 1.0))


def build(name='gpt', **fields):
    torch.manual_seed(0)
    return models.build(
        name, **(GPT if name == 'gpt' else dict(block_size=16, vocab_size=50)) | fields
    )


def train(
    model,
    folder,
    steps,
    on=True,
    start=0,
    grad_clip=1.0,
    log_interval=1,
    lr=1e-2,
    muon_lr=0.0,
    clipped=0,
):
    """train.py's loop, in small: two micro-batches a step, what is logged goes into metrics.jsonl.
    Returns the Watch."""
    optimizer = model.configure_optimizers(0.1, lr, (0.9, 0.95), 'cpu', dict(matrix=muon_lr))
    watcher = Watch(on, model, folder, grad_clip, nullcontext(), DATA, clipped)
    for step in range(start, start + steps):
        for micro in range(2):
            torch.manual_seed(2 * step + micro)
            (
                model(torch.as_tensor(IDX), torch.as_tensor(np.roll(IDX, 1 + step + micro)))[1] / 2
            ).backward()
        watcher.before_step(step % log_interval == 0)
        norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        watcher.count_clipped(norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.after_step()
        if step % log_interval == 0:
            line = dict(iter=step, grad_norm=norm.item())
            line |= watcher.after_step(line)
            Metrics.log(
                SimpleNamespace(is_on=True, path=folder / 'metrics.jsonl', loggers=[]), line
            )
    return watcher


def lines(path):
    def no_constants(word):
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=no_constants) for line in path.read_text().splitlines()]


# ---- activations ---------------------------------------------------------------------------------


@dataclass
class OneLayer:
    block_size: int = 16
    vocab_size: int = 50


class Layer(LanguageModel):
    """Embeddings, a layer of 12 units, logits; the units' nonlinearity is f."""

    def __init__(self, f, is_last=True):
        super().__init__(OneLayer())
        self.f, self.is_last, self.T = f, is_last, None
        self.wte, self.c_fc, self.lm_head = nn.Embedding(50, 8), nn.Linear(8, 12), nn.Linear(12, 50)

    def forward(self, idx, targets=None, cache=None):
        x = self.c_fc(self.wte(idx))
        # (B, T, C), or a convolution's (B, C, T)
        x = self.f(x) if self.is_last else self.f(x.mT).mT
        self.seen = x.detach().flatten(0, 1)
        logits = 30 * torch.tanh(self.lm_head(x) / 30)  # a cap is no layer
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize('is_last', [True, False])
@pytest.mark.parametrize(
    'f, name, planted, is_flat',
    [
        (torch.relu, 'relu', -99, lambda y: y == 0),
        (nn.ReLU(), 'f.relu', -99, lambda y: y == 0),
        (nn.ReLU(inplace=True), 'f.relu', -99, lambda y: y == 0),
        (layers.squared_relu, 'relu', -99, lambda y: y == 0),
        (torch.tanh, 'tanh', 99, lambda y: abs(y) > 0.97),
        (nn.Tanh(), 'f.tanh', -99, lambda y: abs(y) > 0.97),
        (torch.sigmoid, 'sigmoid', 99, lambda y: (y < 0.015) | (y > 0.985)),
        (nn.GELU(), 'f.gelu', -99, lambda y: abs(y) < 1e-9),
        (nn.GELU('tanh'), 'f.gelu', -99, lambda y: abs(y) < 1e-9),
        (F.silu, 'silu', -99, lambda y: abs(y) < 1e-9),
        (nn.SiLU(inplace=True), 'f.silu', -99, lambda y: abs(y) < 1e-9),
    ],
)
def test_planted_dead_units_are_found(f, name, planted, is_flat, is_last):
    model = Layer(f, is_last)
    with torch.no_grad():
        model.c_fc.bias[[1, 5, 6]] = planted
        model.c_fc.bias[7] = -planted  # at the other end a ReLU is not flat, a tanh is
    dead = 4 / 12 if 'tanh' in name or 'sigmoid' in name else 3 / 12
    ((found, (share, saturated, values)),) = activation_stats(
        model, torch.as_tensor(IDX[:, :15]), nullcontext()
    ).items()
    assert found == name and share.item() == pytest.approx(dead)
    assert (
        saturated.item() == pytest.approx(is_flat(model.seen).float().mean().item(), abs=1e-6)
        and saturated >= share
    )
    y = model.seen.sqrt() if f is layers.squared_relu else model.seen
    assert values.sort()[0] == pytest.approx(y.flatten().sort()[0], rel=1e-5)


def test_an_activation_is_called_by_the_module_that_it_is_in(tmp_path):
    model = build()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias[:4] = -100
    train(model, tmp_path, 1)
    (line,) = lines(tmp_path / 'metrics.jsonl')
    assert {k: v for k, v in line.items() if k.startswith('dead')} == {
        'dead': 4 / 64 / 2,
        'dead/h.0.mlp.gelu': 0,
        'dead/h.1.mlp.gelu': 4 / 64,
    }


def test_the_steps_of_a_recurrence_are_examples_of_the_same_units():
    def f(x):  # each unit is saturated at half of the positions
        return torch.stack(
            [torch.tanh(99 * x[:, t].abs().clamp(min=1) * (t % 2)) for t in range(x.size(1))], 1
        )

    ((name, (dead, saturated, _)),) = activation_stats(
        Layer(f), torch.as_tensor(IDX[:, :15]), nullcontext()
    ).items()
    assert (name, dead.item(), saturated.item()) == ('tanh', 0, pytest.approx(7 / 15))


# ---- gradients and updates -----------------------------------------------------------------------


@pytest.mark.parametrize('muon_lr', [0.0, 0.02])
def test_update_ratios_and_gradient_norms_are_those_computed_by_hand(tmp_path, muon_lr):
    """With weight decay, clipping, what the model does to its own weights, and Muon."""
    model = build()
    model.after_step = lambda: [p.data.mul_(1.01) for p in model.parameters()]
    state, plain = {k: v.clone() for k, v in model.state_dict().items()}, build()
    train(model, tmp_path, 1, grad_clip=0.1, muon_lr=muon_lr)
    for micro in range(2):
        torch.manual_seed(micro)
        (plain(torch.as_tensor(IDX), torch.as_tensor(np.roll(IDX, 1 + micro)))[1] / 2).backward()
    (line,) = lines(tmp_path / 'metrics.jsonl')
    squares = {}
    for name, p in plain.named_parameters():
        short = name.removeprefix('transformer.').removesuffix('.weight')
        layer = '.'.join(short.split('.')[: 2 if short[0] == 'h' else 1])
        squares[layer] = squares.get(layer, 0) + p.grad.double().square().sum().item()
        old, new = (s[name].double().numpy() for s in (state, model.state_dict()))
        # biases and norms begin as constants
        ratio = np.log10((new - old).std() / old.std()) if old.std() else None
        assert line[f'update_ratio/{short}'] == (
            ratio if ratio is None else pytest.approx(ratio, abs=2e-3)
        ), name
    for layer, square in squares.items():
        assert line[f'grad_norm/{layer}'] == pytest.approx(math.sqrt(square), rel=1e-3)
    norms = [norm for key, norm in line.items() if key.startswith('grad_norm/')]
    assert math.hypot(*norms) == pytest.approx(line['grad_norm'], rel=1e-3)


def test_clipped_steps_are_counted_between_the_logged_ones_and_after_a_resume(tmp_path):
    # float16's overflows are not clipped but left out
    norms = [3.0, 0.5, 2.0, 1.0, float('inf'), float('nan'), 1.5]
    model = build()
    watcher = train(model, tmp_path, 0)
    for norm in norms:
        watcher.count_clipped(torch.tensor(norm))
    assert int(watcher.clipped) == 3
    for out_dir, grad_clip, clipped in (
        (tmp_path / 'all', 1e-6, [1, 3, 5, 7]),
        (tmp_path / 'none', 1e6, [0, 0, 0, 0]),
    ):
        out_dir.mkdir()
        # step 3 is counted, but not logged
        cut = train(model, out_dir, 4, grad_clip=grad_clip, log_interval=2)
        train(
            model,
            out_dir,
            3,
            grad_clip=grad_clip,
            log_interval=2,
            start=4,
            clipped=int(cut.clipped),
        )
        assert [line['clipped'] for line in lines(out_dir / 'metrics.jsonl')] == clipped
    assert not any(
        'clipped' in watcher.history[-1] for watcher in [train(model, tmp_path, 1, grad_clip=0)]
    )


# ---- the network does not notice -----------------------------------------------------------------


@pytest.mark.parametrize('name, fields', [('gpt', {}), ('mlp', dict(batchnorm='ema'))])
def test_weights_buffers_gradients_and_random_numbers_are_the_same(tmp_path, name, fields):
    ends = []
    for on in (False, True):
        model = build(name, **fields)
        model._compiled_call_impl = model._call_impl
        watcher = train(model, tmp_path, 3, on)
        if on:
            model._compiled_call_impl = lambda *_: pytest.fail(
                "the compiled model was called for a look"
            )
            activation_stats(model, watcher.idx, nullcontext())
            watcher.draw(3)
        ends.append((model.state_dict(), torch.get_rng_state(), model.training))
    assert same(*ends) and not any(
        m._forward_hooks or m._forward_pre_hooks for m in model.modules()
    )


def test_a_watched_run_ends_as_any_other_and_plot_reads_its_log(
    trained, text_folder, tmp_path, monkeypatch, capsys
):
    done = run(
        'train.py', *TINY, f'--dataset={text_folder}', f'--out_dir={tmp_path}/out', '--watch=True'
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        torch.load(out_dir / 'ckpt.pt', weights_only=True)
        for out_dir in (tmp_path / 'out', trained)
    )
    for key in ('model', 'optimizer', 'iter_num', 'best_val_loss', 'model_args'):
        assert same(ours[key], theirs[key]), key
    logged = lines(tmp_path / 'out' / 'metrics.jsonl')
    assert [record['iter'] for record in logged if 'update_ratio' in record] == [*range(6)]
    unwatched = lines(trained / 'metrics.jsonl')
    assert [record.get('loss') for record in logged] == [record.get('loss') for record in unwatched]
    assert (
        not any('update_ratio' in record for record in unwatched)
        and not (trained / 'health.png').exists()
    )
    assert [health['iter'] for health in lines(tmp_path / 'out' / 'health.jsonl')] == [3, 6]
    assert (tmp_path / 'out' / 'health.png').exists()
    monkeypatch.setattr(
        sys, 'argv', ['plot.py', str(tmp_path / 'out'), '--y=dead,update_ratio/wte']
    )
    runpy.run_path(str(ROOT / 'plot.py'))
    assert (tmp_path / 'out' / 'dead-update_ratio-wte.png').exists()
    monkeypatch.setattr(sys, 'argv', ['plot.py', str(tmp_path / 'out'), '--y=missing'])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / 'plot.py'))
    message = capsys.readouterr().err
    assert 'update_ratio' in message and '/wte' not in message  # a hundred names are no help


# ---- the page ------------------------------------------------------------------------------------


def size(path):
    """Width and height of a PNG, by its own header."""
    content = path.read_bytes()
    assert content[:8] == b'\x89PNG\r\n\x1a\n' and content[-8:-4] == b'IEND'
    return int.from_bytes(content[16:20]), int.from_bytes(content[20:24])


def test_the_page_goes_on_from_what_the_run_has_logged(tmp_path):
    model = build()
    train(model, tmp_path, 3).draw(3)
    assert (
        size(tmp_path / 'health.png') == (2000, 1300)
        and (tmp_path / 'health.png').stat().st_size > 50_000
    )
    kept = lines(tmp_path / 'metrics.jsonl')
    (tmp_path / 'metrics.jsonl').write_text(
        ''.join(json.dumps(line) + '\n' for line in kept[:2]) + '{"iter": 2, "lo'
    )
    watcher = Watch(True, model, tmp_path, 1.0, nullcontext(), DATA)
    assert watcher.draw(2) == {}  # nothing was seen yet: the page stays
    assert [line['iter'] for line in watcher.history] == [0, 1]
    (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in kept[:2]))
    watcher = train(model, tmp_path, 2, start=2)
    samples = watcher.draw(2)  # an earlier step than the file has: that part of the run is lost
    assert [line['iter'] for line in watcher.history] == [0, 1, 2, 3]
    (health,) = lines(tmp_path / 'health.jsonl')
    assert health.keys() - {'iter'} == samples.keys() and 'gradients/h.1.attn.c_attn' in samples
    for name, values in samples.items():
        counts, edges = np.histogram(values, 40)
        assert health[name]['counts'] == counts.tolist() and sum(counts) == len(values) > 0
        assert (health[name]['low'], health[name]['high']) == pytest.approx((edges[0], edges[-1]))
        assert (health[name]['mean'], health[name]['std']) == pytest.approx(
            (values.mean(), values.std()), rel=1e-3
        )


def test_many_layers_and_many_steps_fit_on_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, 'POINTS', 100)
    watcher = train(build(n_layer=24, n_embd=2), tmp_path, 1)
    for step in range(1, 1000):
        watcher._remember(watcher.history[-1] | dict(iter=step))
    steps = [line['iter'] for line in watcher.history]
    assert 50 <= len(steps) <= 100 and steps == sorted(steps) and (steps[0], steps[-1]) == (0, 999)
    watcher.draw(1000)
    assert size(tmp_path / 'health.png') == (2000, 1300)


@pytest.mark.parametrize('trouble', ['nan', 'zero', 'linear'])
def test_what_there_is_no_number_for_is_null_and_the_page_is_drawn(tmp_path, trouble):
    """Gradients that are no numbers (train.py's own check ends that run), nothing to learn from, no
    nonlinearity."""
    model = build('bigram', table='learned') if trouble == 'linear' else build(dropout=0.0)
    if trouble == 'nan':
        next(model.parameters()).data[0] = math.nan
    watcher = train(model, tmp_path, 2, lr=0.0 if trouble == 'zero' else 1e-2)
    watcher.draw(2)
    line = lines(tmp_path / 'metrics.jsonl')[0]
    assert size(tmp_path / 'health.png') == (2000, 1300)
    # a table begins with zeros
    assert line['update_ratio'] is None and ('dead' in line) == (trouble != 'linear')


def test_a_counted_model_has_nothing_to_watch(tmp_path, capsys):
    model = build('bigram')
    watcher = Watch(True, model, tmp_path, 1.0, nullcontext(), DATA)
    assert capsys.readouterr().out.count('\n') == 1 and not watcher.is_on
    assert watcher.draw(0) == {} and not [*tmp_path.iterdir()]


def test_histograms_go_to_the_loggers(tmp_path, monkeypatch):
    rows, values = [], np.arange(9.0)
    a_run = SimpleNamespace(
        id='x', log=lambda values, step: rows.append((step, values)), finish=None
    )
    wandb = SimpleNamespace(
        Histogram=lambda values: ('histogram', len(values)),
        login=lambda **_: True,
        init=lambda **_: a_run,
        errors=SimpleNamespace(Error=OSError),
    )
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    log = Metrics(tmp_path, True)
    log.start({'wandb_project': 'p', 'wandb_run_name': 'r'}, ['wandb'])
    log.histograms(5, {})
    log.histograms(5, {'gradients/wte': values})
    assert rows == [(5, {'iter': 5, 'gradients/wte': ('histogram', 9)})]
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Metrics(tmp_path, True)
    log.start({}, ['tensorboard'])
    log.histograms(5, {'gradients/wte': values})
    log.close()
    (event,) = EventAccumulator(str(tmp_path / 'tensorboard')).Reload().Histograms('gradients/wte')
    assert event.step == 5 and event.histogram_value.num == 9
