# python train.py config/speedrun_short.py: tiny Shakespeare on two CPU cores to a validation loss
# below 1.886, at once
out_dir = 'out-speedrun-short'
model = 'modern'
dataset = 'shakespeare_char'

eval_interval = 0  # at the end only
compile = False
eval_iters = 1
log_interval = 5

gradient_accumulation_steps = 1
batch_size = 16
block_size = 128
n_layer = 1
n_head = 1
n_embd = 128

max_iters = 44
lr_decay_iters = max_iters
ngram = 5
ngram_rows = 32768
muon_lr = 0.04
embed_lr = 0.05
head_lr = 0.016
min_lr = 0.0
beta1 = 0.8
weight_decay = 0.0
grad_clip = 0.0
warmup_iters = 2
cooldown = 0.9
