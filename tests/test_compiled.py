"""Compiled gradients are the uncompiled ones, for every architecture, on the torch that is
installed.

A compiler can lose a gradient and still return the right loss: torch 2.11's does so for an in-place
operator inside an autograd.Function. So the gradients themselves are compared, in float64 on a CPU.
`aot_eager` traces forward and backward as inductor does, without its minutes of code generation;
inductor itself is a campaign: `python -m pytest -m campaign tests/test_compiled.py`.
"""

import copy

import pytest
import torch
from support.zoo import ZOO, batch, prepared

FLOAT64, BFLOAT16 = torch.float64, torch.bfloat16
# Where a tensor of a step is rounded differently by a compiler that fuses operators.
TOLERANCE = {FLOAT64: 1e-9, BFLOAT16: 0.05}


def loss_and_gradients(model, dtype, device):
    """(loss, {parameter name: gradient}) of one training step; bfloat16 computes under autocast."""
    idx, targets = batch()
    is_mixed = dtype == BFLOAT16
    if is_mixed:
        model.float()
    with torch.autocast(device, dtype, enabled=is_mixed):
        loss = model.train()(idx.to(device), targets.to(device))[1]
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def assert_compiled_gradients_are_equal(model, device, backend, dtype=FLOAT64):
    torch._dynamo.reset()
    compiled = copy.deepcopy(model).to(device)
    compiled.compile(backend=backend)
    loss, expected = loss_and_gradients(model.to(device), dtype, device)
    compiled_loss, gradients = loss_and_gradients(compiled, dtype, device)
    assert compiled_loss == pytest.approx(loss, rel=TOLERANCE[dtype])
    for name, gradient in expected.items():
        assert gradients[name] is not None, f"{name} has no gradient"
        scale = gradient.abs().max().item()
        difference = (gradients[name] - gradient).abs().max().item()
        assert difference <= TOLERANCE[dtype] * scale, f"{name}: {difference} of {scale}"


def learned(name):
    """A model that learns by gradients; skips the test for one that only counts."""
    model = prepared(name)
    if model.fit:
        pytest.skip("a counted model has no gradients")
    return model


@pytest.mark.parametrize('name', ZOO)
def test_compiled_gradients_equal_uncompiled_ones(name, device):
    assert_compiled_gradients_are_equal(learned(name), device, 'aot_eager')


@pytest.mark.parametrize('name', ['gpt', 'modern', 'transformerpp', 'transformerpp-gqa'])
def test_compiled_gradients_under_autocast(name, device):
    """On a CPU, attention has a path of its own for bfloat16, with in-place operators."""
    assert_compiled_gradients_are_equal(learned(name), device, 'aot_eager', BFLOAT16)


@pytest.mark.parametrize('name', ['gpt', 'modern', 'transformerpp'])
def test_compiled_gradients_with_recomputed_activations(name, device):
    model = learned(name)
    model.gradient_checkpointing = True
    assert_compiled_gradients_are_equal(model, device, 'aot_eager')


@pytest.mark.campaign
@pytest.mark.parametrize('name', ZOO)
@pytest.mark.parametrize('dtype', [FLOAT64, BFLOAT16], ids=str)
def test_gradients_compiled_by_inductor(name, dtype, device):
    assert_compiled_gradients_are_equal(learned(name), device, 'inductor', dtype)


def test_a_lost_gradient_is_noticed(device):
    """The check fails where compilation cuts one path of the gradient and keeps the loss."""

    class LosesGradient(torch.nn.Linear):
        def forward(self, x):
            weight = self.weight
            if torch.compiler.is_compiling():
                weight = weight.detach()
            return torch.nn.functional.linear(x, weight, self.bias)

    model = learned('gpt')
    model.transformer.h[0].mlp.c_fc.__class__ = LosesGradient
    with pytest.raises(AssertionError, match='c_fc.weight'):
        assert_compiled_gradients_are_equal(model, device, 'aot_eager')
