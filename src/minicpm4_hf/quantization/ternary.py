"""Ternary weights as BitCPM4 has them: codes -1, 0, 1, and one scale for each group of a row; four codes a byte.

A weight is `[N, K]` (out, in). A group is `group_size` neighbouring columns of one row; -1 stands for a whole row.
"""

import torch

ROW = -1
# What the BitCPM papers train with, coarsest first: the order in which `detect_group_size` looks.
GROUP_SIZES = (ROW, 256, 128, 64, 32)
# Smallest scale that is divided by: BitNet b1.58's (arXiv:2402.17764); the BitCPM reports do not give theirs.
EPS = 1e-5
CODES_PER_BYTE = 4


def split_groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """A view `[N, K / g, g]` of `[N, K]`.

    Raises:
        ValueError: not a matrix, or `group_size` is neither -1 nor a divisor of K.
    """
    if weight.ndim != 2:
        raise ValueError(f"A weight must be a matrix [out, in], got shape {list(weight.shape)}.")
    columns = weight.shape[1]
    size = columns if group_size == ROW else group_size
    if size < 1 or columns % size:
        raise ValueError(
            f"`group_size` must be -1 (a whole row) or divide the {columns} columns of the weight, got {group_size}."
        )
    return weight.unflatten(1, (columns // size, size))


def quantize_ternary(weight: torch.Tensor, group_size: int = ROW) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a latent weight, computed in float32.

    Give the weight in the dtype it was trained in: rounding it to bfloat16 first moves weights across the thresholds
    at half a scale and changes up to 1.8 % of the codes (arXiv:2610.07853).

    Args:
        weight: `[N, K]`, any floating dtype.
        group_size: columns that share a scale, or -1 for a whole row.

    Returns:
        codes: int8 `[N, K]`, `clamp(round(W / s), -1, 1)`; ties go to zero.
        scales: float32 `[N, K / g]`, `max(mean(|W|), 1e-5)` over the group.

    Raises:
        ValueError: a shape or group size that does not fit, or a weight with NaN or infinity.

    Source: quantiser of BitCPM-CANN's and BitCPM4's technical reports; mean of absolute values as in BitNet b1.58.
    """
    groups = split_groups(weight, group_size).float()
    scales = groups.abs().mean(-1).clamp(min=EPS)
    if not scales.isfinite().all():
        raise ValueError("The weight holds NaN or infinity and cannot be quantised.")
    codes = (groups / scales.unsqueeze(-1)).round_().clamp_(-1, 1)
    return codes.to(torch.int8).flatten(1), scales


def recover_ternary(weight: torch.Tensor, group_size: int = ROW) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Codes and scales of a weight that is ternary already: every group holds 0 and one magnitude; None if not.

    Args:
        weight: `[N, K]`, any floating dtype: what `dequantize_ternary` gave, with its scales lost.
        group_size: as in `quantize_ternary`.

    Returns:
        codes int8 `[N, K]` and scales `[N, K / g]` in the weight's dtype, `max(|W|)` over the group, from which
        `dequantize_ternary` gives the weight back exactly (a negative zero comes back as zero), or None.

    Raises:
        ValueError: a shape or group size that does not fit.
    """
    groups = split_groups(weight, group_size)
    scales = groups.abs().amax(-1)
    magnitudes = groups.abs()
    if not scales.isfinite().all() or not ((magnitudes == scales.unsqueeze(-1)) | (magnitudes == 0)).all():
        return None
    return groups.sign().to(torch.int8).flatten(1), scales


def detect_group_size(weight: torch.Tensor, candidates: tuple[int, ...] = GROUP_SIZES) -> int | None:
    """The first of `candidates` for which `weight [N, K]` is exactly ternary, or None.

    Those that do not divide K are left out. A weight that is ternary by rows is so by every smaller group as well, so
    candidates go from coarse to fine.
    """
    columns = weight.shape[1]
    fitting = (size for size in candidates if size == ROW or columns % size == 0)
    return next((size for size in fitting if recover_ternary(weight, size) is not None), None)


def pack_ternary(codes: torch.Tensor) -> torch.Tensor:
    """Four codes a byte: byte j of a row holds columns 4j to 4j+3, column 4j+i in bits 2i and 2i+1, as code + 1.

    Args:
        codes: `[N, K]`, any integer dtype, K a multiple of 4.

    Returns:
        uint8 `[N, K / 4]`.

    Raises:
        ValueError: another shape, or a code that is not -1, 0 or 1.
    """
    if codes.ndim != 2 or codes.shape[1] % CODES_PER_BYTE:
        raise ValueError(
            f"Ternary codes must be a matrix whose columns are a multiple of 4, got shape {list(codes.shape)}."
        )
    if codes.numel() and (codes.min() < -1 or codes.max() > 1):
        raise ValueError(f"Ternary codes must be -1, 0 or 1, got {codes.min().item()} to {codes.max().item()}.")
    fields = (codes + 1).to(torch.uint8).unflatten(1, (-1, CODES_PER_BYTE))
    return fields[..., 0] | fields[..., 1] << 2 | fields[..., 2] << 4 | fields[..., 3] << 6


def unpack_ternary(packed: torch.Tensor) -> torch.Tensor:
    """Codes int8 `[N, K]` of `pack_ternary`'s uint8 `[N, K / 4]`.

    Raises:
        ValueError: another dtype or shape, or the bit pattern 3, which stands for no code.
    """
    if packed.ndim != 2 or packed.dtype != torch.uint8:
        raise ValueError(
            f"Packed ternary codes must be a uint8 matrix, got {packed.dtype} with shape {list(packed.shape)}."
        )
    if (packed & (packed >> 1) & 0x55).any():
        raise ValueError(
            "The packed ternary codes hold the bit pattern 3, which stands for no code; they are damaged."
        )
    return unpack_checked(packed)


def unpack_checked(packed: torch.Tensor) -> torch.Tensor:
    """`unpack_ternary` of what is known to be whole, without looking for damage."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)
    fields = (packed.unsqueeze(-1) >> shifts) & 3
    return fields.to(torch.int8).sub_(1).flatten(1)


def dequantize_ternary(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The weight `[N, K]`: each code times the scale of its group.

    Args:
        codes: `[N, K]`, integer.
        scales: `[N, K / g]`, floating; the number of its columns gives the group size.
        dtype: of the result, that of `scales` if None. Rounding a scale and rounding a product are the same here.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if codes.ndim != 2 or scales.ndim != 2 or len(codes) != len(scales) or codes.shape[1] % scales.shape[1]:
        raise ValueError(
            f"Scales of shape {list(scales.shape)} do not fit codes of shape {list(codes.shape)}: they must have as "
            "many rows, and columns that divide the codes' columns."
        )
    scales = scales.to(dtype or scales.dtype)
    groups = codes.unflatten(1, (scales.shape[1], -1)).to(scales.dtype)
    return (groups * scales.unsqueeze(-1)).flatten(1)
