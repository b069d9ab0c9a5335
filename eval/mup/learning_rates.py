"""The learning-rate sweep: whether the rate that is best for a narrow model is best for a wide one.

Under muP it is (Tensor Programs V, arXiv:2203.03466, figure 1), so that a rate found on a small model serves a large
one. The loss that decides is on the ends of the books, which nothing is trained on.
"""

import math
import statistics

import torch

from .experiment import Cell, Corpus, Settings, finite_or_none, loss_of, train


def run_cell(settings: Settings, cell: Cell, corpus: Corpus) -> dict:
    """Train to the end of the schedule; `loss` is on held-out text, in nats a byte, None where not a number."""
    model, result = train(settings, cell, corpus)
    windows = corpus.held_out_windows(settings)
    with torch.no_grad():
        losses = [loss_of(model, part, settings).item() * len(part) for part in windows.split(settings.batch)]
    return {**result, "loss": finite_or_none(sum(losses) / len(windows))}


def summarize(settings: Settings, cells: list[dict]) -> dict:
    """The loss of each setting as a mean over seeds, and what is best at each width.

    Returns:
        `losses`: rows of parametrisation, width, learning rate, `loss` (None where a seed has none) and `by_seed`;
        `best`: by parametrisation, a row a width (see `find_best`); `transfers`: by parametrisation, whether the best
        rate is the same at every width; `cost_of_transfer`: by parametrisation, how much more the widest model loses
        in nats a byte at the narrowest one's best rate than at its own (None where it diverges).
    """
    losses, best, transfers, cost = [], {}, {}, {}
    for parametrization in settings.parametrizations:
        rows = []
        for width in settings.widths:
            for rate in settings.learning_rates:
                by_seed = [
                    cell["loss"]
                    for cell in cells
                    if (cell["parametrization"], cell["width"], cell["learning_rate"])
                    == (parametrization, width, rate)
                ]
                mean = None if None in by_seed else round(statistics.fmean(by_seed), 5)
                rows.append(
                    {
                        "parametrization": parametrization,
                        "width": width,
                        "learning_rate": rate,
                        "loss": mean,
                        "by_seed": by_seed,
                    }
                )
        losses += rows
        best[parametrization] = [
            {"width": width, **find_best([row for row in rows if row["width"] == width])} for width in settings.widths
        ]
        found = {row["width"]: row["learning_rate"] for row in best[parametrization]}
        transfers[parametrization] = None not in found.values() and len(set(found.values())) == 1
        wide = {row["learning_rate"]: row["loss"] for row in rows if row["width"] == max(settings.widths)}
        moved, own = wide.get(found[min(settings.widths)]), wide.get(found[max(settings.widths)])
        cost[parametrization] = None if None in (moved, own) else round(moved - own, 5)
    return {"losses": losses, "best": best, "transfers": transfers, "cost_of_transfer": cost}


def find_best(rows: list[dict]) -> dict:
    """The best of the rows of one width.

    Returns:
        `learning_rate` and its `loss`; `margin`: how much more the second best loses; `by_seed`: the best rate of each
        seed alone; `optimum`: where a parabola through the best and its two neighbours, in log(rate), is lowest, None
        at an end of the grid. All None if every run diverged.
    """
    grid = sorted((row for row in rows if row["loss"] is not None), key=lambda row: row["learning_rate"])
    if not grid:
        return dict.fromkeys(("learning_rate", "loss", "margin", "by_seed", "optimum"))
    place = min(range(len(grid)), key=lambda index: grid[index]["loss"])
    best, others = grid[place], [row["loss"] for row in grid[:place] + grid[place + 1 :]]
    seeds = range(len(best["by_seed"]))
    optimum = None
    if 0 < place < len(grid) - 1:
        x = [math.log(row["learning_rate"]) for row in grid[place - 1 : place + 2]]
        y = [row["loss"] for row in grid[place - 1 : place + 2]]
        left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
        curvature = (right - left) / (x[2] - x[0])  # Newton's form: y0 + left (x - x0) + curvature (x - x0) (x - x1)
        optimum = float(f"{math.exp((x[0] + x[1] - left / curvature) / 2):.4g}") if curvature > 0 else None
    return {
        "learning_rate": best["learning_rate"],
        "loss": best["loss"],
        "margin": round(min(others) - best["loss"], 5) if others else None,
        "by_seed": [min(grid, key=lambda row: row["by_seed"][seed])["learning_rate"] for seed in seeds],
        "optimum": optimum,
    }


def describe(summary: dict) -> str:
    """The summary in lines: the best rate at each width, and what it costs to take the narrow model's."""
    lines = []
    for parametrization, rows in summary["best"].items():
        best = ", ".join(
            f"{row['learning_rate']:g} at width {row['width']} (loss {row['loss']:.3f})"
            if row["learning_rate"] is not None
            else f"none at width {row['width']} (all diverged)"
            for row in rows
        )
        word = "the same" if summary["transfers"][parametrization] else "not the same"
        cost = summary["cost_of_transfer"][parametrization]
        cost = "no finite loss" if cost is None else f"{cost:.3f} nats a byte"
        lines.append(f"{parametrization}: best rate {word}: {best}; taking the narrowest's at the widest costs {cost}")
    return "\n".join(lines)
