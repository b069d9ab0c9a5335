"""Triton: block-sparse attention over selected blocks, backward.

dq walks the tile's merged blocks as the forward does. dk and dv go by key block: the (query, block) pairs are sorted
by block, and a program takes up to `CHUNK` queries that picked its block, each with its whole group. A block's parts
are added with atomics, or, where the result must be the same every time, one program takes them all.

Shapes: as in attend.py. A slot is one key block of one row; NS slots a key head. T rows of gathered queries a step,
BT of them times the group padded to GP.
"""

import torch
import triton
import triton.language as tl

from minicpm4_hf.kernels.infllm_v2.attend import load_keys, may_attend, merge_blocks
from minicpm4_hf.kernels.infllm_v2.layout import LOG2_E, dot_precision, locate_row, tile_of_group

CHUNK = 2048  # queries one program of dk and dv takes, unless it must take all


@triton.jit
def delta_kernel(
    o,
    do,
    delta,
    stride_oz,
    stride_oh,
    stride_ot,
    stride_dz,
    stride_dh,
    stride_dt,
    HQ,
    TQ,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
):
    """`delta [B, HQ, TQ] = sum(o * do)` in float32."""
    i_t, i_bh = tl.program_id(0), tl.program_id(1)
    i_z, i_h = (i_bh // HQ).to(tl.int64), (i_bh % HQ).to(tl.int64)
    o_t, o_d = i_t * BT + tl.arange(0, BT), tl.arange(0, BD)
    mask = (o_t < TQ)[:, None] & (o_d < D)[None, :]
    p_o = o + i_z * stride_oz + i_h * stride_oh + o_t.to(tl.int64)[:, None] * stride_ot + o_d[None, :]
    p_d = do + i_z * stride_dz + i_h * stride_dh + o_t.to(tl.int64)[:, None] * stride_dt + o_d[None, :]
    b_o, b_d = tl.load(p_o, mask=mask, other=0.0), tl.load(p_d, mask=mask, other=0.0)
    tl.store(delta + i_bh.to(tl.int64) * TQ + o_t, tl.sum(b_o.to(tl.float32) * b_d.to(tl.float32), 1), mask=o_t < TQ)


@triton.jit
def _dq_entry(
    b_q,
    b_do,
    b_dq,
    b_lse,
    b_delta,
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
    """The share of one merged block in dq, without the factor `scale`."""
    block = entry & ((1 << (32 - BQ)) - 1)
    b_k = load_keys(p_k, block, o_s, o_d, stride_kt, length, D, BD, BS, IS_EDGE)
    b_v = load_keys(p_v, block, o_s, o_d, stride_vt, length, D, BD, BS, IS_EDGE)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
    allowed = may_attend(entry, o_q, o_pos, o_s, BQ, BS, IS_EDGE)
    b_p = tl.where(allowed, tl.exp2(b_s - b_lse[:, None]), 0.0)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit
def attend_bwd_dq_kernel(
    q,
    k,
    v,
    merged,
    counts,
    lse,
    delta,
    do,
    dq,
    kv_start,
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
    stride_dz,
    stride_dh,
    stride_dt,
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
    """`dq [B, HQ, TQ, D]`."""
    i_t, i_bh = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_bh // H, (i_bh % H).to(tl.int64)
    C: tl.constexpr = BQ * GP
    i_z, bos_q, num_queries, bos_k, length = locate_row(i_b, TQ, TK, kv_start, None, cu_seqlens)
    if i_t * BQ >= num_queries:
        return
    i_z = i_z.to(tl.int64)
    o_c, o_d, o_s = tl.arange(0, C), tl.arange(0, BD), tl.arange(0, BS)
    o_q, o_g = o_c // GP, o_c % GP
    o_t = i_t * BQ + o_q
    o_pos = o_t + length - num_queries
    m_q = (o_t < num_queries) & (o_g < G)
    m_qd = m_q[:, None] & (o_d < D)[None, :]
    i_token, i_head = (bos_q + o_t).to(tl.int64), i_h * G + o_g
    p_q = q + i_z * stride_qz + i_token * stride_qt + i_head * stride_qh
    p_do = do + i_z * stride_oz + i_token * stride_ot + i_head * stride_oh
    p_dq = dq + i_z * stride_dz + i_token * stride_dt + i_head * stride_dh
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_qd, other=0.0)
    b_do = tl.load(p_do[:, None] + o_d[None, :], mask=m_qd, other=0.0)
    i_row = (i_z * HQ + i_head) * TQ + i_token
    b_lse = tl.load(lse + i_row, mask=m_q, other=0.0) * LOG2_E
    b_delta = tl.load(delta + i_row, mask=m_q, other=0.0)
    p_k = k + i_z * stride_kz + i_h * stride_kh + bos_k.to(tl.int64) * stride_kt
    p_v = v + i_z * stride_vz + i_h * stride_vh + bos_k.to(tl.int64) * stride_vt
    i_list = i_bh.to(tl.int64) * tiles + i_t
    p_list = merged + i_list * width
    count = tl.load(counts + i_list)
    scale2 = scale * LOG2_E

    b_dq = tl.zeros([C, BD], tl.float32)
    inner = tl.maximum(count - 2, 0)
    for i in range(0, inner):
        b_dq = _dq_entry(
            b_q,
            b_do,
            b_dq,
            b_lse,
            b_delta,
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
            scale2,
            D,
            BD,
            BQ,
            BS,
            False,
            PRECISION,
        )
    for i in range(inner, count):
        b_dq = _dq_entry(
            b_q,
            b_do,
            b_dq,
            b_lse,
            b_delta,
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
            scale2,
            D,
            BD,
            BQ,
            BS,
            True,
            PRECISION,
        )
    tl.store(p_dq[:, None] + o_d[None, :], (b_dq * scale).to(dq.dtype.element_ty), mask=m_qd)


@triton.jit
def attend_bwd_dkdv_kernel(
    q,
    k,
    v,
    tokens,
    parts,
    first_slots,
    row_of_slot,
    lse,
    delta,
    do,
    dk,
    dv,
    kv_start,
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
    stride_gz,
    stride_gh,
    stride_gt,
    scale,
    TQ,
    TK,
    H,
    HQ,
    NS,
    G: tl.constexpr,
    GP: tl.constexpr,
    BT: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv of BK keys of one block from the queries `tokens[begin:end]`.

    `parts [.., 3]` holds `head * NS + slot`, begin and end for each program.
    """
    p_part = parts + tl.program_id(0).to(tl.int64) * 3
    slot, begin, end = tl.load(p_part), tl.load(p_part + 1), tl.load(p_part + 2)
    if begin >= end:
        return
    i_h, slot = slot // NS, slot % NS
    i_b = tl.load(row_of_slot + slot)
    block = (slot - tl.load(first_slots + i_b)).to(tl.int32)
    i_z, bos_q, num_queries, bos_k, length = locate_row(i_b, TQ, TK, kv_start, None, cu_seqlens)
    i_z = i_z.to(tl.int64)
    C: tl.constexpr = BT * GP
    o_c, o_d, o_s = tl.arange(0, C), tl.arange(0, BD), tl.program_id(1) * BK + tl.arange(0, BK)
    i_key = bos_k.to(tl.int64) + block * BS + o_s
    m_s = block * BS + o_s < length
    m_sd = m_s[:, None] & (o_d < D)[None, :]
    p_k = k + i_z * stride_kz + i_h * stride_kh + i_key * stride_kt
    p_v = v + i_z * stride_vz + i_h * stride_vh + i_key * stride_vt
    b_k = tl.load(p_k[:, None] + o_d[None, :], mask=m_sd, other=0.0)
    b_v = tl.load(p_v[:, None] + o_d[None, :], mask=m_sd, other=0.0)
    i_head = i_h * G + o_c % GP
    p_q = q + i_z * stride_qz + i_head * stride_qh
    p_do = do + i_z * stride_oz + i_head * stride_oh
    i_lse = (i_z * HQ + i_head) * TQ
    scale2 = scale * LOG2_E

    b_dk = tl.zeros([BK, BD], tl.float32)
    b_dv = tl.zeros([BK, BD], tl.float32)
    for i in range(0, (end - begin).to(tl.int32), BT):
        o_i = begin + i + o_c // GP
        m_i = o_i < end
        i_token = tl.load(tokens + o_i, mask=m_i, other=0)
        m_q = m_i & (o_c % GP < G)
        m_qd = m_q[:, None] & (o_d < D)[None, :]
        b_q = tl.load((p_q + i_token.to(tl.int64) * stride_qt)[:, None] + o_d[None, :], mask=m_qd, other=0.0)
        b_do = tl.load((p_do + i_token.to(tl.int64) * stride_ot)[:, None] + o_d[None, :], mask=m_qd, other=0.0)
        b_lse = tl.load(lse + i_lse + i_token, mask=m_q, other=0.0) * LOG2_E
        b_delta = tl.load(delta + i_lse + i_token, mask=m_q, other=0.0)
        o_pos = tl.where(m_q, i_token - bos_q + length - num_queries, -1)  # no key is before -1
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale2  # [BK, C]
        b_p = tl.where((block * BS + o_s)[:, None] <= o_pos[None, :], tl.exp2(b_s - b_lse[None, :]), 0.0)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)

    i_g = i_z * stride_gz + i_h * stride_gh + (bos_k.to(tl.int64) + block * BS) * stride_gt
    o_g = o_s[:, None] * stride_gt + o_d[None, :]  # within a block: 32 bits, for the sake of registers
    if IS_SPLIT:
        tl.atomic_add(dk + i_g + o_g, b_dk * scale, mask=m_sd, sem="relaxed")
        tl.atomic_add(dv + i_g + o_g, b_dv, mask=m_sd, sem="relaxed")
    else:
        tl.store(dk + i_g + o_g, (b_dk * scale).to(dk.dtype.element_ty), mask=m_sd)
        tl.store(dv + i_g + o_g, b_dv.to(dv.dtype.element_ty), mask=m_sd)


def sort_by_block(
    block_indices: torch.Tensor, num_keys: int, block_size: int, cu_seqlens: torch.Tensor | None, chunk: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The (query, block) pairs by block, and within a block by query.

    Nothing here waits for the device: numbers of parts are bounded by what the shapes allow.

    Returns:
        tokens: int32 `[pairs]`, the query of each pair.
        parts: int64 `[P, 3]`, one a program: head * NS + slot, and its range of `tokens`; empty ranges at the end.
        first_slots, row_of_slot: int64 `[rows]`, `[NS]`, slots of the rows' blocks.
    """
    batch, heads, num_queries, budget = block_indices.shape
    device = block_indices.device
    if cu_seqlens is None:
        per_row = triton.cdiv(num_keys, block_size)
        num_slots = batch * per_row
        first_slots = torch.arange(batch, device=device) * per_row
        row_of_query = torch.arange(batch, device=device)[:, None]  # [B, 1]
    else:
        num_rows = cu_seqlens.numel() - 1
        num_slots = num_keys // block_size + num_rows  # room for a partly filled block a row
        first_slots = cu_seqlens[:-1].long() // block_size + torch.arange(num_rows, device=device)
        queries = torch.arange(num_queries, device=device)
        row_of_query = (torch.searchsorted(cu_seqlens.long(), queries, right=True) - 1).clamp(max=num_rows - 1)[None]
    slots = torch.arange(num_slots, device=device)
    row_of_slot = torch.searchsorted(first_slots, slots, right=True) - 1
    base = first_slots[row_of_query][:, None, :, None] + torch.arange(heads, device=device)[:, None, None] * num_slots
    keys = torch.where(block_indices >= 0, block_indices + base, heads * num_slots).to(torch.int32)
    keys, order = torch.sort(keys.flatten(), stable=True)
    tokens = (order // budget % num_queries).to(torch.int32)
    every = torch.arange(heads * num_slots, device=device)
    begins = torch.searchsorted(keys, every.to(torch.int32))
    ends = torch.searchsorted(keys, every.to(torch.int32), right=True)
    if chunk is None:
        return tokens, torch.stack((every, begins, ends), 1), first_slots, row_of_slot
    num_parts = (ends - begins + chunk - 1) // chunk
    last_parts = num_parts.cumsum(0)
    part = torch.arange(keys.numel() // chunk + heads * num_slots, device=device)
    block = torch.searchsorted(last_parts, part, right=True)
    exists = block < heads * num_slots
    block = block.clamp(max=heads * num_slots - 1)
    begin = begins[block] + (part - last_parts[block] + num_parts[block]) * chunk
    end = torch.where(exists, torch.minimum(begin + chunk, ends[block]), begin)
    return tokens, torch.stack((block, begin, end), 1), first_slots, row_of_slot


def attend_bwd(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    block_indices: torch.Tensor,
    *,
    block_size: int,
    scale: float,
    kv_start: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attend_fwd`'s `o` with respect to `q`, `k` and `v`; exactly 0 for keys of blocks nobody picked."""
    batch, query_heads, num_queries, dim = q.shape
    heads, num_keys = k.shape[1], k.shape[2]
    group = query_heads // heads
    num_rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    longest = num_queries if cu_seqlens is None else max_seqlen or num_queries
    tile, padded = tile_of_group(group, q.dtype)
    width = triton.next_power_of_2(dim)
    delta = torch.empty_like(lse)
    delta_kernel[(triton.cdiv(num_queries, 32), batch * query_heads)](
        o, do, delta, *o.stride()[:3], *do.stride()[:3], query_heads, num_queries, D=dim, BD=width, BT=32, num_warps=4
    )
    common = {"G": group, "GP": padded, "D": dim, "BD": width, "BS": block_size, "PRECISION": dot_precision(q.dtype)}
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    merged, counts = merge_blocks(block_indices, num_keys, block_size, tile, (kv_start, None, cu_seqlens), longest)
    dq = torch.empty_like(q) if cu_seqlens is None else torch.zeros_like(q)
    attend_bwd_dq_kernel[(counts.shape[1], num_rows * heads)](
        q,
        k,
        v,
        merged,
        counts,
        lse,
        delta,
        do,
        dq,
        kv_start,
        cu_seqlens,
        *strides,
        *dq.stride()[:3],
        scale,
        num_queries,
        num_keys,
        heads,
        query_heads,
        counts.shape[1],
        merged.shape[2],
        BQ=tile,
        **common,
        **dq_launch(dim, q.dtype),
    )
    del merged, counts
    chunk = None if deterministic else CHUNK
    tokens, parts, first_slots, row_of_slot = sort_by_block(block_indices, num_keys, block_size, cu_seqlens, chunk)
    kind = k.dtype if deterministic else torch.float32
    dk, dv = (torch.zeros(k.shape, dtype=kind, device=k.device) for _ in range(2))
    launch = dkdv_launch(dim, q.dtype, block_size)
    attend_bwd_dkdv_kernel[(parts.shape[0], block_size // launch["BK"])](
        q,
        k,
        v,
        tokens,
        parts,
        first_slots,
        row_of_slot,
        lse,
        delta,
        do,
        dk,
        dv,
        kv_start,
        cu_seqlens,
        *strides,
        *dk.stride()[:3],
        scale,
        num_queries,
        num_keys,
        heads,
        query_heads,
        row_of_slot.numel(),
        BT=tile,
        IS_SPLIT=not deterministic,
        **common,
        **launch,
    )
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def dq_launch(dim: int, dtype: torch.dtype) -> dict:
    """Launch settings of `attend_bwd_dq_kernel`."""
    if dtype == torch.float32:
        return {"num_warps": 8, "num_stages": 1}
    return {"num_warps": 4 if dim > 64 else 8, "num_stages": 2}


def dkdv_launch(dim: int, dtype: torch.dtype, block_size: int) -> dict:
    """Launch settings of `attend_bwd_dkdv_kernel`, and the keys of a block that one program takes."""
    if dtype == torch.float32:
        return {"BK": min(block_size, 16), "num_warps": 4, "num_stages": 1}
    # 64 keys would spill on sm_80 where heads are small and a tile has many queries.
    return {"BK": min(block_size, 64 if dim > 64 else 32), "num_warps": 8, "num_stages": 2}
