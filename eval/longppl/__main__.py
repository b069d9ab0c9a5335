"""LongPPL: the perplexity of a text's key tokens, which an evaluator predicts well from a long context only.

    python -m minicpm4_hf.eval longppl --text emma.txt --length 16384 --output longppl.json
    python -m minicpm4_hf.eval longppl --model ./MiniCPM4-8B --evaluator ./Meta-Llama-3.1-8B --text a.txt b.txt
    python -m minicpm4_hf.eval longppl --model ./MiniCPM4-0.5B --text emma.txt --length 8192 --short 1024

The texts are cut into windows of --length tokens of the evaluator, which runs with dense attention; the model may have
another tokenizer. Without --evaluator the model is its own. The paper's evaluators are Qwen2-72B-Instruct,
Mistral-Large-Instruct-2407 and Llama-3.1-8B; here it can be a MiniCPM4 or a Llama, and figures compare only where it
is the same. Over several windows the mean is over all key tokens. Prints a table and, as the last line, the record
as one JSON document; with --output it is also written there, and the same command goes on from the .jsonl beside it.

The exit code is 0, or 2 with one sentence on stderr when the input is wrong.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

from minicpm4_cli.loading import (
    add_device_arguments,
    check_weight_files,
    find_checkpoint,
    load_config,
    load_tokenizer,
    parse_sparse,
    positive_int,
    quiet,
)
from minicpm4_hf.eval.command_line import run_command
from minicpm4_hf.eval.memory.cases import Journal, run_plan
from minicpm4_hf.eval.memory.subject import MODES, load_subject, read_texts
from minicpm4_hf.eval.ruler.record import begin_record, check_resumable, owner_of
from minicpm4_hf.kernels.bench.__main__ import write_atomically

from .contexts import split_windows
from .metric import ALPHA, BETA, SHORT_TOKENS, STRIDE_TOKENS
from .plan import Evaluator, count_tokens, describe_longppl, plan_keys, plan_longppl

BENCHMARK = "longppl"
SETTINGS = ("length", "short", "stride", "alpha", "beta", "modes", "context", "windows")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog=f"python -m minicpm4_hf.eval {BENCHMARK}",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", metavar="PATH_OR_ID", help="a checkpoint, shipped or not (default: minicpm4-books)")
    parser.add_argument("--evaluator", metavar="PATH_OR_ID", help="finds the key tokens (default: --model)")
    parser.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="UTF-8")
    parser.add_argument("--length", type=positive_int, default=32768, metavar="N", help="default: %(default)s")
    parser.add_argument("--windows", type=positive_int, metavar="N", help="the first N of all texts (default: all)")
    parser.add_argument(
        "--short",
        type=positive_int,
        default=SHORT_TOKENS,
        metavar="N",
        help="the short context (default: %(default)s)",
    )
    parser.add_argument(
        "--stride",
        type=positive_int,
        default=STRIDE_TOKENS,
        metavar="N",
        help="tokens that share a short context (default: %(default)s)",
    )
    parser.add_argument("--alpha", type=float, default=ALPHA, metavar="NATS", help="least gain (default: %(default)s)")
    parser.add_argument(
        "--beta", type=float, default=BETA, metavar="NATS", help="least log-probability (default: %(default)s)"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="attention (default: both)")
    parser.add_argument(
        "--sparse", nargs="*", metavar="KEY=VALUE", help="what sparse is, in place of the checkpoint's settings"
    )
    parser.add_argument("--context", type=positive_int, metavar="N", help="extend the context to N tokens (LongRoPE)")
    add_device_arguments(parser)
    parser.add_argument("--threads", type=positive_int, metavar="N", help="default: torch's choice")
    parser.add_argument("--output", type=Path, metavar="RECORD.json", help="write the record here; go on from there")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises `ValueError` for what can be found wrong before anything is loaded."""
    if args.output and not args.output.parent.is_dir():
        raise ValueError(f"The folder of {str(args.output)!r} does not exist.")
    if args.output and args.output.suffix != ".json":
        raise ValueError(f"`--output` must be a file that ends in .json, got {str(args.output)!r}.")
    if args.short >= args.length:
        raise ValueError(f"`--short` must be below `--length` {args.length}, got {args.short}.")
    if len(set(args.modes)) < len(args.modes):
        raise ValueError(f"`--modes` must name each value once, got {' '.join(args.modes)}.")
    parse_sparse(args.sparse)


def spell_command(args: argparse.Namespace, model: str, evaluator: str) -> str:
    """The command with every setting in it, of the paths the last component."""
    words = ["python", "-m", "minicpm4_hf.eval", BENCHMARK]
    words += ["--model", model] if args.model else []
    words += ["--evaluator", evaluator] if args.evaluator else []
    words += ["--sparse", *args.sparse] if args.sparse is not None else []
    words += ["--device", args.device, "--dtype", args.dtype, "--threads", str(torch.get_num_threads())]
    words += ["--text", *(path.name for path in args.text)]
    for name in SETTINGS:
        value = getattr(args, name)
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def run_longppl(args: argparse.Namespace) -> dict:
    """Measure what the arguments name, print the table and give the record.

    Raises:
        ValueError, OSError: wrong input.
    """
    texts = read_texts(args.text)
    with quiet():
        subject = load_subject(
            args.model, sparse=args.sparse, device=args.device, dtype=args.dtype, context=args.context
        )
        if "sparse" in args.modes and subject.sparse_config is None:
            raise ValueError(
                f"{subject.name!r} has no sparse attention (its `sparse_config` is null): give settings with "
                "`--sparse`, or run with `--modes dense`."
            )
        evaluator_name = args.evaluator or args.model
        folder, _ = find_checkpoint(evaluator_name)
        context = None if args.evaluator else args.context  # of the model that is its own
        config = load_config(folder, dense=True, context=context)
        check_weight_files(folder)
        tokenizer = load_tokenizer(folder)
        windows = [part for text in texts for part in split_windows(tokenizer, text.content.decode(), args.length)]
        windows = windows[: args.windows]
        if count_tokens(tokenizer, windows) > config.max_position_embeddings:
            raise ValueError(
                f"`--length` must be at most the evaluator's context of {config.max_position_embeddings} tokens, got "
                f"{args.length}."
            )
        evaluator = Evaluator(folder, model=evaluator_name, device=args.device, dtype=args.dtype, context=context)
        settings = {name: getattr(args, name) for name in SETTINGS}
        command = spell_command(args, subject.name, folder.name)
        record = begin_record(BENCHMARK, subject, texts, command, {**settings, "threads": torch.get_num_threads()})
        record["evaluator"] = evaluator.identity
        check_resumable(args.output, record)
        journal = Journal(args.output and args.output.with_suffix(".jsonl"), owner_of(record))
        if args.output and not args.output.exists():  # so that whoever goes on knows the commit
            write_atomically(args.output, json.dumps({**record, "rows": []}) + "\n")
        shared = {"texts": [text.sha256 for text in texts], "length": args.length}
        finding = {name: getattr(args, name) for name in ("short", "stride", "alpha", "beta")}
        plan = plan_keys(evaluator, windows, finding, shared)
        spans = run_plan("keys", plan, journal)["spans"]
        evaluator.unload()
        owned = {name: value for name, value in plan.cases[0].key.items() if name != "window"}
        figures = run_plan(BENCHMARK, plan_longppl(subject, windows, spans, args.modes, owned), journal)
    record = {**record, **figures}
    if args.output:
        write_atomically(args.output, json.dumps(record, allow_nan=False) + "\n")
    print(describe_longppl(figures), flush=True)
    return record


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)

    def measure() -> None:
        check_arguments(args)
        print(json.dumps(run_longppl(args), allow_nan=False))

    return run_command(measure, threads=args.threads)


if __name__ == "__main__":
    sys.exit(main())
