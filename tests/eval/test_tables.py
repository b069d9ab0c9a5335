"""`python -m minicpm4_hf.eval tables`: the paper's numbers checked against each other, cells from records, errors."""

import json
import re
import statistics
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from minicpm4_hf.eval.__main__ import main
from minicpm4_hf.eval.tables.estimates import (
    BYTES_SHARE,
    FLOPS_SHARE,
    GIB,
    PEAK_BYTES,
    PEAK_FLOPS,
    PLANS,
    Workload,
    count_parameters,
    estimate,
    render_estimates,
)
from minicpm4_hf.eval.tables.measured import RESULTS, find_measurements, read_runs, spell_task
from minicpm4_hf.eval.tables.paper import PAPER_TABLES, read_paper
from minicpm4_hf.eval.tables.render import compare_ratios, render_ratios
from minicpm4_hf.presets import PRESETS, build_config

TABLES = {table.id: table for table in read_paper()}
README = Path(PAPER_TABLES).parent / "README.md"


def column(table, name):
    place = TABLES[table].columns.index(name)
    return {row: line[place] for row, line in zip(TABLES[table].rows, TABLES[table].values)}


def test_ratios_in_the_readme_are_those_of_the_records():
    """Also printed by `python -m minicpm4_hf.eval tables --table figure-1`."""
    assert render_ratios(compare_ratios(read_paper(), read_runs(RESULTS))) in README.read_text(encoding="utf-8")


def test_tables_are_whole():
    assert len(TABLES) == len(read_paper()) == 16
    for table in TABLES.values():
        assert len(table.values) == len(table.rows) and {len(line) for line in table.values} == {len(table.columns)}
        assert not table.models or len(table.models) == len(table.columns)
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", table.source) and table.origin and table.unit and table.title
        for _, value in sorted(table.cells().items()):
            assert table.decimals is None or round(value, table.decimals) == value
    assert sum(len(table.cells()) for table in TABLES.values()) > 600


@pytest.mark.parametrize(
    ("table", "row"),
    [
        ("table-2-en", "Average"),
        ("table-2-zh", "Average"),
        ("table-3-ternary", "Avg"),
        ("table-4", "Avg"),
        ("table-5", "Avg"),
    ],
)
def test_averages_are_the_means_of_their_columns(table, row):
    """The paper prints them, so that a wrong digit above shows."""
    for name in TABLES[table].columns:
        values = column(table, name)
        mean = statistics.mean(value for key, value in values.items() if key != row)
        assert values[row] == pytest.approx(mean, abs=0.0151), name


def test_tables_agree_with_each_other():
    for first, second in (("Qwen3-0.6B BF16", "Qwen3-0.6B (36T)"), ("Gemma3-1B BF16", "Gemma3-1B (2T)")):
        assert column("table-3-ternary", first) == column("table-5", second)


def test_speed_ups_of_the_text():
    """The paper's text states them for 128K: 4.8 and 7.3 on Orin, 2.6 and 5.2 on the RTX 4090."""
    speeds = column("figure-1", "128K")
    found = [
        speeds[f"{place}, MiniCPM4-8B"] / speeds[f"{place}, Qwen-3-8B"]
        for place in ("Jetson AGX Orin prefill", "Jetson AGX Orin decode", "RTX 4090 prefill", "RTX 4090 decode")
    ]
    assert found == pytest.approx([4.8, 7.3, 2.6, 5.2], abs=0.06)


def write(folder, name, record):
    (folder / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")


def tables(folder, capsys, *arguments):
    assert main(["tables", "--results", str(folder), *arguments]) == 0
    return capsys.readouterr().out


def document(folder, capsys, *arguments):
    return json.loads(tables(folder, capsys, "--json", *arguments))


def measured_cells(found):
    return [
        (table["id"], cell["row"], cell["column"], cell["measured"], cell["run"], cell["difference"])
        for table in found["tables"]
        for cell in table["cells"]
        if cell["measured"] is not None
    ]


def test_nothing_measured_is_empty_and_says_so(tmp_path, capsys):
    shown = tables(tmp_path, capsys)
    assert shown.count("Never measured: all cells are empty.") == len(TABLES)
    assert "| MMLU | MiniCPM4-8B (8T) | 75.83 |  |  |" in shown
    found = document(tmp_path, capsys)
    assert measured_cells(found) == [] and found["other_runs"] == []
    assert sum(len(table["cells"]) for table in found["tables"]) == sum(len(t.cells()) for t in TABLES.values())
    assert {cell["difference"] for table in found["tables"] for cell in table["cells"]} == {None}


def test_benchmarks(tmp_path, capsys):
    rows = [{"task": "mmlu", "score": 55.0}, {"task": "MATH-500", "score": 30.1}, {"task": "unheard-of", "score": 1.0}]
    record = {
        "benchmark": "benchmarks",
        "model": {"name": "openbmb/MiniCPM4-0.5B"},
        "date": "2026-01-02",
        "rows": rows,
    }
    write(tmp_path, "first", record)
    write(tmp_path, "other", {**record, "model": {"name": "minicpm4-books"}})
    cells = measured_cells(document(tmp_path, capsys))
    name = "MiniCPM4-0.5B (1T)"
    assert [cell[:5] for cell in cells] == [
        ("table-5", "MMLU", name, 55.0, "first"),
        ("table-5", "MATH500", name, 30.1, "first"),
    ]
    assert [cell[5] for cell in cells] == pytest.approx([55.0 - 55.55, 30.1 - 29.6])
    shown = tables(tmp_path, capsys, "--table", "table-5")
    assert f"| MMLU | {name} | 55.55 | 55.00 (`first`) | -0.55 |" in shown
    assert f"| MATH500 | {name} | 29.60 | 30.10 (`first`) | +0.50 |" in shown
    assert "2 of 90 cells measured; empty ones never were." in shown
    # A newer run takes the place of an older one, whatever their names.
    write(tmp_path, "again", {**record, "date": "2026-03-01", "rows": [{"task": "MMLU", "score": 56.0}]})
    cells = measured_cells(document(tmp_path, capsys))
    assert [cell[3:5] for cell in cells] == [(56.0, "again"), (30.1, "first")]
    assert document(tmp_path, capsys)["other_runs"] == [
        {"run": "other", "benchmark": "benchmarks", "model": "minicpm4-books", "command": None}
    ]
    assert [spell_task(name) for name in ("MATH-500", "MATH500", "C-Eval", "CEval")] == ["math500"] * 2 + ["ceval"] * 2


def test_needle(tmp_path, capsys):
    depths = [round(place / 9, 6) for place in range(10)]
    rows = [
        {"mode": mode, "length": length, "depths": depths, "solved_by_depth": [4] * 9 + [solved]}
        for mode, solved in (("dense", 0), ("sparse", 2))
        for length in (2048, 4096)
    ]
    record = {
        "benchmark": "memory",
        "model": {"name": "MiniCPM4-8B"},
        "parts": {"needle": {"samples": 4, "rows": rows}},
    }
    write(tmp_path, "needle", record)
    cells = measured_cells(document(tmp_path, capsys))
    assert [cell[3] for cell in cells] == [100.0] * 9 + [50.0]
    assert cells[-1] == ("figure-7", "depth 100 %", "MiniCPM4-8B", 50.0, "needle", -50.0)
    write(tmp_path, "needle", {**record, "model": {"name": "minicpm4-books"}})
    assert measured_cells(document(tmp_path, capsys)) == []


def speed_record(preset, gpu, tokens, rival):
    row = {"contestant": "ours-sparse", "tokens": tokens, "tokens_per_s": 7000.0, "ratios": {rival: 2.5}}
    return {
        "benchmark": "speed",
        "preset": preset,
        "dtype": "bfloat16",
        "machine": {"cpu": "CPU", "threads": 2, **({"gpu": gpu} if gpu else {})},
        "prompt": [row, {"contestant": rival, "tokens": tokens, "tokens_per_s": 2800.0, "ratios": {rival: 1.0}}],
        "decode": [],
    }


def test_speed(tmp_path, capsys):
    write(tmp_path, "gpu", speed_record("MiniCPM4-8B", "NVIDIA GeForce RTX 4090", 131072, "qwen3-8b"))
    write(tmp_path, "cpu", speed_record("MiniCPM4-0.5B", None, 131072, "qwen3-0.6b"))
    write(tmp_path, "odd", speed_record("MiniCPM4-8B", "NVIDIA GeForce RTX 4090", 512, "qwen3-8b"))
    found = document(tmp_path, capsys, "--table", "figure-1")
    assert [cell[1:5] for cell in measured_cells(found)] == [
        ("RTX 4090 prefill, Qwen-3-8B", "128K", 2800.0, "gpu"),
        ("RTX 4090 prefill, MiniCPM4-8B", "128K", 7000.0, "gpu"),
    ]
    (line,) = [line for line in found["ratios"] if line["phase"] == "prefill" and line["tokens"] == 131072]
    assert line["RTX 4090"] == pytest.approx(7169 / 2786) and line["Jetson AGX Orin"] == pytest.approx(1097 / 230)
    assert [(entry["run"], entry["ratio"]) for entry in line["measured"]] == [("cpu", 2.5), ("gpu", 2.5)]
    (line,) = [line for line in found["ratios"] if line["tokens"] == 512]
    assert line["RTX 4090"] is None and line["measured"][0]["run"] == "odd"
    shown = tables(tmp_path, capsys, "--table", "figure-1")
    assert "| decode | 32,768 | 4.08 | 3.22 |  |  |" in shown
    assert "2.5 (`cpu`); 2.5 (`gpu`) | MiniCPM4-0.5B and qwen3-0.6b, bfloat16, CPU, 2 threads; " in shown
    assert document(tmp_path, capsys, "--table", "table-5")["ratios"] == []


def test_cells_that_a_record_names(tmp_path, capsys):
    cell = {"table": "figure-5", "row": "loss", "column": "40 %", "value": 3.2}
    write(tmp_path, "fp8", {"benchmark": "qat", "paper_cells": [cell]})
    (found,) = measured_cells(document(tmp_path, capsys))
    assert found[:5] == ("figure-5", "loss", "40 %", 3.2, "fp8") and found[5] == pytest.approx(3.2 - 3.155)
    write(tmp_path, "fp8", {"benchmark": "qat", "paper_cells": [{**cell, "column": "45 %"}]})
    assert main(["tables", "--results", str(tmp_path)]) == 2
    shown = capsys.readouterr().err
    assert "The record 'fp8' has a value for figure-5 / loss / 45 %, which the paper has not." in shown


def test_every_measured_value_has_its_record(capsys):
    """What the package itself shows comes from its records: nothing without one, and with none of them nothing."""
    found, others = find_measurements(read_runs(RESULTS), list(TABLES.values()))
    names = {path.stem for path in RESULTS.glob("*.json")}
    assert {measurement.run for measurement in found.values()} <= names
    assert {run.id for run in others} <= names
    for entry in json.loads(tables(RESULTS, capsys, "--json"))["ratios"]:
        for measured in entry["measured"]:
            record = json.loads((RESULTS / f"{measured['run']}.json").read_text())
            phase = "prompt" if entry["phase"] == "prefill" else "decode"
            assert measured["ratio"] in [
                ratio
                for row in record[phase]
                if row["tokens"] == entry["tokens"] and row["contestant"] == "ours-sparse"
                for ratio in row["ratios"].values()
            ]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "is not JSON in UTF-8"),
        (b"\xff\xfe", "is not JSON in UTF-8"),
        (b"[]", "is not a record: it does not say its `benchmark`"),
        (b"{}", "is not a record: it does not say its `benchmark`"),
    ],
)
def test_wrong_records(content, sentence, tmp_path, capsys):
    (tmp_path / "x.json").write_bytes(content)
    assert main(["tables", "--results", str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--table", "table-9"], "There is no table 'table-9'; there are table-1, "),
        (["--results", "absent"], "There is no folder of records 'absent'; name it with `--results`."),
        (["--output", "absent/t.md"], "The folder of 'absent/t.md' does not exist."),
    ],
)
def test_wrong_input(arguments, sentence, capsys):
    assert main(["tables", *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_output_file(tmp_path, capsys):
    printed = tables(RESULTS, capsys)
    assert tables(RESULTS, capsys, "--output", str(tmp_path / "t.md")) == ""
    assert (tmp_path / "t.md").read_text(encoding="utf-8") == printed


@pytest.mark.parametrize("name", [name for name in PRESETS if "CANN-1B" not in name and "CANN-3B" not in name])
def test_parameters_are_counted(name):
    config = build_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert count_parameters(config) == (
        sum(parameter.numel() for parameter in model.parameters()),
        sum(parameter.numel() for parameter in model.model.layers.parameters()),
    )


def test_estimate_by_hand():
    config = build_config("MiniCPM4-0.5B")
    total, layers = count_parameters(config)
    hours, memory = estimate(config, Workload(samples=10, prompt_tokens=3, new_tokens=0, batch=1), None)
    flops = 3 * 2 * layers + 4 * 24 * 16 * 64 * (1 + 2 + 3)
    assert hours == pytest.approx(10 * flops / (PEAK_FLOPS * FLOPS_SHARE) / 3600)
    assert memory == 2 * total + 4 * 24 * 2 * 64 * 3 + 2 * GIB
    more, larger = estimate(config, Workload(samples=10, prompt_tokens=3, new_tokens=5, batch=2), None)
    read = total + 4 * 24 * 2 * 64 * 8  # half of the weights' bytes, as two sequences share them
    assert more - hours == pytest.approx(10 * 5 * read / (PEAK_BYTES * BYTES_SHARE) / 3600)
    assert larger - memory == 4 * 24 * 2 * 64 * (2 * 8 - 3)


def test_estimates_name_only_presets_and_stand_in_the_readme(capsys):
    assert {model for _, models, _ in PLANS for model in models} <= set(PRESETS)
    assert main(["tables", "--estimates"]) == 0
    printed = capsys.readouterr().out
    assert printed == render_estimates() + "\n" and "(estimate)" in printed
    assert printed in README.read_text(encoding="utf-8"), "put `python -m minicpm4_hf.eval tables --estimates` there"
