"""From parameters by role to an optimizer (AdamW, SGD, or Muon for the matrices), and the learning
rate of every step.

Each of them leaves weights and moments as they are in a step in front of which its `found_inf`, a
tensor of one float32 on the parameters' device, was set to 1 (a GradScaler sets it too). Parameters
may be sharded, as fsdp.py does it: each process has some of their first dimension's rows.
"""

import math

import torch
import torch.distributed as dist
from torch.optim.sgd import sgd as fused_sgd

# AdamW's, SGD's, Muon's
MOMENTS = {'step', 'exp_avg', 'exp_avg_sq'}, {'momentum_buffer'}, {'step', 'momentum_buffer'}
# from, to, within so many steps: early gradients are soon out of date
MUON_MOMENTUM = 0.85, 0.95, 300
# devices whose flags are read at once: on others that would wait for all queued work
READ_AT_ONCE = ('cpu',)


def build(
    groups,
    weight_decay,
    learning_rate,
    betas,
    device_type,
    lrs=None,
    *,
    width=768,
    bfloat16=False,
    is_asked=False,
    name='adamw',
    max_norm=0.0,
    lr_schedule='cosine',
):
    """The optimizer of {role: [parameters]}, frozen ones left out; None where there is nothing to
    learn. Raises ValueError.

    Without `lrs` it is AdamW in nanoGPT's two groups: what has two dimensions or more decays,
    vectors don't. lrs: learning rates by role ('matrix', 'embedding', 'head'; one that is missing
    or 0 is `learning_rate`). With one for matrices these are Muon's. Those of embeddings and heads
    hold for 768 channels, and are scaled with width^-1/2 to `width`. bfloat16: orthogonalise in
    bfloat16, which is exact enough and fast where the chip has it. is_asked: somebody wants this
    learning_rate, so it is an error if nothing is trained with it. name: 'adamw', or 'sgd', whose
    momentum is betas[0] and whose weight decay is part of the gradient. max_norm: of each row of a
    matrix, the weights into one unit, after each step (Srivastava et al. 2014, section 5.1); 0: no
    limit. lr_schedule: the shape of `schedule`, checked ahead of the run. Fused: one kernel for all
    parameters, measured faster on each device.
    """
    if name not in ('adamw', 'sgd'):
        raise ValueError(
            f"optimizer={name!r} is unknown: take adamw or sgd; --muon_lr gives the matrices to Muon"
        )
    if lr_schedule not in ('cosine', 'step'):
        raise ValueError(
            f"lr_schedule={lr_schedule!r} is unknown: take cosine or step; for a straight line, --cooldown"
        )
    if (lrs or {}).get('matrix') and not all(p.requires_grad for p in groups.get('matrix', ())):
        raise ValueError(
            "muon_lr is for whole matrices: leave it out with lora_rank, whose thin ones learning_rate trains"
        )
    groups = {role: [p for p in params if p.requires_grad] for role, params in groups.items()}
    lrs = {
        role: lr * (1 if role == 'matrix' else math.sqrt(768 / width))
        for role, lr in (lrs or {}).items()
        if lr
    }
    if lrs and not learning_rate:
        raise ValueError(
            "learning_rate=0 with another rate above 0: it is what the schedule starts from, take it > 0"
        )
    limited = [*groups.get('matrix', ()), *groups.get('head', ())]
    decaying = [['embedding'], ['matrix'], ['head']] if lrs else [['embedding', 'matrix', 'head']]
    groups = [
        dict(
            params=[p for role in roles for p in groups.get(role, ())],
            muon='matrix' in lrs and roles == ['matrix'],
            lr_ratio=lrs[roles[0]] / learning_rate if roles[0] in lrs else 1.0,
            weight_decay=0.0 if roles == ['vector'] else weight_decay,
        )
        for roles in [*decaying, ['vector']]
    ]
    if not any(group['params'] for group in groups):
        return None
    if is_asked and all(group['lr_ratio'] != 1.0 for group in groups if group['params']):
        raise ValueError(
            f"learning_rate={learning_rate} trains nothing here: set muon_lr, embed_lr and head_lr instead"
        )
    fused = device_type in ('cuda', 'mps', 'cpu')
    if name == 'sgd' and 'matrix' in lrs:
        raise ValueError(
            "muon_lr is for optimizer=adamw, which takes what Muon leaves: leave one of the two out"
        )
    if name == 'sgd':
        optimizer = SGD(groups, lr=learning_rate, momentum=betas[0], fused=fused)
    elif 'matrix' in lrs:
        optimizer = (
            ShardedMuon
            if any(_is_sharded(p) for group in groups for p in group['params'])
            else Muon
        )(groups, lr=learning_rate, betas=betas, fused=fused, bfloat16=bfloat16)
    else:
        optimizer = AdamW(groups, lr=learning_rate, betas=betas, fused=fused)
    if max_norm:
        if not limited:
            raise ValueError(
                f"max_norm={max_norm} limits nothing: this model has only tables and vectors"
            )
        optimizer.register_step_post_hook(
            lambda own, *_: limit_rows(limited, max_norm, getattr(own, 'found_inf', None))
        )
    return optimizer


def _is_sharded(p):
    return hasattr(p, 'to_local')


def _local(p):
    """This process's rows of `p`, in the same memory; all where it is not sharded."""
    return p.to_local() if _is_sharded(p) else p


def _is_forbidden(optimizer, *kinds):
    """Whether the flag is set that forbids a step; not asked, and false, where it lies on other
    kinds of devices."""
    skip = getattr(optimizer, 'found_inf', None)
    return skip is not None and skip.device.type in kinds and bool(skip.item())


class AdamW(torch.optim.AdamW):
    """torch's, whose kernel for MPS does not look at the flag."""

    def step(self):
        if not _is_forbidden(self, 'mps'):
            super().step()


class SGD(torch.optim.SGD):
    """torch's fused kernel on shards, which it refuses as they come; and with moments that begin as
    zeros, which is the same: torch's are whatever was in memory where the first step of all is
    skipped."""

    @torch.no_grad()
    def step(self):
        if _is_forbidden(self, 'mps'):
            return
        for group in self.param_groups:
            params = [p for p in group['params'] if p.grad is not None]
            moments = [None] * len(params)
            if group['momentum']:
                for p in params:
                    if self.state[p].get('momentum_buffer') is None:
                        self.state[p]['momentum_buffer'] = torch.zeros_like(p)
                moments = [_local(self.state[p]['momentum_buffer']) for p in params]
            options = (
                'lr',
                'momentum',
                'weight_decay',
                'dampening',
                'nesterov',
                'maximize',
                'fused',
            )
            fused_sgd(
                [_local(p) for p in params],
                [_local(p.grad) for p in params],
                moments,
                **{key: group[key] for key in options},
                grad_scale=getattr(self, 'grad_scale', None),
                found_inf=getattr(self, 'found_inf', None),
            )


class Muon(AdamW):
    """AdamW; and for the groups with muon=True: momentum, made orthogonal, is the update (Jordan et
    al. 2024, https://kellerjordan.github.io/posts/muon).

    A parameter holds p.n_matrices (absent: 1) matrices, one above the other, or a stack of them
    along other dimensions; each is orthogonalised on its own, those of one shape as one batch that
    the processes share. Weight decay only where it goes the update's way (cautious, Chen et al.
    2025, arXiv 2510.12402).
    """

    def __init__(self, groups, bfloat16, **options):
        super().__init__(
            [group | dict(fused=False) if group['muon'] else group for group in groups], **options
        )
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32

    @torch.no_grad()
    def step(self):
        every = self.param_groups
        try:
            self.param_groups = [group for group in every if not group['muon']]
            super().step()
        finally:
            self.param_groups = every
        skip = getattr(self, 'found_inf', None)  # AdamW's kernel has looked at it itself
        if skip is not None and skip.device.type in READ_AT_ONCE:
            if skip.item():
                return
            skip = None
        for group in every:
            if group['muon']:
                self._step(group, skip)

    def _step(self, group, skip):
        batches = {}  # what goes together: [(parameter, its update)]
        for p in group['params']:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state.update(step=torch.zeros(()), momentum_buffer=torch.zeros_like(p))
            start, end, steps = MUON_MOMENTUM
            momentum = start + (end - start) * min(1, state['step'].item() / steps)
            state['step'] += 1
            grad, average = _local(p.grad), _local(state['momentum_buffer'])
            if skip is not None:  # a step from the average to itself
                grad = torch.where(skip > 0, average, grad)
            average.lerp_(grad, 1 - momentum)
            update = grad.lerp(average, momentum)  # Nesterov
            batches.setdefault(self._alike(p), []).append((p, update))
        for (rows, columns, *_), items in batches.items():
            size = group['lr'] * math.sqrt(max(1, rows / columns))
            for (p, _), update in zip(items, self._orthogonal(items, rows, columns), strict=True):
                p = _local(p)
                update = update.reshape(p.shape).to(p.dtype)
                if skip is not None:
                    update = update.masked_fill(skip > 0, 0)
                if group['weight_decay']:
                    p.addcmul_(p, update * p > 0, value=-group['lr'] * group['weight_decay'])
                p.add_(update, alpha=-size)

    def _alike(self, p):
        """(rows, columns) of each of its matrices, and what else has to be the same in a batch."""
        return p.size(-2) // getattr(p, 'n_matrices', 1), p.size(-1)

    def _orthogonal(self, items, rows, columns):
        """`orthogonalize` of each matrix in the updates of items: every process does a share, all
        get all."""
        updates = [update.reshape(-1, rows, columns) for _, update in items]
        batch = torch.cat(updates).to(self.dtype)  # (N, rows, columns)
        if dist.is_initialized() and dist.get_world_size() > 1:
            n, world = len(batch), dist.get_world_size()
            share = -(-n // world)
            mine = batch.new_zeros(share, rows, columns)
            part = batch[dist.get_rank() * share :][:share]
            if len(part):
                mine[: len(part)] = orthogonalize(part)
            parts = [torch.empty_like(mine) for _ in range(world)]
            dist.all_gather(parts, mine)
            batch = torch.cat(parts)[:n]
        else:
            batch = orthogonalize(batch)
        return batch.split([len(update) for update in updates])


class ShardedMuon(Muon):
    """Muon whose matrices lie in shards: each process puts a share of them together, makes those
    orthogonal, and hands the shards back. None ever has more than its share, or one parameter where
    they are fewer than processes."""

    def _alike(self, p):
        return *super()._alike(p), p.shape

    def _orthogonal(self, items, rows, columns):
        world, shape = dist.get_world_size(), items[0][0].shape
        # parameters per process; rows per shard
        share, most = -(-len(items) // world), -(-shape[0] // world)
        # the last shards are shorter
        there = items[0][1].new_zeros(world * share, most, *shape[1:], dtype=self.dtype)
        for place, (_, update) in zip(there, items):
            place[: len(update)] = update
        here = torch.empty_like(there)
        dist.all_to_all_single(here, there)  # a share of the parameters, source by source
        whole = (
            here.view(world, share, *there.shape[1:])
            .transpose(0, 1)
            .reshape(share, world * most, *shape[1:])
        )
        batch = whole[:, : shape[0]]
        batch.copy_(orthogonalize(batch.reshape(-1, rows, columns)).view(batch.shape))
        here = whole.view(share, world, *there.shape[1:]).transpose(0, 1).contiguous()
        dist.all_to_all_single(there, here)
        return [place[: len(update)] for place, (_, update) in zip(there, items)]


@torch.no_grad()
def limit_rows(matrices, most, skip=None):
    """Scale the rows of `matrices`, in place, that are longer than `most` (Euclidean norm) down to
    it; not where the tensor `skip` holds 1."""
    for p in map(_local, matrices):
        limited = p.renorm(2, 0, most)
        p.copy_(limited if skip is None else torch.where(skip > 0, p, limited))


def orthogonalize(batch, steps=5):
    """The nearest orthogonal matrix to each of batch (N, rows, columns), roughly: all but the
    smallest singular values become 0.7 to 1.2.

    Newton-Schulz iteration of fifth order with Jordan's coefficients, which give up exactness for
    speed.
    """
    is_tall = batch.size(-2) > batch.size(-1)
    x = batch.mT if is_tall else batch
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(
            x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445
        )
    return x.mT if is_tall else x


def schedule(
    step,
    peak,
    floor,
    warmup_steps,
    decay_steps,
    decay=True,
    cooldown=0.0,
    start=0.0,
    shape='cosine',
):
    """The learning rate at `step`: linear warm-up from `start` to `peak`, then down to `floor` at
    decay_steps, then floor.

    shape: 'cosine', half of one, or 'step', all at once at decay_steps. cooldown: above 0, `peak`
    is kept and falls in a straight line over this last share of decay_steps. Without `decay` it is
    `peak` throughout.
    """
    if not decay:
        return peak
    if step < warmup_steps:
        return start + (peak - start) * (step + 1) / (warmup_steps + 1)
    if step >= decay_steps:
        return floor
    if shape == 'step':
        return peak
    if cooldown:
        return floor + (peak - floor) * min(1, (decay_steps - step) / (cooldown * decay_steps))
    progress = (step - warmup_steps) / (decay_steps - warmup_steps)
    return floor + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - floor)


def load(optimizer, state):
    """Load a state_dict's moments; the options stay this run's. Raises ValueError where it is
    another model's, or none."""
    if not state:
        raise ValueError(
            "the checkpoint holds weights only, not the state of a run: start from it with --init_from"
        )
    options = [
        {k: v for k, v in group.items() if k != 'params'} for group in optimizer.param_groups
    ]
    try:
        theirs, ours = (
            [
                (len(group['params']), group.get('muon', False), 'momentum' in group)
                for group in groups
            ]
            for groups in (state['param_groups'], optimizer.param_groups)
        )
    except (LookupError, TypeError, AttributeError):
        raise ValueError(
            "the checkpoint's optimizer state is damaged: its groups are none"
        ) from None
    if theirs != ours:
        raise ValueError(
            "the checkpoint's optimizer state does not fit: it is another model's, or another optimizer's, or "
            "one of muon_lr, embed_lr and head_lr was 0 and is not now, or the other way round; leave them"
        )
    groups = [{**group, **own} for group, own in zip(state['param_groups'], options, strict=True)]
    try:
        optimizer.load_state_dict({**state, 'param_groups': groups})
        is_sound = all(
            set(own) in MOMENTS
            and all(x is None or x.shape == p.shape for k, x in own.items() if k != 'step')
            for p, own in optimizer.state.items()
            if own
        )
    except (LookupError, TypeError, AttributeError):
        is_sound = False
    if not is_sound:  # a fused kernel would read beyond the end of one that is too short
        raise ValueError(
            "the checkpoint's optimizer state is damaged: its moments are not those of the weights"
        )
