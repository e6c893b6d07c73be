"""Settings: a script's module globals, which config files and the command line override.

    python train.py config/train_gpt2.py --batch_size=8 --compile False learning_rate=1e-4

A setting is a global of type bool, int, float or str. A config file is Python, run over those globals; what it assigns
is checked like the command line: the key must exist, the type must fit. The command line is applied before the files,
so that a file sees the wished device, and again after them, so that it wins. Settings whose default is 'auto' also take
their real type; whoever resolves them checks the value.
"""
import ast
import dataclasses
import difflib
import math
import os
import re
import sys
import types
import warnings

import configfile
import confighelp

PLAIN = (bool, int, float, str)


def configure(settings, argv, resolve_device=None, config_class=None):
    """Override `settings`, a script's `globals()`, in place from `argv` (without the script's name).

    resolve_device(str) -> str turns 'auto' into the device that a file sees; the setting itself
    stays 'auto', which the script resolves. config_class(values) -> dataclass gives the chosen
    model's Config once the files are read: its fields are settings too, except vocab_size, which
    the data decides. Returns (config, given): every setting's final value; and for those that were
    set, where ("command line" or the file). Raises ValueError or FileNotFoundError with one line
    for the user; exits after --help.
    """
    files, wishes, wants_help = parse(argv)
    defaults = {k: v for k, v in settings.items() if not k.startswith('_') and type(v) in PLAIN}
    values, given, later = dict(defaults), {}, {}

    def assign(key, value, where):
        if key not in defaults:
            later[key] = (value, where)     # perhaps a field of a model that is not known yet
        else:
            values[key] = (_from_text if where == 'command line' else _checked)(key, value, defaults[key], where)
            given[key] = where

    def assign_command_line():
        for key, text in wishes.items():
            assign(key, text, 'command line')

    assign_command_line()
    if resolve_device and files and 'device' in values:
        values['device'] = resolve_device(values['device'])
    for path in files:
        if os.path.realpath(path) == os.path.realpath(settings.get('__file__', '')):
            raise ValueError(f"command line: {path} is the script, not a config file")
        for key, value in configfile.run(path, {**settings, **values}).items():
            is_tool = isinstance(value, types.ModuleType) or callable(value)
            if not key.startswith('_') and not (is_tool and key not in defaults):
                assign(key, value, path)
    if 'device' in defaults and 'device' not in given:
        values['device'] = defaults['device']
    assign_command_line()

    Config = config_class(values) if config_class else None
    if Config:
        for field in dataclasses.fields(Config):
            if field.name != 'vocab_size' and field.name not in defaults:
                defaults[field.name] = values[field.name] = field.default
    if wants_help:
        confighelp.print_help(settings, defaults, Config)
        sys.exit(0)
    for key, (value, where) in later.items():
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1, cutoff=0)
            hint = '--help lists all' if where == 'command line' else 'names of the file\'s own begin with _'
            raise ValueError(f"{where}: there is no setting {key!r}; the nearest is {near[0]!r} ({hint})")
        assign(key, value, where)
    settings.update(values)
    return values, given


def parse(argv):
    """Config files in order, {key: text} and whether help is wanted, out of command-line words."""
    files, wishes, wants_help = [], {}, False
    words = iter(argv)
    for word in words:
        if word in ('-h', '--help'):
            wants_help = True
        elif match := re.match(r'(?:--)?([A-Za-z_]\w*)=(.*)', word, re.DOTALL):
            wishes[match[1]] = match[2]
        elif re.fullmatch(r'--[A-Za-z_]\w*', word):
            text = next(words, None)
            if text is None or text.startswith('--'):
                raise ValueError(f"command line: {word} has no value; write {word}=VALUE")
            wishes[word[2:]] = text
        elif word.startswith('-'):
            raise ValueError(f"command line: {_show(word)} is no setting; they are written --key=value, with _ in the key")
        elif os.path.isfile(word):
            files.append(word)
        else:
            raise FileNotFoundError(
                f"command line: there is no config file {_show(word)} (settings are written --key=value)")
    return files, wishes, wants_help


def _from_text(key, text, default, where):
    """The value that the command line's `text` stands for: as it is for strings, a Python literal otherwise."""
    if type(default) is str and default != 'auto':
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            value = ast.literal_eval(text)
    except Exception:       # not a literal: a bare word such as bfloat16
        value = text
    return _checked(key, value, default, where)


def _checked(key, value, default, where):
    """`value`, where it is of the default's type; an int also for a float."""
    if type(default) is float and type(value) is int and abs(value) < 1e300:
        value = float(value)
    fits = type(value) is type(default) or (default in ('auto', None) and type(value) in PLAIN)
    if not fits or (type(value) is float and not math.isfinite(value)) or (type(value) is int and abs(value) >= 2 ** 63):
        kinds = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text', type(None): 'a plain value'}
        kind = 'auto or a plain value' if default == 'auto' else kinds[type(default)]
        raise ValueError(f"{where}: {key} takes {kind}, not {_show(value)}")
    return value


def _show(value):
    """A value in one line of an error, however large it is."""
    try:
        text = ' '.join(repr(value).split())
    except Exception:       # an int of thousands of digits
        text = f"this {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:90]}…{text[-1]}"
