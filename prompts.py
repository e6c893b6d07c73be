"""What sample.py reads: the texts it continues, the lines that somebody types, the texts that end a
sample."""

import codecs
import io
import re
import sys

from text.sources import formats

MARK = r'<\|[^|\s]+\|>|\[\|[^|\s]+\|\]'  # <|im_end|>, [|endofturn|]: how special tokens are spelled


def read(text):
    """The texts that a prompt stands for: FILE:name, a file's; LINES:name, each line of a file; -,
    standard input; else itself. Raises ValueError."""
    if text == '-':
        return [_decoded(_standard_input().read(), "standard input", sys.stdin.encoding)]
    if not text.startswith(('FILE:', 'LINES:')):
        return [_decoded(text, "the prompt", sys.getfilesystemencoding())]
    try:
        content = formats.read_text(text.partition(':')[2], as_text=True)
        content = io.StringIO(content, newline=None).read()  # CR LF becomes LF
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{text} can't be read as UTF-8 text ({getattr(error, 'strerror', None) or error})"
        ) from None
    if text.startswith('FILE:'):
        return [content]
    texts = [line for line in content.splitlines() if line]
    if not texts:
        raise ValueError(f"{text} has no line")
    return texts


def typed():
    """The lines of standard input, each after a `> ` on a terminal, until it ends (Ctrl-D). One
    that is not text is an error on stderr, and the next one is read."""
    source = _standard_input()
    while True:
        if source.isatty():
            print('> ', end='', file=sys.stderr, flush=True)
        line = source.readline()
        if not line:
            return
        try:
            yield _decoded(line.removesuffix('\n'), "the line", source.encoding)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)


def stops(value, tokenizer):
    """The texts that end a sample, [str], of the setting `stop`.

    Those of a list are used as they are. A single text is divided at each `|` that is not inside a
    mark such as <|im_end|>, unless all of it is one token, or nothing but bars. Raises ValueError
    where it could mean two things.
    """
    if isinstance(value, list):
        return [text for text in value if text]
    if not value:
        return []
    if not value.strip('|') or len(_ids(tokenizer, value)) == 1:
        return [value]
    texts = ['']
    for part in re.split(rf'({MARK}|\|)', value):
        if part == '|':
            texts.append('')
        else:
            texts[-1] += part
    outside_marks = re.sub(MARK, ' ', value)
    has_broken_mark = re.search(r'<\||\|>|\[\||\|\]', outside_marks) is not None
    if has_broken_mark or not all(texts):
        parts = [text for text in texts if text]
        raise ValueError(
            f"stop={value!r} is either one text or several with | between them: "
            f'write what you mean as a list, --stop="{[value]}" or --stop="{parts}"'
        )
    return texts


def special_id(tokenizer, text):
    """The id of the special token that `text` spells, or None."""
    ids = _ids(tokenizer, text)
    if len(ids) == 1 and ids != list(tokenizer.encode_ordinary(text)):
        return ids[0]
    return None


def _ids(tokenizer, text):
    """The ids of `text`, none where it has a character that the tokenizer lacks."""
    try:
        return list(tokenizer.encode(text))
    except ValueError:
        return []


def _standard_input():
    """Standard input, whose bytes that can't be decoded become surrogates, which `_decoded`
    finds."""
    if hasattr(sys.stdin, 'reconfigure'):
        sys.stdin.reconfigure(errors='surrogateescape')
    return sys.stdin


def _decoded(text, what, encoding):
    """`text`, where all of it could be decoded. Raises ValueError."""
    if found := re.search('[\ud800-\udfff]', text):
        encoding = encoding or 'utf-8'  # a text in memory has none
        before = len(text[: found.start()].encode(encoding, 'surrogateescape'))
        advice = "`iconv -f ITS_ENCODING -t UTF-8` converts it"
        if codecs.lookup(encoding).name != 'utf-8':
            advice = "PYTHONIOENCODING=utf-8 reads UTF-8"
        raise ValueError(f"{what} is not {encoding} text at byte {before:,}: {advice}")
    return text
