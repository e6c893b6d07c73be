"""Settings: a script's module globals, which config files and the command line override.

    python train.py config/train_gpt2.py --batch_size=8 --compile False learning_rate=1e-4

A setting is a global of type bool, int, float, str or Texts. A config file is Python, run over
those globals; what it assigns is checked like the command line: the key must exist, the type must
fit. The command line is applied before the files, so that a file sees the wished device, and again
after them, so that it wins. Settings whose default is 'auto' also accept their real type; whoever
resolves them checks the value.

A file may have names of its own: modules, functions, names that begin with _, and names that it
reads again, such as a number from which settings are computed. A name that it only assigns, or that
is nearly a setting's, is a mistake. Of the names that `from MODULE import *` binds, only those
count that are settings and have a plain value.
"""

import ast
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
import types
import typing
import warnings
from pathlib import Path, PurePath

from system import config_file

PLAIN = (bool, int, float, str)
LIST = re.compile(r"""\s*[\[(]\s*['"]""")  # how a list of texts begins on the command line
# A name that is so much like a setting (difflib's ratio) is that setting misspelt, even if the file
# reads it again, as in `max_iter = 100; lr_decay_iters = max_iter`. Above this are max_iter,
# n_layers, devices, beta; below it layer, betas, num_layers, d_model, batch, max_steps.
MISSPELT = 0.85
SIMILAR = 0.6  # a setting that is less like a name is not suggested for it
# What other programs call some settings.
ALIASES = {
    'lr': 'learning_rate',
    'wd': 'weight_decay',
    'epochs': 'max_iters',
    'steps': 'max_iters',
    'max_steps': 'max_iters',
    'bs': 'batch_size',
    'batch': 'batch_size',
    'seq_len': 'block_size',
    'context': 'block_size',
    'context_length': 'block_size',
    'd_model': 'n_embd',
    'hidden_size': 'n_embd',
    'layers': 'n_layer',
    'num_layers': 'n_layer',
    'heads': 'n_head',
    'num_heads': 'n_head',
    'output_dir': 'out_dir',
    'max_tokens': 'max_new_tokens',
}


class Texts(list):
    """The default of a setting that is one text or several: a list in Python's notation, or the
    setting repeated.

        --stop=END    --stop="['a, b', 'c|d']"    --stop='a, b' --stop='c|d'

    Its value is a str where one text was given, so that a script can divide that, else a list of
    str.
    """


def configure(settings, argv, resolve_device=None, config_class=None):
    """Override `settings`, a script's `globals()`, in place from `argv` (without its name).

    resolve_device(str) -> str turns 'auto' into the device that a file sees; the setting itself
    stays 'auto', which the script resolves. config_class(values) -> dataclass gives the chosen
    model's Config once the files are read: its fields are settings too, except vocab_size, which
    the data decides.

    Returns (config, given): every setting's final value; and for those that were set, where
    ("command line" or the file). Raises ValueError or FileNotFoundError with one line for the user;
    exits after --help.
    """
    files, wishes, wants_help = _parse(argv)
    kinds = (*PLAIN, Texts)
    defaults = {k: v for k, v in settings.items() if not k.startswith('_') and type(v) in kinds}
    values = dict(defaults)
    given = {}
    # Keys that may be fields of the model's Config, which is not known yet: (key, value, where,
    # is_own); is_own: it may be a helper of the file; None: nobody wrote it (see is_only_starred).
    unknown = []

    def assign(key, value, where, is_own=False):
        if key not in defaults:
            unknown.append((key, value, where, is_own))
            return
        check = _from_text if where == 'command line' else _checked
        values[key] = check(key, value, defaults[key], where)
        given[key] = where

    def assign_command_line():
        for key, words in wishes.items():
            assign(key, words, 'command line')

    assign_command_line()
    if resolve_device and files and 'device' in values:
        values['device'] = resolve_device(values['device'])
    for path in files:
        if os.path.realpath(path) == os.path.realpath(settings.get('__file__', '')):
            raise ValueError(f"command line: {path} is the script, not a config file")
        result = config_file.run(path, {**settings, **values})
        for key, value in result.values.items():
            is_tool = isinstance(value, types.ModuleType) or callable(value)
            if key.startswith('_') or (is_tool and key not in defaults):
                continue
            where = result.origins.get(key, path)
            if not result.is_only_starred(key):
                assign(key, value, where, is_own=key in result.own_names)
            elif type(_plain(value)) in PLAIN:
                assign(key, value, where, is_own=None)
    # Only the files see the resolved device: if nobody set it, the setting is 'auto' again.
    if 'device' in defaults and 'device' not in given:
        values['device'] = defaults['device']
    assign_command_line()

    Config = config_class(values) if config_class else None
    if Config:
        for field in dataclasses.fields(Config):
            if field.name != 'vocab_size' and field.name not in defaults:
                defaults[field.name] = values[field.name] = field.default
    if wants_help:
        print_help(settings, defaults, Config)
        sys.exit(0)
    for key, value, where, is_own in unknown:
        if key in defaults:
            assign(key, value, where)
        elif is_own is None:
            continue
        elif not is_own or _is_misspelt(key, defaults):
            _refuse(key, value, where, defaults)
    settings.update(values)
    return values, given


def print_help(settings, defaults, Config=None):
    """Print a script's docstring, and each setting with its default and the comment on its line.

    The comments are read from the source of the script and of the model's Config.
    """
    source = ''
    if Config:
        for base in Config.__mro__[:-1]:
            source += inspect.getsource(base)
    source += Path(settings['__file__']).read_text(encoding='utf-8')
    comments = dict(re.findall(r'^ *(\w+)(?:: [^=\n]+)? = .*?  # (.*)$', source, re.MULTILINE))
    print(settings.get('__doc__') or '')
    print("Settings, as --key=value:")
    for key, value in defaults.items():
        setting = f"{key}={value!r}"
        print(f"  --{setting:38} {comments.get(key, '')}")


def divided(value, separator):
    """The texts of a setting of Texts: those of a list as they are; a single text is divided at the
    separator."""
    if isinstance(value, list):
        return value
    return [text.strip() for text in value.split(separator) if text.strip()]


class CommandLine(typing.NamedTuple):
    """The words of a command line."""

    files: list  # config files, in order
    settings: dict  # {key: text}
    wants_help: bool


def parse(argv):
    """The CommandLine that the words are. Where a setting is repeated, the last one counts."""
    files, wishes, wants_help = _parse(argv)
    return CommandLine(files, {key: words[-1] for key, words in wishes.items()}, wants_help)


def _parse(argv):
    """Like `parse`, with {key: [text]}: a setting may be repeated."""
    files = []
    wishes = {}
    wants_help = False
    words = iter(argv)
    for word in words:
        if word in ('-h', '--help'):
            wants_help = True
        elif match := re.match(r'(?:--)?([A-Za-z_]\w*)=(.*)', word, re.DOTALL):
            wishes.setdefault(match[1], []).append(match[2])
        elif re.fullmatch(r'--[A-Za-z_]\w*', word):
            text = next(words, None)
            if text is None or text.startswith('--'):
                raise ValueError(f"command line: {word} has no value; write {word}=VALUE")
            wishes.setdefault(word[2:], []).append(text)
        elif word.startswith('-'):
            raise ValueError(
                f"command line: {_show(word)} is not a setting; they are written "
                "--key=value, with _ in the key"
            )
        elif os.path.isfile(word):
            files.append(word)
        else:
            near = _nearest_file(word)
            hint = f"the nearest is {near}" if near else "settings are written --key=value"
            raise FileNotFoundError(f"command line: there is no config file {_show(word)} ({hint})")
    return files, wishes, wants_help


def _nearest_file(word):
    """The config file with nearly this name: in its folder, in config/ or in the repository; or
    None."""
    folder, name = os.path.split(word)
    files = {}  # by their names; the first folder counts
    for place in (folder, 'config', config_file.ROOT / 'config'):
        if os.path.isdir(place):
            for path in Path(place).glob('*.py'):
                files.setdefault(path.stem, path)
    near = difflib.get_close_matches(name.removesuffix('.py'), files, n=1, cutoff=0.7)
    return files[near[0]] if near else None


def _is_misspelt(key, settings):
    """Whether `key` is so similar to a setting that it must be that setting misspelt."""
    return bool(difflib.get_close_matches(key, settings, n=1, cutoff=MISSPELT))


def _refuse(key, value, where, settings):
    """ValueError for a key that is not a setting.

    vocab_size in a file, which nanoGPT ignores too, is only told.
    """
    if key == 'vocab_size':
        if where == 'command line':
            raise ValueError(f"{where}: there is no setting 'vocab_size': the dataset decides it")
        if os.environ.get('RANK', '0') == '0':
            notice = f"{where}: vocab_size={_show(value)} is ignored: the dataset decides it"
            print(notice, flush=True)
        return
    near = _nearest_setting(key, settings)
    problem = f"{where}: there is no setting {key!r}"
    if near:
        problem += f"; the nearest is {near!r}"
    if where == 'command line':
        raise ValueError(f"{problem} (--help lists all)")
    if near:
        raise ValueError(f"{problem} (names of the file's own begin with _)")
    raise ValueError(
        f"{problem}, and the file does not use it: a name of its own has to be read in the "
        "file, or begin with _"
    )


def _nearest_setting(key, settings):
    """The setting that is meant by a name, as far as can be guessed, or None."""
    alias = ALIASES.get(key.lower())
    if alias in settings:
        return alias
    near = difflib.get_close_matches(key.lower(), settings, n=1, cutoff=SIMILAR)
    return near[0] if near else None


def _from_text(key, words, default, where):
    """The value that the command line's words for a setting stand for.

    Where a setting is repeated the last word counts, except for Texts. It is read as a Python
    literal, or used as it is where the default is a str.
    """
    if type(default) is Texts:
        return _texts(key, words, where)
    text = words[-1]
    if type(default) is str and default != 'auto':
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            value = ast.literal_eval(text)
    except Exception:  # not a literal: a bare word such as bfloat16
        value = text
    return _checked(key, value, default, where)


def _texts(key, words, where):
    """The value of a setting of Texts: a str for a single word that is not a list, else a list."""
    if len(words) == 1 and not LIST.match(words[0]):
        return words[0]
    texts = []
    for word in words:
        if LIST.match(word):
            texts += _list(key, word, where)
        else:
            texts.append(word)
    return texts


def _list(key, word, where):
    """The list of texts that `word` is in Python's notation."""
    try:
        value = ast.literal_eval(word.strip())
        if type(value) is not str:  # what brackets around one text alone are
            return _checked(key, value, Texts(), where)
    except (SyntaxError, ValueError):
        pass
    raise ValueError(
        f"{where}: {key}={word} begins like a list of texts, but is not one; a list is written "
        f"--{key}=\"['a', 'b']\""
    )


def _checked(key, given, default, where):
    """`given` in the type of `default`. ValueError if it can't be that without changing its value.

    1e6 fits an int, 1 fits a float, and 0 and 1 fit a bool.
    """
    if type(default) is Texts:
        if isinstance(given, (list, tuple)) and all(type(text) is str for text in given):
            return list(given)
        if type(given) is str:
            return given
        raise ValueError(f"{where}: {key} takes a text or a list of texts, not {_show(given)}")
    value = _plain(given)
    if type(default) is float and type(value) is int and abs(value) < 1e300:
        value = float(value)
    elif type(default) is int and type(value) is float and value.is_integer():
        value = int(value)
    elif type(default) is bool and type(value) is int and value in (0, 1):
        value = bool(value)
    fits = type(value) is type(default) or (default in ('auto', None) and type(value) in PLAIN)
    if type(value) is float:
        fits = fits and math.isfinite(value)
    if type(value) is int:
        fits = fits and abs(value) < 2**63
    if not fits:
        kinds = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text'}
        kind = kinds.get(type(default), 'a plain value')
        if default == 'auto':
            kind = 'auto or a plain value'
        raise ValueError(f"{where}: {key} takes {kind}, not {_show(given)}")
    return value


def _plain(value):
    """The plain value of a NumPy scalar, a path, or a device or dtype of torch."""
    numpy = sys.modules.get('numpy')  # a file that uses it has imported it
    torch = sys.modules.get('torch')
    if numpy and isinstance(value, numpy.generic):
        return value.item()
    if torch and isinstance(value, (torch.device, torch.dtype)):
        return str(value).removeprefix('torch.')
    if isinstance(value, PurePath):
        return str(value)
    return value


def _show(value):
    """A value in one line of an error, however large it is."""
    try:
        text = ' '.join(repr(value).split())
    except Exception:  # an int of thousands of digits
        text = f"this {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:90]}…{text[-1]}"
