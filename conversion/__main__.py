"""Convert checkpoints between the formats that MiniCPM4 is used in.

    python -m minicpm4_hf.conversion ternary BitCPM4-1B BitCPM4-1B-packed
    python -m minicpm4_hf.conversion to-hf MiniCPM4-8B MiniCPM4-8B-hf --json > result.json
    python -m minicpm4_hf.conversion legacy MiniCPM4-8B-hf MiniCPM4-8B-official --dry-run

The exit code is 0, or 2 with one sentence on stderr when the input cannot be converted; OUT is then not there.
"""

import argparse
import importlib
import json
import signal
import sys

from minicpm4_cli.convert import CONVERSIONS

from .output import in_words


def build_parser(prog: str, command: str | None) -> argparse.ArgumentParser:
    """The parser; only the module of `command` is imported, for its settings."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=__doc__.partition("\n")[0],
        epilog=__doc__.partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, description) in CONVERSIONS.items():
        subparser = subparsers.add_parser(name, help=description, description=description)
        if name != command:
            continue
        subparser.add_argument("source", metavar="IN", help="what is converted, a checkpoint's folder in most cases")
        subparser.add_argument("output", metavar="OUT", help="what to create; must not exist")
        subparser.add_argument("--dry-run", action="store_true", help="check IN and say the sizes, but write nothing")
        subparser.add_argument("--json", action="store_true", help="print the result as one JSON document")
        _load(module).add_arguments(subparser)
    return parser


def _load(module: str):
    """The module of a conversion, which has `add_arguments(parser)` and `run(args) -> dict`."""
    name = f"{__package__}.{module}"
    if importlib.util.find_spec(name) is None:
        raise ImportError(f"This installation of minicpm4-hf lacks the conversion {name}; reinstall the package.")
    return importlib.import_module(name)


def main(argv: list[str] | None = None, prog: str = "python -m minicpm4_hf.conversion") -> int:
    argv = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # lets the half-made folder be removed
    try:
        args = build_parser(prog, argv[0] if argv else None).parse_args(argv)
        result = _load(CONVERSIONS[args.command][0]).run(args)
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        summary = f"{result['output']}: {len(result['files'])} files, {in_words(result['num_bytes'])}"
        print(result.get("summary", summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
