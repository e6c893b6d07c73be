"""Architectures by name: `gpt` is model.py, any other NAME is models/NAME.py, imported when it is
asked for."""

import dataclasses
import difflib
import importlib
from pathlib import Path

from models.parts.construction import construct

# Config fields that may change between runs
FREE = {'dropout', 'attn_dropout', 'ngram_dropout', 'k', 'batchnorm'}


def architecture(name):
    """The LanguageModel class called `name`. Raises ValueError, naming the nearest, where there is
    none."""
    names = ['gpt', *sorted(p.stem for p in Path(__file__).parent.glob('[a-z]*.py'))]
    if name not in names:
        near = difflib.get_close_matches(str(name), names, n=1, cutoff=0)[0]
        raise ValueError(
            f"model={name!r} is unknown; the nearest is {near!r} (there are: {', '.join(names)})"
        )
    module = importlib.import_module('model' if name == 'gpt' else f'models.{name}')
    base = importlib.import_module('model').LanguageModel
    found = [
        c
        for c in vars(module).values()
        if isinstance(c, type)
        and issubclass(c, base)
        and c.__module__ == module.__name__
        and c.Config
    ]
    if not found:
        raise ValueError(f"models/{name}.py defines no LanguageModel with a Config")
    return found[-1]


def name_of(model):
    """The name by which `architecture` finds this model's class."""
    module = type(model).__module__
    return 'gpt' if module == 'model' else module.removeprefix('models.')


def build(name, **fields):
    """A new model called `name` with these Config fields, as in build('gpt', n_layer=2). Raises
    ValueError."""
    Model = architecture(name)
    return construct(Model, Model.Config(**fields))


def config_fields(name, settings):
    """The entries of the dict `settings` that are fields of the Config of the model called `name`."""
    fields = dataclasses.fields(architecture(name).Config)
    return {field.name: settings[field.name] for field in fields if field.name in settings}
