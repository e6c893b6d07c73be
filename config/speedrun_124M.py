# python train.py config/speedrun_124M.py: GPT-2's size on one large GPU, Python source by BPE (or
# any --dataset)
out_dir = 'out-speedrun-124M'
model = 'modern'
dataset = 'python'

eval_interval = 250
eval_iters = 40
log_interval = 10

batch_size = 32  # 32 x 6 x 1024 = 196,608 tokens a step
gradient_accumulation_steps = 6
n_head = 6

max_iters = 1500  # 295 million tokens
lr_decay_iters = max_iters
muon_lr = 0.02
embed_lr = 0.3
head_lr = 0.006
min_lr = 3e-5  # all rates fall to the same share as learning_rate, 6e-4, would: 5 %
warmup_iters = 0  # Muon's momentum warms up instead
cooldown = 0.65
beta1 = 0.8
weight_decay = 0.0
grad_clip = 0.0
