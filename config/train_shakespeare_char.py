# python train.py config/train_shakespeare_char.py: characters of tiny Shakespeare, minutes on a GPU, 90 s on two CPU cores
out_dir = 'out-shakespeare-char'
eval_interval = 250
log_interval = 10
always_save_checkpoint = False  # it overfits: keep the best
wandb_project = 'shakespeare-char'
wandb_run_name = 'mini-gpt'
dataset = 'shakespeare_char'
gradient_accumulation_steps = 1
beta2 = 0.99
warmup_iters = 100
min_lr = 1e-4
if device == 'cpu':
    batch_size, block_size, n_layer, n_head, n_embd, dropout = 16, 128, 4, 4, 128, 0.0
    learning_rate, max_iters = 3e-3, 1500
else:
    batch_size, block_size, n_layer, n_head, n_embd, dropout = 64, 256, 6, 6, 384, 0.2
    learning_rate, max_iters = 1e-3, 5000
lr_decay_iters = max_iters
