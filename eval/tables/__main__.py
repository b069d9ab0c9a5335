"""The paper's tables and figures with what was measured beside each value, and the difference.

    python -m minicpm4_hf.eval tables
    python -m minicpm4_hf.eval tables --table table-5 figure-1 --output tables.md
    python -m minicpm4_hf.eval tables --results runs/ --json
    python -m minicpm4_hf.eval tables --estimates

Measured values come from the JSON records in --results alone (default: eval/results of this package), a record's file
name being its run's id; where several runs measured a cell, the newest counts. A cell that was never measured stays
empty. --estimates prints what reproducing the tables takes in hours and memory on one GPU.

The exit code is 0, or 2 with one sentence on stderr when the input is wrong.
"""

import argparse
import json
import sys
from pathlib import Path

from minicpm4_hf.kernels.bench.__main__ import write_atomically

from .estimates import render_estimates
from .measured import RESULTS, find_measurements, read_runs
from .paper import PaperTable, read_paper
from .render import build_document, render_markdown


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m minicpm4_hf.eval tables",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--table", nargs="+", metavar="ID", help="only these (default: all)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="of the records")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON document in place of Markdown")
    form.add_argument("--estimates", action="store_true", help="hours and memory that the tables take")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write to this file")
    return parser


def choose_tables(tables: list[PaperTable], asked: list[str] | None) -> list[PaperTable]:
    """Those that are asked for, in the paper's order.

    Raises:
        ValueError: there is none of that name.
    """
    for name in asked or ():
        if name not in [table.id for table in tables]:
            raise ValueError(f"There is no table {name!r}; there are {', '.join(table.id for table in tables)}.")
    return [table for table in tables if asked is None or table.id in asked]


def run_tables(args: argparse.Namespace) -> str:
    """The text that the arguments ask for.

    Raises:
        ValueError, OSError: wrong input.
    """
    if args.estimates:
        return render_estimates() + "\n"
    tables = read_paper()
    chosen = choose_tables(tables, args.table)
    runs = read_runs(args.results)
    measured, others = find_measurements(runs, tables)
    document = build_document(chosen, measured, runs, [] if args.table else others)
    if not any(table.id == "figure-1" for table in chosen):
        document["ratios"] = []
    return json.dumps(document, ensure_ascii=False) + "\n" if args.json else render_markdown(document, chosen)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        if args.output and not args.output.parent.is_dir():
            raise ValueError(f"The folder of {str(args.output)!r} does not exist.")
        text = run_tables(args)
        if args.output:
            write_atomically(args.output, text)
        else:
            sys.stdout.write(text)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
