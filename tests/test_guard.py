"""Bad steps are skipped on the device, and nothing else is; a finite spike never ends a run; what
the guard decides is the same after a resume."""

import math

import pytest
import torch

from training import checkpoint, guard, resume
from training.checkpoint import Progress
from training.guard import (
    FAR,
    FLOOR,
    LEAST_STEPS,
    MEMORY,
    MOST_SKIPS,
    NOT_FINITE_IN_A_ROW,
    PATIENCE,
    STEPS_PER_SKIP,
    Guard,
)
from training.optimizer import build_optimizer

SIGMAS = 6.0
GUESSING = 4.2  # nats


@pytest.fixture(autouse=True, params=['cpu', 'gpu'])
def path(request, monkeypatch):
    """As on a CPU, whose numbers are at hand; and as on a GPU, where they are not."""
    if request.param == 'gpu':
        monkeypatch.setattr(guard, 'READ_AT_ONCE', ())


def made(lrs=None, name='adamw', scaler=None):
    torch.manual_seed(0)
    weight, vector = (torch.nn.Parameter(torch.randn(*size)) for size in ((4, 4), (4,)))
    optimizer = build_optimizer(
        dict(matrix=[weight], vector=[vector]), 0.1, 0.1, (0.9, 0.95), 'cpu', lrs, name=name
    )
    return optimizer, scaler or torch.amp.GradScaler('cpu', enabled=False), [weight, vector]


def step(watch, optimizer, scaler, params, loss, gradient=1.0, grad_norm=None):
    """One step as train.py does it; returns the loss of a step whose update was skipped, or
    None."""
    for p in params:
        p.grad = torch.full_like(p, gradient)
    scaler.scale(torch.zeros(()))  # which makes an enabled scaler ready
    scaler.unscale_(optimizer)
    watch.mark_if_bad(optimizer, scaler, torch.tensor(float(loss)), grad_norm)
    scaler.step(optimizer)
    scaler.update()
    skipped = watch.last_skipped()
    return None if skipped is None else skipped.loss


def everything(optimizer, params):
    return [p.detach().clone() for p in params] + [
        value.clone()
        for state in optimizer.state.values()
        for key, value in state.items()
        # Muon's warm-up goes by steps, made or not
        if not ('momentum_buffer' in state and key == 'step')
    ]


@pytest.mark.parametrize(
    'lrs, name', [(None, 'adamw'), (None, 'sgd'), (dict(matrix=0.02), 'adamw')]
)
@pytest.mark.parametrize(
    'loss, gradient, grad_norm',
    [
        (math.nan, math.nan, None),
        (math.inf, 1.0, None),
        (2.0, math.nan, torch.tensor(math.nan)),
        (2.0, 1.0, torch.tensor(math.inf)),
    ],
)
def test_a_bad_step_changes_nothing(lrs, name, loss, gradient, grad_norm):
    optimizer, scaler, params = made(lrs, name)
    watch = Guard(SIGMAS, GUESSING)
    assert step(watch, optimizer, scaler, params, 2.0) is None
    before = everything(optimizer, params)
    assert step(watch, optimizer, scaler, params, loss, gradient, grad_norm) == pytest.approx(
        loss, nan_ok=True
    )
    assert all(map(torch.equal, before, everything(optimizer, params)))
    assert step(watch, optimizer, scaler, params, 2.0) is None
    assert watch.now.skipped == 1
    assert watch.last_was_finite
    assert not torch.equal(before[0], params[0])


def test_without_the_guard_the_weights_are_lost():
    """The check above fails where the flag does not reach the optimizer."""
    optimizer, scaler, params = made()
    watch = Guard(SIGMAS, GUESSING)
    watch.mark_if_bad(optimizer, scaler, torch.tensor(math.nan))
    del optimizer.found_inf
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert params[0].isnan().all()


def test_float16_is_skipped_through_its_scaler():
    scaler = torch.amp.GradScaler('cpu', init_scale=4.0)
    optimizer, scaler, params = made(scaler=scaler)
    watch = Guard(SIGMAS, GUESSING)
    step(watch, optimizer, scaler, params, 2.0)
    before = everything(optimizer, params)
    # with gradients that are fine
    assert math.isnan(step(watch, optimizer, scaler, params, math.nan))
    assert all(map(torch.equal, before, everything(optimizer, params)))
    # an overflow of its gradients is the scaler's business, and no alarm
    assert step(watch, optimizer, scaler, params, 2.0, math.inf, torch.tensor(math.inf)) is None
    assert all(map(torch.equal, before, everything(optimizer, params)))


def losses(n, sigma=0.1, seed=0):
    return (3 + sigma * torch.randn(n, generator=torch.Generator().manual_seed(seed))).tolist()


def judged(watch, values):
    """The bad ones among the losses, as {index: loss}."""
    made_ = made()
    return {
        i: bad for i, loss in enumerate(values) if (bad := step(watch, *made_, loss)) is not None
    }


def test_a_spike_is_more_than_noise():
    watch = Guard(SIGMAS, GUESSING)
    assert judged(watch, losses(MEMORY) + losses(400, seed=1)) == {}
    assert judged(watch, [3 + 0.1 * (SIGMAS - 2)]) == {}
    assert list(judged(watch, [3 + 0.1 * (SIGMAS + 2)])) == [0]
    # without sigmas
    assert judged(Guard(0.0, GUESSING, watch.state()), [100.0, math.inf]).keys() == {1}


def test_a_loss_that_falls_or_wanders_is_no_spike():
    falling = [3 + 4 * math.exp(-i / 60) + noise for i, noise in enumerate(losses(1000, 0.05))]
    assert judged(Guard(SIGMAS, GUESSING), falling) == {}


def test_near_a_loss_of_zero_a_bump_is_no_spike():
    """The measured deviation vanishes there; the floor does not."""
    watch = Guard(SIGMAS, GUESSING)
    assert judged(watch, [1e-5] * 300) == {}
    assert judged(watch, [0.9 * SIGMAS * FLOOR]) == {}
    assert list(judged(watch, [3.0])) == [0]


def test_a_jump_is_skipped_a_few_times_and_then_let_through():
    """Skipping freezes the weights; where they are the cause, the next losses are as high."""
    watch = Guard(SIGMAS, GUESSING)
    judged(watch, losses(400))
    jump = judged(watch, [9.0] * 20)
    assert list(jump) == [*range(MOST_SKIPS)]
    assert not watch.has_diverged and watch.last_was_finite
    assert judged(watch, losses(400, seed=1)) == {}  # it is back
    assert list(judged(watch, [90.0])) == [0]  # and the guard still watches


@pytest.mark.parametrize(
    'values',
    [
        [10.0**i for i in range(1, 30)] * 4,
        [3.0, 30.0] * 64,
        [0.0, 1e-6, 1e-6, 3.0] * 32,
        [1e-6] * 200 + [4.0, 2.0, 1.0, 0.5] * 20,
    ],
    ids=['a runaway', 'every second one', 'few targets', 'bumps while memorising'],
)
def test_finite_losses_never_count_as_divergence_and_few_are_skipped(values):
    """Where losses differ widely, the high ones are what there is to learn."""
    watch = Guard(SIGMAS, GUESSING)
    judged(watch, losses(200))
    skipped = judged(watch, values)
    assert not watch.has_diverged
    assert len(skipped) <= MOST_SKIPS + len(values) / STEPS_PER_SKIP


def test_steps_without_targets_are_not_counted():
    """Their loss is exactly 0; in the average they would make a spike of each step with a
    target."""
    watch = Guard(SIGMAS, GUESSING)
    values = losses(300)
    assert judged(watch, values) == {}
    before = watch.state()
    assert judged(watch, [0.0] * 300) == {}
    assert watch.state() == before


def test_losses_that_stay_nan_count_as_divergence():
    watch = Guard(SIGMAS, GUESSING)
    judged(watch, losses(200))
    judged(watch, [math.nan] * (NOT_FINITE_IN_A_ROW - 1))
    assert not watch.has_diverged and not watch.last_was_finite
    judged(watch, [math.inf])
    assert watch.has_diverged


def ends_at(watch, pairs, every=500):
    """The step at which the run ends, or None.

    pairs: [(average loss, validation loss)], in nats, one per evaluation; every: steps between
    them.
    """
    for i, (average, val) in enumerate(pairs):
        watch.now.seen = i * every
        watch.now.average = average
        watch.evaluated(i * every, val)
        if problem := watch.divergence(i * every):
            assert 'the run diverged: for ' in problem
            return i * every
    return None


GOOD = [(4.0, 4.0), (3.0, 3.1), (2.5, 2.7)]
HIGH = 2.7 + FAR + 1


@pytest.mark.parametrize(
    'pairs, every, is_over',
    [
        (GOOD + [(HIGH, HIGH)] * PATIENCE, 500, True),
        (GOOD + [(HIGH, HIGH)] * (PATIENCE - 1), 500, False),
        (GOOD + [(HIGH, HIGH)] * 9, LEAST_STEPS // 10, False),
        (GOOD + [(HIGH - 0.02 * i, HIGH - 0.02 * i) for i in range(50)], 500, False),
        (GOOD + [(2.5 / (1 + i), 2.7 + i) for i in range(50)], 500, False),
        (GOOD + [(0.01, HIGH)] * 50, 500, False),
        (GOOD + [(2.7 + FAR, 2.7 + FAR)] * 50, 500, False),
        ([(4.0, 4.0)] * 50, 500, False),
        ([(4.1, 4.2)] + [(9.0, 9.0)] * 50, 500, False),
        ([(4.1, 4.2), (3.9, 3.9)] + [(9.0, 9.0)] * 50, 500, False),
        ([(0.0, 2.0), (2.0, 2.0)] + [(9.0, 9.0)] * 50, 500, True),
    ],
    ids=[
        'it stays there',
        'not for long',
        'not for many steps',
        'it recovers',
        'it overfits',
        'it memorises by position',
        'it is not far',
        'it never learns',
        'it was never better',
        'it was hardly better',
        'a trained model',
    ],
)
def test_only_losses_that_stay_far_above_the_lowest_end_a_run(pairs, every, is_over):
    assert (ends_at(Guard(SIGMAS, GUESSING), pairs, every) is not None) == is_over


def test_a_small_vocabulary_can_diverge_too():
    watch = Guard(SIGMAS, math.log(4))
    assert ends_at(watch, [(1.3, 1.38), (1.1, 1.1)] + [(9.0, 9.0)] * 9)


def test_a_run_that_is_resumed_after_it_stayed_high_has_time_to_recover():
    one = Guard(SIGMAS, GUESSING)
    assert ends_at(one, GOOD + [(HIGH, HIGH)] * 9)
    two = Guard(SIGMAS, GUESSING, one.state())
    assert ends_at(two, [(HIGH, HIGH)] * (PATIENCE - 1)) is None


@pytest.mark.parametrize(
    'values', [[9.0, 9.0], [math.nan] * 3], ids=['after two spikes', 'after three NaN']
)
def test_a_guard_that_is_resumed_in_trouble_decides_the_same(values):
    one = Guard(SIGMAS, GUESSING)
    judged(one, losses(200) + values)
    two = Guard(SIGMAS, GUESSING, one.state())
    after = [9.0, 9.0, 9.0, math.nan, math.nan]
    assert judged(one, after).keys() == judged(two, after).keys()
    assert one.state() == two.state()
    assert one.has_diverged == two.has_diverged
    assert Guard(SIGMAS, GUESSING).state() != one.state()


def test_states_of_other_versions_begin_anew():
    assert guard.is_sound(None) and guard.is_sound([3, 0, 0, 0.5, 0.1])
    assert Guard(SIGMAS, GUESSING, [3, 0, 0, 0.5, 0.1]).state() == Guard(SIGMAS, GUESSING).state()
    some = {'seen': 3, 'average': 0.5, 'a field of tomorrow': 'x'}
    assert guard.is_sound(some)
    assert Guard(SIGMAS, GUESSING, some).now == guard.GuardState(seen=3, average=0.5)
    assert not guard.is_sound({'seen': '3'})


def test_a_validation_loss_of_nan_is_divergence():
    watch = Guard(SIGMAS, GUESSING)
    watch.evaluated(100, math.nan)
    assert watch.has_diverged


def test_weights_are_finite_or_not():
    weights = [torch.ones(2), torch.tensor([1.0, 2.0])]
    assert guard.all_finite(weights)
    assert not guard.all_finite([*weights, torch.tensor([math.nan])])
    assert not guard.all_finite([*weights, torch.tensor([-math.inf])])


def test_a_guard_goes_on_from_its_state():
    one, values = Guard(SIGMAS, GUESSING), [*losses(300), 9.0, math.nan]
    judged(one, values[:200])
    one.evaluated(200, 3.0)
    assert one.now.lowest_val == 3.0
    two = Guard(SIGMAS, GUESSING, one.state())
    assert judged(one, values[200:]).keys() == judged(two, values[200:]).keys() == {100, 101}
    assert one.state() == two.state()
    assert one.state() != Guard(SIGMAS, GUESSING).state()


@pytest.mark.parametrize(
    'stored, at',
    [
        (dict(iter_num=5, progress=dict(rolled_back_to=5, diverged_at=7)), 9),
        (dict(iter_num=6, progress=dict(rolled_back_to=5, diverged_at=7)), 7),
    ],
)
def test_the_second_time_other_data_cannot_help(stored, at):
    with pytest.raises(ValueError, match='had been rolled back from step 7 to 5'):
        guard.skip_data(stored, Progress(), at, 'out')


def test_the_data_that_led_to_a_divergence_are_skipped():
    before = guard.skip_data(
        dict(iter_num=10, progress=dict(evaluated=10)), Progress(data_offset=3), 17, 'out'
    )
    assert before['progress'] == dict(
        evaluated=10, data_offset=10, diverged_at=17, rolled_back_to=10
    )
    again = guard.skip_data(
        dict(iter_num=15, progress=before['progress']), Progress(**before['progress']), 18, 'out'
    )
    assert again['progress']['data_offset'] == 13


@pytest.mark.parametrize('lrs, name', [(None, 'adamw'), (None, 'sgd')])
def test_a_kernel_that_does_not_look_at_the_flag_is_not_called(lrs, name, monkeypatch):
    """As torch's for MPS: the flag is read in front of it."""
    from training import optimizer as optimizers

    optimizer, _, params = made(lrs, name)
    monkeypatch.setattr(
        optimizers, '_must_skip', lambda own, *kinds: 'mps' in kinds and own.found_inf.item()
    )
    before = [p.detach().clone() for p in params]
    for flag in (1.0, 0.0):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.found_inf = torch.tensor(flag)
        optimizer.step()
        assert all(map(torch.equal, before, params)) == bool(flag)


@pytest.mark.parametrize(
    'change, is_kept',
    [
        ({}, True),
        ({'max_iters': 9}, True),
        ({'dataset': 'another'}, False),
        ({'batch_size': 2}, False),
    ],
)
def test_other_data_begin_a_new_average(trained, change, is_kept):
    """Else a run that goes on with harder text would be taken for one that diverges."""
    state = checkpoint.read(trained / 'ckpt.pt')
    resume.adopt_run_settings(
        state['config'] | change, dict.fromkeys(change, 'command line'), state, 'out'
    )
    assert (state['progress'].get('guard') is not None) == is_kept
