"""From single measurements to medians, ratios, a table and one JSON document."""

import os
import statistics
import time
from importlib.metadata import PackageNotFoundError, version

from minicpm4_hf.kernels.bench.__main__ import describe_machine

from .contestants import CONTESTANTS
from .schedule import Benchmark, order_cells

PACKAGES = ("minicpm4-hf", "torch", "transformers", "numpy", "llama-cpp-python", "gguf")
GIB = 1024**3


def describe_versions() -> dict[str, str]:
    """The installed packages that figures depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def describe_host(threads: int, device: str = "cpu") -> dict:
    """The machine, with the workers' threads in place of this process's."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        **describe_machine(device),
        "threads": threads,
        "cores": os.cpu_count(),
        "memory_gib": round(memory / GIB, 1),
    }


def build_document(benchmark: Benchmark, against: list[str], absent: dict[str, str]) -> dict:
    """Everything a reader needs to judge the figures.

    Args:
        against: the contestants that ratios are to.
        absent: contestants that could not run at all, with the reason.
    """
    settings = benchmark.settings
    rows = {"prompt": [], "decode": []}
    for measure, tokens in order_cells(settings.prompts, settings.depths):
        cells = {name: summarize(benchmark, name, measure, tokens) for name in settings.contestants}
        bases = {name: cells[name]["tokens_per_s"] for name in against if cells[name]}
        for name, cell in cells.items():
            if cell:
                ratios = {base: cell["tokens_per_s"] / rate for base, rate in bases.items()}
                rows[measure].append({"contestant": name, "tokens": tokens, **cell, "ratios": ratios})
    left_out = [
        {"contestant": name, "measure": measure, "tokens": tokens, "reason": reason}
        for (name, measure, tokens), reason in benchmark.left_out.items()
    ]
    return {
        "benchmark": "speed",
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": describe_host(settings.threads, settings.device),
        "versions": describe_versions(),
        "preset": settings.preset,
        "dtype": settings.dtype,
        "seed": settings.seed,
        "rounds": settings.rounds,
        "steps": settings.steps,
        "against": against,
        "contestants": {
            name: {
                "title": CONTESTANTS[name].title,
                "shape": benchmark.shapes[name],
                **benchmark.facts.get(name, {}),
            }
            for name in settings.contestants
        },
        "parity": benchmark.parity,
        "prompt": rows["prompt"],
        "decode": rows["decode"],
        "left_out": [*({"contestant": name, "reason": reason} for name, reason in absent.items()), *left_out],
        "seconds": round(sum(line["wall_s"] for line in benchmark.records.find("measurement")), 1),
    }


def summarize(benchmark: Benchmark, contestant: str, measure: str, tokens: int) -> dict | None:
    """One cell's figures over its rounds; None where nothing was measured.

    The spread is the interquartile range: over the rounds, each round of a decode cell being the median of its steps.
    It is None where only one round was run.
    """
    lines = benchmark.records.find("measurement", contestant=contestant, measure=measure, tokens=tokens)
    if not lines:
        return None
    size = tokens if measure == "prompt" else 1
    seconds = [statistics.median(line["seconds"]) for line in lines]
    rates = [size / value for value in seconds]
    name = "ttft_s" if measure == "prompt" else "step_s"
    summary = {
        "rounds": len(lines),
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_iqr": interquartile_range(rates),
        name: statistics.median(seconds),
        f"{name}_iqr": interquartile_range(seconds),
        "peak_gib": max(line["peak_bytes"] for line in lines) / GIB,
    }
    if measure == "prompt":
        summary["chunk"] = lines[-1]["chunk"]
    return summary


def interquartile_range(values: list[float]) -> float | None:
    """The distance between the quartiles; None for a single value."""
    if len(values) < 2:
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def print_table(document: dict) -> None:
    """The document for a reader."""
    machine = ", ".join(f"{key} {value}" for key, value in document["machine"].items())
    versions = ", ".join(f"{key} {value}" for key, value in document["versions"].items())
    print(f"{machine}\n{versions}")
    print(
        f"{document['preset']}, {document['dtype']}, random weights; medians of up to {document['rounds']} rounds, "
        "spread: interquartile range"
    )
    for row in document["parity"]:
        print(f"{row['contestant']} equals {row['against']} within {row['error']:.1e} (allowed {row['limit']:.0e})")
    titles = {"prompt": ("prompt", "TTFT s", "ttft_s", 1), "decode": ("decode at", "ms/token", "step_s", 1e3)}
    for measure, (title, time_title, field, factor) in titles.items():
        tokens = None
        for row in document[measure]:
            if row["tokens"] != tokens:
                tokens = row["tokens"]
                bases = "".join(f"{f'x {name}':>14}" for name in document["against"])
                heading = f"{title} {tokens}"
                print(f"\n{heading:24} {'tokens/s':>10} {'spread':>9} {time_title:>10} {'peak GiB':>9} {bases}")
            spread = "-" if row["tokens_per_s_iqr"] is None else f"{row['tokens_per_s_iqr']:.3g}"
            ratios = [row["ratios"].get(name) for name in document["against"]]
            ratios = "".join(f"{'-' if ratio is None else f'{ratio:.3g}':>14}" for ratio in ratios)
            print(
                f"  {row['contestant']:22} {row['tokens_per_s']:10.4g} {spread:>9} {factor * row[field]:10.4g} "
                f"{row['peak_gib']:9.2f} {ratios}"
            )
    if document["left_out"]:
        print("\nleft out")
    for entry in document["left_out"]:
        where = f", {entry['measure']} {entry['tokens']}" if "measure" in entry else ""
        print(f"  {entry['contestant']}{where}: {entry['reason']}")
