"""Train a model on text: one process, or many with torchrun.

python train.py config/train_stdlib_char.py                               # a first run, no download
python train.py config/train_shakespeare_char.py --batch_size=32          # the command line wins
python train.py config/train_shakespeare_char.py --init_from=auto         # go on where it stopped, or start
torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py    # one node, 8 GPUs
"""

import time

from system.errors import begin_script

_start = time.perf_counter()  # before the imports: they are part of what a user waits for
begin_script()  # also before them: Ctrl-C is one line from here on

import dataclasses
import math
import sys

import torch

import models
from configurator import configure
from generation import final_sample
from models.parts import kernels
from system.compilation import compile_model, resolve_compile
from system.device import (
    autocast,
    library_versions,
    make_profiler,
    memory_errors,
    peak_flops,
    peak_memory,
    resolve_device,
    resolve_dtype,
    seed_everything,
    set_threads,
    to_device,
    tune_for_speed,
    use_deterministic_algorithms,
)
from system.errors import user_errors
from text.mixture import open_dataset, prepare_if_small
from training import checkpoint, distributed, lora, pretrained, resume
from training import guard as guards
from training.console import Console, evaluation_table, plan, progress_bar
from training.metrics import Metrics, Stopwatch, logger_names
from training.schedule import learning_rate_at
from training.settings import check_settings, out_of_memory_advice
from training.stop import StopRequest
from training.watch import Watch

# ---- settings: the defaults train GPT-2 124M on OpenWebText --------------------------------------
out_dir = 'out'  # where checkpoints, metrics.jsonl and config.json go
init_from = 'scratch'  # scratch, resume, auto (either), gpt2[-medium|-large|-xl], or a folder
seed = 1337  # of initialisation, order of the data and dropout
eval_interval = 2000  # steps between evaluations; each one saves a checkpoint; 0: only at the end
eval_iters = 200  # batches per evaluation and split, or the whole split where that is less
eval_only = False  # evaluate once and end
log_interval = 1  # steps between lines of the log
always_save_checkpoint = True  # True: sample.py uses the latest weights; False: the best ones
save_minutes = 15.0  # also save after so many minutes without a save; 0: at evaluations only
early_stop = 0  # end after so many evaluations in a row without a better validation loss; 0: never
log_to = ''  # besides metrics.jsonl: tensorboard, wandb, or both: tensorboard,wandb
wandb_log = False  # nanoGPT's name for log_to=wandb
wandb_project = 'owt'  # the project at Weights & Biases
wandb_run_name = 'gpt2'  # and the name of the run there
dataset = 'openwebtext'  # a folder in data/ or a path; several: a:0.7,b:0.3; random: random tokens
gradient_accumulation_steps = 5 * 8  # micro-batches per step, over all processes together
batch_size = 12  # windows per micro-batch
block_size = 1024  # tokens per window, the longest context
document_boundaries = False  # attention and positions start anew at each document
# model
model = 'gpt'  # gpt, or NAME for models/NAME.py; its Config's other fields are settings too
n_layer = 12  # blocks
n_head = 12  # attention heads
n_embd = 768  # channels
dropout = 0.0  # 0 for pretraining; for finetuning try 0.1
bias = False  # in Linears and LayerNorms
lora_rank = 0  # finetuning: train a low-rank update of each matrix instead; 0: all weights
# the optimizer and its learning rate
optimizer = 'adamw'  # adamw, or sgd, whose momentum is beta1
learning_rate = 6e-4  # the optimizer's, after the warm-up
muon_lr = 0.0  # of the matrices, by Muon; 0: by AdamW like the rest
embed_lr = 0.0  # of embeddings, if the model were 768 wide; 0: learning_rate
head_lr = 0.0  # of an untied head, if the model were 768 wide; 0: learning_rate
max_iters = 600000  # steps in all
weight_decay = 1e-1  # of matrices and embeddings
beta1 = 0.9  # decay rate of the gradient's average
beta2 = 0.95  # decay rate of its square's
grad_clip = 1.0  # longest gradient; 0: no limit
spike_sigmas = 6.0  # skip updates whose loss is so many deviations above its average; 0: NaN only
max_norm = 0.0  # limit on the norm of each row of a matrix (not embeddings); 0: none
decay_lr = True  # down to min_lr after a linear warm-up; False: constant
lr_schedule = 'cosine'  # how: cosine; step: all at once at lr_decay_iters
cooldown = 0.0  # final share of lr_decay_iters that decays linearly; 0: cosine
warmup_iters = 2000  # steps of the warm-up
warmup_lr = 0.0  # what it rises from
lr_decay_iters = 600000  # step at which min_lr is reached; usually max_iters
min_lr = 6e-5  # usually learning_rate / 10; rates of their own fall by the same factor
# the machine
device = 'auto'  # cpu, cuda, cuda:1, mps, or auto: the fastest; when resuming, the run's own
dtype = 'auto'  # auto, float32, bfloat16, float16 (with loss scaling)
compile = 'auto'  # True, False, or auto: where the run is long enough to pay for it
backend = 'auto'  # between processes: auto, nccl, gloo
parallel = 'ddp'  # of several processes each has the whole model; fsdp: each has a part of it
attention = 'auto'  # auto (fastest here), sdpa, plain
gradient_checkpointing = False  # recompute activations in backward: less memory, 1/3 more time
deterministic = False  # bit-identical repeats on CUDA too; slower
watch = False  # draw network health (dead units, gradients, update sizes) to out_dir/health.png
profile = False  # trace steps 10 to 15 into out_dir/profile, for TensorBoard or chrome://tracing
# --------------------------------------------------------------------------------------------------

with user_errors():
    config, given = configure(globals(), sys.argv[1:], resolve_device, resume.model_config)
    init_from, stored = resume.begin(init_from, out_dir)
    config['init_from'] = init_from
    if stored:
        globals().update(resume.adopt_run_settings(config, given, stored, out_dir))
check_settings(config, distributed.WORLD_SIZE)

# ---- the machine ---------------------------------------------------------------------------------
with distributed.exit_on_lost_peer(), user_errors():
    use_deterministic_algorithms(deterministic)
    recorded = stored.get('resolved', {}) if stored else {}  # what 'auto' meant before
    device = resolve_device(device, recorded.get('device'))
    device = distributed.init(backend, device, parallel)
    device_type = device.split(':')[0]
    before = recorded if recorded.get('device') == device_type else {}
    dtype = resolve_dtype(before.get('dtype', dtype) if dtype == 'auto' else dtype, device)
    compile = resolve_compile(
        before.get('compile', compile) if compile == 'auto' else compile, device
    )
    kernels.check_attention(attention)
    distributed.check_same_checkpoint(out_dir, stored['iter_num'] if stored else 0)
    wanted = logger_names(log_to, wandb_log)
threads = set_threads(before.get('threads'))
tune_for_speed()
ctx = autocast(device, dtype)

# ---- data, model, optimizer ----------------------------------------------------------------------
with (
    distributed.exit_on_lost_peer(),
    user_errors(),
    memory_errors("take a smaller model, or a larger machine"),
):
    with distributed.master_first():
        prepare_if_small(dataset)
    seed_everything(seed, 1, device=device)
    if stored:
        model, trained_on = pretrained.restore_model(
            stored, config, distributed.IS_LAUNCHED and parallel == 'fsdp'
        )
    elif init_from != 'scratch':
        model, trained_on = pretrained.open_model(init_from, {key: config[key] for key in given})
        kept = {'model': models.name_of(model)} | dataclasses.asdict(model.config)
        globals().update(
            resume.adopt_settings(config, given, kept, init_from, models.FREE | {'block_size'})
            | {'model': model}
        )
        if block_size != model.config.block_size:
            model.crop_block_size(block_size)
    data = open_dataset(dataset, block_size, batch_size, gradient_accumulation_steps, seed)
    data.check_evaluations(eval_iters)  # now, and not after hours of training
    if init_from == 'scratch':
        vocab_size = resume.padded_vocab_size(data.vocab_size)
        fields = {
            f.name for f in dataclasses.fields(models.architecture(model).Config)
        } & config.keys()
        model, trained_on = (
            models.build(model, vocab_size=vocab_size, **{k: config[k] for k in fields}),
            data.tokenizer,
        )
    resume.check_tokenizer(model, trained_on, data, out_dir if stored else init_from)
    if document_boundaries or 'document_boundaries' in given:  # else as the model was trained
        model.keep_documents_apart(data.eot if document_boundaries else -1)
    lora.add(model, lora_rank, init_from)
    model.set_attention(attention)
    model.gradient_checkpointing = gradient_checkpointing
    wrapped, micros = (
        distributed.wrap_model(model, device, parallel),
        distributed.rank_range(gradient_accumulation_steps),
    )
    optimizer = model.configure_optimizers(
        weight_decay,
        learning_rate,
        (beta1, beta2),
        device_type,
        dict(matrix=muon_lr, embedding=embed_lr, head=head_lr),
        bfloat16=dtype == 'bfloat16',
        is_lr_given=given.get('learning_rate') == 'command line',
        name=optimizer,
        max_norm=max_norm,
    )
    scaler = torch.amp.GradScaler(device_type, enabled=dtype == 'float16')
    iter_num, best_val_loss, progress = resume.load_training_state(stored, model, optimizer, scaler)
guessing = math.log(model.config.vocab_size)
guard, stop = guards.Guard(spike_sigmas, guessing, progress.guard), None
_start -= progress.wall_seconds
del stored  # its tensors are in the model and the optimizer now


def micro_step(step, micro):
    """Forward and backward of one micro-batch; returns its part of the step's loss."""
    idx, targets, share = data.train_batch(step + progress.data_offset, micro)
    seed_everything(seed, step + 1, micro + 1, device=device)
    with ctx:
        _, loss = wrapped(*to_device(device, idx, targets))
    # averaged over processes: now it is the sum
    scaler.scale(loss * share * distributed.WORLD_SIZE).backward()
    return loss.detach() * share


@torch.no_grad()
def evaluate(split, limit=None):
    """The mean loss (nats per token) over `limit` batches of the split, or all, which the processes
    share."""
    model.eval()
    losses, n = [], data.eval_batches(split, limit)
    for i in progress_bar(
        range(distributed.RANK, n + -n % distributed.WORLD_SIZE, distributed.WORLD_SIZE),
        f'{split} loss',
    ):
        # as many for each: FSDP's meet in them
        idx, targets, valid = data.eval_batch(split, min(i, n - 1), limit)
        with ctx:
            losses.append((model(*to_device(device, idx, targets))[1], valid if i < n else 0))
        if stop and distributed.any_rank(bool(stop.signal)):
            break
    model.train()
    loss, tokens = distributed.sum_over_ranks(
        [sum(loss.item() * n for loss, n in losses), sum(n for _, n in losses)]
    )
    return loss / tokens if tokens else math.nan


def report_skipped_update(step):
    """Print and log the update of `step` if the guard finds now that it was skipped."""
    skipped = guard.last_skipped()
    if skipped:
        n_skipped = guard.now.skipped
        console.skipped_update(step, skipped.loss, skipped.reason, n_skipped)
        metrics.log(dict(iter=step, bad_loss=skipped.loss, skipped=n_skipped))


def state():
    """What a resumed run and sample.py need, besides the tensors."""
    now = dataclasses.replace(
        progress,
        wall_seconds=time.perf_counter() - _start,
        train_seconds=clock.total,
        wandb_id=metrics.wandb_id,
        clipped=int(watcher.clipped),
        guard=guard.state(),
    )
    return dict(
        scaler=scaler.state_dict(),
        model_name=config['model'],
        model_args=dataclasses.asdict(model.config),
        config=config,
        iter_num=iter_num,
        best_val_loss=best_val_loss,
        progress=dataclasses.asdict(now),
        versions=library_versions(),
        template=data.meta.get('template'),
        tokenizer=data.tokenizer,
        resolved=dict(device=device_type, dtype=dtype, compile=compile, threads=threads),
    )


def save(name):
    """Write out_dir/ckpt.pt, from which the run can go on, or best.pt, the weights alone."""
    global saved_at
    tensors = distributed.checkpoint_tensors(
        model, optimizer if name == 'ckpt.pt' else None, out_dir, iter_num
    )
    if distributed.IS_MASTER:
        checkpoint.save(out_dir, name, state() | tensors)
    saved_at = time.monotonic()


def roll_back():
    """The run has diverged: continue from its newest checkpoint, past the data that led here.

    Raises ValueError if this was tried before, or if there is no checkpoint. In the second case the
    weights are saved first, unless they are NaN or infinite.
    """
    global iter_num, progress, guard
    stored = resume.begin('auto', out_dir)[1]
    # all have read it before the master saves
    distributed.check_same_checkpoint(out_dir, stored and stored['iter_num'])
    if not stored:
        if distributed.any_rank(not guards.all_finite(model.parameters())):
            raise ValueError(
                f"the run diverged before step {iter_num} and had no checkpoint to go back to; its weights "
                f"are NaN, so nothing is saved: {guards.ADVICE}"
            )
        guard.accept_state()
        save('ckpt.pt')
        raise ValueError(
            f"the run diverged before step {iter_num} and had no checkpoint to go back to; its last finite "
            f"weights, which may be damaged already, are in {out_dir}/ckpt.pt: {guards.ADVICE}"
        )
    stored = guards.skip_data(stored, progress, iter_num, out_dir)
    optimizer.zero_grad(set_to_none=True)
    # best.pt is still the best
    iter_num, _, progress = resume.load_training_state(stored, model, optimizer, scaler)
    guard = guards.Guard(spike_sigmas, guessing, progress.guard)
    metrics.rewind(iter_num, progress)
    console.rewind(iter_num, progress)
    save('ckpt.pt')
    clock.go_on()


# ---- what will be done ---------------------------------------------------------------------------
tokens_per_step = gradient_accumulation_steps * data.batch_tokens
peak = peak_flops(device, dtype)
if model.fit:
    max_iters, tokens_per_step = 1, data.epoch_tokens  # one pass, which counts
distributed.print0(
    plan(config, model, data, tokens_per_step, max_iters, iter_num, (device_type, dtype, threads))
)
advice = out_of_memory_advice(batch_size, gradient_accumulation_steps)
is_over = progress.evaluated == iter_num and (
    iter_num >= max_iters > 0 or 0 < early_stop <= progress.bad_evals
)
if eval_only or is_over:
    with distributed.exit_on_lost_peer(), user_errors(), memory_errors(advice):
        losses = {split: evaluate(split, eval_iters) for split in ('train', 'val') if eval_only}
    name = f'{out_dir}, step {iter_num}' if init_from == 'resume' else init_from
    distributed.print0(
        evaluation_table(name, model, losses, data)
        if eval_only
        else f"{name}: this run is at its end"
        + ("" if model.fit else "; to go on, give a larger --max_iters (or --early_stop)")
    )
    del wrapped
    distributed.shutdown()
    sys.exit()
with distributed.exit_on_lost_peer(), user_errors(), memory_errors(advice):
    # held while this runs
    lock = distributed.IS_MASTER and checkpoint.make_out_dir(out_dir, init_from)
    if compile and not model.fit:
        distributed.set_gradient_sync(wrapped, False)
        compile = compile_model(
            model,
            distributed.parts_to_compile(model),
            mode=compile,
            is_required=config['compile'] is True,
            try_step=lambda: micro_step(0, micros[0]),
            steps=len(micros) * (max_iters - iter_num),
            device=device,
            any_rank=distributed.any_rank,
        )
    facts = dict(
        n_params=model.num_params(),
        tokens_per_step=tokens_per_step,
        device=device,
        dtype=dtype,
        threads=threads,
        compile=compile,
        processes=distributed.WORLD_SIZE,
        flops_per_token=model.flops_per_token(block_size),
    )
    metrics = Metrics(out_dir, distributed.IS_MASTER, iter_num, progress.evaluated)
    metrics.start(config | {'resolved': facts}, wanted, progress.wandb_id)
    console = Console(distributed.IS_MASTER, max_iters, iter_num)
    watcher = Watch(
        watch and distributed.IS_MASTER, model, out_dir, grad_clip, ctx, data, progress.clipped
    )

# ---- the loop ------------------------------------------------------------------------------------
stop = StopRequest()
with distributed.exit_on_lost_peer(), user_errors(), memory_errors(advice):
    clock, saved_at = Stopwatch(device, progress.train_seconds), time.monotonic()
    profiler = make_profiler(profile and distributed.IS_MASTER and f'{out_dir}/profile', device)
    while True:  # evaluate, and save
        is_stopped, is_late = distributed.any_rank_each(
            [bool(stop.signal), 0 < 60 * save_minutes < time.monotonic() - saved_at]
        )
        is_last, is_round = iter_num >= max_iters, eval_interval and not iter_num % eval_interval
        is_due = (is_last or is_round) and progress.evaluated != iter_num and not is_stopped
        if is_pause := is_due or is_stopped or is_late:
            clock.pause()
            report_skipped_update(iter_num - 1)
            # a NaN may be the first of many
            is_stopped = is_stopped and (is_last or guard.last_was_finite)
            with ctx:
                model.calibrate(data.train_batch(i, 0)[:2] for i in range(eval_iters))
        if guard.has_diverged:
            roll_back()
            continue
        if is_due:
            losses = {split: evaluate(split, eval_iters) for split in ('train', 'val')}
            is_best = losses['val'] < best_val_loss  # over the same windows each time
            best, bad_evals = (
                min(best_val_loss, losses['val']),
                0 if is_best else progress.bad_evals + 1,
            )
            is_last = is_last or 0 < early_stop <= bad_evals
            losses['val'] = evaluate('val') if is_last else losses['val']
            # it may have been cut off: the run that goes on evaluates again
            if distributed.any_rank(bool(stop.signal)):
                clock.go_on()
                continue
            best_val_loss = best
            progress.evaluated = iter_num
            progress.bad_evals = bad_evals
            evaluation = dict(
                iter=iter_num,
                tokens=iter_num * tokens_per_step,
                train_loss=losses['train'],
                val_loss=losses['val'],
                val_bpb=data.bits_per_byte('val', losses['val']),
                train_seconds=clock.total,
                wall_seconds=time.perf_counter() - _start,
            )
            console.evaluation(evaluation)
            metrics.log(evaluation)
            metrics.histograms(iter_num, watcher.draw(iter_num))
            guard.evaluated(iter_num, losses['val'])
            is_last = is_last and not guard.has_diverged
            if is_best and iter_num > 0:
                save('best.pt')
        if is_pause:
            if (is_last or guard.last_was_finite) and (iter_num > 0 or not is_due):
                save('ckpt.pt')
            clock.go_on()
        if is_due and not is_last and (problem := guard.divergence(iter_num)):
            save('ckpt.pt')
            raise ValueError(
                f"{problem}; {out_dir}/ckpt.pt has the state of step {iter_num}, best.pt (if there is one) "
                f"the best weights: {guards.ADVICE}"
            )
        if is_stopped:
            console.stopped(out_dir, iter_num)
            if distributed.IS_MASTER:
                checkpoint.mark_preempted(out_dir, iter_num)
        if is_stopped or is_last:
            break
        if model.fit:
            model.fit(data.epoch())
            iter_num = max_iters
            continue

        # one step
        lr = learning_rate_at(
            iter_num,
            peak=learning_rate,
            floor=min_lr,
            warmup_steps=warmup_iters,
            decay_steps=lr_decay_iters,
            decay=decay_lr,
            cooldown=cooldown,
            start=warmup_lr,
            shape=lr_schedule,
        )
        for group in optimizer.param_groups:
            group['lr'] = lr * group['lr_ratio']
        loss = 0.0
        for micro in micros:
            distributed.set_gradient_sync(wrapped, micro == micros[-1])
            loss = loss + micro_step(iter_num, micro)
        loss, grad_norm = distributed.all_reduce_sum(loss), None
        report_skipped_update(iter_num - 1)  # the step before
        if guard.has_diverged:
            continue
        scaler.unscale_(optimizer)
        is_logged = iter_num % log_interval == 0
        watcher.before_step(is_logged)
        if grad_clip or is_logged:
            grad_norm = distributed.clip_gradients(model, grad_clip or math.inf)
            watcher.count_clipped(grad_norm)
        guard.skip_if_bad(optimizer, scaler, loss, grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        model.after_step()
        iter_num += 1
        clock.step()

        if is_logged:
            took = clock.lap()
            line = dict(
                iter=iter_num - 1,
                loss=loss.item(),
                lr=lr,
                grad_norm=grad_norm.item(),
                ms=1e3 * took,
                tokens_per_second=tokens_per_step / took,
                peak_memory=peak_memory(device),
                mfu=peak
                and model.estimate_mfu(tokens_per_step / took, peak * distributed.WORLD_SIZE),
            )
            line |= watcher.after_step(line)
            metrics.log(line)
        console.step(line if is_logged else None, max_iters - iter_num)
        profiler.step()

# ---- the end -------------------------------------------------------------------------------------
console.close()
metrics.close()
del wrapped
distributed.shutdown()
if is_stopped:
    sys.exit(stop.exit_code)
stop.release()  # all is saved: Ctrl-C ends the sample
if distributed.IS_MASTER and not (distributed.IS_LAUNCHED and parallel == 'fsdp'):
    with ctx:
        final_sample.print_final_sample(
            lora.merge(model), data.tokenizer, data.opening(), out_dir, data.meta
        )
