"""What every architecture has to hold, whatever it is made of: each file of models/ and gpt, in its
variants.

A model's `exemptions` say which of these properties it does not have, and why; it must then really
not have them.
"""

import contextlib
import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.scripts import ROOT
from support.zoo import ZOO, T, V, batch, new, prepared
from torch.nn import functional as F

PROPERTIES = {'causality', 'padding', 'initial', 'learns', 'accumulation', 'cache', 'flops'}


@pytest.fixture(params=ZOO)
def name(request):
    return request.param


@pytest.fixture(scope='module')
def _prepared():
    return {}


@pytest.fixture
def model(name, _prepared):
    if name not in _prepared:
        _prepared[name] = prepared(name)
    return copy.deepcopy(_prepared[name])


@contextlib.contextmanager
def unless_exempt(model, what):
    """The body holds; or the model says why not, and it does not."""
    assert what in PROPERTIES
    if what not in model.exemptions:
        yield
        return
    assert len(model.exemptions[what]) > 10
    with pytest.raises(AssertionError):  # if nothing is raised, the exemption is out of date
        yield


def test_every_architecture_is_here_and_exempt_from_known_properties_only(_prepared):
    assert {name.partition('-')[0] for name in ZOO} == {
        'gpt',
        *(p.stem for p in Path(ROOT, 'models').glob('[a-z]*.py')),
    }
    assert all(new(name).exemptions.keys() <= PROPERTIES for name in ZOO)


def test_shapes_and_loss_are_the_contracts(model):
    idx, targets = batch()
    logits, loss = model(idx, targets)
    assert logits.shape == (4, T, V) and loss.shape == ()
    assert loss.item() == pytest.approx(
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item(), abs=1e-5
    )
    last, none = model(idx)
    assert (
        last.shape == (4, 1, V) and none is None and torch.allclose(last, logits[:, -1:], atol=1e-9)
    )
    assert model(idx[:, :1])[0].shape == (4, 1, V)
    logits, loss = model.train()(idx, targets)
    assert loss.shape == () and (logits is None or logits.shape == (4, T, V))


def test_causality(model):
    idx, targets = batch(1)
    before = model(idx, targets)[0]
    with unless_exempt(model, 'causality'):
        for t in (1, T // 2, T - 1):
            changed = idx.clone()
            changed[:, t] = (idx[:, t] + 1) % V
            after = model(changed, targets)[0]
            assert torch.allclose(before[:, :t], after[:, :t], atol=1e-9, rtol=0)
            assert not torch.allclose(before[:, t], after[:, t], atol=1e-9, rtol=0)


def test_ignored_targets_and_what_stands_beside_them_change_nothing(model):
    idx, targets = batch()
    targets[:2, 5:], targets[3, 0] = -1, -1
    logits, loss = model(idx, targets)
    assert loss.item() == pytest.approx(
        F.cross_entropy(logits[targets >= 0], targets[targets >= 0]).item(), abs=1e-5
    )
    padded = idx.clone()
    padded[:2, 6:] = 0  # the padding of short texts
    with unless_exempt(model, 'padding'):
        for is_training in (False, True):
            losses = [
                copy.deepcopy(model).train(is_training)(ids, targets)[1].item()
                for ids in (idx, padded)
            ]
            assert losses[0] == pytest.approx(losses[1], abs=1e-9)


def test_the_initial_loss_is_that_of_guessing(name):
    model, (idx, targets) = new(name), batch(16)
    with unless_exempt(model, 'initial'):
        assert model.eval()(idx, targets)[1].item() == pytest.approx(math.log(V), abs=0.1)
        assert model.train()(idx, targets)[1].item() == pytest.approx(math.log(V), abs=0.1)


def test_learns_one_batch_by_heart(name):
    model, idx = new(name), (torch.arange(T) * 3 + torch.arange(4)[:, None]) % V
    targets = (idx + 3) % V  # one answer to each token: even a bigram can know it
    with unless_exempt(model, 'learns'):
        optimizer = model.configure_optimizers(0.0, 0.05, (0.9, 0.95), 'cpu')
        assert optimizer
        for _ in range(100):
            loss = model(idx, targets)[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.after_step()
        assert loss.item() < 0.1


def test_counts_know_one_batch_by_heart(name):
    idx = (torch.arange(T) * 3 + torch.arange(4)[:, None]) % V
    if new(name).fit:
        model = new(name, k=1e-6)
        model.fit([(idx, (idx + 3) % V)])
        assert model(idx, (idx + 3) % V)[1].item() < 0.1


def test_every_parameter_has_one_role(name):
    model = new(name)
    groups = model.param_groups()
    ids = [id(p) for role in groups for p in groups[role]]
    assert groups.keys() == {'matrix', 'embedding', 'head', 'vector'} and len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters()}


def test_every_parameter_learns(name):
    model = new(name).double()
    if not model.fit:
        model(*batch())[1].backward()
    assert all(p.grad is not None for p in model.parameters())
    moved = sum(bool(p.grad.any()) for p in model.parameters())
    # the others begin behind projections of zeros
    assert moved >= len(list(model.parameters())) / 2


def test_a_saved_state_is_the_whole_model(name, model, tmp_path):
    torch.save(model.state_dict(), tmp_path / 'state.pt')
    other = new(name, seed=5).double().eval()
    other.load_state_dict(torch.load(tmp_path / 'state.pt', weights_only=True))
    assert torch.equal(other(*batch())[0], model(*batch())[0])


def test_too_long_a_text_is_one_line(model):
    with pytest.raises(ValueError, match=f'{T + 1} tokens do not fit into block_size={T}'):
        model(torch.zeros(1, T + 1, dtype=torch.int64))


def test_bfloat16(name):
    model, (idx, targets) = new(name), batch()
    with torch.autocast('cpu', torch.bfloat16):
        _, loss = model(idx, targets)
    assert loss.dtype == torch.float32 and loss.isfinite()
    if not model.fit:
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gradients_of_micro_batches_add_up(model):
    idx, targets = batch()
    targets[0, :7] = -1
    if model.fit:
        return
    with unless_exempt(model, 'accumulation'):
        model.train()(idx, targets)[1].backward()
        whole = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        for part in (slice(3), slice(3, 4)):
            share = (targets[part] >= 0).sum() / (targets >= 0).sum()
            (model(idx[part], targets[part])[1] * share.double()).backward()
        assert all(
            torch.allclose(a, p.grad, atol=1e-7, rtol=1e-5)
            for a, p in zip(whole, model.parameters())
        )


def test_a_cache_changes_nothing(model):
    idx, targets = batch(2)
    expected = model(idx, targets)[0]
    with unless_exempt(model, 'cache'):
        cache, at = model.init_cache(2, T, dtype=torch.float64), 0
        for n in (5, 1, 1, 4, 1, 4):
            at += n
            assert torch.allclose(
                model(idx[:, at - n : at], cache=cache)[0][:, 0], expected[:, at - 1], atol=1e-9
            )


def test_flops(name):
    model = new(name)
    with unless_exempt(model, 'flops'):
        assert 0 < model.flops_per_token(T) and np.isfinite(model.estimate_mfu(1e3, 1e12))


def test_without_any_target_loss_and_gradients_are_zero(name):
    """A micro-batch of a masked dataset may have none."""
    model, (idx, targets) = new(name), batch()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    loss = model.train()(idx, torch.full_like(targets, -1))[1]
    assert loss.item() == 0 and model.eval()(idx, torch.full_like(targets, -1))[1].item() == 0
    if not model.fit:
        loss.backward()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    # statistics of batch norm
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())
