"""Weights for generation, and decode.c, against the same numbers in plain torch."""

import copy
import os
import subprocess
from pathlib import Path

import pytest
import torch
from support.scripts import run
from torch import nn

import models
from generation import c_library, quantize
from generation.decode import Context

DTYPES = ['float32', 'bfloat16', 'int8']
needs_compiler = pytest.mark.skipif(not quantize.has_int8(), reason="there is no C compiler")


def prepared(model, dtype):
    """(model prepared, a model that holds the stored weights in ordinary Linears and the same kind
    of cache)."""
    theirs = copy.deepcopy(model)
    quantize.convert_weights(model, dtype)
    for name, child in model.named_modules():
        if isinstance(child, quantize.WeightOnlyLinear):
            weight = child.weight.float() * (1 if child.scale is None else child.scale[:, None])
            theirs.get_submodule(name.replace('.0.blocks.', '.')).weight = nn.Parameter(weight)
    theirs.cache_dtype = model.cache_dtype
    return model, theirs


@pytest.mark.parametrize('library', [True, False], ids=['decode.c', 'torch'])
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('k', [64, 100, 200])
def test_a_linear_is_the_product_with_its_stored_weights(dtype, k, library):
    library = c_library.load(dtype) if library else None
    linear = nn.Linear(k, 31).eval()
    mine = quantize.WeightOnlyLinear(linear, quantize.DTYPES[dtype], library)
    stored = mine.weight.double() * (1 if mine.scale is None else mine.scale[:, None])
    assert (stored - linear.weight).abs().max() <= {
        'float32': 0,
        'bfloat16': 2**-8,
        'int8': 0.5 / 127,
    }[dtype] * k**-0.5
    for B in (1, 2, 4, 7, quantize.MAX_C_ROWS, quantize.MAX_C_ROWS + 1):
        x = torch.randn(B, 1, k)
        is_exact = dtype == 'float32' or (library and B <= quantize.MAX_C_ROWS)
        with torch.inference_mode():
            assert (mine(x) - (x.double() @ stored.T + linear.bias)).abs().max() < (
                1e-5 if is_exact else 0.05
            )


@needs_compiler
@pytest.mark.parametrize('dtype', DTYPES)
def test_what_a_row_gives_does_not_depend_on_the_others(dtype):
    library = c_library.load(dtype)
    mine, x = (
        quantize.WeightOnlyLinear(nn.Linear(100, 31), quantize.DTYPES[dtype], library),
        torch.randn(9, 100),
    )
    together = mine(x)
    assert all(mine(x[i : i + 1])[0].equal(together[i]) for i in range(9)) and mine(x[:5]).equal(
        together[:5]
    )


@needs_compiler
@pytest.mark.parametrize(
    'fields',
    [
        {},
        dict(gelu='tanh'),
        dict(gelu='relu', n_inner=40),
        dict(n_inner=272, norm_eps=0.1, tied=False),
    ],
    ids=str,
)
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('dtype', DTYPES)
def test_gpt2s_blocks_in_c_are_those_of_model_py(dtype, bias, fields):
    torch.manual_seed(0)
    model = models.build(
        'gpt', block_size=64, vocab_size=101, n_layer=2, n_embd=48, n_head=4, bias=bias, **fields
    ).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    model, theirs = prepared(model, dtype)
    assert isinstance(model.transformer.h[0], quantize.FusedBlocks)
    rows = [torch.randint(101, (n,)).tolist() for n in (5, 9, 2, 7, 5)]
    mine, theirs = Context(model, rows, 40), Context(theirs, rows, 40)
    for _ in range(20):  # the same cache in both, so that only a token's own way differs
        a, b = mine.logits(), theirs.logits()
        assert (a - b).abs().max() < (1e-5 if dtype == 'float32' else 0.03) * b.std()
        ids = torch.randint(101, (5, 1))
        mine.add(ids)
        theirs.add(ids)


@needs_compiler
@pytest.mark.parametrize('dtype', DTYPES)
def test_threads_share_the_work_and_wait_for_each_other(dtype):
    torch.manual_seed(0)
    model = models.build(
        'gpt', block_size=64, vocab_size=3001, n_layer=4, n_embd=256, n_head=4
    ).eval()
    model, theirs = prepared(model, dtype)  # large enough for decode.c to use threads
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        mine, theirs = Context(model, [[1, 2], [3]] * 3, 40), Context(theirs, [[1, 2], [3]] * 3, 40)
        for _ in range(10):
            a, b = mine.logits(), theirs.logits()
            assert (a - b).abs().max() < (1e-5 if dtype == 'float32' else 0.03) * b.std()
            mine.add(torch.arange(6)[:, None])
            theirs.add(torch.arange(6)[:, None])
    finally:
        torch.set_num_threads(threads)


@needs_compiler
def test_a_cache_of_another_type_goes_the_other_way():
    model = models.build(
        'gpt', block_size=64, vocab_size=101, n_layer=2, n_embd=64, n_head=4
    ).eval()
    quantize.convert_weights(model, 'bfloat16')
    idx, own, other = (
        torch.randint(101, (1, 9)),
        model.init_cache(1, 9),
        model.init_cache(1, 9, dtype=torch.float32),
    )
    assert own.kept[0][0].dtype == torch.bfloat16
    with torch.inference_mode():
        for t in range(9):
            a, b = (model(idx[:, t : t + 1], cache=cache)[0] for cache in (own, other))
            assert (a - b).abs().max() < 0.02 * b.std()


@needs_compiler
@pytest.mark.parametrize('name', ['gpt', 'modern'])
def test_int8_stays_near_the_model(name):
    torch.manual_seed(0)
    model = models.build(name, block_size=64, vocab_size=101, n_layer=2, n_embd=64, n_head=2).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    before = Context(model, [[1, 2, 3]], 10).logits()
    quantize.convert_weights(model, 'int8')
    after = Context(model, [[1, 2, 3]], 10).logits()
    assert not after.equal(before) and (after - before).abs().max() < 0.1 * before.std()


def test_without_a_compiler_torch_does_it_and_int8_is_refused(monkeypatch):
    monkeypatch.setattr(c_library, 'load', lambda dtype: None)
    model = models.build('gpt', block_size=16, vocab_size=50, n_layer=1, n_embd=16, n_head=2).eval()
    with pytest.raises(ValueError, match="dtype='int8' is for a CPU with a C compiler"):
        quantize.convert_weights(model, 'int8')
    expected = Context(model, [[1, 2]], 10).logits()
    quantize.convert_weights(model, 'float32')
    assert Context(model, [[1, 2]], 10).logits().equal(expected)
    quantize.convert_weights(model, 'bfloat16')
    assert (Context(model, [[1, 2]], 10).logits() - expected).abs().max() < 0.05 * expected.std()


@needs_compiler
def test_decode_c_is_compiled_once_and_kept(trained, tmp_path):
    words = (
        'sample.py',
        f'--out_dir={trained}',
        '--num_samples=1',
        '--max_new_tokens=5',
        '--device=cpu',
        '--dtype=int8',
    )
    first = run(*words, env={'XDG_CACHE_HOME': str(tmp_path)})
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / 'nanogpt').iterdir()}
    assert first.returncode == 0 and len(kept) == 1
    again = run(*words, env={'XDG_CACHE_HOME': str(tmp_path), 'PATH': '/nowhere'})
    assert again.stdout == first.stdout and {path: path.stat().st_mtime_ns for path in kept} == kept
    next(iter(kept)).write_bytes(b'')  # as a crash may leave it
    mended = run(*words, env={'XDG_CACHE_HOME': str(tmp_path)})
    assert mended.stdout == first.stdout and next(iter(kept)).stat().st_size
    none = run(*words, env={'XDG_CACHE_HOME': str(tmp_path / 'other'), 'PATH': '/nowhere'})
    assert none.returncode == 2 and none.stderr.count('\n') == 1 and 'C compiler' in none.stderr


@needs_compiler
def test_decode_c_compiles_without_a_warning(tmp_path):
    for weight, cache in c_library.TYPES.values():
        command = [
            'cc',
            '-Wall',
            '-Wextra',
            '-Werror',
            '-O1',
            f'-DWEIGHT={weight}',
            f'-DCACHE={cache}',
            '-fopenmp',
            '-c',
            str(Path(c_library.__file__).with_name('decode.c')),
            '-o',
            str(tmp_path / 'decode.o'),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        assert done.returncode == 0, done.stderr
