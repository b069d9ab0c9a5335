"""Weights as blocks of the GGUF types: what each type asks of a row, and rows of numbers or of codes as its bytes.

A block is a run of columns of one row. Where the weights are codes already, ternary or of 4 bits, and the type has the
same codes, they are carried over as they are: no number is rounded.
"""

from dataclasses import dataclass

import gguf
import numpy as np
import torch
from gguf.quants import dequantize, quantize

from minicpm4_hf.quantization.int4 import ZERO_POINT
from minicpm4_hf.quantization.ternary import GROUP_SIZES, ROW, dequantize_ternary, detect_group_size, recover_ternary

TERNARY_TYPES = ("tq1_0", "tq2_0")
_FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class CodedRows:
    """Some rows of a weight that is stored as codes.

    Attributes:
        codes: int8 `[n, K]`: -1 to 1 at 2 bits, -8 to 7 at 4 bits.
        scales: float32 `[n, K / g]`.
        bits: 2 or 4.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def values(self) -> torch.Tensor:
        """The weights `[n, K]`, float32."""
        return dequantize_ternary(self.codes, self.scales)


def ggml_type(name: str) -> gguf.GGMLQuantizationType:
    """The type of that name in the gguf package."""
    return gguf.GGMLQuantizationType[name.upper()]


def file_type(name: str) -> gguf.LlamaFileType:
    """What `general.file_type` says of a file whose layers are of this type."""
    return gguf.LlamaFileType.ALL_F32 if name == "f32" else gguf.LlamaFileType[f"MOSTLY_{name.upper()}"]


def block_columns(name: str) -> int:
    """Columns of a block; rows must be a multiple of it."""
    return gguf.GGML_QUANT_SIZES[ggml_type(name)][0]


def row_bytes(columns: int, name: str) -> int:
    """Bytes of a row of `columns` weights."""
    block, size = gguf.GGML_QUANT_SIZES[ggml_type(name)]
    return columns // block * size


def encode(rows: torch.Tensor | CodedRows, name: str, what: str) -> np.ndarray:
    """Rows as the bytes of a type.

    Args:
        rows: floating `[n, K]`, or codes. Numbers are rounded to the type, except that a ternary type takes only
            `CodedRows`, see `as_ternary`.
        name: of the type.
        what: the tensor, for errors.

    Returns:
        uint8 `[n, bytes]`.

    Raises:
        ValueError: a weight too large for float16, or codes that the type cannot carry.
    """
    if name in TERNARY_TYPES:
        return _ternary_blocks(rows, name, what)
    if isinstance(rows, CodedRows) and rows.bits == 4 and name == "q4_0":
        return _q4_0_blocks(rows, what)
    values = rows.values() if isinstance(rows, CodedRows) else rows
    if name in _FLOATS:
        converted = values.to(_FLOATS[name]).contiguous()
        if not converted.isfinite().all():
            raise ValueError(f"{what} holds {_largest(values)}, too large for {name}; choose f32 or bf16.")
        return converted.view(torch.uint8).numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        octets = quantize(values.float().numpy(), ggml_type(name))
    if not np.isfinite(_scales(octets, name)).all():
        raise ValueError(f"{what} holds {_largest(values)}, too large for {name}, whose scales are float16.")
    return octets


def decode(octets: np.ndarray, name: str) -> torch.Tensor:
    """The weights that bytes of a type stand for: uint8 `[n, bytes]` to float32 `[n, K]`."""
    if name in _FLOATS:
        return torch.from_numpy(octets).view(_FLOATS[name]).float()
    return torch.from_numpy(dequantize(octets, ggml_type(name)))


class NotTernaryError(ValueError):
    """A weight has more than one magnitude in some group of every size."""


def as_ternary(weight: torch.Tensor, what: str, name: str) -> CodedRows:
    """Codes and scales of a weight that is ternary already, over blocks of the type.

    Args:
        weight: floating `[n, K]`, K a multiple of the type's block.
        what: the tensor, for errors.
        name: of the type.

    Raises:
        NotTernaryError: the weight is not ternary.
        ValueError: it is, but in groups finer than a block.
    """
    block = block_columns(name)
    found = recover_ternary(weight.float(), block)
    if found is not None:
        return CodedRows(*found, bits=2)
    finer = detect_group_size(weight, tuple(size for size in GROUP_SIZES if size != ROW and size < block))
    if finer is None:
        raise NotTernaryError(
            f"{what} is not ternary, though the layers before it are; {name} carries only ternary weights exactly."
        )
    raise ValueError(
        f"{what} is ternary in groups of {finer} columns, and {name} has one scale for {block}; choose another type."
    )


def _ternary_blocks(rows: CodedRows, name: str, what: str) -> np.ndarray:
    """Blocks of 256 codes, then a float16 scale."""
    block = block_columns(name)
    if rows.group_size % block:
        raise ValueError(
            f"{what} has a scale for every {rows.group_size} columns, and {name} has one for {block}; choose another "
            "type, or quantise to groups that are a multiple of it (a whole row, or 256)."
        )
    halves = rows.scales.to(torch.float16)
    inexact = halves.float() != rows.scales
    if inexact.any():
        row, group = inexact.nonzero()[0].tolist()
        raise ValueError(
            f"{what} has the scale {rows.scales[row, group].item():.9g}, and {name} has float16 scales, which cannot "
            "hold it exactly; have scales rounded (`--round-scales`), or choose another type."
        )
    pack = {"tq1_0": _tq1_0_codes, "tq2_0": _tq2_0_codes}[name]
    codes = pack((rows.codes + 1).to(torch.uint8).unflatten(1, (-1, block)))
    return torch.cat((codes, _scale_octets(halves, rows.group_size // block)), dim=-1).flatten(1).numpy()


def _tq2_0_codes(digits: torch.Tensor) -> torch.Tensor:
    """Digits 0 to 2 `[n, blocks, 256]` to 64 bytes a block: of each 128, digit i + 32j in bits 2j, 2j + 1 of byte i.

    Source: llama.cpp's `ggml-quants.c`, `quantize_row_tq2_0_ref`.
    """
    parts = digits.unflatten(-1, (2, 4, 32))
    return (parts[..., 0, :] | parts[..., 1, :] << 2 | parts[..., 2, :] << 4 | parts[..., 3, :] << 6).flatten(-2)


def _tq1_0_codes(digits: torch.Tensor) -> torch.Tensor:
    """Digits 0 to 2 `[n, blocks, 256]` to 52 bytes a block: five digits a byte, four in each of the last four.

    A byte holds the number in base 3, first digit highest, as a fraction of 3 ** 5 in units of 1 / 256, rounded up.

    Source: llama.cpp's `ggml-quants.c`, `quantize_row_tq1_0_ref`.
    """
    octets = []
    for part, per_byte in zip(digits.split((160, 80, 16), dim=-1), (5, 5, 4), strict=True):
        number = torch.zeros((), dtype=torch.int32)
        for place, digit in enumerate(part.unflatten(-1, (per_byte, -1)).unbind(-2)):
            number = number + digit.to(torch.int32) * 3 ** (4 - place)
        octets.append((number * 256 + 242) // 243)
    return torch.cat(octets, dim=-1).to(torch.uint8)


def _scale_octets(halves: torch.Tensor, blocks: int) -> torch.Tensor:
    """Scales float16 `[n, groups]` as bytes uint8 `[n, groups * blocks, 2]`, each for `blocks` blocks."""
    return halves.repeat_interleave(blocks, dim=1).unsqueeze(-1).contiguous().view(torch.uint8)


def _q4_0_blocks(rows: CodedRows, what: str) -> np.ndarray:
    """Q4_0 blocks of 32 codes: a float16 scale, then byte i with code i + 8 in its low and i + 24 in its high half.

    Source: llama.cpp's `ggml-common.h`.
    """
    block = block_columns("q4_0")
    if rows.group_size % block:
        raise ValueError(
            f"{what} has a scale for every {rows.group_size} columns, and q4_0 has one for {block}; choose another "
            "type, such as q8_0."
        )
    fields = (rows.codes + ZERO_POINT).to(torch.uint8).unflatten(1, (-1, 2, block // 2))
    codes = fields[:, :, 0] | fields[:, :, 1] << 4  # [n, blocks, 16]
    scales = _scale_octets(rows.scales.to(torch.float16), rows.group_size // block)
    return torch.cat((scales, codes), dim=-1).flatten(1).numpy()


def _scales(octets: np.ndarray, name: str) -> np.ndarray:
    """The float16 scales of Q8_0 or Q4_0 blocks, which begin with them."""
    blocks = octets.reshape(-1, row_bytes(block_columns(name), name))
    return np.ascontiguousarray(blocks[:, :2]).view(np.float16)


def _largest(values: torch.Tensor) -> str:
    return f"{values.abs().max().item():.3g}"
