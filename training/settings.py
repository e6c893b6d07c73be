"""Checks of train.py's settings, before anything slow begins."""

from system.checks import check_at_least, check_at_most
from system.errors import fail
from training import schedule

AT_LEAST_1 = 'batch_size block_size gradient_accumulation_steps eval_iters log_interval'
AT_LEAST_0 = (
    'seed eval_interval save_minutes early_stop max_iters warmup_iters lr_decay_iters cooldown '
    'learning_rate min_lr muon_lr embed_lr head_lr warmup_lr weight_decay grad_clip max_norm '
    'lora_rank spike_sigmas'
)
# Products with these stay finite in float32.
AT_MOST_1E30 = 'learning_rate min_lr muon_lr embed_lr head_lr warmup_lr weight_decay max_norm'


def check_settings(config, world_size):
    """End the script if one of train.py's settings, or a combination of them, is invalid.

    config: {setting: value}. world_size: the number of processes that train.
    """
    check_at_least(1, config, AT_LEAST_1)
    check_at_least(0, config, AT_LEAST_0)
    check_at_most(1, config, 'cooldown')
    check_at_most(1e30, config, AT_MOST_1E30)

    accumulation = config['gradient_accumulation_steps']
    if accumulation % world_size:
        fail(
            f"gradient_accumulation_steps={accumulation} is not a multiple of {world_size} "
            "processes"
        )
    if config['lr_schedule'] not in schedule.SHAPES:
        known = ' or '.join(schedule.SHAPES)
        fail(
            f"lr_schedule={config['lr_schedule']!r} is unknown: use {known}; for a linear decay, "
            "set --cooldown"
        )
    if config['parallel'] == 'fsdp' and config['watch']:
        fail("watch=True needs whole weights, which parallel='fsdp' divides: set one of the two")


def out_of_memory_advice(batch_size, gradient_accumulation_steps):
    """What the user can do when training runs out of memory, as the end of an error message."""
    if batch_size == 1:
        return "set --gradient_checkpointing=True, or a smaller --block_size"
    return (
        f"halve --batch_size={batch_size} and double "
        f"--gradient_accumulation_steps={gradient_accumulation_steps}: the result stays the same"
    )
