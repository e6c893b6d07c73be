"""--help: every setting of a script and of the chosen model, with its default and its comment in
the source."""

import inspect
import re
from pathlib import Path


def print_help(settings, defaults, Config):
    """Every setting with its default and the comment behind it in the source."""
    source = ''.join(inspect.getsource(c) for c in (Config.__mro__[:-1] if Config else ()))
    source += Path(settings['__file__']).read_text(encoding='utf-8')
    comments = dict(re.findall(r'^ *(\w+)(?:: [^=\n]+)? = .*?  # (.*)$', source, re.MULTILINE))
    print(f"{settings.get('__doc__') or ''}\nSettings, as --key=value:")
    for key, value in defaults.items():
        print(f"  --{f'{key}={value!r}':38} {comments.get(key, '')}")
