"""Every figure in the model card and in README comes from a committed record."""

import copy
import hashlib
import json
import re
from pathlib import Path

import pytest

from minicpm4_hf.eval.model_card.__main__ import (
    CARDS,
    CHECKPOINTS,
    CURVE,
    NEEDLE,
    README_TEMPLATE,
    all_fields,
    draw,
    fill_template,
    main,
    read_records,
    render,
    replace_figures,
)
from minicpm4_hf.eval.model_card.figures import benchmark_table, ruler_table
from minicpm4_hf.eval.model_card.targets import check_targets, needle_shares, target_table
from minicpm4_hf.shipped import SHIPPED, shipped_checkpoint

ROOT = Path(__file__).resolve().parent.parent
EACH = pytest.mark.parametrize("name", SHIPPED)


@pytest.fixture
def records():
    return copy.deepcopy(read_records(ROOT, SHIPPED[0]))


def test_committed_texts_are_what_the_records_say():
    for path, text in render(ROOT).items():
        assert (ROOT / path).read_text(encoding="utf-8") == text, (
            f"run `python -m minicpm4_hf.eval.model_card` ({path})"
        )


def test_committed_figures_are_what_the_records_say():
    matplotlib = pytest.importorskip("matplotlib")
    drawn, again = draw(ROOT), draw(ROOT)
    assert drawn == again
    for path in (CURVE, NEEDLE):
        committed = (ROOT / path).read_text(encoding="utf-8")
        # The words and numbers; another release of matplotlib draws the lines a little differently.
        words = [re.findall(r"<text[^>]*>([^<]+)</text>", text) for text in (committed, drawn[path])]
        assert words[0] == words[1] and len(words[0]) > 10, f"run `python -m minicpm4_hf.eval.model_card` ({path})"
    if f"Matplotlib v{matplotlib.__version__}," in (ROOT / CURVE).read_text(encoding="utf-8"):
        assert (ROOT / CURVE).read_text(encoding="utf-8") == drawn[CURVE]


def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@EACH
def test_the_records_are_of_the_weights_that_are_shipped(name):
    folder, records = shipped_checkpoint(name), read_records(ROOT, name)
    measured, training = records["memory"]["model"], records["training"]
    assert measured["weights"] == {"model.safetensors": sha256_of(folder / "model.safetensors")}
    assert measured["tokenizer"] == {"tokenizer.json": sha256_of(folder / "tokenizer.json")}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["sparse_config"] == measured["sparse_config"]
    assert config["use_cache"] and "auto_map" not in config
    # One text, the same bytes, in all of them; and not in what was trained on.
    texts = training["texts"]
    held_out = {source["name"]: source["sha256"] for source in texts["held_out"]["sources"]}
    assert {book: text["sha256"] for book, text in records["memory"]["texts"].items()} == held_out
    assert not set(held_out.values()) & {source["sha256"] for source in texts["train"]["sources"]}


def test_the_records_of_the_first_checkpoint_are_of_one_training(records):
    weights = sha256_of(shipped_checkpoint() / "model.safetensors")
    assert records["training"]["weights"] == {"model.safetensors": weights}
    assert records["demo"]["sparse_config"] == records["memory"]["model"]["sparse_config"]
    compressed = {f"{name}.txt": text["sha256"] for name, text in records["compressors"]["texts"].items()}
    assert compressed == {name: text["sha256"] for name, text in records["memory"]["texts"].items()}


def test_the_ternary_checkpoint_is_small_and_packed_and_of_its_training():
    folder, training = shipped_checkpoint("minicpm4-books-ternary"), read_records(ROOT, SHIPPED[1])["training"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3_000_000
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == "bitcpm"
    assert training["packed"] == {"model.safetensors": sha256_of(folder / "model.safetensors")}
    assert training["recipe"]["model"] == SHIPPED[0]
    assert training["started_from"] == {"model.safetensors": sha256_of(shipped_checkpoint() / "model.safetensors")}
    assert (folder / "tokenizer.json").read_bytes() == (shipped_checkpoint() / "tokenizer.json").read_bytes()


@EACH
def test_the_results_add_up_to_the_record(name):
    """`memory.jsonl` has each answer; `memory.json` their sums."""
    lines = (ROOT / CARDS / "records" / name / "memory.jsonl").read_text(encoding="utf-8").splitlines()
    solved, asked = {}, {}
    for entry in map(json.loads, lines):
        if entry["part"] in ("addition", "tools", "needle"):
            key = (entry["part"], entry["case"].get("length"), entry["case"].get("mode"))
            solved[key] = solved.get(key, 0) + entry["result"]["solved"]
            asked[key] = asked.get(key, 0) + 1
    parts = read_records(ROOT, name)["memory"]["parts"]
    expected = {(part, None, None): parts[part] for part in ("addition", "tools")}
    expected |= {("needle", row["length"], row["mode"]): row for row in parts["needle"]["rows"]}
    assert solved == {key: row["solved"] for key, row in expected.items()}
    assert asked == {key: row["asked"] for key, row in expected.items()}


def test_templates_have_no_figures_of_their_own(records):
    """A number that stands in a template is a name, a date or a setting, and one of these."""
    paths = (*(CARDS / f"{name}.template.md" for name in SHIPPED), README_TEMPLATE)
    text = "".join((ROOT / path).read_text(encoding="utf-8") for path in paths)
    text = re.sub(r"\{[^}]*\}|`[^`\n]*`|arXiv:[\d.]+|\(\d+\)", "", text)
    numbers = set(re.findall(r"\d[\d.,]*\d|\d", text))
    # apache-2.0, MiniCPM4, v2, heads; columns; bfloat16, SHA-256; the longest dense stage, checked below.
    assert numbers <= {"2.0", "4", "8", "2", "32", "16", "256", "4,096"}
    dense = [stage["length"] for stage in records["training"]["recipe"]["stages"] if stage["sparse_config"] is None]
    assert max(dense) == 4096


def test_targets_are_computed(records):
    reached = {row.name: row.reached for row in check_targets(records)}
    assert len(reached) == 10 and set(reached.values()) == {True, False}
    parts = records["memory"]["parts"]
    for row in parts["needle"]["rows"]:
        row["solved"] = row["asked"]
    for row in parts["bits-per-byte"]["rows"]:
        row["bits_per_byte"] = 1.5
    assert all(row.reached for row in check_targets(records))
    assert "**no**" not in target_table(records)


def lower(row, share):
    """The right answers of a row, just below a share of those asked."""
    row["solved"] = int(share * row["asked"])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda parts: parts["addition"].update(accuracy=0.899), "sums of"),
        (lambda parts: parts["sparse-dense"]["rows"][0].update(ratio=1.0051), "perplexity at 8,192"),
        (lambda parts: parts["sparse-dense"]["rows"][1].update(attended_share=0.071), "perplexity at 32,768"),
        (lambda parts: lower(parts["needle"]["rows"][0], 0.999), "a fact in 2,048"),
        (lambda parts: lower(parts["needle"]["rows"][7], 0.949), "a fact in 32,768"),
    ],
)
def test_a_target_is_missed_by_a_little(records, change, name):
    parts = records["memory"]["parts"]
    for row in parts["needle"]["rows"]:
        row["solved"] = row["asked"]
    for row in parts["bits-per-byte"]["rows"]:
        row["bits_per_byte"] = 1.5
    change(parts)
    missed = [row.name for row in check_targets(records) if not row.reached]
    assert missed[0].startswith(name) and missed[1:] in ([], ["the same, sparse less dense, by length"])


def test_shares_are_of_what_was_asked(records):
    shares = needle_shares(records["memory"])
    assert list(shares) == [2048, 4096, 8192, 32768] and all(
        set(found) == {"dense", "sparse"} for found in shares.values()
    )
    assert all(0 <= share <= 1 for found in shares.values() for share in found.values())


@EACH
def test_the_card_says_what_the_checkpoint_is(name):
    text = (ROOT / CARDS / f"{name}.md").read_text(encoding="utf-8")
    assert text.startswith("---\nlicense: apache-2.0\n")
    first = ("Targets", "Data") if name == SHIPPED[0] else ()
    for heading in (*first, "What falls short", "Retrieval", "Prediction", "Training", "Limits"):
        assert f"\n## {heading}\n" in text
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / CARDS / link).is_file()
    assert "](" not in (ROOT / CHECKPOINTS / name / "README.md").read_text(encoding="utf-8")


def test_tables_of_several_records():
    dense, sparse = ({"model": {"sparse_config": settings}} for settings in (None, {"topk": 3}))
    rows = [{"task": name, "samples": 9, "score": score} for name, score in (("a", 1.0), ("b", 22.22))]
    text = benchmark_table([{**dense, "rows": rows[:1]}, {**sparse, "rows": rows[::-1]}, {**dense, "rows": rows[1:]}])
    assert text.splitlines()[2:] == ["| a | 9 | 1.0 | 1.0 |", "| b | 9 | 22.2 | 22.2 |"]
    assert text.startswith("| | samples | dense | sparse |")
    text = benchmark_table([{**dense, "rows": rows[:1]}, {**sparse, "rows": rows[1:]}])
    assert text.splitlines()[2:] == ["| a | 9 | 1.0 | - |", "| b | 9 | - | 22.2 |"]

    def record(length, score):
        rows = [
            {"length": length, "mode": mode, "task": "vt", "samples": 5, "score": score + add}
            for mode, add in (("dense", 0), ("sparse", 1))
        ]
        return {"rows": rows, "averages": rows}

    text = ruler_table([record(4096, 50.0), record(2048, 80.0)])
    assert text.splitlines()[0] == "| dense / sparse | 2,048 (5 a task) | 4,096 (5 a task) |"
    assert text.splitlines()[2:] == [f"| {name} | 80.0 / 81.0 | 50.0 / 51.0 |" for name in ("vt", "average")]


def test_a_figure_without_a_record_is_an_error(tmp_path, capsys):
    with pytest.raises(ValueError, match="'speed', which is in no record; measure it first"):
        fill_template("{training[speed]}", all_fields(ROOT)[SHIPPED[0]])
    with pytest.raises(ValueError, match="markers"):
        replace_figures("no markers", "1")
    assert main(["--root", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
