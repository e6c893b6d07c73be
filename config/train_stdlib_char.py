# python train.py config/train_stdlib_char.py: a first run; Python's standard library by characters, no download
out_dir = 'out-stdlib-char'
model = 'modern'
dataset = 'stdlib_char'
eval_interval = 100
eval_iters = 5
log_interval = 10
gradient_accumulation_steps = 1
if device == 'cpu':
    batch_size, block_size, n_layer, n_head, n_embd, max_iters = 16, 512, 4, 1, 128, 300
else:
    batch_size, block_size, n_layer, n_head, n_embd, max_iters = 32, 512, 6, 3, 384, 1000
lr_decay_iters = max_iters
ngram, ngram_dropout = 5, 0.1  # a small part of an epoch: there is little to overfit
muon_lr, embed_lr, head_lr, min_lr = 0.04, 0.012, 0.008, 0.0
beta1, weight_decay, grad_clip = 0.8, 0.1, 0.0
warmup_iters, cooldown = 10, 0.75
