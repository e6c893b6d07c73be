"""models/transformerpp.py against `transformers`' Llama; its sizes; and the door to Llama's files,
both ways."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.exporting import export, exported, saved
from support.mistakes import check
from support.outcomes import same
from support.scripts import TINY, run

from generation import quantize
from generation.decode import Context
from interop import huggingface
from model import GPT
from models import build
from models.parts import layers
from training import pretrained

SHAPE = dict(block_size=24, vocab_size=50, n_layer=3, n_head=4, n_embd=32)
KINDS = {'mha': {}, 'gqa': dict(n_kv_head=2), 'mqa': {}}


def shaken(dtype=torch.float32, **fields):
    """A small model whose weights are all large enough to count, the norms' too."""
    torch.manual_seed(0)
    model = build('transformerpp', **{**SHAPE, **fields}).to(dtype).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, std=0.2)
    return model


@pytest.fixture(scope='session')
def transformers():
    module = pytest.importorskip('transformers')
    module.utils.logging.disable_progress_bar()
    return module


@pytest.fixture
def exact(transformers, monkeypatch):
    """Llama's norms and angles in float64; as it is, both are float32 whatever the weights are."""
    from transformers.models.llama import modeling_llama as llama

    def angles(self, x, position_ids):
        found = position_ids[..., None].double() / self.config.rope_parameters['rope_theta'] ** (
            torch.arange(0, self.config.head_dim, 2).double() / self.config.head_dim
        )
        return torch.cat([found.cos()] * 2, -1), torch.cat([found.sin()] * 2, -1)

    monkeypatch.setattr(llama.LlamaRotaryEmbedding, 'forward', angles)
    monkeypatch.setattr(
        llama.LlamaRMSNorm,
        'forward',
        lambda self, x: (
            self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)
        ),
    )
    monkeypatch.setattr(layers, 'rotary_table', rotary64)


def rotary64(T, D, base=1e4, scale=None):
    angles = torch.outer(torch.arange(T).double(), base ** (-torch.arange(0, D, 2).double() / D))
    return torch.stack(
        [torch.cat([angles.cos()] * 2, -1), torch.cat([-angles.sin(), angles.sin()], -1)]
    )


def as_llama(transformers, model):
    """transformers' model with these weights, which go there as they are exported."""
    files, weights = huggingface.to_files(
        model, 'transformerpp', str(model.lm_head.weight.dtype).removeprefix('torch.')
    )
    config = transformers.LlamaConfig(
        **{k: v for k, v in files['config.json'].items() if k != 'torch_dtype'}
    )
    theirs = transformers.LlamaForCausalLM(config).to(model.lm_head.weight.dtype).eval()
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {'lm_head.weight'}
    theirs.tie_weights()
    return theirs


FORMS = [dict(fields, attention_kind=kind) for kind, fields in KINDS.items()] + [
    dict(tied=False),
    dict(rope_theta=500.0),
    dict(norm_eps=1e-2),
    dict(n_hidden=40),
    dict(multiple_of=1),
    dict(n_head=1),
]


@pytest.mark.parametrize('fields', FORMS, ids=str)
def test_logits_are_llamas(transformers, exact, fields):
    model, idx = shaken(torch.float64, **fields), torch.randint(50, (2, 24))
    assert (model(idx, idx)[0] - as_llama(transformers, model)(idx).logits).abs().max() < 1e-9


LLAMA3 = dict(
    rope_scaling='llama3',
    rope_factor=32.0,
    rope_low_freq=1.0,
    rope_high_freq=4.0,
    rope_original=16,
    rope_theta=5e5,
)
VARIANTS = [
    LLAMA3,
    dict(LLAMA3, rope_low_freq=2.0, rope_high_freq=3.0),
    dict(rope_scaling='linear', rope_factor=2.0),
    dict(head_dim=16),
    dict(attention_bias=True),
    dict(mlp_bias=True),
    dict(n_head=4, head_dim=2),
    dict(
        LLAMA3,
        head_dim=12,
        attention_bias=True,
        mlp_bias=True,
        attention_kind='gqa',
        n_kv_head=2,
        tied=False,
    ),
]


@pytest.mark.parametrize('fields', [*FORMS[:4], *VARIANTS], ids=str)
def test_logits_are_llamas_as_it_is(transformers, fields):
    """Its own norms and angles, in float32."""
    model, idx = shaken(**fields), torch.randint(50, (2, 24))
    ours, theirs = model(idx, idx)[0], as_llama(transformers, model)(idx).logits
    assert (ours - theirs).abs().max() / theirs.abs().max() < 1e-5


def test_layers_angles_are_the_exact_ones():
    # float32, of 1,024
    assert (
        layers.rotary_table(1024, 64, 5e5).double() - rotary64(1024, 64, 5e5)
    ).abs().max() < 1e-4


def test_parameters_of_the_published_example():
    with torch.device('meta'):
        model = build(
            'transformerpp', n_embd=288, n_layer=6, n_head=6, vocab_size=32000, block_size=256
        )
    assert model.num_params() == 15_191_712 and model.config.hidden == 768


@pytest.mark.parametrize(
    'fields', [*FORMS, dict(n_embd=72, n_head=3, n_layer=5, multiple_of=64, tied=False)], ids=str
)
def test_parameters_by_formula(fields):
    model = build('transformerpp', **{**SHAPE, **fields})
    c = model.config
    V, d, L, H, G, f = c.vocab_size, c.n_embd, c.n_layer, c.n_head, c.kv_heads, c.hidden
    assert (
        model.num_params()
        == V * d * (2 - c.tied) + L * (d * d // H * (2 * H + 2 * G) + 3 * d * f + 2 * d) + d
    )
    assert f % c.multiple_of == 0 or c.n_hidden
    assert (
        model.flops_per_token(24)
        == 6 * (model.num_params() - (not c.tied) * V * d) + 12 * L * d * 24
    )


def test_rmsnorm_sums_in_float32():
    # squares beyond float16, sums beyond bfloat16's digits
    x = torch.randn(4, 4096).bfloat16() * 300
    norm = layers.RMSNorm(4096, 1e-5)
    expected = x.double() / x.double().square().mean(-1, keepdim=True).add(1e-5).sqrt()
    assert norm(x).dtype == torch.bfloat16 and torch.allclose(
        norm(x).double(), expected, rtol=2**-8, atol=0
    )
    assert torch.allclose(
        norm(x.half().clamp(-6e4, 6e4)).double(), expected, rtol=2**-10, atol=1e-6
    )
    assert (norm.double()(x.double()) - expected).abs().max() < 1e-12


def test_dropout_is_on_embeddings_attention_weights_and_branches():
    model, idx = shaken(dropout=0.5), torch.randint(50, (2, 24))
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == [0.5] * 4
    assert all(block.attn.dropout == 0.5 for block in model.transformer.h)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout):
            m.p = 0.0
    assert not torch.equal(model(idx)[0], model(idx)[0])  # attention weights alone


def test_recomputing_blocks_changes_nothing():
    grads = []
    for recompute in (False, True):
        model, idx = shaken(dropout=0.3).train(), torch.arange(48).view(2, 24)
        model.gradient_checkpointing = recompute
        torch.manual_seed(3)
        model(idx, idx)[1].backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b) for a, b in zip(*grads))


def test_post_norm_is_a_norm_of_each_sum():
    model, idx = shaken(torch.float64, norm_place='post', n_layer=2), torch.randint(50, (1, 24))
    x = model.transformer.wte(idx)
    for block in model.transformer.h:
        x = block.ln_1(x + block.attn(x, model.rotary))
        x = block.ln_2(x + block.mlp(x))
    assert torch.allclose(model(idx, idx)[0], x @ model.lm_head.weight.T, atol=1e-12)
    assert not [name for name in model.state_dict() if 'ln_f' in name]
    model = build('modern', **SHAPE, norm_place='post').double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x = layers.norm(model.transformer.wte(idx))
    for block in model.transformer.h:
        x = layers.norm(x + block.attn(x, model.rotary))
        x = layers.norm(x + block.mlp(x))
    logits = 15 * torch.tanh(layers.norm(x) @ model.lm_head.weight.T / 15)
    assert torch.allclose(model(idx, idx)[0], logits, atol=1e-12)


def test_the_context_may_grow():
    model, idx = shaken(), torch.randint(50, (1, 40))
    model.crop_block_size(40)
    longer = shaken(block_size=40)
    assert torch.equal(model(idx, idx)[0], longer(idx, idx)[0])


@pytest.mark.parametrize(
    'fields, part',
    [
        (dict(n_head=3), 'n_embd=32'),
        (dict(n_layer=0), 'n_layer=0'),
        (dict(multiple_of=0), 'multiple_of=0'),
        (dict(n_hidden=-1), 'n_hidden=-1'),
        (dict(rope_theta=0.0), 'rope_theta=0.0'),
        (dict(norm_eps=-1.0), 'norm_eps=-1.0'),
        (dict(norm_place='behind'), 'use pre or post'),
        (dict(dropout=1.0), 'dropout=1.0'),
        (dict(head_dim=3), 'head_dim=3'),
        (dict(head_dim=-2), 'head_dim=-2'),
        (dict(attention_kind='mla', attention_bias=True), "attention_kind='mla' has no biases"),
        (
            dict(attention_kind='alibi', rope_scaling='linear'),
            "attention_kind='alibi' rotates nothing",
        ),
        (dict(rope_scaling='yarn'), "rope_scaling='yarn' is unknown: use none, linear, llama3"),
        (dict(rope_factor=8.0), "rope_factor=8.0 has no effect with rope_scaling='none'"),
        (
            dict(rope_scaling='linear', rope_original=64),
            "rope_original=64 has no effect with rope_scaling='linear'",
        ),
        (dict(rope_scaling='linear', rope_factor=math.nan), 'rope_factor=nan must be above 0'),
        (
            dict(rope_scaling='llama3', rope_low_freq=4.0),
            'rope_low_freq=4.0 must be below rope_high_freq=4.0',
        ),
    ],
)
def test_fields_that_make_no_sense(fields, part):
    with pytest.raises(ValueError, match=part) as caught:
        build('transformerpp', **{**SHAPE, **fields})
    assert '\n' not in str(caught.value)


# ---- Hugging Face's files ------------------------------------------------------------------------


@pytest.mark.parametrize('fields', [*FORMS[1:5], *VARIANTS], ids=str)
def test_export_and_back(transformers, tmp_path, fields):
    model, idx = shaken(**fields), torch.randint(50, (2, 24))
    folder = exported(tmp_path, model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__ == 'LlamaForCausalLM'
    ours, logits = model(idx, idx)[0], theirs(idx).logits
    assert (ours - logits).abs().max() / logits.abs().max() < 1e-5
    back = pretrained.load_model(folder)
    assert same(dict(back.state_dict()), dict(model.state_dict())) and torch.equal(
        back(idx, idx)[0], ours
    )
    theirs.save_pretrained(tmp_path / 'again')
    assert torch.equal(pretrained.load_model(tmp_path / 'again')(idx, idx)[0], ours)
    assert export(f'--init_from={folder}', f'--folder={tmp_path / "twice"}').returncode == 0
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / 'twice' / path.name).read_bytes()


@pytest.mark.parametrize('tied', [True, False])
def test_a_llama_from_elsewhere(transformers, tmp_path, tied):
    """Nine heads, three of keys and values, in bfloat16 and in shards, its config.json as older
    versions wrote it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=72,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=32,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(
        tmp_path, max_shard_size='100KB'
    )
    config = json.loads((tmp_path / 'config.json').read_text())
    del config['rope_parameters'], config['head_dim']
    (tmp_path / 'config.json').write_text(
        json.dumps(config | {'rope_theta': 100, 'rope_scaling': None})
    )
    model, idx = pretrained.load_model(tmp_path), torch.randint(64, (2, 32))
    assert (model.config.kv_heads, model.config.tied, model.config.rope_theta) == (3, tied, 100)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours, logits = model(idx, idx)[0], theirs(idx).logits
    assert (ours - logits).abs().max() / logits.abs().max() < 1e-5


# Llama 3.2 1B's config.json, with fewer channels (2048), layers (16), heads (32, 8 of keys and
# values) and ids (128256).
LLAMA_3_2 = {
    'architectures': ['LlamaForCausalLM'],
    'attention_bias': False,
    'attention_dropout': 0.0,
    'bos_token_id': 0,
    'eos_token_id': 1,
    'head_dim': 64,
    'hidden_act': 'silu',
    'hidden_size': 256,
    'initializer_range': 0.02,
    'intermediate_size': 192,
    'max_position_embeddings': 131072,
    'mlp_bias': False,
    'model_type': 'llama',
    'num_attention_heads': 4,
    'num_hidden_layers': 2,
    'num_key_value_heads': 1,
    'pretraining_tp': 1,
    'rms_norm_eps': 1e-05,
    'rope_scaling': {
        'factor': 32.0,
        'high_freq_factor': 4.0,
        'low_freq_factor': 1.0,
        'original_max_position_embeddings': 8192,
        'rope_type': 'llama3',
    },
    'rope_theta': 500000.0,
    'tie_word_embeddings': True,
    'torch_dtype': 'bfloat16',
    'transformers_version': '4.45.0.dev0',
    'use_cache': True,
    'vocab_size': 128,
}


def llama_folder(transformers, folder, config):
    """(transformers' Llama with large random weights, in float32; the folder that holds it beside
    this config.json)."""
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, 1.0 if p.dim() == 1 else 0.0, std=0.1)
    theirs.save_pretrained(folder)
    (folder / 'config.json').write_text(json.dumps(config))
    return theirs, folder


def test_what_weights_lack_and_what_they_have_too_much_of(transformers, tmp_path):
    config = LLAMA_3_2 | {'attention_bias': True, 'head_dim': 32}
    _, folder = llama_folder(transformers, tmp_path, config)
    wanted = {k: v for k, v in config.items() if k not in ('attention_bias', 'head_dim')} | {
        'mlp_bias': True
    }
    (folder / 'config.json').write_text(json.dumps(wanted))
    with pytest.raises(ValueError) as caught:
        pretrained.open_model(folder)
    assert str(caught.value) == (
        f"{folder}: 18 weights are missing or don't fit its config.json: "
        'transformer.h.0.attn.c_q.weight has the shape (128, 256), by config.json (256, 256); '
        'missing: transformer.h.0.mlp.c_gate.bias, transformer.h.0.mlp.c_fc.bias, '
        'transformer.h.0.mlp.c_proj.bias and 3 more; '
        'not in a model of this config.json: transformer.h.0.attn.c_q.bias, '
        'transformer.h.0.attn.c_kv.bias, transformer.h.0.attn.c_proj.bias and 3 more'
    )


def test_a_stored_head_that_differs_unties_a_llama(transformers, tmp_path, capsys):
    _, folder = llama_folder(transformers, tmp_path, LLAMA_3_2)
    stored = load_file(folder / 'model.safetensors')
    head = torch.randn_like(stored['model.embed_tokens.weight'])
    save_file(
        stored | {'lm_head.weight': head}, folder / 'model.safetensors', metadata={'format': 'pt'}
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model, idx = pretrained.load_model(folder), torch.randint(128, (1, 24))
    assert not model.config.tied and torch.equal(model.lm_head.weight, head)
    assert 'lm_head.weight that differs from the embeddings' in capsys.readouterr().out
    expected = theirs(idx).logits
    assert (model(idx, idx)[0] - expected).abs().max() / expected.abs().max() < 1e-5


def test_llama_3_2s_angles_are_bit_for_bit_those_of_transformers(transformers, tmp_path):
    theirs, folder = llama_folder(transformers, tmp_path, LLAMA_3_2)
    model = pretrained.load_model(folder)
    assert (model.config.rope_scaling, model.config.rope_factor, model.config.rope_original) == (
        'llama3',
        32.0,
        8192,
    )
    assert (
        model.config.head_dim == 0
        and model.rotary.shape == (2, 131072, 64)
        and model.rotary.dtype == torch.float32
    )
    cos, sin = theirs.model.rotary_emb(torch.zeros(1), torch.arange(131072)[None])
    assert torch.equal(model.rotary[0], cos[0]) and torch.equal(
        model.rotary[1, :, 32:], sin[0, :, 32:]
    )
    unscaled = layers.rotary_table(131072, 64, 5e5)
    assert torch.equal(model.rotary[:, :, :10], unscaled[:, :, :10])  # the fastest stay as they are
    assert not torch.equal(model.rotary[:, :, 31], unscaled[:, :, 31])


def test_llama_3_2_past_its_original_context_and_from_a_cache(transformers, tmp_path):
    scaling = LLAMA_3_2['rope_scaling'] | {'original_max_position_embeddings': 16}
    theirs, folder = llama_folder(transformers, tmp_path, LLAMA_3_2 | {'rope_scaling': scaling})
    model, idx = pretrained.load_model(folder), torch.randint(128, (1, 200))
    expected, ours = theirs(idx).logits, model(idx, idx)[0]
    assert (ours - expected).abs().max() / expected.abs().max() < 1e-5
    plain = build(
        'transformerpp',
        **asdict(model.config) | dict(rope_scaling='none', rope_factor=1.0, rope_original=8192),
    ).eval()
    plain.load_state_dict(model.state_dict())
    # so the scaling counts
    assert (plain(idx, idx)[0] - expected).abs().max() / expected.abs().max() > 0.01
    context = Context(model, [idx[0, :150].tolist()], 200)  # from here on by the cache
    for t in range(150, 200):
        assert (context.logits()[0] - expected[0, t - 1]).abs().max() / expected.abs().max() < 1e-5
        context.add(idx[:, t : t + 1])
    theirs.generation_config.eos_token_id = None
    prompt = idx[:, :20]
    mask = torch.ones_like(prompt)  # else it reads the id 0 as padding
    greedy = theirs.generate(
        prompt, attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=0
    )
    assert torch.equal(model.generate(prompt, 30, temperature=0), greedy)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
def test_new_parts_keep_their_biases_in_weights_for_generation(dtype):
    if dtype == 'int8' and not quantize.has_int8():
        pytest.skip("there is no C compiler")
    model, idx = shaken(**VARIANTS[-1]), torch.randint(50, (1, 24))
    expected = model(idx, idx)[0][0]
    quantize.convert_weights(model, dtype)
    cache = model.init_cache(1, 24)
    found = torch.stack([model(idx[:, t : t + 1], cache=cache)[0][0, 0] for t in range(24)])
    assert (found - expected).norm() / expected.norm() < {
        'float32': 1e-5,
        'bfloat16': 0.02,
        'int8': 0.05,
    }[dtype]


def test_checkpoints_from_before_a_field_hold_the_same_model():
    model, idx = shaken(), torch.randint(50, (1, 24))
    new = {
        'head_dim',
        'attention_bias',
        'mlp_bias',
        *(name for name in asdict(model.config) if name.startswith('rope_s')),
        'rope_factor',
        'rope_low_freq',
        'rope_high_freq',
        'rope_original',
    }
    args = {k: v for k, v in asdict(model.config).items() if k not in new}
    state = {
        'model': model.state_dict(),
        'model_name': 'transformerpp',
        'model_args': args,
        'config': {},
    }
    assert torch.equal(pretrained.restore_model(state)[0].eval()(idx, idx)[0], model(idx, idx)[0])


@pytest.mark.parametrize(
    'fields, part',
    [
        (dict(n_embd=30, n_head=4, head_dim=8), 'n_embd=30 is not divisible by n_head=4'),
        (dict(attention_kind='mla'), "no attention_kind='mla'"),
        (dict(attention_kind='alibi'), "no attention_kind='alibi'"),
        (dict(norm_place='post'), "norm_place='post'"),
    ],
)
def test_what_llama_does_not_have_is_not_exported(tmp_path, fields, part):
    done = export(
        f'--init_from={saved(tmp_path / "model.pt", shaken(**fields))}',
        f'--folder={tmp_path / "hf"}',
    )
    check(done, part)
    assert not (tmp_path / 'hf').exists()


@pytest.mark.parametrize(
    'change, part',
    [
        (
            {'rope_parameters': {'rope_type': 'llama3', 'factor': 8.0, 'rope_theta': 1e4}},
            'rope_parameters.low_freq_factor is missing; rope_parameters.high_freq_factor is missing',
        ),
        (
            {'rope_parameters': {'rope_type': 'yarn'}},
            "rope_parameters.rope_type='yarn' is not supported, only default, linear",
        ),
        (
            {'rope_scaling': {'type': 'dynamic', 'factor': 2.0}},
            "rope_scaling.type='dynamic' is not supported",
        ),
        (
            {'rope_scaling': {'type': 'linear', 'factor': '2'}},
            "rope_scaling.factor='2' is not a number above 0",
        ),
        ({'rope_scaling': 'linear'}, "rope_scaling='linear' is not an object"),
        (
            {'rope_theta': 'big', 'rope_parameters': None},
            "rope_theta='big' is not a number above 0",
        ),
        ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5 is not supported'),
        ({'attention_bias': True}, 'attn.c_attn.bias'),
        ({'mlp_bias': True}, 'mlp.c_fc.bias'),
        ({'hidden_act': 'gelu'}, "hidden_act='gelu' is not supported, only silu, swish"),
        ({'intermediate_size': None}, 'intermediate_size=None is not a whole number from 1 up'),
        (
            {'num_key_value_heads': 3},
            'num_key_value_heads=3 is not a divisor of num_attention_heads=4',
        ),
        ({'tie_word_embeddings': False}, 'lm_head.weight'),
        (
            {'num_hidden_layers': 2},
            'has the weights of 3 layers, and its config.json says num_hidden_layers=2',
        ),
        (
            {'num_hidden_layers': ...},
            'its config.json lacks num_hidden_layers, for which transformers uses 32',
        ),
        (
            {'head_dim': 7},
            "config.json can't be loaded as --model=transformerpp: head_dim=7 is odd",
        ),
        (
            {'hidden_size': 36, 'head_dim': ...},
            "config.json can't be loaded as --model=transformerpp: hidden_size=36 is not divisible by 2 x num_attention_heads=4",
        ),
        (
            {
                'rope_scaling': {
                    'type': 'llama3',
                    'factor': 8,
                    'low_freq_factor': 4,
                    'high_freq_factor': 1,
                }
            },
            "config.json can't be loaded as --model=transformerpp: "
            'rope_scaling.low_freq_factor=4 is not below high_freq_factor=1.0',
        ),
        (
            {'head_dim': 16},
            "6 weights are missing or don't fit its config.json: transformer.h.0.attn.c_attn.weight has "
            'the shape (96, 32), by config.json (192, 32)',
        ),
        (
            {'vocab_size': 49},
            '2 weights are missing or don\'t fit its config.json: transformer.wte.weight has the shape (50, 32), '
            'by config.json (49, 32)',
        ),
    ],
    ids=str,
)
def test_what_another_llama_has_is_refused(tmp_path, change, part):
    folder = exported(tmp_path, shaken())
    config = json.loads((folder / 'config.json').read_text()) | change
    (folder / 'config.json').write_text(
        json.dumps({k: v for k, v in config.items() if v is not ...})
    )
    check(export(f'--init_from={folder}', f'--folder={tmp_path / "out"}'), part)


@pytest.mark.parametrize(
    'change',
    [
        dict(rope_parameters={'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 100.0}),
        dict(rope_parameters=None, rope_scaling={'type': 'linear', 'factor': 2}, rope_theta=100.0),
        dict(
            rope_parameters={'rope_type': 'default', 'rope_theta': 7.0},
            rope_scaling={'rope_type': 'linear', 'factor': 2.0},
        ),
        dict(
            rope_parameters={
                'rope_type': 'llama3',
                'factor': 2.0,
                'low_freq_factor': 1.0,
                'high_freq_factor': 4.0,
            }
        ),
        dict(
            rope_parameters={
                'rope_type': 'llama3',
                'factor': 2.0,
                'low_freq_factor': 1,
                'high_freq_factor': 4,
                'original_max_position_embeddings': 8,
            },
            original_max_position_embeddings=12,
        ),
        dict(rope_parameters=None),
    ],
    ids=str,
)
def test_where_rotations_are_said(transformers, tmp_path, change):
    """In the keys of transformers 5 or older ones, the latter first; what is missing is its
    default."""
    folder, idx = exported(tmp_path, shaken()), torch.randint(50, (2, 24))
    config = json.loads((folder / 'config.json').read_text())
    for key in ('rope_theta', 'rope_scaling', 'rope_parameters'):
        del config[key]
    (folder / 'config.json').write_text(json.dumps(config | change))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)(idx).logits
    assert (
        pretrained.load_model(folder)(idx, idx)[0] - theirs
    ).abs().max() / theirs.abs().max() < 1e-5


def test_gpt_says_whose_a_llamas_folder_is(tmp_path):
    with pytest.raises(ValueError, match='holds a transformerpp, not a GPT-2'):
        GPT.from_pretrained(exported(tmp_path, shaken()))


def test_a_run_from_the_command_line(text_folder, tmp_path):
    words = [word for word in TINY if '--model' not in word and 'max_iters' not in word]
    data, out = f'--dataset={text_folder}', f'--out_dir={tmp_path / "out"}'
    done = run(
        'train.py',
        *words,
        '--model=transformerpp',
        '--attention_kind=gqa',
        '--max_iters=20',
        data,
        out,
    )
    assert done.returncode == 0, done.stderr
    losses = [
        float(line.split('val loss ')[1].split()[0])
        for line in done.stdout.splitlines()
        if 'val loss' in line
    ]
    assert losses[-1] < losses[0] - 0.04 and abs(losses[0] - math.log(60)) < 0.4
    done = run(
        'sample.py',
        out,
        '--device=cpu',
        '--num_samples=1',
        '--max_new_tokens=20',
        '--dtype=bfloat16',
    )
    assert done.returncode == 0 and len(done.stdout) > 20, done.stderr
    assert export(tmp_path / 'out', tmp_path / 'hf').returncode == 0
    words = [
        word for word in words if word.split('=')[0] not in ('--n_layer', '--n_head', '--n_embd')
    ]
    done = run(
        'train.py',
        *words,
        '--max_iters=1',
        data,
        f'--init_from={tmp_path / "hf"}',
        f'--out_dir={tmp_path / "b"}',
    )
    assert done.returncode == 0 and 'model: transformerpp' in done.stdout, done.stderr
