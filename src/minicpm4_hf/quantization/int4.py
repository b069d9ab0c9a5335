"""Symmetric 4- and 8-bit weights: quantising to the nearest code, and the GPTQ layout of 4-bit codes.

A weight is `[N, K]` (out, in); `group_size` neighbouring columns of a row share a scale, -1 stands for a whole row.
GPTQ's file layout lies the other way round, the input dimension first:

    qweight  int32 [K / 8, N]   input 8j + i in bits 4i to 4i + 3, as code + 8
    scales   float16 [K / g, N]
    qzeros   int32 [K / g, N / 8]   the zero point less one, 7 in each field (version 1 of the layout)
    g_idx    int32 [K]   the group of each input

Source: the AutoGPTQ and GPTQModel checkpoints' layout, `checkpoint_format` "gptq".
"""

import torch

from .ternary import split_groups

FIELDS = 8  # 4-bit fields of an int32
ZERO_POINT = 8
STORED_ZEROS = 0x77777777  # eight times 7
_SMALLEST_SCALE = 2.0**-24  # smallest positive float16


def int4_scales(weight: torch.Tensor, group_size: int = 128) -> torch.Tensor:
    """Scales `[N, K / g]` in float16 of a weight `[N, K]`: 2/15 of the largest absolute value of the group.

    With them no weight is further than half a scale from its code, -8 to 7.

    Raises:
        ValueError: a shape or group size that does not fit, NaN or infinity, or a weight too large for float16.

    Source: the symmetric branch of GPTQ's quantiser (arXiv:2210.17323, reference code): 15 steps from -max to max.
    """
    largest = split_groups(weight, group_size).abs().amax(-1).float()
    scales = (largest * (2 / 15)).clamp(min=_SMALLEST_SCALE).to(torch.float16)
    if not scales.isfinite().all():
        raise ValueError("The weight holds NaN, infinity, or values too large for float16 scales.")
    return scales


def quantize_int4(weight: torch.Tensor, group_size: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight `[N, K]` to the nearest code, in float32.

    Returns:
        codes: int8 `[N, K]`, -8 to 7.
        scales: float16 `[N, K / g]`, as `int4_scales` gives them; the codes are chosen for the rounded scales.

    Raises:
        ValueError: as `int4_scales`.
    """
    scales = int4_scales(weight, group_size)
    groups = split_groups(weight, group_size).float()
    codes = (groups / scales.float().unsqueeze(-1)).round_().clamp_(-8, 7)
    return codes.to(torch.int8).flatten(1), scales


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row of a weight `[N, K]` to codes -127 to 127, in float32.

    Returns:
        codes int8 `[N, K]` and scales float32 `[N, 1]`, 1/127 of the largest absolute value of the row.

    Raises:
        ValueError: not a matrix, or NaN or infinity.
    """
    rows = split_groups(weight, -1).float()
    scales = (rows.abs().amax(-1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    if not scales.isfinite().all():
        raise ValueError("The weight holds NaN or infinity and cannot be quantised.")
    return (rows / scales.unsqueeze(-1)).round_().to(torch.int8).flatten(1), scales


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """`qweight`, int32 `[K / 8, N]`, of codes `[N, K]`.

    Raises:
        ValueError: columns that are no multiple of 8, or a code outside -8 to 7.
    """
    if codes.ndim != 2 or codes.shape[1] % FIELDS:
        raise ValueError(
            f"4-bit codes must be a matrix whose columns are a multiple of 8, got shape {list(codes.shape)}."
        )
    if codes.numel() and (codes.min() < -8 or codes.max() > 7):
        raise ValueError(f"4-bit codes must lie in -8 to 7, got {codes.min().item()} to {codes.max().item()}.")
    fields = (codes + ZERO_POINT).to(torch.uint8).T.unflatten(0, (-1, FIELDS // 2, 2))  # [K / 8, 4, 2, N]
    octets = fields[:, :, 0] | fields[:, :, 1] << 4
    return octets.transpose(1, 2).contiguous().view(torch.int32).squeeze(-1)


def unpack_int4(qweight: torch.Tensor) -> torch.Tensor:
    """Codes int8 `[N, K]` of `qweight`, int32 `[K / 8, N]`."""
    octets = qweight.contiguous().view(torch.uint8).unflatten(1, (-1, 4))  # [K / 8, N, 4]
    fields = torch.stack((octets & 15, octets >> 4), dim=-1)  # [K / 8, N, 4, 2]
    return fields.to(torch.int8).sub_(ZERO_POINT).flatten(2).transpose(0, 1).flatten(1)


def group_index(num_columns: int, num_groups: int) -> torch.Tensor:
    """`g_idx` of groups in order: int32 `[K]`."""
    return torch.arange(num_columns, dtype=torch.int32) // (num_columns // num_groups)


def pack_gptq(codes: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The four tensors of a layer in the GPTQ layout.

    Args:
        codes: `[N, K]`, -8 to 7; N and K multiples of 8.
        scales: `[N, K / g]`.
        g_idx: the group of each input `[K]` where they do not lie in order (act-order).

    Raises:
        ValueError: shapes that do not fit, or a code out of range.
    """
    outputs, inputs = codes.shape
    if outputs % FIELDS:
        raise ValueError(f"The GPTQ layout needs outputs that are a multiple of 8, got {outputs}.")
    if len(scales) != outputs or inputs % scales.shape[1]:
        raise ValueError(f"Scales of shape {list(scales.shape)} do not fit codes of shape {list(codes.shape)}.")
    num_groups = scales.shape[1]
    return {
        "qweight": pack_int4(codes),
        "scales": scales.T.to(torch.float16).contiguous(),
        "qzeros": torch.full((num_groups, outputs // FIELDS), STORED_ZEROS, dtype=torch.int32),
        "g_idx": group_index(inputs, num_groups) if g_idx is None else g_idx.to(torch.int32),
    }


def unpack_gptq(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    qzeros: torch.Tensor | None = None,
    g_idx: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes int8 `[N, K]`, scales `[N, K / g]` and the group of each input, None where groups lie in order.

    Raises:
        ValueError: shapes that do not fit, zero points other than those of symmetric version-1 files, or a group index
            out of range.
    """
    inputs = qweight.shape[0] * FIELDS
    num_groups = scales.shape[0]
    if scales.shape[1:] != qweight.shape[1:] or inputs % num_groups:
        raise ValueError(f"Scales of shape {list(scales.shape)} do not fit `qweight` {list(qweight.shape)}.")
    check_zero_points(qzeros)
    if g_idx is not None and g_idx.shape != (inputs,):
        raise ValueError(f"`g_idx` must have shape [{inputs}], got {list(g_idx.shape)}.")
    return unpack_int4(qweight), scales.T.contiguous(), unordered_groups(g_idx, num_groups)


def check_zero_points(qzeros: torch.Tensor | None) -> None:
    """Refuse zero points other than 8 (stored as 7).

    Raises:
        ValueError: an asymmetric file, or one of version 2, which stores 8.
    """
    if qzeros is not None and (qzeros != STORED_ZEROS).any():
        raise ValueError(
            "The zero points in `qzeros` are not those of symmetric 4-bit weights in version 1 of the GPTQ layout "
            "(7 in every field); asymmetric files and `checkpoint_format` 'gptq_v2' need GPTQModel."
        )


def unordered_groups(g_idx: torch.Tensor | None, num_groups: int) -> torch.Tensor | None:
    """`g_idx [K]` if it says anything, None where it is absent or counts the groups in order.

    Raises:
        ValueError: a group that does not exist.
    """
    if g_idx is None or torch.equal(g_idx.cpu().to(torch.int32), group_index(len(g_idx), num_groups)):
        return None
    if g_idx.min() < 0 or g_idx.max() >= num_groups:
        raise ValueError(f"`g_idx` must lie in 0 to {num_groups - 1}, got {g_idx.min()} to {g_idx.max()}.")
    return g_idx


def dequantize_int4(
    codes: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The weight `[N, K]`: each code times the scale of its group, rounded once.

    Args:
        codes: `[N, K]`, integer of at most 8 bits.
        scales: `[N, K / g]`, floating.
        g_idx: the group of each column `[K]`, or None where groups lie in order.
        dtype: of the result, that of `scales` if None.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if codes.ndim != 2 or scales.ndim != 2 or len(codes) != len(scales) or codes.shape[1] % scales.shape[1]:
        raise ValueError(f"Scales of shape {list(scales.shape)} do not fit codes of shape {list(codes.shape)}.")
    if g_idx is not None:
        expanded = scales.float().index_select(1, g_idx)
        return (codes * expanded).to(dtype or scales.dtype)
    weight = codes.unflatten(1, (scales.shape[1], -1)) * scales.float().unsqueeze(-1)
    return weight.flatten(1).to(dtype or scales.dtype)
