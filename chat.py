"""Conversations as text: how their turns are written, and which parts of them a model learns.

A template is a plain dict {role: [before, after]}, which meta.json and checkpoints keep: a turn is `before`, what was said,
`after`. Learned are what the assistant says and its `after`, the sign that it has done; all else is only read. Give that
`after` words that no answer has: sample.py ends an answer there, or at the tokenizer's end of text, or where another turn
begins. What was said may not contain the template's own marks, or it could pass for a turn.
"""
ASSISTANT, USER = 'assistant', 'user'
DEFAULT = {'system': ['### System:\n', '\n\n'], USER: ['### User:\n', '\n\n'],     # plain text, which any tokenizer can say
           ASSISTANT: ['### Assistant:\n', '\n### End\n\n']}


class Marker(str):
    """A `before` or an `after`: unlike what was said, it may stand for special tokens, such as <|im_start|>."""


class Template:
    """A template in use. `description` is its dict; `stops` the texts that end an answer. Raises ValueError."""

    def __init__(self, description=None):
        self.description = DEFAULT if description is None else description
        if not (isinstance(self.description, dict) and {USER, ASSISTANT} <= self.description.keys()
                and all(isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
                        for pair in self.description.values())):
            raise ValueError('a chat template is {"user": [before, after], "assistant": [before, after]}, all of it text, '
                             f"perhaps with more roles: not {str(self.description)[:80]}")
        self.description = {role: list(pair) for role, pair in self.description.items()}
        marks = [text.strip() for pair in self.description.values() for text in pair]
        self.marks = [mark for mark in dict.fromkeys(marks) if mark]
        if not self.description[ASSISTANT][0].strip():
            raise ValueError('the template\'s "assistant" begins with nothing: a model could not tell where to answer')
        end, begins = self.description[ASSISTANT][1], [before.rstrip() for before, _ in self.description.values()]
        self.stops = [text for text in dict.fromkeys([end.rstrip() or end, *begins]) if text]

    def parts(self, row, fields=()):
        """[(text, is_learned)] of a row: its "messages", [{"role", "content"}], or the values of its two `fields`, what the
        user asks and the assistant answers. Raises ValueError for one that is no conversation."""
        row = row if isinstance(row, dict) else {}
        for field in fields:
            if field not in row:
                raise ValueError(f"the row has no {field!r}, only {', '.join(map(repr, row)) or 'other things'}")
        asked = [{'role': role, 'content': row[field]} for role, field in zip((USER, ASSISTANT), fields)]
        parts = self._turns(asked or row.get('messages'))
        if not any(learned for _, learned in parts):
            raise ValueError("the conversation has no turn of the assistant, so there is nothing to learn from it")
        return parts

    def prompt(self, messages):
        """The parts that a model continues with the assistant's next turn: the messages so far, and its `before`."""
        return [*self._turns(messages), (Marker(self.description[ASSISTANT][0]), False)]

    def _turns(self, messages):
        if not isinstance(messages, list) or not messages:
            raise ValueError('the row has no "messages", a list of {"role", "content"}')
        parts = []
        for i, message in enumerate(messages, 1):
            for key in ('role', 'content'):
                if not isinstance(message, dict) or key not in message:
                    raise ValueError(f"message {i} has no {key!r}")
            role, content = message['role'], message['content']
            if not isinstance(role, str) or role not in self.description:
                raise ValueError(f"message {i} has the role {role!r}; the template has {', '.join(self.description)}")
            if not isinstance(content, str):
                raise ValueError(f"message {i}, the {role}'s, is no text but {type(content).__name__}")
            for mark in [*self.marks, *self.stops[:role == ASSISTANT]]:     # or a user could speak as the assistant
                if mark in content:
                    raise ValueError(f"message {i}, the {role}'s, contains {mark!r}, which marks turns in the template: "
                                     "change the message, or take a template with other marks")
            (before, after), learned = self.description[role], role == ASSISTANT
            parts += [(Marker(before), False), (content, learned), (Marker(after), learned)]
        return [part for part in parts if part[0]]


def encode(tokenizer, parts):
    """(ids, learned) of [(text, is_learned)]: each part on its own, so that an answer's prompt has the same ids when it is
    learned and when it is sampled. Only in a Marker do the names of special tokens become these tokens."""
    ids, learned = [], []
    for text, is_learned in parts:
        new = list((tokenizer.encode if isinstance(text, Marker) else tokenizer.encode_ordinary)(text))
        ids += new
        learned += [is_learned] * len(new)
    return ids, learned
