"""Bad steps are left out on the device, and nothing else is; what the guard decides is the same after a resume."""
import math

import pytest
import torch

import checkpoint
import guard
from guard import IN_A_ROW, MEMORY, Guard
from optimizer import build

SIGMAS = 6.0


@pytest.fixture(autouse=True, params=['cpu', 'gpu'])
def path(request, monkeypatch):
    """As on a CPU, whose numbers are at hand; and as on a GPU, where they are not."""
    if request.param == 'gpu':
        monkeypatch.setattr(guard, 'READ_AT_ONCE', ())


def made(lrs=None, name='adamw', scaler=None):
    torch.manual_seed(0)
    weight, vector = (torch.nn.Parameter(torch.randn(*size)) for size in ((4, 4), (4,)))
    optimizer = build(dict(matrix=[weight], vector=[vector]), 0.1, 0.1, (0.9, 0.95), 'cpu', lrs, name=name)
    return optimizer, scaler or torch.amp.GradScaler('cpu', enabled=False), [weight, vector]


def step(watch, optimizer, scaler, params, loss, gradient=1.0, grad_norm=None):
    """One step as train.py does it; returns the bad loss that it hears of, or None."""
    for p in params:
        p.grad = torch.full_like(p, gradient)
    scaler.scale(torch.zeros(()))       # which makes an enabled scaler ready
    scaler.unscale_(optimizer)
    watch.skip_if_bad(optimizer, scaler, torch.tensor(float(loss)), grad_norm)
    scaler.step(optimizer)
    scaler.update()
    return watch.heard()


def everything(optimizer, params):
    return [p.detach().clone() for p in params] + [
        value.clone() for state in optimizer.state.values() for key, value in state.items()
        if not ('momentum_buffer' in state and key == 'step')]      # Muon's warm-up goes by steps, made or not


@pytest.mark.parametrize('lrs, name', [(None, 'adamw'), (None, 'sgd'), (dict(matrix=0.02), 'adamw')])
@pytest.mark.parametrize('loss, gradient, grad_norm', [
    (math.nan, math.nan, None), (math.inf, 1.0, None),
    (2.0, math.nan, torch.tensor(math.nan)), (2.0, 1.0, torch.tensor(math.inf))])
def test_a_bad_step_changes_nothing(lrs, name, loss, gradient, grad_norm):
    optimizer, scaler, params = made(lrs, name)
    watch = Guard(SIGMAS)
    assert step(watch, optimizer, scaler, params, 2.0) is None
    before = everything(optimizer, params)
    assert step(watch, optimizer, scaler, params, loss, gradient, grad_norm) == pytest.approx(loss, nan_ok=True)
    assert all(map(torch.equal, before, everything(optimizer, params)))
    assert step(watch, optimizer, scaler, params, 2.0) is None and watch.skipped == 1 and watch.in_a_row == 0
    assert not torch.equal(before[0], params[0])


def test_without_the_guard_the_weights_are_lost():
    """The check above fails where the flag does not reach the optimizer."""
    optimizer, scaler, params = made()
    watch = Guard(SIGMAS)
    watch.skip_if_bad(optimizer, scaler, torch.tensor(math.nan))
    del optimizer.found_inf
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert params[0].isnan().all()


def test_float16_is_skipped_through_its_scaler():
    scaler = torch.amp.GradScaler('cpu', init_scale=4.0)
    optimizer, scaler, params = made(scaler=scaler)
    watch = Guard(SIGMAS)
    step(watch, optimizer, scaler, params, 2.0)
    before = everything(optimizer, params)
    assert math.isnan(step(watch, optimizer, scaler, params, math.nan))        # with gradients that are fine
    assert all(map(torch.equal, before, everything(optimizer, params)))
    # an overflow of its gradients is the scaler's business, and no alarm
    assert step(watch, optimizer, scaler, params, 2.0, math.inf, torch.tensor(math.inf)) is None
    assert all(map(torch.equal, before, everything(optimizer, params)))


def losses(n, sigma=0.1, seed=0):
    return (3 + sigma * torch.randn(n, generator=torch.Generator().manual_seed(seed))).tolist()


def judged(watch, values):
    """The bad ones among the losses, as {index: loss}."""
    made_ = made()
    return {i: bad for i, loss in enumerate(values) if (bad := step(watch, *made_, loss)) is not None}


def test_a_spike_is_more_than_noise():
    watch = Guard(SIGMAS)
    assert judged(watch, losses(MEMORY) + losses(400, seed=1)) == {}
    assert judged(watch, [3 + 0.1 * (SIGMAS - 2)]) == {}
    assert list(judged(watch, [3 + 0.1 * (SIGMAS + 2)])) == [0]
    assert judged(Guard(0.0, watch.state()), [100.0, math.inf]).keys() == {1}   # without sigmas


def test_a_loss_that_falls_or_wanders_is_no_spike():
    falling = [3 + 4 * math.exp(-i / 60) + noise for i, noise in enumerate(losses(1000, 0.05))]
    assert judged(Guard(SIGMAS), falling) == {}


def test_a_new_level_is_accepted_and_a_runaway_is_not():
    watch = Guard(SIGMAS)
    judged(watch, losses(400))
    assert 0 < len(judged(watch, [value + 0.8 for value in losses(60)])) < IN_A_ROW and not watch.has_diverged
    judged(watch, [10.0 ** i for i in range(1, 10)])
    assert watch.has_diverged


def test_a_guard_goes_on_from_its_state():
    one, values = Guard(SIGMAS), [*losses(300), 9.0, math.nan]
    judged(one, values[:200])
    two = Guard(SIGMAS, one.state())
    assert judged(one, values[200:]).keys() == judged(two, values[200:]).keys() == {100, 101}
    assert one.state() == two.state() != Guard(SIGMAS).state()


@pytest.mark.parametrize('stored, at, message', [
    (None, 7, 'no checkpoint yet'),
    (dict(iter_num=5, progress=dict(rolled_back_to=5, diverged_at=7)), 9, 'had been rolled back from step 7 to 5'),
    (dict(iter_num=6, progress=dict(rolled_back_to=5, diverged_at=7)), 7, 'had been rolled back from step 7 to 5'),
])
def test_where_other_data_cannot_help(stored, at, message):
    with pytest.raises(ValueError, match=message):
        guard.other_data(stored, dict(data_offset=0), at)


def test_other_data_are_those_behind_the_divergence():
    before = guard.other_data(dict(iter_num=10, progress=dict(evaluated=10)), dict(data_offset=3), 17)
    assert before['progress'] == dict(evaluated=10, data_offset=10, diverged_at=17, rolled_back_to=10)
    again = guard.other_data(dict(iter_num=15, progress=before['progress']), before['progress'], 18)
    assert again['progress']['data_offset'] == 13


@pytest.mark.parametrize('lrs, name', [(None, 'adamw'), (None, 'sgd')])
def test_a_kernel_that_does_not_look_at_the_flag_is_not_called(lrs, name, monkeypatch):
    """As torch's for MPS: the flag is read in front of it."""
    import optimizer as optimizers
    optimizer, _, params = made(lrs, name)
    monkeypatch.setattr(optimizers, '_is_forbidden', lambda own, *kinds: 'mps' in kinds and own.found_inf.item())
    before = [p.detach().clone() for p in params]
    for flag in (1.0, 0.0):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.found_inf = torch.tensor(flag)
        optimizer.step()
        assert all(map(torch.equal, before, params)) == bool(flag)


@pytest.mark.parametrize('change, is_kept', [({}, True), ({'max_iters': 9}, True), ({'dataset': 'another'}, False),
                                             ({'batch_size': 2}, False)])
def test_other_data_begin_a_new_average(trained, change, is_kept):
    """Else a run that goes on with harder text would be taken for one that diverges."""
    state = checkpoint.read(trained / 'ckpt.pt')
    checkpoint.adopt_run(state['config'] | change, dict.fromkeys(change, 'command line'), state, 'out')
    assert (state['progress'].get('guard') is not None) == is_kept
