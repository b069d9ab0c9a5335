"""The plot of a record, as SVG; the same record gives the same file."""

import io
import statistics

from .experiment import VARIANTS

COLORS = {name: f"C{number}" for number, name in enumerate(VARIANTS)}
BEGIN_SHARE = 0.1  # of the tokens, whose losses are left out of the plot: they would squeeze the rest
SMOOTHED_STEPS = 5  # means of so many points of the long stage, which is logged more often


def plot_record(record: dict) -> str:
    """The figure of a record, SVG text: training losses by tokens, and each run's difference to the baseline.

    Runs of seed 0 are drawn; the bars are means over seeds.

    Raises:
        ValueError: there is no difference to draw.
        ImportError: matplotlib is not installed.
    """
    if not record["summary"]["differences"]:
        names = ", ".join(sorted({run["name"] for run in record["runs"]})) or "none"
        raise ValueError(f"The record needs the baseline and another run, and has {names}: finish more runs first.")
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing needs matplotlib; it comes with `pip install minicpm4-hf[eval]`.") from error

    with matplotlib.rc_context({"svg.hashsalt": record["benchmark"], "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(layout="constrained", figsize=(9.5, 3.8))
        FigureCanvasSVG(figure)
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        draw_curves(left, record)
        draw_differences(right, record["summary"]["differences"])
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def curve_of(run: dict) -> tuple[list[float], list[float]]:
    """Millions of tokens and training losses of a run, one stage after the other."""
    tokens, losses, before = [], [], 0
    for number, stage in enumerate(run["recipe"]["stages"]):
        points = run["curves"][stage["name"]]
        step_tokens = stage["sequences_per_step"] * stage["length"]
        size = SMOOTHED_STEPS if number else 1
        for begin in range(0, len(points), size):
            part = points[begin : begin + size]
            tokens.append((before + part[-1][0] * step_tokens) / 1e6)
            losses.append(statistics.fmean(loss for _, loss in part))
        before += stage["num_steps"] * step_tokens
    return tokens, losses


def draw_curves(axis, record: dict) -> None:
    """Training loss by tokens, from `BEGIN_SHARE` of them on, and where the long stage begins."""
    shown = []
    for run in record["runs"]:
        if run["seed"] != 0:
            continue
        tokens, losses = curve_of(run)
        axis.plot(tokens, losses, color=COLORS[run["name"]], label=run["name"], linewidth=1)
        shown += [loss for at, loss in zip(tokens, losses) if at >= BEGIN_SHARE * tokens[-1]]
        first = run["recipe"]["stages"][0]
        switch = first["num_steps"] * first["sequences_per_step"] * first["length"] / 1e6
    margin = 0.05 * (max(shown) - min(shown)) + 0.01
    axis.set_ylim(min(shown) - margin, max(shown) + margin)
    axis.axvline(switch, color="0.5", linestyle=":", linewidth=1)
    axis.set(xlabel="tokens, millions", ylabel="training loss of the next token, nats", title="training")
    axis.grid(alpha=0.3)
    axis.legend()


def draw_differences(axis, differences: dict) -> None:
    """A bar a run, with the standard error over rows and, of several seeds, a dot each."""
    names = list(differences)
    for place, name in enumerate(names):
        ours = differences[name]
        axis.barh(place, ours["difference"], xerr=ours["standard_error"], color=COLORS[name], alpha=0.8, capsize=3)
        if len(ours["by_seed"]) > 1:
            axis.plot(ours["by_seed"], [place] * len(ours["by_seed"]), ".", color="black")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=1)
    axis.set(xlabel="nats a token more than the baseline", title="held-out loss at the end")
    axis.grid(alpha=0.3, axis="x")
