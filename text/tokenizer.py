"""Text to token ids and back: characters, bytes, tiktoken's encodings (GPT-2's among them),
sentencepiece's models, and whatever a tokenizer.json of Hugging Face's says.

A tokenizer has
  encode(text) -> [ids]; the text of a special token, such as <|endoftext|>, is that token;
  encode_ordinary(text) -> ids, a list or an array; there it is plain text: for documents, which may
  contain it; decode(ids) -> the text that they are; decode_bytes(ids) -> the bytes that they add
  behind other text. The two differ
    where a text's first token loses the space before it: "The" is " The" behind another word;
  vocab_size; eot, the id that ends a document, or None; special, {text: id} of the special tokens;
  describe() -> the plain dict that meta.json and checkpoints keep and `load` turns back into the
    tokenizer;
  lossless: whether decode(encode(text)) is the text, as far as a PROBE of hard cases shows.
  bert-base-uncased, for one,
    drops capitals, accents, line ends and runs of spaces: a model can't write what its tokenizer
    has dropped. Figures per byte or word are then taken over the real text, and are flattering:
    what was dropped costs nothing.
"""

import base64
import contextlib
import functools
import io
import json
import pickle
import re
from types import MappingProxyType

import numpy as np

EOT = '<|endoftext|>'
# What ends a document in a vocabulary that says nothing: Llama's, Gemma's, BERT's. [SEP] stands
# between BERT's sentences.
ENDS = (EOT, '<|end_of_text|>', '</s>', '<eos>', '[SEP]')
GPT2 = {'kind': 'tiktoken', 'name': 'gpt2'}
PROBE = ' Two  spaces,\n\n\ta tab; \u00c9t\u00e9 e\u0301 \ufb01 \uff21 \u65e5\u672c \U0001f680\r\n '
# how GPT-2 divides a text
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
# of bytes, in byte-level BPE
SPELLING = ''.join(chr(b if b in PRINTABLE else 256 + OTHERS.index(b)) for b in range(256))
BYTES = {c: b for b, c in enumerate(SPELLING)}


def _is_lossless(own):
    with contextlib.suppress(ValueError):  # it can't say all of it
        return own.decode(own.encode(PROBE)) == PROBE
    return False


class CharTokenizer:
    """One id per character, in the order of `chars`. What is not among them can't be encoded."""

    eot, lossless = None, True
    special = MappingProxyType({})

    def __init__(self, chars):
        self.chars, self.vocab_size = list(chars), len(chars)
        self.ids = {c: i for i, c in enumerate(self.chars)}
        codes = [ord(c) for c in self.chars]
        # by code point; the last one stands for all beyond
        self.table = np.full(max(codes, default=0) + 2, -1)
        self.table[codes] = range(len(codes))

    @classmethod
    def of(cls, text):
        """The tokenizer of the characters that occur in `text`, sorted."""
        return cls(sorted(set(text)))

    def encode(self, text):
        return self.encode_ordinary(text).tolist()

    def encode_ordinary(self, text):
        codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), '<u4')
        ids = self.table[np.minimum(codes, len(self.table) - 1)]
        if (unknown := ids < 0).any():
            at = int(unknown.argmax())
            raise ValueError(
                f"the character {text[at]!r} at position {at} is not among the {self.vocab_size} that this "
                "model knows"
            )
        return ids

    def decode_bytes(self, ids):
        return self.decode(ids).encode()

    def decode(self, ids):
        known = len(self.chars)  # a vocabulary may be padded
        return ''.join(self.chars[i] if i < known else '\ufffd' for i in ids)

    def describe(self):
        return {'kind': 'char', 'chars': ''.join(self.chars)}


class ByteTokenizer:
    """One id per byte of UTF-8."""

    vocab_size, eot, lossless = 256, None, True
    special = MappingProxyType({})

    def encode(self, text):
        return list(text.encode())

    def encode_ordinary(self, text):
        return np.frombuffer(text.encode(), np.uint8)

    def decode_bytes(self, ids):
        return bytes(ids)

    def decode(self, ids):
        return bytes(ids).decode(errors='replace')

    def describe(self):
        return {'kind': 'byte'}


class TiktokenTokenizer:
    """An encoding of tiktoken: gpt2, p50k_base, cl100k_base, o200k_base.

    size: only its first size - 1 entries, and `<|endoftext|>` as the last one, for models too small
    for all of them. An entry is made of entries before it, the first being the 256 bytes, so that
    these are an encoding of any text too.
    """

    lossless = True

    def __init__(self, name, size=None):
        import tiktoken  # costs a second to load: only where it is used

        self.name = name
        if name not in tiktoken.list_encoding_names():
            raise ValueError(
                f"tiktoken has no encoding {name!r}: take one of {', '.join(tiktoken.list_encoding_names())}"
            )
        try:
            self.encoding = tiktoken.get_encoding(name)
        except OSError as error:  # requests' errors are OSErrors
            raise OSError(
                f"tiktoken cannot download its encoding {name!r} ({type(error).__name__}): on a machine with a "
                "network, load it once with TIKTOKEN_CACHE_DIR set, and take that folder along"
            ) from None
        self.size = None if size == self.encoding.n_vocab else size
        if self.size is not None:
            if not 257 <= size <= self.encoding.eot_token + 1:
                raise ValueError(
                    f"{size} entries of {name!r}: it can be cut to between 257, the bytes and <|endoftext|>, "
                    f"and {self.encoding.eot_token + 1}"
                )
            ranks = {
                entry: rank
                for entry, rank in self.encoding._mergeable_ranks.items()
                if rank < size - 1
            }
            self.encoding = tiktoken.Encoding(
                f'{name}-{size}',
                pat_str=self.encoding._pat_str,
                mergeable_ranks=ranks,
                special_tokens={'<|endoftext|>': size - 1},
            )
        self.vocab_size, self.eot = self.encoding.n_vocab, self.encoding.eot_token
        self.special = self.encoding._special_tokens

    def encode(self, text):
        return self.encoding.encode(text, allowed_special='all')

    def encode_ordinary(self, text):
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes(ids)

    def decode(self, ids):
        return self.encoding.decode(ids)

    def describe(self):
        return {'kind': 'tiktoken', 'name': self.name, **({'size': self.size} if self.size else {})}


class SentencePieceTokenizer:
    """A model of the library sentencepiece (unigram or BPE), its .model file as base64.

    Its control symbols, such as </s>, are special tokens, and their texts are seen. A text has
    neither <s> nor </s> added.
    """

    def __init__(self, model):
        try:
            import sentencepiece
        except ImportError:
            raise ValueError(
                "this tokenizer is a model of sentencepiece: pip install sentencepiece"
            ) from None
        try:
            self.model, self.pieces = (
                model,
                sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(model)),
            )
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"no sentencepiece model, or a damaged one ({' '.join(str(error).split())[:80]})"
            ) from None
        ids, piece = range(self.pieces.vocab_size()), self.pieces.id_to_piece
        self.bytes = [
            bytes([int(piece(i)[3:5], 16)])
            if self.pieces.is_byte(i)
            else piece(i).replace('\u2581', ' ').encode()
            for i in ids
        ]
        self.special = {piece(i): i for i in ids if self.pieces.is_control(i)}
        self.marks = re.compile('(' + '|'.join(map(re.escape, self.special)) + ')')
        # "The" is a beginning's " The"
        spaced = next((i for i in ids if re.fullmatch('\u2581\\w+', piece(i))), None)
        self.is_prefixed = spaced is not None and not self.pieces.decode([spaced]).startswith(' ')
        self.vocab_size, eot = len(ids), self.pieces.eos_id()
        self.eot = None if eot < 0 else eot
        self.lossless = _is_lossless(self)

    def encode(self, text):
        parts = self.marks.split(text) if self.special else [text]
        return [
            i
            for part in parts
            for i in ([self.special[part]] if part in self.special else self.pieces.encode(part))
        ]

    def encode_ordinary(self, text):
        return self.pieces.encode_as_numpy(text)

    def decode_bytes(self, ids):
        return b''.join(self.bytes[i] for i in ids)

    def decode(self, ids):
        content = self.decode_bytes(ids)
        return (content.removeprefix(b' ') if self.is_prefixed else content).decode(
            errors='replace'
        )

    def describe(self):
        return {'kind': 'sentencepiece', 'model': self.model}


class HuggingFaceTokenizer:
    """The text of a tokenizer.json, run by the library `tokenizers`, without the tokens that it
    puts around a text.

    eot: the text of the token that ends a document, where it is not the first of ENDS. Raises
    ValueError.
    """

    def __init__(self, json, eot=None):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError(
                "this model's tokenizer.json needs a package: pip install tokenizers"
            ) from None
        self.json, self.end = json, eot
        try:
            self.tokenizer = Tokenizer.from_str(json)
        except Exception as error:  # the library has no other class
            raise ValueError(f"this model's tokenizer.json is damaged: {error}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        vocab = self.tokenizer.get_vocab()
        self.vocab_size, self.eot = (
            max(vocab.values(), default=-1) + 1,
            vocab.get(end_of(vocab, eot)),
        )
        added = self.tokenizer.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}
        kinds = _kinds(json)
        # then a token's text is its own, else it may begin with a space
        self.is_byte_level = 'ByteLevel' in kinds
        self.bytes = (
            self._spelled(vocab)
            if self.is_byte_level
            else self._behind(vocab, 'ByteFallback' in kinds)
        )
        self.lossless = _is_lossless(self)

    def _spelled(self, vocab):
        """{id: bytes} of a byte-level BPE."""
        added = self.tokenizer.get_added_tokens_decoder().keys()
        return {
            i: entry.encode()
            if i in added or not BYTES.keys() >= set(entry)
            else bytes(BYTES[c] for c in entry)
            for entry, i in vocab.items()
        }

    def _behind(self, vocab, has_bytes):
        """{id: bytes} of other kinds: what each token adds to the text of a word before it."""
        # GPT-1's: the space is behind a word
        if suffix := (json.loads(self.json).get('decoder') or {}).get('suffix'):
            self.first = {i: entry.replace(suffix, ' ').encode() for entry, i in vocab.items()}
            return self.first
        texts, ids = (
            lambda rows: self.tokenizer.decode_batch(rows, skip_special_tokens=False),
            sorted(vocab.values()),
        )
        word = next(
            (i for i, text in zip(ids, texts([[i] for i in ids])) if text.isalnum()), ids[0]
        )
        (known,) = texts([[word]])
        found = {
            i: text.removeprefix(known).encode()
            for i, text in zip(ids, texts([[word, i] for i in ids]))
        }
        singles = {
            i: bytes([int(entry[3:5], 16)])
            for entry, i in vocab.items()
            if re.fullmatch('<0x[0-9A-F]{2}>', entry)
        }
        # at a text's beginning all but these may be another text
        self.first = singles if has_bytes else {}
        return found | self.first

    def encode(self, text):
        return self._encode(text, False)

    def encode_ordinary(self, text):
        return (
            self._encode(text, True)
            if self.faster is None
            else self.faster.encode_to_numpy(text, disallowed_special=())
        )

    @functools.cached_property
    def faster(self):
        """The same as an encoding of tiktoken's, which takes a fifth of the time, where there is
        one, else None: of a byte-level BPE of GPT-2's words that looks for whole words first and
        whose ids have the order of its merges."""
        found = json.loads(self.json)
        model, words, added = (
            found['model'],
            found.get('pre_tokenizer') or {},
            found.get('added_tokens') or [],
        )
        if (
            not self.is_byte_level
            or not model.get('ignore_merges')
            or found.get('normalizer')
            or words.get('type') != 'ByteLevel'
            or words.get('add_prefix_space')
            or not words.get('use_regex', True)
            or not all(token['special'] for token in added)
        ):
            return None
        pairs = [merge.split(' ') if type(merge) is str else merge for merge in model['merges']]
        merged, special = (
            [model['vocab'][left + right] for left, right in pairs],
            {token['id'] for token in added},
        )
        ids = [*(model['vocab'].get(c, -1) for c in SPELLING), *merged]
        if -1 in ids or merged != sorted(merged) or sorted([*ids, *special]) != sorted(self.bytes):
            return None
        from tiktoken import Encoding

        return Encoding(
            'bpe',
            pat_str=GPT2_WORDS,
            mergeable_ranks={self.bytes[i]: i for i in ids},
            special_tokens={},
        )

    def _encode(self, text, special_is_plain):
        self.tokenizer.encode_special_tokens = special_is_plain
        try:  # fast: without each token's place in the text
            return self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except Exception as error:
            raise ValueError(
                f"this tokenizer.json can't encode the text: {' '.join(str(error).split())[:120]}"
            ) from None

    def decode_bytes(self, ids):
        return b''.join(self.bytes.get(i, b'') for i in ids)

    def decode(self, ids):
        if self.is_byte_level or not len(ids) or ids[0] in self.first:
            return self.decode_bytes(ids).decode(errors='replace')
        first = self.tokenizer.decode(ids[:1], skip_special_tokens=False)
        return first + self.decode_bytes(ids[1:]).decode(errors='replace')

    def describe(self):
        return {'kind': 'huggingface', 'json': self.json, **({'eot': self.end} if self.end else {})}


def end_of(entries, wish=None):
    """The one of these entries that ends a document: <|endoftext|>, else the wish, else another of
    ENDS, or None."""
    return next((end for end in (EOT, wish, *ENDS) if end in entries), None)


def _kinds(text):
    """The kinds of decoder in a tokenizer.json."""
    decoder = json.loads(text).get('decoder') or {}
    return {part['type'] for part in (decoder, *decoder.get('decoders', [])) if 'type' in part}


def load(description):
    """The tokenizer that a description stands for. Raises ValueError or OSError."""
    check_description(description)
    kinds = {
        'char': (CharTokenizer, 'chars'),
        'byte': (ByteTokenizer,),
        'tiktoken': (TiktokenTokenizer, 'name', 'size'),
        'sentencepiece': (SentencePieceTokenizer, 'model'),
        'huggingface': (HuggingFaceTokenizer, 'json', 'eot'),
    }
    make, *keys = kinds[description['kind']]
    return make(**{key: description[key] for key in keys if key in description})


def check_description(description):
    """ValueError unless `load` could take it, without loading anything."""
    match description:
        case {'kind': 'tiktoken', 'size': size} if type(size) is not int or not 257 <= size < 2**32:
            raise ValueError(
                f"a tiktoken tokenizer of the size {str(size)[:40]}: it must be a whole number from 257 on, "
                "the bytes and <|endoftext|>"
            )
        case {'kind': 'huggingface', 'eot': eot} if type(eot) is not str:
            raise ValueError(f"a tokenizer.json's eot is the text of a token, not {str(eot)[:40]}")
        case (
            {'kind': 'char', 'chars': str()}
            | {'kind': 'byte'}
            | {'kind': 'tiktoken', 'name': str()}
            | {'kind': 'sentencepiece', 'model': str()}
            | {'kind': 'huggingface', 'json': str()}
        ):
            return
    raise ValueError(
        f"unknown tokenizer {str(description)[:80]}: its kind must be char (with chars), byte, tiktoken (with "
        "a name), sentencepiece (with its model) or huggingface (with its json)"
    )


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


class _NoCode(pickle._Unpickler):
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
        meta = _NoCode(io.BytesIO(data)).load()
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
