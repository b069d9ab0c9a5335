"""Triton: mean-pool the keys into both streams, `k -> k_cmp, k_coarse`, in one pass; also only the newest windows.

Shapes: B rows, H key heads, TK keys, D head size, N pooled keys. A packed batch keeps row b's windows from entry
`cu_seqlens[b] // stride` on: a row never has more windows than that leaves room for.
"""

import torch
import triton
import triton.language as tl

from minicpm4_hf.kernels.infllm_v2.layout import COARSE, count_windows, locate_row

SEGMENTS = 4  # strides of keys one program sums: 64 keys at the default settings


@triton.jit
def _sum_segments(
    p_k, first, length, stride_kt, D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, STRIDE: tl.constexpr
):
    """Sums of BN neighbouring segments of STRIDE keys, from segment `first` on: float32 `[BN, BD]`."""
    o_t = first * STRIDE + tl.arange(0, BN * STRIDE)
    o_d = tl.arange(0, BD)
    mask = (o_t < length)[:, None] & (o_d < D)[None, :]
    b_k = tl.load(p_k + o_t.to(tl.int64)[:, None] * stride_kt + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.sum(tl.reshape(b_k, [BN, STRIDE, BD]), 1)


@triton.jit
def compress_fwd_kernel(
    k,
    k_cmp,
    k_coarse,
    kv_start,
    kv_end,
    cu_seqlens,
    stride_kz,
    stride_kh,
    stride_kt,
    stride_fz,
    stride_fh,
    stride_cz,
    stride_ch,
    num_new,
    TK,
    H,
    D: tl.constexpr,
    BD: tl.constexpr,
    BN: tl.constexpr,
    STRIDE: tl.constexpr,
    PER_KERNEL: tl.constexpr,
):
    """The windows that a row's last `num_new` keys complete, in both streams."""
    i_n, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = i_bh // H, (i_bh % H).to(tl.int64)
    SIZE: tl.constexpr = PER_KERNEL * STRIDE
    i_z, _, _, bos, length = locate_row(i_b, TK, TK, kv_start, kv_end, cu_seqlens)
    done = tl.maximum(length - num_new, 0)
    fine_begin, fine_end = count_windows(done, SIZE, STRIDE), count_windows(length, SIZE, STRIDE)
    coarse_begin = count_windows(done, COARSE * SIZE, COARSE * STRIDE)
    coarse_end = count_windows(length, COARSE * SIZE, COARSE * STRIDE)
    first = (tl.minimum(fine_begin, COARSE * coarse_begin) // BN + i_n) * BN
    if first >= fine_end:
        return

    p_k = k + i_z.to(tl.int64) * stride_kz + i_h * stride_kh + bos.to(tl.int64) * stride_kt
    b_fine = tl.zeros([BN, BD], tl.float32)
    b_coarse = tl.zeros([BN // COARSE, BD], tl.float32)
    for i in tl.static_range(PER_KERNEL):
        b_segments = _sum_segments(p_k, first + i, length, stride_kt, D, BD, BN, STRIDE)
        b_fine += b_segments
        if i > 0:
            b_segments = _sum_segments(p_k, first + COARSE * i, length, stride_kt, D, BD, BN, STRIDE)
        b_coarse += tl.sum(tl.reshape(b_segments, [BN // COARSE, COARSE, BD]), 1)

    o_d = tl.arange(0, BD)
    o_f = first + tl.arange(0, BN)
    o_c = first // COARSE + tl.arange(0, BN // COARSE)
    e_f, e_c = o_f, o_c
    if cu_seqlens is not None:
        e_f += bos // STRIDE
        e_c += bos // (COARSE * STRIDE)
    p_f = k_cmp + i_z.to(tl.int64) * stride_fz + i_h * stride_fh + e_f.to(tl.int64)[:, None] * D + o_d[None, :]
    p_c = k_coarse + i_z.to(tl.int64) * stride_cz + i_h * stride_ch + e_c.to(tl.int64)[:, None] * D + o_d[None, :]
    m_f = ((o_f >= fine_begin) & (o_f < fine_end))[:, None] & (o_d < D)[None, :]
    m_c = ((o_c >= coarse_begin) & (o_c < coarse_end))[:, None] & (o_d < D)[None, :]
    tl.store(p_f, b_fine / SIZE, mask=m_f)
    tl.store(p_c, b_coarse / (COARSE * SIZE), mask=m_c)


def compress_fwd(
    k: torch.Tensor,
    k_cmp: torch.Tensor,
    k_coarse: torch.Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    num_new: int | None = None,
    kv_start: torch.Tensor | None = None,
    kv_end: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> None:
    """Write the pooled keys of `k [B, H, TK, D]` into `k_cmp` and `k_coarse [B, H, N, D]`, whose rows are contiguous.

    Args:
        num_new: only the windows that each row's last `num_new` keys complete; all of them where None.
        kv_start, kv_end: `[B]`, first key of each row and the one after its last; the whole tensor where None.
        cu_seqlens: `[rows + 1]`, packed rows along the tokens of the one batch entry.
    """
    batch, heads, num_keys, dim = k.shape
    num_rows, longest = (batch, num_keys) if cu_seqlens is None else (cu_seqlens.numel() - 1, max_seqlen or num_keys)
    num_new = longest if num_new is None else num_new
    # The first new window may lie up to 7 strides (2 tiles) before the first one that num_new keys alone fill.
    num_tiles = triton.cdiv(num_new // kernel_stride + 4 * (kernel_size // kernel_stride) + 1, SEGMENTS) + 1
    compress_fwd_kernel[(min(num_tiles, triton.cdiv(longest, SEGMENTS * kernel_stride)), num_rows * heads)](
        k,
        k_cmp,
        k_coarse,
        kv_start,
        kv_end,
        cu_seqlens,
        *k.stride()[:3],
        *k_cmp.stride()[:2],
        *k_coarse.stride()[:2],
        num_new,
        num_keys,
        heads,
        D=dim,
        BD=triton.next_power_of_2(dim),
        BN=SEGMENTS,
        STRIDE=kernel_stride,
        PER_KERNEL=kernel_size // kernel_stride,
        num_warps=4,
    )
