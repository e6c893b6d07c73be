# python train.py config/zoo.py --model=NAME: every architecture on tiny Shakespeare, about a minute
# each on two CPU cores
out_dir = f'out-zoo-{model}'
dataset = 'shakespeare_char'

eval_interval = 250
eval_iters = 20
log_interval = 50
always_save_checkpoint = False

gradient_accumulation_steps = 1
batch_size = 8
block_size = 256

min_lr = 0.0
weight_decay = 0.1
dropout = 0.0
if model in ('bigram', 'trigram'):
    learning_rate = 3e-2
    max_iters = 6000
elif model == 'mlp':
    learning_rate = 1e-2
    max_iters = 2700
    context = 16
    n_embd = 32
    n_hidden = 512
elif model == 'wavenet':
    learning_rate = 1e-2
    max_iters = 1700
    n_layer = 8
    n_embd = 96
else:
    learning_rate = 3e-3
    max_iters = 800
    n_layer = 4
    n_head = 4
    n_embd = 128
    if model == 'modern':
        learning_rate = 1e-2
warmup_iters = max_iters // 10
lr_decay_iters = max_iters
