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
and a relative one begins where you stand.

SOURCES are text files, JSONL and parquet (a row is a document: --field), text and JSONL also as
.gz or .zst, folders of these, globs in quotes, - for standard input, and
owner/name[@REVISION][:FOLDER-OR-GLOB] for a dataset on the Hugging Face Hub, whose files are
fetched one after the other and not kept. Of folders and globs, files that are not UTF-8 text, and
.jsonl without a row on each line, are left out, which is said. For .csv, .tsv and .json an error
says how to make rows of them; --as_text reads them as they are.

DOCUMENTS of a text are the file, its paragraphs, its lines, or whatever stands between two
separators: --document=TEXT. Line ends around a separator belong to no document. Documents go to
train, val or test as a whole, by the sha256 of the seed and their text, so that copies stay on one
side; one above 4 MB goes by its first 4 MB. Behind each stands the tokenizer's end-of-text token,
or --separator. One text file alone is divided by position: the first nine tenths train.

VAL AND TEST FILES of your own: --val=FILE, --test=FILE, each a file, a folder or a glob, repeated
as you like. With --val the sources all go to train, and --split is an error; with --test alone
--split divides them into train and val. A file that is also among the sources is left out of train.
A document that is in several splits stays in all of them; with --dedup only in test, else in val.

CONVERSATIONS are rows with "messages" or "conversations" (OpenAI's, ShareGPT's), with "prompt" and
"completion", with "instruction", "input" and "output"; rows that are a list of messages; and what
--field=MESSAGES or --field=ASKED,ANSWERED names. Where rows have "text" as well, the conversation
is prepared, unless --field=text asks for the text. They are written in a chat template, and only
the answers are learned, except for those with "weight": 0 or "loss_mask": 0; a row that has one of
these itself is left out, and counted. A row's "system" or "system_prompt" becomes a turn in front,
Alpaca's "history" earlier turns, whose answers are read, not learned.

A run that was stopped goes on when it gets the same command; the bins are the same for any
--num_proc. Old bins stay until the new ones are whole.
"""

import argparse
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
# vocabulary.open's options
TRAINING = 'model_type', 'character_coverage', 'max_piece_length', 'byte_fallback'


def _refuse(message):
    """argparse's error; a single word is the NAME to it, where a user most likely left the NAME
    out."""
    if message == 'the following arguments are required: SOURCE':
        message = "NAME or SOURCE is missing: write `python data/prepare.py NAME SOURCE`, such as mine book.txt"
    fail(message)


def arguments(words):
    """What was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = _refuse
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
        help="char, byte, gpt2, cl100k_base, o200k_base, a "
        "sentencepiece model, a tokenizer.json, a name on the Hugging Face Hub, train:bpe:VOCAB, "
        "train:sentencepiece:VOCAB; default: gpt2",
    )
    add(
        '--field',
        metavar='NAME[,NAME…]',
        help="of a row: which is its text or its messages (a.b: "
        "b in a); of several, the last is what is answered, the others what is asked; default: "
        "those of a conversation, or text",
    )
    add(
        '--document',
        default='file',
        metavar='KIND',
        help="what is one in a text: file, "
        r"paragraph, line, or any text that stands between documents, such as '<|endoftext|>' or "
        r"'\n---\n' (\n, \t and \r are line ends and tabs, \\ is a backslash); default: file",
    )
    add(
        '--separator',
        metavar='TEXT',
        help="behind each document, where the tokenizer has no "
        "end-of-text token; default: a newline, unless the document ends with one; "
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
        help="a file, folder or glob to validate on; the "
        "sources then all go to train; may be repeated",
    )
    add(
        '--test',
        metavar='FILE',
        action='append',
        help="the same to test on; --split is then of train and val",
    )
    add('--seed', type=int, default=1337, help="of the split; default: 1337")
    add(
        '--dedup',
        action='store_true',
        help="keep one of equal documents, test's or else val's, "
        "which needs 100 bytes of memory for each; those above 4 MB stay as they are",
    )
    add(
        '--skip_bad_rows',
        action='store_true',
        help="leave out rows that can't be used, such as "
        "invalid JSON, and report them at the end; default: the first one is an error",
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
        help="of text to train it on, taken evenly from the sources; default: 100 MB",
    )
    training.add_argument('--model_type', help="of sentencepiece: bpe or unigram")
    training.add_argument('--character_coverage', type=float, metavar='SHARE')
    training.add_argument('--max_piece_length', type=int, metavar='N')
    training.add_argument('--byte_fallback', choices=('True', 'False'))
    for word in words:
        if empty := re.fullmatch(r'(--\w+)=--', word):  # argparse would read it as -- alone
            fail(f"{empty[1]} has no value; write {empty[1]}=VALUE")
    for flag in FLAGS:
        words = [word for word in words if word != f'--{flag}=False']
        words = [f'--{flag}' if word == f'--{flag}=True' else word for word in words]
    asked = parser.parse_intermixed_args(words)
    for key, least in (
        ('num_proc', 1),
        ('max_bytes', 1),
        ('shard_tokens', 0),
        ('train_bytes', 1),
        ('seed', 0),
    ):
        if getattr(asked, key) is not None and getattr(asked, key) < least:
            fail(f"{key}={getattr(asked, key)} must be at least {least}")
    for key, most in (('num_proc', 1024), ('max_piece_length', 1 << 20)):
        if (getattr(asked, key) or 0) > most:
            fail(f"{key}={getattr(asked, key)} must be at most {most}")
    asked.document = unescaped(asked.document)
    if asked.separator is not None:
        asked.separator = unescaped(asked.separator)
    return asked


def unescaped(text):
    """A text with the characters that \\n, \\t, \\r and a double backslash in it stand for."""
    escapes = {r'\n': '\n', r'\t': '\t', r'\r': '\r', '\\\\': '\\'}
    return re.sub(r'\\[ntr\\]', lambda match: escapes[match[0]], text)


def shares_of(asked):
    """The shares that divide the sources, or None where all go to train. Raises ValueError."""
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
    if (script := folder / 'prepare.py').is_file():
        raise ValueError(f"{folder} belongs to {script}, which makes its bins: use another NAME")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: use another NAME")
    return folder


def is_in_repository():
    """Whether the user stands in the repository, so that `python train.py` works."""
    return Path.cwd() == DATA.parent


def name_of(name, folder):
    """What --dataset= is to be, from where the user stands: a path stays one."""
    if not is_path(name):
        return name
    path = folder.as_posix()  # which needs no quotes on Windows
    return path if is_path(path) else f'./{path}'


def template_of(path):
    text = read_text(path, as_text=True)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def tokenizer_for(asked, source, folder):
    """The tokenizer. One that has to read the text is kept, for a command that was stopped and goes
    on."""
    options = {key: getattr(asked, key) for key in TRAINING if getattr(asked, key) is not None}
    if asked.byte_fallback:
        options['byte_fallback'] = asked.byte_fallback == 'True'
    if asked.tokenizer != 'char' and not asked.tokenizer.startswith('train:'):
        return vocabulary.open(asked.tokenizer, **options)
    most = None if asked.tokenizer == 'char' else asked.train_bytes
    kept = files.workplace(folder) / 'tokenizer.json'
    key = [asked.tokenizer, options, most, asked.separator, source.fingerprint]
    if kept.is_file() and (known := json.loads(kept.read_text(encoding='utf-8')))['of'] == key:
        return tokenizer.load(known['tokenizer'])
    print(f"tokenizer {asked.tokenizer}: reading the text for its vocabulary", flush=True)

    def texts():
        if most:
            return source.texts(most)
        characters = set()
        if source.has_ends:
            characters.update('\n' if asked.separator is None else asked.separator)
        for text in source.texts():
            characters.update(text)
        return [''.join(characters)]  # each once: the texts may be many

    made = vocabulary.open(asked.tokenizer, texts, **options)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(kept) as file:
        file.write(json.dumps({'of': key, 'tokenizer': made.describe()}).encode())
    return made


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
    template = template_of(asked.template) if asked.template else None
    with files.alone_in(folder):
        meta = make(asked, shares, folder, template)
    if meta.get('masked'):
        recipe, options = 'finetune_shakespeare.py', ['--init_from=gpt2']
    elif meta['tokenizer']['kind'] in ('char', 'byte'):
        recipe, options = 'train_shakespeare_char.py', []
    else:
        recipe, options = 'train_shakespeare.py', []
    words = ['train.py', f'config/{recipe}']
    if not is_in_repository():
        words = [(DATA.parent / word).as_posix() for word in words]
    words += [*options, f'--dataset={name_of(asked.name, folder)}']
    words += [f'--out_dir=out-{folder.resolve().name}']
    print(f"now, for example: python {shlex.join(words)}")


def make(asked, shares, folder, template):
    """Prepare what was asked for; returns the meta."""
    try:
        source = sources.open(
            asked.sources,
            asked.field,
            asked.document,
            template,
            folder,
            asked.max_bytes,
            skip_bad_rows=asked.skip_bad_rows,
            as_text=asked.as_text,
            val=asked.val or (),
            test=asked.test or (),
        )
        own = tokenizer_for(asked, source, folder)
        if asked.separator is not None and getattr(own, 'eot', None) is not None:
            raise ValueError(
                f"tokenizer {asked.tokenizer} has a token for the end of a document: leave --separator out"
            )
        source.look_for_special_tokens(own)
    except (ValueError, OSError) as error:
        work = files.workplace(folder)
        # nothing of an earlier run waits there
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
        own,
        shares,
        asked.seed,
        asked.dedup,
        asked.num_proc,
        asked.shard_tokens,
        asked.separator,
    )


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stops it as Ctrl-C does
    with user_errors():
        main(sys.argv[1:])
