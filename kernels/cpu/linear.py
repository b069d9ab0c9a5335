"""Linear layers at one to eight rows of bfloat16, native, straight from torch's row-major weights."""

import torch

from minicpm4_hf.kernels.cpu.attention import LIBRARY
from minicpm4_hf.kernels.cpu.library import LINEAR_ARGS, check_result, load_library

MAX_ROWS = 8
_NO_ROPE = (0,) * 5


def serves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the native product takes `x [..., K]` and `weight [N, K]`: few rows, bfloat16, CPU, no gradient."""
    return (
        x.dtype == torch.bfloat16
        and weight.dtype == torch.bfloat16
        and 0 < x.numel() <= MAX_ROWS * x.shape[-1]
        and x.device.type == "cpu"
        and weight.is_contiguous()
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )


def linear(
    x: torch.Tensor,
    *weights: torch.Tensor,
    gate: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    residual: tuple[torch.Tensor, float] | None = None,
    rope: tuple[torch.Tensor, torch.Tensor, int] | None = None,
) -> torch.Tensor:
    """`x @ weight.T` for up to three weights side by side, and what stands around it in a decoder layer.

    Sums are float32; each step rounds to bfloat16 where torch's own operators would.

    Args:
        x: bfloat16 `[..., K]`, one to eight rows in all.
        weights: bfloat16 `[N, K]`, contiguous.
        gate: a weight like the only other one; the result is `silu(x @ gate.T) * (x @ weight.T)`.
        norm: RMSNorm's weight `[K]` and epsilon, applied to `x` first.
        residual: `[..., N]` and a factor; the result is `residual + result * factor`.
        rope: cosine and sine, float32 `[..., D]` with a row for each of `x`, and how many heads to rotate.

    Returns:
        bfloat16 `[..., N1 + N2 + N3]`.
    """
    features = x.shape[-1]
    rows = x.reshape(-1, features)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    sizes = [weight.shape[0] for weight in weights]
    out = x.new_empty(*x.shape[:-1], sum(sizes))
    missing = (0,) * (3 - len(weights))
    addresses = [weight.data_ptr() for weight in weights]
    rotation = _NO_ROPE
    if rope is not None:
        cosine, sine = (table.reshape(-1, table.shape[-1]).contiguous() for table in rope[:2])
        stride = 0 if cosine.shape[0] == 1 else cosine.shape[1]
        rotation = (cosine.data_ptr(), sine.data_ptr(), stride, rope[2], cosine.shape[1])
    if residual is not None:
        earlier = residual[0].reshape(-1, out.shape[-1])
    arguments = LINEAR_ARGS.pack(
        rows.data_ptr(),
        out.data_ptr(),
        *addresses,
        *missing,
        0 if gate is None else gate.data_ptr(),
        *sizes,
        *missing,
        len(addresses),
        features,
        rows.shape[0],
        rows.stride(0),
        out.shape[-1],
        torch.get_num_threads(),
        *((0, 0.0) if norm is None else (norm[0].data_ptr(), norm[1])),
        *((0, 0, 0.0) if residual is None else (earlier.data_ptr(), earlier.stride(0), residual[1])),
        *rotation,
    )
    check_result(load_library().mc_linear(arguments))
    return out


LIBRARY.define("cpu_linear(Tensor x, Tensor weight) -> Tensor")
LIBRARY.impl("cpu_linear", linear, "CPU")
torch.library.register_fake(
    "minicpm4_hf::cpu_linear", lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[0]), lib=LIBRARY
)
