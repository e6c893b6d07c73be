"""A dataset of your own text: data/NAME/train.bin, val.bin and meta.json.

    python data/prepare.py NAME SOURCE... [--tokenizer=gpt2] [--key=value ...]
    python train.py --dataset=NAME
"""
import argparse
import sys
from pathlib import Path

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))

import bins
import sources
from mistakes import user_errors
from tokenizer import ByteTokenizer, CharTokenizer, TiktokenTokenizer


def open_tokenizer(name, texts):
    if name == 'char':
        return CharTokenizer(sorted(set().union(*map(set, texts()))))
    return ByteTokenizer() if name == 'byte' else TiktokenTokenizer(name)


def folder_of(name):
    """data/NAME, or the path that NAME is. Raises ValueError."""
    folder = DATA / name
    if not Path(name).is_absolute() and (DATA not in folder.resolve().parents):
        raise ValueError(f"NAME={name} is not in {DATA}: take a name, or a path from / on")
    if folder.is_file():
        raise ValueError(f"NAME={name} is a file: the first word is the new dataset's name, the sources come behind it")
    if (folder / 'prepare.py').is_file():
        raise ValueError(f"{folder} has a prepare.py of its own: run `python {folder / 'prepare.py'}`, or take another NAME")
    return folder


def main(words):
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = options.add_argument
    add('name', metavar='NAME', help="of the dataset, as --dataset takes it; or a folder's path")
    add('sources', metavar='SOURCE', nargs='+', help="files, folders, globs; - for standard input")
    add('--tokenizer', default='gpt2')
    add('--field')
    add('--document', default='file')
    add('--template')
    add('--separator')
    add('--split', default='0.9,0.1')
    add('--seed', type=int, default=1337)
    add('--dedup', action='store_true')
    add('--num_proc', type=int)
    add('--shard_tokens', type=int, default=0)
    asked = options.parse_args(words)
    folder = folder_of(asked.name)
    source = sources.open(asked.sources, asked.field, asked.document, None, folder)
    tokenizer = open_tokenizer(asked.tokenizer, source.texts)
    bins.prepare(folder, source, tokenizer, asked.split.split(','), asked.seed, asked.dedup, asked.num_proc,
                 asked.shard_tokens, asked.separator)


if __name__ == '__main__':
    with user_errors():
        main(sys.argv[1:])
