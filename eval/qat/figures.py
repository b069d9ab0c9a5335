"""The plot of a record, as SVG; the same record gives the same file."""

import io

from .experiment import FULL, GROUP_SIZES, GROUPS_AT

# Final loss by the percentage of tokens with ternary weights: MiniCPM4's report (arXiv:2506.07900), figure 5, read
# from the figure; its axis is the rest, the percentage in FP8.
REPORT = {100: 3.138, 90: 3.226, 80: 3.212, 70: 3.242, 60: 3.155, 50: 3.204, 40: 3.198, 30: 3.38, 20: 3.43, 10: 3.437}
# Loss after the decay by group size: BitCPM-CANN's report, table 7, 0.5B parameters.
REPORT_GROUPS = {-1: 1.661, 64: 1.646, 32: 1.635}


def plot_record(record: dict) -> str:
    """The figure of a record, SVG text: loss by the share of ternary tokens, the report's, and by group size.

    Raises:
        ValueError: there is no difference to draw.
        ImportError: matplotlib is not installed.
    """
    summary = record["summary"]
    if not summary["shares"] or not summary["groups"]:
        names = ", ".join(run["name"] for run in record["runs"])
        raise ValueError(
            f"The record needs runs of a share and of several group sizes, and has {names}: finish more runs first."
        )
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing needs matplotlib; it comes with `pip install minicpm4-hf[eval]`.") from error

    with matplotlib.rc_context({"svg.hashsalt": record["benchmark"], "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(layout="constrained", figsize=(10.5, 3.6))
        FigureCanvasSVG(figure)
        ours, report, groups = figure.subplots(1, 3, width_ratios=(4, 4, 3))
        draw_shares(ours, record)
        draw_report(report)
        draw_groups(groups, summary["groups"])
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def draw_shares(axis, record: dict) -> None:
    """Held-out loss by the share, a dot a seed and a line through their means, and full precision."""
    summary = record["summary"]
    losses = {}
    for row in summary["losses"]:
        losses.setdefault(row["name"], []).append(row["loss"])
    full = sum(losses[FULL]) / len(losses[FULL])
    percents = sorted(map(int, summary["shares"]))
    means = [full + summary["shares"][str(percent)]["difference"] for percent in percents]
    axis.plot(percents, means, marker="o", label="ternary")
    for percent in percents:
        dots = losses[f"ternary-{percent}"]
        if len(dots) > 1:
            axis.plot([percent] * len(dots), dots, ".", color="black")
    axis.axhline(full, color="0.4", linestyle="--", linewidth=1, label="full precision")
    rounded = full + summary["after_training"]["-1"]["difference"]
    axis.plot([], [], " ", label=f"rounded after training: {rounded:.2f}")
    axis.set(xlabel="tokens with ternary weights, %", ylabel="held-out loss, nats a token", title="ours")
    axis.grid(alpha=0.3)
    axis.legend()


def draw_report(axis) -> None:
    """The report's figure, in the same direction."""
    axis.plot(sorted(REPORT), [REPORT[percent] for percent in sorted(REPORT)], marker="o", color="C1")
    axis.set(xlabel="tokens with ternary weights, %", ylabel="final loss, nats a token", title="MiniCPM4's report")
    axis.grid(alpha=0.3)


def draw_groups(axis, groups: dict) -> None:
    """Loss less the one with a scale a row, ours with the standard error over rows, and the report's."""
    sizes = [size for size in GROUP_SIZES if str(size) in groups]
    ours = [groups[str(size)] for size in sizes]
    places = range(len(sizes))
    axis.bar(places, [pair["difference"] for pair in ours], yerr=[pair["standard_error"] for pair in ours], capsize=3)
    report = [REPORT_GROUPS[size] - REPORT_GROUPS[-1] for size in sizes]
    axis.plot(places, report, "D", color="C1", label="BitCPM-CANN's report, 0.5B")
    axis.set_xticks(places, [f"group of {size}" for size in sizes])
    axis.axhline(0, color="black", linewidth=1)
    axis.set(ylabel="nats a token less a scale a row's", title=f"group size, at {GROUPS_AT} %")
    axis.grid(alpha=0.3, axis="y")
    axis.legend()
