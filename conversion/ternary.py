"""Ternary weights at two bits each: the conversion `ternary`.

    python -m minicpm4_hf.conversion ternary BitCPM4-1B BitCPM4-1B-packed
    python -m minicpm4_hf.conversion ternary BitCPM4-0.5B OUT --embeddings int8
    python -m minicpm4_hf.conversion ternary latent-weights OUT --quantize --group-size 64

The released BitCPM4 models hold ternary weights as ordinary bfloat16 numbers. Their groups are found and the weights
packed without loss: each tensor is unpacked again and compared. What is not ternary is refused; `--quantize` rounds
it in float32, as a model that was trained to be ternary rounds its latent weights. Norms keep their dtype, and so do
embedding and head without `--embeddings`. One tensor is in memory at a time.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from minicpm4_cli.loading import positive_int
from minicpm4_hf.quantization.bitcpm import EMBEDDING_BITS, BitCPMConfig, replace_modules_
from minicpm4_hf.quantization.int4 import dequantize_int4, unpack_int4
from minicpm4_hf.quantization.linear import PackedModule, TernaryLinear, pack_rows
from minicpm4_hf.quantization.ternary import (
    GROUP_SIZES,
    ROW,
    dequantize_ternary,
    detect_group_size,
    pack_ternary,
    quantize_ternary,
    recover_ternary,
    unpack_ternary,
)

from .keys import CARD_FILE, CONFIG_FILE
from .output import Plan, in_words, open_output, plan_bytes
from .source import Checkpoint, expected_tensors, open_checkpoint
from .ternary_card import ternary_card

HEAD = "lm_head.weight"
# Rows of a matrix that tell whether `--quantize` is given weights that are ternary already.
_SAMPLED_ROWS = 16
_CHUNK_ROWS = 4096


@dataclass
class WeightError:
    """Sums over weights of the squared change and of the squares."""

    change: float = 0.0
    total: float = 0.0

    def add(self, weight: torch.Tensor, restored: torch.Tensor) -> None:
        """Count a weight and what its packed form stands for, a piece at a time."""
        for before, after in zip(weight.split(_CHUNK_ROWS), restored.split(_CHUNK_ROWS)):
            self.change += (after.double() - before.double()).square().sum().item()
            self.total += before.double().square().sum().item()

    @property
    def relative(self) -> float:
        """Root mean square of the change relative to that of the weights."""
        return (self.change / self.total) ** 0.5 if self.total else 0.0


@dataclass(frozen=True)
class Packing:
    """What is going to be written.

    Attributes:
        config: its quantization_config.
        plan: every tensor of the result.
        modules: name of a packed weight -> the module, on device "meta", that will hold it.
        left_out: tensors of the source that the result has no place for.
        errors: kind of matrix -> what packing changed; empty where nothing is rounded.
    """

    config: BitCPMConfig
    plan: Plan
    modules: dict[str, PackedModule]
    left_out: set[str]
    errors: dict[str, WeightError] = field(default_factory=dict)

    def count_bytes(self) -> dict[str, int]:
        """Bytes of the result: "ternary" and "embeddings" where packed, "other" for what keeps its dtype."""
        sizes = {"ternary": 0, "embeddings": 0, "other": 0}
        for name, entry in self.plan.items():
            module = self.modules.get(name.removesuffix("_scale"))
            part = "other" if module is None else "ternary" if isinstance(module, TernaryLinear) else "embeddings"
            sizes[part] += plan_bytes({name: entry})
        return sizes

    @property
    def num_ternary(self) -> int:
        """Ternary weights."""
        layers = (module for module in self.modules.values() if isinstance(module, TernaryLinear))
        return sum(layer.in_features * layer.out_features for layer in layers)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of `ternary`."""
    parser.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        help="inputs that share a scale, -1 for all of a row (default: found in the weights; -1 with --quantize)",
    )
    parser.add_argument(
        "--quantize", action="store_true", help="round full-precision or latent weights, instead of refusing them"
    )
    parser.add_argument(
        "--embeddings",
        choices=EMBEDDING_BITS,
        help="round embedding and head to this (default: they stay as they are)",
    )
    parser.add_argument(
        "--embeddings-group-size",
        type=positive_int,
        default=128,
        metavar="N",
        help="columns that share a scale with --embeddings int4 (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> dict:
    """`ternary`; see `convert_to_ternary`."""
    return convert_to_ternary(
        args.source,
        args.output,
        group_size=args.group_size,
        quantize=args.quantize,
        embeddings=args.embeddings,
        embeddings_group_size=args.embeddings_group_size,
        dry_run=args.dry_run,
    )


def convert_to_ternary(
    source: str | Path,
    output: str | Path,
    *,
    group_size: int | None = None,
    quantize: bool = False,
    embeddings: str | None = None,
    embeddings_group_size: int = 128,
    dry_run: bool = False,
) -> dict:
    """Write a checkpoint with its decoder's linear layers packed at two bits a weight.

    Args:
        source: folder with config.json and safetensors weights, ternary ones as ordinary numbers, or with `quantize`
            any others in float32, float16 or bfloat16.
        output: folder to create; it appears complete or not at all.
        group_size: inputs that share a scale, -1 for a row; None to find it, or with `quantize` for -1.
        quantize: round the weights, in float32.
        embeddings: "int8" or "int4" for embedding and head, None to leave them.
        embeddings_group_size: columns that share a scale at "int4".
        dry_run: check everything and say the sizes, but write nothing.

    Returns:
        `source`, `output`, `group_size`, `quantized`, `embeddings`, `tensors` (how many are ternary),
        `bits_per_ternary_weight` (scales included), `source_bytes`, `bytes` (of the result's tensors, see
        `Packing.count_bytes`), `errors` (kind of matrix -> relative root mean square), `files` and `num_bytes`.

    Raises:
        ValueError: a folder that cannot be read, sizes that do not fit, or weights that are not ternary; with
            `quantize` weights that are ternary already.
        OSError: the disk is full, or cannot be written.
    """
    checkpoint = open_checkpoint(source)
    linears = _find_linears(checkpoint)
    if quantize:
        size, scale_dtype = ROW if group_size is None else group_size, torch.float32
    else:
        size = find_group_size(checkpoint, linears) if group_size is None else group_size
        scale_dtype = _common_dtype(checkpoint, linears)
    config = BitCPMConfig(
        group_size=size,
        embeddings=embeddings,
        embeddings_group_size=embeddings_group_size,
        scale_dtype=str(scale_dtype).removeprefix("torch."),
    )
    packing = _plan_output(checkpoint, config)
    sizes, files = packing.count_bytes(), checkpoint.other_files()
    head = {
        "source": str(checkpoint.folder),
        "output": str(output),
        "group_size": size,
        "quantized": quantize,
        "embeddings": embeddings,
        "tensors": len(linears),
        "bits_per_ternary_weight": 8 * sizes["ternary"] / packing.num_ternary,
        "source_bytes": checkpoint.num_bytes,
        "bytes": sizes,
    }
    if dry_run:
        num_bytes = plan_bytes(packing.plan)
        return {
            **head,
            "files": sorted([*files, CONFIG_FILE, CARD_FILE, "*.safetensors"]),
            "num_bytes": num_bytes,
            "summary": f"{output} would have {_describe_sizes(packing, checkpoint)}",
        }
    key = {"config": config.to_dict(), "quantize": quantize}
    with open_output(output, command="ternary", settings=key, source=checkpoint) as out:
        with out.shards(packing.plan) as shards:
            for name, tensor in _pack_all(checkpoint, packing, quantize):
                shards.write(name, tensor)
        content = {name: value for name, value in checkpoint.config_dict.items() if name != "auto_map"}
        out.write_json(CONFIG_FILE, content | {"quantization_config": config.to_dict()})
        out.copy_files(checkpoint.folder, files)
        card = ternary_card(
            checkpoint,
            packing.config,
            None if quantize else len(linears),
            sizes=sizes,
            dtype=_common_dtype(checkpoint, linears),
            errors={kind: error.relative for kind, error in packing.errors.items()},
        )
        out.write_text(CARD_FILE, card)
    if quantize:
        _warn_of_rounded_latents(checkpoint, linears)
    return {
        **head,
        **out.summary(),
        "errors": {kind: error.relative for kind, error in packing.errors.items()},
        "summary": f"{output}: {_describe_sizes(packing, checkpoint)}",
    }


def find_group_size(checkpoint: Checkpoint, linears: list[str]) -> int:
    """The coarsest of -1 (a row), 256, 128, 64 and 32 in which every one of the matrices is ternary.

    Args:
        linears: names of weights, matrices.

    Raises:
        ValueError: there is none; the first matrix that is not ternary is named.
    """
    columns = [checkpoint.tensors[name].shape[1] for name in linears]
    fitting = [size for size in GROUP_SIZES if size == ROW or all(count % size == 0 for count in columns)]
    for name, weight in checkpoint.read(linears):
        size = detect_group_size(weight, tuple(fitting))
        if size is None:
            raise ValueError(
                f"{_not_ternary(checkpoint, name, weight, fitting)}; for latent or full-precision weights "
                "`--quantize`, with `--group-size`, rounds them, which is exact only for a model that was trained so."
            )
        fitting = fitting[fitting.index(size) :]
    return fitting[0]


def _not_ternary(checkpoint: Checkpoint, name: str, weight: torch.Tensor, sizes: list[int]) -> str:
    """That a matrix is not 0 and one magnitude a group, with the first row that tells so in the finest groups."""
    finest = sizes[-1]
    row = next(row for row in range(len(weight)) if recover_ternary(weight[row : row + 1], finest) is None)
    tried = "whole rows" + (f" or groups down to {finest}" if finest != ROW else "")
    where = checkpoint.folder / checkpoint.tensors[name].shard
    return f"{name} in {where} is not ternary by {tried}, first in row {row}"


def _find_linears(checkpoint: Checkpoint) -> list[str]:
    """Names of the weights that are to be ternary, in the order of the shards.

    Raises:
        ValueError: a checkpoint that is quantised or no causal language model, or sizes that do not fit.
    """
    quantization = getattr(checkpoint.config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ValueError(
            f"{checkpoint.folder} is quantised already (method {method!r}); convert the checkpoint it was made from."
        )
    if expected_tensors(checkpoint.config) is None:
        raise ValueError(
            f"{checkpoint.folder} is a {checkpoint.config.architectures[0]}, and only a causal language model can be "
            "packed."
        )
    wanted = {f"{name}.weight" for name in replace_modules_(_meta_model(checkpoint), BitCPMConfig())}
    return [name for name in checkpoint.tensors if name in wanted]


def _meta_model(checkpoint: Checkpoint):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(checkpoint.config)


def _common_dtype(checkpoint: Checkpoint, linears: list[str]) -> torch.dtype:
    """The one dtype of the matrices, which then holds the scales exactly, or float32."""
    dtypes = {checkpoint.tensors[name].dtype for name in linears}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _plan_output(checkpoint: Checkpoint, config: BitCPMConfig) -> Packing:
    """Every tensor of the result, in the order of the source's shards.

    Raises:
        ValueError: sizes that do not fit.
    """
    model = _meta_model(checkpoint)
    modules = {f"{name}.weight": model.get_submodule(name) for name in replace_modules_(model, config)}
    left_out = set()
    if config.embeddings is not None and checkpoint.config.tie_word_embeddings:
        left_out = {HEAD} & set(checkpoint.tensors)
    plan: Plan = {}
    for name, info in checkpoint.tensors.items():
        if name in modules:
            parts = modules[name].state_dict()
            plan |= {
                f"{name}{suffix}": (parts[part].dtype, tuple(parts[part].shape))
                for part, suffix in (("weight", ""), ("weight_scale", "_scale"))
            }
        elif name not in left_out:
            plan[name] = info.dtype, info.shape
    return Packing(config, plan, modules, left_out)


def _pack_all(checkpoint: Checkpoint, packing: Packing, quantize: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of everything that is planned; adds to `packing.errors`.

    Raises:
        ValueError: a weight that cannot be packed as asked for.
    """
    for name, weight in checkpoint.read():
        module = packing.modules.get(name)
        if name in packing.left_out:
            _check_tied(checkpoint, weight)
            continue
        if module is None:
            yield name, weight
            continue
        if isinstance(module, TernaryLinear):
            pack = _quantize if quantize else _pack
            packed, scales, restored = pack(checkpoint, name, weight, packing.config)
            kind = ".".join(name.split(".")[-3:-1]) if quantize else None
        else:
            packed, scales = pack_rows(weight, module.bits, module.group_size)
            restored, kind = _restore_rows(packed, scales, module.bits), name.split(".")[-2]
        if kind is not None:
            packing.errors.setdefault(kind, WeightError()).add(weight, restored)
        yield name, packed
        yield f"{name}_scale", scales


def _pack(checkpoint: Checkpoint, name: str, weight: torch.Tensor, config: BitCPMConfig):
    """Packed codes, scales and the weight they stand for, which is proven to be the source's."""
    found = recover_ternary(weight, config.group_size)
    if found is None:
        where = _not_ternary(checkpoint, name, weight, [config.group_size])
        raise ValueError(f"{where}; leave out `--group-size`, and the groups are found.")
    packed, scales = pack_ternary(found[0]), found[1].to(getattr(torch, config.scale_dtype))
    restored = dequantize_ternary(unpack_ternary(packed), scales, weight.dtype)
    if not torch.equal(restored, weight):
        raise ValueError(f"{name} did not come back from its packed form as it was; the source changes as it is read.")
    return packed, scales, restored


def _quantize(checkpoint: Checkpoint, name: str, weight: torch.Tensor, config: BitCPMConfig):
    """Packed codes, scales and the weight they stand for."""
    sample = weight[:_SAMPLED_ROWS]
    if sample.any() and detect_group_size(sample) is not None:
        raise ValueError(
            f"{name} in {checkpoint.folder / checkpoint.tensors[name].shard} is ternary already, and rounding it "
            "would change its scales; leave out `--quantize`, and it is packed as it is."
        )
    codes, scales = quantize_ternary(weight, config.group_size)
    return pack_ternary(codes), scales, dequantize_ternary(codes, scales)


def _restore_rows(packed: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    return packed * scales if bits == 8 else dequantize_int4(unpack_int4(packed), scales.T, dtype=torch.float32)


def _check_tied(checkpoint: Checkpoint, head: torch.Tensor) -> None:
    """A head that the config says is the embedding must be it, as it is left out."""
    if not torch.equal(head, checkpoint.tensor("model.embed_tokens.weight")):
        raise ValueError(
            f"config.json in {checkpoint.folder} says `tie_word_embeddings`, but {HEAD} is not the embedding; correct "
            "the config."
        )


def _warn_of_rounded_latents(checkpoint: Checkpoint, linears: list[str]) -> None:
    dtype = _common_dtype(checkpoint, linears)
    if dtype != torch.float32:
        print(
            f"warning: the weights are {str(dtype).removeprefix('torch.')}; if they are latent weights that were "
            "trained in float32, rounding has changed up to 1.8 % of the codes, so convert the float32 ones",
            file=sys.stderr,
        )


def _describe_sizes(packing: Packing, checkpoint: Checkpoint) -> str:
    group = "a scale a row" if packing.config.group_size == ROW else f"groups of {packing.config.group_size}"
    after, before = in_words(plan_bytes(packing.plan)), in_words(checkpoint.num_bytes)
    return f"{after} of weights in place of {before}; {packing.num_ternary:,} ternary weights, {group}"


__all__ = ["add_arguments", "convert_to_ternary", "find_group_size", "run"]
