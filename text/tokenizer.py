"""Text to token ids and back: characters, bytes, tiktoken's encodings (GPT-2's among them), Hugging
Face's tokenizer.json and sentencepiece's models.

A new kind of tokenizer is a subclass of Tokenizer and its place in KINDS.
"""

import base64
import contextlib
import functools
import io
import json
import re
from types import MappingProxyType

import numpy as np

from text import tokenizer_json
from text.tokenizer_json import BYTE_OF, EOT, SPELLING

# The tokens that end a document where a vocabulary does not say which one does: Llama's, Gemma's
# and BERT's. BERT's [SEP] stands between sentences.
DOCUMENT_ENDS = (EOT, '<|end_of_text|>', '</s>', '<eos>', '[SEP]')
GPT2 = {'kind': 'tiktoken', 'name': 'gpt2'}

# A text of hard cases: a tokenizer that gives it back is lossless.
PROBE = ' Two  spaces,\n\n\ta tab; \u00c9t\u00e9 e\u0301 \ufb01 \uff21 \u65e5\u672c \U0001f680\r\n '

# How GPT-2 divides a text into words.
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# sentencepiece's sums depend on the number of threads: the same number gives the same model on
# every machine.
TRAINING_THREADS = 16
# Characters per training sentence: sentencepiece skips sentences of more than 4192 bytes.
SENTENCE_LENGTH = 1000


class Tokenizer:
    """What all kinds have. A kind defines `encode`, `encode_ordinary`, `decode`, `decode_bytes` and
    `describe`, and whichever of the attributes below differ.

    vocab_size: the number of ids.
    eot: the id that ends a document, or None.
    special: {text: id} of the special tokens.
    lossless: whether decode(encode(text)) is the text, as far as PROBE shows. bert-base-uncased,
        for one, drops capitals, accents, line ends and runs of spaces, and a model can't write what
        its tokenizer drops. Figures per byte or word are still taken over the real text, so they
        flatter such a model: what was dropped costs nothing.
    """

    # In a description: its 'kind', the fields that it must have (all of them text), and may have.
    kind = None
    required = ()
    optional = ()

    # The names by which vocabulary.open finds this kind without a file: see `open`.
    names = ()
    # Whether `open` needs the text, as it does where the vocabulary comes from it.
    reads_text = False
    # train:NAME:SIZE trains one of this kind on a text: see `train`.
    trained_as = None

    eot = None
    special = MappingProxyType({})
    lossless = True

    @classmethod
    def open(cls, name, texts):
        """The tokenizer with one of `names`; texts() is an iterator over the text's pieces, or
        texts is None where there is no text yet."""
        raise NotImplementedError

    @classmethod
    def train(cls, texts, size):
        """A tokenizer with at most `size` entries, from an iterator of texts. A kind's own options
        are keyword arguments with defaults."""
        raise NotImplementedError

    @classmethod
    def check(cls, description):
        """Raise ValueError if a field of the description has a value that can't be. Loads
        nothing."""

    def encode(self, text):
        """The list of ids of a text, in which the name of a special token, such as
        <|endoftext|>, becomes that token."""
        raise NotImplementedError

    def encode_ordinary(self, text):
        """The ids, as a list or an array, of a text in which the name of a special token is plain
        text: for documents, which may contain one."""
        raise NotImplementedError

    def decode(self, ids):
        """The text of these ids."""
        raise NotImplementedError

    def decode_bytes(self, ids):
        """The bytes that these ids add to a text before them. `decode` differs where a text's first
        token loses its space: "The" is " The" after another word."""
        raise NotImplementedError

    def describe(self):
        """The plain dict that meta.json and checkpoints keep, from which `load` makes the tokenizer
        again."""
        raise NotImplementedError

    def to_json(self):
        """The text of a tokenizer.json with the same ids and texts. ValueError if there is none."""
        raise ValueError(
            f"can't be exported: no tokenizer.json stands for a tokenizer of the kind {self.kind!r}"
        )

    def gives_back_probe(self):
        """Whether PROBE comes back as it was, which `lossless` says from then on."""
        with contextlib.suppress(ValueError):  # the vocabulary lacks some of it
            return self.decode(self.encode(PROBE)) == PROBE
        return False


class CharTokenizer(Tokenizer):
    """One id per character, in the order of `chars`. Other characters can't be encoded."""

    kind = 'char'
    required = ('chars',)
    names = ('char',)
    reads_text = True

    def __init__(self, chars):
        self.chars = list(chars)
        self.vocab_size = len(self.chars)
        self.ids = {char: i for i, char in enumerate(self.chars)}

        # The id of each code point, -1 if it has none; the last row stands for all larger ones.
        codes = [ord(char) for char in self.chars]
        self.table = np.full(max(codes, default=0) + 2, -1)
        self.table[codes] = range(len(codes))

    @classmethod
    def of(cls, text):
        """The tokenizer of the characters that occur in `text`, sorted."""
        return cls(sorted(set(text)))

    @classmethod
    def open(cls, name, texts):
        if texts is None:
            raise ValueError("tokenizer='char' has to see the text")
        chars = set()
        for text in texts():
            chars.update(text)
        return cls(sorted(chars))

    def encode(self, text):
        return self.encode_ordinary(text).tolist()

    def encode_ordinary(self, text):
        codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), '<u4')
        ids = self.table[np.minimum(codes, len(self.table) - 1)]
        unknown = ids < 0
        if unknown.any():
            at = int(unknown.argmax())
            raise ValueError(
                f"the character {text[at]!r} at position {at} is not among the {self.vocab_size} "
                "that this model knows"
            )
        return ids

    def decode(self, ids):
        known = len(self.chars)  # a model's vocabulary may be padded beyond it
        return ''.join(self.chars[i] if i < known else '\ufffd' for i in ids)

    def decode_bytes(self, ids):
        return self.decode(ids).encode()

    def describe(self):
        return {'kind': 'char', 'chars': ''.join(self.chars)}

    def to_json(self):
        return tokenizer_json.word_level(self.ids)


class ByteTokenizer(Tokenizer):
    """One id per byte of UTF-8."""

    kind = 'byte'
    names = ('byte',)
    vocab_size = 256

    @classmethod
    def open(cls, name, texts):
        return cls()

    def encode(self, text):
        return list(text.encode())

    def encode_ordinary(self, text):
        return np.frombuffer(text.encode(), np.uint8)

    def decode(self, ids):
        return bytes(ids).decode(errors='replace')

    def decode_bytes(self, ids):
        return bytes(ids)

    def describe(self):
        return {'kind': 'byte'}

    def to_json(self):
        return tokenizer_json.byte_level(dict(BYTE_OF), [])


class TiktokenTokenizer(Tokenizer):
    """An encoding of tiktoken: gpt2, p50k_base, cl100k_base, o200k_base.

    size: keep only the first size - 1 entries, with <|endoftext|> as the last one, for models too
    small for all of them. An entry is merged from earlier ones, of which the first 256 are the
    bytes, so that these still encode any text.

    Raises ValueError for an unknown name or size, and OSError if the encoding can't be downloaded.
    """

    kind = 'tiktoken'
    required = ('name',)
    optional = ('size',)
    names = (
        'gpt2',
        'r50k_base',
        'p50k_base',
        'p50k_edit',
        'cl100k_base',
        'o200k_base',
        'o200k_harmony',
    )

    def __init__(self, name, size=None):
        import tiktoken  # takes a second to load: only where it is used

        known = tiktoken.list_encoding_names()
        if name not in known:
            raise ValueError(f"tiktoken has no encoding {name!r}: use one of {', '.join(known)}")
        try:
            encoding = tiktoken.get_encoding(name)
        except OSError as error:  # requests' errors are OSErrors
            raise OSError(
                f"tiktoken cannot download its encoding {name!r} ({type(error).__name__}): on a "
                "machine with a network, load it once with TIKTOKEN_CACHE_DIR set, then copy that "
                "folder here"
            ) from None

        self.name = name
        self.size = None
        if size is not None and size != encoding.n_vocab:
            self.size = size
            encoding = _first_entries(encoding, name, size)
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab
        self.eot = encoding.eot_token
        self.special = encoding._special_tokens

    @classmethod
    def open(cls, name, texts):
        return cls(name)

    @classmethod
    def check(cls, description):
        if 'size' not in description:
            return
        size = description['size']
        if type(size) is not int or not 257 <= size < 2**32:
            raise ValueError(
                f"a tiktoken tokenizer of the size {str(size)[:40]}: it must be a whole number "
                "from 257 on, the bytes and <|endoftext|>"
            )

    def encode(self, text):
        return self.encoding.encode(text, allowed_special='all')

    def encode_ordinary(self, text):
        return self.encoding.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids):
        return self.encoding.decode(ids)

    def decode_bytes(self, ids):
        return self.encoding.decode_bytes(ids)

    def describe(self):
        description = {'kind': 'tiktoken', 'name': self.name}
        if self.size:
            description['size'] = self.size
        return description

    def to_json(self):
        return tokenizer_json.of_tiktoken(self.name, self.encoding)


def _first_entries(encoding, name, size):
    """A tiktoken encoding of the first size - 1 entries of another, and <|endoftext|>."""
    import tiktoken

    if not 257 <= size <= encoding.eot_token + 1:
        raise ValueError(
            f"{size} entries of {name!r}: it can be cut to between 257, the bytes and "
            f"<|endoftext|>, and {encoding.eot_token + 1}"
        )
    ranks = {entry: rank for entry, rank in encoding._mergeable_ranks.items() if rank < size - 1}
    return tiktoken.Encoding(
        f'{name}-{size}',
        pat_str=encoding._pat_str,
        mergeable_ranks=ranks,
        special_tokens={EOT: size - 1},
    )


class HuggingFaceTokenizer(Tokenizer):
    """What the text of a tokenizer.json says, run by the library `tokenizers`, without the tokens
    that it puts around a text.

    eot: the text of the token that ends a document, where it isn't the first of DOCUMENT_ENDS that
    the vocabulary has. Raises ValueError.
    """

    kind = 'huggingface'
    required = ('json',)
    optional = ('eot',)
    trained_as = 'bpe'

    def __init__(self, json, eot=None):
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise ValueError(
                "this model's tokenizer.json needs a package: pip install tokenizers"
            ) from None
        try:
            self.tokenizer = Library.from_str(json)
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"this model's tokenizer.json is damaged: {error}") from None
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.json = json
        self.eot_text = eot

        vocab = self.tokenizer.get_vocab()
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.eot = vocab.get(find_document_end(vocab, eot))
        added = self.tokenizer.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special}

        # The bytes of each id. In byte-level BPE they are the same everywhere in a text; elsewhere
        # a text's first token may lose its space, except for those in first_bytes.
        decoders = _decoder_types(json)
        self.is_byte_level = 'ByteLevel' in decoders
        if self.is_byte_level:
            self.bytes = _bytes_as_spelled(vocab, added)
        else:
            self.bytes, self.first_bytes = self._bytes_after_a_word(
                vocab, 'ByteFallback' in decoders
            )
        self.lossless = self.gives_back_probe()

    @classmethod
    def train(cls, texts, size, *, max_piece_length=None):
        """Byte-level BPE of GPT-2's words; <|endoftext|> is the last entry. max_piece_length: in
        bytes."""
        if size < 257:
            raise ValueError(
                f"train:bpe:{size}: a vocabulary has at least 257 entries, the bytes and "
                "<|endoftext|>"
            )
        try:
            from tokenizers import Tokenizer as Library
            from tokenizers import models, pre_tokenizers, trainers
        except ImportError:
            raise ValueError(
                "training a byte-pair encoding needs a package: pip install tokenizers"
            ) from None
        if max_piece_length:
            max_piece_length = int(max_piece_length)
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=size - 1,
            initial_alphabet=words.alphabet(),
            show_progress=False,
            max_token_length=max_piece_length,
        )
        trained = Library(models.BPE())
        trained.pre_tokenizer = words
        trained.train_from_iterator(texts, trainer)

        model = json.loads(trained.to_str())['model']
        vocab = model['vocab'] | {EOT: len(model['vocab'])}
        merges = [' '.join(merge) for merge in model['merges']]
        return cls(tokenizer_json.byte_level(vocab, merges, words_first=True))

    @classmethod
    def check(cls, description):
        if 'eot' in description and type(description['eot']) is not str:
            raise ValueError(
                f"a tokenizer.json's eot is the text of a token, not {str(description['eot'])[:40]}"
            )

    def _bytes_after_a_word(self, vocab, has_byte_entries):
        """({id: what it adds to a word before it}, {id: bytes} of the ids that are the same bytes
        at a text's start)."""
        # GPT-1's entries say with a suffix where a word ends, and so a space follows.
        suffix = (json.loads(self.json).get('decoder') or {}).get('suffix')
        if suffix:
            content = {i: entry.replace(suffix, ' ').encode() for entry, i in vocab.items()}
            return content, content

        def decode_each(rows):
            return self.tokenizer.decode_batch(rows, skip_special_tokens=False)

        # Decode each id after a whole word, and remove that word.
        ids = sorted(vocab.values())
        alone = decode_each([[i] for i in ids])
        word = next((i for i, text in zip(ids, alone) if text.isalnum()), ids[0])
        (word_text,) = decode_each([[word]])
        after_word = decode_each([[word, i] for i in ids])
        content = {i: text.removeprefix(word_text).encode() for i, text in zip(ids, after_word)}

        # With byte fallback <0x41> is a byte: decoded alone, part of a character would be lost.
        single_bytes = {}
        if has_byte_entries:
            for entry, i in vocab.items():
                if re.fullmatch('<0x[0-9A-F]{2}>', entry):
                    single_bytes[i] = bytes([int(entry[3:5], 16)])
        return content | single_bytes, single_bytes

    def encode(self, text):
        return self._encode(text, special_is_plain=False)

    def encode_ordinary(self, text):
        if self.as_tiktoken is None:
            return self._encode(text, special_is_plain=True)
        return self.as_tiktoken.encode_to_numpy(text, disallowed_special=())

    def _encode(self, text, special_is_plain):
        self.tokenizer.encode_special_tokens = special_is_plain
        try:  # fast: without each token's position in the text
            return self.tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except Exception as error:
            raise ValueError(
                f"this tokenizer.json can't encode the text: {' '.join(str(error).split())[:120]}"
            ) from None

    @functools.cached_property
    def as_tiktoken(self):
        """The tiktoken encoding with the same ids, which takes a fifth of the time, or None.

        There is one for a byte-level BPE of GPT-2's words that looks for whole words first and
        whose ids have the order of its merges.
        """
        content = json.loads(self.json)
        model = content['model']
        words = content.get('pre_tokenizer') or {}
        added = content.get('added_tokens') or []
        if (
            not self.is_byte_level
            or not model.get('ignore_merges')
            or content.get('normalizer')
            or words.get('type') != 'ByteLevel'
            or words.get('add_prefix_space')
            or not words.get('use_regex', True)
            or not all(token['special'] for token in added)
        ):
            return None

        merged = []
        for merge in model['merges']:
            left, right = merge.split(' ') if type(merge) is str else merge
            merged.append(model['vocab'][left + right])
        ids = [model['vocab'].get(char, -1) for char in SPELLING] + merged
        special = {token['id'] for token in added}
        if -1 in ids or merged != sorted(merged):
            return None
        if sorted([*ids, *special]) != sorted(self.bytes):
            return None

        from tiktoken import Encoding

        return Encoding(
            'bpe',
            pat_str=GPT2_WORDS,
            mergeable_ranks={self.bytes[i]: i for i in ids},
            special_tokens={},
        )

    def decode(self, ids):
        if self.is_byte_level or not len(ids) or ids[0] in self.first_bytes:
            return self.decode_bytes(ids).decode(errors='replace')
        first = self.tokenizer.decode(ids[:1], skip_special_tokens=False)
        return first + self.decode_bytes(ids[1:]).decode(errors='replace')

    def decode_bytes(self, ids):
        return b''.join(self.bytes.get(i, b'') for i in ids)

    def describe(self):
        description = {'kind': 'huggingface', 'json': self.json}
        if self.eot_text:
            description['eot'] = self.eot_text
        return description

    def to_json(self):
        return self.json


def _decoder_types(text):
    """The types of decoder in the text of a tokenizer.json."""
    decoder = json.loads(text).get('decoder') or {}
    parts = (decoder, *decoder.get('decoders', []))
    return {part['type'] for part in parts if 'type' in part}


def _bytes_as_spelled(vocab, added):
    """{id: bytes} of a byte-level BPE, whose entries spell each byte as a character (SPELLING).

    vocab: {entry: id}; added: the ids of tokens that stand for their own text.
    """
    content = {}
    for entry, i in vocab.items():
        if i in added or not BYTE_OF.keys() >= set(entry):
            content[i] = entry.encode()
        else:
            content[i] = bytes(BYTE_OF[char] for char in entry)
    return content


def find_document_end(entries, preferred=None):
    """The one of these entries that ends a document: <|endoftext|>, else `preferred`, else another
    of DOCUMENT_ENDS. None if there is none of them."""
    return next((end for end in (EOT, preferred, *DOCUMENT_ENDS) if end in entries), None)


class SentencePieceTokenizer(Tokenizer):
    """A model of the library sentencepiece (unigram or BPE); `model` is its .model file as base64.

    Its control symbols, such as </s>, are special tokens. A text gets neither <s> nor </s> added.
    Raises ValueError.
    """

    kind = 'sentencepiece'
    required = ('model',)
    trained_as = 'sentencepiece'

    def __init__(self, model):
        try:
            import sentencepiece
        except ImportError:
            raise ValueError(
                "this tokenizer is a model of sentencepiece: pip install sentencepiece"
            ) from None
        try:
            processor = sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(model))
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"not a sentencepiece model, or a damaged one ({' '.join(str(error).split())[:80]})"
            ) from None
        self.model = model
        self.processor = processor
        self.vocab_size = processor.vocab_size()
        if processor.eos_id() >= 0:
            self.eot = processor.eos_id()

        piece = processor.id_to_piece
        ids = range(self.vocab_size)
        self.special = {piece(i): i for i in ids if processor.is_control(i)}
        self.special_pattern = re.compile('(' + '|'.join(map(re.escape, self.special)) + ')')
        self.bytes = []
        for i in ids:
            if processor.is_byte(i):  # <0x41>
                self.bytes.append(bytes([int(piece(i)[3:5], 16)]))
            else:
                self.bytes.append(piece(i).replace('\u2581', ' ').encode())

        # With a dummy prefix, "The" is written as " The" at a text's start.
        spaced = next((i for i in ids if re.fullmatch('\u2581\\w+', piece(i))), None)
        self.is_prefixed = spaced is not None and not processor.decode([spaced]).startswith(' ')
        self.lossless = self.gives_back_probe()

    @classmethod
    def train(
        cls,
        texts,
        size,
        *,
        model_type='bpe',
        character_coverage=0.999995,
        max_piece_length=27,
        byte_fallback=True,
    ):
        """A model that keeps all spaces and line ends. model_type: bpe or unigram;
        character_coverage: the share of the text's characters that get entries of their own;
        max_piece_length: in characters; byte_fallback: encode other characters as their bytes,
        without which they are lost."""
        if model_type not in ('bpe', 'unigram'):
            raise ValueError(f"model_type={model_type!r} is unknown: use bpe or unigram")
        try:
            import sentencepiece
        except ImportError:
            raise ValueError(
                "training a sentencepiece model needs a package: pip install sentencepiece"
            ) from None
        model = io.BytesIO()
        errors_of_texts = []

        def sentences():
            try:
                yield from _sentences(texts)
            except Exception as error:  # the library would raise one of its own in its place
                errors_of_texts.append(error)

        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=sentences(),
                model_writer=model,
                model_type=model_type,
                vocab_size=size,
                character_coverage=float(character_coverage),
                max_sentencepiece_length=int(max_piece_length),
                byte_fallback=byte_fallback,
                hard_vocab_limit=False,
                num_threads=TRAINING_THREADS,
                minloglevel=2,
                unk_id=0,
                eos_id=1,
                bos_id=-1,
                normalization_rule_name='identity',
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
            )
        except RuntimeError as error:
            if errors_of_texts:
                raise errors_of_texts[0] from None
            if match := re.search(r'required_chars.* vs (\d+)', str(error)):
                raise ValueError(
                    f"train:sentencepiece:{size}: a vocabulary of this text has at least "
                    f"{match[1]} entries, for its characters, the bytes, <unk> and </s>: use a "
                    "larger one, or a lower character_coverage"
                ) from None
            raise ValueError(
                f"sentencepiece can't train on this text: {' '.join(str(error).split())[:160]}"
            ) from None
        if errors_of_texts:
            raise errors_of_texts[0] from None
        return cls(base64.b64encode(model.getvalue()).decode())

    def encode(self, text):
        if not self.special:
            return self.processor.encode(text)
        ids = []
        for part in self.special_pattern.split(text):
            if part in self.special:
                ids.append(self.special[part])
            else:
                ids += self.processor.encode(part)
        return ids

    def encode_ordinary(self, text):
        return self.processor.encode_as_numpy(text)

    def decode(self, ids):
        content = self.decode_bytes(ids)
        if self.is_prefixed:
            content = content.removeprefix(b' ')
        return content.decode(errors='replace')

    def decode_bytes(self, ids):
        return b''.join(self.bytes[i] for i in ids)

    def describe(self):
        return {'kind': 'sentencepiece', 'model': self.model}

    def to_json(self):
        return tokenizer_json.of_sentencepiece(self.model, self.is_prefixed)


def _sentences(texts):
    """The texts in pieces of at most SENTENCE_LENGTH characters, which end at a line's end where
    they can."""
    for text in texts:
        sentence = ''
        for line in text.splitlines(keepends=True):
            for start in range(0, len(line), SENTENCE_LENGTH):
                part = line[start : start + SENTENCE_LENGTH]
                if len(sentence) + len(part) > SENTENCE_LENGTH:
                    yield sentence
                    sentence = ''
                sentence += part
        if sentence:
            yield sentence


# ---- descriptions --------------------------------------------------------------------------------

KINDS = {
    kind.kind: kind
    for kind in (
        CharTokenizer,
        ByteTokenizer,
        TiktokenTokenizer,
        HuggingFaceTokenizer,
        SentencePieceTokenizer,
    )
}


def load(description):
    """The tokenizer that a description stands for. Raises ValueError or OSError."""
    check_description(description)
    kind = KINDS[description['kind']]
    fields = [*kind.required, *kind.optional]
    return kind(**{field: description[field] for field in fields if field in description})


def check_description(description):
    """Raise ValueError unless `load` can use the description. Loads nothing."""
    kind = None
    if isinstance(description, dict) and isinstance(description.get('kind'), str):
        kind = KINDS.get(description['kind'])
    if kind is None or not all(isinstance(description.get(key), str) for key in kind.required):
        known = []
        for name, each in KINDS.items():
            if each.required:
                name += f" (with {' and '.join(each.required)})"
            known.append(name)
        raise ValueError(
            f"unknown tokenizer {str(description)[:80]}: its kind must be "
            f"{', '.join(known[:-1])} or {known[-1]}"
        )
    kind.check(description)
