"""Export a model as a folder in Hugging Face's format, which `transformers`, and what builds on it,
can load.

    python export.py out-baseline-shakespeare-char shakespeare-hf
    python export.py gpt2 gpt2-bf16 --dtype=bfloat16

The two words are the settings out_dir and folder; the first may be anything that sample.py's
--init_from accepts. The way back is --init_from=FOLDER, for train.py, sample.py, evaluate.py and
export.py.
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
folder = ''  # the folder to write: one that does not exist yet, or is empty
dtype = 'float32'  # of the weights: float32, bfloat16, float16
# --------------------------------------------------------------------------------------------------


def name_plain_words(words):
    """The command line with its plain words as settings: the first is --out_dir, the second
    --folder. A word after a --key without = is that key's value."""
    settings = []
    keys = ['out_dir', 'folder']
    previous = ''
    for word in words:
        is_value = previous.startswith('--') and '=' not in previous
        is_plain = not word.startswith('-') and '=' not in word
        if keys and is_plain and not is_value:
            settings.append(f'--{keys.pop(0)}={word}')
        else:
            settings.append(word)
        previous = word
    return settings


def write_folder(path, contents, weights):
    """Write contents, {file name: text, bytes or JSON value}, and the weights to the folder `path`.
    It appears complete or not at all; a failure ends the script."""
    fresh = path.with_name(f'.{path.name}.tmp')
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for name, content in contents.items():
            if isinstance(content, bytes):
                data = content
            elif isinstance(content, str):
                data = content.encode()
            else:
                data = json.dumps(content, indent=2, ensure_ascii=False).encode()
            (fresh / name).write_bytes(data)
        weights_file = fresh / 'model.safetensors'
        safetensors.torch.save_file(weights, weights_file, {'format': 'pt'})
        # safetensors lets only the owner read its files: give this one the others' permissions.
        weights_file.chmod((fresh / 'config.json').stat().st_mode)
        if path.is_dir():
            path.rmdir()
        os.replace(fresh, path)
        files.sync_folder(path.parent)
    except (OSError, safetensors.SafetensorError) as error:
        fail(f"cannot write {path} ({getattr(error, 'strerror', None) or error})")
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def report_losses(model):
    """Print what of the model the folder does not have."""
    n_vocab = model.config.vocab_size
    if model.tokenizer is None:
        print(f"{folder} has no tokenizer: the model does not say which one its {n_vocab} ids use")
    elif model.tokenizer.vocab_size < n_vocab:
        print(
            f"{folder} has vocab_size={model.tokenizer.vocab_size}: the model's {n_vocab} are "
            "padded, for speed"
        )
    if getattr(model, 'template', None):
        print("the chat template is not exported: `sample.py --chat` needs the run itself")
    if model.config.eot >= 0:
        print(
            f"the model does not attend from one document to another (eot={model.config.eot}), "
            "transformers does: give it one document at a time"
        )


with user_errors():
    configure(globals(), name_plain_words(sys.argv[1:]))
    if dtype not in DTYPES:
        fail(f"dtype={dtype!r} is unknown: use {', '.join(DTYPES)}")
    if not folder:
        fail("the folder to write is missing: python export.py RUN FOLDER")
    path = Path(folder)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        fail(f"folder={folder!r} exists and is not empty: choose another")

    model = pretrained.load_model(out_dir if init_from == 'resume' else init_from)
    contents, weights = huggingface.to_files(model, models.name_of(model), dtype)
    write_folder(path, contents, weights)
    report_losses(model)
    n_parameters = sum(weight.numel() for weight in weights.values())
    n_bytes = sum(file.stat().st_size for file in path.iterdir())
    print(f"{folder}: {n_parameters:,} parameters in {dtype}, {n_bytes / 1e6:.1f} MB")
