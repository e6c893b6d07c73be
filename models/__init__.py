"""Finding an architecture by its name.

`gpt` is model.py; any other NAME is models/NAME.py, which is imported when it is asked for.
"""

import dataclasses
import difflib
import importlib
from pathlib import Path

from models.parts.construction import construct

# Config fields that may change between runs of one model: no weight depends on them.
FREE = {'dropout', 'attn_dropout', 'ngram_dropout', 'k', 'batchnorm'}


def architecture(name):
    """The LanguageModel class called `name`: the last one that its file defines with a Config.

    Raises ValueError, naming the nearest, if there is none.
    """
    names = ['gpt', *sorted(path.stem for path in Path(__file__).parent.glob('[a-z]*.py'))]
    if name not in names:
        nearest = difflib.get_close_matches(str(name), names, n=1, cutoff=0)[0]
        raise ValueError(
            f"model={name!r} is unknown; the nearest is {nearest!r} (there are: {', '.join(names)})"
        )
    LanguageModel = importlib.import_module('model').LanguageModel
    module = importlib.import_module('model' if name == 'gpt' else f'models.{name}')
    found = None
    for value in vars(module).values():
        is_model = isinstance(value, type) and issubclass(value, LanguageModel)
        if is_model and value.__module__ == module.__name__ and value.Config:
            found = value
    if found is None:
        raise ValueError(f"models/{name}.py defines no LanguageModel with a Config")
    return found


def name_of(model):
    """The name by which `architecture` finds this model's class."""
    module = type(model).__module__
    return 'gpt' if module == 'model' else module.removeprefix('models.')


def build(name, **fields):
    """A new model called `name` with these Config fields, as in build('gpt', n_layer=2).

    Raises ValueError if there is none, a field's value is wrong, or memory does not suffice.
    """
    Model = architecture(name)
    return construct(Model, Model.Config(**fields))


def config_fields(name, settings):
    """The entries of the dict `settings` that are fields of this model's Config."""
    fields = dataclasses.fields(architecture(name).Config)
    return {field.name: settings[field.name] for field in fields if field.name in settings}
