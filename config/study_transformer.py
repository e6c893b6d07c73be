# python train.py config/study_transformer.py: a small transformer over ten letters of first names, with a long warm-up
out_dir = 'out-study-transformer'
model, dataset = 'transformerpp', 'names'
eval_interval, eval_iters, log_interval, always_save_checkpoint = 500, 25, 50, False
gradient_accumulation_steps, batch_size, block_size = 1, 200, 10
n_layer, n_head, n_embd, attn_dropout = 2, 4, 64, 0.2
warmup_lr, learning_rate, min_lr = 1e-5, 1.33e-4, 1e-5
warmup_iters, lr_decay_iters, max_iters = 1500, 3000, 3000
