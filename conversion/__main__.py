"""Convert checkpoints between the layouts of a MiniCPM4 checkpoint.

    python -m minicpm4_hf.conversion to-hf MiniCPM4-8B MiniCPM4-8B-hf
    python -m minicpm4_hf.conversion to-official MiniCPM4-8B-hf MiniCPM4-8B-official
    python -m minicpm4_hf.conversion to-hf MiniCPM4-8B MiniCPM4-8B-hf --json > result.json

The exit code is 0, or 2 with one sentence on stderr when the input cannot be converted; OUT is then not there.
"""

import argparse
import json
import signal
import sys

from .hf import convert_to_hf, convert_to_official

# Subcommand -> (function, help).
COMMANDS = {
    "to-hf": (convert_to_hf, "official layout -> minicpm4 layout, with remote code"),
    "to-official": (convert_to_official, "minicpm4 layout -> official layout (model type minicpm)"),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m minicpm4_hf.conversion",
        description=__doc__.partition("\n")[0],
        epilog=__doc__.partition("\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, description) in COMMANDS.items():
        command = subparsers.add_parser(name, help=description, description=description)
        command.add_argument("source", metavar="IN", help="folder with config.json and safetensors weights")
        command.add_argument("output", metavar="OUT", help="folder to create; must not exist")
        command.add_argument("--json", action="store_true", help="print the result as one JSON document")
    arguments = parser.parse_args(argv)
    function, _ = COMMANDS[arguments.command]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # lets the half-made folder be removed
    try:
        result = function(arguments.source, arguments.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{result['output']}: {len(result['files'])} files, {result['num_bytes'] / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
