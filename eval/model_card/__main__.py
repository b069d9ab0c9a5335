"""Fill a model card from committed records, so that no figure in it is typed by hand.

    python -m minicpm4_hf.eval.model_card

run in the repository's root, rewrites `model_cards/minicpm4-books.md` from its template and the JSON files in
`model_cards/records/minicpm4-books`, the copy that ships beside the weights, the two figures, and the block of figures
in README.md. A template is ordinary Markdown with `{record[key][key]:format}` fields, `record` being a JSON file's
name, and what `template_fields` adds to the records. Needs matplotlib.

The exit code is 0, or 2 with one sentence on stderr when a record, a template or matplotlib is missing.
"""

import argparse
import json
import sys
from pathlib import Path

from minicpm4_hf.eval.memory.heatmap import plot_heatmap
from minicpm4_hf.kernels.bench.__main__ import write_atomically

from .figures import plot_training, stage_table
from .targets import needle_shares, target_table

CARD = Path("model_cards/minicpm4-books.md")
TEMPLATE = Path("model_cards/minicpm4-books.template.md")
RECORDS = Path("model_cards/records/minicpm4-books")
CURVE, NEEDLE = Path("model_cards/minicpm4-books-training.svg"), Path("model_cards/minicpm4-books-needle.svg")
SHIPPED_CARD = Path("src/minicpm4_hf/checkpoints/minicpm4-books/README.md")
README, README_TEMPLATE = Path("README.md"), Path("model_cards/readme-figures.template.md")
_BEGIN, _END = "<!-- figures: written by minicpm4_hf.eval.model_card -->", "<!-- end of figures -->"


def read_records(folder: Path) -> dict:
    """Every JSON file of a folder by its name without suffix."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def template_fields(records: dict) -> dict:
    """What a template can ask for besides the records: their lists by name, and tables.

    Returns:
        `bits`: bits per byte by book and attention; `long`: the rows of sparse against dense attention by context,
        as `8k`; `needle`: right answers as a share, by length in the same way and attention; `held_out`: of each
        training record, bits per byte after each stage; `target_table`, `stage_table`: Markdown.
    """
    parts = records["memory"]["parts"]
    bits = {}
    for row in parts["bits-per-byte"]["rows"]:
        bits.setdefault(row["text"].removesuffix(".txt"), {})[row["mode"]] = row["bits_per_byte"]
    return {
        "bits": bits,
        "long": {f"{row['context'] >> 10}k": row for row in parts["sparse-dense"]["rows"]},
        "needle": {f"{length >> 10}k": shares for length, shares in needle_shares(records["memory"]).items()},
        "held_out": {
            name: {stage["name"]: stage["held_out_bits_per_byte"] for stage in record["stages"]}
            for name, record in records.items()
            if record.get("benchmark") == "training"
        },
        "target_table": target_table(records),
        "stage_table": stage_table(records["training"]),
    }


def fill_template(template: str, records: dict) -> str:
    """The template with its fields replaced.

    Raises:
        ValueError: a field that no record has.
    """
    try:
        return template.format(**records, **template_fields(records))
    except (KeyError, IndexError) as error:
        raise ValueError(f"The template asks for {error}, which is in no record; measure it first.") from error


def replace_figures(text: str, figures: str) -> str:
    """`text` with what is between the two markers replaced.

    Raises:
        ValueError: the markers are not there.
    """
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"README.md must hold the markers {_BEGIN!r} and {_END!r}.")
    return f"{before}{_BEGIN}\n{figures.strip()}\n{_END}{after}"


def render(root: Path) -> dict[Path, str]:
    """Every Markdown text that the records decide, by its path under `root`."""
    records = read_records(root / RECORDS)
    card = fill_template((root / TEMPLATE).read_text(encoding="utf-8"), records)
    figures = fill_template((root / README_TEMPLATE).read_text(encoding="utf-8"), records)
    readme = replace_figures((root / README).read_text(encoding="utf-8"), figures)
    # Beside the weights there are no figures to show.
    alone = "".join(line for line in card.splitlines(keepends=True) if not line.startswith("!["))
    return {CARD: card, SHIPPED_CARD: alone, README: readme}


def draw(root: Path) -> dict[Path, str]:
    """Every figure, SVG text, by its path under `root`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    records = read_records(root / RECORDS)
    return {CURVE: plot_training(records["training"]), NEEDLE: plot_heatmap(records["memory"])}


def main(argv: list[str] | None = None) -> int:
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m minicpm4_hf.eval.model_card",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--root", type=Path, default=Path("."), help="the repository (default: the current folder)")
    args = parser.parse_args(argv)
    try:
        texts = {**render(args.root), **draw(args.root)}
        for path, text in texts.items():
            write_atomically(args.root / path, text)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
