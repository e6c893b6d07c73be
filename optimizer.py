"""From parameters by role to an optimizer, and the learning rate of every step."""
import math

import torch


def adamw(groups, weight_decay, learning_rate, betas, device_type):
    """AdamW over {role: [parameters]} in nanoGPT's two groups: what has two dimensions decays, vectors don't.

    Returns None where there is nothing to learn. Fused: one kernel for all parameters, measured faster on each device.
    """
    decay = [p for role in ('embedding', 'matrix', 'head') for p in groups.get(role, ())]
    groups = [dict(params=decay, weight_decay=weight_decay), dict(params=groups.get('vector', []), weight_decay=0.0)]
    if not any(group['params'] for group in groups):
        return None
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ('cuda', 'mps', 'cpu'))


def cosine_schedule(step, peak, floor, warmup_steps, decay_steps, decay=True):
    """The learning rate at `step`: linear warm-up to `peak`, half a cosine down to `floor` at decay_steps, then floor.

    Without `decay` it is `peak` throughout.
    """
    if not decay:
        return peak
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if step >= decay_steps:
        return floor
    progress = (step - warmup_steps) / (decay_steps - warmup_steps)
    return floor + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - floor)


def load(optimizer, state):
    """Load a state_dict's moments; the options stay this run's. Raises ValueError where the state is another model's."""
    options = [{k: v for k, v in group.items() if k != 'params'} for group in optimizer.param_groups]
    if [len(group['params']) for group in state['param_groups']] != [len(g['params']) for g in optimizer.param_groups]:
        raise ValueError("the checkpoint's optimizer state is another model's: its parameter groups have other sizes")
    groups = [{**group, **own} for group, own in zip(state['param_groups'], options, strict=True)]
    optimizer.load_state_dict({**state, 'param_groups': groups})
