# python train.py config/names.py --model=mlp: letters of first names; or wavenet, the tree of pairs; or any other
out_dir = f'out-names-{model}'
dataset = 'names'
eval_interval, eval_iters, log_interval, always_save_checkpoint = 0, 100_000, 100, False
gradient_accumulation_steps, batch_size, block_size = 1, 64, 16
dtype, compile = 'float32', False
if model == 'mlp':
    context, n_embd, n_hidden, max_iters = 3, 10, 200, 1500
elif model == 'wavenet':
    form, n_layer, n_embd, n_hidden, batchnorm, max_iters = 'hierarchical', 3, 24, 128, 'precise', 7600
else:
    n_layer, n_head, n_embd, max_iters = 4, 4, 64, 3000
learning_rate, min_lr, beta2, weight_decay = 5e-3, 0.0, 0.99, 0.0
warmup_iters, lr_decay_iters = 100, max_iters
