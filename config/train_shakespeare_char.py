# python train.py config/train_shakespeare_char.py: characters of tiny Shakespeare, about a minute on two CPU cores or a GPU
out_dir = 'out-shakespeare-char'
model = 'modern'
dataset = 'shakespeare_char'
eval_interval = 110
eval_iters = 5
log_interval = 10
always_save_checkpoint = False  # it overfits: keep the best
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
gradient_accumulation_steps = 1
if device == 'cpu':
    batch_size, block_size, n_layer, n_head, n_embd, max_iters = 16, 512, 4, 1, 128, 330
else:
    batch_size, block_size, n_layer, n_head, n_embd, max_iters = 32, 512, 6, 3, 384, 500
lr_decay_iters = max_iters
ngram, ngram_dropout = 5, 0.4
muon_lr, embed_lr, head_lr, min_lr = 0.04, 0.006, 0.008, 0.0
beta1, weight_decay, grad_clip = 0.8, 0.5, 0.0
warmup_iters, cooldown = 10, 0.75
