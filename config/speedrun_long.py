# python train.py config/speedrun_long.py: tiny Shakespeare, the best that two CPU cores reach in three minutes
out_dir = 'out-speedrun-long'
model = 'modern'
dataset = 'shakespeare_char'
eval_interval = 0  # at the end only
eval_iters = 5
log_interval = 10
gradient_accumulation_steps = 1
batch_size, block_size, n_layer, n_head, n_embd, max_iters = 16, 512, 4, 1, 128, 750
lr_decay_iters = max_iters
ngram, ngram_dropout = 5, 0.6
muon_lr, embed_lr, head_lr, min_lr = 0.04, 0.006, 0.008, 0.0
beta1, weight_decay, grad_clip = 0.8, 0.5, 0.0
warmup_iters, cooldown = 10, 0.75
