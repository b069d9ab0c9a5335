"""A decoder layer in one native call, or a few around the attention, and a linear layer at few tokens.

At one token a layer is bound by reading its weights, and what PyTorch does between the products (norms, rotation,
activation, residual sums) costs as much time as the reading of a small layer. Here each product takes its neighbours
along. In a prompt, PyTorch's matrix products stay, and each of the others is one pass over memory.
"""

from itertools import repeat
from operator import itemgetter
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from minicpm4_hf.kernels.cpu.library import (
    ATTENTION_ARGS,
    DTYPES,
    LINEAR_CALL,
    NO_TENSOR,
    check_result,
    load_library,
    tensor_fields,
)
from minicpm4_hf.kernels.cpu.linear import MAX_ROWS, linear, rope_tables, serves
from minicpm4_hf.kernels.cpu.packed import PackedWeight, int4_weight, pack_weights, ternary_weight
from minicpm4_hf.quantization import Int4Linear, TernaryLinear
from minicpm4_hf.sparse_cache import GrowingLayer

_SILU = type(ACT2FN["silu"])
_ACT_ORDER, _FORWARDS = itemgetter("act_order"), repeat("forward")
_SPARSE_SETTINGS = ("kernel_size", "kernel_stride", "block_size", "init_blocks", "window_size", "topk")
# Where a module's tensors are not just its `weight`.
_TENSORS = {TernaryLinear: ("weight", "weight_scale"), Int4Linear: ("qweight", "scales")}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _is_plain(module: nn.Module) -> bool:
    """No hook, and no `forward` put on the instance: calling the module would do no more than its class says."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _weight_of(module: nn.Module) -> torch.Tensor | PackedWeight | None:
    """What a linear layer multiplies with and nothing beside it: bfloat16 `[N, K]` or packed; None for any other."""
    kind = type(module)
    if not _is_plain(module) or getattr(module, "bias", None) is not None:
        return None
    if kind is nn.Linear:
        weight = module.weight
        plain = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and weight.is_contiguous()
        return weight if plain else None
    if kind is TernaryLinear:
        return ternary_weight(module.weight, module.weight_scale)
    if kind is Int4Linear and not module.act_order:
        return int4_weight(module.qweight, module.scales)
    return None


def _shape(weight: torch.Tensor | PackedWeight) -> tuple[int, int]:
    """Outputs and inputs."""
    return (weight.out_features, weight.in_features) if isinstance(weight, PackedWeight) else tuple(weight.shape)


def _kind(weight: torch.Tensor | PackedWeight) -> tuple:
    """What weights that one native call takes side by side have in common."""
    return weight.kind if isinstance(weight, PackedWeight) else (weight.dtype, weight.shape[1])


def _is_plain_norm(module: nn.Module) -> bool:
    return isinstance(module, LlamaRMSNorm) and module.weight.dtype == torch.bfloat16 and _is_plain(module)


def fused_linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """`module(x)` for a plain linear layer, bfloat16 or packed, and at most eight rows; None where that is not so."""
    weight = _weight_of(module)
    return None if weight is None or not serves(x, weight) else linear(x, weight)


def _projections_of(layer) -> list[nn.Module]:
    owners = [layer.self_attn] * 4 + [layer.mlp] * 3
    return [getattr(owner, name) for owner, name in zip(owners, _PROJECTIONS)]


class LayerPlan:
    """A decoder layer of plain modules, bfloat16 or packed, as the native code takes it; good while `still_holds`.

    At one token, looking at a layer's modules anew costs as much as some of their products; this remembers what it
    saw, and afterwards compares identities and addresses only.
    """

    def __init__(self, layer, weights: list):
        attention, mlp = layer.self_attn, layer.mlp
        linears = _projections_of(layer)
        norms = [layer.input_layernorm, layer.post_attention_layernorm]
        leaves = [*linears, *norms]
        owned = {layer: ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")}
        owned |= {attention: _PROJECTIONS[:4], mlp: (*_PROJECTIONS[4:], "act_fn")}
        self.children = [(itemgetter(*names), owner._modules) for owner, names in owned.items()]
        modules = (attention, mlp, *leaves)
        self.modules, self.types = modules, [type(module) for module in modules]
        self.attributes = [module.__dict__ for module in modules]
        self.hooks = [h for module in modules for h in (module._forward_hooks, module._forward_pre_hooks)]
        used = [(module, name) for module in leaves for name in _TENSORS.get(type(module), ("weight",))]
        self.names = [name for _, name in used]
        self.holders = [m._parameters if name in m._parameters else m._buffers for m, name in used]
        self.tensors = list(map(dict.__getitem__, self.holders, self.names))
        self.orders = [module.__dict__ for module in linears if type(module) is Int4Linear]
        self.seen = self._look()
        self.norms = [(norm.weight, norm.variance_epsilon) for norm in norms]
        self.head_dim = attention.head_dim
        self.num_heads, self.num_key_heads = (p.out_features // self.head_dim for p in linears[:2])
        self.middle_features = mlp.gate_proj.out_features
        self.scale = layer.residual_scale
        self.weights = weights
        q, k, v, o, gate, up, down = weights
        rope = (self.num_heads + self.num_key_heads, self.head_dim)
        self.projection = pack_weights((q, k, v), norm=self.norms[0], rope=rope)
        self.rest = (
            pack_weights((o,), residual_scale=self.scale),
            pack_weights((up,), gate=gate, norm=self.norms[1]),
            pack_weights((down,), residual_scale=self.scale),
        )

    @classmethod
    def make(cls, layer) -> "LayerPlan | None":
        """The plan of a plain layer (no adapter, no hooked module, no bias, SiLU), None for any other."""
        attention, mlp = layer.self_attn, layer.mlp
        weights = [_weight_of(module) for module in _projections_of(layer)]
        plain = (
            all(weight is not None for weight in weights)
            and _is_plain(attention)
            and _is_plain(mlp)
            and type(mlp).forward is LlamaMLP.forward
            and type(mlp.act_fn) is _SILU
            and _is_plain_norm(layer.input_layernorm)
            and _is_plain_norm(layer.post_attention_layernorm)
            and cls._fits(layer, weights)
        )
        return cls(layer, weights) if plain else None

    @staticmethod
    def _fits(layer, weights: list) -> bool:
        """Whether shapes and kinds fit together, which native code does not ask."""
        q, k, v, o, gate, up, down = map(_shape, weights)
        kinds = [_kind(weight) for weight in weights]
        size, dim = layer.input_layernorm.weight.numel(), layer.self_attn.head_dim
        return (
            layer.post_attention_layernorm.weight.numel() == size == q[1] == gate[1]
            and k == v
            and k[1] == size
            and o == (size, q[0])
            and up == gate
            and down == (size, gate[0])
            and q[0] % k[0] == 0
            and k[0] % dim == 0
            and kinds[0] == kinds[1] == kinds[2]
            and kinds[4] == kinds[5]
        )

    def _look(self) -> tuple:
        return (
            [get(modules) for get, modules in self.children],
            list(map(id, map(dict.__getitem__, self.holders, self.names))),
            list(map(torch.Tensor.data_ptr, self.tensors)),
            list(map(torch.Tensor.stride, self.tensors)),
            list(map(_ACT_ORDER, self.orders)),
        )

    def still_holds(self) -> bool:
        """Whether the layer has the modules, hooks and weights that it had."""
        return (
            not any(self.hooks)
            and list(map(type, self.modules)) == self.types
            and not any(map(dict.__contains__, self.attributes, _FORWARDS))
            and self._look() == self.seen
        )


_plans: WeakKeyDictionary[nn.Module, LayerPlan] = WeakKeyDictionary()


def _plan_of(layer) -> LayerPlan | None:
    plan = _plans.get(layer)
    if plan is None or plan.scale != layer.residual_scale or not plan.still_holds():
        plan = LayerPlan.make(layer)
        if plan is not None:
            _plans[layer] = plan
    return plan


def fused_decoder_layer(layer, hidden_states: torch.Tensor, *, position_embeddings, **kwargs) -> torch.Tensor | None:
    """What `MiniCPM4DecoderLayer.forward` returns, or None where this does not serve the call.

    It serves plain layers in bfloat16 or with packed weights (no adapter, no hooked module, SiLU) on the CPU without
    gradients.
    """
    if hidden_states.dtype != torch.bfloat16 or hidden_states.device.type != "cpu" or not hidden_states.numel():
        return None
    attention, plan = layer.self_attn, _plan_of(layer)
    if plan is None or attention.needs_unrotated:
        return None
    if torch.is_grad_enabled() and (hidden_states.requires_grad or any(t.requires_grad for t in plan.tensors)):
        return None
    run = _few_rows if hidden_states.numel() <= MAX_ROWS * hidden_states.shape[-1] else _many_rows
    return run(plan, attention, hidden_states, position_embeddings, kwargs)


def _attend(plan: LayerPlan, attention, projected: torch.Tensor, kwargs: dict) -> torch.Tensor:
    """Attention over `[B, T, (HQ + 2 H) D]`, rotated: `[B, T, HQ * D]`."""
    heads = projected.view(*projected.shape[:-1], -1, plan.head_dim).transpose(1, 2)
    query, key, value = heads.split((plan.num_heads, plan.num_key_heads, plan.num_key_heads), 1)
    return attention.attend(query, key, value, **kwargs)[0]


def _many_rows(plan: LayerPlan, attention, hidden_states, position_embeddings, kwargs) -> torch.Tensor:
    q, k, v, o, gate, up, down = plan.weights
    rope = (*position_embeddings, plan.num_heads + plan.num_key_heads)
    projected = linear(hidden_states, q, k, v, norm=plan.norms[0], rope=rope)
    attended = _attend(plan, attention, projected, kwargs)
    hidden_states = linear(attended, o, residual=(hidden_states, plan.scale))
    gated = linear(hidden_states, up, gate=gate, norm=plan.norms[1])
    return linear(gated, down, residual=(hidden_states, plan.scale))


def _few_rows(plan: LayerPlan, attention, hidden_states, position_embeddings, kwargs) -> torch.Tensor:
    """`_many_rows` as one native call, or as two around an attention that it does not serve."""
    x, library, threads = hidden_states.contiguous(), load_library(), torch.get_num_threads()
    *shape, size = x.shape
    rows, hidden_features, middle_features = x.numel() // size, plan.num_heads * plan.head_dim, plan.middle_features
    cosine, sine = rope_tables(position_embeddings)
    projected = x.new_empty(*shape, hidden_features + 2 * plan.num_key_heads * plan.head_dim)
    middle, gated, out = x.new_empty(rows, size), x.new_empty(rows, middle_features), x.new_empty(*shape, size)
    from_x, at_middle, at_gated = x.data_ptr(), middle.data_ptr(), gated.data_ptr()
    o, up, down = plan.rest

    tables = cosine.data_ptr(), sine.data_ptr(), cosine.shape[0]
    project = LINEAR_CALL.pack(from_x, projected.data_ptr(), 0, *tables, rows, size, 0, threads) + plan.projection
    attended = x.new_empty(*shape, hidden_features)
    attend, keep = _pack_attention(plan, attention, projected, attended, threads, **kwargs)
    if attend is None:
        check_result(library.mc_linear(project, 1))
        attended = _attend(plan, attention, projected, kwargs)
    rest = (
        LINEAR_CALL.pack(attended.data_ptr(), at_middle, from_x, 0, 0, 0, rows, hidden_features, size, threads),
        o,
        LINEAR_CALL.pack(at_middle, at_gated, 0, 0, 0, 0, rows, size, 0, threads),
        up,
        LINEAR_CALL.pack(at_gated, out.data_ptr(), at_middle, 0, 0, 0, rows, middle_features, size, threads),
        down,
    )
    if attend is None:
        check_result(library.mc_linear(b"".join(rest), 3))
    else:
        check_result(library.mc_layer(b"".join((project, attend, *rest))))
    del keep  # the memory that only addresses in `attend` pointed to
    return out


def _pack_attention(
    plan: LayerPlan,
    attention,
    projected: torch.Tensor,
    attended: torch.Tensor,
    threads: int,
    attention_mask=None,
    past_key_values=None,
    sparse_plan=None,
    **kwargs,
) -> tuple[bytes | None, tuple]:
    """`attention.attend` over `projected [B, T, (HQ + 2 H) D]` for `mc_layer`, and what must outlive that call.

    The new keys' place in the cache is taken; the call fills it. (None, ()) where `attend` has to do it: rows with
    padding, another attention or cache, tokens of which some are sparse and some dense, or that complete a window of
    pooled keys.
    """
    cache, index = past_key_values, attention.layer_idx
    if attention_mask is not None or cache is None or type(cache).update is not Cache.update or cache.offloading:
        return None, ()
    layer = cache.layers[index] if index < len(cache.layers) else None
    if not isinstance(layer, GrowingLayer) or (attention.training and attention.attention_dropout):
        return None, ()
    batch, num_new, features = projected.shape
    num_keys = layer.get_seq_length() + num_new
    settings, keep, sparse = (0,) * 7, (), NO_TENSOR * 4
    if sparse_plan is not None:
        size, stride, block, init, window, topk = map(sparse_plan.settings.get, _SPARSE_SETTINGS)
        dense_until = sparse_plan.settings["dense_len"] - 1
        if sparse_plan.kv_start is not None or num_keys - num_new < dense_until:
            return None, ()
        pooled = layer.compressed.get_complete(num_keys, size, stride)
        if pooled is None:
            return None, ()
        width = topk + window // block
        blocks = torch.empty(batch, plan.num_key_heads, num_new, width, dtype=torch.int32)
        keep = (*pooled, blocks)
        sparse = (*NO_TENSOR, *tensor_fields(pooled[0]), *tensor_fields(pooled[1]), *tensor_fields(blocks))
        settings = size, stride, block, init, window, topk, True
    elif attention.config._attn_implementation != "infllm_v2" or not attention.is_causal:
        return None, ()
    buffers = layer.extend(num_new)
    if buffers is None:
        return None, ()
    if buffers[0].dtype != torch.bfloat16 or buffers[0].device.type != "cpu" or buffers[0].shape[0] != batch:
        raise ValueError(
            f"The cache holds {buffers[0].shape[0]} rows in {buffers[0].dtype} on {buffers[0].device}, and the new "
            f"tokens are {batch} in bfloat16 on the CPU; start with a new cache."
        )
    dim, heads, key_heads = plan.head_dim, plan.num_heads, plan.num_key_heads
    strides = num_new * features, dim, features  # of batch, head and token in `projected`
    at = projected.data_ptr()
    arguments = ATTENTION_ARGS.pack(
        at,
        *strides,
        *tensor_fields(buffers[0]),
        *tensor_fields(buffers[1]),
        attended.data_ptr(),
        num_new * heads * dim,
        dim,
        heads * dim,
        0,
        DTYPES[torch.bfloat16],
        batch,
        heads,
        key_heads,
        dim,
        num_new,
        num_keys,
        threads,
        attention.scaling,
        0,
        *sparse,
        *settings,
        at + 2 * heads * dim,
        *strides,
        at + 2 * (heads + key_heads) * dim,
        *strides,
    )
    return arguments, keep
