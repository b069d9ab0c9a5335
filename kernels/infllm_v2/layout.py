"""What the Triton kernels share: where a row's tokens lie, and the tile a query group fills.

A row is one sequence: a batch entry, possibly left-padded (`kv_start`) or living in a longer buffer (`kv_end`), or one
sequence of a packed batch (`cu_seqlens`). Query t of a row is at position `length - num_queries + t`; it is padding
where that is negative.
"""

import torch
import triton
import triton.language as tl

COARSE = tl.constexpr(4)  # pooling factor of the second stream of pooled keys, as in the definition
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# 2 ** 115 times a query group still fits float32, as in the definition.
MAX_EXPONENT = tl.constexpr(115.0)


@triton.jit
def locate_row(i_b, TQ, TK, kv_start, kv_end, cu_seqlens):
    """Row `i_b`: its batch entry, first query, number of queries, first key, number of keys."""
    if cu_seqlens is not None:
        first = tl.load(cu_seqlens + i_b).to(tl.int32)
        length = tl.load(cu_seqlens + i_b + 1).to(tl.int32) - first
        return i_b * 0, first, length, first, length
    else:
        first_key, end = i_b * 0, i_b * 0 + TK
        if kv_start is not None:
            first_key += tl.load(kv_start + i_b).to(tl.int32)
        if kv_end is not None:
            end = tl.load(kv_end + i_b).to(tl.int32)
        return i_b, i_b * 0, i_b * 0 + TQ, first_key, end - first_key


@triton.jit
def count_windows(num_tokens, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """Windows of SIZE every STRIDE that `num_tokens` tokens fill; no negative operand, whose quotient is undefined."""
    return tl.maximum(num_tokens - SIZE + STRIDE, 0) // STRIDE


def tile_of_group(group: int, dtype: torch.dtype) -> tuple[int, int]:
    """Neighbouring queries of one prefill tile, and the rows each of them takes: the group up to a power of two.

    64 rows where the group allows it: what one Hopper matrix instruction takes; float32 has registers for 16. Eight
    queries at most, since their picks differ and the tile reads the union; at least 16 rows, the least for `tl.dot`.
    """
    padded, rows = triton.next_power_of_2(group), 16 if dtype == torch.float32 else 64
    return max(16 // padded, min(rows // padded, 8), 1), padded


def dot_precision(dtype: torch.dtype) -> str:
    """`input_precision` of `tl.dot`; three tf32 products give float32's accuracy on the matrix units."""
    return "tf32x3" if dtype == torch.float32 else "tf32"
