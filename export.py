"""A model as a folder in Hugging Face's format, which `transformers` and what is built on it load
as it is.

    python export.py out-baseline-shakespeare-char shakespeare-hf
    python export.py gpt2 gpt2-bf16 --dtype=bfloat16

The first word may be all that sample.py's --init_from takes; the words are the settings out_dir
and folder. The way back is --init_from=FOLDER, of train.py, sample.py, evaluate.py and this.
"""

from system.errors import begin_script

begin_script()  # before the imports, which take seconds

import json
import os
import shutil
import sys
from pathlib import Path

import safetensors.torch

import models
from configurator import configure
from interop import huggingface
from system import files
from system.device import DTYPES
from system.errors import fail, user_errors
from training import pretrained

# ---- settings ------------------------------------------------------------------------------------
init_from = 'resume'  # resume (out_dir), gpt2[-medium|-large|-xl], a folder, a checkpoint file
out_dir = 'out'  # the run to export
folder = ''  # to write: one that is not there yet, or empty
dtype = 'float32'  # of the weights: float32, bfloat16, float16
# --------------------------------------------------------------------------------------------------


def as_settings(words):
    """The words, with each plain one, which is not the value of a --key before it, as the next of
    out_dir and folder."""
    settings, keys, before = [], ['out_dir', 'folder'], ''
    for word in words:
        is_value = before.startswith('--') and '=' not in before
        if keys and '=' not in word and not word.startswith('-') and not is_value:
            settings.append(f'--{keys.pop(0)}={word}')
        else:
            settings.append(word)
        before = word
    return settings


with user_errors():
    configure(globals(), as_settings(sys.argv[1:]))
    if dtype not in DTYPES:
        fail(f"dtype={dtype!r} is unknown: take {', '.join(DTYPES)}")
    path = Path(folder)
    if not folder:
        fail("the folder to write is missing: python export.py RUN FOLDER")
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        fail(f"folder={folder!r} is there and not empty: take another")
    model = pretrained.load_model(out_dir if init_from == 'resume' else init_from)
    content, weights = huggingface.to_files(model, models.name_of(model), dtype)
    fresh = path.with_name(f'.{path.name}.tmp')  # whole or not there
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for name, value in content.items():
            text = (
                value
                if type(value) in (str, bytes)
                else json.dumps(value, indent=2, ensure_ascii=False)
            )
            (fresh / name).write_bytes(text if type(text) is bytes else text.encode())
        safetensors.torch.save_file(weights, fresh / 'model.safetensors', {'format': 'pt'})
        # else its owner's only
        (fresh / 'model.safetensors').chmod((fresh / 'config.json').stat().st_mode)
        if path.is_dir():
            path.rmdir()
        os.replace(fresh, path)
        files.sync_folder(path.parent)
    except (OSError, safetensors.SafetensorError) as error:
        fail(f"cannot write {path} ({getattr(error, 'strerror', None) or error})")
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    n_vocab = model.config.vocab_size
    if model.tokenizer is None:
        print(
            f"{folder} has no tokenizer: the model does not say which its {n_vocab} ids belong to"
        )
    elif model.tokenizer.vocab_size < n_vocab:
        print(
            f"vocab_size is {model.tokenizer.vocab_size} there: the {n_vocab} here are padded, for speed"
        )
    if getattr(model, 'template', None):
        print("the chat template stays with the run: `sample.py --chat` needs the run itself")
    if model.config.eot >= 0:
        print(
            f"the model keeps documents apart (eot={model.config.eot}); transformers does not: give it one at a time"
        )
    n_bytes = sum(file.stat().st_size for file in path.iterdir())
    print(
        f"{folder}: {sum(w.numel() for w in weights.values()):,} parameters in {dtype}, {n_bytes / 1e6:.1f} MB"
    )
