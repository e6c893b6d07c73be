# python train.py config/zoo.py --model=NAME: every architecture on tiny Shakespeare, about a minute each on two CPU cores
out_dir = f'out-zoo-{model}'
dataset = 'shakespeare_char'
eval_interval, eval_iters, log_interval, always_save_checkpoint = 250, 20, 50, False
gradient_accumulation_steps, batch_size, block_size = 1, 8, 256
min_lr, weight_decay, dropout = 0.0, 0.1, 0.0
if model in ('bigram', 'trigram'):
    learning_rate, max_iters = 3e-2, 6000
elif model == 'mlp':
    learning_rate, max_iters, context, n_embd, n_hidden = 1e-2, 2700, 16, 32, 512
elif model == 'wavenet':
    learning_rate, max_iters, n_layer, n_embd = 1e-2, 1700, 8, 96
else:
    learning_rate, max_iters, n_layer, n_head, n_embd = 3e-3, 800, 4, 4, 128
    if model == 'modern':
        learning_rate = 1e-2
warmup_iters, lr_decay_iters = max_iters // 10, max_iters
