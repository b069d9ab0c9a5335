"""InfLLM v2 block-sparse attention: `sparse_attention(q, k, v, ...)`; see README.md in this folder."""

import torch

from minicpm4_hf.configuration_minicpm4 import complete_sparse_config
from minicpm4_hf.kernels import resolve_backend
from minicpm4_hf.kernels.infllm_v2.gpu import run_triton, serves, sparse_attention_packed
from minicpm4_hf.sparse_attention import sparse_attention as _reference

_OPERATIONS = {"reference": _reference, "triton": run_triton}


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
        backend: "triton" (NVIDIA GPUs), "reference" (plain PyTorch, any device) or "auto". A named one runs or raises.

    Returns:
        `out [B, HQ, TQ, D]` in `q`'s dtype, 0 for queries before their row's `kv_start`; and `block_indices`, int32
        `[B, H, TQ, topk + window_size // block_size]`, ascending, padded with -1. `out` is differentiable with respect
        to `q`, `k` and `v`; the selection is not.

    Raises:
        ValueError: shapes, dtypes, devices or settings that do not fit.
        ImportError: `backend="triton"` without Triton.
        NotImplementedError: a backend that this version does not have.

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
    _check_tensors(q, k, v, kv_start)
    name, _ = resolve_backend(q.device.type, backend)
    if backend == "auto" and name == "triton" and not serves(q, k, settings):
        name = "reference"
    return _OPERATIONS[name](q, k, v, **settings, lse_approx=lse_approx, scale=scale, kv_start=kv_start)


def run_sparse_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs):
    """The model's entry: unchecked arguments, the cache's pooled keys under `compressed`, the best backend."""
    name, _ = resolve_backend(q.device.type)
    if name == "triton" and not serves(q, k, kwargs):
        name = "reference"
    return _OPERATIONS[name](q, k, v, **kwargs)


def _check_tensors(q, k, v, kv_start) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(f"`{name}` must have shape [batch, heads, tokens, head_dim], got {list(tensor.shape)}.")
        if not tensor.is_floating_point() or tensor.dtype != q.dtype:
            raise ValueError(
                f"`q`, `k` and `v` must share one floating dtype, got {q.dtype}, {k.dtype} and {v.dtype}."
            )
        if tensor.device != q.device:
            raise ValueError(f"`q`, `k` and `v` must be on one device, got {q.device}, {k.device} and {v.device}.")
    if k.shape != v.shape:
        raise ValueError(f"`k` and `v` must have the same shape, got {list(k.shape)} and {list(v.shape)}.")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"`q` and `k` must agree in batch and head_dim, got {list(q.shape)} and {list(k.shape)} "
            "([batch, heads, tokens, head_dim])."
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"`q`'s heads must be a multiple of `k`'s, got {q.shape[1]} and {k.shape[1]}.")
    if not 1 <= q.shape[2] <= k.shape[2]:
        raise ValueError(
            f"The queries are the last positions of the keys, so there must be 1 to {k.shape[2]} of them, "
            f"got {q.shape[2]}."
        )
    if kv_start is not None and (kv_start.shape != q.shape[:1] or kv_start.is_floating_point()):
        raise ValueError(f"`kv_start` must be an integer tensor of shape [{q.shape[0]}], got {list(kv_start.shape)}.")


__all__ = ["sparse_attention", "sparse_attention_packed"]
