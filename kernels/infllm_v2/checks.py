"""What attention's arguments must be, checked once at the public door."""

import torch


def check_tensors(q, k, v, kv_start) -> None:
    """Raise ValueError, in one sentence, where `q [B, HQ, TQ, D]`, `k` and `v [B, H, TK, D]` do not fit together."""
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


def refuse_unserved(*tensors: torch.Tensor) -> None:
    """Raise ValueError where the native CPU kernels, asked for by name, do not serve the tensors."""
    from minicpm4_hf.kernels.cpu.attention import unsupported_reason

    reason = unsupported_reason(*tensors)
    if reason is not None:
        raise ValueError(f"`backend='cpu'` does not serve this call: {reason}; use 'auto' or 'reference'.")
