"""Decides by the first rows how all rows are read: as plain texts, or as conversations."""

import json

from text.sources.conversations import Conversations, is_message, recognized_fields
from text.sources.fields import missing, value, value_or_none


class PlainTexts:
    """Reads rows that hold a text in one field."""

    unit = 'row'

    def __init__(self, field):
        self.fields = [field]
        self.required = [field]
        self.optional = []
        self.facts = {}  # for meta.json

    def parts(self, row):
        """(the text of a row, []). Raises ValueError if the row has none."""
        if not isinstance(row, dict):
            raise ValueError(f"not a row but {str(row)[:40]}: a row is {{…}}")
        field = self.fields[0]
        text = value(row, field)
        if text is None:  # large datasets have a few of these
            return '', []
        if not isinstance(text, str):
            raise ValueError(f"its {field!r} is not text but {json.dumps(text, default=str)[:40]}")
        return text, []


def reader(row, field=None, template=None):
    """The PlainTexts or Conversations that reads rows like this one.

    field: comma-separated names, used as the `fields` of Conversations; None: those of
    conversations.FORMS, or 'text'. template: a chat template; None: chat.DEFAULT. Raises ValueError
    if a field is missing.
    """
    if field is not None:
        names = field.split(',')
        if len(names) == 1 and not isinstance(row, list) and not _holds_messages(row, field):
            return PlainTexts(field)
        # Rows may lack the fields between the first and the last, but one of the first rows has to
        # have them: otherwise a misspelled name would silently be missing everywhere.
        if row and isinstance(row, dict):
            absent = missing(row, names[1:-1])
            if absent:
                raise ValueError(
                    f"the first rows have no field {absent[0]!r}, only {', '.join(row)}: "
                    f'if the name is right, add "{absent[0]}": null to the first one'
                )
        return Conversations(names, template)

    if isinstance(row, list):
        return Conversations(['messages'], template)
    names = recognized_fields(row)
    if names is None:
        return PlainTexts('text')
    if 'text' in row:
        if row[names[-1]] is None:
            print(
                "the rows have 'text', which is prepared; to prepare their conversations, use "
                f"--field={','.join(names)}",
                flush=True,
            )
            return PlainTexts('text')
        print(
            f"the conversation in {','.join(names)} is prepared, and not the 'text' beside it; to "
            "prepare the text, use --field=text",
            flush=True,
        )
    return Conversations(names, template)


def shows_how_to_read(row, field=None):
    """Whether this row shows how its file is to be read: it has 'text', a known conversation, or
    the given fields."""
    if isinstance(row, list):
        return any(map(is_message, row))
    if field is None:
        return 'text' in row or recognized_fields(row) is not None
    names = field.split(',')
    if len(names) == 1:
        return value_or_none(row, field) is not None
    return not missing(row, names)


def _holds_messages(row, field):
    return isinstance(value_or_none(row, field), list)
