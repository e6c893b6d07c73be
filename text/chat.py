"""Conversations as text: how a template writes their turns, and which parts a model learns.

A template is a plain dict {role: [before, after]}, which meta.json and checkpoints keep: a turn is
`before`, what was said, `after`. A model learns what the assistant says and the `after` that
follows, the sign that it has finished; it only reads the rest. Use an `after` for the assistant
that no answer contains: sample.py ends an answer there, at the tokenizer's end of text, or where
another turn begins. A message may not contain the template's marks, or it could pass for another
turn.
"""

ASSISTANT, USER = 'assistant', 'user'
DEFAULT = {  # plain text, which any tokenizer can write
    'system': ['### System:\n', '\n\n'],
    USER: ['### User:\n', '\n\n'],
    ASSISTANT: ['### Assistant:\n', '\n### End\n\n'],
    'tool': ['### Tool:\n', '\n\n'],
}


class Marker(str):
    """A `before` or an `after`: unlike what was said, it may stand for special tokens, such as
    <|im_start|>."""


class Template:
    """A template in use. `description` is its dict; `stops` are the texts that end an answer.
    Raises ValueError."""

    def __init__(self, description=None):
        description = DEFAULT if description is None else description
        if not _is_template(description):
            raise ValueError(
                'a chat template is {"user": [before, after], "assistant": [before, '
                'after]}, all of it text, perhaps with more roles: not '
                f"{str(description)[:80]}"
            )
        self.description = {role: list(pair) for role, pair in description.items()}
        texts = []
        for pair in self.description.values():
            texts += pair
        self.marks = _without_copies(text.strip() for text in texts)
        if not self.description[USER][1].strip() and not self.description[ASSISTANT][0].strip():
            raise ValueError(
                'nothing stands between the template\'s "user" and its "assistant": a '
                "model could not tell where to answer"
            )
        end = self.description[ASSISTANT][1]
        others = [text.rstrip() for text in texts]
        self.stops = _without_copies([end.rstrip() or end, end.strip(), *others])

    def parts(self, messages):
        """[(text, is_learned)] of a conversation: a list of {"role", "content"}, with "weight": 0
        where an answer is only read, and "where" if an error is to call a message by this instead
        of by its number. Raises ValueError for a conversation that the template can't write, or
        that has nothing to learn."""
        parts = self._turns(messages)
        if not any(message['role'] == ASSISTANT for message in messages):
            raise ValueError(
                "the conversation has no turn of the assistant, so there is nothing to "
                "learn from it"
            )
        if not any(is_learned for _, is_learned in parts):
            raise ValueError(
                "the conversation has no answer to learn: each has weight 0, or is "
                "part of the prompt"
            )
        return parts

    def prompt(self, messages):
        """The parts that a model continues with the assistant's next turn: the messages so far,
        and its `before`."""
        return [*self._turns(messages), (Marker(self.description[ASSISTANT][0]), False)]

    def _turns(self, messages):
        parts = []
        number = 0
        for message in messages:
            role, content = message['role'], message['content']
            if 'where' in message:
                whose = message['where']
            else:
                number += 1
                whose = f"message {number}, the {role}'s,"
            if role not in self.description:
                raise ValueError(
                    f"message {number} has the role {role!r}; the template has "
                    f"{', '.join(self.description)}: use a --template=FILE.json that "
                    f'has "{role}": ["before", "after"] too'
                )
            forbidden = self.marks
            if role == ASSISTANT:
                forbidden = [*self.marks, self.stops[0]]  # an answer would end there
            for mark in forbidden:  # or a user could speak as the assistant
                if mark in content:
                    raise ValueError(
                        f"{whose} contains {mark!r}, which marks turns in the "
                        "template: change the message, or use a --template with "
                        "other marks"
                    )
            before, after = self.description[role]
            is_learned = role == ASSISTANT and message.get('weight', 1) == 1
            parts += [(Marker(before), False), (content, is_learned), (Marker(after), is_learned)]
        return [part for part in parts if part[0]]


def _is_template(description):
    if not isinstance(description, dict) or not {USER, ASSISTANT} <= description.keys():
        return False
    for pair in description.values():
        is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) for text in pair):
            return False
    return True


def _without_copies(texts):
    """The texts that are not empty, each once, in their order."""
    return [text for text in dict.fromkeys(texts) if text]


class Dialogue:
    """What a user and the assistant have said, as at most `room` ids.

    left_out: how many of the oldest messages were dropped to stay below that. An answer ends at one
    of the texts `stops`, or at the id `end`, that of the end of text or None. The ids begin with
    the end of text, as after another document in training.
    """

    def __init__(self, template, tokenizer, room):
        self.template = template
        self.tokenizer = tokenizer
        self.room = room
        self.stops = template.stops
        self.end = tokenizer.eot
        if not tokenizer.lossless:  # it writes the stops in its own way
            self.stops = [tokenizer.decode(tokenizer.encode(stop)) for stop in self.stops]
        self.messages = []
        self.question = None
        self.left_out = 0

    def ask(self, text):
        """The ids that a model continues with the answer to what the user says now. Raises
        ValueError if that is empty, or if the template can't write it."""
        if not text.strip():
            raise ValueError("an empty turn: type, or give by --start, what the user says")
        self.question = {'role': USER, 'content': text}
        while True:
            parts = self.template.prompt([*self.messages[self.left_out :], self.question])
            ids, _ = encode(self.tokenizer, parts)
            if self.end is not None:
                ids = [self.end, *ids]
            if len(ids) <= self.room or self.left_out == len(self.messages):
                return ids
            self.left_out += 2  # a question and its answer

    def answer(self, text):
        """Add what the assistant said to the last question."""
        self.messages += [self.question, {'role': ASSISTANT, 'content': text}]


def encode(tokenizer, parts):
    """(ids, [whether each is learned]) of [(text, is_learned)].

    Each part is encoded on its own, so that a prompt has the same ids in training and in sampling.
    The names of special tokens become these tokens only in a Marker.
    """
    ids = []
    learned = []
    for text, is_learned in parts:
        encode_text = tokenizer.encode if isinstance(text, Marker) else tokenizer.encode_ordinary
        new = encode_text(text)
        ids += map(int, new)
        learned += [is_learned] * len(new)
    return ids, learned
