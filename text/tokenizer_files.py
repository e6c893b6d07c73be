"""Tokenizers as files: Hugging Face's tokenizer.json, which gives the same ids and texts there, and
what else folders of models hold: sentencepiece's tokenizer.model, GPT-2's vocab.json and
merges.txt, BERT's vocab.txt."""

import base64
import contextlib
import hashlib
import json
from types import MappingProxyType

from text import tokenizer

# sha256 of merges.txt
GPT2_MERGES = '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5'
# which divide a text into words as GPT-2 does
GPT2_KIN = 'gpt2', 'r50k_base', 'p50k_base', 'p50k_edit'
# how many tiktoken's encodings have
ENTRIES = {50281: 'p50k_base', 100261: 'cl100k_base', 200000: 'o200k_base'}
# the first that is there counts
NAMES = 'tokenizer.json', 'tokenizer.model', 'spiece.model', 'merges.txt', 'vocab.txt'
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # of sentencepiece's kinds of pieces


# ---- out -----------------------------------------------------------------------------------------


def to_json(own):
    """The text of a tokenizer.json that gives the same ids and texts. Raises ValueError where there
    is none."""
    match own.describe()['kind']:
        case 'char':
            each = {
                'type': 'Split',
                'pattern': {'Regex': r'[\s\S]'},
                'behavior': 'Isolated',
                'invert': False,
            }
            return _json(
                each, {'type': 'WordLevel', 'vocab': own.ids, 'unk_token': ''}, {'type': 'Fuse'}
            )
        case 'byte':
            return byte_level(_entries(own), [])
        case 'tiktoken':
            return _of_tiktoken(own)
        case 'sentencepiece':
            return _of_sentencepiece(own)
        case 'huggingface':
            return own.json


def to_files(own, block_size):
    """{name: text, bytes or JSON} of the files that stand for a tokenizer, beside a model with this
    block_size."""
    text = to_json(own)
    found = json.loads(text)
    end = {token['id']: token['content'] for token in found.get('added_tokens') or []}.get(own.eot)
    files = {
        'tokenizer.json': text,
        'tokenizer_config.json': {
            'tokenizer_class': 'PreTrainedTokenizerFast',
            'model_max_length': block_size,
            'clean_up_tokenization_spaces': False,
            **({'bos_token': end, 'eos_token': end} if end else {}),
        },
    }
    if own.describe()['kind'] == 'sentencepiece':  # for readers that know nothing else
        files['tokenizer.model'] = base64.b64decode(own.model)
    elif found['model'].get('merges') and (found.get('decoder') or {}).get('type') == 'ByteLevel':
        files |= {
            'vocab.json': found['model']['vocab'],
            'merges.txt': _merges_txt(found['model']['merges']),
        }
    return files


def byte_level(vocab, merges, special=(tokenizer.EOT,), pattern=None, words_first=False):
    """The text of a tokenizer.json: byte-level BPE with {entry: id} and ['left right'].

    special: those of the entries that are tokens whole; pattern: of the words, in place of GPT-2's;
    words_first: whether a whole word that is an entry is that, whatever its merges.
    """
    words = {
        'type': 'ByteLevel',
        'add_prefix_space': False,
        'trim_offsets': True,
        'use_regex': True,
    }
    split = (
        words
        if pattern is None
        else {
            'type': 'Sequence',
            'pretokenizers': [
                {
                    'type': 'Split',
                    'pattern': {'Regex': pattern},
                    'behavior': 'Isolated',
                    'invert': False,
                },
                {**words, 'use_regex': False},
            ],
        }
    )
    model = {
        'type': 'BPE',
        'dropout': None,
        'unk_token': None,
        'continuing_subword_prefix': None,
        'end_of_word_suffix': None,
        'fuse_unk': False,
        'byte_fallback': False,
        'ignore_merges': words_first,
        'vocab': vocab,
        'merges': merges,
    }
    return _json(
        split, model, words, [_added(vocab[entry], entry) for entry in special if entry in vocab]
    )


def _added(i, content, special=True):
    return {
        'id': i,
        'content': content,
        'single_word': False,
        'lstrip': False,
        'rstrip': False,
        'normalized': False,
        'special': special,
    }


def _json(pre_tokenizer, model, decoder, added_tokens=(), normalizer=None):
    return json.dumps(
        {
            'version': '1.0',
            'truncation': None,
            'padding': None,
            'added_tokens': added_tokens,
            'normalizer': normalizer,
            'pre_tokenizer': pre_tokenizer,
            'post_processor': None,
            'decoder': decoder,
            'model': model,
        },
        ensure_ascii=False,
    )


def _merges_txt(merges):
    """Merges, each 'left right' or a pair, as the file that GPT2_MERGES is the sum of."""
    return '\n'.join(
        [
            '#version: 0.2',
            *(merge if type(merge) is str else ' '.join(merge) for merge in merges),
            '',
        ]
    )


def _spell(entry):
    return ''.join(tokenizer.SPELLING[b] for b in entry)


def _entries(own):
    """{entry as byte-level BPE spells it: id}, of bytes or an encoding of tiktoken's."""
    if own.describe()['kind'] == 'byte':
        return dict(tokenizer.BYTES)
    return {
        _spell(entry): rank for entry, rank in own.encoding._mergeable_ranks.items()
    } | own.encoding._special_tokens


def _of_tiktoken(own):
    ranks, merges = own.encoding._mergeable_ranks, []
    # the two parts that the entries before it make of it
    for entry in sorted(ranks, key=ranks.get)[256:]:
        parts = [entry[i : i + 1] for i in range(len(entry))]
        while len(parts) > 2:
            at = min(
                range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks))
            )
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        merges.append(' '.join(map(_spell, parts)))
    if own.name in GPT2_KIN:
        return byte_level(_entries(own), merges, own.encoding._special_tokens)
    # There `{1,3}+` means several times up to three, and `$` an end of a line too. Here nothing
    # follows either of them.
    pattern = own.encoding._pat_str.replace('}+', '}').replace('$', r'\z')
    return byte_level(
        _entries(own), merges, own.encoding._special_tokens, pattern, words_first=True
    )


def _of_sentencepiece(own):
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise ValueError(
            "to read what a sentencepiece model consists of needs a package: pip install protobuf"
        ) from None
    proto = sentencepiece_model_pb2.ModelProto.FromString(base64.b64decode(own.model))
    rules, kind, pieces = proto.normalizer_spec, proto.trainer_spec.model_type, proto.pieces
    ids = {piece.piece: i for i, piece in enumerate(pieces)}
    defined = [piece.piece for piece in pieces if piece.type == USER_DEFINED]
    for what, there in (
        ("pieces of whole words or single characters", kind not in (1, 2)),
        ("spaces that end a word", proto.trainer_spec.treat_whitespace_as_suffix),
        ("spaces that stay spaces", not rules.escape_whitespaces),
        ("a normalisation of what it decodes", proto.denormalizer_spec.precompiled_charsmap),
        (
            "user-defined pieces with spaces or behind a dummy prefix",
            defined and (rules.add_dummy_prefix or any('\u2581' in piece for piece in defined)),
        ),
    ):
        if there:
            raise ValueError(
                f"can't be exported: the sentencepiece model has {what}, that no tokenizer.json can say"
            )
    normal = {piece.piece: piece.score for piece in pieces if piece.type == NORMAL}
    unknown = next(i for i, piece in enumerate(pieces) if piece.type == UNKNOWN)
    common = {'byte_fallback': proto.trainer_spec.byte_fallback}
    # a unigram model there takes any entry that the text spells, so that the others must never pay
    if kind == 1:
        never = 9 * min(normal.values(), default=0) - 99
        model = {
            'type': 'Unigram',
            'unk_id': unknown,
            **common,
            'vocab': [
                [piece.piece, piece.score if piece.type == NORMAL else never] for piece in pieces
            ],
        }
    else:  # the better a piece's score, the sooner any two pieces merge that make it
        merges = [
            f'{piece[:at]} {piece[at:]}'
            for piece in sorted(normal, key=lambda piece: (-normal[piece], ids[piece]))
            for at in range(1, len(piece))
            if piece[:at] in normal and piece[at:] in normal
        ]
        model = {
            'type': 'BPE',
            'dropout': None,
            'unk_token': pieces[unknown].piece,
            'continuing_subword_prefix': None,
            'end_of_word_suffix': None,
            'fuse_unk': True,
            **common,
            'ignore_merges': False,
            'vocab': ids,
            'merges': merges,
        }

    def replace(pattern, content, kind='String'):
        return {'type': 'Replace', 'pattern': {kind: pattern}, 'content': content}

    charsmap, fewer = (
        base64.b64encode(rules.precompiled_charsmap).decode(),
        rules.remove_extra_whitespaces,
    )
    normalizers = [
        *([{'type': 'Precompiled', 'precompiled_charsmap': charsmap}] if charsmap else []),
        *(
            [replace('\\A +|[ \u2581]+\\z', '', 'Regex'), replace(' {2,}', ' ', 'Regex')]
            if fewer
            else []
        ),
        *([{'type': 'Prepend', 'prepend': '\u2581'}] if rules.add_dummy_prefix else []),
        replace(' ', '\u2581'),
    ]
    decoders = [
        replace('\u2581', ' '),
        {'type': 'ByteFallback'},
        {'type': 'Fuse'},
        *([{'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}] if own.is_prefixed else []),
    ]
    added = [
        _added(i, piece.piece, piece.type == CONTROL)
        for i, piece in enumerate(pieces)
        if piece.type in (CONTROL, USER_DEFINED)
    ]
    return _json(
        None,
        model,
        {'type': 'Sequence', 'decoders': decoders},
        added,
        {'type': 'Sequence', 'normalizers': normalizers},
    )


# ---- in ------------------------------------------------------------------------------------------


def from_files(folder):
    """The description of the tokenizer in a folder, a kind of tokenizer.py's own where it gives the
    same; or None.

    Raises ValueError where it is damaged.
    """
    return next((from_file(folder / name) for name in NAMES if (folder / name).is_file()), None)


def from_file(path):
    """Like `from_files`, of one of its files, with what the others beside it say."""
    folder = path.parent
    try:
        if path.suffix == '.model':
            return tokenizer.load(_sentencepiece(path)).describe()
        config = (
            _read(folder / 'tokenizer_config.json')
            if (folder / 'tokenizer_config.json').is_file()
            else {}
        )
        text = path.read_text(encoding='utf-8-sig')  # a byte order mark is not part of it
        if path.name == 'merges.txt':
            lines = [line for line in text.split('\n') if line and not line.startswith('#version')]
            text = byte_level(_read(folder / 'vocab.json'), lines)
        elif path.name == 'vocab.txt':
            text = to_json_of_bert(text.splitlines(), config)
        found, model = json.loads(text), folder / 'tokenizer.model'
        return _known(found, model) or {'kind': 'huggingface', 'json': text, **_end(found, config)}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"the tokenizer in {folder} is damaged ({type(error).__name__}: {error})"
        ) from None


def _sentencepiece(path):
    return {'kind': 'sentencepiece', 'model': base64.b64encode(path.read_bytes()).decode()}


def _read(path):
    return json.loads(path.read_bytes())


def to_json_of_bert(vocab, config=MappingProxyType({})):
    """The text of a tokenizer.json: BERT's WordPiece with the entries `vocab`, of which each line
    of its file has one."""
    ids = {entry: i for i, entry in enumerate(vocab)}
    chinese, accents = config.get('tokenize_chinese_chars', True), config.get('strip_accents')
    normalizer = {
        'type': 'BertNormalizer',
        'clean_text': True,
        'handle_chinese_chars': chinese,
        'strip_accents': accents,
        'lowercase': config.get('do_lower_case', True),
    }
    model = {
        'type': 'WordPiece',
        'unk_token': '[UNK]',
        'continuing_subword_prefix': '##',
        'max_input_chars_per_word': 100,
        'vocab': ids,
    }
    return _json(
        {'type': 'BertPreTokenizer'},
        model,
        {'type': 'WordPiece', 'prefix': '##', 'cleanup': True},
        [
            _added(ids[name], name)
            for name in ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')
            if name in ids
        ],
        normalizer,
    )


def _end(found, config):
    """{'eot': text} where tokenizer_config.json says another end of a text than the vocabulary
    alone."""
    vocab = found['model']['vocab']  # a dictionary, or pairs
    entries = {entry if type(entry) is str else entry[0] for entry in vocab}
    entries |= {token['content'] for token in found.get('added_tokens') or []}
    wish = config.get('eos_token') or config.get('sep_token')
    end = tokenizer.end_of(entries, wish['content'] if isinstance(wish, dict) else wish)
    return {} if end == tokenizer.end_of(entries) else {'eot': end}


def _known(found, beside):
    """The description of the tokenizer here that is the one in a tokenizer.json, or None.

    beside: the sentencepiece model from which it may have been made, if there is one.
    """
    model, vocab, split = found['model'], found['model']['vocab'], found.get('pre_tokenizer') or {}
    rest = dict.fromkeys(('truncation', 'padding', 'post_processor'))  # transformers may add one
    with contextlib.suppress(ValueError, OSError):
        if json.loads(to_json(tokenizer.load(_sentencepiece(beside)))) == found | rest:
            return _sentencepiece(beside)
    if model['type'] == 'WordLevel':
        own = tokenizer.CharTokenizer(''.join(sorted(vocab, key=vocab.get)))
        return own.describe() if json.loads(to_json(own)) == found | rest else None
    if model['type'] != 'BPE' or found.get('normalizer'):
        return None
    with contextlib.suppress(OSError):  # tiktoken's file is not there to compare with
        if name := ENTRIES.get(len(vocab)):
            own = tokenizer.TiktokenTokenizer(name)
            return (
                own.describe()
                if vocab == _entries(own) and split == json.loads(to_json(own))['pre_tokenizer']
                else None
            )
        if (
            split.get('type') != 'ByteLevel'
            or split.get('add_prefix_space')
            or any(token['content'] != tokenizer.EOT for token in found.get('added_tokens', []))
        ):
            return None
        if hashlib.sha256(_merges_txt(model['merges']).encode()).hexdigest() == GPT2_MERGES:
            return dict(tokenizer.GPT2)
        if 256 <= len(vocab) < 50257:
            own = (
                tokenizer.ByteTokenizer()
                if len(vocab) == 256
                else tokenizer.TiktokenTokenizer('gpt2', len(vocab))
            )
            return own.describe() if vocab == _entries(own) else None
