"""Run MiniCPM4 models: long texts with InfLLM v2 sparse attention, on any device.

minicpm4 demo
minicpm4 generate --prompt-file book.txt --max-new-tokens 200
minicpm4 serve --model ./MiniCPM4-8B --sparse --port 8000
"""

import argparse
import os
import sys

from . import chat, convert, demo, generate, info, serve, sft, train

COMMANDS = {
    "demo": demo,
    "generate": generate,
    "chat": chat,
    "serve": serve,
    "train": train,
    "sft": sft,
    "convert": convert,
    "info": info,
}


class _Version(argparse.Action):
    """`--version`, looked up only when asked for."""

    def __call__(self, parser, namespace, values, option_string=None):
        from importlib.metadata import version

        print(f"minicpm4-hf {version('minicpm4-hf')}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; neither torch nor transformers is imported for it."""
    parser = argparse.ArgumentParser(prog="minicpm4", **_help(__doc__))
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.__doc__.partition("\n")[0], **_help(module.__doc__))
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _help(docstring: str) -> dict:
    description, _, examples = docstring.strip().partition("\n\n")
    return {
        "description": description,
        "epilog": "examples:\n" + "\n".join(f"  {line}" for line in examples.splitlines()),
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,
    }


def main(argv: list[str] | None = None) -> int:
    """Run one command; what the user can put right is one sentence on stderr and exit code 2."""
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; without this Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        print(f"minicpm4: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
