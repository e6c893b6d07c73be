# python train.py config/finetune_shakespeare.py: GPT-2 XL on tiny Shakespeare (smaller:
# --init_from=gpt2-medium or gpt2)
out_dir = 'out-finetune-shakespeare'
init_from = 'gpt2-xl'

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False  # only where the validation loss improves
wandb_project = 'shakespeare'
wandb_run_name = 'ft-gpt2-xl'
dataset = 'shakespeare'
# 1 x 32 x 1024 = 32,768 tokens per step; the train split has 301,966 tokens: 9 steps are an epoch.
batch_size = 1
gradient_accumulation_steps = 32

max_iters = 20
learning_rate = 3e-5
decay_lr = False
