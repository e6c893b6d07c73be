# python train.py config/speedrun_long.py: tiny Shakespeare, the best that two CPU cores reach in
# three minutes
out_dir = 'out-speedrun-long'
model = 'modern'
dataset = 'shakespeare_char'

eval_interval = 0  # at the end only
eval_iters = 5
log_interval = 10

gradient_accumulation_steps = 1
batch_size = 16
block_size = 512
n_layer = 4
n_head = 1
n_embd = 128

max_iters = 750
lr_decay_iters = max_iters
ngram = 5
ngram_dropout = 0.6
muon_lr = 0.04
embed_lr = 0.006
head_lr = 0.008
min_lr = 0.0
beta1 = 0.8
weight_decay = 0.5
grad_clip = 0.0
warmup_iters = 10
cooldown = 0.75
