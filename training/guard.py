"""When to skip an update, and when a run has diverged.

An update is skipped where the loss or the gradient is NaN or infinite, and where the loss is a
spike: more than some standard deviations above the average, both over roughly the last MEMORY steps
(OLMo's rule, six of them over 128 steps; OLMo et al. 2024, arXiv 2501.00656). Whether a step is bad
is decided on the device, from its loss, which all processes share; the optimizer skips the update
there (`found_inf`), so nothing waits. The host learns of it one step later.

Skipping a spike spares the weights a bad batch. It cannot bring the loss down where the weights
themselves are the cause, since it freezes them, and where losses differ widely from batch to batch,
the high ones are what there is to learn. So at most MOST_SKIPS spikes are skipped, and one more for
every STEPS_PER_SKIP steps; other updates go through. A finite spike never ends a run.

A run has diverged in two cases:

- NOT_FINITE_IN_A_ROW losses or gradients in a row were NaN or infinite. The run goes back to its
  newest checkpoint and skips the data that led there, since the same data would lead there again
  (as PaLM's authors did by hand, Chowdhery et al. 2022, section 5.1). The second time, it ends.
- The validation loss and the average training loss both rise far above their lowest values and stay
  there (`divergence`). The run saves its state and ends. Overfitting raises only the validation
  loss, so it is not divergence.
"""

import math
from dataclasses import asdict, dataclass, fields

import torch

MEMORY = 128  # steps over which the loss is averaged
# Nats, the least standard deviation of the loss: near a loss of 0 the measured one vanishes, and
# any bump would be a spike.
FLOOR = 0.02
MOST_SKIPS = 3  # spikes that are skipped before updates go through again
STEPS_PER_SKIP = 32  # steps that allow for another skip, up to MOST_SKIPS
NOT_FINITE_IN_A_ROW = 5  # steps after which NaN and infinity mean that the weights are the cause
FAR = 1.0  # nats above the lowest loss: more than twice the perplexity
# While the lowest loss is above this share of the loss of guessing, nothing has been learned.
LEARNED = 0.9
# A run far above its lowest loss has diverged when the gap has not shrunk to RECOVERS of itself for
# PATIENCE evaluations and LEAST_STEPS steps.
RECOVERS = 0.98
PATIENCE = 5
LEAST_STEPS = 1000
LARGEST = torch.finfo(torch.float32).max
# Device types whose results are ready at once: there, Python numbers are ten times as fast as
# tensors.
READ_AT_ONCE = ('cpu',)
ADVICE = "lower the learning rate (--learning_rate, or --muon_lr and --embed_lr where they are set)"


@dataclass
class GuardState:
    """What the guard knows of the run; a checkpoint keeps it as a dict. Losses are in nats."""

    seen: int = 0  # steps
    skipped: int = 0  # updates
    allowance: float = float(MOST_SKIPS)  # spikes that may be skipped now; below 1: none
    not_finite: int = 0  # steps in a row with a NaN or infinity, up to the last step
    average: float = 0.0  # of the loss
    variance: float = 0.0  # of the loss
    lowest_average: float = math.inf  # lowest `average` at any evaluation
    lowest_val: float = math.inf  # lowest validation loss
    # The validation loss at the last recovery since it jumped far above lowest_val, the step of
    # that recovery, and the evaluations since then, its own included; inf: it has not jumped.
    low_since_jump: float = math.inf
    low_step: int = 0
    evals_since_low: int = 0


def is_sound(saved):
    """Whether a guard can continue from what a checkpoint `saved`: no field has a wrong type.

    Other versions may have saved other fields, or a list instead of a dict.
    """
    if not isinstance(saved, dict):
        return True
    return all(
        type(saved.get(field.name, field.default)) is field.type for field in fields(GuardState)
    )


def restored(saved):
    """The GuardState that a checkpoint `saved`; fields that it lacks have their defaults."""
    if not isinstance(saved, dict):
        return GuardState()
    names = {field.name for field in fields(GuardState)}
    return GuardState(**{name: value for name, value in saved.items() if name in names})


@dataclass
class SkippedUpdate:
    """An update that was skipped."""

    loss: float  # of its step
    reason: str


class Guard:
    """Decides which updates to skip, and whether the run has diverged.

    sigmas: standard deviations above the average from which a loss is a spike; 0: no loss is one.
    guessing: the loss of uniform guessing, ln V, in nats. state: `state()` of an earlier guard; a
    guard that continues from it decides the same, to the bit.
    """

    def __init__(self, sigmas, guessing, state=None):
        self.sigmas = sigmas
        self.guessing = guessing
        self.now = restored(state)
        self.read_pending = None  # a function that waits for the last step's [is_finite, loss]
        self.pending_limit = math.inf  # the loss above which the last step was a spike

    def state(self):
        """What a checkpoint saves, as a dict."""
        return asdict(self.now)

    @property
    def has_diverged(self):
        """Whether so many steps in a row had a NaN or infinity that the weights are the cause."""
        return self.now.not_finite >= NOT_FINITE_IN_A_ROW

    @property
    def last_was_finite(self):
        """Whether the last step had no NaN or infinity: the weights are good to save."""
        return self.now.not_finite == 0

    @torch.no_grad()
    def mark_if_bad(self, optimizer, scaler, loss, grad_norm=None):
        """Have `optimizer` skip the coming update if the step is bad.

        Call it before scaler.step(optimizer), and after `last_skipped`. loss, grad_norm:
        0-dimensional tensors on the device, the same in all processes.
        """
        self.pending_limit = self._spike_limit()
        limit = self.pending_limit
        if self.now.allowance < 1:
            limit = LARGEST
        if grad_norm is None or scaler.is_enabled():
            # With float16 gradients often overflow, and the scaler looks at them itself.
            grad_norm = loss

        # The loss is read from the device in last_skipped, one step later.
        if loss.device.type in READ_AT_ONCE:
            value = loss.item()
            is_finite = math.isfinite(value) and math.isfinite(grad_norm.item())
            is_bad = torch.tensor(float(not is_finite or value > limit))
            self.read_pending = lambda: (is_finite, value)
        else:
            finite = loss.isfinite() & grad_norm.isfinite()
            is_bad = (~finite | (loss > limit)).to(torch.float32)
            self.read_pending = _read_later(torch.stack([finite.to(loss.dtype), loss]))

        if scaler.is_enabled():
            for found in scaler._found_inf_per_device(optimizer).values():
                torch.maximum(found, is_bad, out=found)
        else:
            optimizer.found_inf = is_bad

    def last_skipped(self):
        """Count the last step; return its SkippedUpdate, or None if its update was made.

        Waits for the step's result. A second call for the same step changes nothing and returns
        None.
        """
        if self.read_pending is None:
            return None
        is_finite, loss = self.read_pending()
        self.read_pending = None
        now = self.now
        if loss == 0:  # a step without a single target, as masked data may have
            return None

        now.seen += 1
        may_skip = now.allowance >= 1
        now.allowance = min(float(MOST_SKIPS), now.allowance + 1 / STEPS_PER_SKIP)
        if math.isfinite(loss):
            self._average(min(loss, self.pending_limit))

        if not is_finite:
            now.not_finite += 1
            now.skipped += 1
            return SkippedUpdate(loss, "NaN or infinity in the loss or its gradient")
        now.not_finite = 0
        if loss > self.pending_limit and may_skip:
            now.allowance -= 1
            now.skipped += 1
            return SkippedUpdate(loss, f"loss spike, {self.pending_limit:.4f} is the limit")
        return None

    def evaluated(self, step, val_loss):
        """Record the validation loss at `step`; NaN or infinity is divergence at once."""
        now = self.now
        if not math.isfinite(val_loss):
            now.not_finite = NOT_FINITE_IN_A_ROW
            return
        gap = val_loss - now.lowest_val
        is_far_above = gap > FAR and now.average - now.lowest_average > FAR
        if now.lowest_val > LEARNED * self.guessing:
            # A rate that is high at first may hold the loss above that of guessing for most of a
            # run, which recovers as the rate decays.
            is_far_above = False

        now.lowest_val = min(val_loss, now.lowest_val)
        if now.seen:
            now.lowest_average = min(now.average, now.lowest_average)

        if not is_far_above:
            self._forget_jump()
        elif gap < RECOVERS * (now.low_since_jump - now.lowest_val):
            now.low_since_jump = val_loss  # it recovers
            now.low_step = step
            now.evals_since_low = 1
        else:
            now.evals_since_low += 1

    def divergence(self, step):
        """Describe the divergence if the losses stay far above the lowest, else return ''.

        Counting then starts again, so that a run that is resumed at a lower rate has time to
        recover.
        """
        now = self.now
        since_low = step - now.low_step
        if now.evals_since_low < PATIENCE or since_low < LEAST_STEPS:
            return ''
        problem = (
            f"the run diverged: for {since_low} steps the validation loss has stayed at about "
            f"{now.low_since_jump:.4f}, its lowest was {now.lowest_val:.4f}"
        )
        self._forget_jump()
        return problem

    def accept_state(self):
        """Count NaN and infinity from 0: whoever resumes from here has done something about
        them."""
        self.now.not_finite = 0

    def _forget_jump(self):
        self.now.low_since_jump = math.inf
        self.now.evals_since_low = 0

    def _spike_limit(self):
        if not self.sigmas or self.now.seen < MEMORY:
            return LARGEST
        return self.now.average + self.sigmas * max(math.sqrt(self.now.variance), FLOOR)

    def _average(self, loss):
        """Update average and variance with `loss`: plain ones first, moving ones from MEMORY
        steps on."""
        now = self.now
        weight = 1 / min(now.seen, MEMORY)
        above = loss - now.average
        now.average += weight * above
        now.variance += weight * ((1 - weight) * above * above - now.variance)


def all_finite(parameters):
    """Whether this process's shards of the parameters have neither NaN nor infinity."""
    for p in parameters:
        if hasattr(p, 'to_local'):  # sharded
            p = p.to_local()
        if not p.isfinite().all():
            return False
    return True


def _read_later(values):
    """A function that returns the tensor as a list, waiting for no more than its values.

    On CUDA they are copied to the host meanwhile, and the function waits for that copy alone.
    """
    if values.device.type != 'cuda':
        return values.tolist
    on_host = torch.empty(values.shape, pin_memory=True)
    on_host.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read():
        copied.synchronize()
        return on_host.tolist()

    return read


def skip_data(stored, progress, iter_num, out_dir):
    """The checkpoint `stored`, changed so that a run continues from it with later data.

    The run, whose Progress is `progress`, diverged before step iter_num; the data that led there
    are skipped. Raises ValueError if that has been tried before.
    """
    step = int(stored['iter_num'])
    earlier = stored.get('progress', {})
    was_rolled_back_here = earlier.get('rolled_back_to') == step
    got_no_further = iter_num <= earlier.get('diverged_at', -1)
    if was_rolled_back_here or got_no_further:
        raise ValueError(
            f"the run diverged again, before step {iter_num}: it had been rolled back from step "
            f"{earlier['diverged_at']} to {earlier['rolled_back_to']} already and had continued "
            f"with other data; {out_dir}/ckpt.pt has the state of step {step}: {ADVICE}"
        )
    changes = dict(
        data_offset=progress.data_offset + iter_num - step,
        diverged_at=iter_num,
        rolled_back_to=step,
    )
    return stored | dict(progress=earlier | changes)
