"""Tokenizers as the files in a model's folder, read and written: Hugging Face's tokenizer.json,
sentencepiece's tokenizer.model, GPT-2's vocab.json and merges.txt, BERT's vocab.txt."""

import base64
import contextlib
import hashlib
import json

from text import tokenizer, tokenizer_json

# The files that hold a tokenizer: the first of these that a folder has is read.
NAMES = ('tokenizer.json', 'tokenizer.model', 'spiece.model', 'merges.txt', 'vocab.txt')

# sha256 of GPT-2's merges.txt.
GPT2_MERGES = '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5'
# Which encoding of tiktoken has that many entries.
NAME_BY_SIZE = {50281: 'p50k_base', 100261: 'cl100k_base', 200000: 'o200k_base'}


# ---- writing -------------------------------------------------------------------------------------


def to_files(own, block_size):
    """{name: text, bytes or JSON} of the files that stand for the tokenizer `own` beside a model
    with this block_size. Raises ValueError if no tokenizer.json can."""
    text = own.to_json()
    content = json.loads(text)
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'model_max_length': block_size,
        'clean_up_tokenization_spaces': False,
    }
    added = {token['id']: token['content'] for token in content.get('added_tokens') or []}
    eot = added.get(own.eot)
    if eot:
        config['bos_token'] = eot
        config['eos_token'] = eot
    files = {'tokenizer.json': text, 'tokenizer_config.json': config}

    # For programs that don't read tokenizer.json.
    model = content['model']
    decoder = content.get('decoder') or {}
    if isinstance(own, tokenizer.SentencePieceTokenizer):
        files['tokenizer.model'] = base64.b64decode(own.model)
    elif model.get('merges') and decoder.get('type') == 'ByteLevel':
        files['vocab.json'] = model['vocab']
        files['merges.txt'] = _merges_txt(model['merges'])
    return files


def _merges_txt(merges):
    """The text of a merges.txt; merges: 'left right' each, or pairs."""
    lines = [merge if type(merge) is str else ' '.join(merge) for merge in merges]
    return '\n'.join(['#version: 0.2', *lines, ''])


# ---- reading -------------------------------------------------------------------------------------


def from_files(folder):
    """The description of the tokenizer in a folder, or None if it has none of NAMES.

    It is one of the simpler kinds of text/tokenizer.py where that gives the same ids. Raises
    ValueError if a file is damaged.
    """
    for name in NAMES:
        if (folder / name).is_file():
            return from_file(folder / name)
    return None


def from_file(path):
    """The description of the tokenizer in a file, one of NAMES, and in what the files beside it
    add. Raises ValueError if one is damaged."""
    folder = path.parent
    try:
        if path.suffix == '.model':
            return tokenizer.load(_describe_sentencepiece(path)).describe()

        config = {}
        if (folder / 'tokenizer_config.json').is_file():
            config = _read_json(folder / 'tokenizer_config.json')
        text = path.read_text(encoding='utf-8-sig')  # a byte order mark is not part of it
        if path.name == 'merges.txt':
            lines = [line for line in text.split('\n') if line and not line.startswith('#version')]
            text = tokenizer_json.byte_level(_read_json(folder / 'vocab.json'), lines)
        elif path.name == 'vocab.txt':
            text = tokenizer_json.wordpiece(text.splitlines(), config)

        content = json.loads(text)
        description = _as_simpler_kind(content, folder / 'tokenizer.model')
        if not description:
            description = {'kind': 'huggingface', 'json': text}
            if eot := _other_document_end(content, config):
                description['eot'] = eot
        return description
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"the tokenizer in {folder} is damaged ({type(error).__name__}: {error})"
        ) from None


def _describe_sentencepiece(path):
    return {'kind': 'sentencepiece', 'model': base64.b64encode(path.read_bytes()).decode()}


def _read_json(path):
    return json.loads(path.read_bytes())


def _other_document_end(content, config):
    """The text of the token that ends a document, where it takes tokenizer_config.json to know
    it; else None.

    content: a tokenizer.json's; config: tokenizer_config.json's.
    """
    vocab = content['model']['vocab']  # a dictionary, or pairs of entry and score
    entries = {entry if type(entry) is str else entry[0] for entry in vocab}
    entries |= {token['content'] for token in content.get('added_tokens') or []}
    preferred = config.get('eos_token') or config.get('sep_token')
    if isinstance(preferred, dict):
        preferred = preferred['content']
    end = tokenizer.find_document_end(entries, preferred)
    if end == tokenizer.find_document_end(entries):
        return None
    return end


def _as_simpler_kind(content, model_file):
    """The description of a tokenizer of a simpler kind that gives the same ids and texts as a
    tokenizer.json, or None.

    content: the tokenizer.json's; model_file: the sentencepiece model from which it may have been
    made.
    """
    model = content['model']
    vocab = model['vocab']
    # transformers may add these, which encode and decode ignore.
    ours = content | dict.fromkeys(('truncation', 'padding', 'post_processor'))

    # There may be no such file, or no such library.
    with contextlib.suppress(ValueError, OSError):
        description = _describe_sentencepiece(model_file)
        if json.loads(tokenizer.load(description).to_json()) == ours:
            return description
    if model['type'] == 'WordLevel':
        own = tokenizer.CharTokenizer(''.join(sorted(vocab, key=vocab.get)))
        if json.loads(own.to_json()) == ours:
            return own.describe()
        return None
    if model['type'] != 'BPE' or content.get('normalizer'):
        return None
    with contextlib.suppress(OSError):  # tiktoken can't download the encoding to compare with
        return _as_byte_level_kind(content)
    return None


def _as_byte_level_kind(content):
    """The description of tiktoken's encoding or of the bytes that is the byte-level BPE in a
    tokenizer.json, or None. Raises OSError if tiktoken can't load its encoding."""
    vocab = content['model']['vocab']
    split = content.get('pre_tokenizer') or {}
    if len(vocab) in NAME_BY_SIZE:
        own = tokenizer.TiktokenTokenizer(NAME_BY_SIZE[len(vocab)])
        if vocab != tokenizer_json.tiktoken_vocab(own.encoding):
            return None
        if split != json.loads(own.to_json())['pre_tokenizer']:
            return None
        return own.describe()

    if split.get('type') != 'ByteLevel' or split.get('add_prefix_space'):
        return None
    if any(token['content'] != tokenizer.EOT for token in content.get('added_tokens', [])):
        return None
    merges = _merges_txt(content['model']['merges'])
    if hashlib.sha256(merges.encode()).hexdigest() == GPT2_MERGES:
        return dict(tokenizer.GPT2)
    if len(vocab) == 256:
        if vocab == tokenizer_json.BYTE_OF:
            return tokenizer.ByteTokenizer().describe()
    elif 256 < len(vocab) < 50257:
        own = tokenizer.TiktokenTokenizer('gpt2', len(vocab))
        if vocab == tokenizer_json.tiktoken_vocab(own.encoding):
            return own.describe()
    return None
