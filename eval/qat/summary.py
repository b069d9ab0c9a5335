"""The differences between the runs, with what is known of their uncertainty, as the ablation has it.

`standard_error` is over held-out rows, two losses of the same row subtracted; `by_seed` shows how much a difference
moves with the initial weights and the order of the text, of which one seed says nothing.
"""

import math
import statistics

from minicpm4_hf.eval.ablation.summary import compare, rounded
from minicpm4_hf.quantization.ternary import ROW

from .experiment import FULL, GROUPS_AT, VARIANTS, Variant


def summarize(runs: list[dict], size: dict) -> dict:
    """What the runs show.

    Args:
        runs: finished runs, of a record, the one in full precision among them.
        size: of the held-out rows.

    Returns:
        `losses`: a row a run, `loss` in nats a token and `bits_per_byte`; of the run in full precision also one for
        each group size with its weights rounded after training. `shares`: for each run with a scale a row, its loss
        less the one of full precision, see `compare_runs`; and `after_training` the same for rounded weights, by group
        size. `groups`: for each other group size its loss less the one with a scale a row, at the same share.
    """
    by_key = {(run["name"], run["seed"]): run["held_out"]["short"] for run in runs}
    for run in runs:
        for group_size, losses in run["held_out"].get("after_training", {}).items():
            by_key[_rounded_name(group_size), run["seed"]] = losses
    bits = size["tokens"] / size["bytes"] / math.log(2)
    names = {name: None for name, _ in by_key}
    row = Variant(GROUPS_AT, ROW).name
    return {
        "losses": [
            {
                "name": name,
                "seed": seed,
                "loss": rounded(statistics.fmean(losses)),
                "bits_per_byte": rounded(statistics.fmean(losses) * bits),
            }
            for (name, seed), losses in by_key.items()
        ],
        "shares": {
            str(variant.percent): compare_runs(by_key, FULL, name)
            for name, variant in VARIANTS.items()
            if name in names and variant.group_size == ROW
        },
        "after_training": {
            name.rpartition(" ")[2]: compare_runs(by_key, FULL, name) for name in names if name.startswith("rounded")
        },
        "groups": {
            str(variant.group_size): compare_runs(by_key, row, name)
            for name, variant in VARIANTS.items()
            if {name, row} <= set(names) and variant.group_size != ROW
        },
    }


def _rounded_name(group_size: str) -> str:
    return f"rounded {group_size}"


def compare_runs(by_key: dict, against: str, name: str) -> dict:
    """The losses of `name` less those of `against`, seed by seed.

    Returns:
        `difference`, the mean over the seeds that both have; `by_seed`; `seeds_deviation`, their standard deviation,
        None for one seed; `standard_error` over rows of the difference with the first of them.
    """
    seeds = sorted(seed for other, seed in by_key if other == name and (against, seed) in by_key)
    pairs = [compare(by_key[against, seed], by_key[name, seed]) for seed in seeds]
    by_seed = [pair["difference"] for pair in pairs]
    return {
        "difference": rounded(statistics.fmean(by_seed)),
        "by_seed": by_seed,
        "seeds_deviation": rounded(statistics.stdev(by_seed)) if len(by_seed) > 1 else None,
        "standard_error": pairs[0]["standard_error"],
    }


def describe(record: dict) -> str:
    """The summary in lines."""
    summary, size = record["summary"], record["held_out"]
    seconds = {(run["name"], run["seed"]): run["seconds"] for run in record["runs"]}
    lines = [f"{'run':<16}{'seed':>5}{'loss':>9}{'bits/byte':>11}{'seconds':>9}"]
    for row in summary["losses"]:
        took = seconds.get((row["name"], row["seed"]))
        lines.append(
            f"{row['name']:<16}{row['seed']:>5}{row['loss']:>9.4f}{row['bits_per_byte']:>11.4f}"
            f"{'-' if took is None else format(took, '.0f'):>9}"
        )
    lines.append(f"Held-out loss, nats a token, over {size['tokens']} tokens in rows of {size['length']}.")
    lines += [
        f"ternary for {percent} % of the tokens: {_tell(pair)} against full precision"
        for percent, pair in summary["shares"].items()
    ]
    lines += [
        f"rounded after training, group size {group}: {_tell(pair)} against full precision"
        for group, pair in summary["after_training"].items()
    ]
    lines += [
        f"group size {group} at {GROUPS_AT} %: {_tell(pair)} against a scale a row"
        for group, pair in summary["groups"].items()
    ]
    if all(pair["seeds_deviation"] is None for pair in summary["shares"].values()):
        lines.append("Of one seed: how far another seed would move a difference is unknown.")
    return "\n".join(lines)


def _tell(pair: dict) -> str:
    rows, seeds = (
        "unknown" if pair[key] is None else f"{pair[key]:.4f}" for key in ("standard_error", "seeds_deviation")
    )
    return f"{pair['difference']:+.4f} (rows {rows}; seeds {seeds})"
