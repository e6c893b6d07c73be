# python train.py config/eval_gpt2_medium.py: OpenAI's gpt2-medium (355M parameters) on OpenWebText,
# beside the published
init_from = 'gpt2-medium'
eval_only = True
batch_size = 8
eval_iters = 500  # the more, the less noise
wandb_log = False
