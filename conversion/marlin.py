"""GPTQ checkpoints for CPM.cu's Marlin kernel and back: the conversion `marlin`.

    python -m minicpm4_hf.conversion marlin MiniCPM4-8B-GPTQ MiniCPM4-8B-marlin
    python -m minicpm4_hf.conversion marlin MiniCPM4-8B-marlin-cpmcu MiniCPM4-8B-GPTQ --to gptq
    python -m minicpm4_hf.conversion marlin Eagle-QAT-GPTQ Eagle-QAT-marlin --dry-run

Version 1 of the GPTQ layout, symmetric int4 in groups of 128, goes code for code into the tiles of `marlin_layout`,
and comes back bit for bit. q, k and v become one `qkv_proj`, gate and up one `gate_up_proj`, side by side on the
outputs; zero points and group indices, which say nothing in such files, are left out. Quantised draft heads are told
by their names:

    EAGLE      `input_norm1`; `fc` is cut into its two halves of inputs, packed one by one and laid side by side on
               the outputs; the prefix `model.` is left out
    EAGLE-3    `midlayer`; qkv_proj and fc have two and three times the inputs

CPM.cu reads a draft's bytes without converting them, so all floats of a draft are written as float16.

Sources: OpenBMB/CPM.cu `scripts/model_convert/gptq2marlin.py` and the loaders `cpmcu/llm_w4a16_gptq_marlin.py` and
`src/model/w4a16_gptq_marlin/`. The script also asks for one file and for `static_groups`, which says how scales were
found and not how they lie; neither is needed here.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from minicpm4_hf.official_layout import to_official
from minicpm4_hf.quantization.int4 import STORED_ZEROS, check_zero_points, group_index, unordered_groups

from .card import model_card
from .draft_names import GPTQ_PARTS
from .keys import CARD_FILE, CONFIG_FILE, OFFICIAL_REMOTE_CODE
from .marlin_checks import (
    GROUP_SIZE,
    Layer,
    check_layout,
    check_requirements,
    list_layers,
    open_quantised,
    other_name,
    plan_tensors,
)
from .marlin_layout import pack_marlin, permute_scales, unpack_marlin, unpermute_scales
from .output import in_words, open_output, plan_bytes
from .source import Checkpoint

# CPM.cu takes a checkpoint as quantised if its path holds one of these (`cpmcu/common/utils.py`).
_PATH_WORDS = ("marlin", "gptq", "quant", "awq", "int4", "int8", "w4a16", "qat")
_METHOD = {
    "marlin": "The 4-bit codes and scales of every linear layer are put in the order in which CPM.cu's Marlin kernel "
    "reads them, with q, k, v and gate, up joined. No number changes.",
    "gptq": "The 4-bit codes and scales of every linear layer are put from the order of CPM.cu's Marlin kernel into "
    "version 1 of the GPTQ layout. No number changes.",
}
_USAGE = {
    "marlin": "```\npython examples/minicpm4/test_generate.py --model-path FOLDER\n```\n\nCPM.cu takes a folder as "
    f"quantised by its name, which must hold one of: {', '.join(_PATH_WORDS)}. It loads the config through the files "
    "`configuration_minicpm.py` and `modeling_minicpm.py` of the official checkpoint, which belong beside this one's.",
    "gptq": "Loads where GPTQ checkpoints load: transformers with GPTQModel, vLLM, SGLang.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of `marlin`."""
    parser.add_argument("--to", choices=("marlin", "gptq"), default="marlin", help="layout of OUT (default: marlin)")


def run(args: argparse.Namespace) -> dict:
    """`marlin`; see `convert_marlin`."""
    return convert_marlin(args.source, args.output, to=args.to, dry_run=args.dry_run)


def convert_marlin(source: str | Path, output: str | Path, *, to: str = "marlin", dry_run: bool = False) -> dict:
    """Write a GPTQ checkpoint or draft in CPM.cu's Marlin layout, or one in that layout as GPTQ.

    Args:
        source: folder with config.json and safetensors weights, in one file or in shards.
        output: folder to create; it appears complete or not at all.
        to: "marlin" or "gptq".
        dry_run: check everything but the numbers and say what would be written, but write nothing.

    Returns:
        `source`, `output`, `to`, `kind` ("model", "eagle" or "eagle3"), the `files` written, their `num_bytes` and
        `notes`.

    Raises:
        ValueError: the folder cannot be read, is in the other layout, or does not meet a requirement of the kernel.
    """
    checkpoint, kind, sizes = open_quantised(source)
    layers = list(list_layers(sizes, kind))
    check_layout(checkpoint, to)
    check_requirements(checkpoint)
    plan = plan_tensors(checkpoint, layers, kind, to)
    code = [name for name in OFFICIAL_REMOTE_CODE if (checkpoint.folder / name).is_file()]
    files = [*checkpoint.other_files(), *code]
    notes = []
    if to == "marlin" and not any(word in str(output).lower() for word in _PATH_WORDS):
        notes.append(f"CPM.cu tells quantised folders by their names: put 'marlin' into {Path(output).name!r}.")
    head = {"source": str(checkpoint.folder), "output": str(output), "to": to, "kind": kind, "notes": notes}
    if dry_run:
        size = plan_bytes(plan)
        summary = " ".join([f"{output} would be {len(layers)} packed layers, {in_words(size)} in all.", *notes])
        return head | {"files": sorted([*files, CONFIG_FILE, CARD_FILE]), "num_bytes": size, "summary": summary}
    convert = _to_marlin if to == "marlin" else _to_gptq
    owned = {f"{part}.{suffix}" for layer in layers for part in (*layer.parts, layer.packed) for suffix in GPTQ_PARTS}
    with open_output(output, command="marlin", settings={"to": to}, source=checkpoint) as out:
        with out.shards(plan) as shards:
            for layer in layers:
                for name, tensor in convert(checkpoint, layer, kind):
                    shards.write(name, tensor)
            for name in checkpoint.tensors:
                if name not in owned:
                    new = other_name(name, kind, to)
                    shards.write(new, _cast(checkpoint.tensor(name), plan[new][0], name))
        out.write_json(CONFIG_FILE, _config(checkpoint, kind, to))
        out.copy_files(checkpoint.folder, files)
        card = model_card(
            checkpoint.folder,
            command="marlin",
            method=_METHOD[to],
            settings={"layout": to, "kind": kind, "group size": GROUP_SIZE},
            sizes={"source": checkpoint.num_bytes, "output": plan_bytes(plan)},
            error="None: codes and scales are the source's."
            + (" Other floats of the draft are cast to float16." if to == "marlin" and kind != "model" else ""),
            usage=_USAGE[to],
            tags=("gptq", "4-bit") if to == "gptq" else ("cpm.cu", "marlin", "4-bit"),
            relation="quantized",
            library="transformers" if to == "gptq" else "cpm.cu",
        )
        out.write_text(CARD_FILE, card)
    result = head | out.summary()
    summary = f"{output}: {len(result['files'])} files, {in_words(result['num_bytes'])}."
    return result | {"summary": " ".join([summary, *notes])}


def _to_marlin(checkpoint: Checkpoint, layer: Layer, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    codes, scales = [], []
    for part in layer.parts:
        parts = {suffix: checkpoint.tensor(f"{part}.{suffix}") for suffix in GPTQ_PARTS}
        try:
            check_zero_points(parts["qzeros"])
        except ValueError as error:
            raise ValueError(f"{part} in {checkpoint.folder} cannot be packed. {error}") from error
        if unordered_groups(parts["g_idx"], layer.num_inputs // GROUP_SIZE) is not None:
            raise ValueError(f"{part}.g_idx in {checkpoint.folder} is out of order; the kernel knows no act-order.")
        codes.append(parts["qweight"])
        scales.append(parts["scales"])
    joined = torch.cat(codes, dim=1).chunk(layer.halves)
    yield f"{layer.packed}.qweight", torch.cat([pack_marlin(half) for half in joined], dim=1)
    joined = torch.cat(scales, dim=1)
    if kind != "model":
        joined = _cast(joined, torch.float16, f"{layer.parts[0]}.scales")
    yield f"{layer.packed}.scales", torch.cat([permute_scales(half) for half in joined.chunk(layer.halves)], dim=1)


def _to_gptq(checkpoint: Checkpoint, layer: Layer, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    packed = checkpoint.tensor(f"{layer.packed}.qweight").chunk(layer.halves, dim=1)
    codes = torch.cat([unpack_marlin(half) for half in packed])
    scales = checkpoint.tensor(f"{layer.packed}.scales").chunk(layer.halves, dim=1)
    scales = torch.cat([unpermute_scales(half) for half in scales])
    pieces = zip(layer.parts, codes.split(layer.outputs, dim=1), scales.split(layer.outputs, dim=1), strict=True)
    for part, qweight, part_scales in pieces:
        yield f"{part}.qweight", qweight
        yield f"{part}.scales", part_scales
        yield f"{part}.qzeros", torch.full((len(scales), qweight.shape[1] // 8), STORED_ZEROS, dtype=torch.int32)
        yield f"{part}.g_idx", group_index(layer.num_inputs, len(scales))


def _cast(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    cast = tensor.to(dtype)
    if dtype == torch.float16 and not cast.isfinite().all():
        raise ValueError(f"{name} is too large for float16, in which CPM.cu reads the tensors of a draft.")
    return cast


def _config(checkpoint: Checkpoint, kind: str, to: str) -> dict:
    """The source's config with the layout's name; a minicpm4 one in the official keys, which CPM.cu reads."""
    content = dict(checkpoint.config_dict)
    if content.get("model_type") == "minicpm4":
        content = to_official(checkpoint.config.to_diff_dict())
    quantised = {**checkpoint.config_dict["quantization_config"], "checkpoint_format": to}
    return {**content, "quantization_config": quantised}
