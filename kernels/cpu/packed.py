"""Packed weights as the native code takes them: which it serves, and products with any number of rows."""

from typing import NamedTuple

import torch

from minicpm4_hf.kernels.cpu.library import DTYPES, LINEAR_CALL, LINEAR_LAYER, check_result, load_library

DENSE, TERNARY, INT4, INT8 = range(4)  # `format` in csrc/abi.h
# Columns that share a 32-bit word; a group is a whole number of words.
_WORD_COLUMNS = {TERNARY: 16, INT4: 8, INT8: 4}


class PackedWeight(NamedTuple):
    """A weight `[out_features, in_features]` as codes and scales; made by the functions below."""

    format: int
    data: torch.Tensor
    scales: torch.Tensor
    out_features: int
    in_features: int
    group_size: int
    group_of_column: torch.Tensor | None = None

    @property
    def kind(self) -> tuple:
        """Weights of one call must have this in common."""
        return self.format, self.in_features, self.group_size, self.scales.dtype


def ternary_weight(weight: torch.Tensor, scales: torch.Tensor) -> PackedWeight | None:
    """uint8 `[N, K / 4]` with scales `[N, K / g]`, as in `minicpm4_hf.quantization`; None where it is not served."""
    if weight.dtype != torch.uint8 or weight.ndim != 2 or scales.ndim != 2 or len(scales) != len(weight):
        return None
    return _row_major(TERNARY, weight, scales, 4 * weight.shape[1])


def int8_weight(weight: torch.Tensor, scales: torch.Tensor) -> PackedWeight | None:
    """int8 `[N, K]` with scales `[N, K / g]`; None where it is not served."""
    if weight.dtype != torch.int8 or weight.ndim != 2 or scales.ndim != 2 or len(scales) != len(weight):
        return None
    return _row_major(INT8, weight, scales, weight.shape[1])


def int4_weight(qweight: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor | None = None) -> PackedWeight | None:
    """int32 `[K / 8, N]` with scales `[K / g, N]` and the group of each column; None where it is not served.

    Raises:
        ValueError: a group that does not exist.
    """
    if qweight.dtype != torch.int32 or qweight.ndim != 2 or scales.ndim != 2 or scales.shape[1] != qweight.shape[1]:
        return None
    columns, outputs = 8 * qweight.shape[0], qweight.shape[1]
    if g_idx is not None:
        if g_idx.shape != (columns,):
            raise ValueError(f"`g_idx` must have shape [{columns}], got {list(g_idx.shape)}.")
        if columns and not 0 <= int(g_idx.min()) <= int(g_idx.max()) < len(scales):
            raise ValueError(f"`g_idx` must lie in 0 to {len(scales) - 1}, got {g_idx.min()} to {g_idx.max()}.")
        g_idx = g_idx.to(torch.int32).contiguous()
    return _checked(PackedWeight(INT4, qweight, scales, outputs, columns, _group_size(columns, len(scales)), g_idx))


def _row_major(format: int, weight: torch.Tensor, scales: torch.Tensor, columns: int) -> PackedWeight | None:
    packed = _checked(
        PackedWeight(format, weight, scales, len(weight), columns, _group_size(columns, scales.shape[1]))
    )
    # A vector of words holds a power of two of columns, and takes whole groups or lies in one.
    power_of_two = packed is not None and packed.group_size & (packed.group_size - 1) == 0
    return packed if power_of_two or scales.shape[1] == 1 else None


def _group_size(columns: int, groups: int) -> int:
    return columns // groups if groups and columns % groups == 0 else 0


def _checked(weight: PackedWeight) -> PackedWeight | None:
    tensors = weight.data, weight.scales
    served = (
        weight.group_size > 0
        and (weight.group_size == weight.in_features or weight.group_size % _WORD_COLUMNS[weight.format] == 0)
        and weight.scales.dtype in DTYPES
        and all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)
    )
    return weight if served else None


def matmul(x: torch.Tensor, *weights: PackedWeight) -> torch.Tensor:
    """`x [..., K]` times up to three weights of one kind, side by side: `[..., N1 + N2 + N3]` in x's dtype.

    Codes and inputs are multiplied exactly and added up in float32, but for up to eight bfloat16 rows times ternary
    codes where there is AVX512-BF16: 16 neighbouring inputs are rounded to multiples of their largest over 32,512.
    `x` is bfloat16 or float32, float16 by way of float32.
    """
    if x.dtype == torch.float16:
        return matmul(x.float(), *weights).half()
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    out = x.new_empty(*x.shape[:-1], sum(weight.out_features for weight in weights))
    if out.numel():
        call = LINEAR_CALL.pack(
            rows.data_ptr(),
            out.data_ptr(),
            *(0,) * 4,
            rows.shape[0],
            rows.stride(0),
            0,
            torch.get_num_threads(),
        )
        check_result(load_library().mc_linear(call + pack_weights(weights, dtype=x.dtype), 1))
    return out


def pack_weights(
    weights: tuple,
    *,
    gate=None,
    norm: tuple[torch.Tensor, float] | None = None,
    residual_scale: float = 0.0,
    rope: tuple[int, int] = (0, 0),
    dtype: torch.dtype = torch.bfloat16,
) -> bytes:
    """The part of `mc_linear_args` that describes a layer; weights are bfloat16 tensors or of one packed kind."""
    missing = (0,) * (3 - len(weights))
    first = weights[0]
    if isinstance(first, PackedWeight):
        sizes, columns = [weight.out_features for weight in weights], first.in_features
        data, scales = [weight.data.data_ptr() for weight in weights], [w.scales.data_ptr() for w in weights]
        gates = (0, 0) if gate is None else (gate.data.data_ptr(), gate.scales.data_ptr())
        groups = 0 if first.group_of_column is None else first.group_of_column.data_ptr()
        kind = (DTYPES[first.scales.dtype], first.group_size, groups)
    else:
        sizes, columns = [weight.shape[0] for weight in weights], first.shape[1]
        data, scales = [weight.data_ptr() for weight in weights], (0,) * len(weights)
        gates, kind = (0 if gate is None else gate.data_ptr(), 0), (0, 0, 0)
    return LINEAR_LAYER.pack(
        *data,
        *missing,
        gates[0],
        *sizes,
        *missing,
        len(weights),
        columns,
        sum(sizes),
        *((0, 0.0) if norm is None else (norm[0].data_ptr(), norm[1])),
        residual_scale,
        *rope,
        first.format if isinstance(first, PackedWeight) else DENSE,
        DTYPES[dtype],
        *scales,
        *missing,
        gates[1],
        *kind,
    )
