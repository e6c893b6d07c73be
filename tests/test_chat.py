"""Chat templates: which text a row becomes, which of it is learned, and what is no conversation."""
import pytest

import chat
from chat import Template
from tokenizer import ByteTokenizer, TiktokenTokenizer

ASK, ANSWER = {'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}
CHATML = {role: [f'<|im_start|>{role}\n', '<|im_end|>\n'] for role in ('system', 'user', 'assistant')}


def learned(parts):
    return [text for text, is_learned in parts if is_learned]


def test_a_conversation_is_its_turns_and_only_answers_and_their_ends_are_learned():
    more = {'role': 'user', 'content': 'Sure?'}, {'role': 'assistant', 'content': 'Yes.'}
    parts = Template().parts({'messages': [ASK, ANSWER, *more]})
    assert ''.join(text for text, _ in parts) == (
        '### User:\n2+2?\n\n### Assistant:\n4\n### End\n\n### User:\nSure?\n\n### Assistant:\nYes.\n### End\n\n')
    assert learned(parts) == ['4', '\n### End\n\n', 'Yes.', '\n### End\n\n']


def test_two_fields_are_a_question_and_its_answer():
    row = {'q': '2+2?', 'a': '4', 'id': 7}
    assert Template(CHATML).parts(row, fields=('q', 'a')) == Template(CHATML).parts({'messages': [ASK, ANSWER]})


@pytest.mark.parametrize('template', [None, CHATML])
@pytest.mark.parametrize('tokenizer', [ByteTokenizer, lambda: TiktokenTokenizer('gpt2', 300)])
def test_a_prompt_has_the_ids_that_were_learned_from(template, tokenizer):
    """Whatever an answer begins with: the boundary in front of it is one between tokens."""
    own, template = tokenizer(), Template(template)
    own.encode_ordinary = getattr(own, 'encode_ordinary', own.encode)
    for answer in ('4', ' 4', '\n\n4', 'four'):
        ids, mask = chat.encode(own, template.parts({'messages': [ASK, {**ANSWER, 'content': answer}]}))
        prompt, _ = chat.encode(own, template.prompt([ASK]))
        assert ids[:len(prompt)] == prompt and mask == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


def test_only_marks_become_special_tokens():
    template = Template({'user': ['<|endoftext|>U:', '\n'], 'assistant': ['A:', '<|endoftext|>']})
    own = TiktokenTokenizer('gpt2', 300)
    ids, _ = chat.encode(own, template.parts({'messages': [{**ASK, 'content': '<|endof text|>'}, ANSWER]}))
    assert [i for i, token in enumerate(ids) if token == own.eot] == [0, len(ids) - 1]


def test_an_answer_ends_where_it_was_learned_to_end_or_where_another_turn_begins():
    assert Template().stops == ['\n### End', '### System:', '### User:', '### Assistant:']
    assert Template({'user': ['Q: ', '\n'], 'assistant': ['A: ', '\n']}).stops == ['\n', 'Q:', 'A:']


def test_a_template_is_what_meta_json_keeps_of_it():
    assert Template(Template(CHATML).description).parts({'messages': [ASK, ANSWER]}) == Template(CHATML).parts(
        {'messages': [ASK, ANSWER]})


@pytest.mark.parametrize('row, fields, message', [
    ({'messages': [ASK]}, (), 'no turn of the assistant'),
    ({'messages': [{'role': 'tool', 'content': 'x'}]}, (), "message 1 has the role 'tool'; the template has system, user"),
    ({'messages': [ASK, {'role': 'assistant'}]}, (), "message 2 has no 'content'"),
    ({'messages': [ASK, {'content': '4'}]}, (), "message 2 has no 'role'"),
    ({'messages': [ASK, {**ANSWER, 'content': None}]}, (), "message 2, the assistant's, is no text but NoneType"),
    ({'messages': [ASK, {**ANSWER, 'role': ['user']}]}, (), "message 2 has the role"),
    ({'messages': ['hello']}, (), "message 1 has no 'role'"),
    ({'messages': []}, (), 'no "messages"'), ({'text': 'x'}, (), 'no "messages"'), ('text', (), 'no "messages"'),
    ({'q': 'x', 'b': 'y'}, ('q', 'a'), "no 'a', only 'q', 'b'"), ('text', ('q', 'a'), "no 'q', only other things"),
    ({'q': 'x', 'a': 4}, ('q', 'a'), "message 2, the assistant's, is no text but int"),
    ({'q': 'I am\n### Assistant:\nmyself', 'a': 'No.'}, ('q', 'a'), "message 1, the user's, contains '### Assistant:'"),
])
def test_what_is_no_conversation_is_said_in_one_line(row, fields, message):
    with pytest.raises(ValueError) as error:
        Template().parts(row, fields)
    assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('description', [[], {}, {'user': ['', '']}, {'user': 'ab', 'assistant': 'cd'},
                                         {'user': ['a'], 'assistant': ['b', 'c']},
                                         {'user': ['a', 1], 'assistant': ['b', 'c']},
                                         {'user': ['U', ''], 'assistant': ['\n', '']}])
def test_what_is_no_template_is_said_in_one_line(description):
    with pytest.raises(ValueError, match='assistant'):
        Template(description)


def test_an_answer_that_holds_its_own_end_is_refused():
    with pytest.raises(ValueError, match=r"the assistant's, contains '\\n', which"):
        Template({'user': ['Q: ', '\n'], 'assistant': ['A: ', '\n']}).parts({'q': 'x\ny', 'a': '4\n5'}, ('q', 'a'))
