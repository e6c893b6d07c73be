"""What sample.py reads: prompts from the command line and files, typed lines, texts that end a
sample."""

import codecs
import io
import re
import sys

from text.sources import formats

MARK = r'<\|[^|\s]+\|>|\[\|[^|\s]+\|\]'  # how special tokens are spelled: <|im_end|>, [|endofturn|]


def read_prompts(text):
    """The prompts that a setting stands for, [str].

    FILE:name is a file's text, LINES:name each line of a file, - standard input; any other text is
    itself. Raises ValueError.
    """
    if text == '-':
        return [_decoded(_standard_input().read(), "standard input", sys.stdin.encoding)]
    if not text.startswith(('FILE:', 'LINES:')):
        return [_decoded(text, "the prompt", sys.getfilesystemencoding())]
    kind, _, path = text.partition(':')
    try:
        content = formats.read_text(path, as_text=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise ValueError(f"{text} can't be read as UTF-8 text ({reason})") from None
    content = io.StringIO(content, newline=None).read()  # CR LF becomes LF
    if kind == 'FILE':
        return [content]
    lines = [line for line in content.splitlines() if line]
    if not lines:
        raise ValueError(f"{text} has no line that is not empty")
    return lines


def typed_lines():
    """Yield the lines of standard input until it ends (Ctrl-D), with a prompt `> ` on a terminal.
    A line that can't be decoded is reported on stderr and skipped."""
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


def parse_stops(value, tokenizer):
    """The texts that end a sample, [str], of the setting `stop`, a text or a list of texts.

    A list is used as it is. A text is split at each `|` outside of marks such as <|im_end|>, unless
    it is a single token or consists of bars alone. Raises ValueError for a text that could mean two
    things.
    """
    if isinstance(value, list):
        return [text for text in value if text]
    if not value:
        return []
    if not value.strip('|') or len(_encode_or_nothing(tokenizer, value)) == 1:
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


def special_token_id(tokenizer, text):
    """The id of the special token that `text` spells; None where it spells none."""
    ids = _encode_or_nothing(tokenizer, text)
    if len(ids) == 1 and ids != list(tokenizer.encode_ordinary(text)):
        return ids[0]
    return None


def _encode_or_nothing(tokenizer, text):
    """The ids of `text`; [] where it has a character that the tokenizer lacks."""
    try:
        return list(tokenizer.encode(text))
    except ValueError:
        return []


def _standard_input():
    """Standard input; bytes that can't be decoded become surrogates, which `_decoded` reports."""
    if hasattr(sys.stdin, 'reconfigure'):
        sys.stdin.reconfigure(errors='surrogateescape')
    return sys.stdin


def _decoded(text, what, encoding):
    """`text`, unless it has surrogates: a ValueError says where `what` could not be decoded, and
    how to convert it."""
    undecoded = re.search('[\ud800-\udfff]', text)
    if not undecoded:
        return text
    encoding = encoding or 'utf-8'  # a text in memory has none
    n_bytes = len(text[: undecoded.start()].encode(encoding, 'surrogateescape'))
    advice = "`iconv -f ITS_ENCODING -t UTF-8` converts it"
    if codecs.lookup(encoding).name != 'utf-8':
        advice = "PYTHONIOENCODING=utf-8 reads UTF-8"
    raise ValueError(f"{what} is not {encoding} text at byte {n_bytes:,}: {advice}")
