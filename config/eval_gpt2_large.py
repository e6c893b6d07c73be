# python train.py config/eval_gpt2_large.py: OpenAI's gpt2-large (774M parameters) on OpenWebText,
# beside the published
init_from = 'gpt2-large'
eval_only = True
batch_size = 8
eval_iters = 500  # the more, the less noise
wandb_log = False
