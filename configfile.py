"""A config file: Python that is run over a script's settings, and what it assigned."""
import traceback
from pathlib import Path


class _Recorder(dict):
    """A namespace for exec that remembers what was assigned, also where the value stayed the same."""

    def __init__(self, values):
        super().__init__(values)
        self.assigned = {}

    def __setitem__(self, key, value):
        self.assigned[key] = value
        super().__setitem__(key, value)

    def __delitem__(self, key):
        self.assigned.pop(key, None)
        super().__delitem__(key)


def run(path, namespace):
    """{name: value} of what the config file at `path` assigns. Raises ValueError, which names the file and the line."""
    before = {**namespace, '__file__': path}
    namespace = _Recorder(before)
    try:
        exec(compile(Path(path).read_bytes(), path, 'exec'), namespace)
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno or 1}: {error.msg}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:      # SystemExit too
        what = ' '.join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{path}, line {_line_in(path, error)}: {what}") from None
    # what a function assigns to its globals passes the recorder by
    return {k: v for k, v in namespace.items() if k not in before or before[k] is not v} | namespace.assigned


def _line_in(path, error):
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return lines[-1] if lines else 1
