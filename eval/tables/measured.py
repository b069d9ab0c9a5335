"""What records of runs say about cells of the paper's tables.

A record says so in one of two ways: its kind (`benchmark`) has a reader here, or it names cells itself, as
`"paper_cells": [{"table": "table-5", "row": "MMLU", "column": "MiniCPM4-8B", "value": 75.1}]`. A record of another
model, or from another device, is about no cell; it is listed apart.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from .paper import Cell, PaperTable

RESULTS = Path(__file__).resolve().parent.parent / "results"
TOKENS_A_K = 1024
# What `speed` calls a model of the paper's figure 1, and the paper's name of it.
SPEED_NAMES = {
    "ours-sparse": "MiniCPM4-8B",
    "qwen3-8b": "Qwen-3-8B",
    "llama3-8b": "Llama-3-8B",
    "glm4-9b": "GLM-4-9B",
}
SPEED_PRESET = "MiniCPM4-8B"
SPEED_DEVICES = {"Orin": "Jetson AGX Orin", "4090": "RTX 4090"}  # part of the GPU's name: the paper's name of it
SPEED_PHASES = {"prompt": "prefill", "decode": "decode"}


@dataclass(frozen=True)
class Run:
    """A record; `id` is its file's name without the suffix."""

    id: str
    record: dict

    @property
    def date(self) -> str:
        """When it was measured; empty where the record does not say."""
        return self.record.get("date", "")

    @property
    def model(self) -> str:
        """The measured checkpoint's name without its owner; empty where there is none."""
        model = self.record.get("model")
        name = model.get("name", "") if isinstance(model, dict) else model or ""
        return str(name).rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class Measurement:
    """A value and the run that it comes from."""

    value: float
    run: str


def read_runs(folder: Path) -> list[Run]:
    """The records of a folder, the oldest first.

    Raises:
        ValueError: the folder is not there, or a file in it is no record.
        OSError: a file cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder of records {str(folder)!r}; name it with `--results`.")
    runs = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # also what is not UTF-8
            raise ValueError(f"The record {str(path)!r} is not JSON in UTF-8 ({error}); remove it.") from error
        if not isinstance(record, dict) or not isinstance(record.get("benchmark", record.get("task")), str):
            raise ValueError(f"{str(path)!r} is not a record: it does not say its `benchmark`; remove it.")
        runs.append(Run(path.stem, record))
    return sorted(runs, key=lambda run: (run.date, run.id))


def columns_of(table: PaperTable, model: str) -> list[str]:
    """The columns that are about a model."""
    return [
        column for column, name in zip(table.columns, table.models) if model and name.casefold() == model.casefold()
    ]


def read_speed(run: Run, tables: dict[str, PaperTable]) -> Iterable[tuple[Cell, float]]:
    """Figure 1, from a run of its 8B shapes on one of its two devices."""
    machine = run.record.get("machine", {})
    devices = [name for part, name in SPEED_DEVICES.items() if part in machine.get("gpu", "")]
    if not devices or run.record.get("preset") != SPEED_PRESET:
        return
    for measure, phase in SPEED_PHASES.items():
        for row in run.record[measure]:
            if row["contestant"] in SPEED_NAMES:
                name = f"{devices[0]} {phase}, {SPEED_NAMES[row['contestant']]}"
                yield ("figure-1", name, f"{row['tokens'] // TOKENS_A_K}K"), row["tokens_per_s"]


def read_needle(run: Run, tables: dict[str, PaperTable]) -> Iterable[tuple[Cell, float]]:
    """Figure 7: at each depth, the share of right answers over all lengths, with sparse attention."""
    part = run.record.get("parts", {}).get("needle")
    rows = [row for row in part["rows"] if row["mode"] == "sparse"] if part else []
    if not rows:
        return
    for column in columns_of(tables["figure-7"], run.model):
        for place, depth in enumerate(rows[0]["depths"]):
            solved = sum(row["solved_by_depth"][place] for row in rows)
            name = f"depth {round(100 * depth)} %"
            yield ("figure-7", name, column), 100 * solved / (len(rows) * part["samples"])


def read_benchmarks(run: Run, tables: dict[str, PaperTable]) -> Iterable[tuple[Cell, float]]:
    """Tables 3 and 5, from rows that have the table's name of the task and a score in percent."""
    for table in (tables["table-3-ternary"], tables["table-5"]):
        known = {spell_task(row): row for row in table.rows}
        for row in run.record.get("rows", []):
            if spell_task(row["task"]) in known:
                for column in columns_of(table, run.model):
                    yield (table.id, known[spell_task(row["task"])], column), row["score"]


def spell_task(name: str) -> str:
    """A task's name without what spellings differ in: MATH-500 and math500 are one."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


READERS: dict[str, Callable[[Run, dict[str, PaperTable]], Iterable[tuple[Cell, float]]]] = {
    "speed": read_speed,
    "memory": read_needle,
    "ruler": read_needle,
    "benchmarks": read_benchmarks,
}


def find_measurements(runs: list[Run], tables: list[PaperTable]) -> tuple[dict[Cell, Measurement], list[Run]]:
    """The newest value of each cell that was measured, and the runs that are about no cell.

    Raises:
        ValueError: a record names a cell that the paper does not have.
    """
    by_id = {table.id: table for table in tables}
    known = {cell for table in tables for cell in table.cells()}
    found: dict[Cell, Measurement] = {}
    others = []
    for run in runs:
        named = [
            ((cell["table"], cell["row"], cell["column"]), cell["value"]) for cell in run.record.get("paper_cells", [])
        ]
        for cell, _ in named:
            if cell not in known:
                raise ValueError(f"The record {run.id!r} has a value for {' / '.join(cell)}, which the paper has not.")
        reader = READERS.get(run.record.get("benchmark", ""))
        read = [(cell, value) for cell, value in reader(run, by_id) if cell in known] if reader else []
        found.update({cell: Measurement(value, run.id) for cell, value in [*read, *named]})
        if not read and not named:
            others.append(run)
    return found, others
