"""GPTQ on one weight matrix: int4 codes that keep a layer's outputs, given the second moments of its inputs.

Legend: N outputs, K inputs, g columns that share a scale.

Sources: Frantar et al., GPTQ (arXiv:2210.17323), algorithm 1. That the first positions of a text are left out of the
Hessian (P-GPTQ) is from the MiniCPM4 technical report (arXiv:2506.07900); it happens where the Hessian is summed.
"""

import torch

from minicpm4_hf.quantization.int4 import dequantize_int4, int4_scales

# Columns whose errors are applied to the columns after their block in one matrix product.
BLOCK_COLUMNS = 128
# Share of the mean of the Hessian's diagonal that is added to it: the value of the authors' code.
DAMPING = 0.01


def quantize_gptq(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    group_size: int = 128,
    act_order: bool = False,
    damping: float = DAMPING,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Int4 codes of a weight, column by column, each column's error made up for by the columns that are still to come.

    Rows do not depend on each other: weights that have the same inputs can be quantized in one call, stacked.

    A column whose input was never seen (0 on the Hessian's diagonal) is rounded to nearest. The authors' code sets it
    to zero instead, which would cut off an input that is alive at the positions left out of the Hessian only.

    Args:
        weight: `[N, K]`, any float dtype; computed in float32.
        hessian: `[K, K]`, the sum of x x^T over inputs x; any positive factor is as good.
        group_size: columns that share a scale: a divisor or a multiple of `BLOCK_COLUMNS`, or -1 for all.
        act_order: take the columns by falling input energy. The scales then come from the given weight, so that groups
            stay those of the columns' own order and the result needs no permutation when it runs; without it a group's
            scales come from its columns as the ones before have changed them.
        damping: share of the mean of the Hessian's diagonal that is added to the diagonal.

    Returns:
        `codes [N, K]` int8 from -8 to 7 and `scales [N, K / g]` float16, as `quantize_int4`.

    Raises:
        ValueError: shapes that do not fit, a Hessian that is not finite, or one that is not positive definite with
            this damping.
    """
    num_rows, num_columns = weight.shape
    if tuple(hessian.shape) != (num_columns, num_columns):
        raise ValueError(
            f"`hessian` must be [{num_columns}, {num_columns}] for a weight of shape {list(weight.shape)}, got "
            f"{list(hessian.shape)}."
        )
    group_size = num_columns if group_size == -1 else group_size
    order, scales = torch.arange(num_columns, device=weight.device), int4_scales(weight, group_size).float()
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        hessian = hessian[order][:, order]
    factor = inverse_factor(hessian, damping)

    left = weight.float().t()[order]  # a copy, transposed: a column of the weight is contiguous
    codes = torch.empty(num_columns, num_rows, dtype=torch.int8, device=weight.device)
    for begin in range(0, num_columns, BLOCK_COLUMNS):
        end = min(begin + BLOCK_COLUMNS, num_columns)
        block, errors = left[begin:end], torch.empty_like(left[begin:end])
        groups = (order[begin:end] // group_size).tolist()
        block_factor = factor[begin:end, begin:end]
        for i, group in enumerate(groups):
            if not act_order and (begin + i) % group_size == 0:
                # All errors so far are in these columns: a group that goes beyond the block begins with it.
                scales[:, group] = int4_scales(left[begin + i : begin + i + group_size].t(), group_size)[:, 0]
            codes[begin + i], dequantized = _round_column(block[i], scales[:, group])
            errors[i] = (block[i] - dequantized) / block_factor[i, i]
            block[i + 1 :].addcmul_(block_factor[i, i + 1 :, None], errors[i, None], value=-1)
        left[end:].addmm_(factor[begin:end, end:].t(), errors, alpha=-1)
    in_order = torch.empty_like(codes)
    in_order[order] = codes
    return in_order.t().contiguous(), scales.to(torch.float16)


def _round_column(column: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nearest codes and their values `[N]`."""
    codes = (column / scales).round_().clamp_(-8, 7)
    return codes.to(torch.int8), codes * scales


def inverse_factor(hessian: torch.Tensor, damping: float = DAMPING) -> torch.Tensor:
    """Upper triangular U, float32 `[K, K]`, with U^T U the inverse of the damped Hessian.

    Computed in float64 without forming the inverse: if J reverses the order and J H J = L L^T, then U = (J L J)^-1.
    Takes about four `[K, K]` float64 matrices of memory.

    Raises:
        ValueError: `damping` is not positive, or the Hessian is not finite or not positive definite.
    """
    if not damping > 0:
        raise ValueError(f"`damping` must be greater than 0, got {damping}.")
    mean = hessian.diagonal().double().mean()
    if not torch.isfinite(mean) or not torch.isfinite(hessian).all():
        raise ValueError("The Hessian is not finite: an input of this layer is infinite or NaN.")
    damped = hessian.flip(0, 1).double()  # a copy, J H J
    # An all-zero Hessian says that nothing is known of the inputs: the identity, which rounds to nearest.
    damped.diagonal().add_(damping * mean if mean > 0 else 1.0)
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if failed:
        raise ValueError(
            f"The Hessian is not positive definite with a damping of {damping}; give a larger one, such as "
            f"{10 * damping:g}."
        )
    upper = lower.flip(0, 1)
    del lower
    identity = torch.eye(upper.shape[0], dtype=upper.dtype, device=upper.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True).float()


def output_error(
    weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, hessian: torch.Tensor | None
) -> tuple[float, float]:
    """Squared error of a layer's outputs, and their squared norm, summed over the inputs that `hessian` was made of.

    Args:
        weight, codes, scales, hessian: as in `quantize_gptq`; None stands for the identity.

    Returns:
        tr(D H D^T) with D the error of the weights, and tr(W H W^T).
    """
    weight = weight.float()
    results = []
    for matrix in (dequantize_int4(codes, scales, dtype=torch.float32) - weight, weight):
        product = matrix if hessian is None else matrix @ hessian.float()
        results.append(torch.sum(product * matrix, dtype=torch.float64).item())
    return results[0], results[1]


__all__ = ["BLOCK_COLUMNS", "DAMPING", "inverse_factor", "output_error", "quantize_gptq"]
