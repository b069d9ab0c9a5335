"""Dense causal attention with grouped heads: `dense_attention(q, k, v, ...)`; native on the CPU, PyTorch elsewhere."""

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from minicpm4_hf.kernels import resolve_backend
from minicpm4_hf.kernels.infllm_v2.checks import check_tensors, refuse_unserved

# Without cuDNN, which PyTorch prefers on Hopper: it plans anew for every number of keys.
DECODE_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    kv_start: torch.Tensor | None = None,
    sliding_window: int = 0,
    backend: str = "auto",
) -> torch.Tensor:
    """Causal attention of the last TQ of TK positions.

    Args:
        q: `[B, HQ, TQ, D]`, floating.
        k, v: `[B, H, TK, D]`, same dtype and device; HQ a multiple of H.
        scale: factor on q . k; `D ** -0.5` where None.
        kv_start: integer `[B]`, first real key of each row (left padding).
        sliding_window: keys that a query sees, itself included; 0 for all.
        backend: "cpu" (native; no gradients), "reference" (PyTorch's SDPA) or "auto". A named backend runs or raises.

    Returns:
        `[B, HQ, TQ, D]` in `q`'s dtype, 0 for queries before their row's `kv_start`.

    Raises:
        ValueError: shapes, dtypes, devices or settings that do not fit, or that the named backend does not serve.
        RuntimeError: the named backend is not installed.
    """
    check_tensors(q, k, v, kv_start)
    if isinstance(sliding_window, bool) or not isinstance(sliding_window, int) or sliding_window < 0:
        raise ValueError(f"`sliding_window` must be an integer of at least 0, got {sliding_window!r}.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    name, _ = resolve_backend(q.device.type, backend)
    if name == "cpu":
        from minicpm4_hf.kernels.cpu import attention

        if backend == "cpu":
            refuse_unserved(q, k, v)
        if attention.unsupported_reason(q, k, v) is None:
            return attention.dense_attention(q, k, v, scale=scale, kv_start=kv_start, sliding_window=sliding_window)
    return _reference(q, k, v, scale, kv_start, sliding_window)


def model_attention(q, k, v, *, scale: float, kv_start: torch.Tensor | None = None) -> torch.Tensor | None:
    """The model's entry: unchecked arguments; the fastest way there is here, None where plain SDPA is."""
    if q.is_cuda and q.dtype.itemsize == 2 and q.shape[2] == 1 and kv_start is None:
        return decode_attention(q, k, v, scale=scale)
    if q.device.type != "cpu" or resolve_backend("cpu")[0] != "cpu":
        return None
    from minicpm4_hf.kernels.cpu import attention

    if attention.unsupported_reason(q, k, v) is not None:
        return None
    return attention.dense_attention(q, k, v, scale=scale, kv_start=kv_start)


def decode_attention(q, k, v, *, scale: float) -> torch.Tensor:
    """SDPA of one query, its group as the rows of one head, so that keys and values are read once: `q` in shape."""
    rows = q.reshape(k.shape[0], k.shape[1], -1, q.shape[3])
    with sdpa_kernel(DECODE_BACKENDS):
        return F.scaled_dot_product_attention(rows, k, v, scale=scale).view_as(q)


def _reference(q, k, v, scale, kv_start, sliding_window) -> torch.Tensor:
    num_queries, num_keys = q.shape[2], k.shape[2]
    key = torch.arange(num_keys, device=q.device)
    query = key[num_keys - num_queries :, None]
    mask = key <= query
    if sliding_window:
        mask = mask & (key > query - sliding_window)
    if kv_start is not None:
        mask = mask & (key >= kv_start.to(key.device)[:, None, None, None])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    if kv_start is not None:  # a query without keys: softmax over nothing
        out = out.masked_fill(query < kv_start.to(key.device)[:, None, None, None], 0)
    return out


__all__ = ["dense_attention"]
