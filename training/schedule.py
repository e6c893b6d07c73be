"""The learning rate of each step: a linear warm-up, then a decay whose shape has a name in SHAPES.

A new shape is a function beside `cosine` and its line in SHAPES; train.py selects it by
--lr_schedule.
"""

import math


def learning_rate_at(
    step,
    peak,
    floor,
    *,
    warmup_steps,
    decay_steps,
    decay=True,
    cooldown=0.0,
    start=0.0,
    shape='cosine',
):
    """The learning rate at `step`, which is counted from 0.

    It rises linearly from `start` to `peak` in warmup_steps, then decays to `floor`, which it
    reaches at decay_steps and keeps.

    shape: a name in SHAPES. cooldown: see `cosine`. decay: False keeps `peak` from the first step
    to the last, without a warm-up.
    """
    if not decay:
        return peak
    if step < warmup_steps:
        return start + (peak - start) * (step + 1) / (warmup_steps + 1)
    if step >= decay_steps:
        return floor
    return SHAPES[shape](
        step,
        peak=peak,
        floor=floor,
        warmup_steps=warmup_steps,
        decay_steps=decay_steps,
        cooldown=cooldown,
    )


# Each shape is called for warmup_steps <= step < decay_steps and returns the learning rate.


def cosine(step, peak, floor, warmup_steps, decay_steps, cooldown):
    """Half a cosine from `peak` to `floor`.

    With a cooldown above 0 (Hägele et al. 2024, arXiv 2405.18392): `peak`, and over this last share
    of decay_steps a straight line to `floor`.
    """
    if cooldown:
        share = min(1, (decay_steps - step) / (cooldown * decay_steps))
    else:
        progress = (step - warmup_steps) / (decay_steps - warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * progress))
    return floor + share * (peak - floor)


def step_decay(step, peak, floor, warmup_steps, decay_steps, cooldown):
    """`peak` until decay_steps, where it drops to `floor` at once."""
    return peak


SHAPES = {'cosine': cosine, 'step': step_decay}
