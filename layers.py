"""Parts that several models share: norms, rotary positions, activations, and causal attention by the kernel that is
fastest where it runs."""
import math

import torch
from torch import nn
from torch.nn import functional as F

ATTENTION = 'auto'      # 'auto' | 'sdpa' | 'plain'; set by use_attention


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension (C) whose bias is optional."""

    def __init__(self, C, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))
        self.bias = nn.Parameter(torch.zeros(C)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class RMSNorm(nn.Module):
    """x over its root mean square (arXiv 1910.07467), in at least float32, times a weight, over the last dimension (C)."""

    def __init__(self, C, eps=1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(C)), eps

    def forward(self, x):
        return F.rms_norm(at_least_float32(x), self.weight.shape, self.weight, self.eps).type_as(x)


def use_attention(name):
    """Choose the attention kernel for all models: 'auto' (fastest), 'sdpa' or 'plain'. Raises ValueError."""
    global ATTENTION
    if name not in ('auto', 'sdpa', 'plain'):
        raise ValueError(f"attention={name!r} is unknown: take auto, sdpa or plain")
    ATTENTION = name


def split_heads(qkv, n_head, parts=3):
    """The q, k and v that lie side by side in (B, T, 3C), as (3, B, H, T, D); in one copy where `plain` needs it so.

    parts: how many lie there; two for only k and v.
    """
    B, T, _ = qkv.shape
    qkv = qkv.view(B, T, parts, n_head, -1).permute(2, 0, 3, 1, 4)
    return qkv.contiguous() if _use_plain(qkv) else qkv


def causal_attention(q, k, v, dropout=0.0, mask=None, scale=None):
    """softmax(q kᵀ · scale, keys up to the query only) v.

    q (B, H, T, D), k (B, G, L, D), v (B, G, L, E) with G heads that divide H, each of them for H/G neighbours. dropout:
    probability on the attention weights. mask: instead of "up to the query" (then L = T), True for what is seen, or numbers
    to add to the scores, (T, L) or (…, …, T, L). scale: 1/√D unless told. Returns (B, H, T, E).
    """
    attend = plain_attention if _use_plain(q) else sdpa
    return attend(q, k, v, dropout, mask, scale, is_causal=mask is None)


def sdpa(q, k, v, dropout=0.0, mask=None, scale=None, is_causal=False):
    """causal_attention by torch's kernels; not causal: with the mask alone, or none."""
    (B, H, T, D), G, E = q.shape, k.size(1), v.size(-1)
    if D != E and T > 1:    # the fast kernels want one width
        scale = scale or D ** -0.5
        q, k, v = (x if x.size(-1) == max(D, E) else F.pad(x, (0, max(D, E) - x.size(-1))) for x in (q, k, v))
    if T == 1 and G < H and not is_causal:     # a group's queries as rows of one product: it reads each key once
        q = q.reshape(B, G, H // G, -1)
    y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, scale=scale, enable_gqa=q.size(1) != G)
    return y.reshape(B, H, T, -1)[..., :E] if y.shape != (B, H, T, E) else y


class KVCache:
    """What a model keeps of the tokens so far: their ids, and tensors per layer, such as keys and values. With it, one
    token more costs one row of each product.

    Every row of the batch fills the columns up to `length`. Prompts of different lengths end in the same column, so that
    the rows go on together; row b's tokens then begin at column first[b], and before it everything is zero.
    shapes: for each layer the (H, D) of each tensor that it keeps, (B, H, room, D); none for models that need only the ids.
    """

    def __init__(self, B, room, shapes, device=None, dtype=None):
        self.kept = [[torch.zeros(B, H, room, D, device=device, dtype=dtype) for H, D in layer] for layer in shapes]
        self.ids = torch.full((B, room), -1, device=device)     # -1: before a row's first token
        self.room, self.length, self.first, self.seen = room, 0, None, None

    def extend(self, idx):
        """Make room for idx (B, T), the next tokens of each row. Returns their places: a slice, or (B, T). ValueError."""
        (_, T), start = idx.shape, self.length
        if start + T > self.room:
            raise ValueError(f"{T} tokens do not fit into a cache for {self.room} that holds {start}")
        self.length += T
        self.ids[:, start:self.length] = idx
        self.seen, places = None, None
        if self.first is not None or (start and T > 1):     # otherwise all that is there is seen, or it is a whole prompt
            places = torch.arange(self.length, device=idx.device)
            self.seen = places <= places[start:, None]                                          # (T, length)
        if self.first is None:
            return slice(start, self.length)
        self.seen = self.seen & (places >= self.first.view(-1, 1, 1, 1))                        # (B, 1, T, length)
        return places[start:] - self.first[:, None]

    @property
    def layers(self):
        """A Past for each layer."""
        return [Past(self, kept) for kept in self.kept]

    def recent(self, n, T):
        """The n ids before the last T of each row, -1 where there was none: (B, n)."""
        return F.pad(self.ids[:, :self.length - T], (n, 0), value=-1)[:, self.length - T:]

    def select(self, rows):
        """Go on with these rows (N,) of the batch, in this order."""
        self.kept = [[tensor[rows] for tensor in layer] for layer in self.kept]
        self.ids, self.first = self.ids[rows], self.first if self.first is None else self.first[rows]

    @classmethod
    def join(cls, caches, room):
        """One cache with the rows of several, which have one row each, and room for so many columns."""
        length, one = max(cache.length for cache in caches), caches[0]
        whole = cls(len(caches), room, [[(t.size(1), t.size(3)) for t in layer] for layer in one.kept], one.ids.device,
                    next((t.dtype for layer in one.kept for t in layer), None))
        whole.length, starts = length, [length - cache.length for cache in caches]
        for b, (start, cache) in enumerate(zip(starts, caches)):
            whole.ids[b, start:length] = cache.ids[0, :cache.length]
            for mine, theirs in zip(whole.kept, cache.kept):
                for x, y in zip(mine, theirs):
                    x[b, :, start:length] = y[0, :, :cache.length]
        whole.first = torch.tensor(starts, device=one.ids.device) if any(starts) else None
        return whole


class Past:
    """What one layer has of a KVCache: `tensors`, (B, H, room, D) each."""

    def __init__(self, cache, tensors):
        self.cache, self.tensors = cache, tensors

    def keep(self, *new):
        """Keep what the new tokens bring, (B, H, T, D) for each tensor; returns all there is of each, (B, H, length, D)."""
        end = self.cache.length
        for kept, x in zip(self.tensors, new):
            kept[:, :, end - x.size(2):end] = x
        return [kept[:, :, :end] for kept in self.tensors]

    def is_whole(self, T):
        """Whether the T new tokens are all that there is, in each row: a prompt that is read at once."""
        return self.cache.length == T and self.cache.seen is None

    def attend(self, q, k, v):
        """Keep k and v of the new tokens, and attend to all that q (B, H, T, D) may see: (B, H, T, D), in q's type."""
        past_k, past_v = self.keep(k, v)
        dtype = past_k.dtype
        if self.is_whole(q.size(2)):
            return causal_attention(*(x.to(dtype) for x in (q, k, v))).to(q.dtype)
        return sdpa(q.to(dtype), past_k, past_v, mask=self.cache.seen).to(q.dtype)


def _use_plain(q):
    # Measured forward + backward on a CPU with AMX: in bfloat16 the plain products win 1.2 to 5 times up to T = 512,
    # and keep B·H·T² numbers per layer for the backward pass; in float32 SDPA wins from T = 64.
    fastest = q.device.type == 'cpu' and q.dtype == torch.bfloat16 and q.size(-2) <= 512
    return ATTENTION == 'plain' or (ATTENTION == 'auto' and fastest)


def compute_type(x):
    """x in bfloat16 where autocast computes in that: a residual stream in the products' own type needs no conversions."""
    kind = x.device.type
    is_bf16 = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.bfloat16
    return x.bfloat16() if is_bf16 else x


def at_least_float32(x):
    """x, or float32 where it has fewer bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def norm(x):
    """LayerNorm without weights, over the last dimension, in x's type. One kernel, where RMSNorm is several on a CPU."""
    return F.layer_norm(x, x.shape[-1:]).type_as(x)     # CUDA's autocast returns float32


def rotary(T, D, base=10000):
    """(2, T, D): the cosines and signed sines by which `rotate` turns positions 0 … T-1."""
    angles = torch.outer(torch.arange(T), base ** (-torch.arange(0, D, 2) / D))         # (T, D/2)
    return torch.stack([torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)])


class _Rotate(torch.autograd.Function):
    """Turning back is turning by the negative angle: the backward pass needs nothing but the angles."""

    @staticmethod
    def forward(ctx, x, rotary):
        rotary = rotary.type_as(x)
        ctx.save_for_backward(rotary)
        return (x * rotary[0]).addcmul_(x.roll(x.shape[-1] // 2, -1), rotary[1])

    @staticmethod
    def backward(ctx, grad):
        rotary, = ctx.saved_tensors
        return (grad * rotary[0]).addcmul_(grad.roll(grad.shape[-1] // 2, -1), rotary[1], value=-1), None


def rotate(x, rotary):
    """RoPE: turn each pair (d, d + D/2) of x (…, T, D) by its position's angle; rotary: (2, T, D), as of `rotary`."""
    return _Rotate.apply(x, rotary)


class _SquaredReLU(torch.autograd.Function):
    """relu(x)², whose backward pass is two operators; that of relu and square would be three."""

    @staticmethod
    def forward(ctx, x):
        x = x.relu()
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        return (grad * x).mul_(2)


squared_relu = _SquaredReLU.apply


def add_some(x, y, p):
    """x + y for (B, T, C), without the y of each token with probability p, the others scaled up."""
    if not p:
        return x + y
    kept = torch.rand(*y.shape[:2], 1, device=y.device) >= p
    return torch.addcmul(x, y, (kept / (1 - p)).type_as(y))


def add(x, y):
    """x + y in x's dtype: the residual stream stays float32 under autocast. A CPU is slow at adding two dtypes."""
    return x + (y.type_as(x) if x.device.type == 'cpu' else y)


def plain_attention(q, k, v, dropout=0.0, mask=None, scale=None, is_causal=True):
    """The same as three products in q's own dtype; a softmax over bfloat16 sums in float32 inside its kernel."""
    (B, H, T, D), (G, L) = q.shape, k.shape[1:3]
    bias = q.new_zeros(1, 1) if mask is None else mask
    if is_causal:
        bias = torch.full((T, T), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    elif bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill_(~bias, -math.inf)
    if H != G or bias.dim() > 2:    # a group's queries are rows of one product
        bias = bias.expand(B, H, T, L).reshape(B * G, -1, L)
    q, k, v = q.reshape(B * G, -1, D), k.reshape(B * G, L, D), v.reshape(B * G, L, -1)
    with torch.autocast(q.device.type, enabled=False):      # autocast would take the softmax to float32 and back
        att = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale or D ** -0.5).softmax(-1)    # (B·G, H/G·T, L)
        return (F.dropout(att, dropout) @ v).view(B, H, T, -1)


# ---- small models: the tokens before a window, counts, batch normalisation, first weights ----------------------------

def with_past(idx, n, cache=None):
    """idx (B, T) behind the n ids before it, -1 where there were none: (B, n + T). A cache takes idx in."""
    if cache is None:
        return F.pad(idx, (n, 0), value=-1)
    cache.extend(idx)
    return torch.cat([cache.recent(n, idx.size(1)), idx], 1)


AT_ONCE = 2 ** 24     # n-grams that NgramCounts.fit sorts together: 0.4 GB


class NgramCounts(nn.Module):
    """P(token | the n - 1 before it) = (count + k) / (total + k V), counted by `fit`.

    Only what occurs is kept. An n-gram is one number: its ids are digits to base V + 1, where 0 stands for no token, the
    last one to base V. keys: these numbers, sorted, so that those of one context lie side by side; sums: the counts of all
    before each, and the whole. Where a window begins, what came before is unknown, and counts over all that may have serve.
    """

    def __init__(self, n, V, k):
        super().__init__()
        if (V + 1) ** n >= 2 ** 63:
            raise ValueError(f"vocab_size={V} is too large to count {n} tokens together: {int(2 ** (63 / n)) - 2} at most")
        self.n, self.V = n, V
        self.register_buffer('k', torch.tensor(float(k)), persistent=False)
        self.register_buffer('keys', torch.zeros(0, dtype=torch.int64))
        self.register_buffer('sums', torch.zeros(1, dtype=torch.int64))

    def forward(self, context):
        """Log-probabilities (B, T, V) of what follows each context (B, T, n - 1)."""
        number, inverse = self._number(context).unique(return_inverse=True)                 # (N,), (B, T)
        first, end = torch.searchsorted(self.keys, torch.stack([number, number + 1]) * self.V)
        k = self.k.to(torch.promote_types(self.k.dtype, torch.float32))
        total = (self.sums[end] - self.sums[first] + k * self.V).log()                      # (N,)
        logp = (k.log() - total)[:, None].repeat(1, self.V)                                 # (N, V)
        rows = torch.arange(len(number), device=number.device).repeat_interleave(end - first)
        at = torch.arange(len(rows), device=rows.device) + (end - (end - first).cumsum(0))[rows]
        logp[rows, self.keys[at] % self.V] = (self.sums[at + 1] - self.sums[at] + k).log() - total[rows]
        return logp[inverse]

    def _number(self, ids):
        number = torch.zeros_like(ids[..., 0])
        for i in range(ids.size(-1)):
            number = number * (self.V + 1) + ids[..., i] + 1
        return number

    @torch.no_grad()
    def fit(self, batches):
        """Count anew, over batches of (idx, targets). Targets of -1 are not counted."""
        keys, counts, new, n_new = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), [], 0
        for idx, targets in batches:
            idx, targets = torch.as_tensor(idx).cpu(), torch.as_tensor(targets).cpu()
            context = with_past(idx, self.n - 2).unfold(1, self.n - 1, 1).clone()           # (B, T, n - 1)
            counted = targets >= 0
            for i in range(self.n - 1):     # the whole context, then with less and less of its left
                new.append((self._number(context) * self.V + targets)[counted])
                n_new += len(new[-1])
                counted = counted & (context[..., i] >= 0)      # else the shorter context is this one
                context[..., i] = -1
            if n_new > AT_ONCE:
                (keys, counts), new, n_new = _add_counts(keys, counts, new), [], 0
        keys, counts = _add_counts(keys, counts, new)
        self.keys, self.sums = keys.to(self.keys.device), F.pad(counts.cumsum(0), (1, 0)).to(self.keys.device)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name in ('keys', 'sums'):       # as long as the counts are that come
            if prefix + name in state_dict:
                setattr(self, name, getattr(self, name).new_empty(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _add_counts(keys, counts, new):
    """Sorted keys and their counts, with one more for each that is in the tensors `new`."""
    keys, inverse = torch.cat([keys, *new]).unique(return_inverse=True)
    more = torch.ones(len(inverse) - len(counts), dtype=torch.int64)
    return keys, torch.zeros_like(keys).index_add_(0, inverse, torch.cat([counts, more]))


class NoNorm(nn.Module):
    """In the place of a BatchNorm: nothing."""

    def __init__(self, C):
        super().__init__()

    def forward(self, x, valid=None):
        return x


class BatchNorm(nn.Module):
    """Each channel of x (B, T, C) with mean 0 and variance 1 over batch and time, times a gain, plus a bias (arXiv
    1502.03167). valid (B, T): which places count in the statistics; absent: all.

    In training the statistics are the mini-batch's, padding left out, so positions learn of each other there; otherwise
    they are stored ones: here, moving averages. In a run of several processes each has its own mini-batch's.
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
            self.mean.lerp_(mean, 0.1)
            self.var.lerp_(var * n / (n - 1).clamp(min=1), 0.1)
        return mean, var

    def in_use(self, x, valid):
        return self.mean, self.var


class PreciseBatchNorm(BatchNorm):
    """BatchNorm whose stored statistics are those of many examples with the weights as they are (PreciseBN, arXiv
    2105.07576): `measure_statistics` has to be called after the weights have changed."""

    parts = None        # while measuring: (mean, var, n) of each mini-batch

    def in_training(self, x, valid):
        mean, var, n = moments(x, valid)
        if self.parts is not None:
            self.parts.append((mean, var, n))
        return mean, var

    def is_due(self):
        return True

    def store(self):
        mean, var, n = (torch.stack(values) for values in zip(*self.parts))                 # (batches, C) twice, (batches,)
        share = (n / n.sum())[:, None]
        self.mean.copy_((share * mean).sum(0))
        self.var.copy_((share * (var + (mean - self.mean) ** 2)).sum(0))      # E[x²] - E[x]², without cancellation
        self.is_measured.fill_(True)
        self.parts = None


class FrozenBatchNorm(PreciseBatchNorm):
    """BatchNorm whose statistics are measured once, by `measure_statistics` or else of the first mini-batch; from then on
    they hold in training too, where gain and bias still learn."""

    def in_training(self, x, valid):
        mean, var, n = moments(x.detach(), valid)
        if self.parts is not None:
            self.parts.append((mean, var, n))
            return mean, var
        self.mean.copy_(torch.where(self.is_measured, self.mean, mean))
        self.var.copy_(torch.where(self.is_measured, self.var, var))
        self.is_measured.fill_(True)
        return self.mean.clone(), self.var.clone()      # the next micro-batch may write before this one's backward pass

    def is_due(self):
        return not self.is_measured


class MiniBatchNorm(BatchNorm):
    """BatchNorm by the statistics of what it is given, in use too: the answer to one text depends on the others."""

    def in_training(self, x, valid):
        return moments(x, valid)[:2]

    in_use = in_training


BATCH_NORMS = {'': NoNorm, 'ema': BatchNorm, 'precise': PreciseBatchNorm, 'frozen': FrozenBatchNorm, 'batch': MiniBatchNorm}
IN_TRAINING = {'accumulation': "each micro-batch is normalised by its own statistics"}    # exemptions of models with them
ONE_BATCH = IN_TRAINING | {name: "what is there together is normalised together, the future too"
                           for name in ('causality', 'cache')}                            # and with MiniBatchNorm


def moments(x, valid=None):
    """Mean and biased variance (C,) of x (B, T, C) over its valid (B, T) places, and how many those are."""
    x = x.flatten(0, 1)
    weight = x.new_ones(len(x)) if valid is None else valid.flatten().to(x.dtype)
    n = weight.sum()
    with torch.autocast(x.device.type, enabled=False):
        weight = weight / n.clamp(min=1)
        mean = weight @ x
        return mean, weight @ (x - mean) ** 2, n


@torch.no_grad()
def measure_statistics(model, batches, samples=10_000):
    """Measure what the PreciseBatchNorms of `model` store: over batches of (idx, targets), up to this many targets or a
    few more. The paper found 1,000 to 10,000 enough."""
    norms, was = [norm for norm in model.modules() if isinstance(norm, PreciseBatchNorm) and norm.is_due()], model.training
    if not norms:
        return
    for norm in norms:
        norm.parts = []
    for idx, targets in batches:
        idx, targets = (torch.as_tensor(ids, device=norms[0].mean.device) for ids in (idx, targets))
        model.train().forward(idx, targets)     # compiled, it would be compiled anew for every batch
        samples -= (targets >= 0).sum()
        if samples <= 0:
            break
    for norm in norms:
        norm.store()
    model.train(was)


INITS = {'kaiming': lambda weight, f: nn.init.kaiming_normal_(weight, nonlinearity=f),              # arXiv 1502.01852
         'xavier': lambda weight, f: nn.init.xavier_normal_(weight, nn.init.calculate_gain(f))}     # Glorot, Bengio 2010
