"""What CPM.cu's Marlin kernel asks of a checkpoint, and the tensors that the layers have in both layouts."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .draft_names import GPTQ_PARTS, Sizes
from .draft_reader import read_draft_headers
from .keys import CONFIG_FILE
from .marlin_layout import BLOCK_OUTPUTS, TILE
from .output import Plan
from .source import FLOAT_WEIGHTS, Checkpoint, open_checkpoint, read_config

GROUP_SIZE = 128
# Kind -> what the names of a layer begin with, in the GPTQ and in the Marlin layout.
_PREFIXES = {
    "model": ("model.layers.{}", "model.layers.{}"),
    "eagle": ("model.layers.{}", "layers.{}"),
    "eagle3": ("midlayer", "midlayer"),
}
# `quantization_config` -> what it must be, and the sentence for anything else.
REQUIREMENTS = {
    "quant_method": ("gptq", "the method must be 'gptq'"),
    "bits": (4, "the kernel reads 4-bit codes only"),
    "group_size": (GROUP_SIZE, "the kernel's groups are of 128 inputs"),
    "sym": (True, "the kernel has no zero points, so codes must be symmetric"),
    "desc_act": (False, "the kernel reads groups in order, so act-order must be off"),
    "lm_head": (False, "the head must be in full precision"),
}
_DEFAULTS = {"lm_head": False, "desc_act": False}


@dataclass(frozen=True)
class Layer:
    """A linear layer of the kernel and the GPTQ layers that it is made of.

    Attributes:
        packed: its name in the Marlin layout.
        parts: names in the GPTQ layout, side by side on the outputs.
        num_inputs: K.
        outputs: N of each part.
        halves: 2 where the inputs are cut in two and each half is packed by itself.
    """

    packed: str
    parts: tuple[str, ...]
    num_inputs: int
    outputs: tuple[int, ...]
    halves: int = 1


def open_quantised(folder: str | Path) -> tuple[Checkpoint, str, Sizes]:
    """A quantised checkpoint or draft, its kind ("model", "eagle" or "eagle3") and its sizes.

    Raises:
        ValueError: as `open_checkpoint`, or no `quantization_config`.
    """
    folder = Path(folder)
    where = f"{folder}/{CONFIG_FILE}"
    config_dict = read_config(folder)
    if not isinstance(config_dict.get("quantization_config"), dict):
        raise ValueError(
            f"{where} has no `quantization_config`, so the weights are not GPTQ's; quantise them first, with the "
            "conversion int4."
        )
    checkpoint = read_draft_headers(folder, config_dict)
    if any(name.startswith("midlayer.") for name in checkpoint.tensors):
        return checkpoint, "eagle3", Sizes.read(config_dict, where)
    if "input_norm1.weight" in checkpoint.tensors:
        return checkpoint, "eagle", Sizes.read(config_dict, where)
    checkpoint = open_checkpoint(folder)
    return checkpoint, "model", Sizes.read(checkpoint.config.to_dict(), where)


def check_requirements(checkpoint: Checkpoint) -> None:
    """Compare the `quantization_config` with what the kernel reads.

    Raises:
        ValueError: the first requirement that is not met.
    """
    path, settings = checkpoint.folder / CONFIG_FILE, checkpoint.config_dict["quantization_config"]
    for key, (wanted, reason) in REQUIREMENTS.items():
        value = settings.get(key, _DEFAULTS.get(key))
        if value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
            raise ValueError(f"{path} says {key} {value!r}, but {reason}: it must be {wanted!r}.")
    layout = settings.get("checkpoint_format", "gptq")
    if layout not in ("gptq", "marlin"):
        raise ValueError(
            f"{path} says checkpoint_format {layout!r}; what is read is version 1 of the GPTQ layout, 'gptq', whose "
            "zero points are stored less one."
        )


def list_layers(sizes: Sizes, kind: str) -> Iterator[Layer]:
    """The layers that a checkpoint of these sizes has.

    Raises:
        ValueError: sizes that the kernel's groups and tiles do not cover.
    """
    hidden, inner = sizes.hidden_size, sizes.intermediate_size
    attended, keys = (n * sizes.head_dim for n in (sizes.num_attention_heads, sizes.num_key_value_heads))
    for index in range(sizes.num_hidden_layers):
        gptq, packed = _PREFIXES[kind]
        gptq, packed = gptq.format(index), packed.format(index)
        joined = tuple(f"{gptq}.self_attn.{name}_proj" for name in "qkv")
        gated = tuple(f"{gptq}.mlp.{name}_proj" for name in ("gate", "up"))
        width = 2 * hidden if kind == "eagle3" else hidden
        yield _layer(f"{packed}.self_attn.qkv_proj", joined, width, (attended, keys, keys))
        yield _layer(f"{packed}.self_attn.o_proj", (f"{gptq}.self_attn.o_proj",), attended, (hidden,))
        yield _layer(f"{packed}.mlp.gate_up_proj", gated, hidden, (inner, inner))
        yield _layer(f"{packed}.mlp.down_proj", (f"{gptq}.mlp.down_proj",), inner, (hidden,))
    if kind == "eagle":
        yield _layer("fc", ("fc",), 2 * hidden, (hidden,), 2)
    elif kind == "eagle3":
        yield _layer("fc", ("fc",), 3 * hidden, (hidden,))


def _layer(packed: str, parts: tuple, num_inputs: int, outputs: tuple, halves: int = 1) -> Layer:
    if num_inputs % (GROUP_SIZE * halves):
        raise ValueError(
            f"{parts[0]} has {num_inputs} inputs, but the kernel needs a multiple of {GROUP_SIZE * halves}."
        )
    for part, size in zip(parts, outputs, strict=True):
        if size % BLOCK_OUTPUTS:
            raise ValueError(f"{part} has {size} outputs, but the kernel needs a multiple of {BLOCK_OUTPUTS}.")
    return Layer(packed, parts, num_inputs, outputs, halves)


def check_layout(checkpoint: Checkpoint, to: str) -> None:
    """Refuse a checkpoint that is in the wanted layout already, or has nothing to unpack.

    Raises:
        ValueError: it is, or has not.
    """
    packed = next((name for name in checkpoint.tensors if "qkv_proj.qweight" in name), None)
    if to == "marlin" and packed is not None:
        raise ValueError(
            f"{checkpoint.folder} holds {packed}, so it is in the Marlin layout already; `--to gptq` unpacks it."
        )
    if to == "gptq" and packed is None:
        raise ValueError(f"{checkpoint.folder} holds no qkv_proj.qweight, so it is not in CPM.cu's Marlin layout.")


def plan_tensors(checkpoint: Checkpoint, layers: list[Layer], kind: str, to: str) -> Plan:
    """The tensors to write; every tensor of the source is checked on the way."""
    plan, left = {}, dict(checkpoint.tensors)
    for layer in layers:
        groups, wide = layer.num_inputs // GROUP_SIZE, sum(layer.outputs) * layer.halves
        packed = {
            f"{layer.packed}.qweight": (
                torch.int32,
                (layer.num_inputs // TILE // layer.halves, 2 * wide),
            ),
            f"{layer.packed}.scales": (None, (groups // layer.halves, wide)),
        }
        unpacked: Plan = {}
        for part, size in zip(layer.parts, layer.outputs, strict=True):
            unpacked |= {
                f"{part}.qweight": (torch.int32, (layer.num_inputs // 8, size)),
                f"{part}.scales": (None, (groups, size)),
                f"{part}.qzeros": (torch.int32, (groups, size // 8)),
                f"{part}.g_idx": (torch.int32, (layer.num_inputs,)),
            }
        read, written = (unpacked, packed) if to == "marlin" else (packed, unpacked)
        dtype = _check_tensors(checkpoint, read, left)
        if to == "marlin" and kind != "model":
            dtype = torch.float16
        plan |= {name: (wanted or dtype, shape) for name, (wanted, shape) in written.items()}
    for name, info in left.items():
        module, _, suffix = name.rpartition(".")
        if suffix in GPTQ_PARTS:
            raise ValueError(f"{checkpoint.folder} holds {name}, but {module} is no layer that the kernel serves.")
        if suffix == "bias":
            raise ValueError(f"{checkpoint.folder} holds {name}, but CPM.cu's quantised layers have no bias.")
        if module.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            raise ValueError(f"{checkpoint.folder} holds {name}, but every linear layer must be quantised.")
        cast = to == "marlin" and kind != "model" and info.dtype in FLOAT_WEIGHTS
        plan[other_name(name, kind, to)] = (torch.float16 if cast else info.dtype, info.shape)
    return plan


def _check_tensors(checkpoint: Checkpoint, wanted: Plan, left: dict) -> torch.dtype:
    """Take a layer's tensors out of `left`; the dtype of its scales."""
    dtype = None
    for name, (kind, shape) in wanted.items():
        info = left.pop(name, None)
        if info is None:
            raise ValueError(f"The weights in {checkpoint.folder} lack {name}; the kernel needs every linear layer.")
        fits = info.dtype == kind if kind is not None else info.dtype in FLOAT_WEIGHTS
        if info.shape != shape or not fits:
            raise ValueError(
                f"{name} in {checkpoint.folder / info.shard} is {info.dtype} {list(info.shape)}, but must be "
                f"{kind or 'floating'} {list(shape)}."
            )
        dtype = info.dtype if kind is None else dtype
    return dtype


def other_name(name: str, kind: str, to: str) -> str:
    """Name of a tensor that is not packed: an EAGLE draft has the prefix `model.` in the GPTQ layout only."""
    if kind != "eagle":
        return name
    if to == "marlin":
        return name.removeprefix("model.")
    return f"model.{name}" if name.startswith(("layers.", "embed_tokens.")) else name
