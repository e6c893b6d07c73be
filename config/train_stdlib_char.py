# python train.py config/train_stdlib_char.py: a first run; Python's standard library by characters,
# no download
out_dir = 'out-stdlib-char'
model = 'modern'
dataset = 'stdlib_char'

eval_interval = 100
eval_iters = 5
log_interval = 10

gradient_accumulation_steps = 1
if device == 'cpu':
    batch_size = 16
    block_size = 512
    n_layer = 4
    n_head = 1
    n_embd = 128
    max_iters = 300
else:
    batch_size = 32
    block_size = 512
    n_layer = 6
    n_head = 3
    n_embd = 384
    max_iters = 1000
lr_decay_iters = max_iters
# a small part of an epoch: there is little to overfit
ngram = 5
ngram_dropout = 0.1

muon_lr = 0.04
embed_lr = 0.012
head_lr = 0.008
min_lr = 0.0
beta1 = 0.8
weight_decay = 0.1
grad_clip = 0.0
warmup_iters = 10
cooldown = 0.75
