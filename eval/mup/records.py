"""The JSON record of a sweep: it is whole after every cell, and a sweep that was ended goes on from it."""

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from minicpm4_hf.kernels.bench.__main__ import describe_machine, write_atomically

from .experiment import Cell, Corpus, Settings

PACKAGES = ("minicpm4-hf", "torch", "transformers", "numpy")


def begin_record(settings: Settings, corpus: Corpus, command: str) -> dict:
    """A record without cells: what was run, with what, on what."""
    return {
        "benchmark": f"mup-{settings.experiment}",
        "command": command,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": describe_machine("cpu"),
        "versions": {package: version(package) for package in PACKAGES},
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),  # lists for tuples, as in the file
        "books": corpus.sources,
        "cells": [],
        "summary": None,
    }


def read_record(path: Path) -> dict:
    """A record of this package's sweeps.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}).") from error
    if not isinstance(record, dict) or not str(record.get("benchmark")).startswith("mup-"):
        raise ValueError(f"{str(path)!r} is not a record of `python -m minicpm4_hf.eval.mup`.")
    return record


def resume_record(path: Path, record: dict) -> dict:
    """The record at `path` if there is one that belongs to this sweep, else `record`.

    Raises:
        ValueError: the file holds another sweep.
    """
    if not path.exists():
        return record
    found = read_record(path)
    for part in ("benchmark", "settings", "books", "versions"):
        if found[part] != record[part]:
            was, now = found[part], record[part]
            if isinstance(was, dict):
                name = next(key for key in {**was, **now} if was.get(key) != now.get(key))
                part, was, now = f"{part}[{name!r}]", was.get(name), now.get(name)
            raise ValueError(
                f"{str(path)!r} has a sweep whose {part} is {json.dumps(was)}, not {json.dumps(now)}; give it the "
                "same arguments to go on with it, or name another --output."
            )
    return found


def run_cells(
    settings: Settings,
    corpus: Corpus,
    record: dict,
    path: Path,
    run_cell: Callable[[Settings, Cell, Corpus], dict],
    summarize: Callable[[Settings, list[dict]], dict],
    max_seconds: float | None = None,
) -> bool:
    """Run the cells that the record lacks, writing it after each, and the summary after the last.

    Args:
        max_seconds: start no cell after so many seconds.

    Returns:
        Whether the record is complete.
    """
    started = time.perf_counter()
    cells = list(settings.cells())
    done = [{name: cell[name] for name in dataclasses.asdict(cells[0])} for cell in record["cells"]]
    for number, cell in enumerate(cells, 1):
        key = dataclasses.asdict(cell)
        if key in done:
            continue
        if max_seconds is not None and time.perf_counter() - started >= max_seconds:
            return False
        result = run_cell(settings, cell, corpus)
        record["cells"].append({**key, **result})
        write_record(path, record)
        ends = f"training loss {result['losses'][0]} to {result['losses'][-1]}"
        print(
            f"[{number}/{len(cells)}] {cell.parametrization}, width {cell.width}, rate {cell.learning_rate:g}, seed "
            f"{cell.seed}: {ends} in {result['seconds']} s",
            file=sys.stderr,
            flush=True,
        )
    record["summary"] = summarize(settings, record["cells"])
    write_record(path, record)
    return True


def write_record(path: Path, record: dict) -> None:
    """Put a record in place of the one before in one step."""
    write_atomically(path, json.dumps(record, allow_nan=False) + "\n")
