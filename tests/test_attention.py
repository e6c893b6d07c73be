"""Each kind of attention.py against `transformers` or its plain equation, in float64; what its
cache keeps; how far it sees."""

import math

import pytest
import torch
from torch.nn import functional as F

from generation import quantize
from generation.decode import Context
from models import build
from models.parts import attention, layers

KINDS = list(attention.KINDS)
SHAPE = dict(block_size=24, vocab_size=50, n_layer=2, n_head=4, n_embd=32)
BOTH = pytest.mark.parametrize('name', ['transformerpp', 'modern'])


def shaken(kind, name='transformerpp', **fields):
    """A small model in float64 whose weights are all large enough to count."""
    torch.manual_seed(0)
    model = build(name, **{**SHAPE, 'attention_kind': kind, 'window': 5, **fields}).double().eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, 1.0 if 'ln_' in name else 0.0, std=0.3)
    return model


def one(kind, **fields):
    """(the attention of the second block, x (2, T, C), rotary, q, k and v as the heads have them
    (2, H, T, D))."""
    model = shaken(kind, **fields)
    x = torch.randn(2, SHAPE['block_size'], SHAPE['n_embd'], dtype=torch.double)
    attn = model.transformer.h[1].attn
    return attn, x, model.rotary, *attn.heads(x, model.rotary)


def by_hand(q, k, v, bias, scale=None):
    """The plain equation, a row of the softmax at a time; bias (H, T, T), -inf for what is not
    seen."""
    y = torch.zeros(*q.shape[:3], v.size(-1), dtype=torch.double)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        scores = [
            (q[b, h, t] @ k[b, h, j]).item() * (scale or q.size(-1) ** -0.5) + bias[h, t, j].item()
            for j in range(q.size(2))
        ]
        shares = torch.tensor([math.exp(s) for s in scores], dtype=torch.double)
        y[b, h, t] = shares / shares.sum() @ v[b, h]
    return y.transpose(1, 2).flatten(2)


def causal(T=24, H=4):
    return torch.full((H, T, T), -math.inf).triu(1)


# ---- each kind is its equation -------------------------------------------------------------------


def test_mha():
    attn, x, rotary, q, k, v = one('mha')
    assert torch.allclose(attn.mix(x, rotary, None), by_hand(q, k, v, causal()), atol=1e-12)


@pytest.mark.parametrize(
    'fields, G',
    [
        (dict(attention_kind='gqa', n_kv_head=2), 2),
        (dict(attention_kind='mqa'), 1),
        (dict(attention_kind='gqa'), 1),
        (dict(attention_kind='gqa', n_kv_head=4), 4),
    ],
)
def test_grouped_queries_are_mha_with_keys_and_values_repeated(fields, G):
    grouped, full = shaken(**{'kind': '', **fields}), shaken('mha')
    assert grouped.config.kv_heads == G
    state = grouped.state_dict()
    for name in [name for name in state if name.endswith('c_q.weight')]:
        q, kv = state.pop(name), state.pop(name.replace('c_q', 'c_kv'))
        kv = kv.view(2, G, 8, 32).repeat_interleave(4 // G, 1).reshape(64, 32)
        state[name.replace('c_q', 'c_attn')] = torch.cat([q, kv])
    full.load_state_dict(state)
    idx = torch.randint(50, (2, 24))
    assert torch.allclose(grouped(idx, idx)[0], full(idx, idx)[0], atol=1e-12)


@pytest.mark.parametrize(
    'n_head, expected', [(1, 1), (2, 1), (6, 2), (7, 7), (9, 3), (12, 3), (32, 8)]
)
def test_a_quarter_of_the_heads_or_the_next_that_divides_them(n_head, expected):
    model = build(
        'transformerpp', **{**SHAPE, 'n_head': n_head, 'n_embd': 4 * n_head}, attention_kind='gqa'
    )
    assert model.config.kv_heads == expected


@pytest.mark.parametrize('window', [1, 5, 23, 24, 100])
def test_windows_hold_the_query_itself(window):
    attn, x, rotary, q, k, v = one('sliding', window=window)
    t, j = torch.arange(24)[:, None], torch.arange(24)
    bias = causal().masked_fill(j <= t - window, -math.inf)
    assert torch.allclose(attn.mix(x, rotary, None), by_hand(q, k, v, bias), atol=1e-12)


@BOTH
@pytest.mark.parametrize(
    'kind, n_layer, reach', [('sliding', 1, 4), ('sliding', 4, 13), ('banded', 2, 24)]
)
def test_how_far_a_stack_of_windows_sees(name, kind, n_layer, reach):
    """L (W - 1) + 1 tokens, W = 4; one dense block sees all."""
    model, idx = shaken(kind, name, n_layer=n_layer, window=4), torch.randint(50, (1, 24))
    last = model(idx, idx)[0][0, -1]
    moved = []
    for t in range(24):
        other = idx.clone()
        other[0, t] = (other[0, t] + 1) % 50
        moved.append(not torch.equal(model(other, idx)[0][0, -1], last))
    assert moved == [False] * (24 - reach) + [True] * reach


def test_every_second_block_is_banded():
    kinds = [type(block.attn) for block in shaken('banded', n_layer=5).transformer.h]
    assert kinds == [attention.Attention, attention.Windowed] * 2 + [attention.Attention]


def test_alibi():
    attn, x, rotary, q, k, v = one('alibi')
    t, j = torch.arange(24.0)[:, None], torch.arange(24.0)
    bias = causal() - torch.tensor([2**-2, 2**-4, 2**-6, 2**-8])[:, None, None] * (t - j)
    assert torch.allclose(attn.mix(x, rotary, None), by_hand(q, k, v, bias), atol=1e-12)
    assert torch.equal(attn.mix(x, rotary, None), attn.mix(x, None, None))  # nothing is rotated


@pytest.mark.parametrize('n_head', [1, 2, 8, 12, 16, 20])
def test_alibis_slopes_are_those_of_transformers(n_head):
    bloom = pytest.importorskip('transformers.models.bloom.modeling_bloom')
    theirs = bloom.build_alibi_tensor(torch.ones(1, 3), n_head, torch.float64).view(n_head, 3)[:, 1]
    assert torch.allclose(attention.alibi_slopes(n_head).double(), theirs, rtol=1e-6)


def test_gates_are_in_front_of_the_projection():
    attn, x, rotary, q, k, v = one('gated')
    gate = 1 / (1 + torch.exp(-x @ attn.c_gate.weight.T))
    expected = by_hand(q, k, v, causal()) * gate @ attn.c_proj.weight.T
    assert torch.allclose(attn(x, rotary), expected, atol=1e-12)


def test_sinks_take_a_share_and_give_nothing():
    attn, x, rotary, q, k, v = one('sinks')
    k, v, bias = F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0)), F.pad(causal(), (1, 0))
    bias[..., 0] = attn.sinks.detach()[:, None]
    y = torch.zeros_like(q)
    for h in range(4):
        shares = (q[:, h] @ k[:, h].mT / math.sqrt(8) + bias[h]).softmax(-1)
        y[:, h] = shares @ v[:, h]
        assert (shares[..., 1:].sum(-1) < 1).all()
    assert torch.allclose(attn.mix(x, rotary, None), y.transpose(1, 2).flatten(2), atol=1e-12)


def test_sinks_of_minus_infinity_are_none():
    attn, x, rotary, q, k, v = one('sinks')
    torch.nn.init.constant_(attn.sinks, -math.inf)
    assert torch.allclose(attn.mix(x, rotary, None), by_hand(q, k, v, causal()), atol=1e-12)


def test_sinks_are_gpt_oss():
    oss = pytest.importorskip('transformers.models.gpt_oss.modeling_gpt_oss')
    config = oss.GptOssConfig(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        num_hidden_layers=2,
        attention_bias=False,
        layer_types=['full_attention'] * 2,
        attn_implementation='eager',
    )
    theirs = oss.GptOssAttention(config, 1).double().eval()
    attn, x, rotary, *_ = one('sinks')
    q, k, v = attn.c_attn.weight.chunk(3)
    theirs.load_state_dict(
        {
            'q_proj.weight': q,
            'k_proj.weight': k,
            'v_proj.weight': v,
            'o_proj.weight': attn.c_proj.weight,
            'sinks': attn.sinks,
        }
    )
    angles = rotary[0, None, :, :4], rotary[1, None, :, 4:]
    expected = theirs(x, angles, causal()[None, :1].double())[0]
    assert torch.allclose(attn(x, rotary), expected, atol=1e-9)


def whole(module, config, model, state):
    """The logits of transformers' model, with norms and angles in float64 (else float32 whatever
    the weights are)."""
    prefix = type(config).__name__.removesuffix('Config')
    theirs = getattr(module, f'{prefix}ForCausalLM')(config).double().eval()
    state = (
        {'embed_tokens': 'transformer.wte', 'norm': 'transformer.ln_f'}
        | {
            f'layers.{i}.{a}': f'transformer.h.{i}.{b}'
            for i in range(SHAPE['n_layer'])
            for a, b in {
                'input_layernorm': 'ln_1',
                'post_attention_layernorm': 'ln_2',
                'mlp.gate_proj': 'mlp.c_gate',
                'mlp.up_proj': 'mlp.c_fc',
                'mlp.down_proj': 'mlp.c_proj',
                'self_attn.o_proj': 'attn.c_proj',
            }.items()
        }
        | state
    )
    own = model.state_dict()
    weights = {'lm_head.weight': own['lm_head.weight']}
    for their_name, value in state.items():
        if 'lambda' not in their_name:
            their_name += '.weight'
        if type(value) is str:
            value = own[f'{value}.weight']
        weights[f'model.{their_name}'] = value
    theirs.load_state_dict(weights)
    for m in theirs.modules():
        if type(m).__name__ == f'{prefix}RMSNorm':
            m.forward = lambda x, m=m: F.rms_norm(x, m.weight.shape, m.weight, m.variance_epsilon)
    D = model.config.rotary_dim
    angles = (
        model.rotary[0, None],
        torch.cat([-model.rotary[1, :, : D // 2], model.rotary[1, :, D // 2 :]], -1)[None],
    )
    theirs.model.rotary_emb.forward = lambda x, position_ids: angles
    idx = torch.randint(50, (2, 24))
    return theirs(idx).logits, model(idx, idx)[0]


def test_differential_is_diff_llama():
    diff = pytest.importorskip('transformers.models.diffllama.modeling_diffllama')
    model = shaken('differential')
    config = diff.DiffLlamaConfig(
        hidden_size=32,
        intermediate_size=model.config.hidden,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=50,
        num_hidden_layers=2,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        max_position_embeddings=24,
    )
    state = {}
    for i, block in enumerate(model.transformer.h):
        for name, part in zip('qkv', block.attn.c_attn.weight.chunk(3)):
            state[f'layers.{i}.self_attn.{name}_proj'] = part
        for name in ('lambda_q1', 'lambda_k1', 'lambda_q2', 'lambda_k2'):
            state[f'layers.{i}.self_attn.{name}'] = getattr(block.attn, name)
    theirs, ours = whole(diff, config, model, state)
    assert torch.allclose(ours, theirs, atol=1e-5)  # its λ is float32


def test_lambda_begins_where_the_paper_says():
    torch.manual_seed(0)
    model = build('transformerpp', **{**SHAPE, 'n_embd': 512}, attention_kind='differential')
    for layer, block in enumerate(model.transformer.h):
        assert block.attn.lambda_0 == pytest.approx(0.8 - 0.6 * math.exp(-0.3 * layer))
        values = torch.cat([p for name, p in block.attn.named_parameters() if 'lambda' in name])
        assert values.std().item() == pytest.approx(0.1, rel=0.15) and abs(values.mean()) < 0.02


@pytest.mark.parametrize('fields', [{}, dict(kv_rank=12, rope_dim=6)], ids=['default', 'own sizes'])
def test_mla_is_deepseeks(fields):
    deepseek = pytest.importorskip('transformers.models.deepseek_v3.modeling_deepseek_v3')
    model = shaken('mla', **fields)
    R, E = model.config.latent, model.config.rotary_dim
    assert (R, E) == ((12, 6) if fields else (32, 4))
    config = deepseek.DeepseekV3Config(
        hidden_size=32,
        intermediate_size=model.config.hidden,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=50,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        rms_norm_eps=1e-5,
        q_lora_rank=None,
        kv_lora_rank=R,
        qk_rope_head_dim=E,
        qk_nope_head_dim=8,
        v_head_dim=8,
        rope_interleave=False,
        tie_word_embeddings=False,
        max_position_embeddings=24,
        num_mtp_layers=0,
    )
    state = {}
    for i, block in enumerate(model.transformer.h):
        attn = block.attn
        state |= {
            f'layers.{i}.self_attn.{name}': value
            for name, value in {
                'q_proj': attn.c_q.weight,
                'kv_a_proj_with_mqa': torch.cat([attn.c_kv.weight, attn.c_rope.weight]),
                'kv_a_layernorm': attn.ln_kv.weight,
                'kv_b_proj': attn.c_up.weight.view(2, 4, 8, R).transpose(0, 1).reshape(64, R),
            }.items()
        }
    theirs, ours = whole(deepseek, config, model, state)
    assert torch.allclose(ours, theirs, atol=1e-9)


@BOTH
def test_mlas_absorbed_form_is_the_expanded_one(name):
    model = shaken('mla', name)
    attn, x = model.transformer.h[0].attn, torch.randn(2, 24, 32, dtype=torch.double)
    q, q_rope, kept = attn.heads(x, model.rotary)
    expanded = attn.expanded(q, q_rope, kept, None)
    assert (
        torch.allclose(attn.absorbed(q, q_rope, kept, None), expanded, atol=1e-12)
        and expanded.shape == q.shape
    )


# ---- what they share -----------------------------------------------------------------------------


def test_rotation_keeps_norms_and_sees_differences_of_places():
    q, k = torch.randn(2, 1, 8, dtype=torch.double).expand(2, 24, 8)
    rotary = layers.rotary_table(24, 8).double()
    turned_q, turned_k = layers.apply_rotary(q, rotary), layers.apply_rotary(k, rotary)
    assert torch.allclose(turned_q.norm(dim=-1), q.norm(dim=-1), atol=1e-6)
    scores = turned_q @ turned_k.T
    assert all(scores.diagonal(-d).std() < 1e-5 for d in range(23)) and scores[0].std() > 0.1


@pytest.mark.parametrize('kind', KINDS)
def test_moderns_queries_and_keys_have_one_length(kind):
    """mla's q as a whole, and its rotated key; the latent has a norm of its own."""
    q, k, v = one(kind, name='modern')[3:]
    q, k = (torch.cat([q, k], -1), v[..., -4:]) if kind == 'mla' else (q, k)
    for x in (q, k):
        assert torch.allclose(x.square().mean(-1), torch.ones_like(x[..., 0]), atol=1e-3)
    assert one(kind)[3].square().mean(-1).std() > 0.1


@BOTH
@pytest.mark.parametrize('kind', KINDS)
def test_both_kernels_and_reading_on_give_the_same(name, kind):
    model, idx = shaken(kind, name), torch.randint(50, (2, 24))
    expected, gradients = {}, {}
    for kernel in ('plain', 'sdpa'):
        model.set_attention(kernel)
        model.zero_grad()
        expected[kernel], loss = model(idx, idx)
        loss.backward()
        gradients[kernel] = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.set_attention('auto')
    assert torch.allclose(expected['plain'], expected['sdpa'], atol=1e-10)
    assert (
        torch.allclose(gradients['plain'], gradients['sdpa'], atol=1e-10)
        and gradients['plain'].isfinite().all()
    )
    cache, at = model.init_cache(2, 24, dtype=torch.float64), 0
    for n in (7, 1, 1, 9, 1, 5):
        at += n
        assert torch.allclose(
            model(idx[:, at - n : at], cache=cache)[0][:, 0], expected['sdpa'][:, at - 1], atol=1e-9
        )
    context = Context(model, [[1, 2, 3, 4, 5, 6, 7], [8, 9], [10]], 24)
    for token in range(9):  # rows of different lengths
        for row, logits in zip(context.rows, context.logits()):
            assert torch.allclose(logits, model(torch.tensor([row]))[0][0, -1], atol=1e-9)
        context.add(torch.arange(3)[:, None] * 7 + token)


@pytest.mark.parametrize(
    'kind, floats',
    [
        ('mha', 64),
        ('gqa', 16),
        ('mqa', 16),
        ('sliding', 64),
        ('banded', 64),
        ('differential', 64),
        ('mla', 36),
        ('gated', 64),
        ('sinks', 64),
        ('alibi', 64),
    ],
)
def test_what_a_cache_keeps_of_a_token(kind, floats):
    """In each layer: mla R + E = 32 + 4, gqa 2 G D."""
    cache = shaken(kind).init_cache(3, 10)
    assert [sum(t[0, :, 0].numel() for t in layer) for layer in cache.kept] == [floats] * 2
    assert (
        sum(t.numel() for t in shaken('mla', kv_rank=5, rope_dim=2).init_cache(1, 1).kept[0]) == 7
    )


@pytest.mark.parametrize('W', [3, 8])
def test_a_token_reads_no_further_back_than_its_window(W):
    model, idx = shaken('sliding', window=W, n_layer=1), torch.randint(50, (1, 20))
    cache = model.init_cache(1, 24, dtype=torch.float64)
    model(idx, cache=cache)
    for kept in cache.kept[0]:
        kept[:, :, : 20 - W + 1] = math.nan
    assert model(idx[:, :1], cache=cache)[0].isfinite().all()
    cache.kept[0][0][:, :, 21 - W + 1] = math.nan
    assert model(idx[:, :1], cache=cache)[0].isnan().all()


@BOTH
@pytest.mark.parametrize('kind', KINDS)
def test_trains_a_step_in_bfloat16_by_each_optimizer(name, kind):
    torch.manual_seed(0)
    model, idx = (
        build(name, **SHAPE, attention_kind=kind, window=5, dropout=0.1),
        torch.arange(48).view(2, 24) % 7,
    )
    optimizer = model.configure_optimizers(0.1, 0.01, (0.9, 0.95), 'cpu', dict(matrix=0.02))
    losses = []
    for _ in range(8):
        with torch.autocast('cpu', torch.bfloat16):
            _, loss = model(idx, (idx + 1) % 7)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize('name, n', [('c_attn', 3), ('c_kv', 2), ('c_up', 2)])
def test_matrices_one_above_the_other_are_told_to_muon(name, n):
    kind = {'c_attn': 'mha', 'c_kv': 'gqa', 'c_up': 'mla'}[name]
    model = build('transformerpp', **SHAPE, attention_kind=kind)
    model.configure_optimizers(0.1, 0.01, (0.9, 0.95), 'cpu', dict(matrix=0.02))
    assert all(getattr(block.attn, name).weight.n_matrices == n for block in model.transformer.h)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int8'])
@pytest.mark.parametrize('kind', ['gqa', 'mla', 'gated', 'sinks', 'differential'])
def test_weights_in_fewer_bits(kind, dtype):
    if dtype == 'int8' and not quantize.has_int8():
        pytest.skip("no C compiler")
    torch.manual_seed(0)
    model = build('transformerpp', **{**SHAPE, 'n_embd': 128}, attention_kind=kind).eval()
    idx = torch.randint(50, (2, 24))
    expected = model(idx)[0]
    quantize.convert_weights(model, dtype)
    cache = model.init_cache(2, 24)
    for t in range(24):
        logits, _ = model(idx[:, t : t + 1], cache=cache)
    error = (logits - expected).norm() / expected.norm()
    assert error < {'float32': 1e-5, 'bfloat16': 0.02, 'int8': 0.05}[dtype]


@pytest.mark.parametrize(
    'kind, share',
    [('mha', 24), ('sliding', 5), ('banded', 14.5), ('differential', 36), ('mla', 30)],
)
def test_flops_of_scores_and_sums(kind, share):
    model = build('transformerpp', **SHAPE, attention_kind=kind, window=5)
    assert model.flops_per_token(24) == 6 * model.num_params() + 2 * 12 * 32 * share


@pytest.mark.parametrize(
    'fields, part',
    [
        (dict(attention_kind='mla2'), 'use mha, gqa'),
        (dict(attention_kind='gqa', n_kv_head=3), 'n_kv_head=3'),
        (dict(n_kv_head=2), "needs attention_kind='gqa'"),
        (dict(attention_kind='gqa', n_kv_head=-1), 'n_kv_head=-1'),
        (dict(attention_kind='gqa', kv_rank=4), "needs attention_kind='mla'"),
        (dict(window=0), 'window=0'),
        (dict(attention_kind='mla', rope_dim=3), 'rope_dim=3'),
        (dict(attention_kind='mla', kv_rank=-2), 'kv_rank=-2'),
        (dict(attention_kind='differential', n_head=1), 'n_head=1'),
    ],
)
@BOTH
def test_fields_that_make_no_sense(name, fields, part):
    with pytest.raises(ValueError, match=part) as caught:
        build(name, **{**SHAPE, **fields})
    assert '\n' not in str(caught.value)
