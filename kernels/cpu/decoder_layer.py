"""A decoder layer as four calls around the attention, and a linear layer at few tokens.

At one token a layer is bound by reading its weights, and what PyTorch does between the products (norms, rotation,
activation, residual sums) costs as much time as the reading of a small layer. Here each product takes its neighbours
along. In a prompt, PyTorch's matrix products stay, and each of the others is one pass over memory.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from minicpm4_hf.kernels.cpu.linear import linear, serves

_SILU = type(ACT2FN["silu"])


def _is_plain(module: nn.Module) -> bool:
    """No hook, and no `forward` put on the instance: calling the module would do no more than its class says."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _is_plain_linear(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and module.bias is None
        and module.weight.dtype == torch.bfloat16
        and module.weight.is_contiguous()
        and _is_plain(module)
    )


def _is_plain_norm(module: nn.Module) -> bool:
    return isinstance(module, LlamaRMSNorm) and module.weight.dtype == torch.bfloat16 and _is_plain(module)


def fused_linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """`module(x)` for a plain bfloat16 linear layer and at most eight rows; None where that is not so."""
    if not _is_plain_linear(module) or not serves(x, module.weight):
        return None
    return linear(x, module.weight)


def fused_decoder_layer(layer, hidden_states: torch.Tensor, *, position_embeddings, **kwargs) -> torch.Tensor | None:
    """What `MiniCPM4DecoderLayer.forward` returns, or None where this does not serve the call.

    It serves plain bfloat16 layers (no adapter, no quantised or hooked module, SiLU) on the CPU without gradients.
    """
    attention, mlp = layer.self_attn, layer.mlp
    if (
        not serves(hidden_states, attention.q_proj.weight, max_rows=None)
        or not all(
            map(
                _is_plain_linear,
                (
                    attention.q_proj,
                    attention.k_proj,
                    attention.v_proj,
                    attention.o_proj,
                    mlp.gate_proj,
                    mlp.up_proj,
                    mlp.down_proj,
                ),
            )
        )
        or not (_is_plain_norm(layer.input_layernorm) and _is_plain_norm(layer.post_attention_layernorm))
        or not (_is_plain(attention) and _is_plain(mlp) and type(mlp).forward is LlamaMLP.forward)
        or type(mlp.act_fn) is not _SILU
        or attention.needs_unrotated
    ):
        return None
    shape = hidden_states.shape[:-1]
    num_rotated = (attention.q_proj.out_features + attention.k_proj.out_features) // attention.head_dim
    projected = linear(
        hidden_states,
        attention.q_proj.weight,
        attention.k_proj.weight,
        attention.v_proj.weight,
        norm=(layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon),
        rope=(*position_embeddings, num_rotated),
    )
    heads = projected.view(*shape, -1, attention.head_dim).transpose(1, 2)  # [B, HQ + 2 H, T, D]
    num_heads = num_rotated - (heads.shape[1] - num_rotated)
    attended, _ = attention.attend(
        heads[:, :num_heads], heads[:, num_heads:num_rotated], heads[:, num_rotated:], **kwargs
    )
    scale = layer.residual_scale
    hidden_states = linear(attended, attention.o_proj.weight, residual=(hidden_states, scale))
    gated = linear(
        hidden_states,
        mlp.up_proj.weight,
        gate=mlp.gate_proj.weight,
        norm=(layer.post_attention_layernorm.weight, layer.post_attention_layernorm.variance_epsilon),
    )
    return linear(gated, mlp.down_proj.weight, residual=(hidden_states, scale))
