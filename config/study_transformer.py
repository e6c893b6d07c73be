# python train.py config/study_transformer.py: a small transformer over ten letters of first names,
# with a long warm-up
out_dir = 'out-study-transformer'
model = 'transformerpp'
dataset = 'names'

eval_interval = 500
eval_iters = 25
log_interval = 50
always_save_checkpoint = False

gradient_accumulation_steps = 1
batch_size = 200
block_size = 10
n_layer = 2
n_head = 4
n_embd = 64
attn_dropout = 0.2
warmup_lr = 1e-5

learning_rate = 1.33e-4
min_lr = 1e-5
warmup_iters = 1500
lr_decay_iters = 3000
max_iters = 3000
