"""Show what each choice of MiniCPM4's training changes in the loss, by undoing one at a time on a small model.

    python -m minicpm4_hf.eval.ablation run --books books --work ablation --output ablation.json
    python -m minicpm4_hf.eval.ablation run --books books --work ablation --output ablation.json --only cosine
    python -m minicpm4_hf.eval.ablation plot ablation.json ablation.svg

`run` trains a baseline (muP, WSD, a sparse long stage, no multi-token prediction) and four runs that differ from it in
one choice each, with the same tokens, and compares their losses on two books that none of them saw. `--books` holds
one text file a book, `*.txt`, dracula.txt and emma.txt among them, which are held out. Each run stays in `--work`: one
that is finished is not trained again, and one that was cut off goes on when the same command is given again. The
record holds all runs of `--work` with these settings, whatever `--only` says. A run takes two to three minutes on two
CPU cores. Training and `plot` need matplotlib.

The exit code is 0, or 2 with one sentence on stderr when the input is wrong.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from minicpm4_cli.loading import positive_int
from minicpm4_hf.kernels.bench.__main__ import write_atomically

from .experiment import BASELINE, RECIPE, VARIANTS
from .figures import plot_record
from .runs import read_json, run_all
from .summary import describe, summarize

BENCHMARK = "training-ablation"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, details = __doc__.partition("\n")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m minicpm4_hf.eval.ablation", description=summary, epilog=details, formatter_class=formatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    says = "".join(f"\n  {name:<10}{variant.says}" for name, variant in VARIANTS.items())
    run = commands.add_parser(
        "run", help="train and compare", description=f"Train and compare the runs:\n{says}", formatter_class=formatter
    )
    run.add_argument("--books", type=Path, required=True, metavar="FOLDER", help="one *.txt file a book")
    run.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="of the runs; also gone on from")
    run.add_argument("--output", type=Path, required=True, metavar="RECORD.json", help="made of all finished runs")
    run.add_argument("--only", nargs="+", choices=VARIANTS, metavar="NAME", help="train these alone (default: all)")
    run.add_argument(
        "--seeds", type=positive_int, default=1, metavar="N", help="train seeds 0 to N - 1 (default: %(default)s)"
    )
    run.add_argument(
        "--rows", type=positive_int, default=48, metavar="N", help="held-out rows that are read (default: %(default)s)"
    )
    run.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help=f"a setting of every run's recipe, in place of {RECIPE}'s and of {', '.join(BASELINE)}; may be repeated",
    )
    run.add_argument("--json", action="store_true", help="print the record as one JSON document, not a table")
    plot = commands.add_parser("plot", help="the figure of a record, as SVG", description="The figure of a record.")
    plot.add_argument("record", type=Path, metavar="RECORD.json")
    plot.add_argument("output", type=Path, metavar="FIGURE.svg")
    return parser


def spell_command(args: argparse.Namespace) -> str:
    """The command that makes the whole record, of the paths the last part."""
    words = ["python", "-m", "minicpm4_hf.eval.ablation", "run", "--books", args.books.resolve().name]
    words += ["--work", args.work.resolve().name, "--output", args.output.name]
    words += ["--seeds", str(args.seeds), "--rows", str(args.rows)]
    for setting in args.set:
        words += ["--set", setting]
    return shlex.join(words)


def run(args: argparse.Namespace) -> dict:
    """Train what is not finished, and write the record of all that is.

    Raises:
        ValueError, OSError, ImportError: wrong input, a run that cannot go on, or matplotlib is missing.
    """
    names = args.only or list(VARIANTS)
    books, held_out, runs = run_all(names, args.seeds, args.books, args.work, args.set, args.rows)
    record = {
        "benchmark": BENCHMARK,
        "command": spell_command(args),
        "settings": {"baseline": list(BASELINE), "set": args.set},
        "books": books,
        "held_out": held_out,
        "runs": runs,
        "summary": summarize(runs, held_out),
    }
    write_atomically(args.output, json.dumps(record, allow_nan=False) + "\n")
    return record


def read_record(path: Path) -> dict:
    """A record of this package.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read.
    """
    record = read_json(path)
    if not isinstance(record, dict) or record.get("benchmark") != BENCHMARK:
        raise ValueError(f"{str(path)!r} is not a record of `python -m minicpm4_hf.eval.ablation`.")
    return record


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        if not args.output.parent.is_dir():
            raise ValueError(f"The folder of {str(args.output)!r} does not exist.")
        if args.command == "plot":
            write_atomically(args.output, plot_record(read_record(args.record)))
            return 0
        record = run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; give the same command to go on", file=sys.stderr)
        return 130
    print(json.dumps(record, allow_nan=False) if args.json else describe(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
