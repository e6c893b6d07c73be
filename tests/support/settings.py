"""The settings of train.py and of its models, without running it."""

import models
from support.scripts import ROOT


def train_settings():
    """The defaults of train.py, without running it."""
    text = (ROOT / 'train.py').read_text()
    head = text[text.index('out_dir =') : text.index('# ----', text.index('profile ='))]
    values = {}
    exec(head, values)
    return {k: v for k, v in values.items() if not k.startswith('_')}


def gpt(values):
    """The Config class of the model that these settings name."""
    return models.architecture(values['model']).Config
