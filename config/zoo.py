# python train.py config/zoo.py --model=NAME: every architecture on tiny Shakespeare, about a minute each on two CPU cores
out_dir = f'out-zoo-{model}'
dataset = 'shakespeare_char'
eval_interval, eval_iters, log_interval, always_save_checkpoint = 250, 20, 50, False
gradient_accumulation_steps, batch_size, block_size = 1, 16, 256
if model not in ('bigram', 'trigram'):
    learning_rate, max_iters = {'mlp': (3e-3, 3000), 'wavenet': (3e-3, 600), 'gpt': (3e-3, 800), 'transformerpp': (3e-3, 800),
                                'modern': (3e-3, 800)}[model]
    min_lr, warmup_iters, lr_decay_iters, weight_decay, dropout = 0.0, max_iters // 10, max_iters, 0.1, 0.0
if model == 'mlp':
    context, n_embd, n_hidden = 16, 32, 512
elif model == 'wavenet':
    n_layer, n_embd = 8, 96
elif model in ('gpt', 'transformerpp', 'modern'):
    n_layer, n_head, n_embd = 4, 4, 128
