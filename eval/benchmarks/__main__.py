"""Measure the paper's benchmarks, and those of ternary models, with lm-eval's engine.

    python -m minicpm4_hf.eval benchmarks --list
    python -m minicpm4_hf.eval benchmarks --model ./MiniCPM4-0.5B --output runs/minicpm4-0.5b.json
    python -m minicpm4_hf.eval benchmarks --tasks gsm8k bbh/object_counting --limit 100 --data-dir ./sets
    torchrun --nproc_per_node 8 -m minicpm4_hf.eval benchmarks --model ./MiniCPM4-8B --output runs/minicpm4-8b.json

A task is a benchmark, or a part of one: bbh/object_counting. The sets come from the Hub, or from the files of
--data-dir: FOLDER/mmlu/all/test.parquet or FOLDER/gsm8k/test.jsonl, and flat, FOLDER/gsm8k_test.parquet,
FOLDER/humaneval.jsonl, FOLDER/bbh_object_counting.json; `--list` names each set. Prompts and scores are
OpenCompass's: in a chat answers are written, in plain text letters are chosen by their likelihood.

Prints a table and, with --json, the record as one JSON document in its place. With --output the record is also written
there; every sample's answer is added to the file of the same name that ends in .jsonl as it is measured, and the same
command goes on from there. mbpp and humaneval run what the model writes in a sandbox.

The exit code is 0, or 2 with one sentence on stderr when the input is wrong.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import logging
import os
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

from minicpm4_cli.loading import add_attention_arguments, add_device_arguments, parse_sparse, positive_int, quiet
from minicpm4_hf.eval.memory.cases import Journal
from minicpm4_hf.eval.mup.__main__ import count
from minicpm4_hf.eval.ruler.fitting import FORMATS, choose_format
from minicpm4_hf.kernels.bench.__main__ import write_atomically

from .header import format_headers, read_headers
from .run import build_samples, choose_tasks, describe_rows, find_runner, measure
from .tasks import PAPER, TASKS

BENCHMARK = "benchmarks"
SETTINGS = ("tasks", "limit", "seed", "shots", "batch", "context", "unsafe")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog=f"python -m minicpm4_hf.eval {BENCHMARK}",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="say of each task where it comes from, and end")
    parser.add_argument("--model", metavar="PATH_OR_ID", help="a checkpoint, shipped or not (default: minicpm4-books)")
    parser.add_argument(
        "--tasks", nargs="+", default=list(PAPER), metavar="NAME", help=f"of {', '.join(TASKS)} (default: the first 8)"
    )
    parser.add_argument("--limit", type=positive_int, metavar="N", help="N samples a task, drawn with --seed")
    parser.add_argument("--seed", type=count, default=0, metavar="N", help="default: 0")
    parser.add_argument("--shots", type=count, metavar="N", help="examples in a prompt (default: each task's own)")
    parser.add_argument("--data-dir", type=Path, metavar="FOLDER", help="the sets' files (default: from the Hub)")
    add_attention_arguments(parser)
    parser.add_argument(
        "--format", choices=FORMATS, default="auto", help="of prompts (default: a chat where there is a template)"
    )
    add_device_arguments(parser)
    parser.add_argument("--batch", type=positive_int, default=1, metavar="N", help="samples at a time (default: 1)")
    parser.add_argument("--threads", type=positive_int, metavar="N", help="default: torch's choice")
    parser.add_argument("--unsafe", action="store_true", help="run the model's code without isolation if need be")
    parser.add_argument("--output", type=Path, metavar="RECORD.json", help="write the record here; go on from there")
    parser.add_argument("--json", action="store_true", help="print the record, or the list, as one JSON document")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises `ValueError` for what can be found wrong before anything is loaded, `ImportError` without lm-eval."""
    if args.output and not args.output.parent.is_dir():
        raise ValueError(f"The folder of {str(args.output)!r} does not exist.")
    if args.output and args.output.suffix != ".json":
        raise ValueError(f"`--output` must be a file that ends in .json, got {str(args.output)!r}.")
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError('This needs lm-eval: `pip install "minicpm4-hf[eval]"`.')
    parse_sparse(args.sparse)


def place_process(device: str) -> str:
    """The device of this process: of several, each has a GPU of its own."""
    import torch

    local = os.environ.get("LOCAL_RANK")
    if local is None or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{local}"


def spell_command(args: argparse.Namespace, model: str, style: str, identity: dict) -> str:
    """The command with every setting in it, of the paths the last component."""
    words = ["python", "-m", "minicpm4_hf.eval", BENCHMARK]
    words += ["--model", model] if args.model else []
    words += ["--dense"] if args.dense else []
    words += ["--sparse", *args.sparse] if args.sparse is not None else []
    words += ["--device", identity["device"], "--dtype", identity["dtype"], "--format", style]
    words += ["--data-dir", args.data_dir.name] if args.data_dir else []
    for name in SETTINGS:
        value = getattr(args, name)
        if value is True:
            words.append(f"--{name}")
        elif value is not None and value is not False:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def load_model(args: argparse.Namespace):
    """The checkpoint with the command line's changes, and how it attends.

    Raises:
        ValueError, OSError: anything about it that the user can put right.
    """
    from minicpm4_hf.eval.memory.subject import load_subject

    device = place_process(args.device)
    subject = load_subject(args.model, sparse=args.sparse, device=device, dtype=args.dtype, context=args.context)
    if args.dense:
        identity = {**subject.identity, "sparse_config": None}
        subject = dataclasses.replace(subject, sparse_config=None, identity=identity)
    return subject, "dense" if subject.sparse_config is None else "sparse"


def run_benchmarks(args: argparse.Namespace) -> dict | None:
    """Measure what the arguments name and give the record, or None in a process that another one speaks for.

    Raises:
        ValueError, OSError: wrong input.
        SandboxError: the model's code cannot be isolated.
    """
    import torch

    from minicpm4_hf.eval.ruler.record import begin_record, check_resumable, owner_of

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    torch.manual_seed(args.seed)
    chosen = choose_tasks(args.tasks)
    with quiet(), contextlib.redirect_stdout(sys.stderr):
        subject, mode = load_model(args)
        style = choose_format(args.format, subject.tokenizer)
        built = build_samples(chosen, args.data_dir, style=style, shots=args.shots, limit=args.limit, seed=args.seed)
        passes = find_runner([benchmark for _, benchmark, _ in built.values()], args.unsafe)
        from .engine import Checkpoint

        model = Checkpoint(subject, batch=args.batch, style=style)
        settings = {name: getattr(args, name) for name in SETTINGS}
        settings |= {"format": style, "attention": mode, "processes": model.world_size}
        settings |= {"data": "--data-dir" if args.data_dir else "Hub", "threads": torch.get_num_threads()}
        command = spell_command(args, subject.name, style, subject.identity)
        record = begin_record(BENCHMARK, subject, [], command, settings)
        record["versions"]["lm-eval"] = version("lm-eval")
        check_resumable(args.output, record)
        model.barrier()
        journal = Journal(args.output and args.output.with_suffix(".jsonl"), owner_of(record))
        if args.output and model.rank == 0 and not args.output.exists():  # so that whoever goes on knows the commit
            write_atomically(args.output, json.dumps({**record, "rows": []}) + "\n")
        with subject.attending(mode):
            rows = measure(model, built, journal, style=style, batch=args.batch, passes=passes, shots=args.shots)
    if rows is None:
        return None
    record = {**record, "rows": rows}
    if args.output:
        write_atomically(args.output, json.dumps(record, allow_nan=False) + "\n")
    return record


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.list:
        headers = read_headers()
        headers = {name: headers[name] for name in TASKS}
        listed = {name: {"title": header.title, **header.fields} for name, header in headers.items()}
        print(json.dumps(listed) if args.json else format_headers(headers))
        return 0
    from minicpm4_hf.eval.command_line import run_command
    from minicpm4_hf.eval.sandbox import SandboxError

    def measure() -> None:
        check_arguments(args)
        record = run_benchmarks(args)
        if record is not None:
            print(json.dumps(record, allow_nan=False) if args.json else describe_rows(record["rows"]))

    return run_command(measure, threads=args.threads, errors=(SandboxError,))


if __name__ == "__main__":
    sys.exit(main())
