"""Kinds of batch normalisation, which differ in where the statistics come from (BATCH_NORMS).

Shapes: B batch, T time, C channels.
"""

import torch
from torch import nn

from models.parts.layers import at_least_float32


class NoNorm(nn.Module):
    """In place of a BatchNorm: nothing."""

    def __init__(self, C):
        super().__init__()

    def forward(self, x, valid=None):
        return x


class BatchNorm(nn.Module):
    """Each channel of x (B, T, C) with mean 0 and variance 1, times a gain, plus a bias.

    Batch and time are normalised together (arXiv 1502.03167). valid (B, T): which positions count
    in the statistics; default: all.

    In training, statistics are the mini-batch's, so positions learn of each other there. In eval
    mode they are the stored ones, here moving averages. Each of several processes has the
    statistics of its own mini-batch; the first one's averages are stored, since the others' would
    differ little.
    """

    def __init__(self, C):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.bias = nn.Parameter(torch.zeros(C))
        self.register_buffer('mean', torch.zeros(C))
        self.register_buffer('var', torch.ones(C))
        self.register_buffer('is_measured', torch.tensor(False))

    def forward(self, x, valid=None):
        high = at_least_float32(x)
        if self.training:
            mean, var = self.train_statistics(high, valid)
        else:
            mean, var = self.eval_statistics(high, valid)
        gain = self.weight * (var + 1e-5).rsqrt()
        return torch.addcmul(self.bias, high - mean, gain).type_as(x)

    def train_statistics(self, x, valid):
        """Mean and variance (C,) to normalise by in training; updates the stored ones."""
        mean, var, n = moments(x, valid)
        with torch.no_grad():
            rate = 0.1 * n.clamp(max=1)  # 0 where no position counts
            self.mean.lerp_(mean, rate)
            unbiased = var * n / (n - 1).clamp(min=1)
            self.var.lerp_(unbiased, rate)
        return mean, var

    def eval_statistics(self, x, valid):
        """Mean and variance (C,) to normalise by in eval mode."""
        return self.mean, self.var


class PreciseBatchNorm(BatchNorm):
    """BatchNorm that stores the statistics of many examples under the current weights.

    PreciseBN, arXiv 2105.07576. Call `measure_statistics` after the weights have changed.
    """

    measured = None  # while measuring: (mean, var, n) of each mini-batch

    def train_statistics(self, x, valid):
        mean, var, n = moments(x, valid)
        if self.measured is not None:
            self.measured.append((mean, var, n))
        return mean, var

    def is_due(self):
        """Whether `measure_statistics` is to measure this norm."""
        return True

    def store(self):
        """Store the statistics of all mini-batches measured, together."""
        means, variances, counts = zip(*self.measured)
        mean = torch.stack(means)  # (batches, C)
        var = torch.stack(variances)  # (batches, C)
        n = torch.stack(counts)  # (batches,)
        share = (n / n.sum().clamp(min=1))[:, None]
        self.mean.copy_((share * mean).sum(0))
        # E[x²] - E[x]², without cancellation
        self.var.copy_((share * (var + (mean - self.mean) ** 2)).sum(0))
        self.is_measured.fill_(True)
        self.measured = None


class FrozenBatchNorm(PreciseBatchNorm):
    """BatchNorm whose statistics are measured once, then used in training too.

    They are measured by `measure_statistics`, or else on the first mini-batch. Gain and bias still
    learn.
    """

    def train_statistics(self, x, valid):
        mean, var, n = moments(x.detach(), valid)
        if self.measured is not None:
            self.measured.append((mean, var, n))
            return mean, var

        # torch.where in place of an `if`, which would make a GPU wait for the answer.
        is_known = self.is_measured | (n == 0)
        self.mean.copy_(torch.where(is_known, self.mean, mean))
        self.var.copy_(torch.where(is_known, self.var, var))
        self.is_measured.logical_or_(n > 0)
        # Copies: the next micro-batch may write to these before this one's backward pass.
        return self.mean.clone(), self.var.clone()

    def is_due(self):
        return not self.is_measured


class MiniBatchNorm(BatchNorm):
    """BatchNorm by the mini-batch's own statistics, in eval mode too.

    The prediction for one text then depends on the others.
    """

    def train_statistics(self, x, valid):
        mean, var, _ = moments(x, valid)
        return mean, var

    def eval_statistics(self, x, valid):
        return self.train_statistics(x, valid)


BATCH_NORMS = {
    '': NoNorm,
    'ema': BatchNorm,
    'precise': PreciseBatchNorm,
    'frozen': FrozenBatchNorm,
    'batch': MiniBatchNorm,
}

# LanguageModel.exemptions of models with each kind
_BY_MICRO_BATCH = {'accumulation': "each micro-batch is normalised by its own statistics"}
_BY_BATCH = {
    'causality': "a batch is normalised as a whole, later tokens included",
    'cache': "a batch is normalised as a whole, later tokens included",
}
EXEMPTIONS = {
    '': {},
    'ema': _BY_MICRO_BATCH,
    'precise': _BY_MICRO_BATCH,
    'frozen': {},
    'batch': _BY_MICRO_BATCH | _BY_BATCH,
}


def check(name):
    """Raise ValueError unless `name` is one of BATCH_NORMS."""
    if name not in BATCH_NORMS:
        raise ValueError(
            f"batchnorm={name!r} is unknown: use ema, precise, frozen or batch, or '' for none"
        )


def moments(x, valid=None):
    """Mean (C,), biased variance (C,) and number of the valid (B, T) positions of x (B, T, C)."""
    x = x.flatten(0, 1)  # (B·T, C)
    weight = x.new_ones(len(x)) if valid is None else valid.flatten().to(x.dtype)
    n = weight.sum()
    with torch.autocast(x.device.type, enabled=False):
        weight = weight / n.clamp(min=1)
        mean = weight @ x
        var = weight @ (x - mean) ** 2
    return mean, var, n


@torch.no_grad()
def measure_statistics(model, batches, samples=10_000):
    """Measure and store the statistics of the model's PreciseBatchNorms.

    batches: of (idx, targets); those that hold `samples` targets are used. The paper found 1,000 to
    10,000 enough.
    """
    norms = []
    for module in model.modules():
        if isinstance(module, PreciseBatchNorm) and module.is_due():
            norms.append(module)
    if not norms:
        return

    was_training = model.training
    device = norms[0].mean.device
    model.train()
    for norm in norms:
        norm.measured = []
    for idx, targets in batches:
        idx = torch.as_tensor(idx, device=device)
        targets = torch.as_tensor(targets, device=device)
        # _call_impl runs FSDP's hooks, but not the compiled forward, which would be compiled anew
        # for every batch.
        model._call_impl(idx, targets)
        samples -= (targets >= 0).sum()
        if samples <= 0:
            break
    for norm in norms:
        norm.store()
    model.train(was_training)
