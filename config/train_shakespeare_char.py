# python train.py config/train_shakespeare_char.py: characters of tiny Shakespeare, about a minute
# on two CPU cores or a GPU
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
    batch_size = 16
    block_size = 512
    n_layer = 4
    n_head = 1
    n_embd = 128
    max_iters = 330
else:
    batch_size = 32
    block_size = 512
    n_layer = 6
    n_head = 3
    n_embd = 384
    max_iters = 500
lr_decay_iters = max_iters
ngram = 5
ngram_dropout = 0.4

muon_lr = 0.04
embed_lr = 0.006
head_lr = 0.008
min_lr = 0.0
beta1 = 0.8
weight_decay = 0.5
grad_clip = 0.0
warmup_iters = 10
cooldown = 0.75
