# python train.py config/baseline_shakespeare_char.py: nanoGPT's recipe for tiny Shakespeare, as it
# was, never retuned.
out_dir = 'out-baseline-shakespeare-char'

eval_interval = 250
log_interval = 10
always_save_checkpoint = False
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'

gradient_accumulation_steps = 1
batch_size = 64
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 100
if device == 'cpu':  # the flags that nanoGPT's README gives for a CPU
    compile = False
    eval_iters = 20
    log_interval = 1
    block_size = 64
    batch_size = 12
    dropout = 0.0
    n_layer = 4
    n_head = 4
    n_embd = 128
    max_iters = 2000
    lr_decay_iters = 2000
