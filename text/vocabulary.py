"""The tokenizer that a name stands for: a known one, one from a file, a folder or the Hugging Face
Hub, or one trained on the text that it is for.

    char                            one id per character of the text
    byte                            one id per byte
    gpt2, p50k_base, cl100k_base, o200k_base        tiktoken's encodings
    path/to/my.model                sentencepiece's models
    path/to/tokenizer.json          Hugging Face's, or a folder that holds one, or tokenizer.model, or vocab.txt
    data/NAME                       that of a folder with prepared data
    bert-base-uncased, owner/name   a model's on the Hub; NANOGPT_MIRROR may be a folder that has it under this name
    train:bpe:32000                 byte-level BPE with so many entries, of GPT-2's words, <|endoftext|> the last of them
    train:sentencepiece:32000       a sentencepiece model, which keeps all spaces and line ends as they are

Options of train:bpe: max_piece_length, in bytes. Of train:sentencepiece: model_type (bpe,
unigram), character_coverage (the share of all characters that get entries of their own),
max_piece_length (in characters), byte_fallback (other characters are their bytes; without it they
are lost). The same text trains the same vocabulary, on any machine.
"""

import base64
import io
import json
import re
from pathlib import Path

from system import hub
from text import tokenizer, tokenizer_files

TIKTOKEN = (
    'gpt2',
    'r50k_base',
    'p50k_base',
    'p50k_edit',
    'cl100k_base',
    'o200k_base',
    'o200k_harmony',
)
# of sentencepiece's trainer, whose sums depend on how many there are: so many everywhere
THREADS = 16
SENTENCE = 1000  # characters that it sees at a time; it leaves out what has more than 4192 bytes


def open(name, texts=None, **options):
    """The tokenizer `name`. texts() -> an iterator of the text's pieces, for the kinds that must
    see it.

    Raises ValueError or OSError.
    """
    name = str(name)
    if name.startswith('train:'):
        _, kind, *size = name.split(':')
        if kind not in TRAINERS or len(size) > 1 or not (size or ['32000'])[0].isdecimal():
            raise ValueError(
                f"tokenizer={name!r}: to train one, say train:bpe:VOCAB or train:sentencepiece:VOCAB"
            )
        if len((size or [''])[0]) > 7:
            raise ValueError(
                f"tokenizer={name[:40]!r}: take a vocabulary of less than ten million entries"
            )
        return _train(name, TRAINERS[kind], texts, int((size or ['32000'])[0]), options)
    if options:
        raise ValueError(
            f"{' and '.join(options)}: only a tokenizer that is trained has such options, not {name!r}"
        )
    if name == 'char':
        if texts is None:
            raise ValueError("tokenizer='char' has to see the text")
        return tokenizer.CharTokenizer(sorted(set().union(*map(set, texts()))))
    if name == 'byte':
        return tokenizer.ByteTokenizer()
    if name in TIKTOKEN:
        return tokenizer.TiktokenTokenizer(name)
    return tokenizer.load(_described(name))


def _described(name):
    """The description of the tokenizer in a file, in a folder or on the Hub."""
    path = Path(name)
    if path.is_file():
        return tokenizer_files.from_file(path)
    if path.is_dir():
        return _in_folder(path)
    # no name on the Hub looks like these
    if re.search(r'^[./~]|\\|/.*/|\.(model|json|txt)$', name):
        raise FileNotFoundError(f"tokenizer={name!r}: there is no such file or folder")
    if not re.fullmatch(r'[\w-][\w.-]*(/[\w-][\w.-]*)?', name):
        raise ValueError(
            f"tokenizer={name!r} is no name: take char, byte, {', '.join(TIKTOKEN)}, train:bpe:VOCAB, "
            "train:sentencepiece:VOCAB, a path, or a model's name on the Hugging Face Hub"
        )
    try:
        if folder := hub.mirror_folder(name):
            return _in_folder(folder)
        for file in tokenizer_files.NAMES:
            if (found := hub.download(name, file)) is not None:
                break
        else:
            raise FileNotFoundError(f"{name} has none of {', '.join(tokenizer_files.NAMES)} there")
        for beside in ('vocab.json',) * (file == 'merges.txt') + ('tokenizer_config.json',):
            hub.download(name, beside, found.parent.name)
    except OSError as error:
        raise OSError(
            f"tokenizer={name!r} is no kind and no path here, so it was looked for on the Hugging Face Hub: "
            f"{error}"
        ) from None
    print(f"tokenizer {name}: from the Hugging Face Hub, revision {found.parent.name}", flush=True)
    return _in_folder(found.parent)


def _in_folder(folder):
    if (folder / 'meta.json').is_file():
        try:
            found = json.loads((folder / 'meta.json').read_text(encoding='utf-8')).get('tokenizer')
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{folder / 'meta.json'} cannot be read ({type(error).__name__}: {error})"
            ) from None
    else:
        found = tokenizer_files.from_files(folder)
    if not found:
        raise FileNotFoundError(
            f"{folder} has no tokenizer: no tokenizer.json, tokenizer.model, vocab.txt or meta.json"
        )
    return found


# ---- training ------------------------------------------------------------------------------------


def _train(name, trainer, texts, size, options):
    if texts is None:
        raise ValueError(f"tokenizer={name!r} has to see the text")
    if unknown := options.keys() - trainer.__kwdefaults__.keys():
        raise ValueError(
            f"{name} has no option {min(unknown)}, but {', '.join(trainer.__kwdefaults__)}"
        )
    own = trainer(texts(), size, **options)
    if own.vocab_size < size:
        print(
            f"{name}: the text has enough for a vocabulary of {own.vocab_size:,} entries, not {size:,}",
            flush=True,
        )
    return own


def _bpe(texts, size, *, max_piece_length=None):
    if size < 257:
        raise ValueError(
            f"train:bpe:{size}: a vocabulary has at least 257 entries, the bytes and <|endoftext|>"
        )
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        raise ValueError(
            "to train a byte-pair encoding needs a package: pip install tokenizers"
        ) from None
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,
        initial_alphabet=words.alphabet(),
        show_progress=False,
        max_token_length=max_piece_length and int(max_piece_length),
    )
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = words
    made.train_from_iterator(texts, trainer)
    model = json.loads(made.to_str())['model']
    vocab = model['vocab'] | {tokenizer.EOT: len(model['vocab'])}
    merges = [' '.join(merge) for merge in model['merges']]
    return tokenizer.HuggingFaceTokenizer(
        tokenizer_files.byte_level(vocab, merges, words_first=True)
    )


def _sentencepiece(
    texts,
    size,
    *,
    model_type='bpe',
    character_coverage=0.999995,
    max_piece_length=27,
    byte_fallback=True,
):
    if model_type not in ('bpe', 'unigram'):
        raise ValueError(f"model_type={model_type!r} is unknown: take bpe or unigram")
    try:
        import sentencepiece
    except ImportError:
        raise ValueError(
            "to train a sentencepiece model needs a package: pip install sentencepiece"
        ) from None
    model, mistakes = io.BytesIO(), []

    def sentences():
        try:
            yield from _sentences(texts)
        except Exception as error:  # the library would say another
            mistakes.append(error)

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
            num_threads=THREADS,
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
        if needed := re.search(r'required_chars.* vs (\d+)', str(error)):
            mistakes.append(
                ValueError(
                    f"train:sentencepiece:{size}: a vocabulary of this text has at least {needed[1]} "
                    "entries, for its characters, the bytes, <unk> and </s>; or take a lower "
                    "character_coverage"
                )
            )
        mistakes.append(
            ValueError(
                f"sentencepiece can't train on this text: {' '.join(str(error).split())[:160]}"
            )
        )
    if mistakes:
        raise mistakes[0] from None
    return tokenizer.SentencePieceTokenizer(base64.b64encode(model.getvalue()).decode())


def _sentences(texts):
    """The texts in pieces of SENTENCE characters at most, which end where a line does if they
    can."""
    for text in texts:
        sentence = ''
        for line in text.splitlines(keepends=True):
            for part in (line[i : i + SENTENCE] for i in range(0, len(line), SENTENCE)):
                if len(sentence) + len(part) > SENTENCE:
                    yield sentence
                    sentence = ''
                sentence += part
        if sentence:
            yield sentence


TRAINERS = {'bpe': _bpe, 'sentencepiece': _sentencepiece}
