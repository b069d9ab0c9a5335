"""The paper and the measurements side by side, as one JSON document and as Markdown."""

from .measured import SPEED_NAMES, SPEED_PHASES, TOKENS_A_K, Measurement, Run
from .paper import Cell, PaperTable

OURS = "ours-sparse"
RIVALS = ("qwen3-0.6b", "qwen3-8b")  # contestants of `speed` that stand for the paper's Qwen3-8B
PAPER_DEVICES = ("Jetson AGX Orin", "RTX 4090")


def build_document(
    tables: list[PaperTable], measured: dict[Cell, Measurement], runs: list[Run], others: list[Run]
) -> dict:
    """Every cell of the tables, the ratios to Qwen3, and the runs that are about no cell; ready for JSON.

    A cell that was never measured has None for its measured value, its run and the difference.
    """
    return {
        "tables": [
            {
                "id": table.id,
                "label": table.label,
                "title": table.title,
                "unit": table.unit,
                "source": table.source,
                "origin": table.origin,
                "cells": [describe_cell(cell, value, measured.get(cell)) for cell, value in table.cells().items()],
            }
            for table in tables
        ],
        "ratios": compare_ratios(tables, runs),
        "other_runs": [describe_run(run) for run in others],
    }


def describe_cell(cell: Cell, value: float, found: Measurement | None) -> dict:
    """A cell's three columns; the difference is measured less paper."""
    return {
        "row": cell[1],
        "column": cell[2],
        "paper": value,
        "measured": found and found.value,
        "run": found and found.run,
        "difference": found and found.value - value,
    }


def describe_run(run: Run) -> dict:
    """What a run was."""
    kind = run.record.get("benchmark", run.record.get("task"))
    return {"run": run.id, "benchmark": kind, "model": run.model or None, "command": run.record.get("command")}


def compare_ratios(tables: list[PaperTable], runs: list[Run]) -> list[dict]:
    """Our speed over Qwen3's: the paper's, of 8B models on its devices, and each run's, of its own shapes."""
    paper = next((table.cells() for table in tables if table.id == "figure-1"), {})
    measured: dict[tuple[str, int], list[dict]] = {}
    for run in runs:
        if run.record.get("benchmark") != "speed":
            continue
        for measure, phase in SPEED_PHASES.items():
            for row in run.record[measure]:
                for rival in RIVALS:
                    if row["contestant"] == OURS and rival in row["ratios"]:
                        entry = {"run": run.id, "ratio": row["ratios"][rival], "of": describe_shapes(run, rival)}
                        measured.setdefault((phase, row["tokens"]), []).append(entry)
    lengths = {int(column[:-1]) * TOKENS_A_K for _, _, column in paper} | {tokens for _, tokens in measured}
    lines = []
    for phase in SPEED_PHASES.values():
        for tokens in sorted(lengths):
            line = {"phase": phase, "tokens": tokens}
            for device in PAPER_DEVICES:
                names = [f"{device} {phase}, {SPEED_NAMES[name]}" for name in (OURS, "qwen3-8b")]
                pair = [paper.get(("figure-1", name, f"{tokens // TOKENS_A_K}K")) for name in names]
                line[device] = pair[0] / pair[1] if all(pair) and tokens % TOKENS_A_K == 0 else None
            line["measured"] = measured.get((phase, tokens), [])
            if line["measured"] or any(line[device] for device in PAPER_DEVICES):
                lines.append(line)
    return lines


def describe_shapes(run: Run, rival: str) -> str:
    """Two models and the device that they ran on."""
    machine = run.record.get("machine", {})
    device = machine.get("gpu") or f"{machine.get('cpu', 'CPU')}, {machine.get('threads', '?')} threads"
    return f"{run.record.get('preset')} and {rival}, {run.record.get('dtype')}, {device}"


def render_markdown(document: dict, tables: list[PaperTable]) -> str:
    """The document for a reader."""
    by_id = {table.id: table for table in tables}
    parts = [render_table(entry, by_id[entry["id"]]) for entry in document["tables"]]
    if document["ratios"]:
        parts.append(render_ratios(document["ratios"]))
    if document["other_runs"]:
        parts.append(render_others(document["other_runs"]))
    return "\n\n".join(parts) + "\n"


def render_table(entry: dict, table: PaperTable) -> str:
    """A heading, what was measured, and a line a cell."""
    cells = entry["cells"]
    count = sum(cell["measured"] is not None for cell in cells)
    said = f"{count} of {len(cells)} cells measured" + ("; empty ones never were." if count < len(cells) else ".")
    lines = [
        f"## {table.label}: {table.title}",
        "",
        f"{table.source}, {table.origin}; {table.unit}. {said if count else 'Never measured: all cells are empty.'}",
        "",
        "| | | paper | measured (run) | difference |",
        "|---|---|---|---|---|",
    ]
    for cell in cells:
        measured, difference = "", ""
        if cell["measured"] is not None:
            measured = f"{table.format(cell['measured'])} (`{cell['run']}`)"
            difference = f"{'+' if cell['difference'] > 0 else ''}{table.format(cell['difference'])}"
        paper = table.format(cell["paper"])
        lines.append(f"| {cell['row']} | {cell['column']} | {paper} | {measured} | {difference} |")
    return "\n".join(lines)


def render_ratios(ratios: list[dict]) -> str:
    """MiniCPM4's speed over Qwen3's."""
    lines = [
        "## Figure 1 as ratios: MiniCPM4's speed over Qwen3's",
        "",
        "The paper's are of 8B models, with 4-bit weights and FR-Spec for MiniCPM4, and follow from its figure. "
        "Measured ones are of other shapes and devices, so there is no difference to take; empty ones never were.",
        "",
        f"| | tokens | {' | '.join(f'paper, {device}' for device in PAPER_DEVICES)} | measured (run) | of |",
        "|---|---|---|---|---|---|",
    ]
    for line in ratios:
        paper = " | ".join("" if line[device] is None else f"{line[device]:.2f}" for device in PAPER_DEVICES)
        measured = "; ".join(f"{entry['ratio']:.3g} (`{entry['run']}`)" for entry in line["measured"])
        shapes = "; ".join(dict.fromkeys(entry["of"] for entry in line["measured"]))
        lines.append(f"| {line['phase']} | {line['tokens']:,} | {paper} | {measured} | {shapes} |")
    return "\n".join(lines)


def render_others(runs: list[dict]) -> str:
    """Runs that measured something which the paper has not."""
    lines = ["## Runs about no cell of the paper", "", "| run | benchmark | model |", "|---|---|---|"]
    lines += [f"| `{run['run']}` | {run['benchmark']} | {run['model'] or ''} |" for run in runs]
    return "\n".join(lines)
