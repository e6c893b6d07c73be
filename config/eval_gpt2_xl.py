# python train.py config/eval_gpt2_xl.py: OpenAI's gpt2-xl (1558M parameters) on OpenWebText, beside
# the published
init_from = 'gpt2-xl'
eval_only = True
batch_size = 8
eval_iters = 500  # the more, the less noise
wandb_log = False
