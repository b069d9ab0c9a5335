"""Plots of the records, as SVG; the same record gives the same file."""

import io
import math

from .coordinates import KINDS, mean_over_seeds

TITLES = {"mup": "muP", "standard": "standard parametrisation"}


def plot_record(record: dict) -> str:
    """The figure of a complete record, SVG text.

    Raises:
        ValueError: cells are missing, or no run has sizes to draw.
        ImportError: matplotlib is not installed (`pip install minicpm4-hf[eval]`).
    """
    if record["summary"] is None:
        raise ValueError(f"The record has no summary yet ({len(record['cells'])} cells): finish the sweep first.")
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": record["benchmark"], "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(layout="constrained")
        FigureCanvasSVG(figure)
        {"mup-coordinates": draw_coordinates, "mup-learning-rates": draw_learning_rates}[record["benchmark"]](
            figure, record
        )
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def numbers(values: list[float | None]) -> list[float]:
    """What a plot leaves out is not a number to it."""
    return [math.nan if value is None else value for value in values]


def draw_coordinates(figure, record: dict) -> None:
    """By parametrisation: sizes after the last step by width, and how steep the change is in the width, by step."""
    settings, summary = record["settings"], record["summary"]
    names = settings["parametrizations"]
    if all(values[-1] is None for cell in record["cells"] for values in cell["scale"].values()):
        raise ValueError("Every run of the record diverged: there is nothing to draw; take lower learning rates.")
    figure.set_size_inches(3.6 * len(names) + 1.6, 6)
    upper, lower = figure.subplots(2, len(names), sharey="row", squeeze=False)
    for column, parametrization in enumerate(names):
        sizes_axis, slopes_axis = upper[column], lower[column]
        slopes_axis.axhspan(-summary["flat"], summary["flat"], color="0.9")
        for index, kind in enumerate(KINDS.values()):
            sizes = [
                mean_over_seeds(record["cells"], parametrization, width, "scale", kind)[-1]
                for width in settings["widths"]
            ]
            slopes = summary["slopes"][parametrization]["change"][kind]
            look = {"color": f"C{index % 10}", "linestyle": "-" if index < 10 else "--", "label": kind}
            sizes_axis.plot(settings["widths"], numbers(sizes), marker=".", **look)
            slopes_axis.plot(range(1, len(slopes)), numbers(slopes[1:]), **look)
        sizes_axis.set(title=TITLES[parametrization], xlabel="width", yscale="log")
        sizes_axis.set_xscale("log", base=2)
        sizes_axis.set_xticks(settings["widths"], [str(width) for width in settings["widths"]])
        slopes_axis.set_xlabel("step")
        for axis in (sizes_axis, slopes_axis):
            axis.grid(alpha=0.3)
    upper[0].set_ylabel(f"size after {settings['steps']} steps")
    lower[0].set_ylabel("slope of log(change) in log(width)")
    figure.legend(*upper[0].get_legend_handles_labels(), loc="outside right center")


def draw_learning_rates(figure, record: dict) -> None:
    """Held-out loss by learning rate, a line a width and a dot a seed, a column a parametrisation."""
    settings = record["settings"]
    names = settings["parametrizations"]
    figure.set_size_inches(3.6 * len(names), 3.4)
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, parametrization in zip(axes, names):
        for index, width in enumerate(settings["widths"]):
            rows = [
                row
                for row in record["summary"]["losses"]
                if (row["parametrization"], row["width"]) == (parametrization, width)
            ]
            rates = [row["learning_rate"] for row in rows]
            color = f"C{index}"
            axis.plot(rates, numbers([row["loss"] for row in rows]), color=color, label=f"width {width}")
            for row in rows:
                seeds = [loss for loss in row["by_seed"] if loss is not None]
                axis.plot([row["learning_rate"]] * len(seeds), seeds, ".", color=color, alpha=0.5)
            best = next(row for row in record["summary"]["best"][parametrization] if row["width"] == width)
            if best["learning_rate"] is not None:
                axis.plot(best["learning_rate"], best["loss"], "*", color=color, markersize=12)
        axis.set_xscale("log")
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45)
        axis.minorticks_off()
        axis.set(xlabel="learning rate", title=TITLES[parametrization])
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("held-out loss (nats a byte)")
