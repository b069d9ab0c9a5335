"""Checkpoint folders that the GGUF tests convert, and what a file holds, read back by the gguf package."""

import json
import re

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from minicpm4_hf import MiniCPM4Config, MiniCPM4ForCausalLM
from minicpm4_hf.quantization import dequantize_ternary, pack_gptq, pack_ternary, quantize_int4, quantize_ternary

LINEAR = re.compile(r"model\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj\.weight")
SHORT, LONG = [1.0, 1.1, 1.5, 2.5, 4.0, 6.0, 7.5, 9.0], [1.5, 1.6, 3.0, 5.0, 8.0, 12.0, 14.0, 20.0]
# Rows of no common length, three query heads for each key head.
ODD = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.2,
    "max_position_embeddings": 4096,
    "eos_token_id": [2, 96],
    "pad_token_id": 2,
}
# Rows that every type takes.
WIDE = {**ODD, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16, "num_hidden_layers": 1}


def minicpm4(**settings):
    """A random model; `settings` replace `ODD`'s."""
    torch.manual_seed(0)
    return MiniCPM4ForCausalLM(MiniCPM4Config(**{**ODD, "dim_model_base": 16, **settings})).eval()


def llama(**settings):
    """A random Llama of about the same sizes."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**ODD, "hidden_size": 48, **settings})).eval()


def longrope(original, **more):
    """Rotary settings with two lists."""
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": SHORT,
        "long_factor": LONG,
        "original_max_position_embeddings": original,
        **more,
    }


def save(model, folder, **settings):
    """A folder of a model, without remote code."""
    model.save_pretrained(folder, **settings)
    for path in folder.glob("*.py"):
        path.unlink()
    return folder


def change_weights(folder, change):
    """Replace the tensors of an unsharded folder by what `change` makes of them."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change_config(folder, **settings):
    """Replace settings in config.json."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


def map_linear(folder, function):
    """Replace every linear weight of the layers by the tensors that `function(module name, weight)` gives."""

    def change(tensors):
        new = {}
        for name, tensor in tensors.items():
            is_linear = LINEAR.fullmatch(name)
            new |= function(name.removesuffix(".weight"), tensor) if is_linear else {name: tensor}
        return new

    return change_weights(folder, change)


def half_scales(weight, group_size):
    """Codes and scales of a weight, the scales such that float16 and bfloat16 hold them."""
    codes, scales = quantize_ternary(weight, group_size)
    return codes, scales.to(torch.bfloat16).to(torch.float16).float()


def fake_quantise(folder, group_size):
    """Make the layers of a folder ternary, as ordinary weights."""
    return map_linear(
        folder, lambda name, weight: {f"{name}.weight": dequantize_ternary(*half_scales(weight, group_size))}
    )


def pack(folder, group_size, scale=1.0):
    """Make the layers of a folder ternary, packed."""

    def packed(name, weight):
        codes, scales = half_scales(weight, group_size)
        return {f"{name}.weight": pack_ternary(codes), f"{name}.weight_scale": scales * scale}

    change_config(folder, quantization_config={"quant_method": "bitcpm", "group_size": group_size})
    return map_linear(folder, packed)


def gptq(folder, group_size, **changes):
    """Quantise the layers of a folder to 4 bits in the GPTQ layout; `changes` replace parts, given the originals."""

    def packed(name, weight):
        parts = pack_gptq(*quantize_int4(weight, group_size))
        parts |= {part: change(parts[part]) for part, change in changes.items()}
        return {f"{name}.{part}": tensor for part, tensor in parts.items()}

    config = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "checkpoint_format": "gptq"}
    change_config(folder, quantization_config=config)
    return map_linear(folder, packed)


def read_file(path):
    """Metadata and tensors of a file: key -> value, and name -> (type, float32 `[rows, columns]`)."""
    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        tensors[tensor.name] = tensor.tensor_type.name.lower(), torch.from_numpy(values).reshape(shape)
    return metadata, tensors
