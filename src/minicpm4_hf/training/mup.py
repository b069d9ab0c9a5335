"""muP as MiniCPM has it: how weights begin and how fast each kind of them learns, by the model's width.

Three of MiniCPM's rules are in the model (`scale_emb`, `scale_depth`, the division of the logits by `logits_scaling`);
here are the two that concern training. With the width factor `m = hidden_size / dim_model_base`:

| kind | parameters | initial standard deviation | learning rate | decay |
|---|---|---|---|---|
| embedding | weights of every `nn.Embedding` and of the output head, tied or not | `init_std` | `learning_rate` | no |
| vector | of one dimension or none: norms, biases, gates | left as built | `learning_rate` | no |
| matrix | every other | `init_std / sqrt(m)` | `learning_rate / m` | yes |

An untied head is of the kind "embedding" because the model divides its input by `m`: that division is the whole of
muP's rule for it (Tensor Programs V, table 8), and a second one would make it learn ever less as the width grows. A
head whose input is not divided, such as `score` of a sequence classifier, is a matrix.

The kinds come from the parameters' shapes and owners, not from names, so a model may carry more than the published
one: biases, a layer that predicts a second token. LoRA adapters are not covered: their inner size does not follow the
width.

    config = build_my_config()  # or standard_parametrization(build_my_config()), for comparison
    model = initialize_mup_(MiniCPM4ForCausalLM(config))
    optimizer = torch.optim.AdamW(mup_parameter_groups(model, learning_rate=1e-2, weight_decay=0.1), betas=(0.9, 0.95))
    Trainer(model, args, train_dataset=..., optimizers=(optimizer, build_scheduler(optimizer, ...))).train()

Sources: MiniCPM (arXiv:2404.06395), its table of tensor-program rules and their search, which found `init_std` 0.1 and
a learning rate of 0.01; Tensor Programs V (arXiv:2203.03466), table 8.
"""

import copy
import math

import torch
from torch import nn

# Log lines and `get_last_lr()[0]` show the first group's rate, so the one that is not divided comes first.
KINDS = ("embedding", "vector", "matrix")


def parameter_kinds(model: nn.Module) -> dict[str, str]:
    """The kind of each parameter by its name: "embedding", "vector" or "matrix"; a shared tensor appears once."""
    owners = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    head = model.get_output_embeddings()
    owners += [head] if head is not None else []
    embeddings = {id(module.weight) for module in owners}
    return {
        name: "embedding" if id(parameter) in embeddings else "matrix" if parameter.ndim >= 2 else "vector"
        for name, parameter in model.named_parameters()
    }


def standard_parametrization(config):
    """A copy of a config without muP's width rules, to compare with; of the muP one nothing else changes.

    Its `dim_model_base` is its `hidden_size`, so the width factor is 1 in the model, in `initialize_mup_` and in
    `mup_parameter_groups` alike: logits are not divided, every matrix begins with the same standard deviation and all
    parameters learn at the same rate, whatever the width. That is what transformers does by itself. `scale_emb` and
    `scale_depth` do not depend on the width and stay; at `hidden_size == dim_model_base` both parametrisations are the
    same. The copy is saved with the checkpoint, so a reload divides the logits as training did.
    """
    config = copy.deepcopy(config)
    config.dim_model_base = config.hidden_size
    return config


def width_factor(model: nn.Module) -> float:
    """`m = hidden_size / dim_model_base` of a model.

    Raises:
        ValueError: the model has no such config.
    """
    config = getattr(model, "config", None)
    base = getattr(config, "dim_model_base", None)
    if not base:
        raise ValueError(
            f"muP needs a model whose config has `dim_model_base`, got {type(model).__name__}; give the MiniCPM4 "
            "model itself, not a wrapper around it."
        )
    return config.hidden_size / base


@torch.no_grad()
def initialize_mup_(model: nn.Module, *, init_std: float = 0.1, generator: torch.Generator | None = None) -> nn.Module:
    """Draw the weights of a newly built model anew, from normal distributions of mean 0, in place.

    Embeddings get the standard deviation `init_std` (the row of the padding token is 0), matrices
    `init_std / sqrt(m)`. Norms and biases keep what the model's constructor gave them, ones and zeros.

    Args:
        init_std: of embeddings, and of matrices at `hidden_size == dim_model_base`; MiniCPM's is 0.1.
        generator: of the draws, which go by the order of `named_parameters`; torch's global one by default.

    Returns:
        The same model.

    Raises:
        ValueError: `init_std` is not a positive number, weights without memory, or a model without `dim_model_base`.
    """
    if not (init_std > 0 and math.isfinite(init_std)):
        raise ValueError(f"`init_std` must be a number greater than 0, got {init_std}.")
    matrix_std = init_std / math.sqrt(width_factor(model))
    kinds = parameter_kinds(model)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise ValueError(f"The parameter {name!r} is on the meta device; give it memory before it gets values.")
    for name, parameter in parameters.items():
        if kinds[name] != "vector":
            parameter.normal_(0.0, init_std if kinds[name] == "embedding" else matrix_std, generator=generator)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx].zero_()
    return model


def mup_parameter_groups(model: nn.Module, *, learning_rate: float, weight_decay: float) -> list[dict]:
    """The parameters that learn, each in one group, with the group's learning rate and weight decay.

    Args:
        learning_rate: of embeddings and vectors, and of matrices at `hidden_size == dim_model_base`.
        weight_decay: of matrices. AdamW multiplies it by the learning rate, so that it shrinks a matrix by
            `learning_rate / m * weight_decay` a step.

    Returns:
        For an optimizer: dicts with `name` ("embedding", "vector" or "matrix"), `params`, `lr` and `weight_decay`.
        Frozen parameters are in none of them, and a kind without parameters has no dict.

    Raises:
        ValueError: a rate or decay out of range, nothing that learns, or a model without `dim_model_base`.
    """
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise ValueError(f"`learning_rate` must be a number greater than 0, got {learning_rate}.")
    if not (weight_decay >= 0 and math.isfinite(weight_decay)):
        raise ValueError(f"`weight_decay` must be a number of at least 0, got {weight_decay}.")
    matrix_rate = learning_rate / width_factor(model)
    kinds = parameter_kinds(model)
    groups = {
        kind: {
            "name": kind,
            "params": [],
            "lr": matrix_rate if kind == "matrix" else learning_rate,
            "weight_decay": weight_decay if kind == "matrix" else 0.0,
        }
        for kind in KINDS
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[kinds[name]]["params"].append(parameter)
    groups = [group for group in groups.values() if group["params"]]
    if not groups:
        raise ValueError("The model has no parameter that learns: all have `requires_grad` False.")
    return groups


__all__ = [
    "initialize_mup_",
    "mup_parameter_groups",
    "parameter_kinds",
    "standard_parametrization",
    "width_factor",
]
