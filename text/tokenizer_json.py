"""The text of a tokenizer.json, Hugging Face's format, that gives the same ids and texts as a
tokenizer of text/tokenizer.py."""

import base64
import itertools
import json
from types import MappingProxyType

EOT = '<|endoftext|>'

# Byte-level BPE spells each byte as a printable character: itself where it is one, else one of
# those from U+0100 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
SPELLING = ''.join(chr(b if b in PRINTABLE else 256 + OTHERS.index(b)) for b in range(256))
BYTE_OF = {char: byte for byte, char in enumerate(SPELLING)}

# tiktoken's encodings that divide a text into words as GPT-2 does.
SPLIT_AS_GPT2 = ('gpt2', 'r50k_base', 'p50k_base', 'p50k_edit')

# sentencepiece's numbers for types of models and of pieces.
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4


def word_level(vocab):
    """The text of a tokenizer.json: one id per character, by {character: id}."""
    each_character = {
        'type': 'Split',
        'pattern': {'Regex': r'[\s\S]'},
        'behavior': 'Isolated',
        'invert': False,
    }
    model = {'type': 'WordLevel', 'vocab': vocab, 'unk_token': ''}
    return _json(pre_tokenizer=each_character, model=model, decoder={'type': 'Fuse'})


def byte_level(vocab, merges, special=(EOT,), pattern=None, words_first=False):
    """The text of a tokenizer.json: byte-level BPE.

    vocab: {entry: id}; merges: 'left right' each, or pairs; special: the special tokens, of which
    those in vocab count; pattern: a regular expression of the words, in place of GPT-2's;
    words_first: whether a whole word that is an entry is encoded as it, whatever its merges.
    """
    words = {
        'type': 'ByteLevel',
        'add_prefix_space': False,
        'trim_offsets': True,
        'use_regex': True,
    }
    pre_tokenizer = words
    if pattern is not None:
        split = {
            'type': 'Split',
            'pattern': {'Regex': pattern},
            'behavior': 'Isolated',
            'invert': False,
        }
        pre_tokenizer = {
            'type': 'Sequence',
            'pretokenizers': [split, {**words, 'use_regex': False}],
        }
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
    added = [_added_token(vocab[entry], entry) for entry in special if entry in vocab]
    return _json(pre_tokenizer=pre_tokenizer, model=model, decoder=words, added_tokens=added)


def wordpiece(entries, config=MappingProxyType({})):
    """The text of a tokenizer.json: BERT's WordPiece.

    entries: those of its vocab.txt, in the order of their ids; config: what its
    tokenizer_config.json says.
    """
    ids = {entry: i for i, entry in enumerate(entries)}
    normalizer = {
        'type': 'BertNormalizer',
        'clean_text': True,
        'handle_chinese_chars': config.get('tokenize_chinese_chars', True),
        'strip_accents': config.get('strip_accents'),
        'lowercase': config.get('do_lower_case', True),
    }
    model = {
        'type': 'WordPiece',
        'unk_token': '[UNK]',
        'continuing_subword_prefix': '##',
        'max_input_chars_per_word': 100,
        'vocab': ids,
    }
    special = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')
    return _json(
        pre_tokenizer={'type': 'BertPreTokenizer'},
        model=model,
        decoder={'type': 'WordPiece', 'prefix': '##', 'cleanup': True},
        added_tokens=[_added_token(ids[name], name) for name in special if name in ids],
        normalizer=normalizer,
    )


# ---- tiktoken ------------------------------------------------------------------------------------


def of_tiktoken(name, encoding):
    """The text of a tokenizer.json for an encoding of tiktoken, whose own name is `name`."""
    vocab = tiktoken_vocab(encoding)
    merges = _merges_of(encoding._mergeable_ranks)
    special = encoding._special_tokens
    if name in SPLIT_AS_GPT2:
        return byte_level(vocab, merges, special)
    # In the regular expressions of tokenizers, `{1,3}+` means several times up to three, and `$`
    # also matches before a line's end. In tiktoken's patterns nothing follows either of them.
    pattern = encoding._pat_str.replace('}+', '}').replace('$', r'\z')
    return byte_level(vocab, merges, special, pattern=pattern, words_first=True)


def tiktoken_vocab(encoding):
    """{entry as byte-level BPE spells it: id} of an encoding of tiktoken."""
    vocab = {_spell(entry): rank for entry, rank in encoding._mergeable_ranks.items()}
    return vocab | encoding._special_tokens


def _merges_of(ranks):
    """The merges, 'left right' each, of tiktoken's {entry: rank}: the two parts that the entries
    of lower rank make of each entry."""
    merges = []
    for entry in sorted(ranks, key=ranks.get)[256:]:
        parts = [entry[i : i + 1] for i in range(len(entry))]
        while len(parts) > 2:
            pair_ranks = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
            at = pair_ranks.index(min(pair_ranks))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        merges.append(' '.join(map(_spell, parts)))
    return merges


def _spell(entry):
    """An entry's bytes as byte-level BPE writes them."""
    return ''.join(SPELLING[byte] for byte in entry)


# ---- sentencepiece -------------------------------------------------------------------------------


def of_sentencepiece(model_file, is_prefixed):
    """The text of a tokenizer.json for a sentencepiece model.

    model_file: its .model file as base64; is_prefixed: whether encoding puts a space before a text,
    which decoding removes. Raises ValueError where no tokenizer.json can say what the model does.
    """
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise ValueError(
            "reading what a sentencepiece model consists of needs a package: pip install protobuf"
        ) from None
    proto = sentencepiece_model_pb2.ModelProto.FromString(base64.b64decode(model_file))
    _check_exportable(proto)

    normalizers = []
    if proto.normalizer_spec.precompiled_charsmap:
        charsmap = base64.b64encode(proto.normalizer_spec.precompiled_charsmap).decode()
        normalizers.append({'type': 'Precompiled', 'precompiled_charsmap': charsmap})
    if proto.normalizer_spec.remove_extra_whitespaces:
        normalizers.append(_replace({'Regex': '\\A +|[ \u2581]+\\z'}, ''))
        normalizers.append(_replace({'Regex': ' {2,}'}, ' '))
    if proto.normalizer_spec.add_dummy_prefix:
        normalizers.append({'type': 'Prepend', 'prepend': '\u2581'})
    normalizers.append(_replace({'String': ' '}, '\u2581'))

    decoders = [_replace({'String': '\u2581'}, ' '), {'type': 'ByteFallback'}, {'type': 'Fuse'}]
    if is_prefixed:
        decoders.append({'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0})

    added = []
    for i, piece in enumerate(proto.pieces):
        if piece.type in (CONTROL, USER_DEFINED):
            added.append(_added_token(i, piece.piece, is_special=piece.type == CONTROL))

    return _json(
        pre_tokenizer=None,
        model=_sentencepiece_model(proto),
        decoder={'type': 'Sequence', 'decoders': decoders},
        added_tokens=added,
        normalizer={'type': 'Sequence', 'normalizers': normalizers},
    )


def _check_exportable(proto):
    """Raise ValueError where no tokenizer.json can say what a sentencepiece model does."""
    rules = proto.normalizer_spec
    defined = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    has_spaces = any('\u2581' in piece for piece in defined)
    problem = None
    if proto.trainer_spec.model_type not in (UNIGRAM, BPE):
        problem = "pieces of whole words or single characters"
    elif proto.trainer_spec.treat_whitespace_as_suffix:
        problem = "spaces that end a word"
    elif not rules.escape_whitespaces:
        problem = "spaces that stay spaces"
    elif proto.denormalizer_spec.precompiled_charsmap:
        problem = "a normalisation of what it decodes"
    elif defined and (rules.add_dummy_prefix or has_spaces):
        problem = "user-defined pieces with spaces or behind a dummy prefix"
    if problem:
        raise ValueError(
            f"can't be exported: the sentencepiece model has {problem}, which no tokenizer.json "
            "can say"
        )


def _sentencepiece_model(proto):
    """The 'model' of a tokenizer.json for a sentencepiece model."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    unknown = next(i for i, piece in enumerate(proto.pieces) if piece.type == UNKNOWN)
    byte_fallback = proto.trainer_spec.byte_fallback

    if proto.trainer_spec.model_type == UNIGRAM:
        # tokenizers also uses pieces that aren't normal ones where a text spells them: a score
        # below any sum of others prevents that.
        never = 9 * min(scores.values(), default=0) - 99
        vocab = []
        for piece in proto.pieces:
            score = piece.score if piece.type == NORMAL else never
            vocab.append([piece.piece, score])
        return {
            'type': 'Unigram',
            'unk_id': unknown,
            'byte_fallback': byte_fallback,
            'vocab': vocab,
        }

    # Any two pieces merge that make a third, the one with the highest score first.
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    merges = []
    for piece in sorted(scores, key=lambda piece: (-scores[piece], ids[piece])):
        for at in range(1, len(piece)):
            if piece[:at] in scores and piece[at:] in scores:
                merges.append(f'{piece[:at]} {piece[at:]}')
    return {
        'type': 'BPE',
        'dropout': None,
        'unk_token': proto.pieces[unknown].piece,
        'continuing_subword_prefix': None,
        'end_of_word_suffix': None,
        'fuse_unk': True,
        'byte_fallback': byte_fallback,
        'ignore_merges': False,
        'vocab': ids,
        'merges': merges,
    }


# ---- parts ---------------------------------------------------------------------------------------


def _json(*, pre_tokenizer, model, decoder, added_tokens=(), normalizer=None):
    """The text of a tokenizer.json with these parts."""
    content = {
        'version': '1.0',
        'truncation': None,
        'padding': None,
        'added_tokens': added_tokens,
        'normalizer': normalizer,
        'pre_tokenizer': pre_tokenizer,
        'post_processor': None,
        'decoder': decoder,
        'model': model,
    }
    return json.dumps(content, ensure_ascii=False)


def _added_token(i, content, is_special=True):
    return {
        'id': i,
        'content': content,
        'single_word': False,
        'lstrip': False,
        'rstrip': False,
        'normalized': False,
        'special': is_special,
    }


def _replace(pattern, content):
    """The step that replaces a pattern, {'String': text} or {'Regex': expression}."""
    return {'type': 'Replace', 'pattern': pattern, 'content': content}
