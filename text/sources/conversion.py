"""What to tell a user whose file holds rows in a form that is not read: a command that writes them
as JSONL.

Judges by the beginning of a file. `file` is a formats.SourceFile everywhere.
"""

import itertools
import json
import re
import shlex
from pathlib import Path

from text.sources.compression import split_name
from text.sources.conversations import is_message

SNIFF = 1 << 16  # bytes at the beginning of a file by which it is judged
# Named like these, a file holds rows that somebody exported, not text.
TABLES = '.csv', '.tsv', '.json'
STANDARD_INPUT = 'standard input'  # the name of the file that it is copied to
AS_TEXT = "; --as_text reads it as it is"


def how_to_convert_table(file, head):
    """What to say of a file that is one of TABLES, and begins with these bytes."""
    _, ending = _stem_and_ending(file)
    if ending == '.json':
        return _how_to_convert_json(file, head)
    dialect = ''
    if ending == '.tsv':
        dialect = ",delimiter='\\t'"
    command = _command(file, f"for row in csv.DictReader({_opened(file, as_text=True)}{dialect})")
    return (
        f"is not text but a table: `{command}` writes its rows as lines, whose columns --field "
        f"names{AS_TEXT}"
    )


def _how_to_convert_json(file, head):
    array = _how_to_convert_array(file, head)
    if array:
        return f"is not text but {array}{AS_TEXT}"
    first, others = _first_line(head)
    try:
        row = json.loads(first)
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, (dict, list)) and others.strip():
        return (
            "holds a row on each line: --field=KEY reads what is under that key, or call it "
            f".jsonl{AS_TEXT}"
        )
    return f"is not text but {_how_to_convert_object(file)}{AS_TEXT}"


def why_not_lines(file, head):
    """Why a file does not have a row on each line, judged by its first bytes, or ''."""
    array = _how_to_convert_array(file, head)
    if array:
        return f"is {array}, which can be prepared"
    _, ending = _stem_and_ending(file)
    first, _ = _first_line(head)
    if ending == '.json' and first.strip() == '{':
        return f"is {_how_to_convert_object(file)}, which can be prepared"
    return ''


def _how_to_convert_object(file):
    command = _command(file, f"for row in {_parsed(file)}['KEY']")
    return f"JSON: `{command}` writes the list under a KEY as lines"


def _how_to_convert_array(file, head):
    """What to say of a file that is one JSON array, judged by its first bytes, or ''. A line may
    well be an array, of messages; but the file as a whole may not."""
    text = _decoded(head)
    if not text.startswith('['):
        return ''
    line, others = _first_line(head)
    beginning = line
    if line.strip() == '[':  # the first item is on the next lines
        beginning = text
    has_messages = _begins_with_message(beginning)
    may_be_row = has_messages and file.has_rows
    try:
        json.loads(line)
        if others.strip() or may_be_row:
            return ''
    except (ValueError, RecursionError):
        is_cut_off = len(head) == SNIFF and '\n' not in text
        if may_be_row and is_cut_off:
            return ''
    rows = f'for row in {_parsed(file)}'
    if has_messages:  # the array is one row
        rows = f'for row in [{_parsed(file)}]'
    return f"one JSON array: `{_command(file, rows)}` writes its rows as lines"


def _begins_with_message(text):
    """Whether the first item of an array is a message, as far as the text shows it."""
    text = text[1:].lstrip()
    try:
        return is_message(json.JSONDecoder().raw_decode(text)[0])
    except (ValueError, RecursionError):  # it is longer
        return re.match(r'\{\s*"(role|from|content|value)"\s*:', text) is not None


def _decoded(head):
    return head.decode(errors='ignore').removeprefix('\ufeff').lstrip()


def _first_line(head):
    """(the first line, the others) of these bytes."""
    line, _, others = _decoded(head).partition('\n')
    return line, others


def _stem_and_ending(file):
    """The name of a file without its ending, and the ending in lower case: ('a', '.json') of
    a.JSON.gz."""
    name = file.name
    if file.compression:
        name, _ = split_name(name)
    stem, dot, ending = name.rpartition('.')
    return stem, (dot + ending).lower()


# ---- the command ---------------------------------------------------------------------------------


def _command(file, rows):
    """The command that writes a file's rows as JSONL to a file of another name, or, of standard
    input, to standard output.

    rows: Python, from "for row in" on.
    """
    modules = ['json', 'sys']
    modules += [name for name in ('csv', 'gzip', 'zstandard') if f'{name}.' in rows]
    program = f"import {','.join(modules)};"
    if 'csv' in modules:
        program += 'csv.field_size_limit(1<<30);'  # the default is 128 KB
    command = f'python -c "{program}[print(json.dumps(row)) {rows}]"'
    if file.name == STANDARD_INPUT:
        return command
    return f"{command} {_quoted(file.name)} > {_quoted(_unused_name(file))}"


def _unused_name(file):
    """A name for a file's rows as JSONL, which no file has yet: the command would replace that."""
    stem, ending = _stem_and_ending(file)
    candidates = itertools.chain(
        [f'{stem}.jsonl', f'{stem}-rows.jsonl'],
        (f'{stem}-rows-{i}.jsonl' for i in itertools.count(2)),
    )
    if ending not in TABLES:  # what ends in .jsonl already needs another name
        next(candidates)
    return next(name for name in candidates if not Path(name).exists())


def _quoted(name):
    """A name as a word of a command, which a leading dash does not make an option."""
    if name.startswith('-'):
        name = f'./{name}'
    return shlex.quote(name)


def _parsed(file):
    """A Python expression: the JSON in a file, parsed."""
    return f'json.load({_opened(file)})'


def _opened(file, as_text=False):
    """A Python expression: the file that sys.argv[1] names, opened."""
    if file.name == STANDARD_INPUT:
        return 'sys.stdin.buffer'
    opener = {'': 'open', 'gz': 'gzip.open', 'zst': 'zstandard.open'}[file.compression]
    if as_text:
        return f"{opener}(sys.argv[1],'rt',encoding='utf-8-sig',newline='')"
    return f"{opener}(sys.argv[1],'rb')"
