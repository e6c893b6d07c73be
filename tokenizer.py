"""Text to token ids and back: characters, bytes, and tiktoken's encodings (GPT-2's among them).

A tokenizer has encode(text) -> [ids], decode(ids) -> text, decode_bytes(ids) -> bytes, vocab_size, and describe() -> the
plain dict that meta.json and checkpoints keep and `load` turns back into the tokenizer.
"""
import io
import pickle


class CharTokenizer:
    """One id per character, in the order of `chars`. What is not among them can't be encoded."""

    def __init__(self, chars):
        self.chars, self.vocab_size = list(chars), len(chars)
        self.ids = {c: i for i, c in enumerate(self.chars)}

    @classmethod
    def of(cls, text):
        """The tokenizer of the characters that occur in `text`, sorted."""
        return cls(sorted(set(text)))

    def encode(self, text):
        try:
            return [self.ids[c] for c in text]
        except KeyError as error:
            at = text.index(error.args[0])
            raise ValueError(f"the character {error.args[0]!r} at position {at} is not among the {self.vocab_size} "
                             "that this model knows") from None

    def decode_bytes(self, ids):
        return ''.join(self.chars[i] for i in ids).encode()

    def decode(self, ids):
        return ''.join(self.chars[i] for i in ids)

    def describe(self):
        return {'kind': 'char', 'chars': ''.join(self.chars)}


class ByteTokenizer:
    """One id per byte of UTF-8."""

    vocab_size = 256

    def encode(self, text):
        return list(text.encode())

    def decode_bytes(self, ids):
        return bytes(ids)

    def decode(self, ids):
        return bytes(ids).decode(errors='replace')

    def describe(self):
        return {'kind': 'byte'}


class TiktokenTokenizer:
    """An encoding of tiktoken: gpt2, p50k_base, cl100k_base, o200k_base. `<|endoftext|>` in the text is that token.

    size: only its first size - 1 entries, and `<|endoftext|>` as the last one, for models too small for all of them.
    An entry is made of entries before it, the first being the 256 bytes, so that these are an encoding of any text too.
    """

    def __init__(self, name, size=None):
        import tiktoken  # costs a second to load: only where it is used

        self.name = name
        if name not in tiktoken.list_encoding_names():
            raise ValueError(f"tiktoken has no encoding {name!r}: take one of {', '.join(tiktoken.list_encoding_names())}")
        try:
            self.encoding = tiktoken.get_encoding(name)
        except OSError as error:    # requests' errors are OSErrors
            raise OSError(f"tiktoken cannot download its encoding {name!r} ({type(error).__name__}): on a machine with a "
                          "network, load it once with TIKTOKEN_CACHE_DIR set, and take that folder along") from None
        self.size = None if size == self.encoding.n_vocab else size
        if self.size is not None:
            if not 257 <= size <= self.encoding.eot_token + 1:
                raise ValueError(f"{size} entries of {name!r}: it can be cut to between 257, the bytes and <|endoftext|>, "
                                 f"and {self.encoding.eot_token + 1}")
            ranks = {entry: rank for entry, rank in self.encoding._mergeable_ranks.items() if rank < size - 1}
            self.encoding = tiktoken.Encoding(f'{name}-{size}', pat_str=self.encoding._pat_str, mergeable_ranks=ranks,
                                              special_tokens={'<|endoftext|>': size - 1})
        self.vocab_size, self.eot = self.encoding.n_vocab, self.encoding.eot_token

    def encode(self, text):
        return self.encoding.encode(text, allowed_special={'<|endoftext|>'})

    def encode_ordinary(self, text):
        """Like encode, but `<|endoftext|>` is plain text: for documents, which may contain it."""
        return self.encoding.encode_ordinary(text)

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes(ids)

    def decode(self, ids):
        return self.encoding.decode(ids)

    def describe(self):
        return {'kind': 'tiktoken', 'name': self.name, **({'size': self.size} if self.size else {})}


def load(description):
    """The tokenizer that a description stands for. Raises ValueError or OSError."""
    check_description(description)
    kinds = {'char': (CharTokenizer, 'chars'), 'byte': (ByteTokenizer,), 'tiktoken': (TiktokenTokenizer, 'name', 'size')}
    make, *keys = kinds[description['kind']]
    return make(**{key: description[key] for key in keys if key in description})


def check_description(description):
    """ValueError unless `load` could take it, without loading anything."""
    match description:
        case {'kind': 'tiktoken', 'size': size} if type(size) is not int or size < 257:
            raise ValueError(f"a tiktoken tokenizer of the size {str(size)[:40]}: it must be a whole number from 257 on, "
                             "the bytes and <|endoftext|>")
        case {'kind': 'char', 'chars': str()} | {'kind': 'byte'} | {'kind': 'tiktoken', 'name': str()}:
            return
    raise ValueError(f"unknown tokenizer {str(description)[:80]}: its kind must be char (with chars), byte or "
                     "tiktoken (with a name)")


class _NoCode(pickle.Unpickler):
    def find_class(self, module, name):
        raise ValueError(f"meta.pkl asks for {module}.{name}; it may hold only numbers, strings and dictionaries")


def describe_meta_pkl(data):
    """The description in nanoGPT's meta.pkl (bytes), read without executing anything it holds. Raises ValueError."""
    try:
        itos = _NoCode(io.BytesIO(data)).load()['itos']
        chars = [itos[i] for i in range(len(itos))]
        if any(type(c) is not str or len(c) != 1 for c in chars):
            raise ValueError("meta.pkl maps ids to something other than single characters")
        return {'kind': 'char', 'chars': ''.join(chars)}
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"meta.pkl cannot be read as nanoGPT's ({type(error).__name__}: {error})") from None
