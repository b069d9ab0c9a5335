"""The Triton backend as the door sees it: Triton is imported at the first call on a GPU, not before."""

from itertools import pairwise

import torch
from transformers.utils import logging

from minicpm4_hf.sparse_attention import sparse_attention as reference

logger = logging.get_logger(__name__)


def run_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """`sparse_attention` of the Triton backend; ValueError, in one sentence, for what its kernels do not take."""
    from minicpm4_hf.kernels.infllm_v2 import triton_backend

    return triton_backend.sparse_attention(q, k, v, **kwargs)


def run_best(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """`sparse_attention` on a GPU whatever the arguments: the kernels, or plain PyTorch where they do not serve."""
    return (run_triton if serves(q, k, kwargs) else reference)(q, k, v, **kwargs)


def pool_static(*args, **kwargs) -> None:
    """See `triton_backend.pool_static`."""
    from minicpm4_hf.kernels.infllm_v2 import triton_backend

    triton_backend.pool_static(*args, **kwargs)


def attend_static(*args, **kwargs) -> torch.Tensor:
    """See `triton_backend.attend_static`."""
    from minicpm4_hf.kernels.infllm_v2 import triton_backend

    return triton_backend.attend_static(*args, **kwargs)


def serves(q: torch.Tensor, k: torch.Tensor, settings: dict) -> bool:
    """Whether the Triton kernels take these tensors and settings; one warning says so where they do not."""
    from minicpm4_hf.kernels.infllm_v2 import triton_backend

    misfit = triton_backend.name_misfit(q, k, settings)
    if misfit is not None:
        logger.warning_once(f"{misfit} Plain PyTorch runs instead.")
    return misfit is None


def sparse_attention_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    max_seqlen: int | None = None,
    backend: str = "auto",
    **settings,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sparse_attention` over packed texts: text n is tokens `cu_seqlens[n]` to `cu_seqlens[n + 1]`.

    Args:
        q: `[1, HQ, T, D]`; k, v: `[1, H, T, D]`.
        cu_seqlens: int32 `[N + 1]`, ascending from 0 to T.
        max_seqlen: length of the longest text; saves work on a GPU.
        backend, settings: as in `sparse_attention`; without the Triton kernels the texts run one by one.

    Returns:
        `out [1, HQ, T, D]`, differentiable, and `block_indices [1, H, T, S]`, counted from a text's first token.

    Raises:
        ValueError: shapes or `cu_seqlens` that do not fit.
    """
    from minicpm4_hf.kernels import resolve_backend
    from minicpm4_hf.kernels.infllm_v2 import sparse_attention

    if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point() or q.shape[0] != 1 or q.shape[2] != k.shape[2]:
        raise ValueError(
            "Packed texts need `q`, `k` and `v` with one batch entry and the same tokens, and an integer `cu_seqlens` "
            f"of shape [texts + 1], got {list(q.shape)}, {list(k.shape)} and {list(cu_seqlens.shape)}."
        )
    name, _ = resolve_backend(q.device.type, backend)
    block = {"kernel_size": 32, "kernel_stride": 16, "block_size": 64} | settings
    if name == "triton" and (backend == "triton" or serves(q, k, block)):
        return run_triton(q, k, v, **settings, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
    ends = cu_seqlens.tolist()
    texts = [
        sparse_attention(*(t[:, :, begin:end] for t in (q, k, v)), **settings, backend=backend)
        for begin, end in pairwise(ends)
        if end > begin
    ]
    return tuple(torch.cat(parts, 2) for parts in zip(*texts))
