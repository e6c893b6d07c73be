"""LoRA (Hu et al. 2021, arXiv 2106.09685): finetuning that leaves a model's weights as they are,
and learns for each matrix of its blocks a change of low rank: W x becomes W x + 2 B (A x), with A
(rank, in) and B (out, rank).

Only A and B have gradients and optimizer state, so a run takes less memory, and its checkpoints a
third. B begins at zero: the first step is the base model's, to the bit. Merged, W + 2 B A, it is a
plain model again.

The paper's factor is alpha / rank; to tune alpha is much like tuning the learning rate, it says,
so alpha is 2 rank here: one factor for all ranks, and so one learning rate, some ten times full
finetuning's.
"""

import torch
from torch import nn
from torch.nn import functional as F

FACTOR = 2.0


def add(model, rank, init_from=''):
    """Freeze `model` and put A and B beside each Linear of its blocks, transformer.h, in place;
    rank 0 leaves it as it is.

    init_from: where the model came from. A model that has them already keeps them. Raises
    ValueError.
    """
    had = rank_of(model.state_dict())
    if rank != had and (had or init_from == 'resume'):
        raise ValueError(f"the run has lora_rank={had}, not {rank}: leave it out")
    if rank == had:
        return
    if init_from == 'scratch':
        raise ValueError(
            f"lora_rank={rank} finetunes a trained model, and init_from='scratch' has none: take "
            "--init_from=gpt2, a Hugging Face folder or a run"
        )
    linears = _linears(model)
    if not linears:
        raise ValueError(
            f"lora_rank={rank}: {type(model).__name__} has no matrices in blocks, transformer.h; leave it out"
        )
    model.requires_grad_(False)
    whole, saved = (
        model.flops_per_token,
        2 * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)),
    )
    model.flops_per_token = lambda T: whole(T) - saved  # no gradients of frozen matrices
    for linear in linears:
        bound = linear.in_features**-0.5  # Kaiming's uniform, as in the authors' code
        linear.lora_A = nn.Parameter(
            linear.weight.new_empty(rank, linear.in_features).uniform_(-bound, bound)
        )
        linear.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        linear.lora = linear.register_forward_hook(_beside)


def merge(model):
    """Put what was learned into the weights themselves, in place: a model without A and B. Returns
    it."""
    if rank_of(model.state_dict()):
        for linear in _linears(model):
            with torch.no_grad():
                linear.weight.addmm_(linear.lora_B, linear.lora_A, alpha=FACTOR)
            linear.lora.remove()
            del linear.lora_A, linear.lora_B, linear.lora
        del model.flops_per_token
        model.requires_grad_(True)
    return model


def rank_of(weights):
    """The rank in a state dict; 0 without LoRA."""
    return next((len(weight) for name, weight in weights.items() if name.endswith('.lora_A')), 0)


def _linears(model):
    return [
        module
        for name, module in model.named_modules()
        if name.startswith('transformer.h') and isinstance(module, nn.Linear)
    ]


def _beside(linear, inputs, output):
    return output + F.linear(FACTOR * F.linear(inputs[0], linear.lora_A), linear.lora_B)
