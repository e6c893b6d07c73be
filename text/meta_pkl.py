"""Reads nanoGPT's meta.pkl without executing anything that it holds."""

import io
import pickle
import re

import numpy as np


class _NumpyType:
    """What stands for numpy.dtype while a meta.pkl is read."""

    def __init__(self, code, *flags):
        self.code = code
        self.order = '='

    def __setstate__(self, state):
        self.order = state[1]


class _NumpyScalar:
    """What stands for the function with which NumPy's scalars are unpickled.

    It makes a plain int, bool, float or str.
    """

    def __new__(cls, kind, content):
        is_known = re.fullmatch(r'b1|[iu][1248]|f[248]|U\d{1,4}', kind.code)
        if not is_known or kind.order not in ('<', '>', '|', '='):
            raise ValueError(f"a NumPy scalar of the type {str(kind.code)[:40]!r}")
        return np.frombuffer(content, np.dtype(kind.code).newbyteorder(kind.order)).item()

    def __setstate__(self, state):  # there is no object whose state could be set
        raise ValueError("a NumPy scalar with a state")


class _NotRead:
    """What stands for a NumPy array and its bytes, and for the type of a defaultdict's values.

    It keeps nothing, so that the rest of the file can be read.
    """

    __slots__ = ()

    def __new__(cls, *args):
        return object.__new__(cls)

    def __setstate__(self, state):
        pass

    def __repr__(self):
        return "a NumPy array"


class _EmptyDict:
    """What stands for OrderedDict and defaultdict. It makes a plain dict, whose entries follow.

    It copies nothing: a small file could ask for many copies of its largest list.
    """

    def __new__(cls, *args):
        if any(type(arg) is list for arg in args):
            raise ValueError("an OrderedDict that Python 2 wrote")
        return {}

    def __setstate__(self, state):  # there is no object whose state could be set
        raise ValueError("a dictionary with a state")


class _RestrictedUnpickler(pickle._Unpickler):
    """An unpickler of plain types and NumPy's scalars, and of dicts of other kinds as plain ones.

    NumPy's arrays are not read, but may be there. Anything else is refused. It is the unpickler in
    Python: the one in C would make room for two billion objects, if asked to.
    """

    # numpy._core since NumPy 2; __builtin__ and _codecs (an array's bytes) up to protocol 2.
    STAND_INS = {
        ('numpy', 'dtype'): _NumpyType,
        ('numpy', 'ndarray'): _NotRead,
        ('numpy.core.multiarray', 'scalar'): _NumpyScalar,
        ('numpy._core.multiarray', 'scalar'): _NumpyScalar,
        ('numpy.core.multiarray', '_reconstruct'): _NotRead,
        ('numpy._core.multiarray', '_reconstruct'): _NotRead,
        ('numpy.core.numeric', '_frombuffer'): _NotRead,
        ('numpy._core.numeric', '_frombuffer'): _NotRead,
        ('collections', 'OrderedDict'): _EmptyDict,
        ('collections', 'defaultdict'): _EmptyDict,
        ('builtins', 'int'): _NotRead,
        ('builtins', 'str'): _NotRead,
        ('builtins', 'list'): _NotRead,
        ('__builtin__', 'int'): _NotRead,
        ('__builtin__', 'long'): _NotRead,
        ('__builtin__', 'str'): _NotRead,
        ('__builtin__', 'list'): _NotRead,
        ('_codecs', 'encode'): _NotRead,
    }

    def find_class(self, module, name):
        if (module, name) in self.STAND_INS:
            return self.STAND_INS[module, name]
        raise ValueError(
            f"meta.pkl asks for {module}.{name}; it may hold only numbers, strings, lists and "
            "dictionaries"
        )


def describe_meta_pkl(data):
    """(description or None, vocab_size, why there is no description) of nanoGPT's meta.pkl (bytes).

    Its table itos makes a description where it has one character for each id; a vocab_size beyond
    that is padding. Without such a table, vocab_size is enough to train. The file is read without
    executing anything it holds. Raises ValueError.
    """
    try:
        meta = _RestrictedUnpickler(io.BytesIO(data)).load()
        itos = meta.get('itos')
        entries = _entries(itos)
        vocab_size = meta.get('vocab_size')
    except Exception as error:
        if str(error).startswith('meta.pkl'):
            raise
        raise ValueError(
            f"meta.pkl cannot be read as nanoGPT's ({type(error).__name__}: {error})"
        ) from None
    if vocab_size is None:
        vocab_size = len(entries)
        if not entries:
            raise ValueError(
                f"meta.pkl has no vocab_size, {_problem_without_entries(itos)}: add "
                "vocab_size, how many ids there are"
            )
    if type(vocab_size) is float and vocab_size.is_integer():
        vocab_size = int(vocab_size)
    if type(vocab_size) is not int or not 1 <= vocab_size <= 1 << 16:
        raise ValueError(
            f"meta.pkl says vocab_size={str(vocab_size)[:40]}: it must be a whole number from 1 to "
            "65,536, as many ids as uint16 has; a larger vocabulary needs a meta.json that says "
            "uint32"
        )
    if len(entries) > vocab_size:
        raise ValueError(
            f"meta.pkl says vocab_size={vocab_size}, but its itos has {len(entries)} entries"
        )
    if itos is None:
        return None, vocab_size, "has no itos, the table with a character for each id"
    if isinstance(itos, _NotRead):
        return (
            None,
            vocab_size,
            "has an itos that is a NumPy array, which is not read: save itos.tolist()",
        )
    if not entries or any(type(entry) is not str or len(entry) != 1 for entry in entries):
        problem = (
            "has an itos that is not a single character for each id from 0 on, and no other is read"
        )
        return None, vocab_size, problem
    return {'kind': 'char', 'chars': ''.join(entries)}, vocab_size, None


def _entries(itos):
    """The entries of meta.pkl's itos, a dictionary or a list, in the order of their ids.

    Empty where some are missing, or where it is something else.
    """
    if not isinstance(itos, (dict, list, tuple, str)):
        return []
    try:
        return [itos[i] for i in range(len(itos))]
    except KeyError:
        return []


def _problem_without_entries(itos):
    """What to say of an itos whose entries do not tell the size of the vocabulary."""
    if itos is None:
        return "and no itos"
    if isinstance(itos, dict) and itos:
        return f"and its itos of {len(itos)} entries does not have one for each id from 0 to {len(itos) - 1}"
    if isinstance(itos, (dict, list, tuple, str)):
        return "and its itos is empty"
    if isinstance(itos, _NotRead):
        return "and its itos is a NumPy array, which is not read"
    return "and its itos is not a table"
