"""What a source yields to bins.prepare: documents, parts of large ones, and remarks on them.

A document is a text, a list of (text, is_learned), or a `Part` of a text. A `Remark` stands in the
place of a document that was skipped, or beside one: equal remarks are counted, and reported once
all documents are read.
"""

from typing import NamedTuple

from system.errors import one_line

SKIPPED = "row(s) skipped by --skip_bad_rows"
SHOWN = 5  # remarks about one thing that are kept word for word; further ones are only counted


class Part(NamedTuple):
    """A part of a document that is too large to be encoded at once. The parts of a document follow
    each other."""

    text: str
    key: bytes  # 16 bytes of the sha256 of the document's first part, which choose its split
    is_last: bool
    # (characters before this part, characters in all) of a text that is divided by position
    place: tuple | None = None


class Remark(NamedTuple):
    """Something to report at the end. Remarks with the same `about` are counted together."""

    about: str  # SKIPPED, what `remark_lines` prints after the count, or a key of the source's own
    detail: str  # where: file and line, and what was wrong there
    n: int = 1  # how often


def count_remarks(remarks, before):
    """{about: [how often, the first SHOWN details]} of these remarks and of the counts `before`,
    which are not changed."""
    counts = {about: [n, list(details)] for about, (n, details) in before.items()}
    for about, detail, n in remarks:
        count = counts.setdefault(about, [0, []])
        count[0] += n
        if len(count[1]) < SHOWN:
            count[1].append(detail)
    return counts


def remark_lines(counts):
    """The lines that report remarks, as `count_remarks` counts them; skipped rows come last."""
    for about, (n, details) in counts.items():
        if about != SKIPPED:
            yield one_line(f"{n:,} {about}; the first is {details[0]}")
    if SKIPPED in counts:
        n, details = counts[SKIPPED]
        of_which = '' if n == len(details) else ', of which the first are'
        yield f"{n:,} {SKIPPED}{of_which}:"
        for detail in details:
            yield f"    {one_line(detail)}"
