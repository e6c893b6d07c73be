"""LoRA (Hu et al. 2021, arXiv 2106.09685): finetuning by a low-rank change of each matrix.

The model's weights stay as they are. For each matrix W of its blocks two thin ones are learned,
A (rank, in) and B (out, rank), and W x becomes W x + 2 B (A x).

Only A and B have gradients and optimizer state, so a run needs less memory, and its checkpoints
have a third of the size. B starts at zero, so the first step is the base model's, bit for bit.
Merged into the weights, W + 2 B A, the result is a plain model again.

The paper's factor is alpha / rank, and it says that tuning alpha is roughly tuning the learning
rate. Here alpha is 2 rank: the factor is the same for every rank, and so is the best learning rate,
about ten times that of full finetuning.
"""

import torch
from torch import nn
from torch.nn import functional as F

FACTOR = 2.0


def add(model, rank, init_from=''):
    """Freeze `model` and add A and B to each Linear of its blocks (transformer.h), in place.

    rank: 0 leaves the model as it is. A model that has an A and B already keeps them. init_from:
    where the model came from, as train.py has it. Raises ValueError for a rank that differs from
    the run's, and for models without a base to finetune or without such Linears.
    """
    own_rank = rank_of(model.state_dict())
    is_existing_run = own_rank > 0 or init_from == 'resume'
    if rank != own_rank and is_existing_run:
        raise ValueError(f"the run has lora_rank={own_rank}, not {rank}: remove this setting")
    if rank == own_rank:
        return
    if init_from == 'scratch':
        raise ValueError(
            f"lora_rank={rank} finetunes a trained model, and init_from='scratch' has none: use "
            "--init_from=gpt2, a Hugging Face folder or a run"
        )
    linears = _linears(model)
    if not linears:
        raise ValueError(
            f"lora_rank={rank}: {type(model).__name__} has no matrices in blocks (transformer.h): "
            "remove this setting"
        )

    model.requires_grad_(False)
    _count_fewer_flops(model)
    for linear in linears:
        # A is initialized by Kaiming's uniform distribution, as in the authors' code.
        bound = linear.in_features**-0.5
        A = linear.weight.new_empty(rank, linear.in_features)
        linear.lora_A = nn.Parameter(A.uniform_(-bound, bound))
        linear.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, rank))
        linear.lora = linear.register_forward_hook(_add_low_rank_output)


def _count_fewer_flops(model):
    """Subtract from the model's flops_per_token what the gradients of frozen matrices would take.

    That is 2 per weight.
    """
    full_flops = model.flops_per_token
    saved = 2 * sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    model.flops_per_token = lambda T: full_flops(T) - saved


def merge(model):
    """Add the learned change to the weights and remove A and B, in place; returns the model."""
    if not rank_of(model.state_dict()):
        return model
    for linear in _linears(model):
        with torch.no_grad():
            linear.weight.addmm_(linear.lora_B, linear.lora_A, alpha=FACTOR)
        linear.lora.remove()
        del linear.lora_A, linear.lora_B, linear.lora
    del model.flops_per_token  # the class has it again
    model.requires_grad_(True)
    return model


def rank_of(weights):
    """The rank of A and B in a state dict; 0 if it has none."""
    for name, weight in weights.items():
        if name.endswith('.lora_A'):
            return len(weight)
    return 0


def _linears(model):
    return [
        module
        for name, module in model.named_modules()
        if name.startswith('transformer.h') and isinstance(module, nn.Linear)
    ]


def _add_low_rank_output(linear, inputs, output):
    """The forward hook: output (B, T, out) + 2 B A x, with x of shape (B, T, in)."""
    low_rank = FACTOR * F.linear(inputs[0], linear.lora_A)  # (B, T, rank)
    return output + F.linear(low_rank, linear.lora_B)
