"""When to skip an update, and when a run has diverged.

An update is skipped where the loss or the gradient is NaN or infinite, and where the loss is a spike:
more than some standard deviations above the average, both over roughly the last MEMORY steps (OLMo's
rule, six of them over 128 steps; OLMo et al. 2024, arXiv 2501.00656). Whether a step is bad is decided
on the device, from its loss, which all processes share; the optimizer skips the update there
(`found_inf`), so nothing waits. The host learns of it one step later.

Skipping a spike spares the weights a bad batch. It cannot bring the loss down where the weights
themselves are the cause: skipping freezes them. So a spike is skipped at most SPIKES_IN_A_ROW times;
then updates go through again until the loss is back. A finite spike never ends a run.

A run has diverged in two cases:
- NOT_FINITE_IN_A_ROW losses or gradients in a row were NaN or infinite. The run goes back to its newest
  checkpoint and skips the data that led there, since the same data would lead there again (as PaLM's
  authors did by hand, Chowdhery et al. 2022, section 5.1). The second time, it ends.
- The validation loss and the average training loss both rose far above their lowest, and stay there
  (`check_far_above`). The run ends, after its last state was saved. Overfitting raises the first of
  them alone, and is not divergence.
"""
import math
from dataclasses import asdict, dataclass, fields

import torch

MEMORY = 128                # steps over which the loss is averaged
FLOOR = 0.02                # nats, least standard deviation of the loss: near a loss of 0 the measured
                            # one vanishes, and any bump would be a spike
SPIKES_IN_A_ROW = 3         # spikes that are skipped before updates go through again
NOT_FINITE_IN_A_ROW = 5     # steps after which NaN and infinity mean that the weights are the cause
FAR = 1.0                   # nats above the lowest loss: more than twice the perplexity
RECOVERS = 0.98             # a run far above its lowest loss recovers while the gap shrinks to this share
PATIENCE = 5                # in fewer than so many evaluations
LEAST_STEPS = 1000          # or steps; if it does not, it has diverged
LARGEST = torch.finfo(torch.float32).max
READ_AT_ONCE = ('cpu',)     # devices whose results can be read without waiting: ten times as fast there
ADVICE = "lower the learning rate (--learning_rate, or --muon_lr and --embed_lr where they are set)"


@dataclass
class GuardState:
    """What the guard knows of the run. A checkpoint keeps it, as a dict of numbers."""

    seen: int = 0                       # steps
    skipped: int = 0                    # updates
    spikes: int = 0                     # in a row, up to the last step
    not_finite: int = 0                 # steps in a row with a NaN or infinity, up to the last step
    average: float = 0.0                # of the loss, in nats
    variance: float = 0.0               # of the loss
    lowest_average: float = math.inf    # at all evaluations, in nats
    lowest_val: float = math.inf        # validation loss, in nats
    low_since_jump: float = math.inf    # the lowest validation loss while it is far above lowest_val
    low_step: int = 0                   # where that was
    evals_since_low: int = 0            # evaluations from there on, that one included


def is_state(value):
    """Whether `value` is what `Guard.state` returns."""
    kinds = {field.name: field.type for field in fields(GuardState)}
    if not isinstance(value, dict) or value.keys() != kinds.keys():
        return False
    return all(type(value[name]) is kind for name, kind in kinds.items())


@dataclass
class SkippedUpdate:
    """An update that was skipped: the loss of its step, and why."""

    loss: float
    reason: str


class Guard:
    """sigmas: standard deviations that make a spike; 0: nothing is a spike. guessing: the loss of a
    model that guesses among all ids, ln V, in nats.

    state: `state()` of an earlier guard; a guard that continues from it decides the same, to the bit.
    """

    def __init__(self, sigmas, guessing, state=None):
        self.sigmas = sigmas
        self.guessing = guessing
        self.now = GuardState(**(state or {}))
        self.read_pending = None        # a function that waits for the last step's [is_finite, loss]
        self.pending_limit = math.inf   # the loss above which the last step was a spike

    def state(self):
        """What a checkpoint keeps."""
        return asdict(self.now)

    @property
    def has_diverged(self):
        """Whether NaN or infinity came so often in a row that the weights must be the cause."""
        return self.now.not_finite >= NOT_FINITE_IN_A_ROW

    @property
    def last_was_finite(self):
        """Whether the last step had no NaN or infinity: the weights are good to save."""
        return self.now.not_finite == 0

    @torch.no_grad()
    def skip_if_bad(self, optimizer, scaler, loss, grad_norm=None):
        """Have `optimizer` skip the coming update if the step is bad.

        Call it before scaler.step(optimizer), and after `last_skipped`. loss, grad_norm: 0-dimensional
        tensors on the device, the same in all processes. With float16 the scaler looks at the gradients
        itself, since they often overflow there.
        """
        self.pending_limit = self._spike_limit()
        limit = self.pending_limit
        if self.now.spikes >= SPIKES_IN_A_ROW:
            limit = LARGEST
        if grad_norm is None or scaler.is_enabled():
            grad_norm = loss
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
        """The SkippedUpdate of the last step, or None; asked again, None. May wait for that step."""
        if self.read_pending is None:
            return None
        is_finite, loss = self.read_pending()
        self.read_pending = None
        now = self.now
        now.seen += 1
        is_spike = is_finite and loss > self.pending_limit
        is_skipped = not is_finite or (is_spike and now.spikes < SPIKES_IN_A_ROW)
        now.not_finite = 0 if is_finite else now.not_finite + 1
        now.spikes = now.spikes + 1 if is_spike else 0
        if math.isfinite(loss):
            self._average(min(loss, self.pending_limit))
        if not is_skipped:
            return None
        now.skipped += 1
        if not is_finite:
            return SkippedUpdate(loss, "NaN or infinity in the loss or its gradient")
        return SkippedUpdate(loss, f"loss spike, {self.pending_limit:.4f} is the limit")

    def evaluated(self, step, val_loss):
        """Note the validation loss at `step`. NaN or infinity count as divergence at once."""
        now = self.now
        if not math.isfinite(val_loss):
            now.not_finite = NOT_FINITE_IN_A_ROW
            return
        gap = val_loss - now.lowest_val
        is_far_above = gap > FAR and now.average - now.lowest_average > FAR
        if now.lowest_val > self.guessing - FAR:
            # Nothing was learned yet. A rate that is high at first may hold the loss above that of
            # guessing for most of a run, which recovers as the rate decays.
            is_far_above = False
        now.lowest_val = min(val_loss, now.lowest_val)
        if now.seen:
            now.lowest_average = min(now.average, now.lowest_average)
        if not is_far_above:
            now.low_since_jump = math.inf
            now.evals_since_low = 0
        elif gap < RECOVERS * (now.low_since_jump - now.lowest_val):
            now.low_since_jump = val_loss       # it recovers
            now.low_step = step
            now.evals_since_low = 1
        else:
            now.evals_since_low += 1

    def check_far_above(self, step, out_dir):
        """Raise ValueError if the losses stay far above the lowest. Call it once all is saved."""
        now = self.now
        if now.evals_since_low < PATIENCE or step - now.low_step < LEAST_STEPS:
            return
        raise ValueError(
            f"the run diverged: for {step - now.low_step} steps the validation loss has stayed at "
            f"about {now.low_since_jump:.4f}, its lowest was {now.lowest_val:.4f}; {out_dir}/ckpt.pt has the "
            f"state of step {step}, best.pt (if there is one) the best weights: {ADVICE}")

    def _spike_limit(self):
        if not self.sigmas or self.now.seen < MEMORY:
            return LARGEST
        return self.now.average + self.sigmas * max(math.sqrt(self.now.variance), FLOOR)

    def _average(self, loss):
        """Move average and variance towards `loss`: a plain average first, later a moving one."""
        now = self.now
        weight = 1 / min(now.seen, MEMORY)
        above = loss - now.average
        now.average += weight * above
        now.variance += weight * ((1 - weight) * above * above - now.variance)


def all_finite(parameters):
    """Whether this process's part of the parameters has neither NaN nor infinity."""
    for p in parameters:
        if hasattr(p, 'to_local'):      # sharded
            p = p.to_local()
        if not p.isfinite().all():
            return False
    return True


def _read_later(values):
    """A function that returns the tensor as a list; on CUDA it waits only for the copy to the host."""
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
    """The checkpoint `stored`, changed so that a run that diverged before step iter_num continues from
    it past the data that led there. Raises ValueError if that has been tried before.
    """
    step = int(stored['iter_num'])
    earlier = stored.get('progress', {})
    is_second = earlier.get('rolled_back_to', -1) == step or iter_num <= earlier.get('diverged_at', -1)
    if is_second:
        raise ValueError(
            f"the run diverged before step {iter_num}, and had been rolled back from step "
            f"{earlier['diverged_at']} to {earlier['rolled_back_to']} already, to other data; "
            f"{out_dir}/ckpt.pt has the state of step {step}: {ADVICE}")
    offset = progress['data_offset'] + iter_num - step
    changes = dict(data_offset=offset, diverged_at=iter_num, rolled_back_to=step)
    return stored | dict(progress=earlier | changes)
