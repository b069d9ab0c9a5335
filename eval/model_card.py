"""Fill a model card from committed records, so that no figure in it is typed by hand.

    python -m minicpm4_hf.eval.model_card

run in the repository's root, rewrites `model_cards/minicpm4-books.md` from its template and the JSON files in
`model_cards/records/minicpm4-books`, the copy that ships beside the weights, the plot of the training, and the
block of figures in README.md. A template is ordinary Markdown with `{record[key][key]:format}` fields, `record`
being a JSON file's name.
"""

import argparse
import json
import sys
from pathlib import Path

CARD = Path("model_cards/minicpm4-books.md")
TEMPLATE = Path("model_cards/minicpm4-books.template.md")
RECORDS = Path("model_cards/records/minicpm4-books")
CURVE = Path("model_cards/minicpm4-books-curve.svg")
SHIPPED_CARD = Path("src/minicpm4_hf/checkpoints/minicpm4-books/README.md")
README, README_TEMPLATE = Path("README.md"), Path("model_cards/readme-figures.template.md")
_BEGIN, _END = "<!-- figures: written by minicpm4_hf.eval.model_card -->", "<!-- end of figures -->"


def read_records(folder: Path) -> dict:
    """Every JSON file of a folder by its name without suffix."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def fill_template(template: str, records: dict) -> str:
    """The template with its fields replaced.

    Raises:
        ValueError: a field that no record has.
    """
    try:
        return template.format(**records, curve_table=curve_table(records["training"]["curve"]))
    except (KeyError, IndexError) as error:
        raise ValueError(f"The template asks for {error}, which is in no record; measure it first.") from error


def curve_table(curve: list[dict]) -> str:
    """The training curve as a Markdown table, one row an evaluation."""
    books = list(curve[0]["excerpt_bits_per_byte"])
    lines = [
        "| step | tokens | learning rate | training loss (nats) | "
        + " | ".join(f"{b}, bits/byte" for b in books)
        + " |",
        "|---|---|---|---|" + "---|" * len(books),
    ]
    for row in curve:
        bits = " | ".join(f"{row['excerpt_bits_per_byte'][book]:.3f}" for book in books)
        lines.append(f"| {row['step']} | {row['tokens']:,} | {row['lr']:.2g} | {row['loss']:.3f} | {bits} |")
    return "\n".join(lines)


def plot_curve(curve: list[dict], path: Path) -> None:
    """Bits per byte on the validation excerpts against training tokens, as an SVG."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "minicpm4-books", "font.size": 9})  # the same file each time
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    tokens = [row["tokens"] / 1e6 for row in curve]
    for book in curve[0]["excerpt_bits_per_byte"]:
        axis.plot(tokens, [row["excerpt_bits_per_byte"][book] for row in curve], marker=".", label=book)
    axis.set(xlabel="training tokens (millions)", ylabel="bits per byte", title="Validation excerpts, dense attention")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, metadata={"Date": None})


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
    """Every text that the records decide, by its path under `root`."""
    records = read_records(root / RECORDS)
    card = fill_template((root / TEMPLATE).read_text(encoding="utf-8"), records)
    figures = fill_template((root / README_TEMPLATE).read_text(encoding="utf-8"), records)
    readme = replace_figures((root / README).read_text(encoding="utf-8"), figures)
    return {CARD: card, SHIPPED_CARD: card, README: readme}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m minicpm4_hf.eval.model_card", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--root", type=Path, default=Path("."), help="the repository (default: the current folder)")
    args = parser.parse_args(argv)
    try:
        texts = render(args.root)
        plot_curve(read_records(args.root / RECORDS)["training"]["curve"], args.root / CURVE)
    except (ValueError, OSError, KeyError) as error:
        print(f"model_card: {error}", file=sys.stderr)
        return 2
    for path, text in texts.items():
        (args.root / path).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
