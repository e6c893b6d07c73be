"""Finds the tokenizer that a name stands for: a known one, one in a file, in a folder or on the
Hugging Face Hub, or one trained on the text that it is for.

    char                            one id per character of the text
    byte                            one id per byte
    gpt2, p50k_base, cl100k_base, o200k_base        tiktoken's encodings
    path/to/my.model                a sentencepiece model
    path/to/tokenizer.json          Hugging Face's format, or a folder that holds one, or
                                    tokenizer.model, or vocab.txt
    data/NAME                       that of a folder with prepared data
    bert-base-uncased, owner/name   that of a model on the Hub; NANOGPT_MIRROR may be a folder that
                                    has it under this name
    train:bpe:32000                 byte-level BPE of GPT-2's words with that many entries, the last
                                    of which is <|endoftext|>
    train:sentencepiece:32000       a sentencepiece model that keeps all spaces and line ends

Options of train:bpe: max_piece_length, in bytes. Options of train:sentencepiece: model_type (bpe,
unigram), character_coverage (the share of all characters that get entries of their own),
max_piece_length (in characters), byte_fallback (other characters are encoded as their bytes;
without it they are lost). The same text trains the same vocabulary on any machine.
"""

import json
import re
from pathlib import Path

from system import hub
from text import tokenizer, tokenizer_files

DEFAULT_SIZE = '32000'  # entries of a tokenizer that is trained


def open(name, texts=None, **options):
    """The tokenizer `name`.

    texts() is an iterator over the pieces of the text, for the names that must see it: char and
    train:…. The options are those of train:…. Raises ValueError or OSError.
    """
    name = str(name)
    if name.startswith('train:'):
        return _train(name, texts, options)
    if options:
        raise ValueError(
            f"{' and '.join(options)}: only a tokenizer that is trained has such options, not "
            f"{name!r}"
        )
    for kind in tokenizer.KINDS.values():
        if name in kind.names:
            return kind.open(name, texts)
    return tokenizer.load(_describe(name))


def _describe(name):
    """The description of the tokenizer in a file, in a folder or on the Hub."""
    path = Path(name)
    if path.is_file():
        return tokenizer_files.from_file(path)
    if path.is_dir():
        return _describe_in_folder(path)
    if re.search(r'^[./~]|\\|/.*/|\.(model|json|txt)$', name):  # no name on the Hub looks like it
        raise FileNotFoundError(f"tokenizer={name!r}: there is no such file or folder")
    if not re.fullmatch(r'[\w-][\w.-]*(/[\w-][\w.-]*)?', name):
        raise ValueError(
            f"tokenizer={name!r} is not a tokenizer's name: use {', '.join(_known_names())}, a "
            "path, or a model's name on the Hugging Face Hub"
        )
    try:
        if folder := hub.mirror_folder(name):
            return _describe_in_folder(folder)
        folder = _download(name)
    except OSError as error:
        raise OSError(
            f"tokenizer={name!r} is neither a known name nor a path here, so it was looked for on "
            f"the Hugging Face Hub: {error}"
        ) from None
    print(f"tokenizer {name}: from the Hugging Face Hub, revision {folder.name}", flush=True)
    return _describe_in_folder(folder)


def reads_text(name):
    """Whether `open` needs the text for the tokenizer `name`."""
    if name.startswith('train:'):
        return True
    return any(name in kind.names and kind.reads_text for kind in tokenizer.KINDS.values())


def _known_names():
    """The names that need neither a file nor the Hub."""
    names = []
    for kind in tokenizer.KINDS.values():
        names += kind.names
    return names + [f'train:{trained_as}:VOCAB' for trained_as in _trained_kinds()]


def _download(name):
    """The folder to which the tokenizer of the Hub's model `name` was downloaded, named as the
    revision. Raises OSError."""
    for file in tokenizer_files.NAMES:
        path = hub.download(name, file)
        if path is not None:
            break
    else:
        raise FileNotFoundError(f"{name} has none of {', '.join(tokenizer_files.NAMES)} there")

    revision = path.parent.name
    if file == 'merges.txt':
        hub.download(name, 'vocab.json', revision)
    hub.download(name, 'tokenizer_config.json', revision)
    return path.parent


def _describe_in_folder(folder):
    """The description of the tokenizer in a folder of prepared data or of a model."""
    if (folder / 'meta.json').is_file():
        try:
            meta = json.loads((folder / 'meta.json').read_text(encoding='utf-8'))
            description = meta.get('tokenizer')
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{folder / 'meta.json'} cannot be read ({type(error).__name__}: {error})"
            ) from None
    else:
        description = tokenizer_files.from_files(folder)
    if not description:
        raise FileNotFoundError(
            f"{folder} has no tokenizer: no tokenizer.json, tokenizer.model, vocab.txt or meta.json"
        )
    return description


# ---- training ------------------------------------------------------------------------------------


def _trained_kinds():
    """{NAME of train:NAME: the kind of tokenizer}."""
    return {kind.trained_as: kind for kind in tokenizer.KINDS.values() if kind.trained_as}


def _train(name, texts, options):
    """The tokenizer train:KIND or train:KIND:SIZE, trained on texts()."""
    kinds = _trained_kinds()
    match = re.fullmatch(r'train:([^:]*)(?::([^:]*))?', name)
    size = DEFAULT_SIZE
    if match and match[2] is not None:
        size = match[2]
    if not match or match[1] not in kinds or not size.isdecimal():
        examples = ' or '.join(f'train:{trained_as}:VOCAB' for trained_as in kinds)
        raise ValueError(f"tokenizer={name!r}: to train one, say {examples}")
    if len(size) > 7:
        raise ValueError(
            f"tokenizer={name[:40]!r}: use a vocabulary of less than ten million entries"
        )
    if texts is None:
        raise ValueError(f"tokenizer={name!r} has to see the text")
    train = kinds[match[1]].train
    known = train.__kwdefaults__
    if unknown := options.keys() - known.keys():
        raise ValueError(f"{name} has no option {min(unknown)}, but {', '.join(known)}")

    trained = train(texts(), int(size), **options)
    if trained.vocab_size < int(size):
        print(
            f"{name}: the text has enough for a vocabulary of {trained.vocab_size:,} entries, not "
            f"{int(size):,}",
            flush=True,
        )
    return trained
