"""Generation: the cache against the whole context, the filters against their definitions, texts as
they come."""

import dataclasses
from pathlib import Path

import pytest
import torch
from support.scripts import ROOT

import models
from generation import decode, sampling
from generation.decode import Context, TextStream, stream
from generation.sampling import Sampling
from text.tokenizer import ByteTokenizer, CharTokenizer

NAMES = ['gpt', *sorted(path.stem for path in Path(ROOT, 'models').glob('[a-z]*.py'))]
FIELDS = {'modern': dict(ngram=3, ngram_rows=50), 'transformerpp': dict(attention_kind='mla')}
# and for all that have them:
SIZES = dict(n_layer=2, n_head=2, n_embd=32)


def build(name, block_size=32, dtype=torch.float64, **fields):
    """A small model with weights large enough that every token counts."""
    torch.manual_seed(0)
    sizes = {
        field.name: SIZES[field.name]
        for field in dataclasses.fields(models.architecture(name).Config)
        if field.name in SIZES
    }
    model = models.build(
        name, block_size=block_size, vocab_size=50, **sizes | FIELDS.get(name, {}) | fields
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    if model.fit:
        model.fit([torch.randint(50, (2, 40, 12))])
    return model.to(dtype).eval()


@pytest.fixture(params=NAMES)
def model(request):
    """A model that generates from a cache."""
    model = build(request.param)
    if 'cache' in model.exemptions:
        pytest.skip(model.exemptions['cache'])
    return model


def draws(logits, n=20_000, rows=((),), **settings):
    """How often each token of logits (V,) is drawn, over n evenly spread chances."""
    chances = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    ids = Sampling(**settings)(logits.expand(n, -1), list(rows) * n, chances)
    return torch.bincount(ids, minlength=len(logits)) / n


def uncached(model, ids, n):
    """n greedy tokens after ids, the whole context read for each."""
    for _ in range(n):
        ids = [
            *ids,
            model(torch.tensor([ids[-model.config.block_size :]]))[0][0, -1].argmax().item(),
        ]
    return ids


# ---- the cache -----------------------------------------------------------------------------------


def test_cached_logits_equal_uncached_ones(model):
    idx = torch.randint(50, (3, 20), generator=torch.Generator().manual_seed(1))
    expected = model(idx, idx)[0]
    cache, at = model.init_cache(3, 20, dtype=torch.float64), 0
    for T in (5, 1, 1, 4, 1, 8):  # a prompt, tokens, and several tokens at once
        logits, _ = model(idx[:, at : at + T], cache=cache)
        at += T
        assert (logits[:, 0] - expected[:, at - 1]).abs().max() < 1e-9
    with pytest.raises(ValueError, match='1 tokens do not fit into a cache for 20 that holds 20'):
        model(idx[:, :1], cache=cache)


def test_prompts_of_different_lengths_share_a_batch(model):
    context = Context(model, [[1, 2, 3, 4, 5, 6, 7], [8, 9], [1, 2, 3, 4, 5, 6, 7], [10]], 30)
    for token in range(15):
        for row, logits in zip(context.rows, context.logits()):
            assert (logits - model(torch.tensor([row]))[0][0, -1]).abs().max() < 1e-9
        context.add(torch.arange(4)[:, None] * 7 + token)


def test_greedy_text_is_that_of_the_whole_context(model):
    assert model.generate(torch.tensor([[1, 2, 3]]), 29, temperature=0)[0].tolist() == uncached(
        model, [1, 2, 3], 29
    )


def test_a_full_cache_goes_on_from_its_last_three_quarters(model):
    context = Context(model, [[1, 2, 3]], 100)
    for _ in stream(context, 40, Sampling(temperature=0)):
        pass
    (row,) = context.rows
    at = 3 + 29 + 1  # what was drawn from a full cache of 32 is read together with the 23 before it
    assert row[at] == model(torch.tensor([row[at - 24 : at]]))[0][0, -1].argmax()
    assert row[at + 5] == model(torch.tensor([row[at - 24 : at + 5]]))[0][0, -1].argmax()
    assert context.slides == 2


def test_a_model_without_a_cache_generates_the_same(model):
    cached = list(stream(Context(model, [[1, 2], [3, 4]], 30), 20, Sampling(0.9, 10), [7, 8]))
    model.init_cache = lambda *args: None
    assert all(
        map(
            torch.equal,
            cached,
            stream(Context(model, [[1, 2], [3, 4]], 30), 20, Sampling(0.9, 10), [7, 8]),
        )
    )
    ragged = Context(model, [[1, 2, 3], [4]], 30)
    assert (ragged.logits()[1] - model(torch.tensor([[4]]))[0][0, -1]).abs().max() < 1e-9


def test_samples_of_one_prompt_share_its_reading(model):
    read, forward = [], model.forward
    model.forward = lambda idx, **rest: read.append(tuple(idx.shape)) or forward(idx, **rest)
    for _ in stream(Context(model, [[1, 2, 3, 4, 5]] * 6, 20), 4, Sampling()):
        pass
    assert read == [(1, 5), (6, 1), (6, 1), (6, 1)]


@pytest.mark.parametrize('name', NAMES)
def test_a_sample_does_not_change_with_its_batch(name):
    model, prompts, seeds = (
        build(name, dtype=torch.float32),
        [[1, 2, 3], [4], [5] * 9],
        [11, 12, 13],
    )
    together = torch.stack(
        list(stream(Context(model, prompts, 31), 20, Sampling(1.0, 40), seeds)), 1
    )
    for prompt, seed, row in zip(prompts, seeds, together):
        assert torch.stack(
            list(stream(Context(model, [prompt], 31), 20, Sampling(1.0, 40), [seed])), 1
        )[0].equal(row)
    assert not together[0].equal(together[1])


def test_rows_of_different_lengths_slide_each_in_its_own_time(model):
    prompts = [[1] * 18, [2], [3] * 31]
    together = torch.stack(
        list(stream(Context(model, prompts, 90), 50, Sampling(1.0, 40), [1, 2, 3])), 1
    )
    for prompt, seed, row in zip(prompts, [1, 2, 3], together):
        assert torch.stack(
            list(stream(Context(model, [prompt], 90), 50, Sampling(1.0, 40), [seed])), 1
        )[0].equal(row)


def test_a_window_that_moves_is_counted_without_a_cache_too(model):
    model.init_cache = lambda *args: None
    context = Context(model, [[1, 2, 3]], 100)
    for _ in stream(context, 35, Sampling(0)):
        pass
    assert context.rows[0] == uncached(model, [1, 2, 3], 35)
    assert context.describe_slides() == (
        'the context filled up 5 times; its last 32 tokens were kept'
    )


def test_generate_crops_a_prompt_as_nanogpt_did(model):
    idx = torch.randint(50, (2, 40))
    out = model.generate(idx, 3, temperature=0)
    assert out.shape == (2, 43) and out[:, :40].equal(idx)
    assert out[0, :41].tolist() == uncached(model, idx[0].tolist(), 1)


@pytest.mark.parametrize(
    'rows, message',
    [
        ([[]], 'the prompt is empty'),
        ([[1], []], 'the prompt is empty'),
        ([[1] * 33], 'the prompt has 33 tokens, the model\'s context 32: shorten it'),
    ],
)
def test_prompts_that_cannot_be_read(rows, message):
    with pytest.raises(ValueError, match=message):
        Context(build('gpt'), rows, 40)


# ---- drawing -------------------------------------------------------------------------------------

LOGITS = torch.tensor([1.0, 3.0, -1.0, 2.5, 0.0, 2.9, -4.0])


def test_temperature():
    assert torch.allclose(draws(LOGITS), LOGITS.softmax(-1), atol=1e-4)
    assert torch.allclose(draws(LOGITS, temperature=0.5), (LOGITS * 2).softmax(-1), atol=1e-4)
    assert draws(LOGITS, temperature=0)[1] == draws(LOGITS, temperature=1e-300)[1] == 1


@pytest.mark.parametrize(
    'settings',
    [
        dict(top_k=3),
        dict(top_k=1),
        dict(top_k=99),
        dict(top_p=0.5),
        dict(top_p=0.01),
        dict(top_p=0.9, temperature=1.5),
        dict(min_p=0.2),
        dict(min_p=1.0),
        dict(top_k=4, top_p=0.7, min_p=0.3, temperature=0.8),
    ],
    ids=str,
)
def test_filters_are_those_of_transformers(settings):
    warpers = pytest.importorskip('transformers.generation.logits_process')
    scores = LOGITS[None] / settings.get('temperature', 1.0)
    for key, make in (
        ('top_k', warpers.TopKLogitsWarper),
        ('top_p', warpers.TopPLogitsWarper),
        ('min_p', warpers.MinPLogitsWarper),
    ):
        if key in settings:
            scores = make(settings[key])(None, scores)
    assert torch.allclose(draws(LOGITS, **settings), scores[0].softmax(-1), atol=1e-4)


@pytest.mark.parametrize('V, k', [(50257, 200), (50257, 1), (1300, 10), (1300, 11)])
def test_the_greatest_of_many_logits_are_found(V, k):
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(0))
    values, ids = sampling.topk(logits, k)
    assert values.equal(logits.topk(k).values) and values.equal(logits.gather(1, ids))


def test_the_repetition_penalty_is_that_of_transformers():
    process = pytest.importorskip('transformers.generation.logits_process')
    expected = process.RepetitionPenaltyLogitsProcessor(1.7)(
        torch.tensor([[1, 2, 1]]), LOGITS[None].clone()
    )
    assert torch.allclose(
        draws(LOGITS, rows=[[1, 2, 1]], repetition_penalty=1.7), expected[0].softmax(-1), atol=1e-4
    )


def test_ids_that_are_padding_are_never_drawn():
    model = build('gpt')
    model.tokenizer = CharTokenizer('abcde')
    assert (
        max(
            ids.max()
            for ids in stream(Context(model, [[1]] * 20, 30), 20, Sampling(temperature=5.0))
        )
        < 5
    )


def test_no_token_is_drawn_where_there_are_no_probabilities():
    with pytest.raises(ValueError, match="the model's probabilities are NaN"):
        draws(torch.full((7,), float('nan')))


@pytest.mark.parametrize(
    'settings',
    [
        dict(temperature=-1.0),
        dict(temperature=float('nan')),
        dict(top_k=0),
        dict(top_p=0.0),
        dict(top_p=1.1),
        dict(min_p=-0.1),
        dict(min_p=2.0),
        dict(repetition_penalty=0.0),
    ],
    ids=str,
)
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=f'{next(iter(settings))}=.* must be') as caught:
        Sampling(**settings)
    assert '\n' not in str(caught.value)


# ---- beams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('num_beams, length_penalty', [(1, 1.0), (3, 1.0), (4, 0.0), (4, 2.0)])
def test_beams_are_those_of_transformers(num_beams, length_penalty):
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(1)
    config = transformers.GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=32,
        n_positions=32,
        vocab_size=50,
        eos_token_id=7,
        bos_token_id=None,
        initializer_range=0.4,
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    mine = build('gpt', dtype=torch.float32, gelu='tanh')
    mine.load_state_dict(
        {
            name: p.t() if name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight')) else p
            for name, p in theirs.state_dict().items()
        }
    )
    expected = theirs.generate(
        torch.tensor([[3, 1, 4]]),
        max_new_tokens=12,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        length_penalty=length_penalty,
        do_sample=False,
        pad_token_id=0,
        attention_mask=torch.ones(1, 3),
        return_dict_in_generate=True,
        output_scores=True,
    )
    found = decode.beam_search(
        Context(mine, [[3, 1, 4]], 32), 12, num_beams, length_penalty, lambda ids: ids[-1] == 7
    )
    assert len(found) == num_beams
    for (_, ids), sequence in zip(found, expected.sequences[:, 3:].tolist()):
        end = sequence.index(7) + 1 if 7 in sequence else len(sequence)
        assert ids == sequence[:end]
    if num_beams > 1:
        assert [score for score, _ in found] == pytest.approx(
            expected.sequences_scores.tolist(), abs=1e-4
        )


def test_no_beam_is_likelier_than_the_best_of_all_texts():
    model = build('gpt')
    # as wide as the vocabulary: exact
    (score, ids), *_ = decode.beam_search(Context(model, [[1]], 4), 2, 50)
    first = model(torch.tensor([[1]]))[0][0, -1].log_softmax(-1)
    second = torch.stack(
        [model(torch.tensor([[1, i]]))[0][0, -1].log_softmax(-1) for i in range(50)]
    )
    sums = first[:, None] + second
    assert score == pytest.approx(sums.max().item() / 2) and ids == list(
        divmod(sums.argmax().item(), 50)
    )


# ---- texts ---------------------------------------------------------------------------------------


def test_text_comes_a_whole_character_at_a_time():
    text, out = 'añ日🙂', TextStream(ByteTokenizer())
    assert [out.add([byte]) for byte in text.encode()] == [
        'a',
        '',
        'ñ',
        '',
        '',
        '日',
        '',
        '',
        '',
        '🙂',
    ]
    assert out.add(list('日'.encode())[:2]) == '' and out.add([], final=True) == '\ufffd'


def test_a_stop_ends_a_text_and_is_held_back_until_then():
    out = TextStream(ByteTokenizer(), ['END', '\n\n'])
    assert [out.add([byte]) for byte in b'aE\nENbEND'] == [
        'a',
        '',
        'E',
        '\n',
        '',
        'ENb',
        '',
        '',
        '',
    ]
    assert out.done and out.add(list(b'more')) == ''
    out = TextStream(ByteTokenizer(), ['END'])
    assert out.add(list(b'xEN')) == 'x' and out.add([], final=True) == 'EN'


def test_an_id_of_ends_ends_a_row_and_is_no_part_of_its_text():
    """Also where the stop is spelled otherwise in a text: with a space before it, as BERT's and
    Llama's may be."""
    model = build('gpt')
    model.tokenizer = CharTokenizer([chr(65 + i) for i in range(50)])
    context = Context(model, [[1], [2], [3]], 32)
    news = list(
        decode.stream_text(context, 30, Sampling(3.0), [1, 2, 3], stop_ids=[4, 5, 6, 7, None])
    )
    assert len(news) < 31 and all(set(row[1:]) & {4, 5, 6, 7} for row in context.rows)
    for row, parts in zip(context.rows, zip(*news)):
        until = next(at for at, i in enumerate(row) if at and i in (4, 5, 6, 7))
        assert ''.join(parts) == model.tokenizer.decode(row[1:until])


def test_an_id_of_ends_completes_a_beam():
    model = build('gpt')
    model.tokenizer = CharTokenizer([chr(65 + i) for i in range(50)])
    ends = list(range(0, 50, 2))
    found = decode.beam_search_text(Context(model, [[1]], 10), 8, 3, stop_ids=ends)
    assert len(found) == 3 and not any(
        set(model.tokenizer.encode(text)) & set(ends) for _, text in found
    )


def test_texts_go_on_until_every_row_has_its_stop():
    model = build('gpt')
    model.tokenizer = CharTokenizer([chr(65 + i) for i in range(50)])
    news = list(
        decode.stream_text(
            Context(model, [[1], [2], [3]], 32), 30, Sampling(3.0), [1, 2, 3], stops='BCDE'
        )
    )
    whole = [''.join(parts) for parts in zip(*news)]
    assert (
        len(news) < 31
        and not set(''.join(whole)) & set('BCDE')
        and len({len(text) for text in whole}) > 1
    )
