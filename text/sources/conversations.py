"""Reads conversations in the forms that data sets use, as the messages that chat.Template writes.

A row holds a conversation in one field, in several, or is one itself:

    {"messages": [{"role": …, "content": …}, …]}              OpenAI's form
    {"conversations": [{"from": …, "value": …}, …]}           ShareGPT's
    {"prompt": …, "completion": …}                            texts, or lists of messages
    {"instruction": …, "input": …, "output": …}               Alpaca's; "input" may be empty
    [{"role": …, "content": …}, …]

A row's "system" or "system_prompt" becomes a turn in front, and Alpaca's "history", a list of
[question, answer], becomes earlier turns whose answers are read, not learned.

A mark that something is not to be learned is followed ("weight": 0), or is an error if its meaning
is unclear (UNCLEAR_KEYS): nothing that its author may have masked is learned.
"""

from text.chat import ASSISTANT, USER, Template
from text.sources.fields import value, value_or_none

SYSTEM = 'system'

# The fields by which a conversation is recognized, the first match first.
FORMS = (
    ['messages'],
    ['conversations'],
    ['conversation'],
    ['prompt', 'completion'],
    ['instruction', 'input', 'output'],
)

# Other names for the roles of the default template. A template that has one of these itself keeps
# it apart.
ROLES = {
    'human': USER,
    'prompter': USER,
    'gpt': ASSISTANT,
    'chatgpt': ASSISTANT,
    'bing': ASSISTANT,
    'bard': ASSISTANT,
    'ai': ASSISTANT,
    'bot': ASSISTANT,
    'model': ASSISTANT,
    'function_call': ASSISTANT,
    'developer': SYSTEM,
    'function': 'tool',
    'observation': 'tool',
    'ipython': 'tool',
}

SYSTEM_KEYS = 'system', 'system_prompt'  # of a row
ROLE_KEYS = 'role', 'from'
CONTENT_KEYS = 'content', 'value'
# Whether an answer is learned: in OpenAI's format, in Axolotl's (train, training), in ms-swift's.
WEIGHT_KEYS = 'weight', 'train', 'training', 'loss', 'loss_mask'
# Of a whole row: 0 skips it.
ROW_WEIGHT_KEYS = 'weight', 'loss_mask'
CALL_KEYS = 'tool_calls', 'function_call'

# Keys of an answer that say what is learned of it, but not clearly: a guess could train on what
# somebody has masked.
INSTEAD = 'write "weight": 0 (read, not learned) or "weight": 1 (learned) in its place'
TWO_MEANINGS = "whose 1 means learned in some projects and not learned in others"
A_PART = "which masks parts of the answer, while an answer is learned as a whole or not at all"
UNCLEAR_KEYS = {
    'mask': TWO_MEANINGS,
    'masked': TWO_MEANINGS,
    'train_detail': A_PART,
    'training_detail': A_PART,
}

# A message has few keys, and an unknown one may well change how it is to be read or learned
# ("mask", "reasoning_content"). So each one that is not used is reported, except for these, which
# only identify the message, its speaker or its origin, or measure it.
HARMLESS_KEYS = {
    'id',
    'uuid',
    'message_id',
    'parent',
    'parent_id',
    'tool_call_id',
    'index',
    'idx',
    'turn',
    'name',
    'model',
    'source',
    'url',
    'lang',
    'language',
    'time',
    'timestamp',
    'date',
    'created',
    'created_at',
    'create_time',
    'updated_at',
    'length',
    'tokens',
    'token_count',
    'num_tokens',
}
# A row has any number of columns about it (category, score, license), which nobody expects a model
# to learn. So only those are reported that are known to hold a part of the conversation.
ROW_KEYS = ('tools', 'functions', 'image', 'images', 'audio', 'audios', 'video', 'videos')
NOT_USED = "beside the conversation, which is not used"
EMPTY = None, '', [], {}, '[]'  # some datasets keep a list as JSON in a text


def is_message(item):
    """Whether an item of a list is a message: it says whose turn it is."""
    return isinstance(item, dict) and any(key in item for key in ROLE_KEYS)


def recognized_fields(row):
    """The first of FORMS that a row has, or None."""
    for fields in FORMS:
        first, last = fields[0], fields[-1]
        if first not in row or last not in row:
            continue
        if len(fields) > 1 or row[first] is None or isinstance(row[first], list):
            return fields
    return None


class Conversations:
    """Rows as conversations in a template.

    fields: one holds a list of messages. Of several the last is the answer and the others are the
    question, of which all but the first may be missing or empty. A row that is a list is itself
    the list of messages.
    """

    unit = 'conversation'

    def __init__(self, fields, template=None):
        self.fields = fields
        self.template = Template(template)
        self.facts = {'masked': True, 'template': self.template.description}  # for meta.json
        self.required = list(dict.fromkeys([fields[0], fields[-1]]))
        self.optional = [
            *fields[1:-1],
            *ROW_KEYS,
            *SYSTEM_KEYS,
            'history',
            *ROW_WEIGHT_KEYS,
            'mask',
        ]

    def parts(self, row):
        """(parts, unused) of a row. Raises ValueError if the row can't be used.

        parts: [(text, is_learned)], or None for a row with weight 0, which is skipped;
        unused: [str], a sentence for each thing that is ignored.
        """
        unused = []
        if isinstance(row, dict):
            self._check_mask(row)
            if self._weight(row, unused) == 0:
                return None, ["row(s) with weight 0, which are skipped"]
        if isinstance(row, list):
            if len(self.fields) > 1:
                raise ValueError(
                    "the row is a list, which has no fields "
                    f"{', '.join(self.fields)}: leave --field out"
                )
            messages = self._messages(row, unused)
        elif len(self.fields) == 1:
            messages = self._messages(value(row, self.fields[0]), unused)
        else:
            question = self._question(row, unused)
            messages = [*question, *self._answer(row, len(question), unused)]
        if isinstance(row, dict):
            messages = [*self._history(row, unused), *messages]
            messages = [*self._system(row, messages, unused), *messages]
            for key in ROW_KEYS:
                if self._beside(row, key) is not None:
                    unused.append(f"row(s) with {key!r} {NOT_USED}")
        return self.template.parts(messages), list(dict.fromkeys(unused))

    def _beside(self, row, key):
        """What a row has under a key beside the fields of the conversation, or None."""
        if key in self.fields or row.get(key) in EMPTY:
            return None
        return row[key]

    def _system(self, row, messages, unused):
        """[the turn to put in front of the messages for a row's system prompt], or []."""
        present = [message['content'].strip() for message in messages if message['role'] == SYSTEM]
        turns = []
        for key in SYSTEM_KEYS:
            text = self._beside(row, key)
            if text is None:
                continue
            if not isinstance(text, str):
                unused.append(f"row(s) with {key!r} {NOT_USED}: it is not text")
            elif not text.strip() or text.strip() in present:
                continue
            elif SYSTEM not in self.template.description:
                unused.append(f"row(s) with {key!r} {NOT_USED}: the template has no {SYSTEM!r}")
            elif present:
                unused.append(f"row(s) with {key!r} {NOT_USED}: there is another system message")
            else:
                turns.append(_turn(SYSTEM, text, f"its {key!r}"))
                present.append(text.strip())
        return turns

    def _history(self, row, unused):
        """The earlier turns of a question in Alpaca's form; the answers in them are only read."""
        history = self._beside(row, 'history')
        if history is None:
            return []
        is_text = len(self.fields) > 1 and isinstance(value(row, self.fields[0]), str)
        if not is_text or not _is_history(history):
            unused.append(f"row(s) with 'history' {NOT_USED}")
            return []
        unused.append("row(s) with 'history', whose answers are read, not learned")
        turns = []
        for number, (question, answer) in enumerate(history, 1):
            turns.append(_turn(USER, question, f"question {number} of its 'history'"))
            turns.append(_turn(ASSISTANT, answer, f"answer {number} of its 'history'"))
        return turns

    def _check_mask(self, row):
        """Raises ValueError if a row has a "mask", unless this is the role of the user, whose
        turns are not learned anyway (NeMo's format)."""
        mask = self._beside(row, 'mask')
        if mask is None:
            return
        if isinstance(mask, str) and self._role(mask, 'mask') == USER:
            return
        raise ValueError(
            f"the row has mask={repr(mask)[:40]}, and projects differ in what that "
            'means: write "weight": 0 (read, not learned) or "weight": 1 (learned) '
            "in each of the assistant's messages, or in the row, in its place"
        )

    def _weight(self, row, unused):
        """0 if a row is to be skipped, else 1. Appends to `unused`; raises ValueError."""
        for key in ROW_WEIGHT_KEYS:
            weight = self._beside(row, key)
            if weight is None or weight == 1:
                continue
            if weight == 0:
                return 0
            # An importance, or the share of the row's source in a mixture.
            if isinstance(weight, (int, float)) and weight > 0:
                unused.append(
                    f"row(s) whose {key!r} is neither 0 nor 1, which are learned as those with 1"
                )
                continue
            raise ValueError(
                f"the row has {key}={repr(weight)[:40]}: only 0 (the row is skipped) "
                "and 1 (its answers are learned) are supported"
            )
        return 1

    def _question(self, row, unused):
        """The messages of all fields but the last."""
        first, *middle = self.fields[:-1]
        asked = value(row, first)
        if isinstance(asked, list):
            if middle:
                raise ValueError(
                    f"its {first!r} is a list of messages, to which {middle[0]!r} "
                    f"can't be added: use --field={first},{self.fields[-1]}"
                )
            return [{**message, 'weight': 0} for message in self._messages(asked, unused)]
        texts = [_text(asked, first)]
        for name in middle:
            text = value_or_none(row, name)
            if text is not None and _text(text, name).strip():
                texts.append(text)
        return [{'role': USER, 'content': '\n\n'.join(texts)}]

    def _answer(self, row, n_before, unused):
        """The messages of the last field; n_before: how many messages the other fields gave."""
        name = self.fields[-1]
        answer = value(row, name)
        if isinstance(answer, list):
            return self._messages(answer, unused, n_before)
        return [{'role': ASSISTANT, 'content': _text(answer, name)}]

    def _messages(self, messages, unused, n_before=0):
        """[{"role", "content", "weight"}]; error messages count from n_before + 1.

        Appends to `unused`. Raises ValueError.
        """
        if not isinstance(messages, list) or not messages:
            raise ValueError('the row has no "messages", a list of {"role", "content"}')
        return [
            self._message(message, f"message {number}", unused)
            for number, message in enumerate(messages, n_before + 1)
        ]

    def _message(self, message, name, unused):
        """{"role", "content", "weight"} of one message, which errors call `name`."""
        if not isinstance(message, dict):
            raise ValueError(f"{name} has no 'role': it is {str(message)[:40]!r}")
        role_key = _key_of(message, ROLE_KEYS, name)
        role = self._role(message[role_key], name)
        whose = f"{name}, the {role}'s,"
        for key in CALL_KEYS:
            if message.get(key) not in EMPTY:
                raise ValueError(
                    f"{whose} has {key!r}, which a template can't write: move the "
                    "calls into its content as text, or use --skip_bad_rows to leave "
                    "such rows out"
                )
        content_key = _key_of(message, CONTENT_KEYS, name)
        content = _content(message[content_key], whose)
        weight = 0
        if role == ASSISTANT:
            for key, why in UNCLEAR_KEYS.items():
                if message.get(key) not in EMPTY:
                    raise ValueError(f"{whose} has {key!r}, {why}: {INSTEAD}")
            weight = _weight(message, whose)
        elif any(message.get(key) not in (None, 0) for key in WEIGHT_KEYS):
            unused.append(
                "row(s) with a weight on messages that are not the assistant's, which are only read"
            )
        used = {role_key, content_key, *WEIGHT_KEYS}
        for key, item in message.items():
            if key not in used and key not in HARMLESS_KEYS and item not in EMPTY:
                unused.append(f"row(s) with {key!r} in a message, which is not used")
        return {'role': role, 'content': content, 'weight': weight}

    def _role(self, role, name):
        """The template's name for a role."""
        if not isinstance(role, str):
            raise ValueError(f"{name} has the role {role!r}, which is not text")
        if role in self.template.description:
            return role
        role = role.strip().lower()
        if role in self.template.description:
            return role
        return ROLES.get(role, role)


def _turn(role, text, where):
    """A message that is only read. where: what an error calls it."""
    return {'role': role, 'content': text, 'weight': 0, 'where': where}


def _is_history(history):
    """Whether this is a list of [question, answer]."""
    if not isinstance(history, list):
        return False
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2:
            return False
        if not all(isinstance(text, str) for text in pair):
            return False
    return True


def _key_of(message, keys, name):
    """The first of these keys that has a value in the message, or else that is there at all."""
    there = [key for key in keys if key in message]
    if not there:
        others = ', '.join(map(str, message)) or 'nothing'
        raise ValueError(f"{name} has no {keys[0]!r}, only {others}")
    for key in there:
        if message[key] is not None:
            return key
    return there[0]


def _content(content, whose):
    """The text of a message, or of its parts."""
    if isinstance(content, str):
        return content
    if content is None:
        raise ValueError(f"{whose} has no text: its content is null")
    if not isinstance(content, list):
        raise ValueError(f"{whose} is not text but {type(content).__name__}")
    return ''.join(_part(part, whose) for part in content)


def _part(part, whose):
    """The text of {"type": "text", "text": …}."""
    if not isinstance(part, dict):
        raise ValueError(
            f'{whose} has a part that is not {{"type": "text", "text": …}} but {str(part)[:40]!r}'
        )
    kind, text = part.get('type', 'text'), part.get('text')
    if kind not in ('text', 'input_text', 'output_text') or not isinstance(text, str):
        raise ValueError(f"{whose} has a part of type {kind!r}: only text can be prepared")
    return text


def _weight(message, whose):
    """1 where an answer is learned, 0 where it is only read."""
    weight = 1
    for key in WEIGHT_KEYS:
        found = message.get(key)
        if found is None:
            continue
        if found not in (0, 1):
            raise ValueError(
                f"{whose} has {key}={found!r}: only 0 (read, not learned) and 1 "
                "(learned) are supported"
            )
        weight = min(weight, int(found))
    return weight


def _text(text, name):
    """The text of a field. Raises ValueError if it is something else."""
    if not isinstance(text, str):
        raise ValueError(f"its {name!r} is not text but {type(text).__name__}")
    return text
