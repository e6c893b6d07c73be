# python train.py config/study_mlp.py: Bengio's MLP over ten letters of first names, by SGD whose rate falls tenfold once
out_dir = 'out-study-mlp'
model, dataset = 'mlp', 'names'
eval_interval, eval_iters, log_interval, always_save_checkpoint = 200, 50, 50, False
gradient_accumulation_steps, batch_size, block_size = 1, 100, 16
context, n_embd, n_hidden = 10, 10, 200
optimizer, beta1, weight_decay, grad_clip = 'sgd', 0.9, 0.0, 0.0
learning_rate, min_lr, warmup_iters = 0.1, 0.01, 0
lr_schedule, lr_decay_iters, max_iters = 'step', 1000, 1400
