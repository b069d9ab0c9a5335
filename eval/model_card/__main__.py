"""Fill model cards from committed records, so that no figure in them is typed by hand.

    python -m minicpm4_hf.eval.model_card

run in the repository's root, rewrites the card in `model_cards` of each checkpoint that the package ships, from its
template and its records; the copy that ships beside the weights; the figures; and the block of figures in README.md.
Records are the JSON files in `model_cards/records/NAME`, and `eval/results/WHAT-NAME.json` under the name WHAT. A
template is ordinary Markdown with `{record[key][key]:format}` fields, `record` being a record's name, and what
`template_fields` adds; `{NAME[record]}`, with underscores for hyphens, is what the card of NAME could say. Needs
matplotlib.

The exit code is 0, or 2 with one sentence on stderr when a record, a template or matplotlib is missing.
"""

import argparse
import json
import sys
from pathlib import Path

from minicpm4_hf.eval.memory.heatmap import plot_heatmap
from minicpm4_hf.kernels.bench.__main__ import write_atomically
from minicpm4_hf.shipped import SHIPPED

from .figures import benchmark_table, plot_training, ruler_table, stage_table
from .targets import needle_shares, target_table

CARDS, RESULTS, CHECKPOINTS = Path("model_cards"), Path("eval/results"), Path("src/minicpm4_hf/checkpoints")
CURVE, NEEDLE = CARDS / "minicpm4-books-training.svg", CARDS / "minicpm4-books-needle.svg"
README, README_TEMPLATE = Path("README.md"), CARDS / "readme-figures.template.md"
_BEGIN, _END = "<!-- figures: written by minicpm4_hf.eval.model_card -->", "<!-- end of figures -->"


def read_records(root: Path, name: str) -> dict:
    """Every JSON record of a checkpoint: its folder's by their names, and `eval/results/WHAT-NAME.json` as WHAT."""
    paths = [*(root / CARDS / "records" / name).glob("*.json"), *(root / RESULTS).glob(f"*-{name}.json")]
    stems = {path.stem.removesuffix(f"-{name}").replace("-", "_"): path for path in sorted(paths)}
    return {stem: json.loads(path.read_text(encoding="utf-8")) for stem, path in stems.items()}


def template_fields(records: dict) -> dict:
    """What a template can ask for besides the records: their lists by name, and tables.

    Returns:
        `bits`: bits per byte by book and attention; `long`: the rows of sparse against dense attention by context,
        as `8k`; `needle`: right answers as a share, by length in the same way and attention; `held_out`: of each
        training record, bits per byte after each stage; and Markdown: `stage_table`, and with the records that they
        need `target_table`, `benchmarks_table` and `ruler_table`.
    """
    parts = records["memory"]["parts"]
    bits = {}
    for row in parts["bits-per-byte"]["rows"]:
        bits.setdefault(row["text"].removesuffix(".txt"), {})[row["mode"]] = row["bits_per_byte"]
    fields = {
        "bits": bits,
        "long": {f"{row['context'] >> 10}k": row for row in parts["sparse-dense"]["rows"]},
        "needle": {f"{length >> 10}k": shares for length, shares in needle_shares(records["memory"]).items()},
        "held_out": {
            name: {stage["name"]: stage["held_out_bits_per_byte"] for stage in record["stages"]}
            for name, record in records.items()
            if record.get("benchmark") == "training"
        },
        "stage_table": stage_table(records["training"]),
    }
    if "compressors" in records:
        fields["target_table"] = target_table(records)
    for kind, make_table in (("benchmarks", benchmark_table), ("ruler", ruler_table)):
        found = [record for record in records.values() if record.get("benchmark") == kind]
        if found:
            fields[f"{kind}_table"] = make_table(found)
    return fields


def all_fields(root: Path) -> dict[str, dict]:
    """What the card of each shipped checkpoint can say, by its name: its records, and what is made of them."""
    fields = {}
    for name in SHIPPED:
        records = read_records(root, name)
        files = [path for path in (root / CHECKPOINTS / name).iterdir() if path.name != "README.md"]
        fields[name] = {**records, **template_fields(records), "megabytes": sum(f.stat().st_size for f in files) / 1e6}
    return fields


def fill_template(template: str, fields: dict) -> str:
    """The template with its fields replaced.

    Raises:
        ValueError: a field that no record has.
    """
    try:
        return template.format(**fields)
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
    fields, texts = all_fields(root), {}
    named = {name.replace("-", "_"): found for name, found in fields.items()}
    for name in SHIPPED:
        template = (root / CARDS / f"{name}.template.md").read_text(encoding="utf-8")
        card = fill_template(template, {**named, **fields[name]})
        texts[CARDS / f"{name}.md"] = card
        # Beside the weights there are no figures to show.
        alone = "".join(line for line in card.splitlines(keepends=True) if not line.startswith("!["))
        texts[CHECKPOINTS / name / "README.md"] = alone
    figures = fill_template((root / README_TEMPLATE).read_text(encoding="utf-8"), {**named, **fields[SHIPPED[0]]})
    texts[README] = replace_figures((root / README).read_text(encoding="utf-8"), figures)
    return texts


def draw(root: Path) -> dict[Path, str]:
    """Every figure, SVG text, by its path under `root`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    records = read_records(root, SHIPPED[0])
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
