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
import json
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
