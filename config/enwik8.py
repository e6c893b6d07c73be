# python train.py config/enwik8.py: Wikipedia byte by byte; val_bpb is the benchmark's bits per
# character. Not tuned yet.
out_dir = 'out-enwik8'
model = 'modern'
dataset = 'enwik8'

eval_interval = 1000
eval_iters = 50
log_interval = 10
always_save_checkpoint = False

gradient_accumulation_steps = 1
if device == 'cpu':
    batch_size = 16
    block_size = 512
    n_layer = 4
    n_head = 1
    n_embd = 128
    max_iters = 1000
else:
    batch_size = 64
    block_size = 512
    n_layer = 12
    n_head = 4
    n_embd = 512
    max_iters = 20_000
    dropout = 0.1
lr_decay_iters = max_iters

muon_lr = 0.02
embed_lr = 0.012
head_lr = 0.008
min_lr = 0.0
beta1 = 0.8
weight_decay = 0.1
grad_clip = 1.0
warmup_iters = 100
cooldown = 0.5
