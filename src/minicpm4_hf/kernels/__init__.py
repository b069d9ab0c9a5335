"""The door between the model and its kernels: registers the attention function and picks a backend by device.

Nothing heavy is imported here; a kernel's module is loaded at its first call.
"""

from importlib.util import find_spec

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from minicpm4_hf.sparse_cache import infllm_v2_attention_forward as _reference_forward

# What can run InfLLM v2 in this version, and the device types it serves (None: all).
BACKENDS = {"reference": None, "triton": ("cuda",)}
# Names that are reserved for kernels to come: asking for one is an honest error, not a silent fallback.
_RESERVED = ("cpu",)


def resolve_backend(device_type: str, backend: str = "auto") -> tuple[str, str]:
    """The InfLLM v2 backend that runs on a device, and why.

    Args:
        device_type: `torch.device.type` of the tensors.
        backend: "auto" to choose, or the name of one that must run.

    Returns:
        Its name and the reason in words.

    Raises:
        ImportError: Triton was asked for and is not installed.
        NotImplementedError: the named backend is not part of this version.
        ValueError: no such backend.
    """
    if backend == "triton" or (backend == "auto" and device_type == "cuda"):
        if find_spec("triton") is not None:
            return "triton", "Triton kernels"
        if backend == "triton":
            raise ImportError("`backend='triton'` needs Triton: `pip install minicpm4-hf[gpu]`.")
        return "reference", "plain PyTorch; `pip install minicpm4-hf[gpu]` brings the Triton kernels"
    if backend == "auto":
        return "reference", f"plain PyTorch; this version has no native kernel for {device_type}"
    if backend in BACKENDS:
        return backend, "asked for by name"
    if backend in _RESERVED:
        raise NotImplementedError(
            f"`backend={backend!r}` is not part of this version; use 'reference' (PyTorch, any device) or 'auto'."
        )
    raise ValueError(f"`backend` must be 'auto', {', '.join(map(repr, (*BACKENDS, *_RESERVED)))}, got {backend!r}.")


def infllm_v2_forward(module, query, key, value, attention_mask, *, scaling, sparse_plan=None, **kwargs):
    """transformers attention function "infllm_v2": `[B, HQ, TQ, D]` in, `[B, TQ, HQ, D]` out.

    With a `sparse_plan` the sparse queries run on the best backend for the device; without one (a dense pass with
    `attn_implementation="infllm_v2"`) it is SDPA.
    """
    if sparse_plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    from minicpm4_hf.kernels.infllm_v2 import run_sparse_attention

    return _reference_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        sparse_plan=sparse_plan,
        operation=run_sparse_attention,
        **kwargs,
    )


AttentionInterface.register("infllm_v2", infllm_v2_forward)
# Without a mask function of the same name transformers would pass no mask, and padding would be attended to.
AttentionMaskInterface.register("infllm_v2", sdpa_mask)

__all__ = ["BACKENDS", "infllm_v2_forward", "resolve_backend"]
