# python train.py config/study_mlp.py: Bengio's MLP over ten letters of first names, by SGD whose
# rate falls tenfold once
out_dir = 'out-study-mlp'
model = 'mlp'
dataset = 'names'

eval_interval = 200
eval_iters = 50
log_interval = 50
always_save_checkpoint = False

gradient_accumulation_steps = 1
batch_size = 100
block_size = 16
context = 10
n_embd = 10
n_hidden = 200
optimizer = 'sgd'

beta1 = 0.9
weight_decay = 0.0
grad_clip = 0.0
learning_rate = 0.1
min_lr = 0.01
warmup_iters = 0
lr_schedule = 'step'
lr_decay_iters = 1000
max_iters = 1400
