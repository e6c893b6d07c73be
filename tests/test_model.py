"""The contract of a language model, kept by GPT and by a second model made up here, and GPT-2's own
numbers."""

import json
import math
from dataclasses import asdict, dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from interop.huggingface import OPENAI
from model import GPT, GPTConfig, LanguageModel
from models import architecture, build
from models.parts import kernels
from training import pretrained, resume


@dataclass
class BagConfig:
    block_size: int = 16
    vocab_size: int = 32
    width: int = 8


class Bag(LanguageModel):
    """A model unlike GPT: the mean of all embeddings so far, and an untied head."""

    Config = BagConfig

    def __init__(self, config):
        super().__init__(config)
        self.emb = nn.Embedding(config.vocab_size, config.width)
        self.lm_head = nn.Linear(config.width, config.vocab_size)

    def forward(self, idx, targets=None, cache=None):
        x = self.emb(idx).cumsum(1) / torch.arange(1, idx.size(1) + 1).view(-1, 1)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)


MODELS = {
    'gpt': lambda **kw: build(
        'gpt', **{**dict(block_size=16, vocab_size=32, n_layer=2, n_head=2, n_embd=16), **kw}
    ),
    'gpt tanh without bias': lambda **kw: build(
        'gpt',
        **{
            **dict(
                block_size=16,
                vocab_size=32,
                n_layer=2,
                n_head=2,
                n_embd=16,
                gelu='tanh',
                bias=False,
            ),
            **kw,
        },
    ),
    'made up here': lambda **kw: Bag(BagConfig(**kw)),
}


@pytest.fixture(params=MODELS)
def make(request):
    torch.manual_seed(0)
    return MODELS[request.param]


def batch(B=3, T=16, V=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(V, (B, T), generator=g), torch.randint(V, (B, T), generator=g)


# ---- what every model does -----------------------------------------------------------------------


def test_shapes(make):
    model, (idx, targets) = make().eval(), batch()
    logits, loss = model(idx, targets)
    assert logits.shape == (3, 16, 32) and loss.shape == ()
    last, none = model(idx)
    assert last.shape == (3, 1, 32) and none is None
    assert torch.allclose(last[:, 0], logits[:, -1], atol=1e-6)
    assert model(idx[:, :5])[0].shape == (3, 1, 32)  # shorter than block_size


def test_loss_is_the_mean_cross_entropy_of_the_targets_not_ignored(make):
    model, (idx, targets) = make().eval(), batch()
    targets[0, :7] = -1
    logits, loss = model(idx, targets)
    by_hand = (
        -logits.log_softmax(-1)
        .gather(-1, targets.clamp(min=0).unsqueeze(-1))
        .squeeze(-1)[targets >= 0]
        .mean()
    )
    assert torch.allclose(loss, by_hand, atol=1e-6)


def test_no_position_sees_the_future(make):
    model, (idx, targets) = make().double().eval(), batch()
    before = model(idx, targets)[0]
    for t in (1, 8, 15):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 32
        after = model(changed, targets)[0]
        assert torch.allclose(before[:, :t], after[:, :t], atol=1e-9, rtol=0)
        assert not torch.allclose(before[:, t:], after[:, t:], atol=1e-9, rtol=0)


def test_first_loss_is_that_of_guessing(make):
    model, (idx, targets) = make().eval(), batch(B=64)
    assert abs(model(idx, targets)[1].item() - math.log(32)) < 0.5


def test_learns_one_batch_by_heart(make):
    model, (idx, targets) = make(), batch(B=1, T=4)
    optimizer = model.configure_optimizers(0.0, 3e-2, (0.9, 0.99), 'cpu')
    for _ in range(200):
        loss = model(idx, targets)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.05


def test_state_dict_makes_the_same_model(make):
    model, other, (idx, targets) = make(), make(), batch()
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(idx, targets)[0], other.eval()(idx, targets)[0])


def test_every_parameter_has_one_role(make):
    model = make()
    groups = model.param_groups()
    assert set(groups) <= {'matrix', 'embedding', 'head', 'vector'}
    in_groups = [id(p) for group in groups.values() for p in group]
    assert sorted(in_groups) == sorted({id(p) for p in model.parameters()})


def test_generate_continues_and_is_greedy_at_temperature_zero(make):
    model, (idx, _) = make().eval(), batch(T=3)
    out = model.generate(idx, 20, temperature=0)  # beyond block_size: the context slides
    assert out.shape == (3, 23) and torch.equal(out[:, :3], idx)
    expected = model(out[:, 6:22])[0][:, -1].argmax(-1)
    assert torch.equal(out[:, 22], expected)
    model.generate(idx, 5, temperature=1.3, top_k=1)


def test_padded_ids_are_never_sampled(make):
    class Tokenizer:
        vocab_size = 5

    model, (idx, _) = make().eval(), batch(V=5)
    model.tokenizer = Tokenizer()
    assert model.generate(idx, 50, temperature=5.0)[:, 16:].max() < 5


def test_speed_figures_are_there(make):
    model = make()
    assert model.num_params() > 0
    assert model.estimate_mfu(1e3, 1e9) == pytest.approx(model.flops_per_token(16) * 1e3 / 1e9)


# ---- GPT -----------------------------------------------------------------------------------------

SIZES = {
    'gpt2': (12, 12, 768, 124_439_808),
    'gpt2-medium': (24, 16, 1024, 354_823_168),
    'gpt2-large': (36, 20, 1280, 774_030_080),
    'gpt2-xl': (48, 25, 1600, 1_557_611_200),
}


@pytest.mark.parametrize('name', SIZES)
def test_openai_sizes_have_the_published_shapes(name):
    transformers = pytest.importorskip('transformers')
    n_layer, n_head, n_embd, published = SIZES[name]
    with torch.device('meta'):
        ours = GPT(GPTConfig(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_size=50257))
        theirs = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=n_layer, n_head=n_head, n_embd=n_embd)
        )
    assert ours.num_params(non_embedding=False) == published
    transposed = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')
    expected = {
        k: v.shape[::-1] if k.endswith(transposed) else v.shape
        for k, v in theirs.state_dict().items()
    }
    assert {k: v.shape for k, v in ours.state_dict().items()} == expected
    assert name in OPENAI


def save_hf(folder, **config):
    """A GPT-2 with random weights, in a folder as `transformers` saves it; returns transformers'
    model."""
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(1)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config)).eval()
    for p in theirs.parameters():  # biases too, and large enough that every part counts
        nn.init.normal_(p, std=0.05)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize('name', SIZES)
def test_logits_equal_those_of_transformers(name, tmp_path):
    _, n_head, n_embd, _ = SIZES[name]
    theirs = save_hf(
        tmp_path, n_layer=2, n_head=n_head, n_embd=n_embd, n_positions=64, vocab_size=512
    )
    ours = GPT.from_pretrained(tmp_path).eval()
    assert ours.config.gelu == 'tanh'
    idx = batch(B=2, T=64, V=512)[0]
    with torch.no_grad():
        a, b = ours(idx, idx)[0], theirs(idx).logits
    assert (a - b).abs().max() / b.abs().max() < 1e-5


def test_exact_gelu_folder_and_shards_load_too(tmp_path):
    theirs = save_hf(
        tmp_path / 'a',
        n_layer=2,
        n_head=2,
        n_embd=32,
        n_positions=32,
        vocab_size=64,
        activation_function='gelu',
    )
    theirs.save_pretrained(tmp_path / 'b', max_shard_size='50KB')
    assert len(list((tmp_path / 'b').glob('model-*.safetensors'))) > 1
    idx = batch(B=2, T=32, V=64)[0]
    for folder in 'ab':
        ours = pretrained.load_model(tmp_path / folder)
        assert ours.config.gelu == 'exact' and ours.tokenizer is None
        with torch.no_grad():
            assert torch.allclose(ours(idx, idx)[0], theirs(idx).logits, atol=1e-5)


@pytest.mark.parametrize(
    'change, message',
    [
        (
            {'model_type': 'bloom'},
            r"model_type='bloom' is not supported, only gpt2 \(as --model=gpt\) and llama",
        ),
        (
            {'activation_function': 'silu'},
            "activation_function='silu' is not supported, only gelu, ",
        ),
        ({'n_layer': 3}, 'has the weights of 2 layers, and its config.json says n_layer=3'),
    ],
)
def test_a_folder_that_is_not_this_gpt2_is_refused(tmp_path, change, message):
    save_hf(tmp_path, n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=64)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)


def test_new_fields_keep_what_a_gpt_was():
    """A checkpoint from before a field loads as the same model, and a run from then can't be
    resumed as another."""
    model, (idx, _) = MODELS['gpt']().eval(), batch()
    args = {
        k: v
        for k, v in asdict(model.config).items()
        if k not in ('gelu', 'n_inner', 'tied', 'norm_eps', 'eot')
    }
    state = {'model': model.state_dict(), 'model_args': args, 'config': {}}
    assert torch.equal(pretrained.restore_model(state)[0].eval()(idx, idx)[0], model(idx, idx)[0])
    config = {'model': 'gpt'} | asdict(model.config)
    with pytest.raises(
        ValueError, match=r'out has n_inner=0, not 48 \(command line\): remove this setting'
    ):
        resume.adopt_run_settings(
            config | {'n_inner': 48}, {'n_inner': 'command line'}, state, 'out'
        )


@pytest.mark.parametrize(
    'fields, part',
    [
        (dict(gelu='swish'), "gelu='swish' is unknown: use exact, tanh, relu"),
        (dict(n_inner=-1), 'n_inner=-1'),
        (dict(norm_eps=0.0), 'norm_eps=0.0'),
        (dict(norm_eps=math.nan), 'norm_eps=nan'),
    ],
)
def test_fields_that_make_no_sense(fields, part):
    with pytest.raises(ValueError, match=part):
        MODELS['gpt'](**fields)


def test_an_untied_head_is_a_matrix_of_its_own():
    tied, untied = MODELS['gpt'](), MODELS['gpt'](tied=False)
    assert untied.lm_head.weight is not untied.transformer.wte.weight
    assert untied.state_dict().keys() == tied.state_dict().keys()
    assert untied.param_groups()['head'] == [untied.lm_head.weight]
    assert untied.num_params() == tied.num_params() + 32 * 16
    # one of the two is only looked up
    assert untied.flops_per_token(16) == tied.flops_per_token(16)


def test_state_dict_and_optimizer_groups_are_nanogpts():
    model = MODELS['gpt']()
    names = list(model.state_dict())
    assert names[:5] == [
        'transformer.wte.weight',
        'transformer.wpe.weight',
        'transformer.h.0.ln_1.weight',
        'transformer.h.0.ln_1.bias',
        'transformer.h.0.attn.c_attn.weight',
    ]
    assert names[-1] == 'lm_head.weight' and model.lm_head.weight is model.transformer.wte.weight
    decay, keep = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), 'cpu').param_groups
    by_dimension = (
        [p for p in model.parameters() if p.dim() >= 2],
        [p for p in model.parameters() if p.dim() < 2],
    )
    assert [id(p) for p in decay['params']] == [id(p) for p in by_dimension[0]] and decay[
        'weight_decay'
    ] == 0.1
    assert [id(p) for p in keep['params']] == [id(p) for p in by_dimension[1]] and keep[
        'weight_decay'
    ] == 0.0


def test_residual_projections_start_smaller():
    model = MODELS['gpt'](n_embd=128, n_layer=8)
    assert model.transformer.h[0].mlp.c_proj.weight.std().item() == pytest.approx(
        0.02 / 4, rel=0.05
    )
    assert model.transformer.h[0].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_crop_block_size_keeps_the_rest():
    model, idx = MODELS['gpt']().eval(), batch(T=8)[0]
    before = model(idx, idx)[0]
    model.crop_block_size(8)
    assert torch.equal(model(idx, idx)[0], before) and model.transformer.wpe.weight.shape == (8, 16)
    with pytest.raises(ValueError, match='block_size=9'):
        model.crop_block_size(9)
    with pytest.raises(ValueError, match='do not fit'):
        model(batch(T=9)[0])


def test_gradient_checkpointing_changes_nothing_but_memory():
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = MODELS['gpt'](dropout=0.3)
        model.gradient_checkpointing = recompute
        torch.manual_seed(1)
        model(*batch())[1].backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize(
    'dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_plain_attention_equals_sdpa(dtype, tolerance):
    q, k, v = torch.randn(
        3, 2, 4, 33, 8, dtype=dtype, generator=torch.Generator().manual_seed(0)
    ).unbind(0)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert (kernels.plain_attention(q, k, v).double() - expected).abs().max() < tolerance


def test_architecture_names():
    assert architecture('gpt') is GPT
    with pytest.raises(ValueError, match="nearest is 'gpt'"):
        architecture('gtp')
    assert asdict(GPTConfig())['block_size'] == 1024
