"""The differences between the runs, with what is known of their uncertainty.

Two spreads are kept apart. `standard_error` is over the held-out rows, two losses of the same row subtracted: how well
these rows tell the difference between these very models. `seeds_deviation` is over seeds: how much the difference
itself moves with the initial weights and the order of the text. With one seed it is unknown, and the first says
nothing of it.
"""

import math
import statistics

from .experiment import DENSE, SPARSE, VARIANTS

FIRST_STEPS = 5  # of the long stage, whose training losses are shown


def compare(losses: list[float], others: list[float]) -> dict[str, float]:
    """Of two losses of the same rows, the second less the first.

    Returns:
        `difference` of the means, `rows_deviation`, the standard deviation of the rows' differences, and
        `standard_error` of their mean (None both for one row); nats a token.
    """
    differences = [b - a for a, b in zip(losses, others, strict=True)]
    deviation = statistics.stdev(differences) if len(differences) > 1 else None
    return {
        "difference": rounded(statistics.fmean(differences)),
        "rows_deviation": rounded(deviation),
        "standard_error": rounded(deviation and deviation / math.sqrt(len(differences))),
    }


def rounded(value: float | None) -> float | None:
    """To the digits that a record keeps."""
    return None if value is None else round(value, 6)


def attention_of(run: dict) -> str:
    """What the long stage of a run was trained with."""
    return DENSE if run["recipe"]["stages"][1]["sparse_config"] is None else SPARSE


def end_losses(run: dict) -> list[float]:
    """Of each held-out row at the end of a run, read as its long stage was trained."""
    return run["held_out"]["end"][attention_of(run)]


def summarize(runs: list[dict], size: dict) -> dict:
    """What the runs show.

    Args:
        runs: finished runs, of a record.
        size: of the held-out rows, see `prepare`.

    Returns:
        `losses`: a row a run: held-out `short_loss` at the end of the short stage, at its length, and `loss` at the
        end of the run, at the long length, read as it was trained, both in nats a token; `bits_per_byte` of the
        latter. `differences`: for each other run the `loss` and the `short_loss` less the baseline's, see
        `compare_runs`. `switch`: see `describe_switch`. `reading`: for each run's last model the sparse reading less
        the dense one, see `compare`. The last three are of the runs with seed 0 where they are not of all seeds, and
        lack what is not finished.
    """
    by_key = {(run["name"], run["seed"]): run for run in runs}
    bits = size["tokens"] / size["bytes"] / math.log(2)
    losses = [
        {
            "name": run["name"],
            "seed": run["seed"],
            "short_loss": rounded(statistics.fmean(run["held_out"]["short"])),
            "loss": rounded(statistics.fmean(end_losses(run))),
            "bits_per_byte": rounded(statistics.fmean(end_losses(run)) * bits),
        }
        for run in runs
    ]
    differences = {
        name: {
            **compare_runs(by_key, name, end_losses),
            "short": compare_runs(by_key, name, lambda run: run["held_out"]["short"]),
        }
        for name in VARIANTS
        if name != "baseline" and {("baseline", 0), (name, 0)} <= set(by_key)
    }
    for difference in differences.values():
        difference["bits_per_byte"] = rounded(difference["difference"] * bits)
    reading = {
        name: compare(run["held_out"]["end"][DENSE], run["held_out"]["end"][SPARSE])
        for (name, seed), run in by_key.items()
        if seed == 0
    }
    return {
        "losses": losses,
        "differences": differences,
        "switch": describe_switch(by_key) if ("baseline", 0) in by_key else None,
        "reading": reading,
    }


def compare_runs(by_key: dict, name: str, losses_of) -> dict:
    """A run less the baseline, seed by seed.

    Returns:
        `difference`, the mean over the seeds that both have; `by_seed`; `seeds_deviation`, their standard deviation,
        None for one seed; `standard_error` over rows of the difference with seed 0.
    """
    seeds = sorted(seed for other, seed in by_key if other == name and ("baseline", seed) in by_key)
    pairs = [compare(losses_of(by_key["baseline", seed]), losses_of(by_key[name, seed])) for seed in seeds]
    by_seed = [pair["difference"] for pair in pairs]
    return {
        "difference": rounded(statistics.fmean(by_seed)),
        "by_seed": by_seed,
        "seeds_deviation": rounded(statistics.stdev(by_seed)) if len(by_seed) > 1 else None,
        "standard_error": pairs[0]["standard_error"],
    }


def describe_switch(by_key: dict) -> dict:
    """Whether the loss jumps where dense attention becomes sparse.

    Returns:
        `jump`: held-out loss of the baseline's weights at the switch, before any step is taken, sparse less dense, on
        the same rows at the long length, see `compare`; `dense_loss` and `sparse_loss`, its two sides, and
        `short_loss`, the same tokens at the short length; `training`: the training losses that were logged last before
        the switch and first after it, in the baseline and, with the same sequences, in "dense" if that is finished.
    """
    baseline = by_key["baseline", 0]
    held_out = baseline["held_out"]
    short, long = (stage["name"] for stage in baseline["recipe"]["stages"])
    training = {"before": baseline["curves"][short][-1][1]}
    for name in ("baseline", "dense"):
        if (name, 0) in by_key:
            run = by_key[name, 0]
            training[attention_of(run)] = [loss for _, loss in run["curves"][long][:FIRST_STEPS]]
    return {
        "jump": compare(held_out["switch"][DENSE], held_out["switch"][SPARSE]),
        "dense_loss": rounded(statistics.fmean(held_out["switch"][DENSE])),
        "sparse_loss": rounded(statistics.fmean(held_out["switch"][SPARSE])),
        "short_loss": rounded(statistics.fmean(held_out["short"])),
        "training": training,
    }


def describe(record: dict) -> str:
    """The summary in lines: the table, the switch, and what is not known."""
    summary, size = record["summary"], record["held_out"]
    seconds = {(run["name"], run["seed"]): run["seconds"] for run in record["runs"]}
    lines = [f"{'run':<10}{'seed':>5}{'short':>9}{'long':>9}{'bits/byte':>11}{'seconds':>9}  against the baseline"]
    for row in summary["losses"]:
        name, seed = row["name"], row["seed"]
        ours = summary["differences"].get(name)
        told = VARIANTS[name].says
        if ours and seed == 0:
            told = f"{ours['difference']:+.4f} {spread(ours)}: {told}"
        took = seconds[name, seed]
        lines.append(
            f"{name:<10}{seed:>5}{row['short_loss']:>9.4f}{row['loss']:>9.4f}{row['bits_per_byte']:>11.4f}"
            f"{'-' if took is None else format(took, '.0f'):>9}  {told}"
        )
    lines.append(
        f"Held-out losses in nats a token, over {size['tokens']} tokens in rows of {size['length']}: `short` at the "
        "end of the short stage, in its rows; `long` at the end. Differences are of `long`: mean over seeds "
        "(standard error over rows; deviation over seeds)."
    )
    lines += [f"{name}: {VARIANTS[name].caution}" for name in summary["differences"] if VARIANTS[name].caution]
    if any(ours["seeds_deviation"] is None for ours in summary["differences"].values()):
        lines.append("Of one seed: how far another seed would move a difference is unknown.")
    if summary["switch"]:
        lines += tell_switch(summary["switch"])
    for name, pair in summary["reading"].items():
        lines.append(f"{name}, at the end: read sparsely less read densely {pair['difference']:+.4f} {error_of(pair)}")
    return "\n".join(lines)


def tell_switch(switch: dict) -> list[str]:
    """The lines of `describe` on the switch."""
    jump, training = switch["jump"], switch["training"]
    lines = [
        f"At the switch, no step taken: dense {switch['dense_loss']:.4f}, sparse {switch['sparse_loss']:.4f}, jump "
        f"{jump['difference']:+.4f} {error_of(jump)}; the same tokens in short rows {switch['short_loss']:.4f}"
    ]
    for attention in (SPARSE, DENSE):
        if attention in training:
            after = " ".join(f"{loss:.3f}" for loss in training[attention])
            lines.append(f"Training loss, {attention}: {training['before']:.3f} before the switch, then {after}")
    return lines


def error_of(pair: dict) -> str:
    """The uncertainty over rows, in brackets."""
    return (
        "(one row)" if pair["standard_error"] is None else f"(standard error over rows {pair['standard_error']:.4f})"
    )


def spread(difference: dict) -> str:
    """Both uncertainties of a difference, in brackets."""
    known = [difference["standard_error"], difference["seeds_deviation"]]
    rows, seeds = ("unknown" if value is None else f"{value:.4f}" for value in known)
    return f"(rows {rows}; seeds {seeds})"
