"""The native attention as torch operators: `torch.ops.minicpm4_hf.cpu_*`, one node each under `torch.compile`.

Shapes: B batch, HQ query heads, H key heads, TQ queries (the last of the TK positions), D head size, N pooled keys.
None of them is differentiable; whoever calls them asks `unsupported_reason` first.
"""

import torch

from minicpm4_hf.kernels.cpu.library import (
    ATTENTION_ARGS,
    DTYPES,
    NO_TENSOR,
    POOL_ARGS,
    check_result,
    load_library,
    tensor_fields,
)
from minicpm4_hf.sparse_attention import COARSE, count_pooled
from minicpm4_hf.sparse_cache import AttentionOperations

LIBRARY = torch.library.Library("minicpm4_hf", "FRAGMENT")
LIBRARY.define(
    "cpu_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor k_cmp, Tensor k_coarse, Tensor? q_select, "
    "Tensor? kv_start, float scale, int kernel_size, int kernel_stride, int block_size, int init_blocks, "
    "int window_size, int topk, bool lse_approx) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "cpu_dense_attention(Tensor q, Tensor k, Tensor v, Tensor? kv_start, float scale, int sliding_window) -> Tensor"
)
LIBRARY.define("cpu_pool_keys(Tensor k, int kernel_size, int kernel_stride) -> Tensor")


def unsupported_reason(*tensors: torch.Tensor) -> str | None:
    """None where the native kernels serve `[B, H, T, D]` tensors, or what stands in the way, in words."""
    first = tensors[0]
    if first.device.type != "cpu":
        return f"the tensors are on {first.device}, and the native kernels run on the CPU"
    if first.dtype not in DTYPES:
        return f"the dtype is {first.dtype}, and the native kernels take float32, bfloat16 and float16"
    if first.shape[-1] % 16 or not first.shape[-1]:
        return f"the head size is {first.shape[-1]}, and the native kernels take multiples of 16"
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return "gradients are recorded, and the native kernels have none (`torch.no_grad()` where none are needed)"
    return None


def _dense_rows(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where its last dimension is contiguous, else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _new_output(q: torch.Tensor) -> torch.Tensor:
    """`[B, HQ, TQ, D]` over memory of `[B, TQ, HQ, D]`, the order in which a model goes on with it."""
    batch, heads, num_queries, dim = q.shape
    return q.new_empty(batch, num_queries, heads, dim).transpose(1, 2)


def _starts(kv_start: torch.Tensor | None) -> torch.Tensor | None:
    return None if kv_start is None else kv_start.to(torch.int64).contiguous()


def _sizes(q: torch.Tensor, k: torch.Tensor) -> tuple[int, ...]:
    batch, query_heads, num_queries, dim = q.shape
    return DTYPES[q.dtype], batch, query_heads, k.shape[1], dim, num_queries, k.shape[2], torch.get_num_threads()


def sparse_attention_op(
    q,
    k,
    v,
    k_cmp,
    k_coarse,
    q_select,
    kv_start,
    scale,
    kernel_size,
    kernel_stride,
    block_size,
    init_blocks,
    window_size,
    topk,
    lse_approx,
):
    """Select and attend in one call: `out [B, HQ, TQ, D]` and `block_indices [B, H, TQ, S]`, int32."""
    q, k, v, k_cmp, k_coarse = map(_dense_rows, (q, k, v, k_cmp, k_coarse))
    q_select = None if q_select is None else _dense_rows(q_select)
    starts, out = _starts(kv_start), _new_output(q)
    blocks = torch.empty(*k.shape[:2], q.shape[2], topk + window_size // block_size, dtype=torch.int32)
    arguments = ATTENTION_ARGS.pack(
        *tensor_fields(q),
        *tensor_fields(k),
        *tensor_fields(v),
        *tensor_fields(out),
        0 if starts is None else starts.data_ptr(),
        *_sizes(q, k),
        scale,
        0,
        *(NO_TENSOR if q_select is None else tensor_fields(q_select)),
        *tensor_fields(k_cmp),
        *tensor_fields(k_coarse),
        *tensor_fields(blocks),
        kernel_size,
        kernel_stride,
        block_size,
        init_blocks,
        window_size,
        topk,
        lse_approx,
        *NO_TENSOR * 2,
    )
    check_result(load_library().mc_attention(arguments))
    return out, blocks


def dense_attention_op(q, k, v, kv_start, scale, sliding_window):
    """Causal attention: `out [B, HQ, TQ, D]`."""
    q, k, v = map(_dense_rows, (q, k, v))
    starts, out = _starts(kv_start), _new_output(q)
    arguments = ATTENTION_ARGS.pack(
        *tensor_fields(q),
        *tensor_fields(k),
        *tensor_fields(v),
        *tensor_fields(out),
        0 if starts is None else starts.data_ptr(),
        *_sizes(q, k),
        scale,
        sliding_window,
        *NO_TENSOR * 4,
        *(0,) * 7,
        *NO_TENSOR * 2,
    )
    check_result(load_library().mc_attention(arguments))
    return out


def pool_keys_op(k, kernel_size, kernel_stride):
    """`minicpm4_hf.sparse_attention.pool_keys`: means over windows of keys."""
    k = _dense_rows(k)
    batch, heads, num_tokens, dim = k.shape
    count = count_pooled(num_tokens, kernel_size, kernel_stride)
    out = k.new_empty(batch, heads, count, dim)
    arguments = POOL_ARGS.pack(
        *tensor_fields(k),
        *tensor_fields(out),
        DTYPES[k.dtype],
        batch,
        heads,
        dim,
        kernel_size,
        kernel_stride,
        0,
        count,
        torch.get_num_threads(),
    )
    check_result(load_library().mc_pool(arguments))
    return out


def _sparse_attention_fake(q, k, v, k_cmp, k_coarse, q_select, kv_start, scale, *settings):
    _, _, block_size, _, window_size, topk, _ = settings
    width = topk + window_size // block_size
    return _new_output(q), q.new_empty((*k.shape[:2], q.shape[2], width), dtype=torch.int32)


for name, operation, fake in (
    ("cpu_sparse_attention", sparse_attention_op, _sparse_attention_fake),
    ("cpu_dense_attention", dense_attention_op, lambda q, *rest: _new_output(q)),
    (
        "cpu_pool_keys",
        pool_keys_op,
        lambda k, size, stride: k.new_empty(*k.shape[:2], count_pooled(k.shape[2], size, stride), k.shape[3]),
    ),
):
    LIBRARY.impl(name, operation, "CPU")
    torch.library.register_fake(f"minicpm4_hf::{name}", fake, lib=LIBRARY)


def pool_keys(k: torch.Tensor, kernel_size: int, kernel_stride: int) -> torch.Tensor:
    """Native `minicpm4_hf.sparse_attention.pool_keys`, with the same arguments and result."""
    return torch.ops.minicpm4_hf.cpu_pool_keys(k, kernel_size, kernel_stride)


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    init_blocks: int,
    window_size: int,
    topk: int,
    lse_approx: bool = True,
    scale: float | None = None,
    kv_start: torch.Tensor | None = None,
    q_select: torch.Tensor | None = None,
    compressed: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Native `minicpm4_hf.sparse_attention.sparse_attention`, with the same arguments and results."""
    if compressed is None:
        compressed = pool_streams(k, kv_start, kernel_size, kernel_stride)
    return torch.ops.minicpm4_hf.cpu_sparse_attention(
        q,
        k,
        v,
        *compressed,
        q_select,
        kv_start,
        q.shape[-1] ** -0.5 if scale is None else scale,
        kernel_size,
        kernel_stride,
        block_size,
        init_blocks,
        window_size,
        topk,
        lse_approx,
    )


def pool_streams(k: torch.Tensor, kv_start: torch.Tensor | None, kernel_size: int, kernel_stride: int):
    """Both streams of pooled keys `[B, H, N, D]`, each row's windows counted from its own first key."""
    sizes = [(factor * kernel_size, factor * kernel_stride) for factor in (1, COARSE)]
    if kv_start is None or not kv_start.any():
        return tuple(pool_keys(k, *size) for size in sizes)
    streams = []
    for size, stride in sizes:
        stream = k.new_zeros(*k.shape[:2], count_pooled(k.shape[2], size, stride), k.shape[3])
        for row, start in enumerate(kv_start.tolist()):
            pooled = pool_keys(k[row : row + 1, :, start:], size, stride)
            stream[row : row + 1, :, : pooled.shape[2]] = pooled
        streams.append(stream)
    return tuple(streams)


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    kv_start: torch.Tensor | None = None,
    sliding_window: int = 0,
) -> torch.Tensor:
    """Causal attention of the last TQ of TK positions `[B, HQ, TQ, D]`; 0 for queries before `kv_start`.

    Args:
        kv_start: integer `[B]`, first real key of each row (left padding).
        sliding_window: keys that a query sees, itself included; 0 for all.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.minicpm4_hf.cpu_dense_attention(q, k, v, kv_start, scale, sliding_window)


OPERATIONS = AttentionOperations(sparse_attention, dense_attention, pool_keys)
