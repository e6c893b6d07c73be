"""Conversations in the forms that people have: their turns, what is learned, reported, refused."""

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import preparing
from support.preparing import COMMAND, interrupt_at

from system.errors import one_line, user_errors
from text import chat, sources
from text.sources import conversion
from text.sources.conversations import Conversations
from text.sources.find import find
from text.sources.formats import JsonLines
from text.sources.rows import PlainTexts, reader
from text.tokenizer import ByteTokenizer

ASK, ANSWER = {'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}
END = '\n### End\n\n'


def read(row, field=None, template=None):
    """((role's mark, text, is it learned) of each turn, what is not used) of a row by itself."""
    parts, unused = reader(row, field, template).parts(row)
    marks = [text for text, _ in parts[0::3]]
    assert all(
        learned == end_learned for (_, learned), (_, end_learned) in zip(parts[1::3], parts[2::3])
    )
    return [(mark, *turn) for mark, turn in zip(marks, parts[1::3])], unused


def turns(row, field=None, template=None):
    found, unused = read(row, field, template)
    assert unused == []
    return found


def turn(role, text, is_learned=None):
    if is_learned is None:
        is_learned = role == 'assistant'
    return f'### {role.capitalize()}:\n', text, is_learned


SUM = [turn('user', '2+2?'), turn('assistant', '4')]


# ---- forms ---------------------------------------------------------------------------------------

SHAREGPT = [{'from': 'human', 'value': '2+2?'}, {'from': 'gpt', 'value': '4'}]


@pytest.mark.parametrize(
    'row, field',
    [
        ({'messages': [ASK, ANSWER]}, None),
        ({'conversations': SHAREGPT, 'id': 'identity_0'}, None),
        ({'conversations': SHAREGPT}, 'conversations'),
        ({'conversation': SHAREGPT}, None),
        ({'a': {'b': [ASK, ANSWER]}}, 'a.b'),
        ([ASK, ANSWER], None),
        ([ASK, ANSWER], 'messages'),
        (SHAREGPT, None),
        ({'prompt': '2+2?', 'completion': '4'}, None),
        ({'prompt': [ASK], 'completion': [ANSWER]}, None),
        ({'prompt': [ASK], 'completion': '4'}, 'prompt,completion'),
        ({'q': '2+2?', 'a': '4', 'id': 7}, 'q,a'),
        ({'instruction': '2+2?', 'input': '', 'output': '4'}, None),
        ({'instruction': '2+2?', 'input': None, 'output': '4'}, 'instruction,input,output'),
        ({'instruction': '2+2?', 'output': '4'}, None),
        ({'prompt': 'not this', 'completion': 'nor this', 'messages': [ASK, ANSWER]}, None),
        (
            {'messages': [{**ASK, 'from': None, 'value': None}, {**ANSWER, 'weight': None}]},
            None,
        ),  # as parquet fills columns
    ],
)
def test_every_form_is_the_same_conversation(row, field):
    assert turns(row, field) == SUM


def test_alpacas_input_follows_its_instruction_after_a_blank_line():
    row = {'instruction': 'Add.', 'input': '2 and 2', 'output': '4'}
    assert turns(row) == [turn('user', 'Add.\n\n2 and 2'), turn('assistant', '4')]
    row = {'system': 'Be brief.', 'q': 'Add.', 'hint': ' ', 'more': '2, 2', 'a': '4'}
    assert turns(row, 'system,q,hint,more,a') == [
        turn('user', 'Be brief.\n\nAdd.\n\n2, 2'),
        turn('assistant', '4'),
    ]


def test_a_field_that_later_rows_lack_is_empty_there():
    of_three = reader({'q': 'Add.', 'c': '2, 2', 'a': '4'}, 'q,c,a')
    parts, _ = of_three.parts({'q': '2+2?', 'a': '4'})
    assert ''.join(text for text, _ in parts) == f'### User:\n2+2?\n\n### Assistant:\n4{END}'
    with pytest.raises(
        ValueError, match='the first rows have no field \'cc\', only q, c, a: .* add "cc": null'
    ):
        reader({'q': 'Add.', 'c': '2, 2', 'a': '4'}, 'q,cc,a')


def test_of_a_prompt_and_its_completion_only_the_completion_is_learned():
    row = {
        'prompt': [
            {'role': 'system', 'content': 'Be brief.'},
            ASK,
            {**ANSWER, 'content': '5', 'weight': 1},
            ASK,
        ],
        'completion': [ANSWER, ASK, {**ANSWER, 'weight': 0}, ASK, ANSWER],
    }
    prompt, completion = turns(row)[:4], turns(row)[4:]
    assert [is_learned for *_, is_learned in prompt] == [False, False, False, False]
    assert [is_learned for *_, is_learned in completion] == [True, False, False, False, True]


@pytest.mark.parametrize(
    'role, name',
    [
        ('user', 'User'),
        ('human', 'User'),
        (' HUMAN', 'User'),
        ('gpt', 'Assistant'),
        ('Assistant', 'Assistant'),
        ('chatgpt', 'Assistant'),
        ('System', 'System'),
        ('developer', 'System'),
        ('tool', 'Tool'),
        ('function', 'Tool'),
        ('observation', 'Tool'),
        ('function_call', 'Assistant'),
    ],
)
def test_roles_go_by_many_names(role, name):
    first, *_ = turns([{'role': role, 'content': 'x'}, ANSWER])
    assert first == (f'### {name}:\n', 'x', name == 'Assistant')


def test_a_role_that_the_template_has_is_none_of_the_others():
    template = {'user': ['U ', '\n'], 'assistant': ['A ', '|\n'], 'Developer': ['D ', '\n']}
    found = turns([{'role': 'Developer', 'content': 'x'}, ASK, ANSWER], template=template)
    assert [mark for mark, *_ in found] == ['D ', 'U ', 'A ']
    with pytest.raises(
        ValueError,
        match="message 1 has the role 'tool'; the template has user, assistant, Developer: "
        'use a --template=FILE.json that has "tool": ',
    ):
        turns([{'role': 'function', 'content': 'x'}, ANSWER], template=template)


@pytest.mark.parametrize(
    'parts',
    [
        [{'type': 'text', 'text': '2+'}, {'type': 'text', 'text': '2?'}],
        [{'type': 'input_text', 'text': '2+2?'}],
        [{'text': '2+2?'}],
    ],
)
def test_text_in_parts_is_joined(parts):
    assert turns([{**ASK, 'content': parts}, ANSWER]) == SUM


@pytest.mark.parametrize('key', ['weight', 'train', 'training', 'loss', 'loss_mask'])
@pytest.mark.parametrize(
    'weight, is_learned',
    [(0, False), (False, False), (0.0, False), (1, True), (True, True), (None, True)],
)
def test_a_weight_says_whether_an_answer_is_learned(key, weight, is_learned):
    found = turns([ASK, {**ANSWER, key: weight}, ASK, ANSWER])
    assert [learned for *_, learned in found] == [False, is_learned, False, True]


@pytest.mark.parametrize(
    'template',
    [None, {'user': ['U', ''], 'assistant': ['A', '|'], 'system': ['S', ''], 'tool': ['T', '']}],
)
def test_a_prompt_has_the_ids_that_were_learned_from_with_every_role_and_weight(template):
    messages = [
        {'role': 'system', 'content': 'é'},
        ASK,
        {**ANSWER, 'weight': 0},
        {'role': 'tool', 'content': '4'},
        {'role': 'assistant', 'content': '\nfour'},
    ]
    in_template = Conversations(['messages'], template)
    ids, learned = chat.encode(ByteTokenizer(), in_template.parts(messages)[0])
    prompt, _ = chat.encode(ByteTokenizer(), in_template.template.prompt(messages[:-1]))
    assert ids[: len(prompt)] == prompt
    assert learned == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


@pytest.mark.parametrize('key', ['weight', 'loss_mask'])
def test_a_row_of_weight_0_is_left_out(key):
    row = {'messages': [ASK, ANSWER]}
    for weight in (1, True, 1.0, None, ''):
        assert turns({**row, key: weight}) == SUM
    for weight in (0, False, 0.0):
        parts, unused = reader(row).parts({**row, key: weight})
        assert parts is None and unused == ['row(s) with weight 0, which are skipped']


def test_another_weight_of_a_row_is_reported():
    """It is an importance, or the share of the row's source in a mixture."""
    found, unused = read({'messages': [ASK, ANSWER], 'weight': 2.5})
    assert found == SUM
    assert unused == ["row(s) whose 'weight' is neither 0 nor 1, which are learned as those with 1"]


def test_a_mask_of_the_user_says_what_is_so_anyway():
    row = {'mask': 'User', 'conversations': [{'from': 'User', 'value': '2+2?'}, SHAREGPT[1]]}
    assert turns(row) == SUM


def test_a_weight_that_is_a_field_of_the_conversation_is_only_that():
    assert turns({'weight': '2+2?', 'mask': '4'}, 'weight,mask') == SUM


# ---- what stands beside a conversation and belongs to it -----------------------------------------

BRIEF = [turn('system', 'Be brief.'), *SUM]


@pytest.mark.parametrize(
    'row',
    [
        {'conversations': SHAREGPT, 'system': 'Be brief.'},
        {'messages': [ASK, ANSWER], 'system_prompt': 'Be brief.'},
        {'instruction': '2+2?', 'output': '4', 'system': 'Be brief.'},
        {'prompt': [ASK], 'completion': [ANSWER], 'system': 'Be brief.'},
        {'messages': [ASK, ANSWER], 'system': 'Be brief.', 'system_prompt': 'Be brief.'},
        {
            'messages': [{'role': 'system', 'content': 'Be brief. '}, ASK, ANSWER],
            'system': 'Be brief.',
        },
    ],
)
def test_a_rows_system_prompt_is_a_turn_in_front(row):
    found = [(mark, text.strip(), is_learned) for mark, text, is_learned in turns(row)]
    assert found == BRIEF


def test_a_system_prompt_that_finds_no_place_is_reported():
    first = {'role': 'system', 'content': 'Be brief.'}
    found, unused = read({'messages': [first, ASK, ANSWER], 'system': 'Be verbose.'})
    assert found == BRIEF and unused[0].endswith('not used: there is another system message')
    template = {'user': ['U ', '\n'], 'assistant': ['A ', '|\n']}
    found, unused = read({'messages': [ASK, ANSWER], 'system': 'Be brief.'}, template=template)
    assert [mark for mark, *_ in found] == ['U ', 'A ']
    assert unused[0].endswith("not used: the template has no 'system'")


@pytest.mark.parametrize('form', [('instruction', 'output'), ('prompt', 'completion')])
def test_alpacas_history_is_earlier_turns_whose_answers_are_only_read(form):
    asked, answered = form
    row = {asked: '2+2?', answered: '4', 'system': 'Be brief.'}
    row['history'] = [['0+1?', '1'], ['1+1?', '2']]
    found, unused = read(row)
    assert found == [
        turn('system', 'Be brief.'),
        turn('user', '0+1?'),
        turn('assistant', '1', is_learned=False),
        turn('user', '1+1?'),
        turn('assistant', '2', is_learned=False),
        *SUM,
    ]
    assert unused == ["row(s) with 'history', whose answers are read, not learned"]


@pytest.mark.parametrize(
    'beside, where',
    [
        ({'system': 'x ### User: y'}, "its 'system' contains '### User:', which marks turns"),
        ({'history': [['a', 'b'], ['c', '### End']]}, "answer 2 of its 'history' contains"),
        ({'system': 'a', 'output': '### End'}, "message 2, the assistant's, contains '### End'"),
    ],
)
def test_a_mark_is_located_by_what_the_row_itself_has(beside, where):
    with pytest.raises(ValueError, match=where):
        read({'instruction': '2+2?', 'output': '4', **beside})


# ---- what is not used is reported ----------------------------------------------------------------


@pytest.mark.parametrize(
    'row, message',
    [
        (
            {'messages': [ASK, {**ANSWER, 'reasoning_content': 'Hm.'}]},
            "'reasoning_content' in a message, which is not used",
        ),
        ({'messages': [{**ASK, 'mask': 0}, ANSWER]}, "'mask' in a message"),
        ({'messages': [{**ASK, 'learn': False}, ANSWER]}, "'learn' in a message"),
        (
            {'messages': [{**ASK, 'weight': 1}, ANSWER]},
            "a weight on messages that are not the assistant's",
        ),
        (
            {'messages': [ASK, ANSWER], 'tools': [{'type': 'function'}]},
            "'tools' beside the conversation, which is not used",
        ),
        (
            {'messages': [ASK, ANSWER], 'system': ['Be brief.']},
            "'system' beside the conversation, which is not used: it is not text",
        ),
        (
            {'messages': [ASK, ANSWER], 'history': [['1+1?', '2']]},
            "'history' beside the conversation, which is not used",
        ),
        (
            {'instruction': '2+2?', 'output': '4', 'history': [['1+1?']]},
            "'history' beside the conversation, which is not used",
        ),
    ],
)
def test_what_changes_the_meaning_and_is_not_used_is_reported(row, message):
    found, unused = read(row)
    assert found == SUM and len(unused) == 1 and message in unused[0]


@pytest.mark.parametrize(
    'row',
    [
        {
            'messages': [
                {**ASK, 'name': 'ada', 'id': 1, 'weight': 0},
                {**ANSWER, 'tool_calls': [], 'refusal': None, 'mask': ''},
            ]
        },
        {'messages': [ASK, ANSWER], 'tools': None, 'category': 'sums', 'score': 3, 'system': ''},
        {'messages': [ASK, ANSWER], 'tools': '[]'},
    ],
)
def test_what_says_nothing_is_not_reported(row):
    assert turns(row) == SUM


@pytest.mark.parametrize(
    'row, fields',
    [
        ({'instruction': '2+2?', 'input': '', 'output': '4'}, 'instruction,input,output'),
        ({'prompt': '2+2?', 'completion': '4'}, 'prompt,completion'),
        ({'messages': [ASK, ANSWER]}, 'messages'),
    ],
)
def test_a_conversation_is_prepared_and_not_the_text_beside_it(capsys, row, fields):
    """As in the published Alpaca data, where 'text' is the same conversation in a template."""
    row = {**row, 'text': 'Below is an instruction. 2+2? 4'}
    assert turns(row) == SUM
    said = capsys.readouterr().out
    assert said == (
        f"the conversation in {fields} is prepared, and not the 'text' beside it; to prepare the "
        'text, use --field=text\n'
    )
    assert isinstance(reader(row, 'text'), PlainTexts)
    assert capsys.readouterr().out == ''


def test_text_is_prepared_where_the_first_row_has_no_conversation_beside_it(capsys):
    assert isinstance(reader({'text': 'a', 'messages': None}), PlainTexts)
    said = capsys.readouterr().out
    assert "'text', which is prepared" in said and '--field=messages\n' in said
    assert isinstance(reader({'text': 'a', 'conversation': 'thread-12'}), PlainTexts)
    assert capsys.readouterr().out == ''


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    'row, field, message',
    [
        ({'messages': [ASK, {'role': 'assistant'}]}, None, "message 2 has no 'content', only role"),
        ({'messages': [ASK, {'content': '4'}]}, None, "message 2 has no 'role', only content"),
        (
            {'messages': [ASK, {**ANSWER, 'content': None}]},
            None,
            "message 2, the assistant's, has no text: its content is null",
        ),
        (
            {'messages': [ASK, {**ANSWER, 'content': 4}]},
            None,
            "message 2, the assistant's, is not text but int",
        ),
        (
            {'messages': [ASK, {**ANSWER, 'role': ['user']}]},
            None,
            "message 2 has the role ['user'], which is not text",
        ),
        (
            {'messages': [ASK, {**ANSWER, 'weight': 0.5}]},
            None,
            "message 2, the assistant's, has weight=0.5: only 0 (read, not learned) and 1 "
            "(learned) are supported",
        ),
        ({'messages': [ASK, {**ANSWER, 'weight': '0'}]}, None, "has weight='0': only 0"),
        ({'messages': [ASK, {**ANSWER, 'loss_mask': [1, 0]}]}, None, 'has loss_mask=[1, 0]: only'),
        (
            {'messages': [ASK, {**ANSWER, 'mask': True}]},
            None,
            "message 2, the assistant's, has 'mask', whose 1 means learned in some projects and "
            'not learned in others: write "weight": 0 (read, not learned) or "weight": 1 (learned)',
        ),
        ({'messages': [ASK, {**ANSWER, 'masked': 0}]}, None, "has 'masked', whose 1 means"),
        (
            {'messages': [ASK, {**ANSWER, 'train_detail': [{'train': False}]}]},
            None,
            "has 'train_detail', which masks parts of the answer, while an answer is "
            'learned as a whole or not at all: write "weight": 0',
        ),
        (
            {'messages': [ASK, ANSWER], 'weight': '0'},
            None,
            "the row has weight='0': only 0 (the row is skipped) and 1 (its answers are learned)",
        ),
        ({'messages': [ASK, ANSWER], 'weight': -1}, None, 'the row has weight=-1: only 0'),
        ({'messages': [ASK, ANSWER], 'loss_mask': [0, 1]}, None, 'has loss_mask=[0, 1]: only 0'),
        (
            {'messages': [ASK, ANSWER], 'mask': 'Assistant'},
            None,
            "the row has mask='Assistant', and projects differ in what that means: write",
        ),
        ({'messages': [ASK, ANSWER], 'mask': [0, 1]}, None, 'the row has mask=[0, 1], and'),
        (
            {'messages': [ASK, {**ANSWER, 'content': None, 'tool_calls': [{'id': 'a'}]}]},
            None,
            "message 2, the assistant's, has 'tool_calls', which a template can't write: move the "
            "calls into its content as text, or use --skip_bad_rows",
        ),
        (
            {'messages': [ASK, {**ANSWER, 'function_call': {'name': 'f'}}]},
            None,
            "has 'function_call'",
        ),
        (
            {
                'messages': [
                    {
                        **ASK,
                        'content': [
                            {'type': 'text', 'text': 'a'},
                            {'type': 'image_url', 'image_url': 'u'},
                        ],
                    }
                ]
            },
            None,
            "message 1, the user's, has a part of type 'image_url': only text",
        ),
        (
            {'messages': [{**ASK, 'content': [{'type': 'image', 'text': 'a cat'}]}]},
            None,
            "has a part of type 'image'",
        ),
        (
            {'messages': [{**ASK, 'content': ['2+2?']}]},
            None,
            'has a part that is not {"type": "text", "text": …}',
        ),
        ({'messages': ['hello']}, None, "message 1 has no 'role': it is 'hello'"),
        ({'messages': []}, None, 'no "messages"'),
        ({'messages': None}, None, 'no "messages"'),
        ([], None, 'no "messages"'),
        ({'q': 'x', 'b': 'y'}, 'q,a', "no field 'a', only q, b: --field=NAME"),
        ([ASK, ANSWER], 'q,a', 'the row is a list, which has no fields q, a: leave --field out'),
        ({'q': 'x', 'a': 4}, 'q,a', "its 'a' is not text but int"),
        ({'q': None, 'a': '4'}, 'q,a', "its 'q' is not text but NoneType"),
        ({'prompt': [ASK, ANSWER], 'completion': [ASK]}, None, 'no answer to learn'),
        (
            {'prompt': [ASK], 'completion': [{'role': 'assistant'}]},
            None,
            "message 2 has no 'content'",
        ),
        (
            {'a': [ASK], 'b': 'x', 'c': '4'},
            'a,b,c',
            "its 'a' is a list of messages, to which 'b' can't be added: use --field=a,c",
        ),
    ],
)
def test_what_is_not_a_conversation_is_said_in_one_line(row, field, message):
    with pytest.raises(ValueError) as error:
        read(row, field)
    assert message in str(error.value) and '\n' not in str(error.value)


# ---- the command ---------------------------------------------------------------------------------


BY_BYTES = ['--tokenizer=byte', '--split=0.5,0.5']


def prepare(*words):
    preparing.prepare(*words, *BY_BYTES)


def failure(capsys, *words):
    return preparing.failure(capsys, *words, *BY_BYTES)


def write_lines(path, rows):
    """JSONL; a text is a line as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')
    return path


def write_parquet(path, rows):
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def texts(folder):
    """(all text, the learned text) of the prepared bins, each sorted by document."""
    everything, learned = [], []
    for split in ('train', 'val'):
        ids = np.fromfile(folder / f'{split}.bin', 'u2').astype('u1')
        mask = np.fromfile(folder / f'{split}.mask', 'u1').astype(bool)
        everything += bytes(ids).decode().split('### User:\n')[1:]
        learned += bytes(ids[mask]).decode().split(END)[:-1]
    return sorted(everything), sorted(learned)


ROWS = {
    'messages': lambda i: {
        'messages': [
            {'role': 'user', 'content': f'q{i}'},
            {'role': 'assistant', 'content': f'a{i}'},
        ]
    },
    'sharegpt': lambda i: {
        'conversations': [{'from': 'human', 'value': f'q{i}'}, {'from': 'gpt', 'value': f'a{i}'}]
    },
    'parts': lambda i: {
        'messages': [
            {'role': 'user', 'content': [{'type': 'text', 'text': f'q{i}'}]},
            {'role': 'assistant', 'content': [{'type': 'text', 'text': f'a{i}'}]},
        ]
    },
    'alpaca': lambda i: {'instruction': f'q{i}', 'input': ['', None][i % 2], 'output': f'a{i}'},
    'completion': lambda i: {
        'prompt': [{'role': 'user', 'content': f'q{i}'}],
        'completion': [{'role': 'assistant', 'content': f'a{i}'}],
    },
    'bare': lambda i: [
        {'role': 'user', 'content': f'q{i}'},
        {'role': 'assistant', 'content': f'a{i}'},
    ],
}
EXPECTED = (
    sorted(f'q{i}\n\n### Assistant:\na{i}{END}' for i in range(12)),
    sorted(f'a{i}' for i in range(12)),
)


@pytest.mark.parametrize('write, suffix', [(write_lines, 'jsonl'), (write_parquet, 'parquet')])
@pytest.mark.parametrize('form', ROWS)
def test_every_form_is_prepared_without_an_option(tmp_path, form, write, suffix):
    if form == 'bare' and suffix == 'parquet':
        pytest.skip("a row of parquet has columns")
    prepare(
        tmp_path / 'out', write(tmp_path / f'rows.{suffix}', [ROWS[form](i) for i in range(12)])
    )
    assert texts(tmp_path / 'out') == EXPECTED
    assert json.loads((tmp_path / 'out/meta.json').read_text())['template'] == chat.DEFAULT


@pytest.mark.parametrize('write, name', [(write_lines, 'a.jsonl'), (write_parquet, 'a.parquet')])
def test_reports_are_counted_and_printed_once(tmp_path, capsys, write, name):
    rows = [
        {**ROWS['messages'](i), 'tools': '[{"name": "f"}]' if i in (2, 5) else None}
        for i in range(12)
    ]
    rows[7]['messages'][1]['thinking'] = 'Hm.'
    prepare(tmp_path / 'out', write(tmp_path / name, rows))
    said = capsys.readouterr().out
    unit = 'line' if name == 'a.jsonl' else 'row'
    for report in (
        "2 row(s) with 'tools' beside the conversation, which is not used; the first is "
        f"{{}}, {unit} 3\n",
        f"1 row(s) with 'thinking' in a message, which is not used; the first is {{}}, {unit} 8\n",
    ):
        assert said.count(report.format(tmp_path / name)) == 1
    assert texts(tmp_path / 'out') == EXPECTED


@pytest.mark.parametrize('write, suffix', [(write_lines, 'jsonl'), (write_parquet, 'parquet')])
def test_system_and_history_are_prepared(tmp_path, capsys, write, suffix):
    rows = [{**ROWS['alpaca'](i), 'system': None, 'history': []} for i in range(12)]
    rows[5].update(system='Be brief.', history=[['h', 'r']])
    prepare(tmp_path / 'out', write(tmp_path / f'rows.{suffix}', rows))
    everything, learned = texts(tmp_path / 'out')
    assert 'h\n\n### Assistant:\nr\n### End\n\n' in everything and learned == EXPECTED[1]
    bins = [tmp_path / 'out' / f'{split}.bin' for split in ('train', 'val')]
    written = bytes(np.concatenate([np.fromfile(path, 'u2') for path in bins]).astype('u1'))
    assert b'### System:\nBe brief.\n\n### User:\nh' in written
    assert "1 row(s) with 'history', whose answers are read" in capsys.readouterr().out


@pytest.mark.parametrize('write, suffix', [(write_lines, 'jsonl'), (write_parquet, 'parquet')])
def test_what_its_author_masked_is_not_learned(tmp_path, capsys, write, suffix):
    rows = [{**ROWS['messages'](i), 'weight': 1} for i in range(14)]
    rows[12]['weight'] = 0
    rows[13]['messages'] = [
        *ROWS['messages'](0)['messages'],
        {'role': 'user', 'content': 'q13'},
        {'role': 'assistant', 'content': 'a13', 'loss_mask': 0},
    ]
    rows = write(tmp_path / f'rows.{suffix}', rows)
    prepare(tmp_path / 'out', rows)
    learned = texts(tmp_path / 'out')[1]
    assert learned == sorted([*EXPECTED[1], 'a0'])
    unit = 'line' if suffix == 'jsonl' else 'row'
    report = f'1 row(s) with weight 0, which are skipped; the first is {rows}, {unit} 13\n'
    assert report in capsys.readouterr().out


def test_where_all_rows_are_left_out_the_reason_is_printed(tmp_path, capsys):
    row = {**ROWS['messages'](0), 'weight': 0}
    rows = write_lines(tmp_path / 'rows.jsonl', [row, row])
    with pytest.raises(SystemExit):
        prepare(tmp_path / 'out', rows)
    said = capsys.readouterr()
    assert '2 row(s) with weight 0, which are skipped' in said.out
    assert 'every document is empty or skipped' in said.err


def pack(content, packed):
    if packed == '.gz':
        return gzip.compress(content)
    if packed == '.zst':
        return pytest.importorskip('zstandard').compress(content)
    return content


@pytest.mark.parametrize('packed', ['', '.gz', '.zst'])
@pytest.mark.parametrize(
    'form, indent', [('messages', None), ('messages', 1), ('bare', None), ('bare', 1)]
)
@pytest.mark.parametrize('name', ['some rows.json', 'rows.jsonl'])
def test_the_advice_about_an_array_leads_to_something_that_works(
    tmp_path, monkeypatch, capsys, form, indent, name, packed
):
    monkeypatch.chdir(tmp_path)
    name += packed
    content = json.dumps([ROWS[form](i) for i in range(12)], indent=indent).encode()
    (tmp_path / name).write_bytes(pack(content, packed))
    error = failure(capsys, tmp_path / 'out', name, '--field=messages')
    command = re.search('is one JSON array: `(.*)` writes its rows as lines', error)[1]
    if name.endswith(f'.json{packed}'):
        unread = failure(capsys, tmp_path / 'out', name)
        assert f'is not text but one JSON array: `{command}` writes its rows as lines' in unread
    prepare(tmp_path / 'out', follow(command))
    assert texts(tmp_path / 'out') == EXPECTED


def follow(command):
    """Run the command of an error message as it stands there; returns the file that it writes."""
    here = {**os.environ, 'PATH': f'{Path(sys.executable).parent}:{os.environ["PATH"]}'}
    subprocess.run(command, shell=True, check=True, env=here)
    return shlex.split(command)[-1]


@pytest.mark.parametrize('packed', ['', '.gz', '.zst'])
@pytest.mark.parametrize('options', [[], ['--field=messages']], ids=['', 'field'])
def test_one_conversation_alone_as_an_array_of_its_messages(
    tmp_path, monkeypatch, capsys, options, packed
):
    monkeypatch.chdir(tmp_path)
    content = json.dumps(ROWS['bare'](0), indent=1).encode('utf-8-sig')
    (tmp_path / f'a.json{packed}').write_bytes(pack(content, packed))
    error = failure(capsys, tmp_path / 'out', f'a.json{packed}', *options)
    lines = follow(re.search('`(.*)` writes its rows as lines', error)[1])
    assert lines == 'a.jsonl'
    assert [json.loads(line) for line in open(lines, encoding='utf-8')] == [ROWS['bare'](0)]
    assert find(lines)[0].kind == 'jsonl'


@pytest.mark.parametrize('options', [[], ['--field=messages']], ids=['', 'field'])
def test_an_object_that_holds_the_rows_is_told_from_lines(tmp_path, monkeypatch, capsys, options):
    monkeypatch.chdir(tmp_path)
    rows = {'KEY': [ROWS['messages'](i) for i in range(12)]}
    (tmp_path / 'a.json').write_text(json.dumps(rows, indent=1))
    error = failure(capsys, tmp_path / 'out', 'a.json', *options)
    prepare(tmp_path / 'out', follow(re.search('`(.*)` writes the list under a KEY', error)[1]))
    assert texts(tmp_path / 'out') == EXPECTED


def test_an_array_in_a_folder_is_left_out_for_its_own_reason(tmp_path, monkeypatch, capsys):
    """The other reason to leave a file out, that it is not UTF-8 text, is a line of its own."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'texts'
    folder.mkdir()
    write_lines(folder / 'a.jsonl', [ROWS['messages'](i) for i in range(12)])
    (folder / 'b.jsonl').write_text(json.dumps([ROWS['messages'](i) for i in range(12)]))
    (folder / 'c.jsonl').write_bytes(b'\xff\xfe\xff')
    prepare('./out', 'texts')
    said = capsys.readouterr().out
    left_out = 'texts: 1 of 3 files left out, which '
    assert f'{left_out}are not UTF-8 text; the first is texts/c.jsonl\n' in said
    reason = (
        f'{left_out}do not hold a row on each line; the first, texts/b.jsonl, is one JSON array: '
    )
    assert reason in said
    assert texts(tmp_path / 'out') == EXPECTED
    prepare('./out', follow(re.search('`(.*)` writes its rows as lines', said)[1]))
    assert texts(tmp_path / 'out') == EXPECTED


ROWS_OF_IT, ONE_ROW = 'for row in json.load(', 'for row in [json.load('


@pytest.mark.parametrize(
    'text, message',
    [
        ('[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]\n', ''),
        ('[{"content": "{}", "role": "user"}]\n[]\n', ''),
        ('[]\n[{"role": "user"}]\n', ''),
        (
            f'[{{"role": "user", "content": "{"x" * 99_999}"}}]\n',
            '',
        ),  # longer than what is judged by
        (f'[{{"value": "{"x" * 99_999}", "from": "human"}}]\n', ''),
        ('[{"text": "a"}]\n', ROWS_OF_IT),
        ('[\n  {"text": "a"},\n', ROWS_OF_IT),
        (f'[{{"text": "{"x" * 99_999}"}}]', ROWS_OF_IT),
        ('[[{"role": "user"}]]', ROWS_OF_IT),
        ('[\n  {\n    "role": "user",\n', ONE_ROW),
        ('[{"role": "user"},\n{"role"', ONE_ROW),
    ],
)
def test_lines_that_are_arrays_are_told_from_one_array(tmp_path, text, message):
    (tmp_path / 'a.jsonl').write_text(text)
    file = JsonLines('a.jsonl', tmp_path / 'a.jsonl', '', len(text), 0)
    not_text, wrong = file.judge()
    assert not not_text
    assert message in wrong and bool(message) == bool(wrong)


@pytest.mark.parametrize(
    'name, packed, end',
    [
        ('a.json', '', "json.load(open(sys.argv[1],'rb'))]\" a.json > a.jsonl"),
        ('a b.JSON', '', "]\" 'a b.JSON' > 'a b.jsonl'"),
        ('a.jsonl', '', ']" a.jsonl > a-rows.jsonl'),  # never onto itself
        ('a.json.gz', 'gz', "json.load(gzip.open(sys.argv[1],'rb'))]\" a.json.gz > a.jsonl"),
        ('a.ndjson.zst', 'zst', ']" a.ndjson.zst > a-rows.jsonl'),
        ('-a.json', '', ']" ./-a.json > ./-a.jsonl'),
        ('standard input', '', 'json.load(sys.stdin.buffer)]"'),
    ],
)
def test_the_command_that_makes_lines_of_an_array(name, packed, end):
    file = JsonLines(name, None, packed, 0, 0)
    assert conversion._command(file, f'for row in {conversion._parsed(file)}').endswith(end)


def test_the_advice_about_a_long_path_is_not_cut(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path.joinpath(*['a folder with a long name'] * 8)
    folder.mkdir(parents=True)
    (folder / 'a.json').write_text(json.dumps([ROWS['bare'](i) for i in range(12)]))
    error = failure(capsys, tmp_path / 'out', folder / 'a.json')
    prepare(tmp_path / 'out', follow(re.search('`(.*)` writes its rows as lines', error)[1]))
    assert texts(tmp_path / 'out') == EXPECTED


@pytest.mark.parametrize('begin, most', [('', 480), ('it`s ', 480), ('`a command` ', 2000)])
def test_a_message_is_one_line_of_bounded_length(begin, most):
    line = one_line(begin + 'x\n\x1b' * 9999)
    assert line.isprintable() and most - 50 < len(line) <= most


# ---- bad rows ------------------------------------------------------------------------------------

BAD = {
    2: '{"broken',
    4: {'messages': []},
    6: {'text': 'x'},
    7: '7',
    9: {'messages': [ASK]},
    11: [{'role': 'robot'}],
}


def with_bad_rows(path, n=12):
    return write_lines(path, [BAD.get(i, ROWS['messages'](i)) for i in range(n)])


def test_the_first_bad_row_is_one_line_with_file_and_line(tmp_path, capsys):
    rows = with_bad_rows(tmp_path / 'rows.jsonl')
    error = failure(capsys, tmp_path / 'out', rows)
    assert f'{rows}, line 3: not JSON' in error and error.endswith(
        '{"broken; --skip_bad_rows leaves such rows out\n'
    )
    assert not (tmp_path / 'out/meta.json').exists()


def test_bad_rows_are_skipped_and_told(tmp_path, capsys):
    rows = with_bad_rows(tmp_path / 'rows.jsonl')
    prepare(tmp_path / 'out', rows, '--skip_bad_rows')
    _, _, said = capsys.readouterr().out.partition(
        '6 row(s) skipped by --skip_bad_rows, of which the first are:\n'
    )
    lines = said.splitlines()
    assert [line.partition(':')[0].strip() for line in lines[:5]] == [
        f'{rows}, line {i + 1}' for i in (2, 4, 6, 7, 9)
    ]
    assert "no field 'messages', only text" in lines[2] and lines[5].startswith('now, for example')
    good = [i for i in range(12) if i not in BAD]
    assert texts(tmp_path / 'out')[1] == sorted(f'a{i}' for i in good)


def test_rows_of_text_and_of_parquet_and_of_bad_bytes_are_skipped_too(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / 'a.jsonl').write_bytes(
        b'\n'.join(
            b'{"text": "text %d\xff"}' % i if i == 9 else b'{"text": "text %d"}' % i
            for i in range(30)
        )
    )
    monkeypatch.setattr(
        conversion, 'SNIFF', 100
    )  # the bad byte lies beyond what a file is judged by
    assert 'a.jsonl, line 10: not UTF-8 at byte 16 of the line' in failure(
        capsys, tmp_path / 'out', tmp_path / 'a.jsonl'
    )
    prepare(tmp_path / 'out', tmp_path / 'a.jsonl', '--skip_bad_rows')
    assert (
        f"1 row(s) skipped by --skip_bad_rows:\n    {tmp_path / 'a.jsonl'}, line 10: not UTF"
        in capsys.readouterr().out
    )
    rows = [{'prompt': f'q{i}', 'completion': f'a{i}'} for i in range(20)]
    rows[3]['completion'] = None
    rows = write_parquet(tmp_path / 'b.parquet', rows)
    prepare(tmp_path / 'out', rows, '--skip_bad_rows')
    assert (
        f"1 row(s) skipped by --skip_bad_rows:\n    {rows}, row 4: its 'completion' is not text"
        in capsys.readouterr().out
    )


def reports(said):
    """What is reported of the rows."""
    return [line for line in said.splitlines() if 'row(s)' in line or line.startswith('    ')]


def test_the_count_is_right_after_a_stop_and_for_any_number_of_processes(
    tmp_path, small_pieces, monkeypatch, capsys
):
    rows = [BAD.get(i % 12, {**ROWS['messages'](i), 'tools': 'f'}) for i in range(240)]
    words = [write_lines(tmp_path / 'rows.jsonl', rows), '--skip_bad_rows']
    prepare(tmp_path / 'whole', *words, '--num_proc=1')
    told = reports(capsys.readouterr().out)
    assert (
        told[0].startswith("120 row(s) with 'tools'")
        and told[1].startswith('120 row(s) skipped')
        and len(told) == 7
    )
    calls = interrupt_at(monkeypatch, 7, 20)
    for _ in range(2):
        with pytest.raises(SystemExit):
            prepare(tmp_path / 'stopped', *words)
    prepare(tmp_path / 'stopped', *words)
    assert reports(capsys.readouterr().out) == told and len(calls) > 20
    monkeypatch.undo()
    prepare(tmp_path / 'by 2', *words, '--num_proc=2')
    assert reports(capsys.readouterr().out) == told
    for name in ('train.bin', 'train.mask', 'val.bin', 'val.mask'):
        assert (tmp_path / 'stopped' / name).read_bytes() == (
            tmp_path / 'whole' / name
        ).read_bytes()


@pytest.mark.parametrize('n_proc', [1, 2])
def test_files_to_validate_on_are_read_as_those_to_train_on(tmp_path, small_pieces, capsys, n_proc):
    """Also where another form, or text beside it, would lead: what is not of that form is a bad
    row, and skipped and counted as all are."""
    val = [ROWS['messages'](i) for i in range(12)]
    val[3] = '{"broken'
    write_lines(tmp_path / 'val.jsonl', [{'text': 'a'}, *val])
    rows = with_bad_rows(tmp_path / 'train.jsonl')
    words = [tmp_path / 'out', rows, '--tokenizer=byte', f"--val={tmp_path / 'val.jsonl'}"]
    with pytest.raises(SystemExit), user_errors():
        COMMAND['main']([*map(str, words)])
    assert 'val.jsonl, line 1: there is no field \'messages\', only text' in capsys.readouterr().err
    with user_errors():
        COMMAND['main']([*map(str, words), '--skip_bad_rows', f'--num_proc={n_proc}'])
    assert (
        "8 row(s) skipped by --skip_bad_rows, of which the first are:\n" in capsys.readouterr().out
    )
    splits = json.loads((tmp_path / 'out/meta.json').read_text())['splits']
    assert [splits[split]['documents'] for split in ('train', 'val')] == [6, 11]
    assert 0 < splits['val']['learned'] < splits['val']['tokens']


def test_where_all_rows_to_validate_on_are_bad_the_reasons_are_printed(tmp_path, capsys):
    rows = write_lines(tmp_path / 'rows.jsonl', [ROWS['messages'](i) for i in range(12)])
    val = write_lines(tmp_path / 'val.jsonl', [{'text': 'x'}])
    words = [tmp_path / 'out', rows, f'--val={val}', '--skip_bad_rows', '--tokenizer=byte']
    with pytest.raises(SystemExit), user_errors():
        COMMAND['main']([*map(str, words)])
    said = capsys.readouterr()
    assert 'the files for val hold 0 token(s) of text' in said.err
    assert f"1 row(s) skipped by --skip_bad_rows:\n    {val}, line 1: there is no" in said.out


def test_skipping_is_another_command(tmp_path):
    rows = write_lines(tmp_path / 'rows.jsonl', [ROWS['messages'](i) for i in range(12)])
    one, other = (sources.open([rows], skip_bad_rows=skip) for skip in (False, True))
    assert one.fingerprint != other.fingerprint


def test_a_first_row_that_can_not_be_used_does_not_decide_how_the_others_are_read(tmp_path, capsys):
    for first in ('{"broken', {'error': 'timeout'}, '[]', '[1, 2]', {'conversations': None}):
        good = [ROWS['sharegpt'](i) for i in range(12)]
        rows = write_lines(tmp_path / 'rows.jsonl', [first, *good])
        for options in ([], ['--field=conversations']):
            prepare(tmp_path / 'out', rows, '--skip_bad_rows', *options)
            assert '1 row(s) skipped by --skip_bad_rows:\n' in capsys.readouterr().out
            assert texts(tmp_path / 'out') == EXPECTED
            error = failure(capsys, tmp_path / 'out', rows, *options)
            assert f'{rows}, line 1: ' in error


def test_a_field_that_only_later_rows_have_is_read(tmp_path):
    rows = [{'q': f'q{i}', 'a': f'a{i}'} for i in range(12)]
    rows[5]['hint'] = ''
    rows = write_lines(tmp_path / 'rows.jsonl', rows)
    prepare(tmp_path / 'out', rows, '--field=q,hint,a')
    assert texts(tmp_path / 'out') == EXPECTED


def test_where_no_row_can_be_used_the_first_reason_is_told(tmp_path, capsys):
    rows = write_lines(tmp_path / 'rows.jsonl', [{'body': 'x'}] * 3)
    error = failure(capsys, tmp_path / 'out', rows, '--skip_bad_rows')
    assert (
        f"none of the 3 row(s) can be used: {rows}, line 1: there is no field 'text', only body"
        in error
    )


def test_a_vocabulary_is_made_without_the_bad_rows(tmp_path):
    rows = with_bad_rows(tmp_path / 'rows.jsonl')
    with user_errors():
        COMMAND['main'](
            [
                str(tmp_path / 'out'),
                str(rows),
                '--tokenizer=char',
                '--skip_bad_rows',
                '--split=0.5,0.5',
            ]
        )
    chars = json.loads((tmp_path / 'out/meta.json').read_text())['tokenizer']['chars']
    good = [
        f'### User:{text}' for text in EXPECTED[0] if int(text[1 : text.index('\n')]) not in BAD
    ]
    assert set(chars) == set(''.join(good))


@pytest.mark.parametrize(
    'words, message',
    [
        (['a.txt', '--skip_bad_rows'], 'skip_bad_rows is for rows'),
        (['a.jsonl', '--field=a,,b'], "field='a,,b' must be a name, or names with commas between"),
        (
            ['a.jsonl', '--template=t.json', '--field=x'],
            'a template is for conversations, and there are none',
        ),
        (
            ['a.jsonl'],
            "there is no field 'text', only x, y: --field=NAME says which one is the text, "
            "--field=ASKED,ANSWERED which are a conversation",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.txt').write_text('word\n' * 99)
    (tmp_path / 't.json').write_text(json.dumps(chat.DEFAULT))
    write_lines(
        tmp_path / 'a.jsonl', [{'x': f'question {i}', 'y': f'answer {i}'} for i in range(20)]
    )
    assert message in failure(capsys, tmp_path / 'out', *words)
    prepare(tmp_path / 'out', 'a.jsonl', '--field=x,y')  # what the last one advises


def test_too_few_conversations_for_a_split_is_said_in_their_words(tmp_path, capsys):
    rows = write_lines(tmp_path / 'rows.jsonl', [ROWS['messages'](0)])
    assert 'add conversations, or use another --split' in failure(capsys, tmp_path / 'out', rows)
