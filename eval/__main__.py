"""Evaluate a checkpoint, or time models.

    python -m minicpm4_hf.eval perplexity --model ./MiniCPM4-0.5B --text book.txt
    python -m minicpm4_hf.eval perplexity --model ./MiniCPM4-0.5B --text book.txt --context 32768 --dense --json
    python -m minicpm4_hf.eval perplexity --model ./MiniCPM4-8B --text book.txt --sparse topk=32 --output record.json
    python -m minicpm4_hf.eval speed --preset MiniCPM4-0.5B --against llama.cpp --output speed.json
    python -m minicpm4_hf.eval ruler --model ./MiniCPM4-8B --lengths 4096 32768 --output ruler.json
    python -m minicpm4_hf.eval tables

The exit code is 0, or 2 with one sentence on stderr when the input is wrong; `speed` gives 1 when models that must
agree do not.
"""

import argparse
import importlib
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path

from minicpm4_cli.loading import (
    add_device_arguments,
    check_weight_files,
    find_checkpoint,
    find_device,
    load_config,
    load_tokenizer,
    load_weights,
    parse_sparse,
    positive_int,
    quiet,
)
from minicpm4_hf.eval.speed.command import add_arguments as add_speed_arguments
from minicpm4_hf.eval.speed.command import run_speed
from minicpm4_hf.eval.speed.schedule import DisagreementError
from minicpm4_hf.eval.tasks.perplexity import evaluate_perplexity, read_text

VERSIONS = ("minicpm4-hf", "torch", "transformers", "tokenizers")
# Subcommand -> its module, which has a `main(argv)` and is imported when asked for, and what it does.
COMMANDS = {
    "ruler": ("minicpm4_hf.eval.ruler.__main__", "RULER's thirteen tasks at any length, generated here"),
    "longppl": ("minicpm4_hf.eval.longppl.__main__", "LongPPL: perplexity of the tokens that need the long context"),
    "benchmarks": ("minicpm4_hf.eval.benchmarks.__main__", "the paper's benchmarks and the ternary set, with lm-eval"),
    "tables": ("minicpm4_hf.eval.tables.__main__", "the paper's tables and figures beside what was measured"),
    "speed-figure": ("minicpm4_hf.eval.speed.figure", "grouped bars of a record of `speed`"),
}


def build_parser() -> argparse.ArgumentParser:
    """The command line, one subcommand a task."""
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m minicpm4_hf.eval",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    perplexity = tasks.add_parser("perplexity", help="bits per byte and perplexity over a text")
    perplexity.add_argument(
        "--model", metavar="PATH_OR_ID", help="a checkpoint, shipped or not (default: minicpm4-books)"
    )
    perplexity.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text")
    perplexity.add_argument(
        "--context", type=positive_int, default=4096, metavar="N", help="tokens a window (default: %(default)s)"
    )
    attention = perplexity.add_mutually_exclusive_group()
    attention.add_argument("--dense", action="store_true", help="dense attention, whatever the checkpoint says")
    attention.add_argument(
        "--sparse", nargs="*", metavar="KEY=VALUE", help="sparse attention, with these settings in place of its own"
    )
    add_device_arguments(perplexity)
    perplexity.add_argument("--json", action="store_true", help="print the record as one JSON document")
    perplexity.add_argument("--output", type=Path, metavar="RECORD.json", help="also write the record to this file")
    summary = "prompt and decode rates of whole models with random weights, side by side"
    add_speed_arguments(tasks.add_parser("speed", help=summary, description=summary))
    for name, (_, summary) in COMMANDS.items():
        tasks.add_parser(name, help=summary, add_help=False)
    return parser


def run_perplexity(args: argparse.Namespace) -> dict:
    """Load what the arguments name, score the text, and say what was done with what.

    Raises:
        ValueError, OSError: wrong input.
    """
    sparse, content, device = parse_sparse(args.sparse), read_text(args.text), find_device(args.device)
    with quiet():
        folder, name = find_checkpoint(args.model)
        config = load_config(folder, dense=args.dense, sparse=sparse)
        check_weight_files(folder)
        tokenizer = load_tokenizer(folder)
        model = load_weights(folder, config, args.dtype).to(device).eval()
        started = time.perf_counter()
        result = evaluate_perplexity(model, tokenizer, content, context=args.context, progress=report_progress)
    return {
        "task": args.task,
        "model": name,
        "sparse_config": getattr(config, "sparse_config", None),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(device),
        "text": args.text.name,
        **result,
        "seconds": round(time.perf_counter() - started, 2),
        "versions": {package: version(package) for package in VERSIONS},
    }


def report_progress(num_done: int, num_tokens: int) -> None:
    """One line to stderr."""
    print(f"{num_done} of {num_tokens} tokens", file=sys.stderr)


def write_record(path: Path, record: dict) -> None:
    """Write a record so that the file is there whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def main(argv: list[str] | None = None) -> int:
    """Run one task; 0, 1 for models that do not agree, or 2 for wrong input."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in COMMANDS:
        return importlib.import_module(COMMANDS[words[0]][0]).main(words[1:])
    args = build_parser().parse_args(words)
    try:
        if args.output and not args.output.parent.is_dir():
            raise ValueError(f"The folder of {str(args.output)!r} does not exist.")
        if args.task == "speed":
            run_speed(args)
            return 0
        record = run_perplexity(args)
        if args.output:
            write_record(args.output, record)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except DisagreementError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(record))
    else:
        print(
            f"{record['bits_per_byte']:.4f} bits per byte, perplexity {record['perplexity']:.3f} a token over "
            f"{record['num_tokens']} tokens ({record['num_bytes']} bytes) in windows of {record['context']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
