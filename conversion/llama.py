"""The same function as a plain Llama: the conversion `llama`, for runtimes that know no MiniCPM.

    python -m minicpm4_hf.conversion llama MiniCPM4-8B MiniCPM4-8B-llama
    python -m minicpm4_hf.conversion llama MiniCPM4-0.5B OUT --dtype float32
    python -m minicpm4_hf.conversion llama MiniCPM4-8B OUT --dry-run

Llama has none of MiniCPM4's three scales, so they are multiplied into weights: `scale_emb` into the embedding, the
residual scale into both projections that end a branch (o_proj, down_proj), and the divisor of the logits into the
head, which is untied because the first and the last are two factors on one matrix.

Source: the formulas of `MiniCPM4Config.residual_scale` and `logits_scaling`; OpenBMB/CPM.cu
`scripts/model_convert/minicpm2llama.py` folds the same four tensors.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig, PreTrainedConfig

from .card import model_card
from .keys import CARD_FILE, CONFIG_FILE
from .output import Plan, in_words, open_output, plan_bytes
from .source import Checkpoint, expected_tensors, layer_of, open_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_BRANCH_ENDS = ("self_attn.o_proj.", "mlp.down_proj.")
_CHUNK_ELEMENTS = 2**24
# Settings that Llama has too and that are written under their old names, which transformers reads as well.
_RENAMED = ("rope_parameters", "pretraining_tp")
_METHOD = (
    "Every weight below is multiplied by its factor in float64 and rounded once to {dtype}; all others are the "
    "source's, in that dtype. A factor that is no power of two moves a bfloat16 weight by up to 1/256 of itself, a "
    "float16 weight by up to 1/2048: logits are the source's up to that rounding, and equal in exact arithmetic. "
    "Attention is dense at every length, and Llama's code rotates queries and keys in the model's dtype where "
    "MiniCPM4's does so in float32."
)
_USAGE = """```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER")  # a LlamaForCausalLM
```"""


@dataclass
class Rounding:
    """What folding did to one kind of tensor.

    Attributes:
        factor: what was multiplied.
        square_error, square_sum: sums over all weights of the squared rounding error and of the squared product.
    """

    factor: float
    square_error: float = 0.0
    square_sum: float = 0.0

    @property
    def relative(self) -> float:
        """Root mean square of the rounding error, relative to that of the weights."""
        return (self.square_error / self.square_sum) ** 0.5 if self.square_sum else 0.0


@dataclass(frozen=True)
class Export:
    """What is going to be written.

    Attributes:
        config_dict: the content of config.json.
        sources: name -> name of the tensor that it is made of.
        factors: name -> kind and factor of what is folded.
        notes: what is left out, a sentence each.
    """

    config_dict: dict
    sources: dict[str, str]
    factors: dict[str, tuple[str, float]]
    notes: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of `llama`."""
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of all weights (default: as in IN); float32 folds without visible rounding"
    )


def run(args: argparse.Namespace) -> dict:
    """`llama`; see `convert_to_llama`."""
    return convert_to_llama(args.source, args.output, dtype=args.dtype, dry_run=args.dry_run)


def convert_to_llama(
    source: str | Path, output: str | Path, *, dtype: str | None = None, dry_run: bool = False
) -> dict:
    """Write a MiniCPM4, BitCPM or 2024 MiniCPM checkpoint as a Llama checkpoint.

    Args:
        source: folder with config.json and safetensors weights in full precision.
        output: folder to create; it appears complete or not at all.
        dtype: "float32", "bfloat16" or "float16" for all weights; each keeps its own if None.
        dry_run: check everything and say what would be written, but write nothing.

    Returns:
        `source`, `output`, the `files` written, their `num_bytes`, `rounding` (kind of tensor -> relative error of
        its rounding) and `notes` (what a Llama has no place for and was left out).

    Raises:
        ValueError: the folder cannot be read or cannot be a Llama, or a weight overflows `dtype`.
    """
    checkpoint = open_checkpoint(source)
    export = plan_export(checkpoint)
    plan: Plan = {
        name: (DTYPES.get(dtype, checkpoint.tensors[old].dtype), checkpoint.tensors[old].shape)
        for name, old in export.sources.items()
    }
    files = checkpoint.other_files()
    head = {"source": str(checkpoint.folder), "output": str(output), "notes": export.notes}
    if dry_run:
        summary = f"{output} would be a Llama of {in_words(plan_bytes(plan))}, {len(plan)} tensors"
        return {**head, "files": sorted([*files, CONFIG_FILE, CARD_FILE]), "num_bytes": plan_bytes(plan)} | {
            "summary": _with_notes(summary, export.notes)
        }
    used = str(plan[EMBEDDING][0]).removeprefix("torch.")
    with open_output(output, command="llama", settings={"dtype": dtype}, source=checkpoint) as out:
        with out.shards(plan) as shards:
            rounding = _write_weights(checkpoint, export, plan, shards)
        out.write_json(CONFIG_FILE, {**export.config_dict, "torch_dtype": used})
        out.copy_files(checkpoint.folder, files)
        out.write_text(CARD_FILE, _card(checkpoint, export, rounding, used, plan))
    result = head | out.summary() | {"rounding": {kind: entry.relative for kind, entry in rounding.items()}}
    summary = f"{output}: {len(result['files'])} files, {in_words(result['num_bytes'])}"
    return result | {"summary": _with_notes(summary, export.notes)}


def plan_export(checkpoint: Checkpoint) -> Export:
    """What a checkpoint is as a Llama, without reading a weight.

    Raises:
        ValueError: a checkpoint that is no MiniCPM in full precision, or that holds what Llama has no place for.
    """
    folder, config = checkpoint.folder, checkpoint.config
    if config.model_type == "llama":
        raise ValueError(f"{folder} is a Llama already, with no scale to fold; use it as it is.")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{folder} is quantised, and scales cannot be folded into packed weights; fold the full-precision "
            "checkpoint, then quantise the Llama."
        )
    if expected_tensors(config) is None:
        raise ValueError(
            f"{folder} is a {config.architectures[0]}, and only a causal language model has a Llama form here."
        )
    tied, notes = config.tie_word_embeddings, []
    sources = {name: name for name in checkpoint.tensors if not name.startswith("mtp.")}
    if len(sources) < len(checkpoint.tensors):
        notes.append("The MTP head is left out: Llama has none.")
    if getattr(config, "sparse_config", None) is not None:
        notes.append("`sparse_config` is left out: Llama attends densely at every length.")
    if tied:
        sources[HEAD] = EMBEDDING
    unknown = sorted(set(sources) - set(expected_tensors(config)) - {HEAD})
    if unknown:
        raise ValueError(f"{folder} holds {unknown[0]}, which is no weight of this model and has no place in a Llama.")
    factors = {EMBEDDING: ("embedding", float(config.scale_emb)), HEAD: ("head", 1 / config.logits_scaling)}
    for name in sources:
        place = layer_of(name)
        if place is not None and place[1].startswith(_BRANCH_ENDS):
            factors[name] = ("branch ends", config.residual_scale)
    return Export(llama_config(config), sources, factors, notes)


def llama_config(config: PreTrainedConfig) -> dict:
    """The config.json of the folded model.

    RoPE is written as `rope_theta` and `rope_scaling`, which old and new runtimes read. Where LongRoPE's two lists
    differ, both become the one that MiniCPM4 uses at every length; Llama's code would change lists with the length.
    """
    fields = {name: getattr(config, name) for name in LlamaConfig.__annotations__ if name not in _RENAMED}
    rope = dict(config.rope_parameters)
    theta = rope.pop("rope_theta")
    if rope["rope_type"] == "longrope":
        extended = config.max_position_embeddings > rope["original_max_position_embeddings"]
        used = rope["long_factor" if extended else "short_factor"]
        rope |= {"short_factor": list(used), "long_factor": list(used)}
    return {
        **fields,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "tie_word_embeddings": False,
        "rope_theta": theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
    }


def fold(tensor: torch.Tensor, factor: float, dtype: torch.dtype, rounding: Rounding) -> torch.Tensor:
    """`factor * tensor` in float64, rounded once to `dtype`, a piece at a time; adds to the sums of `rounding`."""
    flat = tensor.reshape(-1)
    folded = torch.empty(flat.shape, dtype=dtype)
    for begin in range(0, len(flat), _CHUNK_ELEMENTS):
        piece = slice(begin, begin + _CHUNK_ELEMENTS)
        exact = flat[piece].double() * factor
        folded[piece] = exact
        rounding.square_sum += exact.square().sum().item()
        rounding.square_error += (folded[piece].double() - exact).square().sum().item()
    return folded.view(tensor.shape)


def _write_weights(checkpoint: Checkpoint, export: Export, plan: Plan, shards) -> dict[str, Rounding]:
    rounding: dict[str, Rounding] = {}
    for name, old in export.sources.items():
        dtype = plan[name][0]
        tensor = checkpoint.tensor(old)
        if name in export.factors:
            kind, factor = export.factors[name]
            tensor = fold(tensor, factor, dtype, rounding.setdefault(kind, Rounding(factor)))
        tensor = tensor.to(dtype)
        if dtype == torch.float16 and not tensor.isfinite().all():
            raise ValueError(f"{name} is too large for float16 once folded; use `--dtype bfloat16` or float32.")
        shards.write(name, tensor)
    return rounding


def _card(checkpoint: Checkpoint, export: Export, rounding: dict[str, Rounding], dtype: str, plan: Plan) -> str:
    method = _METHOD.format(dtype=dtype)
    error = {
        f"rounding of {kind} (factor {entry.factor:.7g}), root mean square": (
            "none, every product is exact" if entry.square_error == 0 else f"{entry.relative:.2e} of the weights'"
        )
        for kind, entry in sorted(rounding.items())
    }
    return model_card(
        checkpoint.folder,
        command="llama",
        method=_with_notes(method, export.notes),
        settings={"dtype": dtype, "model type": "llama", "head": "untied"},
        sizes={"source": checkpoint.num_bytes, "output": plan_bytes(plan)},
        error=error,
        usage=_USAGE,
        tags=("llama",),
    )


def _with_notes(text: str, notes: list[str]) -> str:
    return " ".join([text if text.endswith(".") else f"{text}.", *notes]) if notes else text
