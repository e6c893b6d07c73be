# torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py: GPT-2 124M to about 2.85;
# days on 8 A100 GPUs
wandb_log = True
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'

batch_size = 12  # 12 x 1024 x 40 = 491,520 tokens a step
block_size = 1024
gradient_accumulation_steps = 5 * 8

max_iters = 600000  # 295 billion tokens
lr_decay_iters = 600000

eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
