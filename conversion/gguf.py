"""One GGUF file of a checkpoint, for llama.cpp and what is built on it.

    python -m minicpm4_hf.conversion gguf MiniCPM4-0.5B MiniCPM4-0.5B-q8_0.gguf --type q8_0
    python -m minicpm4_hf.conversion gguf BitCPM4-1B-packed BitCPM4-1B-tq2_0.gguf --type tq2_0
    python -m minicpm4_hf.conversion gguf MiniCPM4-8B-int4 MiniCPM4-8B-q4_0.gguf --embedding-type f16 --dry-run

MiniCPM's files have the architecture "minicpm" with its three scales, Llama's (BitCPM-CANN 1B and 3B) "llama". Ternary
weights go into TQ1_0 and TQ2_0 code for code, 4-bit GPTQ weights into Q4_0. llama.cpp attends densely, whatever
`sparse_config` says. The card is written beside the file, as OUT.gguf.md. Needs the package gguf.
"""

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from minicpm4_hf.quantization.ternary import ROW

from .card import model_card
from .output import Progress, in_words
from .source import Checkpoint, open_checkpoint

# Type of the layers -> default type of embedding and head.
TYPES = {
    "f32": "f32",
    "bf16": "bf16",
    "f16": "f16",
    "q8_0": "q8_0",
    "q4_0": "q8_0",
    "tq1_0": "f16",
    "tq2_0": "f16",
}
EMBEDDING_TYPES = ("f32", "bf16", "f16", "q8_0", "q4_0")
_METHODS = {
    "rounded": "Each weight is rounded to the type.",
    "exact codes": "The source's codes and scales are taken over as they are; no weight of the layers changes.",
    "quantised": "Each matrix of the layers is made ternary: codes by its mean absolute value, scales in float16.",
}
_METHOD = (
    "Rows of the query and key projections are put in the order in which llama.cpp turns them; norms are float32. "
    "llama.cpp attends densely, whatever the source's `sparse_config` says."
)
_USAGE = '```\nllama-cli -m {file} -p "It was a dark night, and" -n 50\n```'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the file is to hold."""
    parser.epilog = __doc__.partition("\n\n")[2].rpartition("\n\n")[2]
    parser.add_argument(
        "--type",
        choices=("auto", *TYPES),
        default="auto",
        help="of the layers' matrices (default: tq2_0 for packed ternary, q4_0 for GPTQ, else the checkpoint's dtype)",
    )
    parser.add_argument(
        "--embedding-type",
        choices=EMBEDDING_TYPES,
        help="of embedding and head (default: as --type, f16 beside ternary layers, q8_0 beside q4_0)",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="columns that share a scale where a full-precision checkpoint is made ternary: -1 (a whole row, the "
        "default) or a multiple of 256",
    )
    parser.add_argument(
        "--round-scales", action="store_true", help="let ternary scales be rounded to float16 (by at most 0.05 %%)"
    )
    parser.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer out: token ids in and out")


def run(arguments: argparse.Namespace) -> dict:
    """The command `gguf`."""
    return convert_to_gguf(
        arguments.source,
        arguments.output,
        type=arguments.type,
        embedding_type=arguments.embedding_type,
        group_size=arguments.group_size,
        round_scales=arguments.round_scales,
        tokenizer=not arguments.no_tokenizer,
        dry_run=arguments.dry_run,
    )


def convert_to_gguf(
    source: str | Path,
    output: str | Path,
    *,
    type: str = "auto",
    embedding_type: str | None = None,
    group_size: int | None = None,
    round_scales: bool = False,
    tokenizer: bool = True,
    dry_run: bool = False,
) -> dict:
    """Write a checkpoint as one GGUF file, a few rows in memory at a time.

    Args:
        source: folder of a MiniCPM4, MiniCPM or Llama checkpoint: full precision, ternary (packed, or as dequantised
            weights), or 4-bit in the GPTQ layout.
        output: file to create, ending in .gguf; it appears complete or not at all.
        type: of the layers' matrices, one of `TYPES`. "auto" is tq2_0 for packed ternary weights, q4_0 for GPTQ's, and
            the dtype of the checkpoint otherwise.
        embedding_type: of embedding and head, one of `EMBEDDING_TYPES`; None for the default beside `type`.
        group_size: where a full-precision checkpoint is made ternary, the columns that share a scale: -1 for a whole
            row, which is the default, or a multiple of 256.
        round_scales: let scales of ternary weights be rounded to float16, instead of refusing those that change.
        tokenizer: whether the tokenizer is written.
        dry_run: check everything that can be checked without reading the weights, and write nothing.

    Returns:
        `source`, `output`, `architecture`, `type`, `embedding_type`, `layers` (how the layers' weights came to the
        type: "rounded", "exact codes" or "quantised"), `tokenizer_differences` (in which cases llama.cpp cuts texts
        otherwise; None without a tokenizer), `left_out` (tensors without a place in the file), `errors` (relative root
        mean square of the change of "layers" and "embeddings"), `files` and `num_bytes`.

    Raises:
        ImportError: the package gguf is missing.
        ValueError: what cannot be read, or cannot be held by the type that was asked for.
        OSError: the disk is full, or cannot be written.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ImportError('Writing GGUF files needs the package gguf; install it with `pip install "gguf>=0.19"`.')
    from .gguf_file import new_file, require_space, write_gguf, write_text
    from .gguf_plan import encode_tensors, make_plan, make_writer

    output = Path(output)
    if output.suffix != ".gguf":
        raise ValueError(f"OUT must be a file name ending in .gguf, got {output}.")
    _check_settings(type, embedding_type, group_size)
    plan = make_plan(
        open_checkpoint(source),
        type,
        TYPES,
        embedding_type,
        group_size=group_size,
        round_scales=round_scales,
        tokenizer=tokenizer,
    )
    result = {
        "source": str(source),
        "output": str(output),
        "architecture": plan.architecture,
        "type": plan.layer_type,
        "embedding_type": plan.embedding_type,
        "layers": plan.method,
        "tokenizer_differences": plan.vocabulary.differences if plan.vocabulary else None,
        "left_out": plan.left_out,
    }
    if result["tokenizer_differences"]:
        reasons = "; ".join(result["tokenizer_differences"])
        print(f"warning: llama.cpp cuts some texts otherwise than this tokenizer: {reasons}", file=sys.stderr)
    if dry_run:
        size = in_words(plan.num_bytes)
        return {**result, "files": [output.name], "num_bytes": plan.num_bytes, "summary": f"{output} would be {size}"}
    card = output.absolute().with_name(f"{output.name}.md")
    with new_file(output) as partial:
        require_space(output, plan.num_bytes)
        progress = Progress(plan.num_bytes, "GB written")
        tensors = (_counted(pieces, progress) for pieces in encode_tensors(plan))
        write_gguf(make_writer(plan), partial, tensors)
        result["errors"] = {part: error.relative() for part, error in plan.errors.items() if part != "norms"}
        num_bytes = partial.stat().st_size
        write_text(card, _card(result, plan.checkpoint, num_bytes))
    summary = f"{output}: {plan.layer_type} ({plan.method}), {in_words(num_bytes)}"
    return {**result, "files": [output.name, card.name], "num_bytes": num_bytes, "summary": summary}


def _check_settings(type: str, embedding_type: str | None, group_size: int | None) -> None:
    if type != "auto" and type not in TYPES:
        raise ValueError(f"`type` must be auto or one of {', '.join(TYPES)}, got {type!r}.")
    if embedding_type is not None and embedding_type not in EMBEDDING_TYPES:
        raise ValueError(f"`embedding_type` must be one of {', '.join(EMBEDDING_TYPES)}, got {embedding_type!r}.")
    if group_size is not None and group_size != ROW and (group_size < 1 or group_size % 256):
        raise ValueError(f"`group_size` must be -1 (a whole row) or a multiple of 256, got {group_size}.")


def _counted(pieces: Iterator, progress: Progress) -> Iterator:
    for piece in pieces:
        yield piece
        progress.advance(piece.nbytes, "GGUF")


def _card(result: dict, checkpoint: Checkpoint, num_bytes: int) -> str:
    differences = result["tokenizer_differences"]
    tokens = "none" if differences is None else "; ".join(differences) or "as the source's"
    return model_card(
        checkpoint.folder,
        command="gguf",
        method=_METHODS[result["layers"]] + " " + _METHOD,
        settings={
            "architecture": result["architecture"],
            "type of the layers": result["type"],
            "type of embedding and head": result["embedding_type"],
            "tokenizer": tokens,
            "tensors left out": ", ".join(result["left_out"]) or "none",
        },
        sizes={"source": checkpoint.num_bytes, "file": num_bytes},
        error={f"{part}, relative to the source": f"{error:.3g}" for part, error in result["errors"].items()},
        usage=_USAGE.format(file=Path(result["output"]).name),
        tags=("gguf", "llama.cpp"),
        relation="quantized",
        library="gguf",
    )
