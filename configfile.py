"""A config file: Python that is run over a script's settings, and what it assigned.

A config file may import others: `from config.NAME import *` runs config/NAME.py, of the current
folder or else of this repository, over the same settings, so that it sees the device too.
"""
import ast
import contextlib
import sys
import traceback
from importlib.machinery import ModuleSpec
from pathlib import Path

ROOT = Path(__file__).resolve().parent


class ConfigFileError(ValueError):
    """A config file that can't be run, with the file and the line."""


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

    own_names: those of all files that it ran.
    """

    def __init__(self, namespace):
        self.namespace = namespace
        self.own_names = set()

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
        return None     # an ordinary one

    def exec_module(self, module):
        assigned, own_names = run(module.__spec__.origin, self.namespace)
        vars(module).update(assigned)
        self.own_names |= own_names


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

    Returns ({name: value} of what it assigns, the names in it that may be its own). Raises
    ValueError, which names the file and the line.
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
    except BaseException as error:      # SystemExit too
        what = ' '.join(f"{type(error).__name__}: {error}".split())
        raise ConfigFileError(f"{path}, line {_line_in(path, error)}: {what}") from None
    # what a function assigns to its globals passes the recorder by
    changed = {k: v for k, v in namespace.items() if k not in before or before[k] is not v}
    return changed | namespace.assigned, _own_names(tree) | importer.own_names


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


def _imported(node):
    """The names that an import statement binds.

    Of `from MODULE import *` only those of the standard library, such as math's pi and e.
    """
    names = {alias.asname or alias.name for alias in node.names}
    if '*' in names and (node.module or '').partition('.')[0] in sys.stdlib_module_names:
        module = sys.modules.get(node.module)       # None: the statement was not reached
        names |= set(dir(module))
    return names


def _line_in(path, error):
    """The line of the file at which an exception passed through it."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    return lines[-1] if lines else 1
