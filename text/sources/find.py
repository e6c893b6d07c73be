"""Finds the files that the names of sources stand for: files, folders, globs, standard input.

A file's name says of what format it is; its beginning shows whether it can be read.
"""

import glob
import os
import shutil
import sys
from pathlib import Path

from system import files
from text.sources import hub_dataset
from text.sources.compression import BLOCK
from text.sources.conversion import STANDARD_INPUT
from text.sources.formats import JsonLines, Table, TextFile, source_file


def find(word, field=None, folder=None, as_text=False):
    """The SourceFiles that a word stands for: a file, a folder, a glob, `-`,
    owner/name[@revision][:folder or glob] on the Hub.

    field: if it is given, .json and standard input hold rows. folder: the dataset's, in whose
    files.workplace copies go; the bins there are not sources. as_text: read .csv, .tsv and .json as
    text. Raises ValueError or OSError.
    """
    if not word:
        raise ValueError("a source has an empty name")
    try:
        path = Path(word).expanduser()
    except RuntimeError:
        raise FileNotFoundError(f"{word}: there is no such user here") from None

    if word == '-':
        return [_standard_input(field, folder)]
    if path.is_file():
        return [_readable(source_file(word, path, field, as_text))]
    if path.is_dir():
        stem = word.rstrip('/')
        found = [
            source_file(f'{stem}/{name}', inside, field, as_text)
            for name, inside in _files_in(path, folder)
        ]
        return _only_readable(word, found)
    if path.exists():
        raise ValueError(
            f"{word} is neither a file nor a folder: send its content to standard input, and name "
            "the source -"
        )
    if glob.has_magic(str(path)):
        names = glob.glob(str(path), recursive=True)
        names = sorted(name for name in names if Path(name).is_file())
        if names:
            found = [source_file(name, Path(name), field, as_text) for name in names]
            return _only_readable(word, found)
    return _on_the_hub(word, field, folder)


def _files_in(path, folder):
    """[(name, path)] of the files in a folder, sorted by name, without hidden ones and without
    those that preparing has written into `folder`, the dataset's."""
    prepared = None
    if folder:
        prepared = Path(folder).resolve()
    found = []
    for root, folders, names in os.walk(path):
        is_prepared = Path(root).resolve() == prepared
        folders[:] = [name for name in folders if not name.startswith('.')]
        for name in names:
            if name.startswith('.'):
                continue
            if is_prepared and (name == 'meta.json' or name.endswith(('.bin', '.mask'))):
                continue
            inside = Path(root, name)
            if inside.is_file():  # no socket, no broken link
                found.append((inside.relative_to(path).as_posix(), inside))
    return sorted(found)


def _standard_input(field, folder):
    """Standard input, copied to a file: making a vocabulary reads it twice."""
    path = files.workplace(folder) / 'stdin'
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"standard input: copying it to {path}", flush=True)
    try:
        with open(path, 'wb') as file:
            shutil.copyfileobj(sys.stdin.buffer, file, BLOCK)
    except OSError as error:
        raise OSError(f"cannot copy standard input to {path}: {error.strerror}") from None
    form = TextFile
    if field:
        form = JsonLines
    return _readable(form(STANDARD_INPUT, path, '', path.stat().st_size, files.sha256(path)))


def _on_the_hub(word, field, folder):
    """The files of a dataset on the Hub, or in NANOGPT_MIRROR if that is a folder. Raises OSError
    or ValueError."""
    dataset = hub_dataset.parse(word)
    if dataset is None:
        kind = "file or folder"
        if glob.has_magic(word):
            kind = "file like"
        raise FileNotFoundError(f"there is no {kind} {word}")
    if not dataset.revision:  # with one, it can't be meant for a file
        print(
            f"{word}: there is no such file or folder here, so it is taken for a dataset on the "
            "Hugging Face Hub",
            flush=True,
        )
    try:
        mirror = dataset.mirror_folder()
        if not mirror:
            return dataset.files(field, files.workplace(folder))
        return [
            _readable(source_file(name, path, field))
            for name, path in _files_in(mirror, folder)
            if dataset.has(name)
        ]
    except OSError as error:
        if dataset.revision:
            raise error from None
        raise OSError(f"{word} is neither a file nor a folder here, and {error}") from None


def _readable(file):
    """The file. Raises ValueError if it can't be read."""
    not_text, not_rows = file.judge()
    if not_text or not_rows:
        raise ValueError(f"{file.name} {not_text or not_rows}")
    return file


def _only_readable(word, found):
    """Those of the files found that are text or rows; prints how many are skipped. Raises
    ValueError if there are Tables: they may be most of somebody's data."""
    tables = [file.name for file in found if isinstance(file, Table)]
    if tables:
        raise ValueError(
            f"{word}: {len(tables):,} of {len(found):,} files are .csv, .tsv or "
            f".json, not text; the first is {tables[0]}. Convert them (the error for "
            "one alone says how), leave them out by a glob in quotes, such as "
            "'*.txt', or read them as they are with --as_text"
        )
    readable = []
    not_text = []
    not_rows = []
    for file in found:
        why_not_text, why_not_rows = file.judge()
        if why_not_text:
            not_text.append(file.name)
        elif why_not_rows:
            not_rows.append((file.name, why_not_rows))
        else:
            readable.append(file)
    if not_text:
        print(
            f"{word}: {len(not_text):,} of {len(found):,} files left out, which are not UTF-8 "
            f"text; the first is {not_text[0]}"
        )
    if not_rows:
        first, why = not_rows[0]
        print(
            f"{word}: {len(not_rows):,} of {len(found):,} files left out, which do not hold a "
            f"row on each line; the first, {first}, {why}"
        )
    return readable
