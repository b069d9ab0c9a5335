"""Measure what general compressors need for a text, in bits per byte: the yardsticks of a small language model.

    python -m minicpm4_hf.eval.compressors dracula.txt emma.txt --output compressors.json

Prints a table and, with --output, writes a JSON record. The compressors are bzip2 -9 and xz -9e, from Python's
standard library, and PPMd (variant H, as 7-Zip's, order 16, 256 MB), from the package pyppmd. Each reads the whole
text and knows nothing before it; headers count.

The exit code is 0, or 2 with one sentence on stderr when the input is wrong.
"""

import argparse
import bz2
import hashlib
import json
import lzma
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from minicpm4_hf.eval.tasks.perplexity import read_text
from minicpm4_hf.kernels.bench.__main__ import write_atomically

BENCHMARK = "compressors"
PPMD_ORDER, PPMD_BYTES = 16, 256 << 20


def compress_ppmd(text: bytes) -> bytes:
    """The text as PPMd compresses it, without a container.

    Raises:
        ImportError: pyppmd is not installed.
    """
    try:
        import pyppmd
    except ImportError as error:
        raise ImportError("PPMd needs pyppmd: `pip install minicpm4-hf[eval]`, or `pip install pyppmd`.") from error
    encoder = pyppmd.Ppmd7Encoder(PPMD_ORDER, PPMD_BYTES)
    return encoder.encode(text) + encoder.flush()


# Name -> (what it is, bytes to bytes).
COMPRESSORS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "bzip2": ("bzip2 -9", lambda text: bz2.compress(text, 9)),
    "xz": ("xz -9e", lambda text: lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)),
    "ppmd": (f"PPMd variant H, order {PPMD_ORDER}, {PPMD_BYTES >> 20} MB", compress_ppmd),
}


def bits_per_byte(text: bytes, name: str) -> float:
    """Compressed bits over the bytes of the text.

    Raises:
        ImportError: the compressor is not installed.
    """
    return 8 * len(COMPRESSORS[name][1](text)) / len(text)


def measure(paths: list[Path]) -> dict:
    """The record: for each compressor what it is, and bits per byte by the texts' names without suffix.

    Raises:
        ValueError: two texts of a name, or an empty one.
        ImportError, OSError: a compressor or a text is not there.
    """
    texts = {path.stem: read_text(path) for path in paths}
    if len(texts) < len(paths):
        raise ValueError(f"Each text must have a name of its own, got {' '.join(path.name for path in paths)}.")
    return {
        "benchmark": BENCHMARK,
        "command": f"python -m minicpm4_hf.eval.compressors {' '.join(path.name for path in paths)}",
        "versions": {"python": sys.version.split()[0], "pyppmd": version("pyppmd")},
        "texts": {
            name: {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()} for name, text in texts.items()
        },
        "compressors": {
            name: {
                "settings": settings,
                "bits_per_byte": {text_name: bits_per_byte(text, name) for text_name, text in texts.items()},
            }
            for name, (settings, _) in COMPRESSORS.items()
        },
    }


def report(record: dict) -> str:
    """The record as a Markdown table, a row a compressor."""
    lines = ["| bits per byte | " + " | ".join(record["texts"]) + " |", "|---|" + "---|" * len(record["texts"])]
    for entry in record["compressors"].values():
        lines.append(
            f"| {entry['settings']} | " + " | ".join(f"{x:.3f}" for x in entry["bits_per_byte"].values()) + " |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m minicpm4_hf.eval.compressors",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("texts", type=Path, nargs="+", metavar="TEXT", help="UTF-8 files")
    parser.add_argument("--output", type=Path, metavar="RECORD.json", help="write the record here")
    args = parser.parse_args(argv)
    try:
        compress_ppmd(b" ")  # so that a missing package shows before the first text
        record = measure(args.texts)
        if args.output:
            write_atomically(args.output, json.dumps(record, indent=1) + "\n")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
