"""Where a 4-bit code lies in the Marlin layout, and the order of its scales.

A weight has K inputs and N outputs, K a multiple of 16 and N of 64. Marlin's tensor cores multiply tiles of 16 inputs
by 16 outputs, and each of the 32 threads of a warp reads what it needs of four neighbouring tiles as four int32. So

    packed  int32 [K / 16, 2N]   one row for 16 inputs, 128 int32 for 64 outputs
    scales  [K / g, N]           as in the GPTQ layout, but with the outputs in the threads' order

and int32 number `4 t + j` of block `b` in row `a` holds, for thread t (0 to 31) and tile j (0 to 3), in bits 4p to
4p + 3 (p from 0 to 7) the code, plus 8, of

    input   16 a + 8 (p % 2) + 2 (t % 4) + p // 4
    output  64 b + 16 j + 8 (p // 2 % 2) + t // 4

A thread's share of a tile is that of the tensor core's operand: inputs 2 (t % 4) + {0, 1, 8, 9} of outputs t // 4 and
t // 4 + 8. The order of p makes one mask and one shift pick a pair of neighbouring inputs. Scales of several groups
are reordered in blocks of 64: place 8 i + j holds output i + 8 j. With one group for all inputs they are reordered in
blocks of 32: place 8 i + 2 a + c holds output 2 i + 8 a + c.

As the sizes are powers of two, each rule is a reordering of the index's bits, and both functions below are a view,
a permutation of dimensions, and a view.

Sources: Marlin (arXiv:2408.11743), and the reference code IST-DASLab/marlin `marlin/__init__.py::_get_perms`; the
same layout is vLLM's `gptq_marlin` and CPM.cu's W4A16.
"""

import torch

TILE = 16
BLOCK_OUTPUTS = 64
# (p // 4, p // 2 % 2, p % 2) are the lowest bit of the input, bit 3 of the output and bit 3 of the input.


def pack_marlin(qweight: torch.Tensor) -> torch.Tensor:
    """`qweight` of the GPTQ layout, int32 `[K / 8, N]`, in the Marlin layout, int32 `[K / 16, 2N]`.

    Raises:
        ValueError: sizes that do not fit.
    """
    check_sizes(qweight.shape[0] * 8, qweight.shape[1])
    octets = qweight.contiguous().view(torch.uint8).view(-1, 2, qweight.shape[1] // BLOCK_OUTPUTS, 4, 2, 8, 4)
    codes = torch.stack((octets & 15, octets >> 4), dim=-1)
    # inputs / 16, input bit 3, outputs / 64, tile, output bit 3, output bits 0-2, input bits 1-2, input bit 0
    codes = codes.permute(0, 2, 5, 6, 3, 7, 4, 1)  # ..., and the eight fields last
    octets = codes[..., 0] | codes[..., 1] << 4
    return octets.contiguous().flatten().view(torch.int32).view(codes.shape[0], -1)


def unpack_marlin(packed: torch.Tensor) -> torch.Tensor:
    """The reverse of `pack_marlin`.

    Raises:
        ValueError: sizes that do not fit.
    """
    check_sizes(packed.shape[0] * TILE, packed.shape[1] // 2)
    octets = packed.contiguous().view(torch.uint8).view(packed.shape[0], -1, 8, 4, 4, 2, 2)
    codes = torch.stack((octets & 15, octets >> 4), dim=-1)
    codes = codes.permute(0, 7, 1, 4, 6, 2, 3, 5)
    octets = codes[..., 0] | codes[..., 1] << 4
    return octets.contiguous().flatten().view(torch.int32).view(2 * packed.shape[0], -1)


def permute_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales `[K / g, N]` of the GPTQ layout in Marlin's order."""
    if len(scales) > 1:
        return scales.unflatten(1, (-1, 8, 8)).transpose(2, 3).flatten(1).contiguous()
    return scales.unflatten(1, (-1, 4, 4, 2)).transpose(2, 3).flatten(1).contiguous()


def unpermute_scales(scales: torch.Tensor) -> torch.Tensor:
    """The reverse of `permute_scales`, which is its own: each swaps two axes of one size."""
    return permute_scales(scales)


def check_sizes(num_inputs: int, num_outputs: int) -> None:
    """Refuse a weight that tiles do not cover.

    Raises:
        ValueError: inputs that are no multiple of 16, or outputs that are no multiple of 64.
    """
    if num_inputs % TILE or num_outputs % BLOCK_OUTPUTS or not num_inputs or not num_outputs:
        raise ValueError(
            f"Marlin's tiles need inputs in multiples of {TILE} and outputs in multiples of {BLOCK_OUTPUTS}, got "
            f"{num_inputs} and {num_outputs}."
        )
