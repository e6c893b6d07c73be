# python train.py config/train_shakespeare.py: tiny Shakespeare by GPT-2's tokens, from scratch
out_dir = 'out-shakespeare'

eval_interval = 100
eval_iters = 20
log_interval = 10
always_save_checkpoint = False  # 300,000 tokens: it overfits soon
wandb_project = 'shakespeare'
wandb_run_name = 'bpe'
dataset = 'shakespeare'

gradient_accumulation_steps = 1
learning_rate = 1e-3
min_lr = 1e-4
beta2 = 0.99
warmup_iters = 50
if device == 'cpu':
    batch_size = 8
    block_size = 128
    n_layer = 4
    n_head = 4
    n_embd = 128
    dropout = 0.1
    max_iters = 500
else:
    batch_size = 32
    block_size = 256
    n_layer = 6
    n_head = 6
    n_embd = 384
    dropout = 0.3
    max_iters = 1000
lr_decay_iters = max_iters
