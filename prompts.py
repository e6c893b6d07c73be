"""What sample.py goes on from: texts, files, and the lines that somebody types."""
import sys
from pathlib import Path


def read(text):
    """The texts that a prompt stands for: FILE:name, a file's; LINES:name, each line of a file; -, standard input; else
    itself. Raises ValueError."""
    if text != '-' and not text.startswith(('FILE:', 'LINES:')):
        return [text]
    try:
        content = sys.stdin.read() if text == '-' else Path(text.partition(':')[2]).read_text(encoding='utf-8')
    except (OSError, ValueError) as error:
        raise ValueError(f"{text} can't be read as UTF-8 text ({getattr(error, 'strerror', None) or error})") from None
    texts = [line for line in content.splitlines() if line] if text.startswith('LINES:') else [content]
    if not texts:
        raise ValueError(f"{text} has no line")
    return texts


def typed():
    """The lines of standard input, each after a `> ` on a terminal, until it ends (Ctrl-D)."""
    while True:
        print('> ' if sys.stdin.isatty() else '', end='', file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            return
        yield line.removesuffix('\n')
