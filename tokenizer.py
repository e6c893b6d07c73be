"""Text to token ids and back: characters, bytes, tiktoken's encodings (GPT-2's among them), Hugging Face's tokenizer.json.

A tokenizer has encode(text) -> [ids], decode(ids) -> text, decode_bytes(ids) -> bytes, vocab_size, describe() -> the
plain dict that meta.json and checkpoints keep and `load` turns back into the tokenizer, and to_json() -> the text of a
tokenizer.json that gives the same ids.
"""
import contextlib
import hashlib
import io
import json
import pickle

EOT = '<|endoftext|>'
GPT2 = {'kind': 'tiktoken', 'name': 'gpt2'}
GPT2_MERGES = '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5'    # sha256 of merges.txt
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
SPELLING = ''.join(chr(b if b in PRINTABLE else 256 + OTHERS.index(b)) for b in range(256))   # of bytes, in byte-level BPE
BYTES = {c: b for b, c in enumerate(SPELLING)}


def _spell(entry):
    return ''.join(SPELLING[b] for b in entry)


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

    def to_json(self):
        each = {'type': 'Split', 'pattern': {'Regex': r'[\s\S]'}, 'behavior': 'Isolated', 'invert': False}
        return _json(each, {'type': 'WordLevel', 'vocab': self.ids, 'unk_token': ''}, {'type': 'Fuse'})


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

    def entries(self):
        """{entry as byte-level BPE spells it: id}."""
        return dict(BYTES)

    def to_json(self):
        return byte_level(self.entries(), [])


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

    def entries(self):
        """Like ByteTokenizer's."""
        ranks = self.encoding._mergeable_ranks
        return {_spell(entry): rank for entry, rank in ranks.items()} | self.encoding._special_tokens

    def to_json(self):
        if self.name not in ('gpt2', 'r50k_base'):
            raise ValueError(f"tiktoken's {self.name} has no tokenizer.json here, only gpt2 and r50k_base have")
        ranks, merges = self.encoding._mergeable_ranks, []
        for entry in sorted(ranks, key=ranks.get)[256:]:    # the two parts that the entries before it make of it
            parts = [entry[i:i + 1] for i in range(len(entry))]
            while len(parts) > 2:
                at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
                parts[at:at + 2] = [parts[at] + parts[at + 1]]
            merges.append(' '.join(map(_spell, parts)))
        return byte_level(self.entries(), merges)


class HuggingFaceTokenizer:
    """The text of a tokenizer.json, run by the library `tokenizers`: byte-level BPE, as GPT-2's kin have it.

    In other kinds, a token's text depends on its neighbours. Raises ValueError.
    """

    def __init__(self, json):
        try:
            from tokenizers import Tokenizer, decoders
        except ImportError:
            raise ValueError("this model's tokenizer.json needs a package: pip install tokenizers") from None
        self.json = json
        try:
            self.tokenizer = Tokenizer.from_str(json)
        except Exception as error:      # the library has no other class
            raise ValueError(f"this model's tokenizer.json is damaged: {error}") from None
        if not isinstance(self.tokenizer.decoder, decoders.ByteLevel):
            raise ValueError(f"this model's tokenizer.json is no byte-level BPE ({type(self.tokenizer.model).__name__}, "
                             f"{type(self.tokenizer.decoder).__name__}): others can't be used here")
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        added = self.tokenizer.get_added_tokens_decoder().keys()
        self.bytes = {i: entry.encode() if i in added or not BYTES.keys() >= set(entry) else bytes(BYTES[c] for c in entry)
                      for entry, i in self.tokenizer.get_vocab().items()}
        self.vocab_size, self.eot = max(self.bytes) + 1, self.tokenizer.token_to_id(EOT)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode_bytes(self, ids):
        return b''.join(self.bytes.get(i, b'') for i in ids)

    def decode(self, ids):
        return self.decode_bytes(ids).decode(errors='replace')

    def describe(self):
        return {'kind': 'huggingface', 'json': self.json}

    def to_json(self):
        return self.json


def load(description):
    """The tokenizer that a description stands for. Raises ValueError or OSError."""
    check_description(description)
    kinds = {'char': (CharTokenizer, 'chars'), 'byte': (ByteTokenizer,), 'tiktoken': (TiktokenTokenizer, 'name', 'size'),
             'huggingface': (HuggingFaceTokenizer, 'json')}
    make, *keys = kinds[description['kind']]
    return make(**{key: description[key] for key in keys if key in description})


def check_description(description):
    """ValueError unless `load` could take it, without loading anything."""
    match description:
        case {'kind': 'tiktoken', 'size': size} if type(size) is not int or size < 257:
            raise ValueError(f"a tiktoken tokenizer of the size {str(size)[:40]}: it must be a whole number from 257 on, "
                             "the bytes and <|endoftext|>")
        case ({'kind': 'char', 'chars': str()} | {'kind': 'byte'} | {'kind': 'tiktoken', 'name': str()}
              | {'kind': 'huggingface', 'json': str()}):
            return
    raise ValueError(f"unknown tokenizer {str(description)[:80]}: its kind must be char (with chars), byte, "
                     "tiktoken (with a name) or huggingface (with its json)")


# ---- Hugging Face's files --------------------------------------------------------------------------------------------

def byte_level(vocab, merges):
    """The text of a tokenizer.json: byte-level BPE of GPT-2's words, with {entry: id} and ['left right']."""
    split = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': True}
    model = {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': None,
             'end_of_word_suffix': None, 'fuse_unk': False, 'byte_fallback': False, 'ignore_merges': False,
             'vocab': vocab, 'merges': merges}
    end = {'id': vocab.get(EOT), 'content': EOT, 'single_word': False, 'lstrip': False, 'rstrip': False,
           'normalized': False, 'special': True}
    return _json(split, model, split, [end] if EOT in vocab else [])


def _json(pre_tokenizer, model, decoder, added_tokens=()):
    return json.dumps({'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': added_tokens,
                       'normalizer': None, 'pre_tokenizer': pre_tokenizer, 'post_processor': None, 'decoder': decoder,
                       'model': model}, ensure_ascii=False)


def to_files(own, block_size):
    """{name: text or JSON} of the files that stand for a tokenizer, beside a model with this block_size."""
    text = own.to_json()
    model = json.loads(text)['model']
    files = {'tokenizer.json': text, 'tokenizer_config.json': {
        'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': block_size, 'clean_up_tokenization_spaces': False,
        **({} if getattr(own, 'eot', None) is None else {'bos_token': EOT, 'eos_token': EOT})}}
    if model.get('merges'):     # for readers that know nothing else
        files |= {'vocab.json': model['vocab'], 'merges.txt': _merges_txt(model['merges'])}
    return files


def _merges_txt(merges):
    """Merges, each 'left right' or a pair, as the file that GPT2_MERGES is the sum of."""
    return '\n'.join(['#version: 0.2', *(merge if type(merge) is str else ' '.join(merge) for merge in merges), ''])


def from_files(folder):
    """The description of the tokenizer in a folder, one of this module's others where it gives the same; or None.

    Raises ValueError where it is damaged.
    """
    path, merges = folder / 'tokenizer.json', folder / 'merges.txt'
    try:
        if path.is_file():
            text = path.read_text(encoding='utf-8')
        elif merges.is_file():
            lines = merges.read_text(encoding='utf-8').split('\n')
            vocab = json.loads((folder / 'vocab.json').read_text(encoding='utf-8'))
            text = byte_level(vocab, [line for line in lines if line and not line.startswith('#version')])
        else:
            return None
        return _known(json.loads(text)) or {'kind': 'huggingface', 'json': text}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the tokenizer in {folder} is damaged ({type(error).__name__}: {error})") from None


def _known(found):
    """The description of the tokenizer here that is the one in a tokenizer.json, or None."""
    model, vocab, split = found['model'], found['model']['vocab'], found.get('pre_tokenizer') or {}
    if model['type'] == 'WordLevel':
        own = CharTokenizer(''.join(sorted(vocab, key=vocab.get)))
        rest = dict.fromkeys(('truncation', 'padding', 'post_processor'))       # transformers may add one
        return own.describe() if json.loads(own.to_json()) == found | rest else None
    if (model['type'] != 'BPE' or split.get('type') != 'ByteLevel' or split.get('add_prefix_space')
            or found.get('normalizer') or any(token['content'] != EOT for token in found.get('added_tokens', []))):
        return None
    if hashlib.sha256(_merges_txt(model['merges']).encode()).hexdigest() == GPT2_MERGES:
        return dict(GPT2)
    if 256 <= len(vocab) < 50257:
        with contextlib.suppress(OSError):      # tiktoken's file is not there to compare with
            own = ByteTokenizer() if len(vocab) == 256 else TiktokenTokenizer('gpt2', len(vocab))
            return own.describe() if vocab == own.entries() else None


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
