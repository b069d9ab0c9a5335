"""Packed ternary models through transformers' own registration: quantisation method "bitcpm".

    AutoModelForCausalLM.from_pretrained(packed_folder)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitCPMConfig(group_size=64))

The second quantises a full-precision checkpoint as it is read, in float32 whatever dtype the model gets, and
`save_pretrained` then writes a packed folder. The linear layers of the decoder are ternary, embedding and head are
left alone or held at 8 or 4 bits; norms, and what `modules_to_not_convert` names, stay as they are.
"""

import re

import torch
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from .linear import PackedEmbedding, PackedHead, PackedModule, TernaryLinear, TiedHead, pack_rows
from .ternary import GROUP_SIZES, ROW, pack_ternary, quantize_ternary

QUANT_METHOD = "bitcpm"
# `embeddings` -> bits.
EMBEDDING_BITS = {"int8": 8, "int4": 4}
SCALE_DTYPES = ("float32", "bfloat16", "float16")
_DECODER_LINEAR = re.compile(r"(?:^|\.)layers\.\d+\.")


@register_quantization_config(QUANT_METHOD)
class BitCPMConfig(QuantizationConfigMixin):
    """How a model is packed.

    Args:
        group_size: inputs that share a scale: -1 (a whole row), 256, 128, 64 or 32.
        embeddings: None to leave embedding and head as they are, "int8" for a scale a row, "int4" for groups.
        embeddings_group_size: columns that share a scale at "int4", or -1 for a whole row.
        scale_dtype: dtype in which the ternary scales are stored.
        modules_to_not_convert: names of linear layers that are left alone; patterns as in transformers.

    Raises:
        ValueError: a value that is not allowed.
    """

    def __init__(
        self,
        group_size: int = ROW,
        embeddings: str | None = None,
        embeddings_group_size: int = 128,
        scale_dtype: str = "float32",
        modules_to_not_convert: list[str] | None = None,
        **kwargs,
    ):
        if kwargs.pop("quant_method", QUANT_METHOD) != QUANT_METHOD or kwargs.pop("bits", 2) != 2 or kwargs:
            raise ValueError(
                f"A BitCPMConfig is of method 'bitcpm' and 2 bits, and has no setting {', '.join(kwargs) or 'else'}."
            )
        if group_size not in GROUP_SIZES:
            allowed = ", ".join(map(str, GROUP_SIZES))
            raise ValueError(f"`group_size` must be one of {allowed} (-1 is a whole row), got {group_size!r}.")
        if embeddings is not None and embeddings not in EMBEDDING_BITS:
            raise ValueError(f"`embeddings` must be None, 'int8' or 'int4', got {embeddings!r}.")
        if not isinstance(embeddings_group_size, int) or not (
            embeddings_group_size == ROW or embeddings_group_size > 0
        ):
            raise ValueError(f"`embeddings_group_size` must be -1 or above 0, got {embeddings_group_size!r}.")
        if scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"`scale_dtype` must be one of {', '.join(SCALE_DTYPES)}, got {scale_dtype!r}.")
        self.quant_method = QUANT_METHOD
        self.bits = 2
        self.group_size = group_size
        self.embeddings = embeddings
        self.embeddings_group_size = embeddings_group_size
        self.scale_dtype = scale_dtype
        self.modules_to_not_convert = modules_to_not_convert

    @property
    def embedding_bits(self) -> int | None:
        """8, 4, or None where embedding and head are left alone."""
        return EMBEDDING_BITS.get(self.embeddings)


def replace_modules_(model: nn.Module, config: BitCPMConfig, dtype: torch.dtype | None = None) -> list[str]:
    """Put packed modules of the right sizes, on device "meta", into a model; returns their names.

    Args:
        model: a transformers model; its decoder layers are in a list `layers`.
        dtype: what a packed embedding gives out, and of biases; torch's default if None.

    Raises:
        ValueError: a layer whose sizes do not fit the group size, or no layer to pack.
    """
    embedding = head = None
    if config.embedding_bits is not None:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and bool(model.all_tied_weights_keys)
    names = []
    for name, module in list(model.named_modules()):
        if module is head and tied:
            continue
        try:
            new = _packed_module(name, module, config, dtype, embedding, head)
        except ValueError as error:
            raise ValueError(f"{name} cannot be packed: {error}") from error
        if new is not None:
            parent, attribute = get_module_from_name(model, name)
            setattr(parent, attribute, new)
            names.append(name)
    if not any(_DECODER_LINEAR.search(name) for name in names):
        raise ValueError(f"{type(model).__name__} has no linear layers in `layers` to pack as ternary.")
    if tied:
        model.set_output_embeddings(TiedHead(model.get_input_embeddings()))
        model._tied_weights_keys, model.all_tied_weights_keys = None, {}
    return names


def _packed_module(name, module, config, dtype, embedding, head) -> PackedModule | None:
    group_size = config.embeddings_group_size
    if module is embedding:
        return PackedEmbedding(
            *module.weight.shape, bits=config.embedding_bits, group_size=group_size, device="meta", dtype=dtype
        )
    if module is head:
        rows, columns = module.weight.shape
        return PackedHead(columns, rows, bits=config.embedding_bits, group_size=group_size, device="meta")
    if (
        type(module) is not nn.Linear
        or name.startswith("mtp.")
        or not _DECODER_LINEAR.search(name)
        or not should_convert_module(name, config.modules_to_not_convert)
    ):
        return None
    return TernaryLinear(
        module.in_features,
        module.out_features,
        module.bias is not None,
        group_size=config.group_size,
        scale_dtype=getattr(torch, config.scale_dtype),
        device="meta",
        dtype=dtype,
    )


class _Quantize(ConversionOps):
    """Packs one weight as it is read."""

    def convert(self, input_dict, full_layer_name=None, model=None, **kwargs):
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        module, _ = get_module_from_name(model, full_layer_name)
        if isinstance(module, TernaryLinear):
            codes, scales = quantize_ternary(weight, module.group_size)
            packed, scales = pack_ternary(codes), scales.to(module.weight_scale.dtype)
        else:
            packed, scales = pack_rows(weight, module.bits, module.group_size)
        return {full_layer_name: packed, f"{full_layer_name}_scale": scales}


@register_quantizer(QUANT_METHOD)
class BitCPMQuantizer(HfQuantizer):
    """Loads packed checkpoints, and packs full-precision ones as they are read."""

    quantization_config: BitCPMConfig

    def _process_model_before_weight_loading(self, model, dtype=None, checkpoint_files=None, **kwargs):
        if getattr(model.config, "distributed_config", None) is not None:
            raise NotImplementedError(
                "Packed ternary layers cannot be split over processes (tensor parallelism); load the model without."
            )
        packed = replace_modules_(model, self.quantization_config, dtype)
        self._packed_weights = {f"{name}.weight" for name in packed}
        if self.pre_quantized:
            _check_files(model, packed, checkpoint_files)
        else:
            # Read as float32: rounding latent weights to the model's dtype first would flip codes.
            self._kept_in_float32 = model._keep_in_fp32_modules_strict
            patterns = sorted(re.escape(name) for name in self._packed_weights)
            model._keep_in_fp32_modules_strict = [*(self._kept_in_float32 or ()), *patterns]

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            model._keep_in_fp32_modules_strict = self._kept_in_float32
        return model

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        return not self.pre_quantized and param_name in self._packed_weights

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize()

    def _dequantize(self, model, dtype=None):
        for name, module in list(model.named_modules()):
            if isinstance(module, PackedModule):
                parent, attribute = get_module_from_name(model, name)
                setattr(parent, attribute, _full_module(module, dtype))
        if isinstance(model.get_output_embeddings(), TiedHead):
            weight = model.get_input_embeddings().weight
            with torch.device("meta"):
                head = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            head.weight = weight
            model.set_output_embeddings(head)
            del model._tied_weights_keys
            model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _full_module(module: PackedModule, dtype) -> nn.Module:
    weight = module.dequantize(dtype)
    rows, columns = weight.shape
    if isinstance(module, PackedEmbedding):
        return nn.Embedding(rows, columns, _weight=weight)
    with torch.device("meta"):
        full = nn.Linear(columns, rows, bias=getattr(module, "bias", None) is not None)
    full.weight = nn.Parameter(weight)
    if full.bias is not None:
        full.bias = module.bias
    return full


def _check_files(model: nn.Module, packed: list[str], checkpoint_files: list[str] | None) -> None:
    """Compare what the shards' headers say of the packed modules with the modules; transformers would only warn.

    Raises:
        ValueError: a packed tensor is missing, or is of another shape or dtype.
    """
    if checkpoint_files is None:
        return
    found = {}
    for path in checkpoint_files:
        with safe_open(path, framework="pt") as file:
            views = {name: file.get_slice(name) for name in file.keys()}
            found |= {name: (view.get_dtype(), view.get_shape()) for name, view in views.items()}
    prefix = f"{model.base_model_prefix}."
    for module_name in packed:
        for part, wanted in model.get_submodule(module_name).state_dict().items():
            name = f"{module_name}.{part}"
            if part == "bias":
                continue
            entry = found.get(name) or found.get(prefix + name) or found.get(name.removeprefix(prefix))
            if entry is None:
                raise ValueError(f"The checkpoint has no {name}, which its quantization_config asks for.")
            dtype, shape = entry
            if list(shape) != list(wanted.shape) or dtype.startswith(("F", "BF")) != wanted.is_floating_point():
                raise ValueError(
                    f"{name} is {dtype} {list(shape)} in the checkpoint, but its config.json asks for {wanted.dtype} "
                    f"{list(wanted.shape)}; the two do not belong together."
                )
