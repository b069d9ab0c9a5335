"""The door between the model and its kernels: registers attention and packed products, picks a backend by device.

Nothing heavy is imported here; a kernel's module is loaded at its first call.
"""

import os
import warnings
from functools import partial
from importlib.util import find_spec

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from minicpm4_hf.sparse_cache import infllm_v2_attention_forward as _reference_forward

# What can run InfLLM v2 in this version, and the device types it serves (None: all).
BACKENDS = {"reference": None, "cpu": ("cpu",), "triton": ("cuda",)}
# Looked up once: `torch.compile` cannot trace the lookup. MINICPM4_TRITON=0 keeps "auto" from the kernels.
_has_triton = find_spec("triton") is not None
_triton_enabled = os.environ.get("MINICPM4_TRITON") != "0"


def resolve_backend(device_type: str, backend: str = "auto") -> tuple[str, str]:
    """The InfLLM v2 backend that runs on a device, and why.

    Args:
        device_type: `torch.device.type` of the tensors.
        backend: "auto" to choose, or the name of one that must run.

    Returns:
        Its name and the reason in words.

    Raises:
        RuntimeError: the named backend is not installed, or cannot run on this machine.
        ValueError: no such backend, or it does not serve this kind of device.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"`backend` must be 'auto', {', '.join(map(repr, BACKENDS))}, got {backend!r}.")
    if backend == "reference":
        return backend, "asked for by name"
    if backend == "triton" or (backend == "auto" and device_type == "cuda" and _triton_enabled):
        if _has_triton:
            return "triton", "Triton kernels"
        if backend == "triton":
            raise RuntimeError("`backend='triton'` cannot run: Triton is missing (`pip install minicpm4-hf[gpu]`).")
        return "reference", "plain PyTorch; `pip install minicpm4-hf[gpu]` brings the Triton kernels"
    if device_type == "cuda" and backend == "auto":
        return "reference", "plain PyTorch: MINICPM4_TRITON=0"
    if device_type != "cpu":
        if backend == "cpu":
            raise ValueError(
                f"`backend='cpu'` takes tensors on the CPU, got {device_type}; use 'auto' or 'reference'."
            )
        return "reference", f"plain PyTorch; this version has no native kernel for {device_type}"

    from minicpm4_hf.kernels.cpu import load_library, why_missing

    missing = why_missing()
    if missing is None:
        return "cpu", f"native kernels, instruction set {load_library().isa}"
    if backend == "cpu":
        raise RuntimeError(f"`backend='cpu'` cannot run: {missing}.")
    if any(variable.startswith("MINICPM4_CPU_") for variable in os.environ):  # asked for by name
        warnings.warn(f"{missing}; PyTorch runs instead", stacklevel=2)
    return "reference", f"plain PyTorch: {missing}"


def infllm_v2_forward(module, query, key, value, attention_mask, *, scaling, sparse_plan=None, dropout=0.0, **kwargs):
    """transformers attention function "infllm_v2": `[B, HQ, TQ, D]` in, `[B, TQ, HQ, D]` out.

    With a `sparse_plan` the sparse queries run on the best backend for the device. A dense pass runs in
    `kernels/dense` where that serves it, and is SDPA with a mask otherwise. `attention_mask` is what `infllm_v2_mask`
    made: the first key of each row `[B]`, a `[B, 1, TQ, TK]` mask, or None.
    """
    if sparse_plan is not None:
        from minicpm4_hf.kernels.infllm_v2 import model_operations

        return _reference_forward(
            module,
            query,
            key,
            value,
            None,
            scaling=scaling,
            sparse_plan=sparse_plan,
            dropout=dropout,
            operations=model_operations(query, key, value),
            **kwargs,
        )
    kv_start = attention_mask if attention_mask is not None and attention_mask.dim() == 1 else None
    if (attention_mask is None or kv_start is not None) and not dropout and module.is_causal:
        from minicpm4_hf.kernels.dense import model_attention

        out = model_attention(query, key, value, scale=scaling, kv_start=kv_start)
        if out is not None:
            return out.transpose(1, 2), None
    num_queries, num_keys = query.shape[2], key.shape[2]
    if kv_start is not None or (attention_mask is None and 1 < num_queries < num_keys):
        real = None if kv_start is None else torch.arange(num_keys, device=key.device) >= kv_start[:, None]
        attention_mask = sdpa_mask(
            query.shape[0],
            num_queries,
            num_keys,
            q_offset=num_keys - num_queries,
            attention_mask=real,
            device=query.device,
        )
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
    )


def infllm_v2_mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=causal_mask_function,
    attention_mask=None,
    allow_is_causal_skip=True,
    device="cpu",
    **kwargs,
):
    """transformers mask function "infllm_v2": as little as the native kernels need, and SDPA's mask otherwise.

    Returns:
        None for plain causal attention, int64 `[B]` with the first key of each row for left padding, or bool
        `[B, 1, TQ, TK]`: other patterns, a cache with room to spare, compiled code, other devices.
    """
    plain = (
        torch.device(device).type == "cpu"
        and mask_function is causal_mask_function
        and allow_is_causal_skip
        and not torch.compiler.is_compiling()
        and kv_offset == 0
        and kv_length == q_length + q_offset
        and resolve_backend("cpu")[0] == "cpu"
    )
    if plain:
        if attention_mask is None:
            return None
        real = attention_mask[:, :kv_length].bool()
        first = real.int().argmax(1)  # 0 for a row without real keys, which is then as wrong as it is meaningless
        if real.shape[1] == kv_length and bool((real.sum(1) == kv_length - first).all()):
            return first if bool(first.any()) else None
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        # Without a mask the queries are the last of the keys; in a cache with room to spare they are not.
        allow_is_causal_skip=allow_is_causal_skip and q_length in (1, kv_length),
        device=device,
        **kwargs,
    )


def _serves_fused(x: torch.Tensor) -> bool:
    return _fused_layers_enabled and x.device.type == "cpu" and resolve_backend("cpu")[0] == "cpu"


def _fused_decoder_layer(layer, hidden_states, **kwargs):
    if not _serves_fused(hidden_states):
        return None
    from minicpm4_hf.kernels.cpu.decoder_layer import fused_decoder_layer

    return fused_decoder_layer(layer, hidden_states, **kwargs)


def _fused_linear(module, x):
    if not _serves_fused(x):
        return None
    from minicpm4_hf.kernels.cpu.decoder_layer import fused_linear

    return fused_linear(module, x)


# What the package puts into the model's `FUSED_FUNCTIONS`.
FUSED_FUNCTIONS = {"decoder_layer": _fused_decoder_layer, "linear": _fused_linear}
_fused_layers_enabled = os.environ.get("MINICPM4_FUSED_LAYERS") != "0"


def use_fused_layers(enabled: bool = True) -> None:
    """Switch the native decoder layer and linear layers, which serve bfloat16 on the CPU, on or off.

    They are on, unless the environment variable MINICPM4_FUSED_LAYERS is 0 at import.
    """
    global _fused_layers_enabled
    _fused_layers_enabled = enabled


def _packed_linear(name: str, *arguments):
    from minicpm4_hf.kernels.lowbit import run_best

    return run_best(name, *arguments)


# `minicpm4_hf.quantization` defines these operators in plain PyTorch, which stays what other devices run.
_PACKED_OPERATORS = torch.library.Library("minicpm4_hf", "IMPL")
for _name in ("ternary_linear", "int4_linear", "int8_linear"):
    for _device in ("CPU", "CUDA"):
        _PACKED_OPERATORS.impl(_name, partial(_packed_linear, _name), _device)

AttentionInterface.register("infllm_v2", infllm_v2_forward)
# Without a mask function of the same name transformers would pass no mask, and padding would be attended to.
AttentionMaskInterface.register("infllm_v2", infllm_v2_mask)

__all__ = ["BACKENDS", "FUSED_FUNCTIONS", "infllm_v2_forward", "infllm_v2_mask", "resolve_backend", "use_fused_layers"]
