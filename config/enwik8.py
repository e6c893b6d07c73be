# python train.py config/enwik8.py: Wikipedia byte by byte; val_bpb is the benchmark's bits per character. Not tuned yet.
out_dir = 'out-enwik8'
model = 'modern'
dataset = 'enwik8'
eval_interval = 1000
eval_iters = 50
log_interval = 10
always_save_checkpoint = False
gradient_accumulation_steps = 1
if device == 'cpu':
    batch_size, block_size, n_layer, n_head, n_embd, max_iters = 16, 512, 4, 1, 128, 1000
else:
    batch_size, block_size, n_layer, n_head, n_embd, max_iters, dropout = 64, 512, 12, 4, 512, 20_000, 0.1
lr_decay_iters = max_iters
muon_lr, embed_lr, head_lr, min_lr = 0.02, 0.012, 0.008, 0.0
beta1, weight_decay, grad_clip = 0.8, 0.1, 1.0
warmup_iters, cooldown = 100, 0.5
