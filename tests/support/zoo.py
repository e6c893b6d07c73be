"""A small model of every architecture and variant, for tests that all of them have to pass."""

import torch

import models

V, T = 23, 16  # vocabulary and block_size of all models here
GPT_LIKE = dict(n_layer=2, n_head=2, n_embd=16)
MLP = dict(context=3, n_embd=8, n_hidden=16)
TREE = dict(form='hierarchical', n_layer=2, n_embd=6, n_hidden=10)
ZOO = {  # NAME or NAME-variant: its Config fields
    'gpt': GPT_LIKE,
    'gpt-apart': GPT_LIKE | dict(eot=5),
    'gpt-narrow-relu-untied': GPT_LIKE | dict(n_inner=40, gelu='relu', tied=False, norm_eps=1e-3),
    'modern': GPT_LIKE,
    'transformerpp': GPT_LIKE,
    'transformerpp-untied': GPT_LIKE | dict(tied=False),
    'transformerpp-gqa': GPT_LIKE | dict(attention_kind='gqa'),
    'transformerpp-llama3': GPT_LIKE
    | dict(
        attention_kind='gqa',
        head_dim=12,
        attention_bias=True,
        mlp_bias=True,
        rope_scaling='llama3',
        rope_factor=4.0,
        rope_original=8,
    ),
    'transformerpp-differential-heads': GPT_LIKE | dict(attention_kind='differential', head_dim=12),
    'transformerpp-mla-heads': GPT_LIKE
    | dict(attention_kind='mla', head_dim=12, rope_scaling='linear', rope_factor=2.0),
    'modern-gated-heads': GPT_LIKE | dict(attention_kind='gated', head_dim=12),
    'transformerpp-banded': GPT_LIKE | dict(attention_kind='banded', window=4),
    'transformerpp-differential': GPT_LIKE | dict(attention_kind='differential'),
    'transformerpp-mla': GPT_LIKE | dict(attention_kind='mla'),
    'transformerpp-sinks': GPT_LIKE | dict(attention_kind='sinks'),
    'transformerpp-gated-post': GPT_LIKE | dict(attention_kind='gated', norm_place='post'),
    'modern-alibi-post': GPT_LIKE | dict(attention_kind='alibi', norm_place='post'),
    'modern-ngram': GPT_LIKE | dict(ngram=3, ngram_rows=50),
    'bigram': {},
    'bigram-learned': dict(table='learned'),
    'bigram-rank': dict(table='learned', rank=12),
    'trigram': {},
    'trigram-learned': dict(table='learned'),
    'trigram-rank': dict(table='learned', rank=12),
    'mlp': MLP,
    'mlp-direct': MLP | dict(direct=True, init='xavier'),
    'mlp-ema': MLP | dict(batchnorm='ema'),
    'mlp-precise': MLP | dict(batchnorm='precise'),
    'mlp-frozen': MLP | dict(batchnorm='frozen'),
    'mlp-batch': MLP | dict(batchnorm='batch'),
    'wavenet': dict(n_layer=2, n_stack=2, n_embd=8),
    'wavenet-wide': dict(n_layer=2, kernel=3, n_embd=8, n_skip=12, init='xavier'),
    'wavenet-hierarchical': TREE,
    'wavenet-hierarchical-precise': TREE | dict(batchnorm='precise'),
    'wavenet-hierarchical-batch': TREE | dict(batchnorm='batch'),
}


def new(name, seed=0, **fields):
    """A freshly initialised model, as train.py has it before its first step."""
    torch.manual_seed(seed)
    return models.build(name.partition('-')[0], block_size=T, vocab_size=V, **ZOO[name] | fields)


def batch(B=4, seed=1):
    """(idx, targets) of random tokens, (B, T) each."""
    ids = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1].clone(), ids[:, 1:].clone()


def prepared(name):
    """A model in float64 and eval mode with no weight at its initial value, fitted and calibrated
    as train.py does."""
    model = new(name)
    batches = []
    for seed in (2, 3):
        idx, targets = batch(8, seed)
        batches.append([idx.numpy(), targets.numpy()])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    if model.fit:
        model.fit(batches)
    if model.calibrate:
        model.calibrate(batches)
    return model.double().eval()
