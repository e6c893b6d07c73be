# python train.py config/names.py --model=mlp: letters of first names; or wavenet, the tree of
# pairs; or any other
out_dir = f'out-names-{model}'
dataset = 'names'

eval_interval = 0
eval_iters = 100_000
log_interval = 100
always_save_checkpoint = False

gradient_accumulation_steps = 1
batch_size = 64
block_size = 16
dtype = 'float32'
compile = False
if model == 'mlp':
    context = 3
    n_embd = 10
    n_hidden = 200
    max_iters = 1500
elif model == 'wavenet':
    form = 'hierarchical'
    n_layer = 3
    n_embd = 24
    n_hidden = 128
    batchnorm = 'precise'
    max_iters = 7600
else:
    n_layer = 4
    n_head = 4
    n_embd = 64
    max_iters = 3000

learning_rate = 5e-3
min_lr = 0.0
beta2 = 0.99
weight_decay = 0.0
warmup_iters = 100
lr_decay_iters = max_iters
