"""The door to Hugging Face's format: `transformers` loads what export.py writes, without a word,
and computes the same; what it writes loads here; and a model that went out and came back is the
same, bit for bit."""

import functools
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from support.exporting import export, exported, saved
from support.generated import given, settings, st
from support.mistakes import check
from support.needs import needs
from support.outcomes import same
from support.scripts import ROOT, TINY, run
from torch import nn

import models
from model import GPT
from text import tokenizer, tokenizer_files
from text.tokenizer import ByteTokenizer, CharTokenizer, HuggingFaceTokenizer
from training import pretrained

TEXT = (ROOT / 'train.py').read_text(encoding='utf-8')
CUT = {'kind': 'tiktoken', 'name': 'gpt2', 'size': 500}
DESCRIPTIONS = {
    'char': CharTokenizer.of(TEXT).describe(),
    'byte': {'kind': 'byte'},
    'gpt2': tokenizer.GPT2,
    'cut': CUT,
}
HARD = [
    "  two  spaces, \t\ttabs\n\n\nand lines \n ",
    "I've we'll THEY'RE 'quoted' 1234567890 3.14e-5",
    '',
    ' ',
    "naïve 日本語 🚀👩\u200d👧 ﷽ \u200d\ufeff e\u0301",
    "\r\n\x00\x7f\x85\xa0\u2028",
    "<|endoftext|>a<|endoftext|><|endoftext|> <|endoftext |>",
]
TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')


@pytest.fixture(scope='session')
def transformers():
    module = pytest.importorskip('transformers')
    module.utils.logging.disable_progress_bar()
    return module


@functools.cache
def load(name):
    """One of DESCRIPTIONS' tokenizers."""
    try:
        return tokenizer.load(DESCRIPTIONS[name])
    except OSError:
        pytest.skip("tiktoken's gpt2 is not in TIKTOKEN_CACHE_DIR, and there is no network")


def random_model(name='gpt', **fields):
    """A model whose weights are all large enough to count, biases and norms too."""
    torch.manual_seed(0)
    model = models.build(
        name, **{**dict(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=100), **fields}
    ).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def logits(model, idx):
    with torch.no_grad():
        return model(idx, idx)[0] if isinstance(model, GPT) else model(idx).logits


# ---- out: the model ------------------------------------------------------------------------------


@pytest.mark.parametrize('ours, theirs', [('sdpa', 'sdpa'), ('plain', 'eager')])
@pytest.mark.parametrize(
    'fields',
    [
        {},
        dict(gelu='tanh'),
        dict(bias=False),
        dict(bias=False, gelu='tanh', dropout=0.3),
        dict(n_layer=3, n_head=6, n_embd=192, block_size=128),
    ],
    ids=str,
)
def test_transformers_computes_the_same(transformers, tmp_path, fields, ours, theirs):
    model = random_model(**fields)
    model.set_attention(ours)
    other = transformers.AutoModelForCausalLM.from_pretrained(
        exported(tmp_path, model), attn_implementation=theirs
    )
    idx = torch.randint(100, (2, model.config.block_size))
    a, b = logits(model, idx), logits(other, idx)
    assert (a - b).abs().max() / b.abs().max() < 1e-5
    # other libraries may round a transpose's products otherwise
    if ours == 'sdpa' and torch.backends.mkl.is_available():
        assert torch.equal(a, b)


def test_everything_loads_without_a_word(tmp_path):
    """A process of its own, so that nothing was said before: transformers says some things once."""
    pytest.importorskip('transformers')
    folder = exported(tmp_path, random_model(vocab_size=128), DESCRIPTIONS['char'])
    script = (
        'import sys, transformers\nfolder = sys.argv[1]\ntransformers.utils.logging.disable_progress_bar()\n'
        'model = transformers.AutoModelForCausalLM.from_pretrained(folder)\n'
        'tokenizer = transformers.AutoTokenizer.from_pretrained(folder)\n'
        'ids = model.generate(**tokenizer("train ", return_tensors="pt"), max_new_tokens=9, do_sample=False)\n'
        'print(ids[0].tolist())\n'
    )
    (tmp_path / 'script.py').write_text(script)
    done = run(tmp_path / 'script.py', folder, cwd=tmp_path, env={'HF_HUB_OFFLINE': '1'})
    assert done.returncode == 0 and done.stderr == ''
    model = pretrained.load_model(folder)
    prompt = torch.tensor([model.tokenizer.encode('train ')])
    assert json.loads(done.stdout) == model.generate(prompt, 9, temperature=0).tolist()[0]


def test_padding_of_the_vocabulary_stays_here(transformers, tmp_path):
    model = random_model(vocab_size=128)
    done = export(
        f'--init_from={saved(tmp_path / "a.pt", model, DESCRIPTIONS["char"])}',
        f'--folder={tmp_path / "hf"}',
    )
    n = len(DESCRIPTIONS['char']['chars'])
    assert (
        f"vocab_size={n}: the model's 128 are padded" in done.stdout
        and len(done.stdout.splitlines()) == 2
    )
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    idx = torch.randint(n, (2, 64))
    assert other.config.vocab_size == n and logits(other, idx).shape[-1] == n
    assert (logits(model, idx)[..., :n] - logits(other, idx)).abs().max() < 1e-5


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_weights_in_another_format(transformers, tmp_path, dtype):
    model = random_model()
    folder = exported(tmp_path, model, None, f'--dtype={dtype}')
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype='auto')
    expected = {k: v.to(getattr(torch, dtype)) for k, v in model.state_dict().items()}
    assert same(
        {k: v.t() if k.endswith(TRANSPOSED) else v for k, v in other.state_dict().items()}, expected
    )


def test_names_are_those_that_transformers_writes_and_llama_cpp_reads(transformers, tmp_path):
    from safetensors import safe_open

    folder = exported(tmp_path, random_model(bias=False))
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / 'theirs')
    names = [
        set(safe_open(f / 'model.safetensors', 'pt').keys()) for f in (folder, tmp_path / 'theirs')
    ]
    assert (
        names[0] == names[1]
        and 'transformer.h.0.attn.c_attn.bias' in names[0]
        and 'lm_head.weight' not in names[0]
    )
    config = json.loads((folder / 'config.json').read_text())
    assert (
        config.items()
        >= dict(
            architectures=['GPT2LMHeadModel'],
            model_type='gpt2',
            n_ctx=64,
            n_positions=64,
            n_embd=32,
            n_layer=2,
            n_head=2,
            layer_norm_epsilon=1e-5,
            torch_dtype='float32',
            vocab_size=100,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        ).items()
    )


# ---- out: the tokenizer --------------------------------------------------------------------------


@pytest.fixture(scope='session')
def theirs(transformers, tmp_path_factory):
    """theirs(name) -> AutoTokenizer's tokenizer from the export of a model with that one of
    DESCRIPTIONS."""
    made = {}

    def make(name):
        if name not in made:
            own, folder = load(name), tmp_path_factory.mktemp(name)
            model = random_model(vocab_size=own.vocab_size)
            made[name] = transformers.AutoTokenizer.from_pretrained(
                exported(folder, model, own.describe())
            )
        return made[name]

    return make


@pytest.mark.parametrize('name', DESCRIPTIONS)
def test_ids_and_texts_are_the_same_there(theirs, name):
    own, other = load(name), theirs(name)
    texts = [
        TEXT[:5000],
        TEXT[-3000:],
        *(HARD if name != 'char' else [''.join(own.chars), own.chars[0] * 3, ' \n x \n ']),
    ]
    for text in texts:
        assert other(text)['input_ids'] == own.encode(text)
        assert other.decode(own.encode(text)) == text == own.decode(own.encode(text))
    assert len(other) == own.vocab_size and other.eos_token_id == getattr(own, 'eot', None)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize('name', DESCRIPTIONS)
def test_any_text_has_the_same_ids_there(theirs, name, data):
    own, other = load(name), theirs(name)
    pieces = (
        st.sampled_from(own.chars)
        if name == 'char'
        else st.text(max_size=4)
        | st.sampled_from(
            [
                ' ',
                '\n',
                '\t',
                "'s",
                '<|endoftext|>',
                'the',
                ' The',
                '0',
                '.',
                'é',
                'e\u0301',
                '日',
                '🚀',
                '\u00a0',
                '\u2029',
            ]
        )
    )
    text = ''.join(data.draw(st.lists(pieces, max_size=30)))
    assert other(text)['input_ids'] == own.encode(text) and other.decode(own.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(
    chars=st.sets(st.characters(exclude_categories=['Cs']), min_size=1, max_size=40), data=st.data()
)
def test_any_characters_can_be_a_vocabulary(chars, data):
    Tokenizer = pytest.importorskip('tokenizers').Tokenizer
    own = CharTokenizer(''.join(chars))
    other, text = (
        Tokenizer.from_str(own.to_json()),
        ''.join(data.draw(st.lists(st.sampled_from(own.chars)))),
    )
    assert other.encode(text).ids == own.encode(text) and other.decode(own.encode(text)) == text


def test_a_character_that_the_model_does_not_know_is_an_error_there_too(theirs):
    with pytest.raises(Exception, match='Missing'):
        theirs('char')('日')


def test_gpt2s_files_are_openais(tmp_path):
    cache = Path(os.environ.get('TIKTOKEN_CACHE_DIR', ''))
    if not (cache / '6d1cbeee0f20b3d9449abfede4726ed8212e3aee').is_file():
        pytest.skip("OpenAI's files are not in TIKTOKEN_CACHE_DIR")
    written = tokenizer_files.to_files(load('gpt2'), 1024)
    assert written['merges.txt'] == (cache / '6d1cbeee0f20b3d9449abfede4726ed8212e3aee').read_text(
        encoding='utf-8'
    )
    assert written['vocab.json'] == json.loads(
        (cache / '6c7ea1a7e38e3a7f062df639a5b80947f075ffe6').read_text()
    )


@pytest.mark.parametrize('name', DESCRIPTIONS)
def test_tokenizer_json_is_as_the_library_writes_it(name):
    Tokenizer = pytest.importorskip('tokenizers').Tokenizer
    text = load(name).to_json()
    found = json.loads(Tokenizer.from_str(text).to_str())
    if 'merges' in found['model']:  # ours are in the form that old versions read too
        found['model']['merges'] = [' '.join(merge) for merge in found['model']['merges']]
    assert found == json.loads(text)


# ---- in ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', DESCRIPTIONS)
@pytest.mark.parametrize('saved_there', [False, True], ids=['exported', 'saved there again'])
def test_there_and_back(transformers, theirs, tmp_path, name, saved_there):
    own = load(name)
    model = random_model(vocab_size=own.vocab_size)
    folder = exported(tmp_path, model, own.describe())
    if saved_there:
        transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(
            tmp_path / 'again'
        )
        theirs(name).save_pretrained(tmp_path / 'again')
        folder = tmp_path / 'again'
    back = pretrained.load_model(folder)
    assert back.tokenizer.describe() == own.describe() and back.config == model.config
    assert same(dict(back.state_dict()), dict(model.state_dict()))
    assert export(f'--init_from={folder}', f'--folder={tmp_path / "twice"}').returncode == 0
    for path in (tmp_path / 'hf').iterdir():
        assert path.read_bytes() == (tmp_path / 'twice' / path.name).read_bytes()


def test_biases_that_a_model_lacks_come_back_as_zeros(tmp_path):
    model = random_model(bias=False)
    back, idx = pretrained.load_model(exported(tmp_path, model)), torch.randint(100, (2, 64))
    assert back.config.bias and torch.equal(logits(back, idx), logits(model, idx))


@pytest.fixture
def shards(transformers, tmp_path):
    """A GPT-2 that transformers has saved in shards, and its folder."""
    config = dict(
        n_layer=2,
        n_head=2,
        n_embd=32,
        n_positions=32,
        vocab_size=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    model.save_pretrained(tmp_path / 'sharded', max_shard_size='50KB')
    assert len(list((tmp_path / 'sharded').glob('*.safetensors'))) > 2
    return model, tmp_path / 'sharded'


@pytest.mark.parametrize('kind', ['safetensors', 'bin'])
def test_shards_are_those_that_the_index_names(shards, kind):
    model, folder = shards
    (path,) = folder.glob('*.index.json')
    index = json.loads(path.read_text())
    (folder / 'below').mkdir()
    for name in sorted(set(index['weight_map'].values())):
        if kind == 'bin':
            from safetensors.torch import load_file

            torch.save(load_file(folder / name), folder / 'below' / f'{name}.bin')
            (folder / name).unlink()
        else:
            shutil.move(folder / name, folder / 'below' / f'{name}.{kind}')
    index['weight_map'] = {k: f'below/{v}.{kind}' for k, v in index['weight_map'].items()}
    path.unlink()
    name = {'safetensors': 'model.safetensors', 'bin': 'pytorch_model.bin'}[kind]
    (folder / f'{name}.index.json').write_text(json.dumps(index))
    (folder / f'model-of-something-else.{kind}').write_bytes(b'not read')
    idx = torch.randint(64, (2, 32))
    assert torch.allclose(logits(pretrained.load_model(folder), idx), logits(model, idx), atol=1e-5)


def test_a_missing_shard(shards, tmp_path):
    _, folder = shards
    words, first = (
        [f'--init_from={folder}', f'--folder={tmp_path / "out"}'],
        min(folder.glob('*.safetensors')),
    )
    first.unlink()
    check(export(*words), f'{first} is missing, one of', 'index.json names')
    (folder / 'model.safetensors.index.json').write_text('{"weight_map": 3}')
    check(export(*words), 'model.safetensors.index.json is damaged')


def test_one_file_of_weights_with_its_config_beside_it(tmp_path):
    model = random_model(vocab_size=128)
    folder = exported(tmp_path, model, DESCRIPTIONS['char'])
    (folder / 'model.safetensors').rename(folder / 'epoch-3.safetensors')
    back = pretrained.load_model(str(folder / 'epoch-3.safetensors'))
    n = back.config.vocab_size
    assert back.tokenizer.describe() == DESCRIPTIONS['char'] and torch.equal(
        back.lm_head.weight, model.lm_head.weight[:n]
    )
    check(
        export(f'--init_from={folder / "epoch-4.safetensors"}', f'--folder={tmp_path / "out"}'),
        'epoch-4.safetensors',
    )


VARIANTS = [
    dict(n_inner=48),
    dict(tie_word_embeddings=False),
    dict(layer_norm_epsilon=1e-3),
    dict(scale_attn_by_inverse_layer_idx=True),
    dict(scale_attn_weights=False),
    dict(reorder_and_upcast_attn=True),
    dict(
        scale_attn_by_inverse_layer_idx=True,
        scale_attn_weights=False,
        tie_word_embeddings=False,
        n_inner=200,
        activation_function='relu',
    ),
]
ACTIVATIONS = {
    'gelu': 'exact',
    'gelu_python': 'exact',
    'gelu_new': 'tanh',
    'gelu_fast': 'tanh',
    'gelu_accurate': 'tanh',
    'gelu_pytorch_tanh': 'tanh',
    'gelu_python_tanh': 'tanh',
    'relu': 'relu',
}


@pytest.fixture
def gpt2(transformers, tmp_path):
    """gpt2(**config) -> (transformers' GPT-2 with large random weights, the folder where it has
    saved it)."""

    def make(**config):
        torch.manual_seed(0)
        sizes = dict(
            n_layer=3,
            n_head=2,
            n_embd=32,
            n_positions=24,
            vocab_size=64,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | config)).eval()
        for p in model.parameters():
            nn.init.normal_(p, std=0.2)
        model.save_pretrained(tmp_path / 'gpt2')
        return model, tmp_path / 'gpt2'

    return make


@pytest.mark.parametrize(
    'config', [*VARIANTS, *(dict(activation_function=name) for name in ACTIVATIONS)], ids=str
)
def test_variants_of_gpt2_are_the_same_here_and_back_there(transformers, gpt2, tmp_path, config):
    theirs, folder = gpt2(**config)
    model, idx = pretrained.load_model(folder), torch.randint(64, (2, 24))
    expected = logits(theirs, idx)
    assert (logits(model, idx) - expected).abs().max() / expected.abs().max() < 1e-5
    assert model.config.gelu == ACTIVATIONS[config.get('activation_function', 'gelu_new')]
    assert export(f'--init_from={folder}', f'--folder={tmp_path / "hf"}').returncode == 0
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    assert (logits(there, idx) - expected).abs().max() / expected.abs().max() < 1e-5
    back = pretrained.load_model(tmp_path / 'hf')
    assert back.config == model.config and torch.equal(logits(back, idx), logits(model, idx))


def test_an_untied_head_is_cut_to_the_vocabulary(transformers, tmp_path):
    model = random_model(vocab_size=128, tied=False)
    other = transformers.AutoModelForCausalLM.from_pretrained(
        exported(tmp_path, model, DESCRIPTIONS['char'])
    )
    n = len(DESCRIPTIONS['char']['chars'])
    idx = torch.randint(n, (2, 64))
    assert other.lm_head.weight.shape == (n, 32)
    assert (logits(model, idx)[..., :n] - logits(other, idx)).abs().max() < 1e-5


def store_head(folder, head):
    """Add a head's weights to the file of a folder."""
    from safetensors.torch import load_file, save_file

    path = folder / 'model.safetensors'
    save_file(load_file(path) | {'lm_head.weight': head}, path, metadata={'format': 'pt'})


@pytest.mark.parametrize(
    'tied, says',
    [
        (True, 'says tie_word_embeddings=true'),
        (..., 'lacks tie_word_embeddings, for which transformers uses true'),
    ],
)
def test_a_stored_head_that_differs_unties_a_gpt2(transformers, gpt2, tmp_path, capsys, tied, says):
    _, folder = gpt2()
    edit(folder, tie_word_embeddings=tied)
    store_head(folder, torch.randn(64, 32))
    model, idx = pretrained.load_model(folder), torch.randint(64, (2, 24))
    assert not model.config.tied and capsys.readouterr().out == (
        f"{folder} stores an lm_head.weight that differs from the embeddings, although its config.json "
        f"{says}: using both, as transformers does (tied=False)\n"
    )
    expected = logits(transformers.AutoModelForCausalLM.from_pretrained(folder), idx)
    assert (logits(model, idx) - expected).abs().max() / expected.abs().max() < 1e-5
    assert export(f'--init_from={folder}', f'--folder={tmp_path / "hf"}').returncode == 0
    there = logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf'), idx)
    assert (there - expected).abs().max() / expected.abs().max() < 1e-5


def test_a_stored_copy_of_the_table_leaves_a_gpt2_tied(gpt2, capsys):
    theirs, folder = gpt2()
    store_head(folder, theirs.lm_head.weight.detach().clone())
    model = pretrained.load_model(folder)
    assert model.config.tied and model.lm_head.weight is model.transformer.wte.weight
    assert capsys.readouterr().out == ''


def edit(folder, **changes):
    """Change keys of a folder's config.json; ... leaves one out."""
    config = json.loads((folder / 'config.json').read_text()) | changes
    (folder / 'config.json').write_text(
        json.dumps({k: v for k, v in config.items() if v is not ...})
    )


@pytest.mark.parametrize(
    'change, part',
    [
        ({'n_layer': '2'}, "n_layer='2' is not a whole number from 1 up"),
        ({'n_embd': [32]}, 'n_embd=[32] is not a whole number from 1 up'),
        ({'n_embd': None}, 'n_embd=None is not a whole number from 1 up'),
        ({'vocab_size': -1}, 'vocab_size=-1 is not a whole number from 1 up'),
        ({'n_inner': 0}, 'n_inner=0 is not a whole number from 1 up'),
        ({'n_inner': 64}, "don't fit its config.json"),
        ({'layer_norm_epsilon': 'x'}, "layer_norm_epsilon='x' is not a number above 0"),
        (
            {'n_head': 3},
            "config.json can't be loaded as --model=gpt: n_embd=32 is not divisible by n_head=3",
        ),
        ({'n_embd': ..., 'n_head': 5}, 'n_embd=768 is not divisible by n_head=5'),
        ({'tie_word_embeddings': False}, 'lm_head.weight'),
        ({'tie_word_embeddings': 'no'}, "tie_word_embeddings='no' is neither true nor false"),
        ({'scale_attn_weights': 1}, 'scale_attn_weights=1 is neither true nor false'),
        ({'activation_function': ['gelu']}, "activation_function=['gelu'] is not supported"),
        (
            {'activation_function': 'quick_gelu'},
            "activation_function='quick_gelu' is not supported, only gelu,",
        ),
        ({'n_positions': 63}, "don't fit its config.json"),
        ({'add_cross_attention': True}, 'add_cross_attention=True is not supported, only False'),
        ({'quantization_config': {'bits': 4}}, "quantization_config={'bits': 4} is not supported"),
        (
            {'model_type': ...},
            'model_type is missing; supported are gpt2 (as --model=gpt) and llama (as --model=transformerpp)',
        ),
        ({'model_type': 'qwen2'}, "model_type='qwen2' is not supported, only gpt2"),
        (
            {'n_layer': ...},
            'has the weights of 2 layers, and its config.json lacks n_layer, for which transformers uses 12',
        ),
        ({'n_layer': 3}, 'has the weights of 2 layers, and its config.json says n_layer=3'),
    ],
    ids=str,
)
def test_what_another_gpt2_has_is_refused(tmp_path, change, part):
    folder = exported(tmp_path, random_model())
    edit(folder, **change)
    check(export(f'--init_from={folder}', f'--folder={tmp_path / "out"}'), part)


def test_all_that_can_not_be_used_is_named_at_once(tmp_path):
    folder = exported(tmp_path, random_model())
    edit(
        folder,
        activation_function='silu',
        add_cross_attention=True,
        n_head='two',
        layer_norm_epsilon=0,
    )
    check(
        export(f'--init_from={folder}', f'--folder={tmp_path / "out"}'),
        "config.json can't be loaded as --model=gpt: ",
        "activation_function='silu'",
        'add_cross_attention=True',
        "n_head='two'",
        'layer_norm_epsilon=0',
    )


def test_what_a_config_leaves_out_has_the_defaults_of_transformers(transformers, gpt2, capsys):
    theirs, folder = gpt2(n_layer=12, n_head=12, n_embd=24)
    edit(folder, n_layer=..., n_head=..., activation_function=..., layer_norm_epsilon=...)
    edit(folder, n_embd=..., hidden_size=24)  # a second name of it
    model, idx = pretrained.load_model(folder), torch.randint(64, (2, 24))
    notice = (
        f"{folder}/config.json lacks n_layer, n_head: using transformers' n_layer=12, n_head=12\n"
    )
    assert capsys.readouterr().out == notice
    assert (logits(model, idx) - logits(theirs, idx)).abs().max() < 1e-4
    there = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(there, idx), logits(theirs, idx))


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16'])
def test_files_as_windows_editors_save_them(tmp_path, encoding):
    """With a byte order mark, tokenizer.json in UTF-8."""
    model = random_model(vocab_size=len(DESCRIPTIONS['char']['chars']))
    folder = exported(tmp_path, model, DESCRIPTIONS['char'])
    for name in ('config.json', 'tokenizer_config.json', 'tokenizer.json'):
        text = (folder / name).read_text(encoding='utf-8')
        (folder / name).write_text(
            text, encoding='utf-8-sig' if name == 'tokenizer.json' else encoding
        )
    back, idx = pretrained.load_model(folder), torch.randint(60, (2, 64))
    assert (
        torch.equal(logits(back, idx), logits(model, idx))
        and back.tokenizer.describe() == DESCRIPTIONS['char']
    )


def test_loading_draws_no_random_numbers(tmp_path):
    """Of a billion weights those take a minute, and all of them are read from the file."""
    model, name = random_model(tied=False), saved(tmp_path / 'model.pt', random_model(tied=False))
    folder, before = exported(tmp_path / 'hf', model), torch.get_rng_state()
    for source in (name, folder):
        assert same(dict(pretrained.load_model(source).state_dict()), dict(model.state_dict()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    'text, part',
    [
        ('', 'is not valid JSON'),
        ('{"n_layer": 2,', 'is not valid JSON'),
        ('[' * 100_000, 'is not valid JSON'),
        ('[1]', 'it holds a list, not an object'),
    ],
    ids=['empty', 'cut', 'deep', 'list'],
)
def test_a_damaged_config(tmp_path, text, part):
    folder = exported(tmp_path, random_model())
    (folder / 'config.json').write_text(text)
    check(
        export(f'--init_from={folder}', f'--folder={tmp_path / "out"}'),
        str(folder / 'config.json'),
        part,
    )


@pytest.fixture
def foreign(tmp_path):
    """The tokenizer.json of a byte-level BPE that is not one of ours."""
    tokenizers = pytest.importorskip('tokenizers')
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [TEXT, *HARD], vocab_size=400, special_tokens=['<pad>', '<|endoftext|>', '<été>']
    )
    bpe.save(str(tmp_path / 'foreign.json'))
    return tokenizers.Tokenizer.from_file(str(tmp_path / 'foreign.json'))


def test_a_tokenizer_from_elsewhere_goes_along(transformers, foreign, tmp_path):
    from tokenizers.processors import TemplateProcessing

    folder = exported(tmp_path, random_model(vocab_size=foreign.get_vocab_size()))
    as_saved = type(foreign).from_str(foreign.to_str())  # with habits that would change a prompt
    as_saved.enable_truncation(5)
    as_saved.post_processor = TemplateProcessing(
        single='$A <|endoftext|>', special_tokens=[('<|endoftext|>', 1)]
    )
    as_saved.save(str(folder / 'tokenizer.json'))
    model = pretrained.load_model(folder)
    assert model.tokenizer.describe() == {
        'kind': 'huggingface',
        'json': (folder / 'tokenizer.json').read_text(),
    }
    assert model.tokenizer.vocab_size == foreign.get_vocab_size() and model.tokenizer.eot == 1
    for text in (TEXT[:2000], *HARD, '<pad><été>é'):
        ids = model.tokenizer.encode(text)
        assert ids == foreign.encode(text).ids and model.tokenizer.decode(ids) == text
        # as it is streamed
        assert b''.join(model.tokenizer.decode_bytes([i]) for i in ids) == text.encode()
    again = exported(tmp_path / 'again', model, model.tokenizer.describe())
    assert (again / 'tokenizer.json').read_text() == (folder / 'tokenizer.json').read_text()


def test_a_tokenizer_of_only_vocab_and_merges(foreign, tmp_path):
    folder = exported(tmp_path, random_model(vocab_size=foreign.get_vocab_size()))
    foreign.model.save(str(folder))
    own = pretrained.load_model(folder).tokenizer
    assert (
        own.describe()['kind'] == 'huggingface'
        and own.encode(TEXT[:2000]) == foreign.encode(TEXT[:2000]).ids
    )


def test_gpt2s_own_files_need_neither_tiktoken_nor_tokenizers(tmp_path, monkeypatch):
    for name, content in tokenizer_files.to_files(load('gpt2'), 1024).items():
        (tmp_path / name).write_text(content if type(content) is str else json.dumps(content))
    monkeypatch.setattr(tokenizer, 'TiktokenTokenizer', None)
    assert tokenizer_files.from_files(tmp_path) == tokenizer.GPT2
    (tmp_path / 'tokenizer.json').unlink()
    assert tokenizer_files.from_files(tmp_path) == tokenizer.GPT2


@pytest.mark.parametrize(
    'text',
    [
        '',
        '[]',
        '{"model": 3}',
        pytest.param(
            '{"model": {"type": "BPE", "vocab": {}, "merges": [3]}}', marks=needs('tokenizers')
        ),
    ],
)
def test_a_damaged_tokenizer_json(tmp_path, text):
    folder = exported(tmp_path, random_model())
    (folder / 'tokenizer.json').write_text(text)
    check(export(f'--init_from={folder}', f'--folder={tmp_path / "out"}'), 'damaged')


@pytest.mark.parametrize(
    'change', [{'normalizer': {'type': 'Lowercase'}}, {'added_tokens': [{'content': '<pad>'}]}]
)
def test_a_changed_tokenizer_is_not_taken_for_ours(tmp_path, change):
    for own in (ByteTokenizer(), CharTokenizer('abc')):
        (tmp_path / 'tokenizer.json').write_text(json.dumps(json.loads(own.to_json()) | change))
        assert tokenizer_files.from_files(tmp_path)['kind'] == 'huggingface'


def test_a_tokenizer_json_that_cannot_be_used():
    pytest.importorskip('tokenizers')
    with pytest.raises(ValueError, match='damaged') as caught:
        tokenizer.load({'kind': 'huggingface', 'json': '{}'})
    assert '\n' not in str(caught.value)


def test_without_the_package_tokenizers(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    with pytest.raises(ValueError, match='pip install tokenizers'):
        HuggingFaceTokenizer('{}')


def test_a_run_is_exported_sampled_from_and_trained_on(trained, text_folder, tmp_path):
    done, folder = (
        export(f'--out_dir={trained}', f'--folder={tmp_path / "a" / "hf"}'),
        tmp_path / 'a' / 'hf',
    )
    assert done.returncode == 0 and not done.stderr and f'{folder}: ' in done.stdout
    assert [path.name for path in (tmp_path / 'a').iterdir()] == ['hf']
    sampled = [
        run(
            'sample.py',
            f'--init_from={source}',
            '--num_samples=1',
            '--max_new_tokens=20',
            '--device=cpu',
            '--dtype=float32',
        )
        for source in (trained, folder)
    ]
    assert sampled[0].returncode == 0 and sampled[0].stdout == sampled[1].stdout, sampled[1].stderr
    words = [
        word
        for word in TINY
        if word.split('=')[0] not in ('--n_layer', '--n_head', '--n_embd', '--max_iters')
    ]
    done = run(
        'train.py',
        *words,
        '--max_iters=1',
        f'--dataset={text_folder}',
        f'--init_from={folder}',
        f'--out_dir={tmp_path / "out"}',
    )
    assert done.returncode == 0 and f'from {folder}' in done.stdout, done.stderr


def test_a_model_without_a_tokenizer_is_exported_without_one(tmp_path):
    done = export(
        f'--init_from={saved(tmp_path / "model.pt", random_model())}', f'--folder={tmp_path / "hf"}'
    )
    assert 'has no tokenizer: the model does not say which one its 100 ids use' in done.stdout
    assert {path.name for path in (tmp_path / 'hf').iterdir()} == {
        'config.json',
        'generation_config.json',
        'model.safetensors',
    }


# ---- mistakes ------------------------------------------------------------------------------------


def test_mistakes(tmp_path):
    source = f'--init_from={saved(tmp_path / "model.pt", random_model())}'
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'precious').write_text('precious')
    check(export(source), "the folder to write is missing")
    check(export(source, f'--folder={tmp_path / "full"}'), 'exists and is not empty')
    check(export(source, f'--folder={tmp_path / "model.pt"}'), 'exists and is not empty')
    check(export(source, f'--folder={tmp_path / "model.pt" / "below"}'), 'model.pt')
    check(
        export(source, f'--folder={tmp_path / "hf"}', '--dtype=int8'),
        "dtype='int8' is unknown: use float32, bfloat16",
    )
    check(
        export(f'--out_dir={tmp_path / "full"}', f'--folder={tmp_path / "hf"}'),
        'holds no checkpoint',
    )
    check(export('--out_dir=nowhere', f'--folder={tmp_path / "hf"}'), "'nowhere' does not exist")
    modern = saved(tmp_path / 'modern.pt', random_model('modern'))
    check(
        export(f'--init_from={modern}', f'--folder={tmp_path / "hf"}'),
        "no model like 'modern'",
        'with --model=gpt',
    )
    char = saved(tmp_path / 'char.pt', random_model(), {'kind': 'char', 'chars': 'ab\ud800'})
    check(export(f'--init_from={char}', f'--folder={tmp_path / "hf"}'), 'surrogates not allowed')
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        'char.pt',
        'full',
        'model.pt',
        'modern.pt',
    ]
    (tmp_path / 'empty').mkdir()
    assert export(source, f'--folder={tmp_path / "empty"}').returncode == 0


def test_a_full_disk_leaves_nothing(tmp_path):
    resource = pytest.importorskip('resource')
    source = f'--init_from={saved(tmp_path / "model.pt", random_model())}'
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for limit in (10, 2000, 50_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            check(export(source, f'--folder={tmp_path / "hf"}'), f'cannot write {tmp_path / "hf"}')
            assert [path.name for path in tmp_path.iterdir()] == ['model.pt']
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_run_and_a_folder_as_plain_words(trained, tmp_path):
    by_words = export(trained, tmp_path / 'a', '--dtype=float16')
    assert by_words.returncode == 0, by_words.stderr
    by_settings = export(f'--out_dir={trained}', '--dtype=float16', f'--folder={tmp_path / "b"}')
    assert by_settings.stdout == by_words.stdout.replace(str(tmp_path / 'a'), str(tmp_path / 'b'))
    assert (tmp_path / 'a' / 'model.safetensors').read_bytes() == (
        tmp_path / 'b' / 'model.safetensors'
    ).read_bytes()
    check(export(trained, tmp_path / 'a'), f"folder='{tmp_path / 'a'}' exists and is not empty")
    check(export(trained), "the folder to write is missing")
    assert export('--dtype', 'float16', trained, '--folder', tmp_path / 'c').returncode == 0
