"""Triton: pooled keys -> block scores -> the blocks each query attends to, for prefill and training.

Two passes over pooled keys: `lse_fwd_kernel` (coarse stream) and `score_fwd_kernel` (fine stream, summed over the
query group and max-pooled to blocks on chip), then `topk_fwd_kernel`. Written to memory are the log-sum-exp `[HQ, TQ]`
and, a chunk of queries at a time, the block scores `[H, chunk, NB]`.

Shapes: B rows, HQ query heads, H key heads, G = HQ // H, TQ queries, D head size, N pooled keys, NB blocks, S selected
ones. Rows of a tile are (query, head of the group), the group padded to GP; C = BQ * GP of them.
"""

import torch
import triton
import triton.language as tl

from minicpm4_hf.kernels.infllm_v2.layout import (
    COARSE,
    LOG2_E,
    MAX_EXPONENT,
    count_windows,
    dot_precision,
    locate_row,
    tile_of_group,
)

# Block scores in memory at a time: little beside the keys, and enough work for each launch to fill the device.
SCORE_BYTES = 64 * 1024 * 1024
MAX_PLANES = 3  # blocks one window may touch


@triton.jit
def running_lse(
    b_q,
    p_k,
    num_seen,
    max_seen,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Base-2 log-sum-exp `[C]` of `b_q [C, BD]` over the first `num_seen [C]` of contiguous pooled keys."""
    o_d = tl.arange(0, BD)
    b_m = tl.full([C], float("-inf"), tl.float32)
    b_l = tl.zeros([C], tl.float32)
    for i_n in range(0, tl.cdiv(max_seen, BN)):
        o_n = i_n * BN + tl.arange(0, BN)
        mask = (o_n < max_seen)[:, None] & (o_d < D)[None, :]
        b_k = tl.load(p_k + o_n[:, None] * D + o_d[None, :], mask=mask, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        b_s = tl.where(o_n[None, :] < num_seen[:, None], b_s, float("-inf"))
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_l = b_l * tl.exp2(b_m - b_safe) + tl.sum(tl.exp2(b_s - b_safe[:, None]), 1)
        b_m = b_new
    return b_m + tl.log2(b_l)


@triton.jit
def estimate_lse(
    b_q,
    p_f,
    p_c,
    o_pos,
    scale,
    D: tl.constexpr,
    BD: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    LSE_APPROX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Log-sum-exp `[C]` at positions `o_pos`: coarse; exact where a query sees no coarse window; 0 without any."""
    first, last = tl.min(o_pos, 0), tl.max(o_pos, 0)
    num_fine = count_windows(o_pos + 1, SIZE, STRIDE)
    if LSE_APPROX:
        num_coarse = count_windows(o_pos + 1, COARSE * SIZE, COARSE * STRIDE)
        most = count_windows(last + 1, COARSE * SIZE, COARSE * STRIDE)
        b_lse = running_lse(b_q, p_c, num_coarse, most, scale, D, BD, C, BN, PRECISION)
        if first + 1 < COARSE * SIZE:
            most = count_windows(tl.minimum(last + 1, COARSE * SIZE - 1), SIZE, STRIDE)
            b_exact = running_lse(b_q, p_f, num_fine, most, scale, D, BD, C, BN, PRECISION)
            b_lse = tl.where(o_pos + 1 < COARSE * SIZE, b_exact, b_lse)
    else:
        most = count_windows(last + 1, SIZE, STRIDE)
        b_lse = running_lse(b_q, p_f, num_fine, most, scale, D, BD, C, BN, PRECISION)
    return tl.where(num_fine > 0, b_lse, 0.0)


@triton.jit
def lse_fwd_kernel(
    q,
    k_cmp,
    k_coarse,
    lse,
    kv_start,
    kv_end,
    cu_seqlens,
    stride_qz,
    stride_qh,
    stride_qt,
    stride_fz,
    stride_fh,
    stride_cz,
    stride_ch,
    scale,
    first_query,
    TQ,
    TK,
    H,
    HQ,
    G: tl.constexpr,
    GP: tl.constexpr,
    BQ: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    BS: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    BUDGET: tl.constexpr,
    LSE_APPROX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`lse [HQ, TQ]` of each query, base 2; skipped where no query of the tile has to choose."""
    i_t, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_bh // H, (i_bh % H).to(tl.int64)
    C: tl.constexpr = BQ * GP
    i_z, bos_q, num_queries, bos_k, length = locate_row(i_b, TQ, TK, kv_start, kv_end, cu_seqlens)
    o_c, o_d = tl.arange(0, C), tl.arange(0, BD)
    o_t, o_g = first_query + i_t * BQ + o_c // GP, o_c % GP
    o_pos = tl.minimum(o_t, num_queries - 1) + length - num_queries
    if (tl.max(o_pos, 0) // BS + 1 <= BUDGET) | (first_query + i_t * BQ >= num_queries):
        return
    i_z = i_z.to(tl.int64)
    m_q = (o_t < num_queries) & (o_g < G)
    p_q = q + i_z * stride_qz + (bos_q + o_t).to(tl.int64) * stride_qt + (i_h * G + o_g) * stride_qh
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_q[:, None] & (o_d < D)[None, :], other=0.0)
    p_f = k_cmp + i_z * stride_fz + i_h * stride_fh
    p_c = k_coarse + i_z * stride_cz + i_h * stride_ch
    if cu_seqlens is not None:
        p_f += (bos_k // STRIDE).to(tl.int64) * D
        p_c += (bos_k // (COARSE * STRIDE)).to(tl.int64) * D
    b_lse = estimate_lse(b_q, p_f, p_c, o_pos, scale * LOG2_E, D, BD, C, BN, SIZE, STRIDE, LSE_APPROX, PRECISION)
    p_lse = lse + (i_z * HQ + i_h * G + o_g) * TQ + bos_q + o_t
    tl.store(p_lse, b_lse, mask=m_q)


@triton.jit
def score_fwd_kernel(
    q,
    k_cmp,
    lse,
    scores,
    kv_start,
    kv_end,
    cu_seqlens,
    stride_qz,
    stride_qh,
    stride_qt,
    stride_fz,
    stride_fh,
    stride_plane,
    scale,
    first_query,
    chunk,
    TQ,
    TK,
    NB,
    H,
    HQ,
    G: tl.constexpr,
    GP: tl.constexpr,
    BQ: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BM: tl.constexpr,
    BS: tl.constexpr,
    STRIDE: tl.constexpr,
    PER_KERNEL: tl.constexpr,
    PLANES: tl.constexpr,
    BUDGET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Block scores of queries `first_query ..`, `[PLANES, rows, H, chunk, NB]`; plane d holds block b's at b + d.

    Window `PER_BLOCK * m + j` touches block m and, d blocks on, m + d where `j + PER_KERNEL - 1 >= d * PER_BLOCK`. The
    loop takes the windows of BM blocks with one j at a time, so that pooling is a maximum of whole tiles. Scores are
    held as `[windows, rows]`: a group lies in neighbouring columns, and summing over it stays within four lanes.
    """
    i_t, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_bh // H, (i_bh % H).to(tl.int64)
    C: tl.constexpr = BQ * GP
    PER_BLOCK: tl.constexpr = BS // STRIDE
    SIZE: tl.constexpr = PER_KERNEL * STRIDE
    i_z, bos_q, num_queries, bos_k, length = locate_row(i_b, TQ, TK, kv_start, kv_end, cu_seqlens)
    i_z = i_z.to(tl.int64)
    o_c, o_d = tl.arange(0, C), tl.arange(0, BD)
    o_t, o_g = first_query + i_t * BQ + o_c // GP, o_c % GP
    o_pos = tl.minimum(o_t, num_queries - 1) + length - num_queries
    last = tl.max(o_pos, 0)
    if (last // BS + 1 <= BUDGET) | (first_query + i_t * BQ >= num_queries):
        return
    m_q = (o_t < num_queries) & (o_g < G)
    p_q = q + i_z * stride_qz + (bos_q + o_t).to(tl.int64) * stride_qt + (i_h * G + o_g) * stride_qh
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_q[:, None] & (o_d < D)[None, :], other=0.0)
    b_q = tl.trans(b_q)  # [BD, C]
    # Rows that pad the group weigh nothing.
    b_lse = tl.load(lse + (i_z * HQ + i_h * G + o_g) * TQ + bos_q + o_t, mask=m_q, other=float("inf"))
    num_seen = count_windows(o_pos + 1, SIZE, STRIDE)
    max_seen = count_windows(last + 1, SIZE, STRIDE)
    p_k = k_cmp + i_z * stride_fz + i_h * stride_fh
    if cu_seqlens is not None:
        p_k += (bos_k // STRIDE).to(tl.int64) * D

    o_q = i_t * BQ + tl.arange(0, BQ)  # queries of the chunk
    m_s = (o_q < chunk) & (first_query + o_q < num_queries)
    p_s = scores + (i_bh.to(tl.int64) * chunk + o_q.to(tl.int64))[None, :] * NB
    b_0 = tl.zeros([BM, BQ], tl.float32)
    b_1 = tl.zeros([BM, BQ], tl.float32)
    b_2 = tl.zeros([BM, BQ], tl.float32)
    scale = scale * LOG2_E
    for i in range(0, tl.cdiv(tl.cdiv(max_seen, PER_BLOCK), BM) * PER_BLOCK):
        i_j = i % PER_BLOCK
        o_m = (i // PER_BLOCK) * BM + tl.arange(0, BM)
        o_n = o_m * PER_BLOCK + i_j
        b_k = tl.load(
            p_k + o_n[:, None] * D + o_d[None, :], mask=(o_n < max_seen)[:, None] & (o_d < D)[None, :], other=0.0
        )
        b_s = tl.dot(b_k, b_q, input_precision=PRECISION) * scale - b_lse[None, :]  # [BM, C]
        b_s = tl.where(o_n[:, None] < num_seen[None, :], tl.minimum(b_s, MAX_EXPONENT), float("-inf"))
        b_w = tl.sum(tl.reshape(tl.exp2(b_s), [BM, BQ, GP]), 2)
        b_0 = tl.where(i_j == 0, b_w, tl.maximum(b_0, b_w))
        if PLANES > 1:
            touches = i_j >= PER_BLOCK - PER_KERNEL + 1
            b_1 = tl.maximum(tl.where(i_j == 0, 0.0, b_1), tl.where(touches, b_w, 0.0))
        if PLANES > 2:
            touches = i_j >= 2 * PER_BLOCK - PER_KERNEL + 1
            b_2 = tl.maximum(tl.where(i_j == 0, 0.0, b_2), tl.where(touches, b_w, 0.0))
        if i_j == PER_BLOCK - 1:
            p = p_s + o_m[:, None]
            tl.store(p, b_0, mask=m_s[None, :] & (o_m < NB)[:, None])
            if PLANES > 1:
                tl.store(p + stride_plane + 1, b_1, mask=m_s[None, :] & (o_m + 1 < NB)[:, None])
            if PLANES > 2:
                tl.store(p + 2 * stride_plane + 2, b_2, mask=m_s[None, :] & (o_m + 2 < NB)[:, None])


@triton.jit
def pick_blocks(
    b_x,
    p_out,
    own,
    budget,
    m_t,
    NBP: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    SP: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
):
    """Write the best blocks of `b_x [R, NBP]` (scores, at least 0) for queries in block `own [R]` (-1: none).

    A query gets `budget [R]` of them, at most S, the length of its list. Scores that are not negative order as their
    bits do, so the last one taken is built bit by bit from counts: exact, and ties can go to the lower index.
    """
    o_m = tl.arange(0, NBP)[None, :]
    visible = o_m <= own[:, None]
    forced = (o_m < INIT) | (o_m >= (own - LOCAL)[:, None])
    b_x = tl.where((own + 1 <= budget)[:, None], 0.0, b_x)  # the query takes all it sees, and was not scored
    b_x = tl.where(forced, float("inf"), b_x)
    b_bits = tl.where(visible, b_x.to(tl.int32, bitcast=True), -1)
    threshold = tl.zeros([R], tl.int32)
    for i in range(31):
        larger = threshold | (1 << (30 - i))
        threshold = tl.where(tl.sum((b_bits >= larger[:, None]).to(tl.int32), 1) >= budget, larger, threshold)
    above, tied = b_bits > threshold[:, None], b_bits == threshold[:, None]
    # One scan for both counts: those above in the high half, those tied in the low one.
    b_scan = tl.cumsum(above.to(tl.int32) * 65536 + tied.to(tl.int32), 1)
    num_above, num_tied = b_scan >> 16, b_scan & 65535
    room = budget - tl.sum(above.to(tl.int32), 1)
    chosen = above | (tied & (num_tied <= room[:, None]))
    slot = num_above + tl.minimum(num_tied, room[:, None]) - 1
    count = tl.sum(chosen.to(tl.int32), 1)
    tl.store(p_out[:, None] + slot, o_m + tl.zeros_like(slot), mask=chosen & m_t[:, None])
    o_s = tl.arange(0, SP)[None, :]
    unused = (o_s >= count[:, None]) & (o_s < S) & m_t[:, None]
    tl.store(p_out[:, None] + o_s, tl.full([R, SP], -1, tl.int32), mask=unused)


@triton.jit
def topk_fwd_kernel(
    scores,
    block_indices,
    kv_start,
    kv_end,
    cu_seqlens,
    stride_plane,
    first_query,
    chunk,
    TQ,
    TK,
    NB,
    H,
    R: tl.constexpr,
    NBP: tl.constexpr,
    S: tl.constexpr,
    SP: tl.constexpr,
    BS: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PLANES: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
):
    """`block_indices [rows, H, TQ, S]` of R queries from their block scores."""
    i_t, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_bh // H, (i_bh % H).to(tl.int64)
    PER_BLOCK: tl.constexpr = BS // STRIDE
    i_z, bos_q, num_queries, _, length = locate_row(i_b, TQ, TK, kv_start, kv_end, cu_seqlens)
    o_q, o_m = i_t * R + tl.arange(0, R), tl.arange(0, NBP)
    o_t = first_query + o_q
    m_t = (o_q < chunk) & (o_t < num_queries)
    o_pos = o_t + length - num_queries
    own = tl.where(o_pos >= 0, tl.maximum(o_pos, 0) // BS, -1)
    # Block scores were written as far as a query sees windows; beyond them they are 0.
    num_scored = tl.cdiv(count_windows(tl.maximum(o_pos + 1, 0), SIZE, STRIDE), PER_BLOCK)
    must_choose = m_t & (own + 1 > S)
    p_s = scores + (i_bh.to(tl.int64) * chunk + o_q.to(tl.int64))[:, None] * NB + o_m[None, :]
    b_x = tl.zeros([R, NBP], tl.float32)
    for d in tl.static_range(PLANES):
        mask = (
            must_choose[:, None]
            & (o_m >= d)[None, :]
            & (o_m[None, :] < (num_scored + d)[:, None])
            & (o_m < NB)[None, :]
        )
        b_x = tl.maximum(b_x, tl.load(p_s + d * stride_plane, mask=mask, other=0.0))
    p_out = block_indices + ((i_z * H + i_h) * TQ + bos_q + o_t) * S
    pick_blocks(b_x, p_out, own, tl.full([R], S, tl.int32), m_t, NBP, R, S, SP, INIT, LOCAL)


def num_planes(kernel_size: int, kernel_stride: int, block_size: int) -> int:
    """Blocks that one window may touch, counted from the block it begins in."""
    per_block, per_kernel = block_size // kernel_stride, kernel_size // kernel_stride
    return 1 + (per_block + per_kernel - 2) // per_block


def select_fwd(
    q: torch.Tensor,
    k_cmp: torch.Tensor,
    k_coarse: torch.Tensor,
    num_keys: int,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    init_blocks: int,
    window_size: int,
    topk: int,
    lse_approx: bool,
    scale: float,
    kv_start: torch.Tensor | None = None,
    kv_end: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """The blocks each query of `q [B, HQ, TQ, D]` attends to: int32 `[B, H, TQ, S]`, ascending, padded with -1."""
    batch, query_heads, num_queries, dim = q.shape
    heads = k_cmp.shape[1]
    group = query_heads // heads
    num_rows, longest_q, longest_k = batch, num_queries, num_keys
    if cu_seqlens is not None:
        num_rows = cu_seqlens.numel() - 1
        longest_q = longest_k = max_seqlen or num_queries
    tile, padded = tile_of_group(group, q.dtype)
    budget = topk + window_size // block_size
    planes = num_planes(kernel_size, kernel_stride, block_size)
    num_blocks = triton.cdiv(longest_k, block_size)
    block_indices = q.new_empty(batch, heads, num_queries, budget, dtype=torch.int32)
    if cu_seqlens is not None:
        block_indices.fill_(-1)  # tokens after the last row
    rows = (kv_start, kv_end, cu_seqlens)
    tail = {"D": dim, "BD": triton.next_power_of_2(dim), "G": group, "GP": padded}
    tail |= {"BS": block_size, "STRIDE": kernel_stride, "BUDGET": budget, "PRECISION": dot_precision(q.dtype)}
    must_choose = num_blocks > budget
    # Queries before the first that may have to choose are not scored: without padding all that see too few blocks.
    first = 0
    if kv_start is None and kv_end is None and cu_seqlens is None:
        first = min(max(budget * block_size - (num_keys - num_queries), 0), num_queries) // tile * tile
    lse = torch.empty(0, dtype=torch.float32, device=q.device)
    lse_tile, lse_config = lse_launch(dim, q.dtype, tile, padded)
    score_tile, score_config = score_launch(dim, q.dtype, tile, padded)
    if must_choose:
        lse = q.new_empty(batch, query_heads, num_queries, dtype=torch.float32)
        grid = (triton.cdiv(longest_q - first, lse_tile), num_rows * heads)
        if grid[0]:
            lse_fwd_kernel[grid](
                q,
                k_cmp,
                k_coarse,
                lse,
                *rows,
                *q.stride()[:3],
                *k_cmp.stride()[:2],
                *k_coarse.stride()[:2],
                scale,
                first,
                num_queries,
                num_keys,
                heads,
                query_heads,
                BQ=lse_tile,
                SIZE=kernel_size,
                LSE_APPROX=lse_approx,
                **tail,
                **lse_config,
            )
    chunk = max(SCORE_BYTES // (4 * planes * num_rows * heads * num_blocks), 64)
    chunk = min(-(-chunk // 64) * 64, longest_q)
    scores = q.new_empty(planes, num_rows * heads, chunk, num_blocks if must_choose else 1, dtype=torch.float32)
    for begin in range(0, longest_q, chunk):
        end = min(begin + chunk, longest_q)
        if must_choose and end > first:
            score_fwd_kernel[(triton.cdiv(end - begin, score_tile), num_rows * heads)](
                q,
                k_cmp,
                lse,
                scores,
                *rows,
                *q.stride()[:3],
                *k_cmp.stride()[:2],
                scores.stride(0),
                scale,
                begin,
                chunk,
                num_queries,
                num_keys,
                scores.shape[3],
                heads,
                query_heads,
                BQ=score_tile,
                PER_KERNEL=kernel_size // kernel_stride,
                PLANES=planes,
                **tail,
                **score_config,
            )
        # Blocks that a query of this chunk can see.
        width = triton.next_power_of_2(num_blocks)
        if cu_seqlens is None:
            width = triton.next_power_of_2(triton.cdiv(num_keys - num_queries + end, block_size))
        per_program = max(min(2048 // width, 16), 1)
        topk_fwd_kernel[(triton.cdiv(end - begin, per_program), num_rows * heads)](
            scores,
            block_indices,
            *rows,
            scores.stride(0),
            begin,
            chunk,
            num_queries,
            num_keys,
            scores.shape[3],
            heads,
            R=per_program,
            NBP=width,
            S=budget,
            SP=triton.next_power_of_2(budget),
            BS=block_size,
            SIZE=kernel_size,
            STRIDE=kernel_stride,
            PLANES=planes,
            INIT=init_blocks,
            LOCAL=window_size // block_size,
            num_warps=4 if width <= 2048 else 8,
        )
    return block_indices


def lse_launch(dim: int, dtype: torch.dtype, tile: int, padded: int) -> tuple[int, dict]:
    """Queries of a tile and the launch settings of `lse_fwd_kernel`."""
    if dtype == torch.float32:
        return tile, {"BN": 32, "num_warps": 4 if dim <= 64 else 8, "num_stages": 2}
    return tile * max(128 // (tile * padded), 1), {"BN": 64, "num_warps": 8, "num_stages": 3}


def score_launch(dim: int, dtype: torch.dtype, tile: int, padded: int) -> tuple[int, dict]:
    """Queries of a tile and the launch settings of `score_fwd_kernel`."""
    if dtype == torch.float32:
        return tile, {"BM": 32, "num_warps": 4, "num_stages": 2}
    return min(max(128 // padded, tile), 32), {"BM": 64, "num_warps": 8 if dim > 64 else 4, "num_stages": 3}
