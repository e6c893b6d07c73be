"""What train.py's settings may be, together."""

from system.checks import check_at_least, check_at_most
from system.errors import fail
from training import schedule


def check_settings(config, processes):
    """Fail where one of train.py's settings is out of its range."""
    check_at_least(
        1, config, 'batch_size block_size gradient_accumulation_steps eval_iters log_interval'
    )
    check_at_least(
        0,
        config,
        'seed eval_interval save_minutes early_stop learning_rate max_iters weight_decay grad_clip '
        'warmup_iters lr_decay_iters min_lr muon_lr embed_lr head_lr cooldown max_norm warmup_lr '
        'lora_rank spike_sigmas',
    )
    check_at_most(1, config, 'cooldown')
    check_at_most(
        1e30,
        config,
        'learning_rate min_lr muon_lr embed_lr head_lr warmup_lr weight_decay max_norm',
    )
    if config['gradient_accumulation_steps'] % processes:
        fail(
            f"gradient_accumulation_steps={config['gradient_accumulation_steps']} is not a multiple of {processes} "
            "processes"
        )
    if config['lr_schedule'] not in schedule.SHAPES:
        fail(
            f"lr_schedule={config['lr_schedule']!r} is unknown: use {' or '.join(schedule.SHAPES)}; "
            "for a linear decay, set --cooldown"
        )
    if config['parallel'] == 'fsdp' and config['watch']:
        fail("watch=True looks at whole weights: leave it out with parallel='fsdp'")


def out_of_memory_advice(batch_size, gradient_accumulation_steps):
    """What to do when training runs out of memory."""
    if batch_size == 1:
        return "take --gradient_checkpointing=True, or a smaller --block_size"
    return (
        f"halve --batch_size={batch_size} and double --gradient_accumulation_steps={gradient_accumulation_steps}: the "
        "result stays the same"
    )
