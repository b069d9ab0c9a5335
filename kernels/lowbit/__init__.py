"""Linear layers over packed weights: ternary, 4-bit (GPTQ layout) and 8-bit; see README.md in this folder.

`minicpm4_hf.quantization` makes such weights and defines `torch.ops.minicpm4_hf.{ternary,int4,int8}_linear` in plain
PyTorch; the door (`minicpm4_hf.kernels`) has those operators call `run_best` here on the devices with kernels.
"""

import torch

from minicpm4_hf.kernels import resolve_backend
from minicpm4_hf.quantization import linear as _reference

REFERENCES = {
    "ternary_linear": _reference.ternary_linear_reference,
    "int4_linear": _reference.int4_linear_reference,
    "int8_linear": _reference._int8_linear,
}
_CPU_DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def ternary_linear(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """`x @ W.T` for a ternary weight W `[N, K]` at two bits a code.

    Args:
        x: `[..., K]`, floating.
        weight: uint8 `[N, K / 4]`; byte j of a row holds columns 4j to 4j + 3, column 4j + i in bits 2i and 2i + 1, as
            code + 1.
        scales: `[N, K / g]`, floating: one for every g columns of a row.
        backend: "cpu" (native: x in bfloat16, float32 or float16, g a power of two from 16 on or the whole row, no
            gradient), "triton" (NVIDIA GPUs, the same dtypes, no gradient), "reference" (plain PyTorch) or "auto". A
            named backend runs or raises.

    Returns:
        `[..., N]` in x's dtype. The kernels multiply codes and inputs exactly and apply scales to float32 sums; the
        reference rounds the weight to x's dtype first.

    Raises:
        ValueError: shapes or dtypes that do not fit, or that the named backend does not serve.
        RuntimeError: the named backend is not installed.
    """
    _check(x, weight, scales, torch.uint8, 4 * weight.shape[-1], len(weight), scales.shape[:1])
    return _run("ternary_linear", (x, weight, scales), backend)


def int4_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """`x @ W.T` for a symmetric 4-bit weight W `[N, K]` in the GPTQ layout.

    Args:
        x: `[..., K]`, floating.
        qweight: int32 `[K / 8, N]`; column 8j + i in bits 4i to 4i + 3 of row j, as code + 8.
        scales: `[K / g, N]`, floating.
        g_idx: the group of each column, integer `[K]`; None where groups lie in order.
        backend: as in `ternary_linear`; g is any multiple of 8.

    Returns:
        `[..., N]` in x's dtype, exact as in `ternary_linear`; with `g_idx` the products are float32's.

    Raises:
        ValueError: shapes or dtypes that do not fit, a group that does not exist, or what the named backend does not
            serve.
        RuntimeError: the named backend is not installed.
    """
    _check(x, qweight, scales, torch.int32, 8 * len(qweight), qweight.shape[-1], scales.shape[1:])
    return _run("int4_linear", (x, qweight, scales, g_idx), backend)


def int8_linear(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """`x @ W.T` for an 8-bit weight: codes int8 `[N, K]`, scales `[N, 1]`; otherwise as `ternary_linear`."""
    _check(x, weight, scales, torch.int8, weight.shape[-1], len(weight), scales.shape[:1])
    return _run("int8_linear", (x, weight, scales), backend)


def _check(x, weight, scales, dtype, columns, outputs, scaled) -> None:
    if weight.dtype != dtype or weight.ndim != 2:
        raise ValueError(
            f"The packed weight must be a matrix of {dtype}, got {weight.dtype} of shape {list(weight.shape)}."
        )
    if not x.is_floating_point() or x.shape[-1:] != (columns,):
        raise ValueError(
            f"`x` must be floating with {columns} columns, as the weight has, got {x.dtype} of shape {list(x.shape)}."
        )
    if scales.ndim != 2 or scaled != (outputs,) or not scales.is_floating_point() or not scales.numel():
        raise ValueError(
            f"`scales` must be a floating matrix with one row or column for each of {outputs} outputs, got "
            f"{scales.dtype} of shape {list(scales.shape)}."
        )
    if not x.device == weight.device == scales.device:
        raise ValueError(
            f"`x`, weight and scales must be on one device, got {x.device}, {weight.device} and {scales.device}."
        )


def _run(name: str, arguments: tuple, backend: str) -> torch.Tensor:
    chosen, _ = resolve_backend(arguments[0].device.type, backend)
    if chosen == "reference":
        return REFERENCES[name](*arguments)
    run, reason = _prepare(chosen, name, arguments)
    if reason is None:
        return run()
    if backend != "auto":
        raise ValueError(f"The backend {backend!r} does not serve this call: {reason}.")
    return REFERENCES[name](*arguments)


def run_best(name: str, *arguments: torch.Tensor) -> torch.Tensor:
    """An operator on the best backend for its tensors, unchecked: what `torch.ops.minicpm4_hf` calls."""
    return _run(name, arguments, "auto")


def _prepare(backend: str, name: str, arguments: tuple):
    """What runs a call, and None; or None and what stands in the way, in words."""
    x = arguments[0]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments):
        return None, "gradients are recorded, and the kernels have none (`torch.ops.minicpm4_hf` has, for `x`)"
    if backend == "triton":
        from minicpm4_hf.kernels.lowbit import triton_backend

        reason = triton_backend.name_misfit(name, *arguments)
        return (None, reason) if reason else (lambda: triton_backend.run(name, *arguments), None)

    from minicpm4_hf.kernels.cpu import packed

    if x.dtype not in _CPU_DTYPES:
        return None, f"`x` is {x.dtype}, and the native kernels take bfloat16, float32 and float16"
    make = {
        "ternary_linear": packed.ternary_weight,
        "int4_linear": packed.int4_weight,
        "int8_linear": packed.int8_weight,
    }
    weight = make[name](*arguments[1:])
    if weight is None or weight.in_features != x.shape[-1]:
        return None, (
            "the native kernels take contiguous tensors, scales in float32, bfloat16 or float16, and groups of a "
            "whole row or of a power of two of columns from 16 on (4 bits: of any multiple of 8)"
        )
    return lambda: packed.matmul(x, weight), None


__all__ = ["int4_linear", "int8_linear", "run_best", "ternary_linear"]
