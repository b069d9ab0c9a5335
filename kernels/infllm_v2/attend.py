"""Triton: block-sparse attention over selected blocks, forward, for prefill and training.

A tile is BQ neighbouring queries with their group. `merge_blocks_kernel` merges their sorted picks into one list, each
entry with a bit for every query that picked it; `attend_fwd_kernel` walks that list once, so that a block the queries
share is read once.

Shapes: B rows, HQ query heads, H key heads, G = HQ // H, TQ queries, TK keys, D head size, S selected blocks of BS
keys. Rows of a tile are (query, head of the group), the group padded to GP; C = BQ * GP of them.
"""

import torch
import triton
import triton.language as tl

from minicpm4_hf.kernels.infllm_v2.layout import LN_2, LOG2_E, dot_precision, locate_row, tile_of_group

NO_BLOCK = tl.constexpr(2**31 - 1)


@triton.jit
def merge_blocks_kernel(
    block_indices,
    merged,
    counts,
    kv_start,
    kv_end,
    cu_seqlens,
    TQ,
    TK,
    H,
    tiles,
    width,
    BQ: tl.constexpr,
    S: tl.constexpr,
    TILES: tl.constexpr,
):
    """Lists of TILES tiles: `merged [rows, H, tiles, width]` of `bits << (32 - BQ) | block`, ascending, `counts`."""
    i_t, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_bh // H, i_bh % H
    i_z, bos_q, num_queries, _, _ = locate_row(i_b, TQ, TK, kv_start, kv_end, cu_seqlens)
    o_tile, o_q = i_t * TILES + tl.arange(0, TILES), tl.arange(0, BQ)
    o_t = o_tile[:, None] * BQ + o_q[None, :]
    p_list = block_indices + ((i_z * H + i_h).to(tl.int64) * TQ + (bos_q + o_t).to(tl.int64)) * S
    p_merged = merged + (i_bh.to(tl.int64) * tiles + o_tile.to(tl.int64)) * width
    m_t = o_t < num_queries
    cursor = tl.zeros([TILES, BQ], tl.int32)
    head = tl.load(p_list, mask=m_t, other=-1)
    head = tl.where(head < 0, NO_BLOCK, head)
    count = tl.zeros([TILES], tl.int32)
    block = tl.min(head, 1)
    while tl.min(block, 0) < NO_BLOCK:
        found = block < NO_BLOCK
        takes = (head == block[:, None]) & found[:, None]
        bits = tl.sum(tl.where(takes, 1 << o_q[None, :], 0), 1)
        tl.store(p_merged + count, (bits << (32 - BQ)) | block, mask=found)
        count += found.to(tl.int32)
        cursor += takes.to(tl.int32)
        following = tl.load(p_list + cursor, mask=takes & (cursor < S), other=-1)
        head = tl.where(takes, tl.where(following < 0, NO_BLOCK, following), head)
        block = tl.min(head, 1)
    tl.store(counts + i_bh.to(tl.int64) * tiles + o_tile, count, mask=o_tile < tiles)


@triton.jit
def load_keys(
    p, block, o_s, o_d, stride_t, length, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, IS_EDGE: tl.constexpr
):
    """One block of keys or values, `[BS, BD]`; only the last blocks may reach beyond the row's end."""
    p_block = p + (block.to(tl.int64) * BS) * stride_t + o_s[:, None] * stride_t + o_d[None, :]
    if IS_EDGE:
        return tl.load(p_block, mask=(block * BS + o_s < length)[:, None] & (o_d < D)[None, :], other=0.0)
    elif D != BD:
        return tl.load(p_block, mask=(o_d < D)[None, :], other=0.0)
    else:
        return tl.load(p_block)


@triton.jit
def may_attend(entry, o_q, o_pos, o_s, BQ: tl.constexpr, BS: tl.constexpr, IS_EDGE: tl.constexpr):
    """Which rows of a tile see which keys of a merged entry: `[C, BS]`, or `[C, 1]` away from the causal edge."""
    picked = ((entry >> (32 - BQ)) >> o_q) & 1
    allowed = (picked != 0)[:, None]
    if IS_EDGE:
        allowed = allowed & (((entry & ((1 << (32 - BQ)) - 1)) * BS + o_s)[None, :] <= o_pos[:, None])
    return allowed


@triton.jit
def _attend_entry(
    b_q,
    b_o,
    b_m,
    b_l,
    entry,
    p_k,
    p_v,
    o_q,
    o_pos,
    o_s,
    o_d,
    stride_kt,
    stride_vt,
    length,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    BQ: tl.constexpr,
    BS: tl.constexpr,
    IS_EDGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One step of the online softmax, base 2."""
    block = entry & ((1 << (32 - BQ)) - 1)
    b_k = load_keys(p_k, block, o_s, o_d, stride_kt, length, D, BD, BS, IS_EDGE)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    b_s = tl.where(may_attend(entry, o_q, o_pos, o_s, BQ, BS, IS_EDGE), b_s, float("-inf"))
    b_new = tl.maximum(b_m, tl.max(b_s, 1))
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s - b_safe[:, None])
    b_alpha = tl.exp2(b_m - b_safe)
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    b_v = load_keys(p_v, block, o_s, o_d, stride_vt, length, D, BD, BS, IS_EDGE)
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_alpha[:, None], input_precision=PRECISION)
    return b_o, b_new, b_l


@triton.jit
def attend_fwd_kernel(
    q,
    k,
    v,
    merged,
    counts,
    o,
    lse,
    kv_start,
    kv_end,
    cu_seqlens,
    stride_qz,
    stride_qh,
    stride_qt,
    stride_kz,
    stride_kh,
    stride_kt,
    stride_vz,
    stride_vh,
    stride_vt,
    stride_oz,
    stride_oh,
    stride_ot,
    scale,
    TQ,
    TK,
    H,
    HQ,
    tiles,
    width,
    G: tl.constexpr,
    GP: tl.constexpr,
    BQ: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`o [B, HQ, TQ, D]` and the natural log-sum-exp `lse [B, HQ, TQ]`; 0 and -inf where a query picked nothing."""
    # The last tiles see most blocks: they start first.
    i_t, i_bh = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_bh // H, (i_bh % H).to(tl.int64)
    C: tl.constexpr = BQ * GP
    i_z, bos_q, num_queries, bos_k, length = locate_row(i_b, TQ, TK, kv_start, kv_end, cu_seqlens)
    if i_t * BQ >= num_queries:
        return
    i_z = i_z.to(tl.int64)
    o_c, o_d, o_s = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BS)
    o_q, o_g = o_c // GP, o_c % GP
    o_t = i_t * BQ + o_q
    o_pos = o_t + length - num_queries
    m_q = (o_t < num_queries) & (o_g < G)
    m_qd = m_q[:, None] & (o_d < D)[None, :]
    p_q = q + i_z * stride_qz + (bos_q + o_t).to(tl.int64) * stride_qt + (i_h * G + o_g) * stride_qh
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_qd, other=0.0)
    p_k = k + i_z * stride_kz + i_h * stride_kh + bos_k.to(tl.int64) * stride_kt
    p_v = v + i_z * stride_vz + i_h * stride_vh + bos_k.to(tl.int64) * stride_vt
    i_list = i_bh.to(tl.int64) * tiles + i_t
    p_list = merged + i_list * width
    count = tl.load(counts + i_list)
    scale = scale * LOG2_E

    b_o = tl.zeros([C, BD], tl.float32)
    b_m = tl.full([C], float("-inf"), tl.float32)
    b_l = tl.zeros([C], tl.float32)
    # BQ <= BS neighbours lie in two blocks at most: only the last two entries can hold keys after a query.
    inner = tl.maximum(count - 2, 0)
    for i in range(0, inner):
        b_o, b_m, b_l = _attend_entry(
            b_q,
            b_o,
            b_m,
            b_l,
            tl.load(p_list + i),
            p_k,
            p_v,
            o_q,
            o_pos,
            o_s,
            o_d,
            stride_kt,
            stride_vt,
            length,
            scale,
            D,
            BD,
            BQ,
            BS,
            False,
            PRECISION,
        )
    for i in range(inner, count):
        b_o, b_m, b_l = _attend_entry(
            b_q,
            b_o,
            b_m,
            b_l,
            tl.load(p_list + i),
            p_k,
            p_v,
            o_q,
            o_pos,
            o_s,
            o_d,
            stride_kt,
            stride_vt,
            length,
            scale,
            D,
            BD,
            BQ,
            BS,
            True,
            PRECISION,
        )

    b_o = b_o / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
    p_o = o + i_z * stride_oz + (bos_q + o_t).to(tl.int64) * stride_ot + (i_h * G + o_g) * stride_oh
    tl.store(p_o[:, None] + o_d[None, :], b_o.to(o.dtype.element_ty), mask=m_qd)
    p_lse = lse + (i_z * HQ + i_h * G + o_g) * TQ + bos_q + o_t
    tl.store(p_lse, (b_m + tl.log2(b_l)) * LN_2, mask=m_q)


def merge_blocks(
    block_indices: torch.Tensor, num_keys: int, block_size: int, tile: int, rows: tuple, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One list of blocks for every `tile` neighbouring queries; `rows` is `(kv_start, kv_end, cu_seqlens)`.

    Returns:
        `merged [rows * H, tiles, width]`, int32, `bits << (32 - tile) | block`, and how many of them count.
    """
    batch, heads, num_queries, budget = block_indices.shape
    num_rows = batch if rows[2] is None else rows[2].numel() - 1
    num_tiles = triton.cdiv(longest, tile)
    width = min(tile * budget, triton.cdiv(num_keys, block_size))
    merged = block_indices.new_empty(num_rows * heads, num_tiles, width)
    counts = block_indices.new_empty(num_rows * heads, num_tiles)
    per_program = 32
    merge_blocks_kernel[(triton.cdiv(num_tiles, per_program), num_rows * heads)](
        block_indices,
        merged,
        counts,
        *rows,
        num_queries,
        num_keys,
        heads,
        num_tiles,
        width,
        BQ=tile,
        S=budget,
        TILES=per_program,
        num_warps=2,
    )
    return merged, counts


def attend_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    *,
    block_size: int,
    scale: float,
    kv_start: torch.Tensor | None = None,
    kv_end: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of `q [B, HQ, TQ, D]` over the blocks in `block_indices [B, H, TQ, S]`: `o` and `lse [B, HQ, TQ]`."""
    batch, query_heads, num_queries, dim = q.shape
    heads, num_keys = k.shape[1], k.shape[2]
    longest = num_queries if cu_seqlens is None else max_seqlen or num_queries
    num_rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    tile, padded = tile_of_group(query_heads // heads, q.dtype)
    rows = (kv_start, kv_end, cu_seqlens)
    merged, counts = merge_blocks(block_indices, num_keys, block_size, tile, rows, longest)
    # Tokens outside every packed row are written by nobody.
    allocate = torch.empty_like if cu_seqlens is None else torch.zeros_like
    o = allocate(q)
    lse = q.new_empty(batch, query_heads, num_queries, dtype=torch.float32)
    attend_fwd_kernel[(counts.shape[1], num_rows * heads)](
        q,
        k,
        v,
        merged,
        counts,
        o,
        lse,
        *rows,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *o.stride()[:3],
        scale,
        num_queries,
        num_keys,
        heads,
        query_heads,
        counts.shape[1],
        merged.shape[2],
        G=query_heads // heads,
        GP=padded,
        BQ=tile,
        D=dim,
        BD=triton.next_power_of_2(dim),
        BS=block_size,
        PRECISION=dot_precision(q.dtype),
        **attend_launch(dim, q.dtype, tile * padded),
    )
    return o, lse


def attend_launch(dim: int, dtype: torch.dtype, rows: int) -> dict:
    """Launch settings of `attend_fwd_kernel`."""
    if dtype == torch.float32:
        return {"num_warps": 8, "num_stages": 1}
    # Few rows of a wide head: four warps would spill on sm_80.
    return {"num_warps": 8 if dim > 64 and rows < 64 else 4, "num_stages": 3 if dim > 64 else 2}
