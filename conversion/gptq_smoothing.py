"""Smoothing: a layer's inputs are divided and its weights multiplied by a scale a channel, chosen before quantization.

Channels with large inputs get larger weights, so that rounding hurts them less. The division goes into what makes the
inputs (a norm's weights, `v_proj` or `up_proj`), so nothing is added at run time.

Source: AWQ (arXiv:2306.00978), the search over powers of the mean absolute input; in MiniCPM4 this step before GPTQ is
the S of S-GPTQ (arXiv:2506.07900).
"""

from collections.abc import Callable, Iterable

import torch

from minicpm4_hf.quantization.int4 import dequantize_int4, quantize_int4

from .gptq_layer import INPUT_GROUPS, LayerRunner

# Powers tried, 0 (no smoothing) among them; AWQ's grid.
POWERS = tuple(i / 20 for i in range(20))


def search_scales(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    magnitudes: torch.Tensor,
    *,
    group_size: int,
    tie: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, float]:
    """The scale of each input channel that makes rounding to nearest lose least.

    Candidates are magnitudes^p for p in `POWERS`, over the root of the product of their largest and smallest entry.
    What is compared is tr(D H D^T) with D the weights' error after rounding, which is the squared error of the outputs
    summed over the inputs that made H.

    Args:
        weight: `[N, K]`, all linears that take these inputs stacked.
        hessian: `[K, K]`, the sum of x x^T.
        magnitudes: `[K]`, mean |x|.
        tie: maps `[K]` magnitudes to `[K]` where channels must share a scale, as values do that several query heads
            read.

    Returns:
        Scales `[K]` float32, all 1 where smoothing does not help, and the power.
    """
    weight, hessian = weight.float(), hessian.float()
    magnitudes = magnitudes.float()
    if tie is not None:
        magnitudes = tie(magnitudes)
    # A channel that was never on says nothing: the smallest of the others stands in.
    alive = magnitudes > 0
    if not alive.any():
        return torch.ones_like(magnitudes), 0.0
    magnitudes = torch.where(alive, magnitudes, magnitudes[alive].min())
    best = None
    for power in POWERS:
        scales = magnitudes**power
        scales = scales / (scales.max() * scales.min()).sqrt()
        rounded = dequantize_int4(*quantize_int4(weight * scales, group_size), dtype=torch.float32)
        difference = rounded / scales - weight
        error = torch.sum(difference @ hessian * difference, dtype=torch.float64).item()
        if best is None or error < best[0]:
            best = (error, scales, power)
    return best[1], best[2]


def fold_into_norm(norm: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A norm's weights divided by the scales and rounded to their dtype, and the scales that this comes to exactly.

    Returns:
        The new weights in the dtype of `norm`, and the scales `[K]` float32 to multiply the next linears' columns by.
        A channel whose norm weight is or becomes 0 keeps scale 1.
    """
    divided = (norm.float() / scales).to(norm.dtype)
    kept = (divided == 0) | (norm == 0) | ~torch.isfinite(divided)
    divided = torch.where(kept, norm, divided)
    return divided, torch.where(kept, 1.0, norm.float() / divided.float())


def share_between_heads(num_heads: int, num_key_value_heads: int, head_dim: int) -> Callable:
    """`tie` for `o_proj`: the query heads that read one value head take the mean of their magnitudes."""

    def tie(magnitudes: torch.Tensor) -> torch.Tensor:
        groups = magnitudes.reshape(num_key_value_heads, num_heads // num_key_value_heads, head_dim)
        return groups.mean(1, keepdim=True).expand_as(groups).reshape(-1)

    return tie


# What takes in the division of each group's inputs.
SMOOTHED_BY = {
    "attention": "input_layernorm",
    "output": "self_attn.v_proj",
    "mlp": "post_attention_layernorm",
    "down": "mlp.up_proj",
}


def smooth_layer_(
    runner: LayerRunner,
    sequences: Iterable[torch.Tensor],
    group_size: int,
    skip: int,
    norm_dtype: torch.dtype,
    prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> dict[str, float]:
    """Smooth the layer that is in the runner, in place; its outputs stay what they were.

    Args:
        sequences: hidden states before the layer; gone through once.
        group_size: columns that will share a scale.
        skip: positions at the start of each sequence that are left out.
        norm_dtype: in which norms are stored; what rounding to it changes goes into the weights after it.
        prefix: keys and values before each sequence.

    Returns:
        Input group -> power chosen (see `search_scales`).
    """
    attention = runner.layer.self_attn
    heads = attention.config.num_attention_heads, attention.config.num_key_value_heads, attention.head_dim
    statistics = runner.collect(INPUT_GROUPS, sequences, skip=skip, prefix=prefix)
    powers = {}
    for group, linears in INPUT_GROUPS.items():
        weights = {linear: runner.get_weight(f"{linear}.weight") for linear in linears}
        sums = statistics.pop(group)
        scales, powers[group] = search_scales(
            torch.cat(list(weights.values())),
            sums.hessian,
            sums.magnitudes,
            group_size=group_size,
            tie=share_between_heads(*heads) if group == "output" else None,
        )
        before = f"{SMOOTHED_BY[group]}.weight"
        if before.endswith("norm.weight"):
            divided, scales = fold_into_norm(runner.get_weight(before).to(norm_dtype), scales)
            runner.set_weight(before, divided)
        else:
            rows = scales
            if group == "output":  # the query heads that read a value head have the same scales
                rows = scales.reshape(heads[1], -1, heads[2])[:, 0].reshape(-1)
            runner.set_weight(before, runner.get_weight(before) / rows[:, None])
        for linear, weight in weights.items():
            runner.set_weight(f"{linear}.weight", weight * scales)
    return powers


__all__ = ["POWERS", "SMOOTHED_BY", "fold_into_norm", "search_scales", "share_between_heads", "smooth_layer_"]
