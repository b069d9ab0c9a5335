"""What int4 quantisation costs, method by method, as a table and a JSON record.

    python -m minicpm4_hf.eval.quantization checkpoint --calibration books/ --held-out dracula.txt --output int4.json
    python -m minicpm4_hf.eval.quantization planted --massive 10 100 1000 --output int4-planted.json

`checkpoint` quantises a trained checkpoint (the shipped one) and gives, on a text that was not used for calibration,
the error of its layers and the perplexity. `planted` does the same, without a perplexity, with a random model of
MiniCPM4-0.5B's shape (or `--preset`) whose first positions carry massive activations. Errors are squared, relative to
what a layer adds to the residual stream, and leave out the first four positions of each sequence.

The last line of stdout is the record. The exit code is 0, or 2 with one sentence on stderr when the input is wrong.
"""

import argparse
import json
import math
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

from minicpm4_cli.loading import find_checkpoint, load_tokenizer, positive_int, quiet
from minicpm4_hf.conversion.gptq_calibration import read_calibration
from minicpm4_hf.conversion.gptq_model import Int4Settings
from minicpm4_hf.conversion.int4 import DEFAULT_PREFIX, GROUP_SIZES, encode_prefix, quantize_checkpoint
from minicpm4_hf.conversion.source import Checkpoint, open_checkpoint
from minicpm4_hf.kernels.bench.__main__ import write_atomically
from minicpm4_hf.presets import PRESETS

from .measure import QuantizedFolder, layer_errors, score_windows
from .planted import NUM_FIRST, build_planted, random_sequences

# Name in the table -> settings of `Int4Settings`.
VARIANTS = {
    "rtn": {"method": "rtn"},
    "gptq": {"method": "gptq"},
    "p-gptq": {"method": "p-gptq"},
    "s-gptq": {"method": "s-gptq"},
    "s-p-gptq": {"method": "s-p-gptq"},
    "p-gptq+act-order": {"method": "p-gptq", "act_order": True},
    "p-gptq+rotate": {"method": "p-gptq", "rotate": True},
    "gptq+prefix": {"method": "gptq", "prefix": True},
}
PLANTED_VARIANTS = ("rtn", "gptq", "p-gptq")
SHAPES = tuple(name for name in PRESETS if name.startswith("MiniCPM4"))
COLUMNS = ("variant", "layer error", "down_proj error", "perplexity", "seconds")


def build_parser() -> argparse.ArgumentParser:
    """The command line, a subcommand a kind of model."""
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m minicpm4_hf.eval.quantization",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    checkpoint = commands.add_parser("checkpoint", help="a trained checkpoint, on texts")
    checkpoint.add_argument("--model", metavar="FOLDER", help="in full precision (default: the shipped one)")
    checkpoint.add_argument("--calibration", nargs="+", required=True, metavar="TEXT", help="files or folders")
    checkpoint.add_argument("--held-out", nargs="+", required=True, metavar="TEXT", help="to measure on")
    checkpoint.add_argument("--tokens", type=positive_int, default=32768, metavar="N", help="to score")
    checkpoint.add_argument("--context", type=positive_int, default=1024, metavar="N", help="tokens a window")
    planted = commands.add_parser("planted", help="a random model with massive activations at the first positions")
    planted.add_argument("--massive", type=float, nargs="+", default=[10.0, 100.0, 1000.0], metavar="X", help="sizes")
    planted.add_argument(
        "--preset", choices=SHAPES, default="MiniCPM4-0.5B", help="whose shape (default: %(default)s)"
    )
    planted.add_argument("--layers", type=positive_int, default=2, metavar="N", help="decoder layers")
    for command, sequences, length, variants in (
        (checkpoint, 128, 1024, tuple(VARIANTS)),
        (planted, 32, 512, PLANTED_VARIANTS),
    ):
        command.add_argument("--variants", nargs="+", choices=VARIANTS, default=variants, metavar="NAME")
        command.add_argument("--sequences", type=positive_int, default=sequences, metavar="N", help="for calibration")
        command.add_argument("--length", type=positive_int, default=length, metavar="N", help="tokens of each")
        command.add_argument("--unseen", type=positive_int, default=8, metavar="N", help="sequences to measure on")
        command.add_argument("--group-size", type=int, choices=GROUP_SIZES, default=128)
        command.add_argument("--output", type=Path, metavar="RECORD.json", help="also write the record to this file")
    return parser


def measure_variant(
    source: Checkpoint,
    name: str,
    group_size: int,
    sequences: torch.Tensor,
    unseen: torch.Tensor,
    prefix_ids: tuple[int, ...] = (),
    text: tuple[torch.Tensor, int, int] | None = None,
) -> dict:
    """Quantise a checkpoint into a folder that is thrown away, and measure it.

    Args:
        name: a key of `VARIANTS`.
        sequences, unseen: calibration tokens and others, `[num, length]`, each beginning with `bos_token`.
        prefix_ids: for the variants with a prefix.
        text: tokens to score, context and `bos_token_id`; None for no perplexity.
    """
    settings = dict(VARIANTS[name])
    if settings.pop("prefix", False):
        settings["prefix_ids"] = prefix_ids
        sequences, unseen = sequences[:, 1:], unseen[:, 1:]
    settings = Int4Settings(group_size=group_size, **settings)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "int4"
        quantize_checkpoint(source, output, settings, sequences if settings.is_calibrated else None)
        seconds = time.perf_counter() - began
        quantized = QuantizedFolder(output)
        errors = layer_errors(source, quantized, unseen, first=NUM_FIRST, rotated=settings.rotate)
        nats = None
        if text is not None:
            ids, context, bos = text
            nats = score_windows(quantized.load_model(), ids, context, bos, quantized.prefix)
    comparable = not (settings.rotate or settings.smooth)
    return {
        "variant": name,
        "settings": settings.describe(),
        "layer_errors": errors["layer"],
        "layer_error": sum(errors["layer"]) / len(errors["layer"]),
        "down_proj_error": sum(errors["down_proj"]) / len(errors["down_proj"]) if comparable else None,
        "perplexity": None if nats is None else math.exp(nats),
        "quantize_seconds": round(seconds, 1),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def peak_memory_bytes() -> int:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_checkpoint(args: argparse.Namespace) -> dict:
    """Measure a trained checkpoint.

    Raises:
        ValueError, OSError: wrong input.
    """
    folder, name = find_checkpoint(args.model)
    source, tokenizer = open_checkpoint(folder), load_tokenizer(folder)
    if tokenizer.bos_token_id is None:
        raise ValueError(f"The tokenizer in {folder} has no `bos_token` for sequences to begin with.")
    if args.context > source.config.max_position_embeddings or args.context < 3:
        raise ValueError(f"`--context` must be 3 to {source.config.max_position_embeddings}, got {args.context}.")
    sequences = read_calibration(args.calibration, tokenizer, num_sequences=args.sequences, length=args.length)
    unseen = read_calibration(args.held_out, tokenizer, num_sequences=args.unseen, length=args.length)
    ids = read_calibration(args.held_out, tokenizer, num_sequences=1, length=args.tokens, with_bos=False)[0]
    text = ids, args.context, tokenizer.bos_token_id
    with quiet():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    full = math.exp(score_windows(model.eval(), *text, None))
    del model
    print(f"full precision: perplexity {full:.3f}", file=sys.stderr, flush=True)
    prefix_ids = tuple(encode_prefix(tokenizer, DEFAULT_PREFIX))
    results = []
    for variant in args.variants:
        results.append(measure_variant(source, variant, args.group_size, sequences, unseen, prefix_ids, text))
        print(_row(results[-1]), file=sys.stderr, flush=True)
    return {"model": Path(name).name, "full_precision_perplexity": full, "results": results}


def run_planted(args: argparse.Namespace) -> dict:
    """Measure random models with planted massive activations.

    Raises:
        ValueError, OSError: wrong input.
    """
    if args.length <= NUM_FIRST + 1:
        raise ValueError(f"`--length` must be greater than {NUM_FIRST + 1}, got {args.length}.")
    results = []
    for massive in args.massive:
        if not 0 < massive < math.inf:
            raise ValueError(f"`--massive` must be greater than 0, got {massive}.")
        with tempfile.TemporaryDirectory() as folder, quiet():
            build_planted(Path(folder) / "model", preset=args.preset, num_layers=args.layers, massive=massive)
            source = open_checkpoint(Path(folder) / "model")
            vocabulary = source.config.vocab_size
            sequences = random_sequences(vocabulary, args.sequences, args.length, 1)
            unseen = random_sequences(vocabulary, args.unseen, args.length, 2)
            prefix_ids = tuple(range(NUM_FIRST))
            for variant in args.variants:
                result = measure_variant(source, variant, args.group_size, sequences, unseen, prefix_ids)
                results.append({"massive": massive, **result})
                print(f"massive {massive:g}: {_row(results[-1])}", file=sys.stderr, flush=True)
    return {"model": f"{args.preset}'s shape, {args.layers} layers, random", "results": results}


def _row(result: dict) -> str:
    cells = (
        result["variant"],
        f"{result['layer_error']:.3e}",
        "-" if result["down_proj_error"] is None else f"{result['down_proj_error']:.3e}",
        "-" if result["perplexity"] is None else f"{result['perplexity']:.3f}",
        f"{result['quantize_seconds']:.0f}",
    )
    return " | ".join(cells)


def describe(record: dict) -> str:
    """The table of a record, as Markdown."""
    is_planted = "massive" in record["results"][0]
    head = ["massive"] * is_planted + list(COLUMNS)
    rows = [(f"{result['massive']:g} | " if is_planted else "") + _row(result) for result in record["results"]]
    if "full_precision_perplexity" in record:
        rows.insert(0, f"full precision | - | - | {record['full_precision_perplexity']:.3f} | -")
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {row} |" for row in rows)])


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        if args.output is not None and not args.output.absolute().parent.is_dir():
            raise ValueError(f"The folder of {str(args.output)!r} does not exist.")
        measured = run_checkpoint(args) if args.command == "checkpoint" else run_planted(args)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    names = ("calibration", "held_out")
    settings = {name: value for name, value in vars(args).items() if name not in ("output", "model", *names)}
    settings |= {name: [Path(path).name for path in getattr(args, name)] for name in names if hasattr(args, name)}
    record = {"benchmark": "int4 quantisation", "settings": settings, "threads": torch.get_num_threads(), **measured}
    print(describe(record))
    if args.output is not None:
        write_atomically(args.output, json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
