"""Text from a model: from a run of train.py, from GPT-2, or from a Hugging Face folder.

    python sample.py --out_dir=out-shakespeare-char
    python sample.py --init_from=gpt2-xl --start="What is the answer to life?" --num_samples=5 --max_new_tokens=100
    python sample.py --init_from=path/to/folder --start=FILE:prompt.txt
"""
import sys
from pathlib import Path

import checkpoint
import generate
import runtime
from configurator import configure
from runtime import fail, user_errors

# ---- settings --------------------------------------------------------------------------------------------------------
init_from = 'resume'  # resume (the run in out_dir), gpt2[-medium|-large|-xl], a Hugging Face folder, a checkpoint file
out_dir = 'out'  # the run to sample from
start = '\n'  # the text to go on from, or FILE:prompt.txt
prompt = ''  # the same under another name
num_samples = 10  # how many continuations
max_new_tokens = 500  # tokens in each
temperature = 0.8  # 1.0: as the model says; below: more predictable; 0: always the likeliest token
top_k = 200  # draw only from so many likeliest tokens; 0: from all
seed = 1337  # of the drawing
device = 'auto'  # auto, cpu, cuda, cuda:1, mps
dtype = 'auto'  # auto, float32, bfloat16, float16
compile = False  # True pays for long samples on a GPU
# ----------------------------------------------------------------------------------------------------------------------

with user_errors():
    configure(globals(), sys.argv[1:], runtime.resolve_device)
    device = runtime.resolve_device(device)
    dtype = runtime.resolve_dtype(dtype, device)
    compile = runtime.resolve_compile(compile, device)
    if num_samples < 1 or seed < 0:
        fail(f"num_samples={num_samples} must be at least 1, and seed={seed} at least 0")
    text = prompt or start
    if text.startswith('FILE:'):
        try:
            text = Path(text.removeprefix('FILE:')).read_text(encoding='utf-8')
        except (OSError, ValueError) as error:
            fail(f"{text} can't be read as UTF-8 text ({getattr(error, 'strerror', None) or error})")
    model = checkpoint.load_model(out_dir if init_from == 'resume' else init_from, device)
    if model.tokenizer is None:
        fail(f"{init_from} does not say which tokenizer its {model.config.vocab_size} ids belong to")
    ids = model.tokenizer.encode(text)
    if compile:
        model.compile()
    runtime.seed_everything(seed)
    with runtime.memory_errors("take a smaller model, or another --device"), runtime.autocast(device, dtype):
        for _ in range(num_samples):
            generate.show(model, ids, max_new_tokens, temperature, top_k or None)
            print('-' * 15)
