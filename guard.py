"""Updates that must not be made: of a loss or a gradient that is not a number, and of spikes of the loss.

Whether a step is bad is decided on the device, from its loss, which all processes share, and those of the steps before. The
optimizer leaves a bad step out there (`found_inf`): nothing waits. The host hears of it one step later. A bad batch costs
its own update, no more. Several bad steps in a row mean that the weights are the matter: then the run goes back to its
newest checkpoint, and on from there with other data, since the same would lead to the same (as PaLM's authors did by hand,
Chowdhery et al. 2022, section 5.1).

A spike is a loss more than some standard deviations above the average, both over roughly the last MEMORY steps (OLMo's
rule, six of them and 128 steps; OLMo et al. 2024, arXiv 2501.00656). A loss that stays at a new level is soon taken for
what it is: each skipped one widens the limit. What runs away faster than that, and what is not a number, ends in
`has_diverged`.
"""
import math

import torch

MEMORY, IN_A_ROW = 128, 5
LARGEST = torch.finfo(torch.float32).max
READ_AT_ONCE = 'cpu',      # devices on which nothing waits to be read: that is ten times as fast there


class Guard:
    """sigmas: how many standard deviations make a spike; 0: none do. state: of an earlier guard, `state()`, to go on from;
    what is decided then is the same to the bit."""

    def __init__(self, sigmas, state=None):
        self.sigmas, self.pending = sigmas, None
        self.seen, self.in_a_row, self.skipped, self.average, self.variance = state or (0, 0, 0, 0.0, 0.0)

    def state(self):
        """What a checkpoint keeps, as numbers."""
        return [self.seen, self.in_a_row, self.skipped, self.average, self.variance]

    @property
    def has_diverged(self):
        return self.in_a_row >= IN_A_ROW

    @torch.no_grad()
    def skip_if_bad(self, optimizer, scaler, loss, grad_norm=None):
        """Have `optimizer` leave the coming update out if the step is bad; before scaler.step(optimizer), after `heard`.

        loss, grad_norm: tensors without dimensions, on the device, the same in all processes. float16's scaler looks at the
        gradients itself, whose overflow is an everyday thing there.
        """
        limit = LARGEST
        if self.sigmas and self.seen >= MEMORY:
            limit = self.average + self.sigmas * math.sqrt(self.variance)
        grad_norm = loss if grad_norm is None or scaler.is_enabled() else grad_norm
        if loss.device.type in READ_AT_ONCE:
            value = loss.item()
            is_bad = not (value <= limit and math.isfinite(grad_norm.item()))
            bad, self.pending = torch.tensor(float(is_bad)), (lambda: (is_bad, value), limit)
        else:
            bad = (~((loss <= limit) & grad_norm.isfinite())).to(torch.float32)     # NaN is nowhere below
            self.pending = _on_its_way(torch.stack([bad, loss.to(torch.float32)])), limit
        if scaler.is_enabled():
            for found in scaler._found_inf_per_device(optimizer).values():
                torch.maximum(found, bad, out=found)
        else:
            optimizer.found_inf = bad

    def heard(self):
        """The loss of the step before if that was bad, else None; asked again, None. It may have to wait for that step."""
        if self.pending is None:
            return None
        (bad, loss), limit = self.pending[0](), self.pending[1]
        self.pending = None
        self.in_a_row, self.skipped = (self.in_a_row + 1, self.skipped + 1) if bad else (0, self.skipped)
        self.seen += 1
        if math.isfinite(loss):
            above, weight = min(loss, limit) - self.average, 1 / min(self.seen, MEMORY)     # a plain average at first
            self.average += weight * above
            self.variance += weight * ((1 - weight) * above * above - self.variance)
        return loss if bad else None

    def check(self, val_loss):
        """A validation loss that is not a number is enough to have diverged."""
        if not math.isfinite(val_loss):
            self.in_a_row = IN_A_ROW


def _on_its_way(values):
    """A function that waits for a tensor and returns it as a list; on CUDA it comes while the device works on."""
    if values.device.type != 'cuda':
        return values.tolist
    here = torch.empty(values.shape, pin_memory=True)
    here.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return lambda: event.synchronize() or here.tolist()


def other_data(stored, progress, iter_num):
    """The checkpoint `stored`, for a run that diverged before step iter_num to go back to: the data of the steps since are
    passed over. Raises ValueError where there is none, or that has been tried in vain.
    """
    advice = "take lower learning rates (--learning_rate, or --muon_lr and --embed_lr where they are set)"
    if not stored:
        raise ValueError(f"the run diverged before step {iter_num}, and has no checkpoint yet to go back to: {advice}")
    step, before = int(stored['iter_num']), stored.get('progress', {})
    if before.get('rolled_back_to', -1) == step or iter_num <= before.get('diverged_at', -1):
        raise ValueError(f"the run diverged before step {iter_num}, and had been rolled back from step "
                         f"{before['diverged_at']} to {before['rolled_back_to']} already, for other data; the checkpoint "
                         f"of step {step} is good: {advice}")
    offset = progress['data_offset'] + iter_num - step
    return stored | dict(progress=before | dict(data_offset=offset, diverged_at=iter_num, rolled_back_to=step))
