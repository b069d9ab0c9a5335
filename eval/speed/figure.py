"""Draw a record of `speed` as grouped bars, as figure 1 of the MiniCPM4 report (arXiv:2506.07900) does.

    python -m minicpm4_hf.eval speed-figure eval/results/speed-cpu-qwen3.json --output speed.png
    python -m minicpm4_hf.eval speed-figure speed.json --contestants ours-sparse qwen3-0.6b --output speed.svg

A group a context, a bar a model, its tokens a second above it; on a logarithmic axis where they differ a hundredfold.
The same record gives the same file. Needs matplotlib.

The exit code is 0, or 2 with one sentence on stderr when the input is wrong.
"""

import argparse
import io
import json
import os
import sys
from pathlib import Path

PANELS = {"prompt": ("prefill", "prompt tokens"), "decode": ("decode", "tokens in the cache")}
SUFFIXES = (".png", ".svg")
LOGARITHMIC_FROM = 100  # the greatest speed over the smallest
PNG_DPI = 200
GROUP_WIDTH = 0.8  # of a group's bars, where groups are 1 apart


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m minicpm4_hf.eval speed-figure",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("record", type=Path, metavar="RECORD.json")
    parser.add_argument("--contestants", nargs="+", metavar="NAME", help="in this order (default: all)")
    parser.add_argument("--output", type=Path, required=True, metavar="FIGURE.png|.svg")
    return parser


def read_speeds(path: Path, asked: list[str] | None) -> tuple[dict, list[str]]:
    """A record of `speed`, and the contestants to draw.

    Raises:
        ValueError: another kind of file, or a contestant that it does not have.
        OSError: it cannot be read.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}).") from error
    if not isinstance(record, dict) or record.get("benchmark") != "speed":
        raise ValueError(f"{str(path)!r} is not a record of `python -m minicpm4_hf.eval speed`.")
    names = list(record["contestants"])
    for name in asked or ():
        if name not in names:
            raise ValueError(f"The record has no contestant {name!r}; it has {', '.join(names)}.")
    chosen = list(dict.fromkeys(asked or names))
    if not any(row["contestant"] in chosen for measure in PANELS for row in record[measure]):
        raise ValueError(f"{str(path)!r} has no speed of {', '.join(chosen)} to draw.")
    return record, chosen


def draw_speeds(record: dict, contestants: list[str], form: str) -> bytes:
    """The figure as `png` or `svg`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The figure needs matplotlib: `pip install minicpm4-hf[eval]`.") from error

    panels = {
        measure: rows
        for measure in PANELS
        if (rows := [row for row in record[measure] if row["contestant"] in contestants])
    }
    groups = {measure: len({row["tokens"] for row in rows}) for measure, rows in panels.items()}
    with matplotlib.rc_context({"svg.hashsalt": "speed", "svg.fonttype": "none", "font.size": 9}):
        width = 1.5 + 0.45 * len(contestants) * sum(groups.values()) + 1.5 * len(panels)
        figure = Figure(figsize=(max(width, 6), 4.2), layout="constrained")
        {"svg": FigureCanvasSVG, "png": FigureCanvasAgg}[form](figure)
        axes = figure.subplots(1, len(panels), squeeze=False, width_ratios=[groups[measure] for measure in panels])[0]
        for axis, (measure, rows) in zip(axes, panels.items()):
            draw_panel(axis, rows, contestants)
            title, label = PANELS[measure]
            axis.set(title=title, xlabel=label)
        axes[0].set_ylabel("tokens/s")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
        machine = record["machine"]
        device = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
        figure.suptitle(f"{record['preset']}, {record['dtype']}, random weights; {device}")
        file = io.BytesIO()
        # Neither date nor version: the same record gives the same file.
        metadata = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(file, format=form, dpi=PNG_DPI, metadata=metadata)
    return file.getvalue()


def draw_panel(axis, rows: list[dict], contestants: list[str]) -> None:
    """The bars of one measure; a cell that was left out has none."""
    lengths = sorted({row["tokens"] for row in rows})
    speeds = {(row["contestant"], row["tokens"]): row["tokens_per_s"] for row in rows}
    size = GROUP_WIDTH / len(contestants)
    for number, name in enumerate(contestants):
        places = [place for place, tokens in enumerate(lengths) if (name, tokens) in speeds]
        heights = [speeds[name, lengths[place]] for place in places]
        offset = (number - (len(contestants) - 1) / 2) * size
        bars = axis.bar([place + offset for place in places], heights, size, label=name)
        axis.bar_label(
            bars,
            [f"{height:,.0f}" if height >= 100 else f"{height:.3g}" for height in heights],
            fontsize=7,
            rotation=90,
            padding=2,
        )
    axis.set_xticks(range(len(lengths)), [f"{tokens:,}" for tokens in lengths])
    axis.margins(y=0.18)
    if max(speeds.values()) >= LOGARITHMIC_FROM * min(speeds.values()):
        axis.set_yscale("log")


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        if args.output.suffix not in SUFFIXES:
            raise ValueError(f"`--output` must end in {' or '.join(SUFFIXES)}, got {str(args.output)!r}.")
        if not args.output.parent.is_dir():
            raise ValueError(f"The folder of {str(args.output)!r} does not exist.")
        record, contestants = read_speeds(args.record, args.contestants)
        content = draw_speeds(record, contestants, args.output.suffix.removeprefix("."))
        partial = args.output.with_name(f".{args.output.name}.{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(args.output)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
