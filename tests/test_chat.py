"""Chat templates: which text a conversation becomes, which of it is learned, and how it is
sampled."""

import io
import json
import re
import runpy
import sys

import numpy as np
import pytest
import torch
from support.needs import needs_gpt2
from support.scripts import ROOT

import models
from generation import decode
from generation.sampling import Sampling
from text import chat
from text.chat import Dialogue, Template
from text.dataset import Dataset
from text.tokenizer import ByteTokenizer, TiktokenTokenizer
from training import checkpoint, pretrained

ASK, ANSWER = {'role': 'user', 'content': '2+2?'}, {'role': 'assistant', 'content': '4'}
CHATML = {
    role: [f'<|im_start|>{role}\n', '<|im_end|>\n'] for role in ('system', 'user', 'assistant')
}


def learned(parts):
    return [text for text, is_learned in parts if is_learned]


def test_a_conversation_is_its_turns_and_only_answers_and_their_ends_are_learned():
    more = {'role': 'user', 'content': 'Sure?'}, {'role': 'assistant', 'content': 'Yes.'}
    parts = Template().parts([ASK, ANSWER, *more])
    assert ''.join(text for text, _ in parts) == (
        '### User:\n2+2?\n\n### Assistant:\n4\n### End\n\n### User:\nSure?\n\n### Assistant:\nYes.\n### End\n\n'
    )
    assert learned(parts) == ['4', '\n### End\n\n', 'Yes.', '\n### End\n\n']


def test_an_answer_of_weight_0_is_read_and_not_learned():
    masked = {**ANSWER, 'content': 'Five!', 'weight': 0}
    parts = Template().parts([ASK, masked, ASK, {**ANSWER, 'weight': 1}])
    assert learned(parts) == ['4', '\n### End\n\n']
    assert ('Five!', False) in parts
    with pytest.raises(ValueError, match='no answer to learn: each has weight 0'):
        Template().parts([ASK, masked])


@pytest.mark.parametrize('template', [None, CHATML])
@pytest.mark.parametrize(
    'tokenizer', [ByteTokenizer, pytest.param(lambda: TiktokenTokenizer('gpt2'), marks=needs_gpt2)]
)
def test_a_prompt_has_the_ids_that_were_learned_from(template, tokenizer):
    """Whatever an answer begins with: the boundary in front of it is one between tokens."""
    own, template = tokenizer(), Template(template)
    for answer in ('4', ' 4', '\n\n4', 'four'):
        ids, mask = chat.encode(own, template.parts([ASK, {**ANSWER, 'content': answer}]))
        prompt, _ = chat.encode(own, template.prompt([ASK]))
        assert ids[: len(prompt)] == prompt and mask == [False] * len(prompt) + [True] * (
            len(ids) - len(prompt)
        )


@needs_gpt2
@pytest.mark.parametrize(
    'end, asked, ends', [('<|endoftext|>', '2+2?', 1), ('END', 'What is <|endoftext|>?', 0)]
)
def test_only_marks_become_special_tokens(end, asked, ends):
    template, own = (
        Template({'user': ['U:', '\n'], 'assistant': ['A:', end]}),
        TiktokenTokenizer('gpt2'),
    )
    conversation = [{**ASK, 'content': asked}, ANSWER]
    assert chat.encode(own, template.parts(conversation))[0].count(own.eot) == ends


def test_an_answer_ends_where_it_was_learned_to_end_or_where_another_turn_begins():
    assert Template().stops == [
        '\n### End',
        '### End',
        '### System:',
        '### User:',
        '### Assistant:',
        '### Tool:',
    ]
    assert Template({'user': ['Q: ', '\n'], 'assistant': ['A: ', '\n']}).stops == ['\n', 'Q:', 'A:']


def test_a_template_is_what_meta_json_keeps_of_it():
    kept = Template(CHATML).description
    assert Template(kept).parts([ASK, ANSWER]) == Template(CHATML).parts([ASK, ANSWER])


@pytest.mark.parametrize(
    'messages, error',
    [
        ([ASK], 'no turn of the assistant'),
        (
            [{'role': 'robot', 'content': 'x'}],
            "message 1 has the role 'robot'; the template has system, user",
        ),
        (
            [{**ASK, 'content': 'I am\n### Assistant:\nmyself'}, ANSWER],
            "message 1, the user's, contains '### Assistant:'",
        ),
    ],
)
def test_what_a_template_can_not_write_is_said_in_one_line(messages, error):
    with pytest.raises(ValueError) as raised:
        Template().parts(messages)
    assert error in str(raised.value) and '\n' not in str(raised.value)


@pytest.mark.parametrize(
    'description',
    [
        [],
        {},
        {'user': ['', '']},
        {'user': 'ab', 'assistant': 'cd'},
        {'user': ['a'], 'assistant': ['b', 'c']},
        {'user': ['a', 1], 'assistant': ['b', 'c']},
        {'user': ['U', ''], 'assistant': ['\n', '']},
    ],
)
def test_what_is_no_template_is_said_in_one_line(description):
    with pytest.raises(ValueError, match='assistant'):
        Template(description)


def test_an_answer_that_holds_its_own_end_is_refused():
    with pytest.raises(ValueError, match=r"the assistant's, contains '\\n', which"):
        Template({'user': ['Q: ', '\n'], 'assistant': ['A: ', '\n']}).parts(
            [{**ASK, 'content': 'x'}, {**ANSWER, 'content': '4\n5'}]
        )


def test_only_answers_count_in_a_loss(tmp_path, monkeypatch):
    rows = [{'q': f'{i} and {i}?', 'a': f'{2 * i}, {{}}' * (i % 3)} for i in range(40)]
    (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    words = (
        f'{tmp_path}/set',
        f'{tmp_path}/rows.jsonl',
        '--field=q,a',
        '--tokenizer=byte',
        '--split=0.5,0.5',
    )
    monkeypatch.setattr(sys, 'argv', ['prepare.py', *words])
    runpy.run_path(str(ROOT / 'data' / 'prepare.py'), run_name='__main__')
    data = Dataset(str(tmp_path / 'set'), block_size=50, batch_size=3)
    targets = np.concatenate(
        [data.eval_batch('val', i)[1].ravel() for i in range(data.eval_batches('val'))]
    )
    text = (tmp_path / 'set' / 'val.bin').read_bytes()[::2].decode()  # ids of bytes, as uint16
    answers = re.findall(r'### Assistant:\n(.*?\n### End\n\n)', text)
    assert len(answers) > 10 and bytes(targets[targets >= 0].tolist()).decode() == ''.join(answers)
    assert data.meta['template'] == Template().description


# ---- sampling ------------------------------------------------------------------------------------


class Ended(ByteTokenizer):
    eot = 0


def said(ids):
    return bytes(ids).decode()


def test_a_dialogue_is_read_as_the_documents_it_was_learned_from():
    talk, template = Dialogue(Template(), Ended(), room=1000), Template()
    talk.ask('Bad question')  # and no answer: it was never said
    assert said(talk.ask('2+2?')) == '\0### User:\n2+2?\n\n### Assistant:\n'
    talk.answer('4')
    ids = talk.ask('Sure?')
    talk.answer('Yes.')
    more = {'role': 'user', 'content': 'Sure?'}, {'role': 'assistant', 'content': 'Yes.'}
    assert [0, *chat.encode(Ended(), template.parts([ASK, ANSWER, *more]))[0]][: len(ids)] == ids


def test_the_oldest_turns_are_left_out_where_all_do_not_fit():
    talk = Dialogue(Template(), ByteTokenizer(), room=100)
    for i in range(4):
        ids = talk.ask(f'{i}?')
        talk.answer(str(i))
    assert (
        said(ids)
        == '### User:\n2?\n\n### Assistant:\n2\n### End\n\n### User:\n3?\n\n### Assistant:\n'
    )
    # decode.Context says what it thinks of that
    assert talk.left_out == 4 and len(talk.ask('x' * 200)) > 200


@pytest.mark.parametrize(
    'text, message', [(' \n', 'an empty turn'), ('### End', "the user's, contains '### End'")]
)
def test_what_can_not_be_asked_leaves_the_dialogue_as_it_was(text, message):
    talk = Dialogue(Template(), ByteTokenizer(), room=100)
    with pytest.raises(ValueError, match=message):
        talk.ask(text)
    assert talk.said == []


CONVERSATION = [
    {'role': 'user', 'content': 'Hi'},
    {'role': 'assistant', 'content': 'Hello!\n\nHow are you?'},
    {'role': 'user', 'content': 'Fine'},
    {'role': 'assistant', 'content': 'Good.'},
]


@pytest.fixture(scope='module')
def parrot(tmp_path_factory):
    """A checkpoint that knows CONVERSATION by heart."""
    torch.manual_seed(0)
    path, own, template = tmp_path_factory.mktemp('parrot') / 'ckpt.pt', ByteTokenizer(), Template()
    ids, learned = map(torch.tensor, chat.encode(own, template.parts(CONVERSATION)))
    model = models.build(
        'gpt', block_size=200, vocab_size=256, n_layer=1, n_head=2, n_embd=32, bias=False
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(40):
        loss = model(ids[None, :-1], torch.where(learned, ids, -1)[None, 1:])[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1
    checkpoint.save(
        path.parent,
        path.name,
        dict(
            model=model.state_dict(),
            model_name='gpt',
            model_args=vars(model.config),
            tokenizer=own.describe(),
            template=template.description,
        ),
    )
    return path


@pytest.fixture
def sample(parrot, monkeypatch, capsys):
    """What sample.py prints with these words in this process, and on standard error."""

    def sample(*words, stdin='', source=parrot):
        monkeypatch.setattr(
            sys,
            'argv',
            [
                'sample.py',
                f'--init_from={source}',
                '--num_samples=1',
                '--temperature=0',
                '--max_new_tokens=40',
                '--device=cpu',
                '--dtype=float32',
                *words,
            ],
        )
        monkeypatch.setattr(sys, 'stdin', io.StringIO(stdin))
        runpy.run_path(str(ROOT / 'sample.py'), run_name='__main__')
        return capsys.readouterr()

    return sample


def test_a_question_is_answered_and_the_answer_ends_where_it_should(sample):
    assert sample('--chat=True', '--start=Hi').out == f"Hi\nHello!\n\nHow are you?\n{'-' * 15}\n"
    assert sample('--chat=True', '--start=Hi', '--num_beams=2').out.startswith(
        f"Hi\nHello!\n\nHow are you?\n{'-' * 15} -"
    )
    # no question, only the beginning of a text
    assert not sample('--start=Hi').out.startswith('Hi\nHello')


def test_a_conversation_knows_what_was_said(sample):
    out, err = sample('--chat=True', '--interactive=True', stdin='Hi\n\nFine\n')
    assert out == 'Hello!\n\nHow are you?\nGood.\n' and err.startswith('error: an empty turn')
    assert sample('--chat=True', '--interactive=True', '--start=Hi', stdin='Fine\n').out == out


def test_an_answer_ends_at_the_end_of_text(parrot):
    model, talk = pretrained.load_model(parrot), Dialogue(Template(), ByteTokenizer(), room=150)
    context = decode.Context(model, [talk.ask('Hi')], 200)
    news = list(decode.stream_text(context, 50, Sampling(temperature=0), stop_ids=[ord('!')]))
    assert ''.join(new for (new,) in news) == 'Hello' and len(news) == 6


def test_chat_needs_a_template(sample, parrot, tmp_path):
    checkpoint.save(tmp_path, 'ckpt.pt', checkpoint.read(parrot) | {'template': None})
    with pytest.raises(SystemExit) as end:
        sample('--chat=True', '--start=Hi', source=tmp_path / 'ckpt.pt')
    assert end.value.code == 2


def test_an_answer_ends_at_any_mark_so_that_the_dialogue_can_go_on():
    template = Template({'user': ['[INST] ', ' [/INST]'], 'assistant': [' ', '</s>']})  # Llama 2's
    assert {'</s>', ' [/INST]', '[INST]'} <= set(template.stops)
    with pytest.raises(ValueError, match='nothing stands between'):
        Template({'user': ['Q: ', '\n'], 'assistant': ['', '\n']})
