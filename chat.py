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
        if not self.description[USER][1].strip() and not self.description[ASSISTANT][0].strip():
            raise ValueError('nothing stands between the template\'s "user" and its "assistant": a model could not tell '
                             "where to answer")
        end, others = self.description[ASSISTANT][1], [text.rstrip() for pair in self.description.values() for text in pair]
        self.stops = [text for text in dict.fromkeys([end.rstrip() or end, end.strip(), *others]) if text]

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


class Dialogue:
    """What a user and the assistant have said, as ids of at most `room`; where it is more, the oldest turns are left out,
    so many: `left_out`. `stops` and `end`, the id of the end of text or None, are where an answer ends.

    In front stands the end of text, as it does between documents that are learned from.
    """

    def __init__(self, template, tokenizer, room):
        self.template, self.tokenizer, self.room = template, tokenizer, room
        self.stops, self.end = template.stops, tokenizer.eot
        if not tokenizer.lossless:      # it writes them in its own way
            self.stops = [tokenizer.decode(tokenizer.encode(stop)) for stop in self.stops]
        self.said, self.asked, self.left_out = [], None, 0

    def ask(self, text):
        """The ids from which a model goes on to answer what the user says now. Raises ValueError."""
        if not text.strip():
            raise ValueError("an empty turn: type, or give by --start, what the user says")
        self.asked = {'role': USER, 'content': text}
        while True:
            parts = self.template.prompt([*self.said[self.left_out:], self.asked])
            ids = [self.end] * (self.end is not None) + encode(self.tokenizer, parts)[0]
            if len(ids) <= self.room or self.left_out == len(self.said):
                return ids
            self.left_out += 2      # a question and its answer

    def answer(self, text):
        """What the assistant said to the last question."""
        self.said += [self.asked, {'role': ASSISTANT, 'content': text}]


def encode(tokenizer, parts):
    """(ids, learned) of [(text, is_learned)]: each part on its own, so that an answer's prompt has the same ids when it is
    learned and when it is sampled. Only in a Marker do the names of special tokens become these tokens."""
    ids, learned = [], []
    for text, is_learned in parts:
        new = (tokenizer.encode if isinstance(text, Marker) else tokenizer.encode_ordinary)(text)
        ids += map(int, new)
        learned += [is_learned] * len(new)
    return ids, learned
