"""A config file: Python that is run over a script's settings, and what it assigned.

A config file may import others: `from config.NAME import *` runs config/NAME.py, of the current
folder or else of this repository, over the same settings, so that it sees the device too.
"""

import ast
import contextlib
import dataclasses
import sys
import traceback
from importlib.machinery import ModuleSpec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class ConfigFileError(ValueError):
    """A config file that can't be run, with the file and the line."""


@dataclasses.dataclass
class Result:
    """What config files assigned, and what is known about the names.

    values: {name: value}. origins: {name: path} of those that an imported config file assigned
    last. own_names: what may be helpers rather than settings (see _own_names). bound_names: what
    statements bind by name, except for imports of config files. star_names: what
    `from MODULE import *` bound, of modules that are not config files.
    """

    values: dict = dataclasses.field(default_factory=dict)
    origins: dict = dataclasses.field(default_factory=dict)
    own_names: set = dataclasses.field(default_factory=set)
    bound_names: set = dataclasses.field(default_factory=set)
    star_names: set = dataclasses.field(default_factory=set)

    def add_names(self, other):
        self.own_names |= other.own_names
        self.bound_names |= other.bound_names
        self.star_names |= other.star_names

    def is_only_starred(self, name):
        """Whether nobody wrote this name: a star import alone bound it."""
        return name in self.star_names and name not in self.bound_names


class _Recorder(dict):
    """A namespace for exec that remembers what was assigned, even if the value stayed the same."""

    def __init__(self, values):
        super().__init__(values)
        self.assigned = {}

    def __setitem__(self, key, value):
        self.assigned[key] = value
        super().__setitem__(key, value)

    def __delitem__(self, key):
        self.assigned.pop(key, None)
        super().__delitem__(key)


class _ConfigImporter:
    """Finds config.NAME for the import statement, and runs it as a config file over `namespace`.

    imported: what all these files assigned together, a Result.
    """

    def __init__(self, namespace):
        self.namespace = namespace
        self.imported = Result()

    def find_spec(self, name, path=None, target=None):
        if name == 'config':
            return self._package(name, [Path('config').absolute(), ROOT / 'config'])
        if not name.startswith('config.'):
            return None
        for folder in path:
            place = Path(folder, name.rpartition('.')[2])
            if place.with_suffix('.py').is_file():
                return ModuleSpec(name, self, origin=str(place.with_suffix('.py')))
            if place.is_dir():
                return self._package(name, [place])
        return None

    @staticmethod
    def _package(name, folders):
        spec = ModuleSpec(name, None, is_package=True)
        spec.submodule_search_locations = [str(folder) for folder in folders]
        return spec

    def create_module(self, spec):
        return None  # an ordinary one

    def exec_module(self, module):
        path = module.__spec__.origin
        result = run(path, self.namespace)
        vars(module).update(result.values)
        for name in result.values:
            self.imported.origins[name] = result.origins.get(name, path)
        self.imported.add_names(result)


@contextlib.contextmanager
def _imports_configs(importer):
    """Inside this, `importer` answers for config.NAME, and nothing of that stays in sys.modules."""

    def take_out():
        names = [name for name in sys.modules if name == 'config' or name.startswith('config.')]
        return {name: sys.modules.pop(name) for name in names}

    before = take_out()
    sys.meta_path.insert(0, importer)
    try:
        yield
    finally:
        sys.meta_path.remove(importer)
        take_out()
        sys.modules.update(before)


def run(path, namespace):
    """Run the config file at `path` over a copy of `namespace`.

    Returns the Result. Raises ConfigFileError, whose message has the file and the line.
    """
    before = {**namespace, '__file__': path}
    namespace = _Recorder(before)
    importer = _ConfigImporter(namespace)
    try:
        tree = ast.parse(Path(path).read_bytes(), path)
        with _imports_configs(importer):
            exec(compile(tree, path, 'exec'), namespace)
    except SyntaxError as error:
        raise ConfigFileError(f"{path}, line {error.lineno or 1}: {error.msg}") from None
    except (KeyboardInterrupt, ConfigFileError):
        raise
    except BaseException as error:  # SystemExit too
        what = ' '.join(f"{type(error).__name__}: {error}".split())
        raise ConfigFileError(f"{path}, line {_line_in(path, error)}: {what}") from None
    # what a function assigns to its globals passes the recorder by
    changed = {k: v for k, v in namespace.items() if k not in before or before[k] is not v}
    result = Result(
        values=changed | namespace.assigned,
        own_names=_own_names(tree),
        bound_names=_bound_names(tree),
        star_names=_star_names(tree),
    )
    for name, origin in importer.imported.origins.items():
        if name not in result.bound_names:
            result.origins[name] = origin
    result.add_names(importer.imported)
    return result


def _own_names(tree):
    """The names that a file reads, and those that its loops, with statements and imports bind.

    One of these that is not a setting is a helper. A name that is assigned and never read again was
    meant for a setting.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, (ast.For, ast.AugAssign)):
            names |= _names_in(node.target)
        elif isinstance(node, ast.With):
            for item in node.items:
                if item.optional_vars:
                    names |= _names_in(item.optional_vars)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= _imported(node)
    return names


def _names_in(target):
    return {node.id for node in ast.walk(target) if isinstance(node, ast.Name)}


def _bound_names(tree):
    """The names that a file's statements bind by name, except for imports of config files."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)) and not _is_of_config(node):
            names |= _imported(node)
    return names - {'*'}


def _star_names(tree):
    """The names that `from MODULE import *` binds, for all modules but config files.

    A module that is not loaded has none: its statement was not reached.
    """
    names = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.names[0].name != '*':
            continue
        module = sys.modules.get(node.module)
        if module and not _is_of_config(node):
            names |= set(getattr(module, '__all__', dir(module)))
    return names


def _is_of_config(node):
    """Whether an import statement is `from config.NAME import …`."""
    return (getattr(node, 'module', None) or '').partition('.')[0] == 'config'


def _imported(node):
    """The names that stand in an import statement for what it binds."""
    return {(alias.asname or alias.name).partition('.')[0] for alias in node.names}


def _line_in(path, error):
    """The line of the file at which an exception passed through it."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    return lines[-1] if lines else 1
