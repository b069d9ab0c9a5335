"""`backend="triton"`: what its kernels take, and the operators by name. Imported at the first call on a GPU."""

import torch
import triton

from minicpm4_hf.kernels.lowbit.matmul import packed_matmul

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BITS = {"ternary_linear": 2, "int4_linear": 4, "int8_linear": 8}
MAX_ROWS = 65535 * 32  # a grid's second axis has 65,535 programs, of 32 rows at least where there are many
IS_INTERPRETED = triton.knobs.runtime.interpret  # kernels run in Python, on tensors of any device


def name_misfit(name: str, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, *rest) -> str | None:
    """What the kernels take and did not get, in words; None where they can run."""
    if x.device.type != "cuda" and not IS_INTERPRETED:
        return f"the tensors are on {x.device.type}, and the Triton kernels take CUDA tensors"
    if x.is_cuda and not torch.compiler.is_compiling() and torch.cuda.get_device_capability(x.device) < (8, 0):
        return f"it takes GPUs of compute capability 8.0 or later, got {torch.cuda.get_device_name(x.device)}"
    if x.dtype not in DTYPES or scales.dtype not in DTYPES:
        return f"`x` and scales must be float16, bfloat16 or float32, got {x.dtype} and {scales.dtype}"
    if x.numel() > MAX_ROWS * x.shape[-1]:
        return f"it takes up to {MAX_ROWS} rows, got {x.numel() // x.shape[-1]}"
    columns, groups = (8 * weight.shape[0], scales.shape[0]) if BITS[name] == 4 else (x.shape[-1], scales.shape[1])
    if columns != x.shape[-1] or not groups or columns % groups:
        return f"{columns} columns do not fit {groups} groups and inputs of {x.shape[-1]}"
    return None


def run(name: str, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, *rest) -> torch.Tensor:
    """An operator of `minicpm4_hf.kernels.lowbit` over `x [..., K]`: `[..., N]`."""
    g_idx = rest[0] if rest and rest[0] is not None else None
    rows = x.reshape(-1, x.shape[-1])
    out = packed_matmul(rows, weight, scales, bits=BITS[name], g_idx=g_idx)
    return out.view(*x.shape[:-1], out.shape[-1])
