# python train.py config/study_wavenet.py: a WaveNet over sixteen letters of first names
out_dir = 'out-study-wavenet'
model = 'wavenet'
dataset = 'names'

eval_interval = 200
eval_iters = 50
log_interval = 50
always_save_checkpoint = False

gradient_accumulation_steps = 1
batch_size = 200
block_size = 16
n_layer = 4
kernel = 2
n_embd = 32
init = 'xavier'

learning_rate = 3e-3
min_lr = 0.0
weight_decay = 0.1
warmup_iters = 100
lr_decay_iters = 1400
max_iters = 1400
