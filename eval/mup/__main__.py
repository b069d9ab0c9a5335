"""Show what muP does, by training small models of several widths on a CPU.

    python -m minicpm4_hf.eval.mup coordinates --books books --output mup-coordinates.json
    python -m minicpm4_hf.eval.mup learning-rates --books books --output mup-learning-rates.json --max-seconds 240
    python -m minicpm4_hf.eval.mup plot mup-learning-rates.json --output mup-learning-rates.svg

`coordinates` measures how large the activations of each kind of layer are, by width, over the first steps.
`learning-rates` finds the best learning rate at each width. Both train muP and the standard parametrisation side by
side and write one JSON record, which is whole after every training run: the same command goes on from it. `--books`
holds one text file a book, `*.txt`; the validation books of the shipped checkpoint are left out. `plot` needs
matplotlib.

The exit code is 0, 3 when --max-seconds ended a sweep before its last run, or 2 with one sentence on stderr when the
input is wrong.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch

from minicpm4_cli.loading import positive_int
from minicpm4_hf.kernels.bench.__main__ import write_atomically

from . import coordinates, learning_rates
from .experiment import PARAMETRIZATIONS, Settings, read_corpus
from .figures import plot_record
from .records import begin_record, read_record, resume_record, run_cells

EXPERIMENTS = {"coordinates": coordinates, "learning-rates": learning_rates}
SUMMARIES = {
    "coordinates": "size of the activations of each kind of layer, by width, over the first steps",
    "learning-rates": "the best learning rate at each width",
}


def count(text: str) -> int:
    """argparse type of a number that may be 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def positive_float(text: str) -> float:
    """argparse type of a learning rate or of a time."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number greater than 0, got {text}")
    return value


# Setting -> how it is read; the flags are the settings' names.
FLAGS = {
    "parametrizations": {"nargs": "+", "choices": PARAMETRIZATIONS},
    "widths": {"type": positive_int, "nargs": "+", "metavar": "N", "help": "hidden sizes"},
    "learning_rates": {"type": positive_float, "nargs": "+", "metavar": "X", "help": "peak rates"},
    "seeds": {"type": count, "nargs": "+", "metavar": "N", "help": "of initial weights and of batches"},
    "steps": {"type": positive_int, "metavar": "N", "help": "optimizer steps"},
    "num_warmup_steps": {"type": count, "metavar": "N"},
    "num_decay_steps": {"type": count, "metavar": "N", "help": "the last steps, exponential decay"},
    "floor_share": {"type": float, "metavar": "X", "help": "of the peak rate, where warm-up begins and decay ends"},
    "num_hidden_layers": {"type": positive_int, "metavar": "N"},
    "head_dim": {"type": positive_int, "metavar": "N"},
    "length": {"type": positive_int, "metavar": "N", "help": "bytes a sequence"},
    "batch": {"type": positive_int, "metavar": "N", "help": "sequences a step"},
    "dtype": {"choices": ("float32", "bfloat16"), "help": "of matrix products; weights are float32"},
    "threads": {"type": positive_int, "metavar": "N"},
}
SHARED = {
    "parametrizations": PARAMETRIZATIONS,
    "num_hidden_layers": 2,
    "head_dim": 64,
    "length": 128,
    "threads": torch.get_num_threads(),
}
# No warm-up in the coordinate check, whose steps are the first ones; float32, as rounding is no matter of width. The
# sweep's rates are MiniCPM's 0.01 (arXiv:2404.06395), twice it, and down to a sixteenth: with so few steps and such
# small batches the best are below it.
DEFAULTS = {
    "coordinates": {
        **SHARED,
        "widths": (128, 256, 512, 1024),
        "learning_rates": (0.01,),
        "seeds": (0, 1, 2),
        "steps": 10,
        "num_warmup_steps": 0,
        "num_decay_steps": 0,
        "floor_share": 0.0,
        "batch": 8,
        "dtype": "float32",
    },
    "learning-rates": {
        **SHARED,
        "widths": (128, 512),
        "learning_rates": (0.000625, 0.00125, 0.0025, 0.005, 0.01, 0.02),
        "seeds": (0, 1),
        "steps": 100,
        "num_warmup_steps": 10,
        "num_decay_steps": 20,
        "floor_share": 0.05,
        "batch": 16,
        "dtype": "bfloat16",
    },
}


def build_parser() -> argparse.ArgumentParser:
    """The command line, a subcommand an experiment and one for the figures."""
    summary, _, details = __doc__.partition("\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m minicpm4_hf.eval.mup", description=summary, epilog=details, formatter_class=formatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, defaults in DEFAULTS.items():
        command = commands.add_parser(name, help=SUMMARIES[name], description=SUMMARIES[name])
        command.add_argument("--books", type=Path, required=True, metavar="FOLDER", help="one *.txt file a book")
        command.add_argument("--output", type=Path, required=True, metavar="RECORD.json", help="also resumed from")
        command.add_argument(
            "--max-seconds", type=positive_float, metavar="X", help="start no training run after so many seconds"
        )
        for setting, options in FLAGS.items():
            default = defaults[setting]
            shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
            text = f"{options.get('help', setting.replace('_', ' '))} (default: {shown})"
            command.add_argument(f"--{setting.replace('_', '-')}", **{**options, "default": default, "help": text})
    plot = commands.add_parser("plot", help="the figure of a record, as SVG", description="The figure of a record.")
    plot.add_argument("record", type=Path, metavar="RECORD.json")
    plot.add_argument("--output", type=Path, required=True, metavar="FIGURE.svg")
    return parser


def read_settings(args: argparse.Namespace) -> Settings:
    """The settings that the flags give.

    Raises:
        ValueError: values that do not fit together.
    """
    values = {name: getattr(args, name) for name in FLAGS}
    return Settings(
        experiment=args.command,
        **{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()},
    )


def spell_command(args: argparse.Namespace, settings: Settings) -> str:
    """The command with every setting in it, of the paths the last part."""
    words = ["python", "-m", "minicpm4_hf.eval.mup", args.command]
    words += ["--books", args.books.resolve().name, "--output", args.output.name]
    for name in FLAGS:
        value = getattr(settings, name)
        words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def run_sweep(args: argparse.Namespace) -> int:
    """Run or go on with the sweep that the arguments name; 0 when its record is complete, else 3.

    Raises:
        ValueError, OSError: wrong input.
    """
    settings = read_settings(args)
    corpus = read_corpus(args.books, settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        record = resume_record(args.output, begin_record(settings, corpus, spell_command(args, settings)))
        experiment = EXPERIMENTS[args.command]
        complete = run_cells(
            settings, corpus, record, args.output, experiment.run_cell, experiment.summarize, args.max_seconds
        )
    finally:
        torch.set_num_threads(threads)
    if not complete:
        print(f"{len(record['cells'])} of {len(list(settings.cells()))} runs done: give the same command again")
        return 3
    print(experiment.describe(record["summary"]))
    return 0


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        if not args.output.parent.is_dir():
            raise ValueError(f"The folder of {str(args.output)!r} does not exist.")
        if args.command == "plot":
            write_atomically(args.output, plot_record(read_record(args.record)))
            return 0
        return run_sweep(args)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the runs that were finished are in the record", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
