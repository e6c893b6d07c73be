"""Makes a dataset out of your own text: data/NAME/train.bin, val.bin and meta.json, for train.py --dataset=NAME.

    python data/prepare.py mine book.txt
    python data/prepare.py mine texts/ 'more/**/*.md' dump.jsonl.zst pages.parquet --document=paragraph
    python data/prepare.py mine chats.jsonl --skip_bad_rows
    python data/prepare.py mine questions.parquet --field=question,answer
    python data/prepare.py mine HuggingFaceFW/fineweb-edu:sample/10BT --shard_tokens=100_000_000
    zcat big.txt.gz | python data/prepare.py mine - --tokenizer=train:bpe:8192 --split=0.98,0.01,0.01

SOURCES are text files, JSONL and parquet (a row is a document: --field), text and JSONL also as .gz or .zst, folders of
these, globs in quotes, - for standard input, and owner/name[@REVISION][:FOLDER-OR-GLOB] for a dataset on the Hugging
Face Hub, whose files are fetched one after the other and not kept. Of folders and globs, what is no UTF-8 text is left out,
which is said.

DOCUMENTS go to train, val or test as a whole, by the sha256 of the seed and their text, so that copies stay on one side;
one above 4 MB goes by its first 4 MB. Behind each stands the tokenizer's end-of-text token, or --separator. One text file
alone is divided by position: the first nine tenths train.

CONVERSATIONS are rows with "messages" or "conversations" (OpenAI's, ShareGPT's), with "prompt" and
"completion", with "instruction", "input" and "output"; rows that are a list of messages; and what
--field=MESSAGES or --field=ASKED,ANSWERED names. They are written in a chat template, and only the
answers are learned, except for those with "weight": 0.

A run that was stopped goes on when it gets the same command; the bins are the same for any --num_proc. Old bins stay until
the new ones are whole.
"""
import argparse
import json
import shlex
import shutil
import signal
import sys
from pathlib import Path

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))

from mistakes import begin_script

if __name__ == '__main__':
    begin_script()      # before the imports, which take a second

import bins
import files
import sources
import tokenizer
import vocabulary
from mistakes import fail, user_errors

TRAINING = 'model_type', 'character_coverage', 'max_piece_length', 'byte_fallback'      # vocabulary.open's options


def arguments(words):
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.error = fail
    add = parser.add_argument
    add('name', metavar='NAME', help="the folder in data/ to make, or any folder's whole path")
    add('sources', metavar='SOURCE', nargs='+', help="files, folders, 'globs', -, owner/name on the Hub")
    add('--tokenizer', default='gpt2', metavar='NAME', help="char, byte, gpt2, cl100k_base, o200k_base, a "
        "sentencepiece model, a tokenizer.json, a name on the Hugging Face Hub, train:bpe:VOCAB, "
        "train:sentencepiece:VOCAB; default: gpt2")
    add('--field', metavar='NAME[,NAME…]', help="of a row: which is its text or its messages (a.b: "
        "b in a); of several, the last is what is answered, the others what is asked; default: "
        "text, or those of a conversation")
    add('--document', default='file', choices=sources.SEPARATORS, help="what is one in a text; default: file")
    add('--separator', metavar='TEXT', help="behind each document, where the tokenizer has no end-of-text token; default: "
        "a newline, unless the document ends with one; of a shell's: --separator=$'\\n\\n'")
    add('--template', metavar='FILE.json', help='of conversations: {"user": [before, after], "assistant": [before, after]}')
    add('--split', default='0.9,0.1', metavar='SHARES', help="of train and val, or train, val and test; default: 0.9,0.1")
    add('--seed', type=int, default=1337, help="of the split; default: 1337")
    add('--dedup', action='store_true', help="take each document once, which needs 100 bytes of memory for each; those "
        "above 4 MB stay as they are")
    add('--skip_bad_rows', action='store_true', help="leave out rows that can't be used, such as "
        "invalid JSON, and report them at the end; default: the first one is an error")
    add('--max_bytes', type=int, metavar='N', help="take only the beginning, about so much of the sources' size")
    add('--num_proc', type=int, help="processes that encode; default: one per core")
    add('--shard_tokens', type=int, default=0, metavar='N', help="write files of N tokens each: train-00000.bin, …")
    training = parser.add_argument_group("options of --tokenizer=train:…")
    training.add_argument('--train_bytes', type=int, default=100_000_000, metavar='N', help="of text to train it on, taken "
                          "evenly from the sources; default: 100 MB")
    training.add_argument('--model_type', help="of sentencepiece: bpe or unigram")
    training.add_argument('--character_coverage', type=float, metavar='SHARE')
    training.add_argument('--max_piece_length', type=int, metavar='N')
    training.add_argument('--byte_fallback', choices=('True', 'False'))
    for flag in ('--dedup', '--skip_bad_rows'):
        words = [word for word in words if word != f'{flag}=False']
        words = [flag if word == f'{flag}=True' else word for word in words]
    asked = parser.parse_intermixed_args(words)
    if wrong := [key for key, value in vars(asked).items() if type(value) is list and key != 'sources']:
        fail(f"--{wrong[0]} has no value; write --{wrong[0]}=VALUE")        # argparse takes it for -- alone
    for key, least in (('num_proc', 1), ('max_bytes', 1), ('shard_tokens', 0), ('train_bytes', 1), ('seed', 0)):
        if getattr(asked, key) is not None and getattr(asked, key) < least:
            fail(f"{key}={getattr(asked, key)} must be at least {least}")
    for key, most in (('num_proc', 1024), ('max_piece_length', 1 << 20)):
        if (getattr(asked, key) or 0) > most:
            fail(f"{key}={getattr(asked, key)} must be at most {most}")
    return asked


def folder_of(name):
    """data/NAME, or the folder that NAME is the path of. Raises ValueError."""
    folder = DATA / name
    if Path(name).is_file():
        raise ValueError(f"{name} is a file: the new dataset's NAME comes first, then the sources")
    if '..' in Path(name).parts or not Path(name).parts:
        raise ValueError(f"NAME={name} is not in {DATA}: take a plain name, or a folder's whole path")
    if (script := folder / 'prepare.py').is_file():
        raise ValueError(f"{folder} belongs to {script}, which makes its bins: take another NAME")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is no folder: take another NAME")
    return folder


def template_of(path):
    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def tokenizer_for(asked, source, folder):
    """The tokenizer. One that has to read the text is kept, for a command that was stopped and goes on."""
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
        characters = set() if source.length else set('\n' if asked.separator is None else asked.separator)
        for text in source.texts():
            characters.update(text)
        return [''.join(characters)]    # each once: the texts may be many
    made = vocabulary.open(asked.tokenizer, texts, **options)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(kept) as file:
        file.write(json.dumps({'of': key, 'tokenizer': made.describe()}).encode())
    return made


def main(words):
    asked = arguments(words)
    shares = asked.split.split(',')
    bins.check_split(shares)
    folder = folder_of(asked.name)
    template = template_of(asked.template) if asked.template else None
    with files.alone_in(folder):
        meta = make(asked, shares, folder, template)
    if meta.get('masked'):
        recipe, example = 'finetune_shakespeare', ' --init_from=gpt2'
    else:
        recipe, example = 'train_shakespeare' + '_char' * (meta['tokenizer']['kind'] in ('char', 'byte')), ''
    print(f"now, for example: python train.py config/{recipe}.py{example} {shlex.quote(f'--dataset={asked.name}')} "
          f"{shlex.quote(f'--out_dir=out-{folder.name}')}")


def make(asked, shares, folder, template):
    """Prepare what was asked for; returns the meta."""
    try:
        source = sources.open(
            asked.sources, asked.field, asked.document, template, folder, asked.max_bytes,
            skip_bad_rows=asked.skip_bad_rows)
        own = tokenizer_for(asked, source, folder)
        if asked.separator is not None and getattr(own, 'eot', None) is not None:
            raise ValueError(f"tokenizer {asked.tokenizer} has a token for the end of a document: leave --separator out")
    except (ValueError, OSError) as error:
        work = files.workplace(folder)
        if isinstance(error, ValueError) and not (work / 'bins').exists():    # nothing of an earlier run waits there
            shutil.rmtree(work, ignore_errors=True)
        (work / 'stdin').unlink(missing_ok=True)
        raise
    if (folder / 'meta.json').is_file():
        print(f"{folder} has bins, which stay until these are whole, and are then replaced", flush=True)
    return bins.prepare(folder, source, own, shares, asked.seed, asked.dedup, asked.num_proc, asked.shard_tokens,
                        asked.separator)


if __name__ == '__main__':
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # stops it as Ctrl-C does
    with user_errors():
        main(sys.argv[1:])
