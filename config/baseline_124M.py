# python train.py config/baseline_124M.py: nanoGPT's settings for GPT-2 124M, as many tokens as
# config/speedrun_124M.py
out_dir = 'out-baseline-124M'
dataset = 'python'

eval_interval = 100
eval_iters = 40
log_interval = 10

batch_size = 12  # 12 x 40 x 1024 = 491,520 tokens a step
gradient_accumulation_steps = 5 * 8

max_iters = 600  # 295 million tokens
lr_decay_iters = max_iters
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 100
