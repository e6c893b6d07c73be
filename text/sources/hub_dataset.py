"""Datasets on the Hugging Face Hub as sources: owner/name[@revision][:folder or glob]."""

import fnmatch
import json
import re
from typing import NamedTuple

from system import hub
from text.sources.compression import split_name
from text.sources.formats import format_of


class HubDataset(NamedTuple):
    """Files of a dataset on the Hub."""

    word: str  # as the user wrote it
    repo: str
    revision: str  # a commit, tag or branch, or ''
    part: str  # a folder or glob in the repository, or '' for all of it

    def mirror_folder(self):
        """The folder that replaces the repository if NANOGPT_MIRROR is a folder, else None. Raises
        OSError."""
        return hub.mirror_folder(self.repo)

    def has(self, name):
        """Whether a file of the repository is text or rows, and in the part that is asked for."""
        if not is_wanted(name):
            return False
        is_in_folder = name.startswith(self.part.rstrip('/') + '/')
        return not self.part or fnmatch.fnmatch(name, self.part) or is_in_folder

    def files(self, field, workplace):
        """The SourceFiles of this dataset, not yet downloaded. A command that was stopped uses the
        commit that it began with, which the folder `workplace` keeps. Raises ValueError, OSError.
        """
        pinned = workplace / 'hub.json'
        commits = {}
        if pinned.is_file():
            commits = json.loads(pinned.read_text(encoding='utf-8'))
        where, _, _ = self.word.partition(':')
        commit, sizes = hub.listing(self.repo, commits.get(where) or self.revision or None)
        pinned.parent.mkdir(parents=True, exist_ok=True)
        pinned.write_text(json.dumps({**commits, where: commit}), encoding='utf-8')

        wanted = sorted(name for name in sizes if self.has(name))
        if not wanted:
            inside = ''
            if self.part:
                inside = f" and lies in {self.part}"
            raise ValueError(
                f"{self.word}: of the {len(sizes)} files of commit {commit}, none is called "
                f".parquet, .jsonl or .txt{inside}"
            )
        size = sum(sizes[name] for name in wanted)
        print(
            f"{self.repo}: commit {commit}, {len(wanted):,} file(s), {size / 1e6:,.1f} MB, the "
            f"first is {wanted[0]}; each is removed when it is read",
            flush=True,
        )
        folder = pinned.with_name('hub') / self.repo.replace('/', '--')
        found = []
        for name in wanted:
            form, compression = format_of(name, field)
            file = form(
                f'{self.repo}:{name}',
                folder / name,
                compression,
                size=sizes[name],
                changed=commit,
                origin=(self.repo, commit, name),
            )
            found.append(file)
        return found


def parse(word):
    """The HubDataset that a word names, or None if it looks like a file."""
    where, _, part = word.partition(':')
    repo, _, revision = where.partition('@')
    if not re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', repo):
        return None
    if re.search(r'\.(txt|jsonl?|parquet|md|gz|zst)$', repo):
        return None
    return HubDataset(word, repo, revision, part)


def is_wanted(name):
    """Whether a file of a repository is text or rows, and its name stays inside a folder."""
    # A server says the name: it may not lead out of the folder that files are written to.
    if re.search(r'(^|/)\.\.(/|$)|^/|[\\:\x00-\x1f]', name):
        return False
    form, compression = format_of(name)
    if compression and not form.may_be_compressed:
        return False
    return split_name(name.lower())[0].endswith(form.hub_endings)


def downloaded(file):
    """The SourceFile, downloaded if it is one of the Hub and not here yet. Raises OSError."""
    if not file.origin:
        return file
    is_here = file.path.is_file() and file.path.stat().st_size == file.size
    if not is_here:
        repo, commit, name = file.origin
        folder = file.path.parents[name.count('/')]
        if hub.download(repo, name, commit, 'dataset', folder) is None:
            raise OSError(f"{file.name} is not there any more")
    return file
