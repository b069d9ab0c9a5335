"""Linear layers at one to eight rows of bfloat16, native, straight from torch's row-major weights."""

import torch

from minicpm4_hf.kernels.cpu.library import LINEAR_ARGS, check_result, load_library

MAX_ROWS = 8


def serves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the native product takes `x [..., K]` and `weight [N, K]`: few rows, bfloat16, CPU, no gradient."""
    return (
        x.dtype == torch.bfloat16
        and weight.dtype == torch.bfloat16
        and x.numel() <= MAX_ROWS * x.shape[-1]
        and x.numel() > 0
        and x.device.type == "cpu"
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )


def linear(x: torch.Tensor, *weights: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T` for up to three weights side by side, or `silu(x @ gate.T) * (x @ weight.T)`.

    Args:
        x: bfloat16 `[..., K]`, one to eight rows in all.
        weights: bfloat16 `[N, K]`, contiguous.
        gate: like the one weight.

    Returns:
        bfloat16 `[..., N1 + N2 + N3]`; sums in float32, rounded once (the gated product where torch rounds it).
    """
    features = x.shape[-1]
    rows = x.reshape(-1, features)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    sizes = [weight.shape[0] for weight in weights]
    out = x.new_empty(*x.shape[:-1], sum(sizes))
    missing = 3 - len(weights)
    arguments = LINEAR_ARGS.pack(
        rows.data_ptr(),
        out.data_ptr(),
        *[weight.data_ptr() for weight in weights],
        *(0,) * missing,
        0 if gate is None else gate.data_ptr(),
        *sizes,
        *(0,) * missing,
        len(weights),
        features,
        rows.shape[0],
        rows.stride(0),
        out.shape[-1],
        torch.get_num_threads(),
    )
    check_result(load_library().mc_linear(arguments))
    return out
