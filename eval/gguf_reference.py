"""What llama.cpp should compute of a GGUF file: our model with the file's weights, and with llama.cpp's arithmetic.

To multiply with a weight that is not float32, llama.cpp's CPU code rounds the other factor to a type that goes with
the weight's, and adds the products in float32.

Source: the entries `vec_dot_type` of `type_traits_cpu` in llama.cpp's `ggml-cpu.c`, and `quantize_row_q8_0_ref` and
`quantize_row_q8_K_ref` in its `ggml-quants.c`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from gguf import GGUFReader, dequantize

from minicpm4_hf.conversion.gguf_tensors import EMBEDDING, HEAD, model_entries, rotary_order
from minicpm4_hf.quantization import dequantize_ternary, quantize_ternary


def _round_blocks(inputs: torch.Tensor, block: int, scale_dtype: torch.dtype) -> torch.Tensor:
    """Eight bits a number, -127 to 127, and a scale for each block of columns."""
    blocks = inputs.unflatten(-1, (-1, block))
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    codes = (blocks * torch.where(scales > 0, 1 / scales, 0)).round()
    return (codes * scales.to(scale_dtype).float()).flatten(-2)


# Type of the weight -> what becomes of the float32 numbers that it is multiplied with.
ROUNDINGS = {
    "F32": lambda inputs: inputs,
    "F16": lambda inputs: inputs.half().float(),
    "BF16": lambda inputs: inputs.bfloat16().float(),
    "Q8_0": lambda inputs: _round_blocks(inputs, 32, torch.float16),
    "Q4_0": lambda inputs: _round_blocks(inputs, 32, torch.float16),
    "TQ1_0": lambda inputs: _round_blocks(inputs, 256, torch.float32),
    "TQ2_0": lambda inputs: _round_blocks(inputs, 256, torch.float32),
}


@torch.no_grad()
def logits_of(model, ids: list[int]) -> torch.Tensor:
    """Float32 `[tokens, vocab]`."""
    return model(torch.tensor([ids])).logits[0].float()


@torch.no_grad()
def greedy_of(model, ids: list[int], count: int) -> list[int]:
    """The `count` most likely tokens after some; an end of text does not stop it."""
    cache, new, step = None, [], torch.tensor([ids])
    for _ in range(count):
        output = model(step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, step = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
        new.append(step.item())
    return new


@torch.no_grad()
def load_file_weights_(model, path: Path) -> None:
    """Put the weights that a file's bytes stand for into a float32 model of the same shape, in place.

    Raises:
        ValueError: the file and the model have other tensors.
    """
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    parameters = dict(model.named_parameters())
    for entry in model_entries(model.config):
        tensor = tensors.get(f"{entry.name}.{entry.part}")
        if tensor is None:
            raise ValueError(f"{path} has no tensor {entry.name}.{entry.part}; it is not of this model.")
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).view(entry.shape)
        if entry.num_heads is not None:
            weight = weight[rotary_order(entry.shape[0], entry.num_heads).argsort()]
        parameters[f"{entry.module}.{entry.part}"].copy_(weight)


@contextmanager
def rounded_inputs(model, path: Path) -> Iterator[None]:
    """Within the `with` statement, linear layers of a model round what they multiply as llama.cpp does for a file."""
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}
    modules = {f"{entry.name}.weight": entry.module for entry in model_entries(model.config) if entry.is_matrix}
    del modules[f"{EMBEDDING}.weight"]  # its rows are looked up, not multiplied with
    if f"{HEAD}.weight" not in modules:  # tied
        modules[f"{EMBEDDING}.weight"] = "lm_head"
    hooks = []
    try:
        for name, module in modules.items():
            rounding = ROUNDINGS[types[name]]
            hook = model.get_submodule(module).register_forward_pre_hook(lambda _, args, to=rounding: (to(args[0]),))
            hooks.append(hook)
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def make_ternary_(model, group_size: int) -> None:
    """Round the linear layers of a model to ternary weights, in place, with bfloat16 scales.

    The result is of the form in which the BitCPM checkpoints are published: ordinary weights, of one magnitude in each
    group.

    Args:
        group_size: columns that share a scale; -1 is a whole row.
    """
    for entry in model_entries(model.config):
        if entry.is_matrix and not entry.is_embedding:
            weight = model.get_parameter(f"{entry.module}.weight")
            codes, scales = quantize_ternary(weight.float(), group_size)
            weight.copy_(dequantize_ternary(codes, scales.bfloat16().float()))
