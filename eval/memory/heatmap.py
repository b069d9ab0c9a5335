"""Needle accuracy by length and depth, a panel an attention, as figure 7 of the MiniCPM4 report (arXiv:2506.07900).

The same record gives the same file, as SVG, as PNG, and as the grid's numbers in JSON.
"""

import io
import json
import os
from pathlib import Path

PNG_DPI = 200
SUFFIXES = (".svg", ".png", ".json")


def needle_part(record: dict) -> dict:
    """The part "needle" of a record.

    Raises:
        ValueError: the record has no such part.
    """
    if "needle" not in record.get("parts", {}):
        parts = ", ".join(record.get("parts", {})) or "nothing"
        raise ValueError(f"The record has no `needle` to draw, only {parts}; measure it first.")
    return record["parts"]["needle"]


def render_heatmap(record: dict, suffix: str) -> bytes:
    """The file of a heat map.

    Args:
        suffix: of `SUFFIXES`.

    Raises:
        ValueError: another suffix, or a record without needles.
        ImportError: matplotlib is not installed and the file is no JSON.
    """
    if suffix not in SUFFIXES:
        raise ValueError(f"A heat map is a file that ends in {', '.join(SUFFIXES)}, got {suffix!r}.")
    if suffix == ".json":
        return (json.dumps(tabulate_needles(record), indent=1) + "\n").encode()
    return plot_heatmap(record).encode() if suffix == ".svg" else draw_heatmap(record, "png")


def tabulate_needles(record: dict) -> dict:
    """The grid as numbers: for each attention a list a depth, in it the share of right answers at each length."""
    part = needle_part(record)
    modes = list(dict.fromkeys(row["mode"] for row in part["rows"]))
    rows = {mode: [row for row in part["rows"] if row["mode"] == mode] for mode in modes}
    return {
        "model": record["model"],
        "samples": part["samples"],
        "lengths": [row["length"] for row in rows[modes[0]]],
        "depths": part["rows"][0]["depths"],
        "accuracy": {
            mode: [
                [solved / part["samples"] for solved in line]
                for line in zip(*(row["solved_by_depth"] for row in found))
            ]
            for mode, found in rows.items()
        },
    }


def write_heatmap(path: Path, record: dict) -> None:
    """Put the heat map in place in one step; its suffix says what it is. Raises as `render_heatmap` does."""
    content = render_heatmap(record, path.suffix)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)


def plot_heatmap(record: dict) -> str:
    """The figure of a record that has the part "needle", SVG text.

    Raises:
        ValueError: the record has no such part.
        ImportError: matplotlib is not installed.
    """
    return draw_heatmap(record, "svg").decode()


def draw_heatmap(record: dict, form: str) -> bytes:
    """The figure as `svg` or `png`; see `plot_heatmap`."""
    part = needle_part(record)
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The figure needs matplotlib: `pip install minicpm4-hf[eval]`.") from error

    modes = list(dict.fromkeys(row["mode"] for row in part["rows"]))
    depths = part["rows"][0]["depths"]
    with matplotlib.rc_context({"svg.hashsalt": "memory", "svg.fonttype": "none", "font.size": 9}):
        num_lengths = len(part["rows"]) // len(modes)
        figure = Figure(figsize=(1.6 + len(modes) * (0.8 + 0.65 * num_lengths), 1.4 + 0.3 * len(depths)))
        figure.set_layout_engine("constrained")
        {"svg": FigureCanvasSVG, "png": FigureCanvasAgg}[form](figure)
        axes = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
        for axis, mode in zip(axes, modes):
            mesh = draw_panel(axis, [row for row in part["rows"] if row["mode"] == mode], part["samples"])
            axis.set(title=f"{mode} attention", xlabel="tokens")
        axes[0].set_yticks([place + 0.5 for place in range(len(depths))], [f"{depth:.0%}" for depth in depths])
        axes[0].set_ylabel("depth of the fact")
        axes[0].invert_yaxis()
        figure.colorbar(mesh, ax=axes, label=f"right answers of {part['samples']}, %")
        file = io.BytesIO()
        # Neither date nor version: the same record gives the same file.
        metadata = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(file, format=form, dpi=PNG_DPI, metadata=metadata)
    return file.getvalue()


def draw_panel(axis, rows: list[dict], samples: int):
    """One mode: a column a length, a row a depth, the percentage in each cell; gives what the colour bar needs."""
    by_depth = zip(*(row["solved_by_depth"] for row in rows))
    cells = [[100 * solved / samples for solved in line] for line in by_depth]
    mesh = axis.pcolormesh(cells, vmin=0, vmax=100, cmap="viridis", edgecolors="white", linewidth=0.5)
    for y, line in enumerate(cells):
        for x, value in enumerate(line):
            color = "black" if value > 60 else "white"
            axis.text(x + 0.5, y + 0.5, f"{value:.0f}", ha="center", va="center", color=color)
    axis.set_xticks([x + 0.5 for x in range(len(rows))], [f"{row['length']:,}" for row in rows])
    axis.tick_params(length=0)
    return mesh
