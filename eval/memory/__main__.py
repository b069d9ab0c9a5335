"""Measure what a checkpoint does with long texts: prediction, retrieval, and short tasks with one right answer.

    python -m minicpm4_hf.eval.memory all --text dracula.txt emma.txt --output record.json
    python -m minicpm4_hf.eval.memory needle --model ./model --text emma.txt --lengths 2048 --samples 2 --output n.json
    python -m minicpm4_hf.eval.memory heatmap record.json --output needle.png

Prints a table for each part and, as the last line, the record as one JSON document. With --output the record is also
written there, after each part, and results are added to a file of the same name that ends in .jsonl, so that the same
command goes on where a run was ended. Results belong to the weights by their SHA-256, the versions and the settings:
what was measured with others is not used. Give `--text` books that the checkpoint was not trained on. `heatmap` needs
matplotlib.

The exit code is 0, or 2 with one sentence on stderr when the input is wrong.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from minicpm4_cli.loading import add_device_arguments, parse_sparse, positive_int, quiet
from minicpm4_hf.eval.command_line import run_command
from minicpm4_hf.eval.mup.__main__ import count

from . import answers, needle, prediction
from .cases import Journal, Plan, run_plan
from .heatmap import write_heatmap
from .record import NEEDLE_BENCHMARKS, add_part, begin_record, owner_of, read_record, resume_record, write_record
from .subject import MODES, Subject, Text, load_subject, read_texts


@dataclass(frozen=True)
class Part:
    """A measurement: what it is, its settings, and its functions."""

    summary: str
    settings: tuple[str, ...]
    plan: Callable[..., Plan]
    describe: Callable[[dict], str]
    reads_texts: bool = True


# In the order in which `all` runs them, the longest last.
PARTS = {
    "addition": Part(
        "right sums among those of two- and three-digit numbers, steps written out",
        ("problems", "batch", "seed"),
        answers.plan_addition,
        answers.describe_answers,
        reads_texts=False,
    ),
    "tools": Part(
        "right calls in chats with functions",
        ("dialogues", "batch", "seed"),
        answers.plan_tools,
        answers.describe_answers,
        reads_texts=False,
    ),
    "bits-per-byte": Part(
        "bits per byte of whole books",
        ("window", "modes"),
        prediction.plan_bits_per_byte,
        prediction.describe_bits_per_byte,
    ),
    "sparse-dense": Part(
        "perplexity with sparse against dense attention at long contexts",
        ("contexts", "tokens"),
        prediction.plan_sparse_dense,
        prediction.describe_sparse_dense,
    ),
    "needle": Part(
        "retrieval of one fact from prose, by length and depth",
        ("lengths", "depths", "samples", "modes", "seed"),
        needle.plan_needle,
        needle.describe_needle,
    ),
}
# Setting -> how it is read; the flags are the settings' names.
FLAGS = {
    "window": {"type": positive_int, "default": 4096, "help": "tokens a window of bits-per-byte"},
    "contexts": {"type": positive_int, "nargs": "+", "default": [8192, 32768], "help": "tokens a window"},
    "tokens": {"type": positive_int, "default": 131072, "help": "tokens of each text at each context"},
    "lengths": {"type": positive_int, "nargs": "+", "default": [2048, 4096, 8192, 32768], "help": "tokens an example"},
    "depths": {"type": positive_int, "default": 10, "help": "places of the fact, from before the prose to behind it"},
    "samples": {"type": positive_int, "default": 20, "help": "examples at each length and depth"},
    "problems": {"type": positive_int, "default": 500, "help": "sums"},
    "dialogues": {"type": positive_int, "default": 200, "help": "chats"},
    "batch": {"type": positive_int, "default": 25, "help": "sums or chats at a time"},
    "modes": {"nargs": "+", "choices": MODES, "default": list(MODES), "help": "attention"},
    "seed": {"type": count, "default": 0, "help": "of facts, places, sums and chats"},
}


def build_parser() -> argparse.ArgumentParser:
    """The command line, a subcommand a part, one for all of them and one for the figure."""
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m minicpm4_hf.eval.memory",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    names = {**{name: (name,) for name in PARTS}, "all": tuple(PARTS)}
    for name, parts in names.items():
        text = PARTS[name].summary if name in PARTS else f"{', '.join(PARTS)}, one after another"
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(parts=parts, text=[])
        command.add_argument(
            "--model", metavar="PATH_OR_ID", help="a checkpoint, shipped or not (default: minicpm4-books)"
        )
        command.add_argument(
            "--sparse", nargs="*", metavar="KEY=VALUE", help="what sparse is, in place of the checkpoint's settings"
        )
        command.add_argument(
            "--context", type=positive_int, metavar="N", help="extend the context to N tokens (the LongRoPE recipe)"
        )
        add_device_arguments(command)
        command.add_argument("--threads", type=positive_int, metavar="N", help="default: torch's choice")
        command.add_argument(
            "--output",
            type=Path,
            metavar="RECORD.json",
            help="write the record here; go on from the results beside it",
        )
        if any(PARTS[part].reads_texts for part in parts):
            command.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="books, UTF-8")
        for setting in dict.fromkeys(setting for part in parts for setting in PARTS[part].settings):
            options = FLAGS[setting]
            metavar = {} if "choices" in options else {"metavar": "N"}
            default = options["default"]
            shown = " ".join(map(str, default)) if isinstance(default, list) else default
            text = f"{options['help']} (default: {shown})"
            command.add_argument(f"--{setting}", **{**options, **metavar, "help": text})
    figure = commands.add_parser(
        "heatmap", help="the grid of a record's needle, as SVG, PNG or JSON", description="The figure."
    )
    figure.add_argument("record", type=Path, metavar="RECORD.json")
    figure.add_argument("--output", type=Path, required=True, metavar="FIGURE.svg|.png|.json")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises `ValueError` for what can be found wrong before anything is loaded; repeated values are refused."""
    if args.output and not args.output.parent.is_dir():
        raise ValueError(f"The folder of {str(args.output)!r} does not exist.")
    if args.command == "heatmap":
        return
    if args.output and args.output.suffix != ".json":
        raise ValueError(f"`--output` must be a file that ends in .json, got {str(args.output)!r}.")
    parse_sparse(args.sparse)
    for setting in ("contexts", "lengths", "modes"):
        values = getattr(args, setting, [])
        if len(set(values)) < len(values):
            raise ValueError(f"`--{setting}` must name each value once, got {' '.join(map(str, values))}.")


def settings_of(args: argparse.Namespace, part: str) -> dict:
    """The settings of a part by name."""
    return {setting: getattr(args, setting) for setting in PARTS[part].settings}


def spell_command(args: argparse.Namespace, part: str, subject: Subject) -> str:
    """The command of one part with every setting in it, of the paths the last component."""
    words = ["python", "-m", "minicpm4_hf.eval.memory", part]
    words += ["--model", subject.name] if args.model else []
    words += ["--sparse", *args.sparse] if args.sparse is not None else []
    words += ["--context", str(args.context)] if args.context else []
    words += ["--device", subject.identity["device"], "--dtype", subject.identity["dtype"]]
    words += ["--threads", str(torch.get_num_threads())]
    if PARTS[part].reads_texts:
        words += ["--text", *(path.name for path in args.text)]
    for setting, value in settings_of(args, part).items():
        words += [f"--{setting}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def plan_parts(args: argparse.Namespace, subject: Subject, texts: list[Text]) -> dict[str, Plan]:
    """Everything that will run, so that wrong input shows before the first hour.

    Raises:
        ValueError: a checkpoint without sparse attention that is to be measured with it, or what a part raises.
    """
    is_sparse = "sparse-dense" in args.parts or "sparse" in getattr(args, "modes", [])
    if is_sparse and subject.sparse_config is None:
        raise ValueError(
            f"{subject.name!r} has no sparse attention (its `sparse_config` is null): give settings with `--sparse`, "
            "or run `bits-per-byte` and `needle` with `--modes dense`."
        )
    return {part: PARTS[part].plan(subject, texts, **settings_of(args, part)) for part in args.parts}


def run_parts(args: argparse.Namespace) -> dict:
    """Measure what the arguments name, print the tables and give the record.

    Raises:
        ValueError, OSError: wrong input.
    """
    texts = read_texts(args.text)
    with quiet():
        subject = load_subject(
            args.model, sparse=args.sparse, device=args.device, dtype=args.dtype, context=args.context
        )
        record = resume_record(args.output, begin_record(subject, texts))
        journal = Journal(args.output and args.output.with_suffix(".jsonl"), owner_of(record))
        plans = plan_parts(args, subject, texts)
        for part, plan in plans.items():
            figures = run_plan(part, plan, journal)
            used = texts if PARTS[part].reads_texts else []
            command = spell_command(args, part, subject)
            record = add_part(record, part, command, settings_of(args, part), used, figures)
            if args.output:
                write_record(args.output, record)
            print(f"\n{part}: {PARTS[part].summary}\n{PARTS[part].describe(figures)}", flush=True)
    return record


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)

    def measure() -> None:
        check_arguments(args)
        if args.command == "heatmap":
            write_heatmap(args.output, read_record(args.record, NEEDLE_BENCHMARKS))
        else:
            print(json.dumps(run_parts(args), allow_nan=False))

    return run_command(measure, threads=getattr(args, "threads", None))


if __name__ == "__main__":
    sys.exit(main())
