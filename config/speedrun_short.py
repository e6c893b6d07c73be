# python train.py config/speedrun_short.py: tiny Shakespeare on two CPU cores to a validation loss below 1.886, at once
out_dir = 'out-speedrun-short'
model = 'modern'
dataset = 'shakespeare_char'
eval_interval = 0  # at the end only
compile = False
eval_iters = 1
log_interval = 5
gradient_accumulation_steps = 1
batch_size, block_size, n_layer, n_head, n_embd, max_iters = 16, 128, 1, 1, 128, 44
lr_decay_iters = max_iters
ngram, ngram_rows = 5, 32768
muon_lr, embed_lr, head_lr, min_lr = 0.04, 0.05, 0.016, 0.0
beta1, weight_decay, grad_clip = 0.8, 0.0, 0.0
warmup_iters, cooldown = 2, 0.9
