"""What sample.py goes on from: texts, files, and the lines that somebody types."""
import io
import sys

import textfiles


def read(text):
    """The texts that a prompt stands for: FILE:name, a file's; LINES:name, each line of a file; -, standard input; else
    itself. Raises ValueError."""
    if text != '-' and not text.startswith(('FILE:', 'LINES:')):
        return [text]
    try:
        if text == '-':
            content = _standard_input(sys.stdin.read)
        else:
            content = textfiles.read_text(text.partition(':')[2], as_text=True)
            content = io.StringIO(content, newline=None).read()     # CR LF becomes LF
    except (OSError, ValueError) as error:
        raise ValueError(f"{text} can't be read as UTF-8 text ({getattr(error, 'strerror', None) or error})") from None
    if not text.startswith('LINES:'):
        return [content]
    texts = [line for line in content.splitlines() if line]
    if not texts:
        raise ValueError(f"{text} has no line")
    return texts


def _standard_input(read):
    """What `read` reads of it. Raises ValueError where that is not UTF-8."""
    try:
        text = read()
        text.encode()       # in the C locale Python reads such bytes as surrogates
        return text
    except UnicodeError:
        raise ValueError("standard input is not UTF-8: `iconv -f ITS_ENCODING -t UTF-8` converts it"
                         ) from None


def typed():
    """The lines of standard input, each after a `> ` on a terminal, until it ends (Ctrl-D)."""
    while True:
        print('> ' if sys.stdin.isatty() else '', end='', file=sys.stderr, flush=True)
        line = _standard_input(sys.stdin.readline)
        if not line:
            return
        yield line.removesuffix('\n')
