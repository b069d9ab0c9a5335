"""Quantisation-aware training of ternary weights, as BitCPM4's: layers that learn through their own quantiser.

    use_ternary_linears_(model, group_size=-1)  # before torch.compile and before adapters
    ...                                         # train as before
    use_plain_linears_(model)

A layer keeps its latent weight `W` in float32 and computes with what `quantize_ternary` makes of it at that moment:

    s = max(mean |W|, eps) over each group,  W' = s * clamp(round(W / s), -1, 1),  y = x W'^T
    dL/dW = dL/dW', dL/dx = dL/dy W'

the straight-through estimator: what is rounded passes its gradient on as if it were not. Inputs are not quantised.
Only the attention and MLP projections of the decoder layers are ternary; embedding, head, norms and a head for
multi-token prediction are not. A saved model is an ordinary one of latent weights, and `TernarySettings.quantization`
packs it with the codes and scales that it was trained with: both come from the float32 weights. Rounding these to
bfloat16 in between changes up to 1.8 % of the codes (arXiv:2610.07853). A run packs on the CPU, whose sums may round a
scale otherwise than a GPU's in the last bit.

Source: quantiser, straight-through estimator and what stays in full precision: the technical reports of BitCPM-CANN
and of MiniCPM4 (arXiv:2506.07900, section on BitCPM4), after BitNet b1.58 (arXiv:2402.17764).
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from minicpm4_hf.modeling_minicpm4 import MiniCPM4ForCausalLM
from minicpm4_hf.quantization.bitcpm import BitCPMConfig, replace_modules_
from minicpm4_hf.quantization.ternary import EPS, ROW, split_groups
from minicpm4_hf.training.fp8 import PROJECTIONS


@dataclass(frozen=True, kw_only=True)
class TernarySettings:
    """How a stage's linear layers are ternary, and how the finished model is packed.

    Args:
        group_size: inputs that share a scale: -1 (a whole row, as the released BitCPM4 models), 256, 128, 64 or 32.
        embeddings: of the packed model: None leaves embedding and head in bfloat16, "int8" and "int4" round them after
            the training, which knows nothing of it.

    Raises:
        ValueError: another value.
    """

    group_size: int = ROW
    embeddings: str | None = None

    def __post_init__(self):
        self.quantization  # noqa: B018  (its checks)

    @property
    def quantization(self) -> BitCPMConfig:
        """What `from_pretrained(latent folder, quantization_config=...)` takes to pack the model."""
        return BitCPMConfig(group_size=self.group_size, embeddings=self.embeddings)


def check_fit(config: PreTrainedConfig, settings: TernarySettings) -> None:
    """See that a MiniCPM4 of these sizes can be packed, before it is trained to be.

    Raises:
        ValueError: a layer, or the embedding, whose sizes do not fit the groups.
    """
    with torch.device("meta"):
        replace_modules_(MiniCPM4ForCausalLM(config), settings.quantization)


def ternary_values(weight: torch.Tensor, group_size: int = ROW) -> torch.Tensor:
    """The float32 weight `[N, K]` that the codes and scales of `quantize_ternary` stand for, bit by bit.

    It makes no codes in between and looks for no NaN, which would have to wait for the device; a NaN or infinity in a
    group makes the group NaN.

    Args:
        weight: `[N, K]`, float32.

    Raises:
        ValueError: another dtype, or groups that do not fit.
    """
    if weight.dtype != torch.float32:
        raise ValueError(
            f"Latent ternary weights must be float32, got {weight.dtype}: rounded ones have other codes; keep the "
            "model in float32 and let autocast round what the layers multiply."
        )
    groups = split_groups(weight, group_size)
    scales = groups.abs().mean(-1, keepdim=True).clamp_(min=EPS)
    return (groups / scales).round_().clamp_(-1, 1).mul_(scales).flatten(1)


class _TernaryProduct(torch.autograd.Function):
    """`x W'^T` with the straight-through gradient.

    It saves the input and the latent weight itself and quantises anew in the backward pass, so that sharded training
    can free the gathered weight in between and no copy of the weights waits for it. Autocast is off inside.
    """

    @staticmethod
    def forward(ctx, x, weight, group_size):
        ctx.save_for_backward(x, weight)
        ctx.group_size = group_size
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, ternary_values(weight, group_size).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        with torch.autocast(x.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = grad @ ternary_values(weight, ctx.group_size).to(grad.dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = (grad.flatten(0, -2).mT @ x.flatten(0, -2)).to(weight.dtype)
        return grad_x, grad_weight, None


def ternary_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, group_size: int = ROW
) -> torch.Tensor:
    """`F.linear` with the ternary values of a latent weight, and their gradient for it; no second derivative.

    The compute dtype is autocast's where autocast is on, and that of `x` otherwise. The result is that of the packed
    layer, `minicpm4_hf.quantization.TernaryLinear`, for the same input in that dtype.

    Args:
        x: `[..., K]`, of one dimension at least besides K.
        weight: `[N, K]`, float32, the latent one.
        bias: `[N]`, added in the compute dtype.

    Returns:
        `[..., N]`.

    Raises:
        ValueError: sizes or groups that do not fit, or a weight that is not float32.
    """
    if x.ndim < 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"`x` must be [..., {weight.shape[1]}], as `weight` has features, got {list(x.shape)}.")
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    out = _TernaryProduct.apply(x, weight, group_size)
    return out if bias is None else out + bias.to(out.dtype)


class LatentLinear(nn.Linear):
    """`nn.Linear` whose weight is latent: it computes with `ternary_linear`. Made by `use_ternary_linears_`."""

    group_size = ROW

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ternary_linear(x, self.weight, self.bias, group_size=self.group_size)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"


def use_ternary_linears_(model: nn.Module, *, group_size: int = ROW) -> list[str]:
    """Let the seven projections of every decoder layer compute with ternary values of their weights, in place.

    Only the class of a module changes: parameters, their names and order, hooks, state dict and what `save_pretrained`
    writes stay the same, and an optimizer goes on with the same tensors. Nothing of it is saved, so call it again
    after loading. Calling it again with another group size switches.

    Args:
        model: a MiniCPM4 or Llama model of transformers, in float32. A head for multi-token prediction is left alone.
        group_size: inputs that share a scale, or -1 for a whole row.

    Returns:
        Names of the layers that are now ternary.

    Raises:
        ValueError: no decoder layer; a group size that does not fit a projection; or a projection that is not a plain
            `nn.Linear` (FP8, an adapter, a packed layer, or one whose `forward` was replaced, as `device_map` does).
            The model is then unchanged.
    """
    found = {}
    for layer_name, layer in model.named_modules():
        if isinstance(layer, LlamaDecoderLayer) and not layer_name.startswith("mtp."):
            for name, module in layer.named_modules(prefix=layer_name):
                if name.rpartition(".")[2] in PROJECTIONS:
                    found[name] = module
    if not found:
        raise ValueError(
            f"`model` must hold MiniCPM4 or Llama decoder layers, got {type(model).__name__} without any."
        )
    for name, module in found.items():
        if type(module) not in (nn.Linear, LatentLinear) or "forward" in module.__dict__:
            what = type(module).__name__ + (" with a `forward` of its own" if "forward" in module.__dict__ else "")
            raise ValueError(
                f"{name!r} must be a plain nn.Linear, got {what}; load the latent weights, without adapters, FP8 and "
                "`device_map`."
            )
        try:
            split_groups(module.weight, group_size)
        except ValueError as error:
            raise ValueError(f"{name!r} cannot be ternary: {error}") from error
    for module in found.values():
        module.__class__ = LatentLinear
        module.group_size = group_size
    return list(found)


def use_plain_linears_(model: nn.Module) -> list[str]:
    """Undo `use_ternary_linears_` in place: the layers compute with their latent weights.

    Returns:
        Names of the layers that were ternary.
    """
    found = {name: module for name, module in model.named_modules() if type(module) is LatentLinear}
    for module in found.values():
        del module.group_size
        module.__class__ = nn.Linear
    return list(found)


__all__ = [
    "LatentLinear",
    "TernarySettings",
    "check_fit",
    "ternary_linear",
    "ternary_values",
    "use_plain_linears_",
    "use_ternary_linears_",
]
