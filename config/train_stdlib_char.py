# python train.py config/train_stdlib_char.py: a first run; Python's standard library by characters, no download
out_dir = 'out-stdlib-char'
eval_interval = 500
eval_iters = 20
log_interval = 10
dataset = 'stdlib_char'
gradient_accumulation_steps = 1
learning_rate = 3e-3
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 50
if device == 'cpu':
    batch_size, block_size, n_layer, n_head, n_embd, max_iters = 16, 128, 4, 4, 128, 2000
else:
    batch_size, block_size, n_layer, n_head, n_embd, max_iters = 64, 256, 6, 6, 384, 2000
lr_decay_iters = max_iters
