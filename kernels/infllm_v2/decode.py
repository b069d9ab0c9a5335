"""Triton: selection and attention for a few queries, split so that one query fills the device.

Selection is two launches: log-sum-exps of parts of the coarse keys; then every program joins them and scores its share
of the blocks, and the last one to finish picks. Attention is split over the selected blocks and reduced by a second
kernel. Lengths may be on the device (`kv_end`): grids depend on shapes only, so that a captured graph serves every
step.

Shapes: as in topk.py and attend.py; P programs share one query and key head. C rows: the group padded to 16 at least.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from minicpm4_hf.kernels.infllm_v2.layout import (
    COARSE,
    LN_2,
    LOG2_E,
    MAX_EXPONENT,
    count_windows,
    dot_precision,
    locate_row,
)
from minicpm4_hf.kernels.infllm_v2.topk import pick_blocks, running_lse

MAX_QUERIES = 8  # more queries a row than this go the way of prefill
MAX_SPLITS = 64


@triton.jit
def load_query(q, i_z, i_h, i_t, stride_qz, stride_qh, stride_qt, o_c, o_d, G: tl.constexpr, D: tl.constexpr):
    """The group of one query, `[C, BD]`."""
    p_q = q + i_z * stride_qz + i_t.to(tl.int64) * stride_qt + (i_h * G + o_c)[:, None] * stride_qh + o_d[None, :]
    return tl.load(p_q, mask=(o_c < G)[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def lse_decode_kernel(
    q,
    k_cmp,
    k_coarse,
    part_lse,
    arrived,
    kv_start,
    kv_end,
    stride_qz,
    stride_qh,
    stride_qt,
    stride_fz,
    stride_fh,
    stride_cz,
    stride_ch,
    scale,
    TQ,
    TK,
    H,
    G: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    STRIDE: tl.constexpr,
    PER_KERNEL: tl.constexpr,
    LSE_APPROX: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`part_lse [B * TQ * H, P, C]`, base 2, a share of the pooled keys each; `arrived [B * TQ * H]` becomes 0."""
    i_p, i_bth = tl.program_id(0), tl.program_id(1)
    i_h, i_bt = (i_bth % H).to(tl.int64), i_bth // H
    i_b, i_t = i_bt // TQ, i_bt % TQ
    SIZE: tl.constexpr = PER_KERNEL * STRIDE
    _, _, _, _, length = locate_row(i_b, TQ, TK, kv_start, kv_end, None)
    i_z = i_b.to(tl.int64)
    position = length - TQ + i_t
    p_k = k_cmp + i_z * stride_fz + i_h * stride_fh
    num_seen = count_windows(position + 1, SIZE, STRIDE)
    if LSE_APPROX:
        if position + 1 >= COARSE * SIZE:
            p_k = k_coarse + i_z * stride_cz + i_h * stride_ch
            num_seen = count_windows(position + 1, COARSE * SIZE, COARSE * STRIDE)
    share = tl.cdiv(tl.cdiv(num_seen, BN), tl.num_programs(0)) * BN
    first = i_p * share
    num_seen = tl.minimum(share, tl.maximum(num_seen - first, 0))
    o_c, o_d = tl.arange(0, C), tl.arange(0, BD)
    b_q = load_query(q, i_z, i_h, i_t, stride_qz, stride_qh, stride_qt, o_c, o_d, G, D)
    seen = tl.zeros([C], tl.int32) + num_seen
    b_lse = running_lse(b_q, p_k + first.to(tl.int64) * D, seen, num_seen, scale * LOG2_E, D, BD, C, BN, PRECISION)
    tl.store(part_lse + (i_bth.to(tl.int64) * tl.num_programs(0) + i_p) * C + o_c, b_lse)
    if i_p == 0:
        tl.store(arrived + i_bth, 0)


@triton.jit
def select_decode_kernel(
    q,
    k_cmp,
    part_lse,
    scores,
    arrived,
    block_indices,
    kv_start,
    kv_end,
    stride_qz,
    stride_qh,
    stride_qt,
    stride_fz,
    stride_fh,
    scale,
    parts,
    TQ,
    TK,
    NB,
    H,
    G: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BP: tl.constexpr,
    BM: tl.constexpr,
    BS: tl.constexpr,
    STRIDE: tl.constexpr,
    PER_KERNEL: tl.constexpr,
    NBP: tl.constexpr,
    S: tl.constexpr,
    SP: tl.constexpr,
    BUDGET: tl.constexpr,
    DENSE_LEN: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`block_indices [B, H, TQ, S]`: BUDGET blocks, or all of them where a query has fewer than DENSE_LEN keys.

    `part_lse [B * TQ * H, parts, C]` and `arrived [B * TQ * H]`, zeros, are what `lse_decode_kernel` left; `scores
    [B * TQ * H, NB]` is scratch.
    """
    i_p, i_bth = tl.program_id(0), tl.program_id(1)
    i_h, i_bt = (i_bth % H).to(tl.int64), i_bth // H
    i_b, i_t = i_bt // TQ, i_bt % TQ
    SIZE: tl.constexpr = PER_KERNEL * STRIDE
    PER_BLOCK: tl.constexpr = BS // STRIDE
    PHASES: tl.constexpr = PER_BLOCK + PER_KERNEL - 1  # windows that touch a block
    _, _, _, _, length = locate_row(i_b, TQ, TK, kv_start, kv_end, None)
    i_z = i_b.to(tl.int64)
    position = length - TQ + i_t
    own = tl.where(position >= 0, tl.maximum(position, 0) // BS, -1)
    num_seen = count_windows(position + 1, SIZE, STRIDE)
    num_scored = tl.cdiv(num_seen, PER_BLOCK)
    p_s = scores + i_bth.to(tl.int64) * NB
    budget = tl.where(position + 1 < DENSE_LEN, S, BUDGET)
    if own + 1 > budget:
        o_c, o_d = tl.arange(0, C), tl.arange(0, BD)
        b_q = load_query(q, i_z, i_h, i_t, stride_qz, stride_qh, stride_qt, o_c, o_d, G, D)
        p_f = k_cmp + i_z * stride_fz + i_h * stride_fh
        o_p = tl.arange(0, BP)
        p_part = part_lse + (i_bth.to(tl.int64) * parts + o_p[:, None]) * C + o_c[None, :]
        b_part = tl.load(p_part, mask=(o_p < parts)[:, None], other=float("-inf"))
        b_max = tl.max(b_part, 0)
        b_safe = tl.where(b_max == float("-inf"), 0.0, b_max)
        b_lse = b_max + tl.log2(tl.sum(tl.exp2(b_part - b_safe[None, :]), 0))
        b_lse = tl.where(o_c < G, b_lse, float("inf"))
        b_q = tl.trans(b_q)
        share = tl.cdiv(tl.cdiv(num_scored, BM), tl.num_programs(0))
        first = i_p * share
        num_tiles = tl.minimum(share, tl.maximum(tl.cdiv(num_scored, BM) - first, 0))
        b_best = tl.zeros([BM], tl.float32)
        for i in range(0, num_tiles * PHASES):
            i_j = i % PHASES
            o_m = (first + i // PHASES) * BM + tl.arange(0, BM)
            o_n = o_m * PER_BLOCK + i_j - (PER_KERNEL - 1)
            exists = (o_n >= 0) & (o_n < num_seen)
            b_k = tl.load(p_f + o_n[:, None] * D + o_d[None, :], mask=exists[:, None] & (o_d < D)[None, :], other=0.0)
            b_s = tl.dot(b_k, b_q, input_precision=PRECISION) * (scale * LOG2_E) - b_lse[None, :]  # [BM, C]
            b_w = tl.sum(tl.exp2(tl.minimum(b_s, MAX_EXPONENT)), 1)
            b_best = tl.maximum(tl.where(i_j == 0, 0.0, b_best), tl.where(exists, b_w, 0.0))
            if i_j == PHASES - 1:
                tl.store(p_s + o_m, b_best, mask=o_m < num_scored)

    # Every thread's scores are written before the program is counted in; the last one reads past its level-1 cache.
    tl.debug_barrier()
    before = tl.atomic_add(arrived + i_bth, 1, sem="acq_rel")
    if before == tl.num_programs(0) - 1:
        o_m = tl.arange(0, NBP)
        num_scored = tl.where(own + 1 > budget, num_scored, 0)
        b_x = tl.load(p_s + o_m, mask=o_m < num_scored, other=0.0, cache_modifier=".cg")[None, :]
        one = tl.zeros([1], tl.int32)
        p_out = block_indices + ((i_z * H + i_h) * TQ + i_t) * S + one
        pick_blocks(b_x, p_out, own + one, budget + one, one == 0, NBP, 1, S, SP, INIT, LOCAL)


@triton.jit
def attend_decode_kernel(
    q,
    k,
    v,
    block_indices,
    part_o,
    part_m,
    part_l,
    kv_start,
    kv_end,
    stride_qz,
    stride_qh,
    stride_qt,
    stride_kz,
    stride_kh,
    stride_kt,
    stride_vz,
    stride_vh,
    stride_vt,
    scale,
    share,
    TQ,
    TK,
    H,
    S,
    G: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Parts `[P, B * TQ * H * G, ..]` of one query: `share` of its blocks a program, softmax not yet divided."""
    i_p, i_bth = tl.program_id(0), tl.program_id(1)
    i_h, i_bt = (i_bth % H).to(tl.int64), i_bth // H
    i_b, i_t = i_bt // TQ, i_bt % TQ
    _, _, _, bos_k, length = locate_row(i_b, TQ, TK, kv_start, kv_end, None)
    i_z = i_b.to(tl.int64)
    position = length - TQ + i_t
    o_c, o_d, o_s = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BS)
    b_q = load_query(q, i_z, i_h, i_t, stride_qz, stride_qh, stride_qt, o_c, o_d, G, D)
    p_k = k + i_z * stride_kz + i_h * stride_kh + bos_k.to(tl.int64) * stride_kt
    p_v = v + i_z * stride_vz + i_h * stride_vh + bos_k.to(tl.int64) * stride_vt
    p_list = block_indices + ((i_z * H + i_h) * TQ + i_t) * S
    scale = scale * LOG2_E
    b_o = tl.zeros([C, BD], tl.float32)
    b_m = tl.full([C], float("-inf"), tl.float32)
    b_l = tl.zeros([C], tl.float32)
    for i in range(i_p * share, tl.minimum((i_p + 1) * share, S)):
        block = tl.load(p_list + i)
        sees = block * BS + o_s <= tl.where(block >= 0, position, -(1 << 30))
        i_key = tl.maximum(block, 0).to(tl.int64) * BS
        mask = sees[:, None] & (o_d < D)[None, :]
        b_k = tl.load(p_k + i_key * stride_kt + o_s[:, None] * stride_kt + o_d[None, :], mask=mask, other=0.0)
        b_v = tl.load(p_v + i_key * stride_vt + o_s[:, None] * stride_vt + o_d[None, :], mask=mask, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        b_s = tl.where(sees[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_m, tl.max(b_s, 1))
        b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_safe[:, None])
        b_alpha = tl.exp2(b_m - b_safe)
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_alpha[:, None], input_precision=PRECISION)
        b_m = b_new
    i_row = (i_p.to(tl.int64) * tl.num_programs(1) + i_bth) * G + o_c
    tl.store(part_o + i_row[:, None] * D + o_d[None, :], b_o, mask=(o_c < G)[:, None] & (o_d < D)[None, :])
    tl.store(part_m + i_row, b_m, mask=o_c < G)
    tl.store(part_l + i_row, b_l, mask=o_c < G)


@triton.jit
def reduce_decode_kernel(
    part_o,
    part_m,
    part_l,
    o,
    lse,
    stride_oz,
    stride_oh,
    stride_ot,
    P,
    TQ,
    HQ,
    PP: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """`o [B, HQ, TQ, D]` and `lse [B, HQ, TQ]` from P parts of each query head."""
    i_row = tl.program_id(0).to(tl.int64)
    i_head, i_bt = i_row % HQ, i_row // HQ
    i_z, i_t = i_bt // TQ, i_bt % TQ
    o_p, o_d = tl.arange(0, PP), tl.arange(0, BD)
    i_part = o_p * tl.num_programs(0).to(tl.int64) + i_row
    b_m = tl.load(part_m + i_part, mask=o_p < P, other=float("-inf"))
    b_l = tl.load(part_l + i_part, mask=o_p < P, other=0.0)
    b_o = tl.load(part_o + i_part[:, None] * D + o_d[None, :], mask=(o_p < P)[:, None] & (o_d < D)[None, :], other=0.0)
    largest = tl.max(b_m, 0)
    weight = tl.exp2(b_m - tl.where(largest == float("-inf"), 0.0, largest))
    total = tl.sum(b_l * weight, 0)
    b_o = tl.sum(b_o * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    p_o = o + i_z * stride_oz + i_head * stride_oh + i_t * stride_ot + o_d
    tl.store(p_o, b_o.to(o.dtype.element_ty), mask=o_d < D)
    tl.store(lse + (i_z * HQ + i_head) * TQ + i_t, (largest + tl.log2(total)) * LN_2)


def list_width(budget: int, dense_len: int, num_blocks: int, block_size: int) -> int:
    """Blocks that a list has room for: the budget, or what fewer than `dense_len` keys fill."""
    return max(budget, min(triton.cdiv(max(dense_len - 1, 0), block_size), num_blocks))


@lru_cache
def count_processors(device: torch.device) -> int:
    """Multiprocessors of a device; an H100's for tensors that are not on one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def select_decode(
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
    dense_len: int = 0,
) -> torch.Tensor:
    """`select_fwd` for the few newest queries; `num_keys` is the most keys a row can have.

    A query with fewer than `dense_len` keys gets all their blocks, and lists are as long as that takes.
    """
    batch, query_heads, num_queries, dim = q.shape
    heads = k_cmp.shape[1]
    group = query_heads // heads
    budget = topk + window_size // block_size
    num_blocks = triton.cdiv(num_keys, block_size)
    listed = list_width(budget, dense_len, num_blocks, block_size)
    programs = batch * num_queries * heads
    width = triton.next_power_of_2(num_blocks)
    lse_step, lse_config = lse_decode_launch(q.dtype)
    tile, config = select_decode_launch(q.dtype, width)
    most = min(triton.cdiv(count_processors(q.device), programs), MAX_SPLITS)
    parts, splits = 1, 1
    if num_blocks > budget:
        windows = k_coarse.shape[2] if lse_approx else k_cmp.shape[2]
        parts = max(min(triton.cdiv(windows, lse_step), most), 1)
        splits = min(triton.cdiv(num_blocks, tile), most)
    rows = max(triton.next_power_of_2(group), 16)
    block_indices = q.new_empty(batch, heads, num_queries, listed, dtype=torch.int32)
    scores = q.new_empty(programs, num_blocks if num_blocks > budget else 1, dtype=torch.float32)
    part_lse = q.new_empty(programs, parts, rows, dtype=torch.float32)
    arrived = q.new_empty(programs, dtype=torch.int32)
    shape = {"G": group, "C": rows, "D": dim, "BD": triton.next_power_of_2(dim), "STRIDE": kernel_stride}
    shape |= {"PER_KERNEL": kernel_size // kernel_stride, "PRECISION": dot_precision(q.dtype)}
    if num_blocks > budget:
        lse_decode_kernel[(parts, programs)](
            q,
            k_cmp,
            k_coarse,
            part_lse,
            arrived,
            kv_start,
            kv_end,
            *q.stride()[:3],
            *k_cmp.stride()[:2],
            *k_coarse.stride()[:2],
            scale,
            num_queries,
            num_keys,
            heads,
            BN=lse_step,
            LSE_APPROX=lse_approx,
            **shape,
            **lse_config,
        )
    else:
        arrived.zero_()
    select_decode_kernel[(splits, programs)](
        q,
        k_cmp,
        part_lse,
        scores,
        arrived,
        block_indices,
        kv_start,
        kv_end,
        *q.stride()[:3],
        *k_cmp.stride()[:2],
        scale,
        parts,
        num_queries,
        num_keys,
        scores.shape[1],
        heads,
        BP=triton.next_power_of_2(parts),
        BM=tile,
        BS=block_size,
        NBP=width,
        S=listed,
        SP=triton.next_power_of_2(listed),
        BUDGET=budget,
        DENSE_LEN=dense_len,
        INIT=init_blocks,
        LOCAL=window_size // block_size,
        **shape,
        **config,
    )
    return block_indices


def lse_decode_launch(dtype: torch.dtype) -> tuple[int, dict]:
    """Pooled keys of a step and the launch settings of `lse_decode_kernel`."""
    if dtype == torch.float32:
        return 32, {"num_warps": 8, "num_stages": 2}
    return 64, {"num_warps": 4, "num_stages": 3}


def select_decode_launch(dtype: torch.dtype, width: int) -> tuple[int, dict]:
    """Blocks scored at a time and the launch settings of `select_decode_kernel`; `width` blocks are ranked."""
    if dtype == torch.float32:
        return 32, {"num_warps": 8, "num_stages": 2}
    return 64, {"num_warps": 4 if width <= 4096 else 8, "num_stages": 3}


def attend_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor,
    *,
    block_size: int,
    scale: float,
    kv_start: torch.Tensor | None = None,
    kv_end: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_fwd` for the few newest queries."""
    batch, query_heads, num_queries, dim = q.shape
    heads, num_keys, budget = k.shape[1], k.shape[2], block_indices.shape[3]
    group = query_heads // heads
    programs = batch * num_queries * heads
    share = triton.cdiv(budget, min(triton.cdiv(count_processors(q.device), programs), MAX_SPLITS, budget))
    splits = triton.cdiv(budget, share)
    part_o = q.new_empty(splits, programs * group, dim, dtype=torch.float32)
    part_m = q.new_empty(splits, programs * group, dtype=torch.float32)
    part_l = torch.empty_like(part_m)
    width = triton.next_power_of_2(dim)
    attend_decode_kernel[(splits, programs)](
        q,
        k,
        v,
        block_indices,
        part_o,
        part_m,
        part_l,
        kv_start,
        kv_end,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        scale,
        share,
        num_queries,
        num_keys,
        heads,
        budget,
        G=group,
        C=max(triton.next_power_of_2(group), 16),
        D=dim,
        BD=width,
        BS=block_size,
        PRECISION=dot_precision(q.dtype),
        num_warps=4 if q.dtype != torch.float32 else 8,
        num_stages=3 if q.dtype != torch.float32 else 1,
    )
    o = torch.empty_like(q)
    lse = q.new_empty(batch, query_heads, num_queries, dtype=torch.float32)
    reduce_decode_kernel[(programs * group,)](
        part_o,
        part_m,
        part_l,
        o,
        lse,
        *o.stride()[:3],
        splits,
        num_queries,
        query_heads,
        PP=triton.next_power_of_2(splits),
        D=dim,
        BD=width,
        num_warps=4,
    )
    return o, lse
