"""What a dataset is made of: the documents in text, JSONL and parquet files, for bins.prepare.

`open` finds the files and returns the Source of their documents. Where things are:

    find, hub_dataset         which files a word stands for: files, folders, globs, -, the Hub
    formats                   the kinds of files, one class each; .gz and .zst: compression
    conversion                what to tell a user whose file has another format
    source, cutting           documents, in pieces that worker processes read
    rows, fields              how a row is read: as a text, or as one of the conversations
"""

from dataclasses import replace
from pathlib import Path

from text.sources.cutting import division_by
from text.sources.find import find
from text.sources.source import Source


def open(
    words,
    field=None,
    document='file',
    template=None,
    folder=None,
    max_bytes=None,
    *,
    skip_bad_rows=False,
    as_text=False,
    val=(),
    test=(),
):
    """The Source that the words stand for: files, folders, globs, `-`,
    owner/name[@revision][:folder or glob] on the Hub. Raises ValueError or OSError.

    field: of rows; a.b is b in a. Several names with commas between are those of a conversation,
    and so is one that holds messages; None: what conversations.FORMS recognizes, or 'text'.
    skip_bad_rows: skip rows that can't be used and report them, instead of raising an error.
    document: what a document is in a text: 'file', 'paragraph', 'line', or what is between two
    copies of any other text. template: a chat template; None: chat.DEFAULT. folder: where the bins
    will be; standard input is copied into its files.workplace, and the bins there are not sources.
    max_bytes: read only the beginning, about so many bytes of the files. as_text: read .csv, .tsv
    and .json as text.

    val, test: words for the files of these splits. With `val` all others go to train. A file that
    is named by them and by `words` is not trained on.
    """
    division = division_by(document)
    if folder:
        folder = Path(folder)
    if [*map(str, [*words, *val, *test])].count('-') > 1:
        raise ValueError("standard input (-) can be only one of the sources: it is read once")

    train = None  # documents go to train and val by a hash
    if val:
        train = 'train'
    named = []  # test comes first: of equal documents --dedup keeps the first
    for split, words_of_split in (('test', test), ('val', val), (train, words)):
        found = []
        for word in words_of_split:
            found += find(str(word), field, folder, as_text)
        is_wanted = words_of_split or split in ('train', None)
        if is_wanted and not found:
            raise ValueError(f"there is no file to read for {split or 'train'}")
        named += [replace(file, split=split) for file in found]

    each_once = _each_once(named)
    if not any(file.split in ('train', None) for file in each_once):
        raise ValueError("there is no file to train on: val and test name all of them")
    return Source(
        each_once,
        field=field,
        document=document,
        division=division,
        template=template,
        folder=folder,
        max_bytes=max_bytes,
        skip_bad_rows=skip_bad_rows,
    )


def _each_once(named):
    """The files, each once, in the split that names it first. Raises ValueError if one is both in
    val and in test."""
    found = {}
    n_copies = 0
    n_held_out = 0
    for file in named:
        first = found.setdefault(file.path.resolve(), file)
        if first is file:
            continue
        if first.split == file.split:
            n_copies += 1
        elif file.split == 'val':
            raise ValueError(f"{file.name} is both in val and in test")
        else:
            n_held_out += 1
    if n_copies:
        print(
            f"{n_copies:,} file(s) that the sources name more than once are read once", flush=True
        )
    if n_held_out:
        print(
            f"{n_held_out:,} file(s) of the sources are in val or test, and so not in train",
            flush=True,
        )
    return list(found.values())
