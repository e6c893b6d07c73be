"""Optimizers: AdamW in nanoGPT's parameter groups, SGD, and Muon for the matrices.

Each of them skips a step, leaving weights and state as they are, if its `found_inf` was set to 1
before: a float32 tensor of one element on the parameters' device, which a GradScaler sets too.

Parameters may be sharded as in fsdp.py, where each process has some rows of their first dimension.
"""

import math

import torch
import torch.distributed as dist
from torch.optim.sgd import sgd as fused_sgd

# What a parameter's state holds in AdamW, SGD and Muon.
STATE_KEYS = ({'step', 'exp_avg', 'exp_avg_sq'}, {'momentum_buffer'}, {'step', 'momentum_buffer'})
# Muon's momentum at the start, its final value, and the steps it takes to get there: early
# gradients are soon out of date.
MUON_MOMENTUM = 0.85, 0.95, 300
# Device types on which `found_inf` can be read without waiting for queued work.
READ_AT_ONCE = ('cpu',)


# ---- building ------------------------------------------------------------------------------------


def build_optimizer(
    params_by_role,
    weight_decay,
    learning_rate,
    betas,
    device_type,
    lrs=None,
    *,
    width=768,
    bfloat16=False,
    is_lr_given=False,
    name='adamw',
    max_norm=0.0,
):
    """The optimizer of a model's parameters; None if none of them is trainable.

    params_by_role: {role: [parameters]} with the roles matrix, embedding, head and vector.
    lrs: {role: learning rate} for matrix, embedding and head. Roles that are missing or 0 use
    `learning_rate`. A rate for matrices selects Muon for them. Those for embeddings and heads are
    tuned at 768 channels and are multiplied by (width / 768)^-1/2. Without any, the parameters are
    in nanoGPT's two groups: vectors, which do not decay, and the rest, which does.
    bfloat16: run Muon's orthogonalization in bfloat16, which is accurate enough, and fast where the
    hardware supports it.
    is_lr_given: the user has set learning_rate, so it is an error if it trains nothing.
    name: 'adamw', or 'sgd', whose momentum is betas[0] and whose weight decay is added to the
    gradient.
    max_norm: above 0, the limit on the norm of each row of a matrix or head, the weights into one
    unit, after each step (Srivastava et al. 2014, section 5.1).

    Raises ValueError for options that are unknown or do not go together.
    """
    lrs = {role: lr for role, lr in (lrs or {}).items() if lr}
    uses_muon = 'matrix' in lrs
    if name not in ('adamw', 'sgd'):
        raise ValueError(
            f"optimizer={name!r} is unknown: use adamw or sgd; to train the matrices by Muon, set "
            "--muon_lr"
        )
    if uses_muon and not all(p.requires_grad for p in params_by_role.get('matrix', ())):
        raise ValueError(
            "muon_lr is for whole matrices, and lora_rank trains only thin factors of them by "
            "learning_rate: set one of the two"
        )
    if lrs and not learning_rate:
        raise ValueError(
            "learning_rate=0 with another rate above 0: the schedule scales all rates by it, so "
            "set it above 0"
        )

    trainable = {}
    for role, params in params_by_role.items():
        trainable[role] = [p for p in params if p.requires_grad]
    if not any(trainable.values()):
        return None
    groups = _parameter_groups(
        trainable, weight_decay, learning_rate, lrs=_scaled_to_width(lrs, width)
    )
    if is_lr_given and all(group['lr_ratio'] != 1.0 for group in groups if group['params']):
        raise ValueError(
            f"learning_rate={learning_rate} trains nothing here: set muon_lr, embed_lr and head_lr "
            "instead"
        )
    if name == 'sgd' and uses_muon:
        raise ValueError(
            "muon_lr is for optimizer=adamw, which trains the parameters that Muon does not: set "
            "one of the two"
        )

    # One kernel for all parameters is faster on each of these devices.
    options = dict(lr=learning_rate, fused=device_type in ('cuda', 'mps', 'cpu'))
    if name == 'sgd':
        optimizer = SGD(groups, momentum=betas[0], **options)
    elif uses_muon:
        is_sharded = any(_is_sharded(p) for p in trainable.get('matrix', ()))
        muon_class = ShardedMuon if is_sharded else Muon
        optimizer = muon_class(groups, betas=betas, bfloat16=bfloat16, **options)
    else:
        optimizer = AdamW(groups, betas=betas, **options)

    if max_norm:
        limited = [*trainable.get('matrix', ()), *trainable.get('head', ())]
        if not limited:
            raise ValueError(
                f"max_norm={max_norm} limits nothing: this model has only tables and vectors"
            )

        def limit_after_step(optimizer, args, kwargs):
            limit_rows(limited, max_norm, skip=getattr(optimizer, 'found_inf', None))

        optimizer.register_step_post_hook(limit_after_step)
    return optimizer


def _scaled_to_width(lrs, width):
    """{role: learning rate} at `width` channels. Muon's holds for any width."""
    scaled = {}
    for role, lr in lrs.items():
        scaled[role] = lr if role == 'matrix' else lr * math.sqrt(768 / width)
    return scaled


def _parameter_groups(params_by_role, weight_decay, learning_rate, lrs):
    """torch's parameter groups, of which some may be empty; the order is part of checkpoints.

    lr_ratio: the group's learning rate is this times the schedule's. muon: Muon trains it.
    """
    if lrs:
        roles_by_group = [['embedding'], ['matrix'], ['head'], ['vector']]
    else:
        roles_by_group = [['embedding', 'matrix', 'head'], ['vector']]

    parameter_groups = []
    for roles in roles_by_group:
        params = []
        for role in roles:
            params += params_by_role.get(role, [])
        own_lr = lrs.get(roles[0])
        parameter_groups.append(
            dict(
                params=params,
                muon=roles == ['matrix'] and 'matrix' in lrs,
                lr_ratio=own_lr / learning_rate if own_lr else 1.0,
                weight_decay=0.0 if roles == ['vector'] else weight_decay,
            )
        )
    return parameter_groups


# ---- sharded parameters and skipped steps --------------------------------------------------------


def _is_sharded(p):
    return hasattr(p, 'to_local')


def _local(p):
    """This process's rows of `p`, in the same memory; all of them if it is not sharded."""
    return p.to_local() if _is_sharded(p) else p


def _must_skip(optimizer, device_type):
    """Whether found_inf asks to skip this step. It is read only if it is on this type of device."""
    skip = getattr(optimizer, 'found_inf', None)
    return skip is not None and skip.device.type == device_type and bool(skip.item())


# ---- optimizers ----------------------------------------------------------------------------------


class AdamW(torch.optim.AdamW):
    """torch's AdamW, and steps are skipped on MPS too, whose kernel ignores found_inf."""

    def step(self):
        if not _must_skip(self, 'mps'):
            super().step()


class SGD(torch.optim.SGD):
    """torch's fused SGD, for shards too, and with a momentum that starts at 0.

    torch allocates it uninitialized and relies on the first step to fill it, which may be skipped.
    """

    @torch.no_grad()
    def step(self):
        if _must_skip(self, 'mps'):
            return
        for group in self.param_groups:
            params = [p for p in group['params'] if p.grad is not None]
            fused_sgd(
                [_local(p) for p in params],
                [_local(p.grad) for p in params],
                self._momentum_buffers(params, group['momentum']),
                lr=group['lr'],
                momentum=group['momentum'],
                weight_decay=group['weight_decay'],
                dampening=group['dampening'],
                nesterov=group['nesterov'],
                maximize=group['maximize'],
                fused=group['fused'],
                grad_scale=getattr(self, 'grad_scale', None),
                found_inf=getattr(self, 'found_inf', None),
            )

    def _momentum_buffers(self, params, momentum):
        """A buffer per parameter, created if needed; None for each without momentum."""
        if not momentum:
            return [None] * len(params)
        buffers = []
        for p in params:
            state = self.state[p]
            if state.get('momentum_buffer') is None:
                state['momentum_buffer'] = torch.zeros_like(p)
            buffers.append(_local(state['momentum_buffer']))
        return buffers


class Muon(AdamW):
    """AdamW, and for groups with muon=True an update that is the orthogonalized momentum.

    See Jordan et al. 2024, https://kellerjordan.github.io/posts/muon. Weight decay applies only
    where it has the sign of the update (cautious, Chen et al. 2025, arXiv 2510.12402).

    A parameter holds p.n_matrices matrices (1 if there is no such attribute) above each other, or a
    stack of them along its first dimensions. Each is orthogonalized on its own; those of one shape
    form a batch, which the processes share.
    """

    def __init__(self, groups, bfloat16, **options):
        # Without `fused`, torch leaves `step` on the CPU, where reading it does not wait for a GPU.
        groups = [group | dict(fused=False) if group['muon'] else group for group in groups]
        super().__init__(groups, **options)
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32

    @torch.no_grad()
    def step(self):
        all_groups = self.param_groups
        try:
            self.param_groups = [group for group in all_groups if not group['muon']]
            super().step()  # which checks found_inf itself
        finally:
            self.param_groups = all_groups

        skip = getattr(self, 'found_inf', None)
        if skip is not None and skip.device.type in READ_AT_ONCE:
            if skip.item():
                return
            skip = None
        for group in all_groups:
            if group['muon']:
                self._muon_step(group, skip)

    def _muon_step(self, group, skip):
        """skip: None, or a tensor on the device; where it holds 1, nothing changes."""
        batches = {}  # {batch key: [(parameter, update)]}
        for p in group['params']:
            if p.grad is not None:
                update = self._momentum_update(p, skip)
                batches.setdefault(self._batch_key(p), []).append((p, update))

        for (rows, columns, *_), items in batches.items():
            # Keeps the size of an update's elements alike for tall and wide matrices.
            step_size = group['lr'] * math.sqrt(max(1, rows / columns))
            updates = self._orthogonal(items, rows, columns)
            for (p, _), update in zip(items, updates, strict=True):
                p = _local(p)
                update = update.reshape(p.shape).to(p.dtype)
                if skip is not None:
                    update = update.masked_fill(skip > 0, 0)
                if group['weight_decay']:
                    is_shrinking = update * p > 0
                    p.addcmul_(p, is_shrinking, value=-group['lr'] * group['weight_decay'])
                p.add_(update, alpha=-step_size)

    def _momentum_update(self, p, skip):
        """Nesterov's momentum of this process's rows of `p`, whose state is advanced by a step."""
        state = self.state[p]
        if not state:
            state['step'] = torch.zeros(())
            state['momentum_buffer'] = torch.zeros_like(p)
        first, last, steps = MUON_MOMENTUM
        momentum = first + (last - first) * min(1, state['step'].item() / steps)
        state['step'] += 1

        grad = _local(p.grad)
        average = _local(state['momentum_buffer'])
        if skip is not None:
            grad = torch.where(skip > 0, average, grad)  # leaves the average as it is
        average.lerp_(grad, 1 - momentum)
        return grad.lerp(average, momentum)

    def _batch_key(self, p):
        """(rows, columns) of each matrix in `p`; parameters of the same key form a batch."""
        return p.size(-2) // getattr(p, 'n_matrices', 1), p.size(-1)

    def _orthogonal(self, items, rows, columns):
        """The orthogonalized updates of `items`, a list of (parameter, update).

        Each process orthogonalizes a share of the matrices and sends it to all others.
        """
        updates = [update.reshape(-1, rows, columns) for _, update in items]
        batch = torch.cat(updates).to(self.dtype)  # (N, rows, columns)
        if dist.is_initialized() and dist.get_world_size() > 1:
            batch = _orthogonalize_together(batch)
        else:
            batch = orthogonalize(batch)
        return batch.split([len(update) for update in updates])


def _orthogonalize_together(batch):
    """`orthogonalize` of the batch (N, rows, columns), the same in all processes."""
    n, rows, columns = batch.shape
    rank, world_size = dist.get_rank(), dist.get_world_size()
    share = math.ceil(n / world_size)  # matrices per process; the last one may have fewer
    part = batch[rank * share : (rank + 1) * share]

    mine = batch.new_zeros(share, rows, columns)
    if len(part):
        mine[: len(part)] = orthogonalize(part)
    parts = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(parts, mine)
    return torch.cat(parts)[:n]


class ShardedMuon(Muon):
    """Muon for matrices whose rows are spread over the processes.

    Each process assembles a share of the parameters, orthogonalizes those and sends the rows back.
    None ever holds more than its share, or than one parameter if there are fewer than processes.
    """

    def _batch_key(self, p):
        return *super()._batch_key(p), p.shape

    def _orthogonal(self, items, rows, columns):
        W = dist.get_world_size()
        shape = items[0][0].shape  # of each whole parameter
        S = math.ceil(len(items) / W)  # parameters per process
        R = math.ceil(shape[0] / W)  # rows per shard, of which the last ones have fewer

        # My rows of every parameter, those of one process after the other's.
        shards = items[0][1].new_zeros(W * S, R, *shape[1:], dtype=self.dtype)
        for shard, (_, update) in zip(shards, items):
            shard[: len(update)] = update

        # My share of the parameters: from each process its rows of them.
        received = torch.empty_like(shards)
        dist.all_to_all_single(received, shards)  # (W * S, R, ...), sorted by sender
        whole = received.view(W, S, R, *shape[1:]).transpose(0, 1).reshape(S, W * R, *shape[1:])
        matrices = whole[:, : shape[0]]  # without the padding
        orthogonal = orthogonalize(matrices.reshape(-1, rows, columns))
        matrices.copy_(orthogonal.view(matrices.shape))

        # And each process's rows of them back.
        to_send = whole.view(S, W, R, *shape[1:]).transpose(0, 1).contiguous()
        dist.all_to_all_single(shards, to_send)
        return [shard[: len(update)] for shard, (_, update) in zip(shards, items)]


@torch.no_grad()
def limit_rows(matrices, max_norm, skip=None):
    """Scale each row of `matrices` that is longer than max_norm down to it, in place.

    Length is the Euclidean norm. skip: a tensor; where it holds 1, nothing changes.
    """
    for p in map(_local, matrices):
        limited = p.renorm(2, 0, max_norm)
        if skip is not None:
            limited = torch.where(skip > 0, p, limited)
        p.copy_(limited)


def orthogonalize(batch, steps=5):
    """Roughly the nearest orthogonal matrix to each matrix of batch (N, rows, columns).

    Newton-Schulz iteration of order 5 with Jordan's coefficients, which trade accuracy for speed:
    all but the smallest singular values end between 0.7 and 1.2.
    """
    is_tall = batch.size(-2) > batch.size(-1)
    x = batch.mT if is_tall else batch
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if is_tall else x


# ---- loading -------------------------------------------------------------------------------------


def load_optimizer_state(optimizer, state):
    """Load the state of a checkpoint's optimizer; the options, like weight_decay, stay this run's.

    state: its state_dict, or None for a checkpoint of weights. Raises ValueError if it is missing,
    damaged, or of another model or optimizer.
    """
    if not state:
        raise ValueError(
            "the checkpoint has weights only, not the state of a run: start from it with "
            "--init_from"
        )
    try:
        is_fitting = _layout(state['param_groups']) == _layout(optimizer.param_groups)
    except (LookupError, TypeError, AttributeError):
        raise ValueError(
            "the checkpoint's optimizer state is damaged: its parameter groups can't be read"
        ) from None
    if not is_fitting:
        raise ValueError(
            "the checkpoint's optimizer state does not fit: it is another model's, or another "
            "optimizer's, or muon_lr, embed_lr or head_lr was set in one run only; keep them as "
            "they were"
        )

    groups = []
    for stored, own in zip(state['param_groups'], optimizer.param_groups, strict=True):
        options = {key: value for key, value in own.items() if key != 'params'}
        groups.append({**stored, **options})
    try:
        optimizer.load_state_dict({**state, 'param_groups': groups})
        is_sound = all(_fits(p, own) for p, own in optimizer.state.items())
    except (LookupError, TypeError, AttributeError):
        is_sound = False
    if not is_sound:  # a fused kernel would read beyond the end of a tensor that is too short
        raise ValueError(
            "the checkpoint's optimizer state is damaged: its moments don't fit the weights"
        )


def _layout(groups):
    """What must agree between two lists of parameter groups: sizes, and the kind of optimizer."""
    return [
        (len(group['params']), group.get('muon', False), 'momentum' in group) for group in groups
    ]


def _fits(p, state):
    """Whether a parameter's state, which may be empty, has the keys and shapes it should have."""
    if not state:
        return True
    if set(state) not in STATE_KEYS:
        return False
    for key, value in state.items():
        if key != 'step' and value is not None and value.shape != p.shape:
            return False
    return True
