"""Triton: rows times a packed weight, the codes decoded in the tile; few rows are split along the columns.

Shapes: M rows of x, N outputs, K columns. An entry is what the weight stores at a time: a byte with 4 ternary codes,
an int32 with 8 four-bit codes, or a byte with one code; it has FIELDS columns. Field f of neighbouring entries is
decoded at once and multiplied with columns f, f + FIELDS, ... of x, so that nothing is interleaved.
"""

import torch
import triton
import triton.language as tl

from minicpm4_hf.kernels.infllm_v2.decode import count_processors
from minicpm4_hf.kernels.infllm_v2.layout import dot_precision

FIELDS = {2: 4, 4: 8, 8: 1}  # columns of an entry, by the bits of a code
SPLIT_ROWS = 64  # up to here the columns are split over programs: one tile of rows does not fill the device
MAX_SPLITS = 32


@triton.jit
def decode_field(entries, f: tl.constexpr, BITS: tl.constexpr):
    """Field f of each entry, as an integer code."""
    if BITS == 2:
        return ((entries.to(tl.int32) >> (2 * f)) & 3) - 1
    elif BITS == 4:
        return ((entries >> (4 * f)) & 15) - 8
    else:
        return entries.to(tl.int32)


@triton.jit
def packed_matmul_kernel(
    x,
    weight,
    scales,
    g_idx,
    out,
    M,
    N,
    entries,
    share,
    stride_xm,
    stride_xe,
    stride_xf,
    stride_wn,
    stride_we,
    stride_sn,
    stride_sg,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    GROUP: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out [splits, M, N]`: this program's tile over entries `i_s * share` and following, `share` of them.

    GROUP is the columns of a group, 0 for whole rows. Scales multiply the float32 sums of a group, or with BY_COLUMN
    (groups smaller than a tile, or out of order) the codes.
    """
    i_n, i_m, i_s = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    o_m, o_n, o_e = i_m * BM + tl.arange(0, BM), i_n.to(tl.int64) * BN + tl.arange(0, BN), tl.arange(0, BE)
    m_m, m_n = o_m < M, o_n < N
    p_x = x + o_m[:, None] * stride_xm
    p_w = weight + o_n[None, :] * stride_wn
    p_s = scales + o_n * stride_sn
    b_o = tl.zeros([BM, BN], tl.float32)
    end = tl.minimum((i_s + 1) * share, entries)
    for first in range(i_s * share, end, BE):
        o_k = first + o_e
        m_k = o_k < end
        b_w = tl.load(p_w + o_k[:, None].to(tl.int64) * stride_we, mask=m_k[:, None] & m_n[None, :], other=0)
        b_part = tl.zeros([BM, BN], tl.float32)
        for f in tl.static_range(FIELDS):
            p_field = p_x + f * stride_xf + o_k[None, :].to(tl.int64) * stride_xe
            b_x = tl.load(p_field, mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_c = decode_field(b_w, f, BITS).to(tl.float32)
            if BY_COLUMN:
                if g_idx is not None:
                    o_g = tl.load(g_idx + o_k * FIELDS + f, mask=m_k, other=0).to(tl.int64)
                else:
                    o_g = ((o_k * FIELDS + f) // GROUP).to(tl.int64)
                p_scale = p_s[None, :] + o_g[:, None] * stride_sg
                b_c *= tl.load(p_scale, mask=m_k[:, None] & m_n[None, :], other=0.0).to(tl.float32)
            b_part = tl.dot(b_x, b_c.to(b_x.dtype), b_part, input_precision=PRECISION)
        if BY_COLUMN or GROUP == 0:
            b_o += b_part
        else:
            i_g = tl.full([], 0, tl.int64) + first * FIELDS // GROUP  # `first` is an int in the interpreter
            b_o += b_part * tl.load(p_s + i_g * stride_sg, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if not BY_COLUMN and GROUP == 0:
        b_o *= tl.load(p_s, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_o = out + (i_s * M + o_m)[:, None] * N + o_n[None, :]
    tl.store(p_o, b_o.to(out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def sum_splits_kernel(parts, out, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """`out [size]` from `parts [SPLITS, size]`, float32, added up in order."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_o = tl.zeros([BLOCK], tl.float32)
    for i in range(SPLITS):
        b_o += tl.load(parts + i * size + o, mask=o < size, other=0.0)
    tl.store(out + o, b_o.to(out.dtype.element_ty), mask=o < size)


def choose_tile(rows: int, bits: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """BM, BN, BE and warps: a tile has 128 columns; float32 has registers for half the outputs.

    Four warps would spill on sm_80 or sm_90 where a tile has many rows or many entries, or is of float32.
    """
    entries = {2: 32, 4: 16, 8: 128}[bits]
    if dtype == torch.float32:
        return (16 if rows <= 16 else 32), 64, max(entries // 2, 16), 8
    if rows <= SPLIT_ROWS:
        tile_rows = min(max(triton.next_power_of_2(rows), 16), 32 if bits == 2 else SPLIT_ROWS)
        return tile_rows, 64, entries, 4 if tile_rows <= 32 and bits < 8 else 8
    return (128 if bits == 8 else 64), 128, min(entries, 64), 8  # 128 rows of decoded fields would spill on sm_80


def choose_splits(rows: int, outputs: int, entries: int, tile: tuple, processors: int) -> int:
    """Programs along the columns: as many as give every processor two, each with at least one tile."""
    if rows > SPLIT_ROWS:
        return 1
    tiles = triton.cdiv(outputs, tile[1]) * triton.cdiv(rows, tile[0])
    return max(min(triton.cdiv(2 * processors, tiles), triton.cdiv(entries, tile[2]), MAX_SPLITS), 1)


def packed_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    *,
    bits: int,
    g_idx: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x [M, K]` times a weight of 2, 4 or 8 bits as `minicpm4_hf.kernels.lowbit` describes them: `[M, N]`.

    Products of few rows are split along K and added up in a fixed order: the same in every run.
    """
    rows, fields = x.shape[0], FIELDS[bits]
    if bits == 4:
        (entries, outputs), groups = weight.shape, scales.shape[0]
        weight_strides, scale_strides = weight.stride()[::-1], scales.stride()[::-1]
    else:
        (outputs, entries), groups = weight.shape, scales.shape[1]
        weight_strides, scale_strides = weight.stride(), scales.stride()
    out = x.new_empty(rows, outputs)
    if not out.numel():
        return out
    group = 0 if groups == 1 and g_idx is None else entries * fields // groups
    tile = choose_tile(rows, bits, x.dtype)
    block_rows, block_outputs, block_entries, num_warps = tile
    splits = choose_splits(rows, outputs, entries, tile, count_processors(x.device))
    share = triton.cdiv(triton.cdiv(entries, block_entries), splits) * block_entries
    splits = triton.cdiv(entries, share)
    strides = x.stride(0), fields * x.stride(1), x.stride(1)
    if rows > SPLIT_ROWS and fields > 1:
        # The columns of a field side by side: read often, so worth a copy.
        x = x.reshape(rows, entries, fields).permute(2, 0, 1).contiguous()
        strides = x.stride(1), x.stride(2), x.stride(0)
    # Scales of every column need shared memory, and wide tiles of few rows registers, that a third stage would take.
    by_column = g_idx is not None or bool(group and group % (block_entries * fields))
    parts = out if splits == 1 else x.new_empty(splits, rows, outputs, dtype=torch.float32)
    packed_matmul_kernel[(triton.cdiv(outputs, block_outputs), triton.cdiv(rows, block_rows), splits)](
        x,
        weight,
        scales,
        g_idx,
        parts,
        rows,
        outputs,
        entries,
        share,
        *strides,
        *weight_strides,
        *scale_strides,
        BITS=bits,
        FIELDS=fields,
        GROUP=group,
        BY_COLUMN=by_column,
        BM=block_rows,
        BN=block_outputs,
        BE=block_entries,
        PRECISION=dot_precision(x.dtype),
        num_warps=num_warps,
        num_stages=2 if by_column or (num_warps == 8 and rows <= SPLIT_ROWS) else 3,
    )
    if splits > 1:
        block = 1024
        sum_splits_kernel[(triton.cdiv(out.numel(), block),)](
            parts, out, out.numel(), SPLITS=splits, BLOCK=block, num_warps=4
        )
    return out
