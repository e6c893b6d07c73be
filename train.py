"""Train a model on text: one process, or many with torchrun.

    python train.py config/train_stdlib_char.py                         # a first run, no download
    python train.py config/train_shakespeare_char.py --batch_size=32    # the command line wins
    python train.py config/train_shakespeare_char.py --init_from=auto   # resume, or start
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py      # 8 GPUs

The script runs from top to bottom: settings, machine, data, model and optimizer, then one loop over
the steps, which also evaluates and saves.
"""

import time

from system.errors import begin_script

_start = time.perf_counter()  # before the imports that take seconds
begin_script()  # from here on, Ctrl-C ends the script with one line

import dataclasses
import math
import sys

import torch

import models
from configurator import configure
from generation.final_sample import print_final_sample
from models.parts import kernels
from system.compilation import compile_model
from system.device import (
    autocast,
    library_versions,
    make_profiler,
    peak_flops,
    peak_memory,
    resolve_device,
    seed_everything,
    to_device,
)
from system.errors import user_errors
from text.dataset_option import open_dataset, prepare_if_small
from training import checkpoint, distributed, lora, pretrained, resume
from training import guard as guards
from training.console import Console, evaluation_table, plan, progress_bar
from training.distributed import one_line_errors
from training.machine import open_machine
from training.metrics import Metrics, Stopwatch, logger_names
from training.schedule import learning_rate_at
from training.settings import check_settings, out_of_memory_advice
from training.stop import StopRequest
from training.watch import Watch

# ---- settings: the defaults train GPT-2 124M on OpenWebText --------------------------------------
# start, evaluation, checkpoints
out_dir = 'out'  # where checkpoints, metrics.jsonl and config.json go
init_from = 'scratch'  # scratch, resume, auto: either; gpt2[-medium|-large|-xl], a folder or file
seed = 1337  # of initialization, order of the data and dropout
eval_interval = 2000  # steps between evaluations, each followed by a save; 0: only at the end
eval_iters = 200  # batches per evaluation and split; a smaller split is evaluated whole
eval_only = False  # evaluate once, then exit
always_save_checkpoint = True  # True: sample.py loads the latest weights; False: the best
save_minutes = 15.0  # also save after this many minutes without a save; 0: only at evaluations
early_stop = 0  # stop after this many evaluations without a better validation loss; 0: never
# logs
log_interval = 1  # steps between lines of the log
log_to = ''  # besides metrics.jsonl: tensorboard, wandb, or both: tensorboard,wandb
wandb_log = False  # nanoGPT's name for log_to=wandb
wandb_project = 'owt'  # the project at Weights & Biases
wandb_run_name = 'gpt2'  # the name of the run there
# data
dataset = 'openwebtext'  # a folder in data/ or a path; several: a:0.7,b:0.3; random: random tokens
gradient_accumulation_steps = 5 * 8  # micro-batches per step, summed over processes
batch_size = 12  # windows per micro-batch
block_size = 1024  # tokens per window, the longest context
document_boundaries = False  # attention and positions start anew at each document
# model
model = 'gpt'  # gpt, or NAME for models/NAME.py; every field of its Config is a setting too
n_layer = 12  # blocks
n_head = 12  # attention heads
n_embd = 768  # channels
dropout = 0.0  # 0 for pretraining; for finetuning try 0.1
bias = False  # in Linears and LayerNorms
lora_rank = 0  # finetuning: rank of LoRA updates of the blocks' matrices; 0: train all weights
# optimizer
optimizer = 'adamw'  # adamw, or sgd, whose momentum is beta1
learning_rate = 6e-4  # the highest, after the warm-up
muon_lr = 0.0  # learning rate of Muon, for the matrices; 0: no Muon
embed_lr = 0.0  # for embeddings, times sqrt(768 / n_embd); 0: learning_rate
head_lr = 0.0  # for an untied head, times sqrt(768 / n_embd); 0: learning_rate
max_iters = 600000  # steps in total
weight_decay = 1e-1  # of matrices and embeddings
beta1 = 0.9  # decay rate of the gradient's average
beta2 = 0.95  # decay rate of the squared gradient's average
grad_clip = 1.0  # limit on the norm of the gradient; 0: none
spike_sigmas = 6.0  # skip updates this many sigmas above the average loss; 0: only NaN, infinity
max_norm = 0.0  # limit on the norm of each row of a matrix (not embeddings); 0: none
# learning rate
decay_lr = True  # warm up linearly, then decay to min_lr; False: constant
lr_schedule = 'cosine'  # shape of the decay: cosine; step: drops to min_lr at lr_decay_iters
cooldown = 0.0  # final share of lr_decay_iters that decays linearly; 0: none
warmup_iters = 2000  # steps of the warm-up
warmup_lr = 0.0  # where the warm-up starts
lr_decay_iters = 600000  # step at which min_lr is reached; usually max_iters
min_lr = 6e-5  # usually learning_rate / 10; muon_lr, embed_lr, head_lr decay in proportion
# machine
device = 'auto'  # cpu, cuda, cuda:1, mps, or auto: the fastest; a resumed run keeps its device
dtype = 'auto'  # auto, float32, bfloat16, float16 (with loss scaling)
compile = 'auto'  # True, False, or auto: if the run is long enough for it to save time
backend = 'auto'  # communication between processes: auto, nccl, gloo
parallel = 'ddp'  # ddp: each process has the whole model; fsdp: each has a part of it
attention = 'auto'  # auto (fastest here), sdpa, plain
gradient_checkpointing = False  # recompute activations in backward: less memory, 1/3 more time
deterministic = False  # bit-identical repeats on CUDA too; slower
watch = False  # draw network health (dead units, gradients, update sizes) to out_dir/health.png
profile = False  # trace steps 10 to 15 into out_dir/profile, for TensorBoard or chrome://tracing
# --------------------------------------------------------------------------------------------------


# Settings come from config files and the command line; a resumed run supplies the rest.
with user_errors():
    config, given = configure(
        dict(globals()),
        sys.argv[1:],
        resolve_device=resolve_device,
        config_class=resume.model_config,
    )
    config['init_from'], stored = resume.begin(config['init_from'], config['out_dir'])
    if stored:
        resume.adopt_run_settings(config, given, stored, config['out_dir'])
    check_settings(config, distributed.WORLD_SIZE)
globals().update(config)

with one_line_errors("use a smaller model, or a larger machine"):
    machine = open_machine(config, stored.get('resolved', {}) if stored else {})
    device = machine.device
    ctx = autocast(device, machine.dtype)

    # Find mistakes before the data is prepared, which may take hours.
    kernels.check_attention(attention)
    distributed.check_same_checkpoint(out_dir, stored['iter_num'] if stored else 0)
    wanted_loggers = logger_names(log_to, wandb_log)

    # ---- data and model --------------------------------------------------------------------------
    # `model` is the setting, a name; `network` is the module with the weights. `trained_on`
    # describes the tokenizer whose ids the network has learned, where that is known.
    with distributed.master_first():
        prepare_if_small(dataset)
    seed_everything(seed, 1, device=device)
    if stored:
        uses_fsdp = distributed.IS_LAUNCHED and parallel == 'fsdp'
        network, trained_on = pretrained.restore_model(stored, config, defer_shards=uses_fsdp)
    elif init_from != 'scratch':
        chosen = {key: config[key] for key in given}
        network, trained_on = pretrained.open_model(init_from, chosen)
        resume.adopt_model_settings(config, given, network, init_from)
        block_size = config['block_size']
        if block_size != network.config.block_size:
            network.crop_block_size(block_size)

    data = open_dataset(dataset, block_size, batch_size, gradient_accumulation_steps, seed)
    data.check_evaluations(eval_iters)  # now rather than after hours of training
    if init_from == 'scratch':
        fields = models.config_fields(model, config)
        fields['vocab_size'] = resume.padded_vocab_size(data.vocab_size)
        network = models.build(model, **fields)
        trained_on = data.tokenizer
    resume.check_tokenizer(network, trained_on, data, out_dir if stored else init_from)

    # Options that a trained network may change. An unset one keeps what it was trained with.
    if document_boundaries:
        network.keep_documents_apart(data.eot)
    elif 'document_boundaries' in given:
        network.keep_documents_apart(-1)
    lora.add(network, lora_rank, init_from)
    network.set_attention(attention)
    network.gradient_checkpointing = gradient_checkpointing

    # ---- optimizer -------------------------------------------------------------------------------
    wrapped = distributed.wrap_model(network, device, parallel)  # by DDP or FSDP, under torchrun
    opt = network.configure_optimizers(
        weight_decay,
        learning_rate,
        (beta1, beta2),
        machine.device_type,
        lrs=dict(matrix=muon_lr, embedding=embed_lr, head=head_lr),
        bfloat16=machine.dtype == 'bfloat16',
        is_lr_given=given.get('learning_rate') == 'command line',
        name=optimizer,
        max_norm=max_norm,
    )
    scaler = torch.amp.GradScaler(machine.device_type, enabled=machine.dtype == 'float16')
    iter_num, best_val_loss, progress = resume.load_training_state(stored, network, opt, scaler)

del stored  # its tensors are now in the network and the optimizer
_start -= progress.wall_seconds  # the time of earlier runs counts too
loss_of_guessing = math.log(network.config.vocab_size)
guard = guards.Guard(spike_sigmas, loss_of_guessing, progress.guard)
micros = distributed.rank_range(gradient_accumulation_steps)  # this process's micro-batches
tokens_per_step = gradient_accumulation_steps * data.batch_tokens
if network.fit:  # a counted model reads the data once
    max_iters = 1
    tokens_per_step = data.epoch_tokens


# ---- what the loop is made of --------------------------------------------------------------------


def micro_step(step, micro):
    """Forward and backward pass of one micro-batch; returns its part of the step's loss."""
    idx, targets, share = data.train_batch(step + progress.data_offset, micro)
    # Dropout depends on seed, step and micro-batch alone, so a resumed run repeats it. (The last
    # key of seed_everything must not be 0.)
    seed_everything(seed, step + 1, micro + 1, device=device)
    with ctx:
        _, loss = wrapped(*to_device(device, idx, targets))
    # share: this micro-batch's part of the step's targets. DDP averages gradients over the
    # processes; times WORLD_SIZE, the average becomes the sum.
    scaler.scale(loss * share * distributed.WORLD_SIZE).backward()
    return loss.detach() * share


@torch.no_grad()
def evaluate(split, limit=None, stop=None):
    """The mean loss of a split, in nats per token, over `limit` batches, or all of them.

    The processes share the batches. A signal that `stop` receives ends the evaluation early.
    """
    network.eval()
    n_batches = data.eval_batches(split, limit)
    # Each process evaluates equally many batches, since FSDP's processes work together on each one.
    # Surplus batches have weight 0.
    n_rounds = math.ceil(n_batches / distributed.WORLD_SIZE)
    losses = []
    n_targets_of = []
    for i in progress_bar(range(n_rounds), f'{split} loss'):
        number = i * distributed.WORLD_SIZE + distributed.RANK
        idx, targets, n_targets = data.eval_batch(split, min(number, n_batches - 1), limit)
        if number >= n_batches:
            n_targets = 0
        with ctx:
            _, loss = network(*to_device(device, idx, targets))
        losses.append(loss)
        n_targets_of.append(n_targets)
        if stop and distributed.any_rank(bool(stop.signal)):
            break
    network.train()

    total = sum(loss.item() * n for loss, n in zip(losses, n_targets_of))
    total, n_targets = distributed.sum_over_ranks([total, sum(n_targets_of)])
    return total / n_targets if n_targets else math.nan


def evaluate_and_log():
    """Evaluate both splits, log the losses, and save the best weights.

    Returns False if a signal cut it off; the resumed run then evaluates again.
    """
    global best_val_loss
    losses = {split: evaluate(split, eval_iters, stop) for split in ('train', 'val')}
    val_loss = losses['val']
    is_best = val_loss < best_val_loss  # both are over the same windows
    bad_evals = 0 if is_best else progress.bad_evals + 1
    if iter_num >= max_iters or 0 < early_stop <= bad_evals:
        val_loss = evaluate('val', stop=stop)  # at the end, over the whole split
    if distributed.any_rank(bool(stop.signal)):
        return False

    best_val_loss = min(best_val_loss, losses['val'])
    progress.evaluated = iter_num
    progress.bad_evals = bad_evals
    record = dict(
        iter=iter_num,
        tokens=iter_num * tokens_per_step,
        train_loss=losses['train'],
        val_loss=val_loss,
        val_bpb=data.bits_per_byte('val', val_loss),
        train_seconds=clock.total,
        wall_seconds=time.perf_counter() - _start,
    )
    console.evaluation(record)
    metrics.log(record)
    metrics.histograms(iter_num, watcher.draw(iter_num))
    guard.evaluated(iter_num, val_loss)
    if is_best and iter_num > 0:
        save('best.pt')
    return True


def is_at_end():
    """Whether all steps are done, or the last evaluation has stopped the run early."""
    if iter_num >= max_iters:
        return True
    return progress.evaluated == iter_num and 0 < early_stop <= progress.bad_evals


def save(name):
    """Write out_dir/ckpt.pt, from which the run can resume; or best.pt, without the optimizer."""
    global saved_at
    opt_to_save = opt if name == 'ckpt.pt' else None
    # With FSDP, each process takes part in this.
    tensors = distributed.checkpoint_tensors(network, opt_to_save, out_dir, iter_num)
    if distributed.IS_MASTER:
        checkpoint.save(out_dir, name, state_to_save() | tensors)
    saved_at = time.monotonic()


def state_to_save():
    """What a resumed run and sample.py need, besides the tensors of network and optimizer."""
    progress_now = dataclasses.replace(
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
        model_args=dataclasses.asdict(network.config),
        config=config,
        iter_num=iter_num,
        best_val_loss=best_val_loss,
        progress=dataclasses.asdict(progress_now),
        versions=library_versions(),
        template=data.meta.get('template'),
        tokenizer=data.tokenizer,
        resolved=machine.resolved(),
    )


def report_skipped_update(step):
    """Print and log that the guard skipped the update of `step`, if it did."""
    skipped = guard.last_skipped()
    if skipped:
        n_skipped = guard.now.skipped
        console.skipped_update(step, skipped.loss, skipped.reason, n_skipped)
        metrics.log(dict(iter=step, bad_loss=skipped.loss, skipped=n_skipped))


def roll_back():
    """The run has diverged: continue from its newest checkpoint, past the data that led here.

    Raises ValueError if this was tried before, or if there is no checkpoint. In the second case the
    weights are saved first, unless they are NaN or infinite.
    """
    global iter_num, progress, guard
    _, stored = resume.begin('auto', out_dir)
    # This waits until all processes have read the checkpoint, before the master replaces it.
    distributed.check_same_checkpoint(out_dir, stored and stored['iter_num'])
    if not stored:
        problem = f"the run diverged before step {iter_num} and had no checkpoint to go back to"
        if distributed.any_rank(not guards.all_finite(network.parameters())):
            raise ValueError(
                f"{problem}; its weights are NaN, so nothing is saved: {guards.ADVICE}"
            )
        guard.accept_state()
        save('ckpt.pt')
        raise ValueError(
            f"{problem}; its last finite weights, which may be damaged already, are in "
            f"{out_dir}/ckpt.pt: {guards.ADVICE}"
        )

    stored = guards.skip_data(stored, progress, iter_num, out_dir)
    opt.zero_grad(set_to_none=True)
    # best_val_loss stays, since best.pt is not rolled back.
    iter_num, _, progress = resume.load_training_state(stored, network, opt, scaler)
    guard = guards.Guard(spike_sigmas, loss_of_guessing, progress.guard)
    metrics.rewind(iter_num, progress)
    console.rewind(iter_num, progress)
    save('ckpt.pt')
    clock.go_on()


# ---- before the loop -----------------------------------------------------------------------------
distributed.print0(
    plan(
        config,
        network,
        data,
        machine,
        tokens_per_step=tokens_per_step,
        max_iters=max_iters,
        iter_num=iter_num,
    )
)
memory_advice = out_of_memory_advice(batch_size, gradient_accumulation_steps)

# Some runs have nothing to train.
is_over = progress.evaluated == iter_num and is_at_end() and max_iters > 0
if eval_only or is_over:
    name = f'{out_dir}, step {iter_num}' if init_from == 'resume' else init_from
    if eval_only:
        with one_line_errors(memory_advice):
            losses = {split: evaluate(split, eval_iters) for split in ('train', 'val')}
        distributed.print0(evaluation_table(name, network, losses, data))
    else:
        advice = '' if network.fit else "; to continue, set a larger --max_iters (or --early_stop)"
        distributed.print0(f"{name}: this run is at its end{advice}")
    del wrapped  # it keeps the processes' group alive, which shutdown closes
    distributed.shutdown()
    sys.exit()

with one_line_errors(memory_advice):
    if distributed.IS_MASTER:
        lock = checkpoint.make_out_dir(out_dir, init_from)  # held until the process ends
    if machine.compile_mode and not network.fit:
        distributed.set_gradient_sync(wrapped, False)  # compile_model runs trial steps
        machine.compile_mode = compile_model(
            network,
            distributed.parts_to_compile(network),
            mode=machine.compile_mode,
            is_required=compile is True,
            try_step=lambda: micro_step(0, micros[0]),
            steps=len(micros) * (max_iters - iter_num),
            device=device,
            any_rank=distributed.any_rank,
        )

    # The master logs; in the other processes these objects do nothing.
    facts = dict(
        n_params=network.num_params(),
        tokens_per_step=tokens_per_step,
        device=device,
        dtype=machine.dtype,
        threads=machine.threads,
        compile=machine.compile_mode,
        processes=distributed.WORLD_SIZE,
        flops_per_token=network.flops_per_token(block_size),
    )
    metrics = Metrics(out_dir, distributed.IS_MASTER, iter_num, progress.evaluated)
    metrics.start(config | {'resolved': facts}, wanted_loggers, progress.wandb_id)
    console = Console(distributed.IS_MASTER, max_iters, iter_num)
    watcher = Watch(
        watch and distributed.IS_MASTER,
        network,
        out_dir,
        grad_clip,
        ctx,
        data,
        clipped=progress.clipped,
    )
    trace_folder = ''
    if profile and distributed.IS_MASTER:
        trace_folder = f'{out_dir}/profile'
    profiler = make_profiler(trace_folder, device)
    peak = peak_flops(device, machine.dtype)

# ---- the loop ------------------------------------------------------------------------------------
stop = StopRequest()  # from here on, a signal is a request that the loop answers
with one_line_errors(memory_advice):
    clock = Stopwatch(device, progress.train_seconds)
    saved_at = time.monotonic()
    while True:
        # Between two steps: is anything due? If one process must stop or save, all of them do.
        minutes_unsaved = (time.monotonic() - saved_at) / 60
        stop_asked, save_asked = distributed.any_rank_each(
            [bool(stop.signal), 0 < save_minutes < minutes_unsaved]
        )
        is_eval_step = iter_num >= max_iters or (eval_interval and iter_num % eval_interval == 0)
        # When asked to stop, leave the evaluation to the resumed run.
        is_eval_due = is_eval_step and progress.evaluated != iter_num and not stop_asked
        must_pause = is_eval_due or stop_asked or save_asked
        if must_pause:
            clock.pause()  # train_seconds counts steps only
            report_skipped_update(iter_num - 1)
            with ctx:  # batch norm: statistics for evaluation and sampling
                network.calibrate(data.train_batch(i, 0)[:2] for i in range(eval_iters))
        if guard.has_diverged:
            roll_back()
            continue

        # Evaluate.
        if is_eval_due:
            is_complete = evaluate_and_log()
            if not is_complete or guard.has_diverged:
                clock.go_on()
                continue

        # Save. After a NaN, neither save nor stop: only later steps show whether the weights are
        # damaged. The end is saved anyway.
        can_save = guard.last_was_finite or is_at_end()
        if must_pause:
            is_first_evaluation = is_eval_due and iter_num == 0  # nothing is learned yet
            if can_save and not is_first_evaluation:
                save('ckpt.pt')
            clock.go_on()

        # Stop: after the last step, after early_stop evaluations, at a signal, or at divergence.
        if is_eval_due and not is_at_end():
            problem = guard.divergence(iter_num)
            if problem:
                save('ckpt.pt')  # again: the guard counts anew, for a run that is resumed
                raise ValueError(
                    f"{problem}; {out_dir}/ckpt.pt has the state of step {iter_num}, best.pt (if "
                    f"there is one) the best weights: {guards.ADVICE}"
                )
        is_stopped = stop_asked and can_save
        if is_stopped:
            console.stopped(out_dir, iter_num)
            if distributed.IS_MASTER:
                checkpoint.mark_preempted(out_dir, iter_num)
        if is_stopped or is_at_end():
            break

        if network.fit:  # a model that counts learns in one pass over the data
            network.fit(data.epoch())
            iter_num = max_iters
            continue

        # Set the learning rate of this step.
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
        for group in opt.param_groups:
            group['lr'] = lr * group['lr_ratio']

        # Forward and backward. Gradients add up over the micro-batches; only the last one's
        # backward pass exchanges them between processes.
        micro_losses = []
        for micro in micros:
            distributed.set_gradient_sync(wrapped, micro == micros[-1])
            micro_losses.append(micro_step(iter_num, micro))
        loss = distributed.all_reduce_sum(sum(micro_losses))

        # The host learns about a step one step later, while the device is busy with the next one.
        report_skipped_update(iter_num - 1)
        if guard.has_diverged:
            continue  # roll_back discards the gradients

        # Clip the gradient, then update the weights. The guard marks a bad step, and then
        # scaler.step leaves the weights as they are. Without grad_clip, the norm is only measured.
        is_logged = iter_num % log_interval == 0
        scaler.unscale_(opt)
        watcher.before_step(is_logged)
        grad_norm = None
        if grad_clip or is_logged:
            grad_norm = distributed.clip_gradients(network, grad_clip or math.inf)
            watcher.count_clipped(grad_norm)
        guard.mark_if_bad(opt, scaler, loss, grad_norm)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad(set_to_none=True)
        network.after_step()
        iter_num += 1
        clock.step()

        # Log. Reading the numbers waits for the device; a larger log_interval waits less often.
        record = None
        if is_logged:
            seconds_per_step = clock.lap()
            tokens_per_second = tokens_per_step / seconds_per_step
            mfu = None
            if peak:
                mfu = network.estimate_mfu(tokens_per_second, peak * distributed.WORLD_SIZE)
            record = dict(
                iter=iter_num - 1,
                loss=loss.item(),
                lr=lr,
                grad_norm=grad_norm.item(),
                ms=1e3 * seconds_per_step,
                tokens_per_second=tokens_per_second,
                peak_memory=peak_memory(device),
                mfu=mfu,
            )
            record |= watcher.after_step(record)
            metrics.log(record)
        console.step(record, max_iters - iter_num)
        profiler.step()

# ---- the end -------------------------------------------------------------------------------------
console.close()
metrics.close()
del wrapped
distributed.shutdown()
if is_stopped:
    sys.exit(stop.exit_code)
stop.release()  # everything is saved: Ctrl-C ends the sample
has_whole_network = not (distributed.IS_LAUNCHED and parallel == 'fsdp')
if distributed.IS_MASTER and has_whole_network:
    with ctx:
        print_final_sample(
            lora.merge(network),
            data.tokenizer,
            start=data.opening(),
            out_dir=out_dir,
            meta=data.meta,
        )
