"""Looks up the fields of a row, a dict; 'a.b' is the field b of the dict in the field a."""

WHICH_FIELD = (
    "--field=NAME says which one is the text, --field=ASKED,ANSWERED which are a conversation"
)


def value(row, field):
    """The value of a field of a row. Raises ValueError if it is missing.

    'a.b' is row['a']['b'], unless the row has the key 'a.b'.
    """
    keys = field.split('.')
    if field in row:
        keys = [field]
    found = row
    for key in keys:
        if not isinstance(found, dict) or key not in found:
            names = ', '.join(map(str, row)) or 'none'
            raise ValueError(f"there is no field {field!r}, only {names}: {WHICH_FIELD}")
        found = found[key]
    return found


def value_or_none(row, field):
    """The value of a field of a row, or None if it is missing."""
    try:
        return value(row, field)
    except ValueError:
        return None


def missing(row, fields):
    """Those of these fields that a row does not have."""
    absent = []
    for field in fields:
        try:
            value(row, field)
        except ValueError:
            absent.append(field)
    return absent
