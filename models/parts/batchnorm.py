"""Batch normalisation of tokens in its kinds: where the statistics come from, in training and in
use."""

import torch
from torch import nn


class NoNorm(nn.Module):
    """In the place of a BatchNorm: nothing."""

    def __init__(self, C):
        super().__init__()

    def forward(self, x, valid=None):
        return x


class BatchNorm(nn.Module):
    """Each channel of x (B, T, C) with mean 0 and variance 1 over batch and time, times a gain,
    plus a bias (arXiv 1502.03167). valid (B, T): which places count in the statistics; absent: all.

    In training the statistics are the mini-batch's, padding left out, so positions learn of each
    other there; otherwise they are stored ones: here, moving averages. Of several processes each
    has its own mini-batch's, and what the first one has stored is kept: as many others would differ
    a little.
    """

    def __init__(self, C):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.bias = nn.Parameter(torch.zeros(C))
        self.register_buffer('mean', torch.zeros(C))
        self.register_buffer('var', torch.ones(C))
        self.register_buffer('is_measured', torch.tensor(False))

    def forward(self, x, valid=None):
        high = x.to(torch.promote_types(x.dtype, torch.float32))
        mean, var = self.in_training(high, valid) if self.training else self.in_use(high, valid)
        return torch.addcmul(self.bias, high - mean, self.weight * (var + 1e-5).rsqrt()).type_as(x)

    def in_training(self, x, valid):
        mean, var, n = moments(x, valid)
        with torch.no_grad():
            rate = 0.1 * n.clamp(max=1)  # nothing is learned where all is padding
            self.mean.lerp_(mean, rate)
            self.var.lerp_(var * n / (n - 1).clamp(min=1), rate)
        return mean, var

    def in_use(self, x, valid):
        return self.mean, self.var


class PreciseBatchNorm(BatchNorm):
    """BatchNorm whose stored statistics are those of many examples with the weights as they are
    (PreciseBN, arXiv 2105.07576): `measure_statistics` has to be called after the weights have
    changed."""

    parts = None  # while measuring: (mean, var, n) of each mini-batch

    def in_training(self, x, valid):
        mean, var, n = moments(x, valid)
        if self.parts is not None:
            self.parts.append((mean, var, n))
        return mean, var

    def is_due(self):
        return True

    def store(self):
        # (batches, C) twice, (batches,)
        mean, var, n = (torch.stack(values) for values in zip(*self.parts))
        share = (n / n.sum().clamp(min=1))[:, None]
        self.mean.copy_((share * mean).sum(0))
        # E[x²] - E[x]², without cancellation
        self.var.copy_((share * (var + (mean - self.mean) ** 2)).sum(0))
        self.is_measured.fill_(True)
        self.parts = None


class FrozenBatchNorm(PreciseBatchNorm):
    """BatchNorm whose statistics are measured once, by `measure_statistics` or else of the first
    mini-batch; from then on they hold in training too, where gain and bias still learn."""

    def in_training(self, x, valid):
        mean, var, n = moments(x.detach(), valid)
        if self.parts is not None:
            self.parts.append((mean, var, n))
            return mean, var
        is_known = self.is_measured | (n == 0)
        self.mean.copy_(torch.where(is_known, self.mean, mean))
        self.var.copy_(torch.where(is_known, self.var, var))
        self.is_measured.logical_or_(n > 0)
        # the next micro-batch may write before this one's backward pass
        return self.mean.clone(), self.var.clone()

    def is_due(self):
        return not self.is_measured


class MiniBatchNorm(BatchNorm):
    """BatchNorm by the statistics of what it is given, in use too: the answer to one text depends
    on the others."""

    def in_training(self, x, valid):
        return moments(x, valid)[:2]

    in_use = in_training


BATCH_NORMS = {
    '': NoNorm,
    'ema': BatchNorm,
    'precise': PreciseBatchNorm,
    'frozen': FrozenBatchNorm,
    'batch': MiniBatchNorm,
}
# exemptions of models with them
IN_TRAINING = {'accumulation': "each micro-batch is normalised by its own statistics"}
ONE_BATCH = IN_TRAINING | {
    name: "what is there together is normalised together, the future too"
    for name in ('causality', 'cache')
}  # and with MiniBatchNorm


def moments(x, valid=None):
    """Mean and biased variance (C,) of x (B, T, C) over its valid (B, T) places, and how many those
    are."""
    x = x.flatten(0, 1)
    weight = x.new_ones(len(x)) if valid is None else valid.flatten().to(x.dtype)
    n = weight.sum()
    with torch.autocast(x.device.type, enabled=False):
        weight = weight / n.clamp(min=1)
        mean = weight @ x
        return mean, weight @ (x - mean) ** 2, n


@torch.no_grad()
def measure_statistics(model, batches, samples=10_000):
    """Measure what the PreciseBatchNorms of `model` store: over batches of (idx, targets), up to
    this many targets or a few more. The paper found 1,000 to 10,000 enough."""
    norms, was = (
        [norm for norm in model.modules() if isinstance(norm, PreciseBatchNorm) and norm.is_due()],
        model.training,
    )
    if not norms:
        return
    for norm in norms:
        norm.parts = []
    for idx, targets in batches:
        idx, targets = (torch.as_tensor(ids, device=norms[0].mean.device) for ids in (idx, targets))
        # with FSDP's hooks; compiled, it would be compiled anew for every batch
        model.train()._call_impl(idx, targets)
        samples -= (targets >= 0).sum()
        if samples <= 0:
            break
    for norm in norms:
        norm.store()
    model.train(was)
