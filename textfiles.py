"""Files of text by their names: those of folders and globs, standard input, datasets on the Hugging Face Hub; packed ones.

Judges by a file's name what kind it is, and by its beginning whether it is text at all.
"""
import codecs
import contextlib
import fnmatch
import glob
import gzip
import io
import json
import os
import re
import shlex
import shutil
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import conversations
import files
import hub

BLOCK = 1 << 20     # bytes read at a time
SNIFF = 1 << 16     # bytes at the beginning of a file by which it is taken for text
BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: 'UTF-32', codecs.BOM_UTF32_BE: 'UTF-32',
                    codecs.BOM_UTF16_LE: 'UTF-16', codecs.BOM_UTF16_BE: 'UTF-16'}


class File(NamedTuple):
    name: str           # as the user knows it
    path: Path
    kind: str           # text, jsonl, parquet
    packed: str         # '', gz, zst
    size: int           # bytes on the disk
    changed: object     # what tells it from another file of this name and size
    origin: tuple | None = None     # repository, commit and name of a file of the Hub, which is fetched to `path`


def find(word, field=None, folder=None):
    """The Files that a word stands for: a file, a folder, a glob, `-`, owner/name[@revision][:folder or glob] on the Hub.

    field: where it is given, .json and standard input hold rows. folder: in whose files.workplace copies go; the bins there
    are no source. Raises ValueError or OSError.
    """
    try:
        path = Path(word).expanduser()
    except RuntimeError:
        raise FileNotFoundError(f"{word}: there is no such user here") from None
    if word == '-':
        return [_standard_input(field, folder)]
    if path.is_file():
        return [_checked(_file(word, path, field))]
    if path.is_dir():
        found = sorted((p.relative_to(path).as_posix(), p) for p in _walk(path, folder))
        return _readable(word, [_file(f'{word.rstrip("/")}/{name}', p, field) for name, p in found])
    if path.exists():
        raise ValueError(f"{word} is neither a file nor a folder: send it to standard input, and take - for its name")
    if glob.has_magic(str(path)):
        names = sorted(name for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if names:
            return _readable(word, [_file(name, Path(name), field) for name in names])
    return _on_the_hub(word, field, folder)


def _walk(path, folder):
    """The files in a folder, without hidden ones and those that preparing has written into it."""
    own = Path(folder).resolve() if folder else None
    for root, folders, names in os.walk(path):
        is_own = Path(root).resolve() == own
        folders[:] = [name for name in folders if not name.startswith('.')]
        for name in names:
            left_out = name.startswith('.') or (is_own and (name == 'meta.json' or name.endswith(('.bin', '.mask'))))
            if not left_out and Path(root, name).is_file():     # no socket, no link to nowhere
                yield Path(root, name)


def _file(name, path, field):
    stat = path.stat()
    return File(name, path, *_kind(name, field), stat.st_size, stat.st_mtime_ns)


def _kind(name, field):
    """(kind, packed) of a file, by the end of its name."""
    stem, packed = name.lower(), ''
    if stem.endswith(('.gz', '.zst')):
        stem, _, packed = stem.rpartition('.')
    return ('parquet' if stem.endswith('.parquet') else
            'jsonl' if stem.endswith(('.jsonl', '.ndjson', '.jsonlines')) or (field and stem.endswith('.json')) else
            'text'), packed


def _standard_input(field, folder):
    """Standard input as a file: a vocabulary is made by reading everything once more."""
    path = files.workplace(folder) / 'stdin'
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"standard input: copying it to {path}", flush=True)
    try:
        with open(path, 'wb') as file:
            shutil.copyfileobj(sys.stdin.buffer, file, BLOCK)
    except OSError as error:
        raise OSError(f"cannot copy standard input to {path}: {error.strerror}") from None
    file = _file('standard input', path, field)
    return _checked(file._replace(kind='jsonl' if field else 'text', changed=files.sha256(path)))


def _on_the_hub(word, field, folder):
    """The files of owner/name[@revision][:folder or glob], a dataset on the Hub or in NANOGPT_MIRROR. A command that was
    stopped goes on with the commit that it began with."""
    where, _, part = word.partition(':')
    repo, _, revision = where.partition('@')
    if not re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', repo) or re.search(r'\.(txt|jsonl?|parquet|md|gz|zst)$', repo):
        raise FileNotFoundError(f"there is no file{' like' if glob.has_magic(word) else ' or folder'} {word}")
    if not revision:    # else it can't be meant for a file
        print(f"{word}: there is no such file or folder here, so it is taken for a dataset on the Hugging Face Hub",
              flush=True)
    try:
        if mirror := hub.mirror_folder(repo):
            found = sorted((p.relative_to(mirror).as_posix(), p) for p in _walk(mirror, folder))
            return [_checked(_file(name, p, field)) for name, p in found if _is_wanted(name, part)]
        pinned = files.workplace(folder) / 'hub.json'
        commits = json.loads(pinned.read_text(encoding='utf-8')) if pinned.is_file() else {}
        commit, sizes = hub.listing(repo, commits.get(where) or revision or None)
    except OSError as error:
        raise error if revision else OSError(f"{word} is neither a file nor a folder here, and {error}") from None
    pinned.parent.mkdir(parents=True, exist_ok=True)
    pinned.write_text(json.dumps({**commits, where: commit}), encoding='utf-8')
    wanted = sorted(name for name in sizes if _is_wanted(name, part))
    if not wanted:
        raise ValueError(f"{word}: of the {len(sizes)} files of commit {commit}, none is called .parquet, .jsonl or .txt "
                         + f"and lies in {part}" * bool(part))
    print(f"{repo}: commit {commit}, {len(wanted):,} file(s), {sum(map(sizes.get, wanted)) / 1e6:,.1f} MB, the first is "
          f"{wanted[0]}; each is removed when it is read", flush=True)
    path = pinned.with_name('hub') / repo.replace('/', '--')
    return [File(f'{repo}:{name}', path / name, *_kind(name, field), sizes[name], commit, (repo, commit, name))
            for name in wanted]


def _is_wanted(name, part):
    """Whether a file of a dataset is text or rows, and in the folder `part` or called as that glob says."""
    is_text = re.search(r'\.(parquet|(jsonl|ndjson|jsonlines|txt)(\.gz|\.zst)?)$', name.lower())
    is_inside = not re.search(r'(^|/)\.\.(/|$)|^/|[\\:\x00-\x1f]', name)  # a server's word: it stays in the folder
    return is_text and is_inside and (not part or fnmatch.fnmatch(name, part) or name.startswith(part.rstrip('/') + '/'))


def _checked(file):
    if wrong := _what_is_wrong(file):
        raise ValueError(f"{file.name} {wrong}")
    return file


def _readable(word, found):
    """Those of the files found that are text or rows; says how many are left out."""
    wrong = {file for file in found if _what_is_wrong(file)}
    if wrong:
        first = next(file.name for file in found if file in wrong)
        print(f"{word}: {len(wrong):,} of {len(found):,} files left out, which are no UTF-8 text; the first is {first}")
    return [file for file in found if file not in wrong]


def _what_is_wrong(file):
    """Why a file is no text, judged by its beginning, or ''."""
    if file.kind == 'parquet':
        return ''
    with reading(file) as (_, stream):
        head = stream.read(SNIFF)
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if head.startswith(mark):
            return f"is {encoding}, not UTF-8: `iconv -f {encoding} -t UTF-8` converts it"
    if b'\0' in head:
        return "is a binary file (there are zero bytes in it)"
    try:
        codecs.getincrementaldecoder('utf-8')().decode(head, final=len(head) < SNIFF)
    except UnicodeDecodeError as error:
        return f"is not UTF-8 at byte {error.start:,}: `iconv -f ITS_ENCODING -t UTF-8` converts it"
    return _what_is_wrong_with_lines(file, head) if file.kind == 'jsonl' else ''


def _what_is_wrong_with_lines(file, head):
    """Why JSONL can't be read line by line, judged by its beginning, or ''. A line may well be an
    array, of messages; but the file as a whole may not."""
    text = head.decode(errors='ignore').removeprefix('\ufeff').lstrip()
    if not text.startswith('['):
        return ''
    line, _, others = text.partition('\n')
    has_messages = _begins_with_message(line if line.strip() != '[' else text)
    try:
        json.loads(line)
        if has_messages or others.strip():
            return ''
    except ValueError:
        is_cut_off = len(head) == SNIFF and '\n' not in text
        if has_messages and is_cut_off:
            return ''
    program = '.' if has_messages else '.[]'
    return (f"is one JSON array: `{_jq(file, program)}` writes its rows as lines, which can be "
            "prepared")


def _begins_with_message(text):
    """Whether the first item of an array is a message, as far as the text goes."""
    text = text[1:].lstrip()
    try:
        return conversations.is_message(json.JSONDecoder().raw_decode(text)[0])
    except ValueError:      # it is longer
        return re.match(r'\{\s*"(role|from|content|value)"\s*:', text) is not None


def _jq(file, program):
    """The command that writes a file's JSON as lines, into a file of another name."""
    if file.name == 'standard input':
        return f"jq -c '{program}'"
    stem = file.name.removesuffix(f'.{file.packed}')
    beginning, _, ending = stem.rpartition('.')
    # What ends in .jsonl already needs another name.
    lines = f'{beginning}.jsonl' if ending.lower() == 'json' else f'{beginning}-rows.jsonl'
    name = shlex.quote(file.name)
    command = f"jq -c '{program}' {name}"
    if file.packed:
        unpack = 'gzip' if file.packed == 'gz' else 'zstd'
        command = f"{unpack} -dc {name} | jq -c '{program}'"
    return f"{command} > {shlex.quote(lines)}"


@contextlib.contextmanager
def reading(file):
    """(the file on the disk, its text) as binary files. Raises ValueError where it is damaged."""
    damages = [EOFError, zlib.error, gzip.BadGzipFile]
    try:
        with open(file.path, 'rb') as raw:
            if file.packed == 'zst':
                try:
                    import zstandard
                except ImportError:
                    raise ValueError(f"{file.name} needs a package: pip install zstandard") from None
                damages.append(zstandard.ZstdError)
                yield raw, io.BufferedReader(_Unpacked(_frames(raw, zstandard.ZstdDecompressor())), BLOCK)
            else:
                yield raw, gzip.GzipFile(fileobj=raw) if file.packed else raw
    except tuple(damages) as error:
        raise ValueError(f"{file.name} is damaged: {error}") from None


def _frames(raw, zstd):
    """What a .zst file holds, block by block. EOFError where its end is missing: the library's own reader says nothing."""
    frame = None
    while block := raw.read(1 << 12):       # a block may hold 32,000 times its size
        while block:
            frame = frame or zstd.decompressobj()
            yield frame.decompress(block)
            block, frame = frame.unused_data, None if frame.eof else frame
    if frame:
        raise EOFError("its end is missing")


class _Unpacked(io.RawIOBase):
    """An iterator of bytes as a file."""

    def __init__(self, blocks):
        self.blocks, self.left = blocks, b''

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.left:
            if (block := next(self.blocks, None)) is None:
                return 0
            self.left = memoryview(block)
        n = min(len(buffer), len(self.left))
        buffer[:n], self.left = self.left[:n], self.left[n:]
        return n


def fetched(file):
    """The file, once it is here."""
    if file.origin and not (file.path.is_file() and file.path.stat().st_size == file.size):
        repo, commit, name = file.origin
        if hub.download(repo, name, commit, 'dataset', file.path.parents[name.count('/')]) is None:
            raise OSError(f"{file.name} is not there any more")
    return file
