# python train.py config/study_wavenet.py: a WaveNet over sixteen letters of first names
out_dir = 'out-study-wavenet'
model, dataset = 'wavenet', 'names'
eval_interval, eval_iters, log_interval, always_save_checkpoint = 200, 50, 50, False
gradient_accumulation_steps, batch_size, block_size = 1, 200, 16
n_layer, kernel, n_embd, init = 4, 2, 32, 'xavier'
learning_rate, min_lr, weight_decay = 3e-3, 0.0, 0.1
warmup_iters, lr_decay_iters, max_iters = 100, 1400, 1400
