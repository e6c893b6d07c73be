"""Makes a dataset of your own text: train.bin, val.bin and meta.json, for train.py --dataset=NAME.

    python data/prepare.py mine book.txt
    python data/prepare.py mine texts/ 'more/**/*.md' dump.jsonl.zst --document=paragraph
    python data/prepare.py mine stories.txt --document='<|endoftext|>' --val=stories-valid.txt
    python data/prepare.py ./mine book.txt
    python data/prepare.py mine chats.jsonl --skip_bad_rows
    python data/prepare.py mine questions.parquet --field=question,answer
    python data/prepare.py mine HuggingFaceFW/fineweb-edu:sample/10BT --shard_tokens=100_000_000
    zcat big.txt.gz | python data/prepare.py mine - --tokenizer=train:bpe:8192

NAME is a folder in this repository's data/. With a slash in it, or a dot in front, it is a path,
relative to the current folder.

SOURCES are text files, JSONL and parquet (a row is a document: --field), text and JSONL also as
.gz or .zst, folders of these, globs in quotes, - for standard input, and
owner/name[@REVISION][:FOLDER-OR-GLOB] for a dataset on the Hugging Face Hub, whose files are
downloaded one after the other and not kept. In folders and globs, files that are not UTF-8 text,
and .jsonl files without a row on each line, are skipped, which a line reports. For .csv, .tsv and
.json an error says how to make rows of them; --as_text reads them as they are.

DOCUMENTS of a text are the file, its paragraphs, its lines, or whatever is between two separators:
--document=TEXT. Line ends around a separator belong to no document. Documents go to train, val or
test as a whole, by the sha256 of the seed and their text, so that copies stay on one side; one
above 4 MB goes by its first 4 MB. After each comes the tokenizer's end-of-text token, or
--separator. A single text file is divided by position: the first nine tenths train.

VAL AND TEST FILES of your own: --val=FILE, --test=FILE, each a file, a folder or a glob, repeated
as you like. With --val all sources go to train, and --split is an error; with --test alone,
--split divides them into train and val. A file that is also among the sources is not trained on.
A document that is in several splits stays in all of them; with --dedup only in test, else in val.

CONVERSATIONS are rows with "messages" or "conversations" (OpenAI's, ShareGPT's), with "prompt" and
"completion", with "instruction", "input" and "output"; rows that are a list of messages; and what
--field=MESSAGES or --field=ASKED,ANSWERED names. Where rows have "text" as well, the conversation
is prepared, unless --field=text asks for the text. They are written in a chat template, and only
the answers are learned, except for those with "weight": 0 or "loss_mask": 0; a row that has one of
these itself is skipped, and counted. A row's "system" or "system_prompt" becomes a turn in front,
Alpaca's "history" earlier turns, whose answers are read, not learned.

The same command continues a run that was stopped; the bins are the same for any --num_proc. Old
bins stay until the new ones are complete.
"""

import argparse
import difflib
import json
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))

from system.errors import begin_script

if __name__ == '__main__':
    begin_script()  # before the imports, which take a second

from system import files
from system.errors import fail, user_errors
from text import bins, sources, tokenizer, vocabulary
from text.folders import is_path
from text.sources.formats import read_text

FLAGS = 'dedup', 'skip_bad_rows', 'as_text'  # options without a value
# The options of vocabulary.open.
TRAINING = 'model_type', 'character_coverage', 'max_piece_length', 'byte_fallback'
AT_LEAST = {'num_proc': 1, 'max_bytes': 1, 'shard_tokens': 0, 'train_bytes': 1, 'seed': 0}
AT_MOST = {'num_proc': 1024, 'max_piece_length': 1 << 20}


def arguments(words):
    """The options and sources on the command line. Ends the script on a mistake."""
    parser = _parser()
    for word in words:
        if empty := re.fullmatch(r'(--\w+)=--', word):  # argparse would read it as -- alone
            fail(f"{empty[1]} has no value; write {empty[1]}=VALUE")
    for flag in FLAGS:
        words = [word for word in words if word != f'--{flag}=False']
        words = [f'--{flag}' if word == f'--{flag}=True' else word for word in words]
    asked = parser.parse_intermixed_args(words)
    for key, least in AT_LEAST.items():
        number = getattr(asked, key)
        if number is not None and number < least:
            fail(f"{key}={number} must be at least {least}")
    for key, most in AT_MOST.items():
        number = getattr(asked, key)
        if number is not None and number > most:
            fail(f"{key}={number} must be at most {most}")
    asked.document = unescaped(asked.document)
    if asked.separator is not None:
        asked.separator = unescaped(asked.separator)
    return asked


def _parser():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def refuse(message):
        """Called by argparse on a mistake."""
        # To argparse, a single word is the NAME; most likely it is a source.
        if message == 'the following arguments are required: SOURCE':
            message = (
                "NAME or SOURCE is missing: write `python data/prepare.py NAME SOURCE`, such as "
                "mine book.txt"
            )
        unknown = re.match(r'unrecognized arguments: (--\w+)', message)
        if unknown:
            options = [f'--{key}' for key in vars(parser.parse_intermixed_args(['name', 'source']))]
            near = difflib.get_close_matches(unknown[1], options, n=1)
            if near:
                message += f"; did you mean {near[0]}?"
        fail(message)

    parser.error = refuse
    add = parser.add_argument
    add(
        'name',
        metavar='NAME',
        help="the folder in data/ to make; with a slash or a leading dot: a path",
    )
    add(
        'sources',
        metavar='SOURCE',
        nargs='+',
        help="files, folders, 'globs', -, owner/name on the Hub",
    )
    add(
        '--tokenizer',
        default='gpt2',
        metavar='NAME',
        help="char, byte, gpt2, cl100k_base, o200k_base, a sentencepiece model, a tokenizer.json, "
        "a name on the Hugging Face Hub, train:bpe:VOCAB, train:sentencepiece:VOCAB; default: gpt2",
    )
    add(
        '--field',
        metavar='NAME[,NAME…]',
        help="the field of a row that holds its text or its messages (a.b: b in a); of several "
        "fields, the last is the answer and the others are the question; default: those of a "
        "conversation, or text",
    )
    add(
        '--document',
        default='file',
        metavar='KIND',
        help="what a document is in a text: file, paragraph, line, or the text that separates "
        r"documents, such as '<|endoftext|>' or '\n---\n' (\n, \t and \r are line ends and tabs, "
        r"\\ is a backslash); default: file",
    )
    add(
        '--separator',
        metavar='TEXT',
        help="what to write after each document if the tokenizer has no end-of-text token; "
        "default: a newline, unless the document ends with one; "
        r"\n, \t, \r and \\ are as in --document",
    )
    add('--as_text', action='store_true', help="read .csv, .tsv and .json as text, as they are")
    add(
        '--template',
        metavar='FILE.json',
        help='of conversations: {"user": [before, after], "assistant": [before, after]}',
    )
    add(
        '--split',
        metavar='SHARES',
        help="of train and val, or train, val and test; default: 0.9,0.1",
    )
    add(
        '--val',
        metavar='FILE',
        action='append',
        help="a file, folder or glob to validate on; all sources then go to train; may be repeated",
    )
    add(
        '--test',
        metavar='FILE',
        action='append',
        help="a file, folder or glob to test on; --split is then of train and val",
    )
    add('--seed', type=int, default=1337, help="of the split; default: 1337")
    add(
        '--dedup',
        action='store_true',
        help="keep one of equal documents: test's, or else val's; needs 100 bytes of memory for "
        "each document; those above 4 MB are not compared",
    )
    add(
        '--skip_bad_rows',
        action='store_true',
        help="skip rows that can't be used, such as invalid JSON, and report them at the end; "
        "default: the first one is an error",
    )
    add(
        '--max_bytes',
        type=int,
        metavar='N',
        help="read only the beginning of the sources, about N bytes of their size",
    )
    add('--num_proc', type=int, help="processes that encode; default: one per core")
    add(
        '--shard_tokens',
        type=int,
        default=0,
        metavar='N',
        help="write files of N tokens each: train-00000.bin, …",
    )
    training = parser.add_argument_group("options of --tokenizer=train:…")
    training.add_argument(
        '--train_bytes',
        type=int,
        default=100_000_000,
        metavar='N',
        help="how much text to train it on, spread evenly over the sources; default: 100 MB",
    )
    training.add_argument('--model_type', help="of sentencepiece: bpe or unigram")
    training.add_argument('--character_coverage', type=float, metavar='SHARE')
    training.add_argument('--max_piece_length', type=int, metavar='N')
    training.add_argument('--byte_fallback', choices=('True', 'False'))
    return parser


def unescaped(text):
    """A text with the characters that \\n, \\t, \\r and a double backslash in it stand for."""
    escapes = {r'\n': '\n', r'\t': '\t', r'\r': '\r', '\\\\': '\\'}
    return re.sub(r'\\[ntr\\]', lambda match: escapes[match[0]], text)


def shares_of(asked):
    """The shares that divide the sources, or None if all go to train. Raises ValueError."""
    if asked.val:
        if asked.split is not None:
            raise ValueError(
                f"--split={asked.split} divides the sources, which all go to train "
                "where --val names files: leave one of the two out"
            )
        return None
    shares = (asked.split or '0.9,0.1').split(',')
    bins.check_split(shares)
    if asked.test and len(shares) == 3:
        raise ValueError(
            f"--split={asked.split} has a share for test, whose files --test names: "
            "give two shares, for train and val"
        )
    return shares


def folder_of(name):
    """data/NAME, or the folder whose path NAME is, by dataset.py's rule. Raises ValueError."""
    if not name:
        raise ValueError("NAME is empty: write a plain name, or a folder's path")
    if Path(name).is_file():
        raise ValueError(f"{name} is a file: the new dataset's NAME comes first, then the sources")
    folder = DATA / name
    if is_path(name):
        folder = Path(os.path.expanduser(name))
    script = folder / 'prepare.py'
    if script.is_file():
        raise ValueError(f"{folder} belongs to {script}, which makes its bins: use another NAME")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: use another NAME")
    return folder


def is_in_repository():
    """Whether the user is in the repository's folder, so that `python train.py` works."""
    return Path.cwd() == DATA.parent


def dataset_argument(name, folder):
    """The value of --dataset= that finds the folder from the user's; a path stays a path."""
    if not is_path(name):
        return name
    path = folder.as_posix()  # which needs no quotes on Windows
    if is_path(path):
        return path
    return f'./{path}'


def read_template(path):
    """The chat template in a JSON file. Raises ValueError, OSError."""
    text = read_text(path, as_text=True)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def tokenizer_for(asked, source, folder):
    """The tokenizer. One that has to read the text is kept in the dataset's workplace, for a run
    that is stopped and continued. Raises ValueError, OSError."""
    options = {key: getattr(asked, key) for key in TRAINING if getattr(asked, key) is not None}
    if asked.byte_fallback:
        options['byte_fallback'] = asked.byte_fallback == 'True'
    if not vocabulary.reads_text(asked.tokenizer):
        return vocabulary.open(asked.tokenizer, **options)

    is_trained = asked.tokenizer.startswith('train:')
    n_bytes = asked.train_bytes if is_trained else None  # None: all of the text
    kept = files.workplace(folder) / 'tokenizer.json'
    key = [asked.tokenizer, options, n_bytes, asked.separator, source.fingerprint]
    if kept.is_file():
        known = json.loads(kept.read_text(encoding='utf-8'))
        if known['of'] == key:
            return tokenizer.load(known['tokenizer'])
    print(f"tokenizer {asked.tokenizer}: reading the text for its vocabulary", flush=True)

    def texts():
        if is_trained:
            return source.texts(n_bytes)
        return _texts_and_separators(source, asked.separator)

    made = vocabulary.open(asked.tokenizer, texts, **options)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(kept) as file:
        file.write(json.dumps({'of': key, 'tokenizer': made.describe()}).encode())
    return made


def _texts_and_separators(source, separator):
    """Iterate over all that the bins will hold: the separator of documents, and the texts."""
    if source.has_ends:
        yield '\n' if separator is None else separator
    yield from source.texts()


def main(words):
    asked = arguments(words)
    shares = shares_of(asked)
    folder = folder_of(asked.name)
    if not is_path(asked.name) and not is_in_repository():
        print(
            f"{asked.name} is a plain name: the dataset goes to {folder}; for a folder here, "
            f"write ./{asked.name}",
            flush=True,
        )
    template = None
    if asked.template:
        template = read_template(asked.template)
    with files.alone_in(folder):
        meta = prepare(asked, shares, folder, template)

    options = []
    if meta.get('masked'):
        recipe = 'finetune_shakespeare.py'
        options = ['--init_from=gpt2']
    elif meta['tokenizer']['kind'] in ('char', 'byte'):
        recipe = 'train_shakespeare_char.py'
    else:
        recipe = 'train_shakespeare.py'
    command = ['train.py', f'config/{recipe}']
    if not is_in_repository():
        command = [(DATA.parent / word).as_posix() for word in command]
    command += [*options, f'--dataset={dataset_argument(asked.name, folder)}']
    command += [f'--out_dir=out-{folder.resolve().name}']
    print(f"now, for example: python {shlex.join(command)}")


def prepare(asked, shares, folder, template):
    """Make the dataset; returns its meta. Raises ValueError, OSError."""
    try:
        source = sources.open(
            asked.sources,
            field=asked.field,
            document=asked.document,
            template=template,
            folder=folder,
            max_bytes=asked.max_bytes,
            skip_bad_rows=asked.skip_bad_rows,
            as_text=asked.as_text,
            val=asked.val or (),
            test=asked.test or (),
        )
        encoder = tokenizer_for(asked, source, folder)
        if asked.separator is not None and getattr(encoder, 'eot', None) is not None:
            raise ValueError(
                f"tokenizer {asked.tokenizer} has a token for the end of a document: leave "
                "--separator out"
            )
        source.look_for_special_tokens(encoder)
    except (ValueError, OSError) as error:
        work = files.workplace(folder)
        # Unless bins of a run that was stopped wait there, nothing is worth keeping.
        if isinstance(error, ValueError) and not (work / 'bins').exists():
            shutil.rmtree(work, ignore_errors=True)
        (work / 'stdin').unlink(missing_ok=True)
        raise
    if (folder / 'meta.json').is_file():
        print(
            f"{folder} has bins, which stay until these are whole, and are then replaced",
            flush=True,
        )
    return bins.prepare(
        folder,
        source,
        encoder,
        split=shares,
        seed=asked.seed,
        dedup=asked.dedup,
        num_proc=asked.num_proc,
        shard_tokens=asked.shard_tokens,
        end=asked.separator,
    )


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops it as Ctrl-C does
    with user_errors():
        main(sys.argv[1:])
