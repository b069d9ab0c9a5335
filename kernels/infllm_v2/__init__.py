"""InfLLM v2 block-sparse attention: `sparse_attention(q, k, v, ...)`; see README.md in this folder."""

from dataclasses import replace

import torch

from minicpm4_hf.configuration_minicpm4 import complete_sparse_config
from minicpm4_hf.kernels import resolve_backend
from minicpm4_hf.kernels.infllm_v2.checks import check_tensors, refuse_unserved
from minicpm4_hf.kernels.infllm_v2.gpu import attend_static, pool_static, run_best, run_triton, sparse_attention_packed
from minicpm4_hf.sparse_attention import sparse_attention as _reference
from minicpm4_hf.sparse_cache import REFERENCE_OPERATIONS, AttentionOperations

_TRITON_OPERATIONS = replace(
    REFERENCE_OPERATIONS, sparse=run_best, pool_static=pool_static, attend_static=attend_static
)


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    kernel_size: int = 32,
    kernel_stride: int = 16,
    block_size: int = 64,
    init_blocks: int = 1,
    window_size: int = 2048,
    topk: int = 64,
    lse_approx: bool = True,
    scale: float | None = None,
    kv_start: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """InfLLM v2 attention: each query attends causally to the key blocks it selects.

    Keys are averaged over windows of `kernel_size` every `kernel_stride`; such a pooled key is visible to a query once
    all its tokens are at or before the query. Its weight is `exp(q . k_cmp * scale - lse)`, summed over the query
    heads that share the key head; a block's score is the largest weight among the windows that touch it. Attended are
    the first `init_blocks` blocks, those from `window_size // block_size` blocks before the query's own up to its own,
    and the best-scored others, `topk + window_size // block_size` in all (ties to the lower index). A query whose
    visible blocks fit that budget attends to all of them, and so equals dense attention.

    Where the official code and its papers disagree or have a bug, this does what the definition says: any group size
    (theirs: 16), no hidden kernel at lengths of 15 modulo 16, scores in float32 (theirs: rounded to the input dtype,
    which makes ties), positions counted a row at a time.

    Args:
        q: `[B, HQ, TQ, D]`, floating; the queries are the last TQ of the TK positions.
        k, v: `[B, H, TK, D]`, same dtype and device; HQ a multiple of H.
        kernel_size: tokens averaged into one pooled key, a multiple of `kernel_stride`.
        kernel_stride: tokens between the starts of two windows.
        block_size: tokens in a block, a multiple of `kernel_stride`.
        init_blocks: blocks at the start that are always attended.
        window_size: tokens of the local window, a multiple of `block_size`.
        topk: blocks a query gets beyond the local window, `init_blocks` and its own block included.
        lse_approx: estimate the log-sum-exp of the scores from windows four times as large (as the official code);
            exact where a query sees no such window, or where False.
        scale: factor on q . k; `D ** -0.5` where None.
        kv_start: int32 `[B]`, first real key of each row (left padding); positions and blocks count from there.
        backend: "cpu" (native; float32, bfloat16 and float16, head sizes that are multiples of 16, no gradients),
            "triton" (NVIDIA GPUs; head sizes up to 128 that are multiples of 16, gradients too), "reference" (plain
            PyTorch, any device) or "auto". A named backend runs or raises.

    Returns:
        `out [B, HQ, TQ, D]` in `q`'s dtype, 0 for queries before their row's `kv_start`; and `block_indices`, int32
        `[B, H, TQ, topk + window_size // block_size]`, ascending, padded with -1. `out` is differentiable with respect
        to `q`, `k` and `v`; the selection is not.

    Raises:
        ValueError: shapes, dtypes, devices or settings that do not fit, or that the named backend does not serve.
        RuntimeError: the named backend is not installed.

    Source: InfLLM-V2 (arXiv:2509.24663), MiniCPM4 (arXiv:2506.07900) section 2; infllmv2_cuda_impl at f908e73.
    """
    settings = {
        "kernel_size": kernel_size,
        "kernel_stride": kernel_stride,
        "block_size": block_size,
        "init_blocks": init_blocks,
        "window_size": window_size,
        "topk": topk,
    }
    complete_sparse_config(settings)
    check_tensors(q, k, v, kv_start)
    name, _ = resolve_backend(q.device.type, backend)
    if backend == "cpu":
        refuse_unserved(q, k, v)
    operation = model_operations(q, k, v).sparse if name == "cpu" else _reference
    if name == "triton":
        operation = run_triton if backend == "triton" else run_best
    return operation(q, k, v, **settings, lse_approx=lse_approx, scale=scale, kv_start=kv_start)


def operations_of(backend: str) -> AttentionOperations:
    """The operations of a backend by name, unchecked."""
    if backend == "cpu":
        from minicpm4_hf.kernels.cpu.attention import OPERATIONS

        return OPERATIONS
    return _TRITON_OPERATIONS if backend == "triton" else REFERENCE_OPERATIONS


def model_operations(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> AttentionOperations:
    """What runs attention over these tensors: the best backend for their device, dtype, head size and gradients."""
    name, _ = resolve_backend(q.device.type)
    if name == "triton":
        return operations_of("triton")
    if name == "cpu":
        from minicpm4_hf.kernels.cpu import attention

        if attention.unsupported_reason(q, k, v) is None:
            return operations_of("cpu")
    return operations_of("reference")


__all__ = ["sparse_attention", "sparse_attention_packed"]
