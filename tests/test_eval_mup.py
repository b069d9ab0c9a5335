"""`python -m minicpm4_hf.eval.mup`: small sweeps against arithmetic by hand, resuming, wrong input, the records."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

from minicpm4_hf.eval.mup.__main__ import build_parser, main, read_settings
from minicpm4_hf.eval.mup.coordinates import KINDS, Observer, slope
from minicpm4_hf.eval.mup.coordinates import summarize as summarize_coordinates
from minicpm4_hf.eval.mup.experiment import Cell, build_model, read_corpus, train
from minicpm4_hf.eval.mup.figures import plot_record
from minicpm4_hf.eval.mup.learning_rates import find_best
from minicpm4_hf.eval.mup.learning_rates import summarize as summarize_rates

RESULTS = Path(__file__).resolve().parent.parent / "eval" / "results"
SMALL = "--widths 32 64 --head-dim 16 --num-hidden-layers 1 --length 16 --batch 4 --seeds 0 --threads 1".split()
COORDINATES = ["coordinates", *SMALL, "--steps", "2"]
RATES = ["learning-rates", *SMALL, "--steps", "4", "--num-warmup-steps", "1", "--num-decay-steps", "2"]
RATES += ["--learning-rates", "0.001", "0.01", "0.1", "--dtype", "float32"]


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """Two books to train on, and the two that must not be."""
    folder = tmp_path_factory.mktemp("books")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_bytes(bytes(rng.integers(97, 105, 2000, dtype=np.uint8)))
    for name in ("dracula", "emma"):
        (folder / f"{name}.txt").write_bytes(b"\xff" * 2000)
    return folder


def run(arguments, books, output):
    return main([*arguments, "--books", str(books), "--output", str(output)])


@pytest.fixture(scope="module")
def records(books, tmp_path_factory):
    """The record of each experiment, and its file."""
    folder = tmp_path_factory.mktemp("records")
    for arguments in (COORDINATES, RATES):
        assert run(arguments, books, folder / f"{arguments[0]}.json") == 0
    return {path.stem: (json.loads(path.read_text()), path) for path in folder.iterdir()}


def settings_of(arguments, books="books"):
    return read_settings(build_parser().parse_args([*arguments, "--books", str(books), "--output", "x"]))


def test_records_say_what_was_run(records, books):
    for name, (record, _) in records.items():
        assert record["benchmark"] == f"mup-{name}"
        assert record["command"].startswith(f"python -m minicpm4_hf.eval.mup {name} --books {books.name} --output ")
        assert "/" not in record["command"] and "--batch 4" in record["command"]
        assert set(record["books"]) == {"a", "b"} and record["books"]["a"]["bytes"] == 2000
        assert record["versions"]["torch"] == version("torch")
        assert record["machine"]["threads"] == 1
    cells = records["learning-rates"][0]["cells"]
    assert len(cells) == 2 * 2 * 3 and len(records["coordinates"][0]["cells"]) == 2 * 2
    assert all(len(cell["losses"]) == 4 and cell["losses"][0] > 0 for cell in cells)


def test_the_command_in_the_record_gives_its_settings(records):
    record, _ = records["coordinates"]
    words = record["command"].split()[3:]
    again = read_settings(build_parser().parse_args(words))
    assert json.loads(json.dumps(vars(again))) == record["settings"]


def test_a_cell_by_hand(books):
    """The first step written out: in Adam's, every weight moves by its rate, here at the schedule's floor."""
    arguments = [*RATES, "--widths", "32", "128"]
    settings = settings_of(arguments, books)
    corpus = read_corpus(books, settings)
    cell = Cell(parametrization="mup", width=128, learning_rate=0.01, seed=0)
    model = build_model(settings, cell)
    assert model.config.num_attention_heads == 8 and model.config.num_key_value_heads == 2
    assert model.config.logits_scaling == 0.5 and model.lm_head.weight is model.model.embed_tokens.weight
    up = model.model.layers[0].mlp.up_proj.weight
    assert up.std().item() == pytest.approx(0.1 * math.sqrt(2), rel=0.02)

    batch = corpus.batch(settings, 0, 0)
    logits = model(batch[:, :-1]).logits
    loss = -logits.log_softmax(-1).gather(2, batch[:, 1:, None]).mean()
    loss.backward()
    one_step = settings_of([*arguments, "--steps", "1", "--num-decay-steps", "0"], books)
    trained, result = train(one_step, cell, corpus)
    assert result["losses"] == [pytest.approx(loss.item(), abs=1e-4)]
    assert result["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    after = dict(trained.named_parameters())
    norm = math.sqrt(sum(parameter.grad.square().sum().item() for parameter in model.parameters()))
    for name, before in model.named_parameters():
        is_matrix = "proj" in name
        rate = 0.05 * 0.01 * (2 if is_matrix else 1)
        expected = before * (1 - rate * (0.1 if is_matrix else 0.0)) - rate * before.grad.sign()
        clear = before.grad.abs() > 1e-5 * max(1.0, norm)  # below, Adam's epsilon shows
        assert clear.any()
        torch.testing.assert_close(after[name][clear].detach(), expected[clear].detach(), atol=5e-3 * rate, rtol=0)


def test_the_corpus_leaves_out_what_it_must(books):
    settings = settings_of(RATES, books)
    corpus = read_corpus(books, settings)
    text = (books / "a.txt").read_bytes(), (books / "b.txt").read_bytes()
    assert corpus.training.tobytes() == text[0][:1900] + text[1][:1900]
    assert corpus.held_out.tobytes() == text[0][1900:] + text[1][1900:]
    windows = corpus.held_out_windows(settings)
    assert windows.shape == (128, 17)
    assert bytes(windows[0].tolist()) == text[0][1900:1917] and bytes(windows[-1].tolist()) == text[1][-17:]
    batches = [corpus.batch(settings, seed, step) for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert batches[0].shape == (4, 17) and torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2]) and not torch.equal(batches[0], batches[3])


def test_activations(books):
    """Against transformers' own hidden states and the logits, before and after the weights changed."""
    settings = settings_of([*COORDINATES, "--num-hidden-layers", "2"], books)
    model = build_model(settings, Cell(parametrization="mup", width=64, learning_rate=0.01, seed=0))
    probe = torch.arange(24).view(2, 12)
    observer = Observer(probe)
    expected = {"scale": [], "change": []}
    first = None
    for _ in range(2):
        hooks = [len(module._forward_hooks) for module in model.modules()]
        observer(model)
        assert hooks == [len(module._forward_hooks) for module in model.modules()]
        with torch.no_grad():
            output = model(probe, output_hidden_states=True)
        # [embedding x 12, layer 1, last layer after the norm]: the last layer's own output is not among them
        tensors = (output.hidden_states[0] / 12, output.hidden_states[-1], output.logits)
        first = first or tensors
        expected["scale"].append([tensor.square().mean().sqrt().item() for tensor in tensors])
        expected["change"].append([(a - b).square().mean().sqrt().item() for a, b in zip(tensors, first)])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
    for measure in ("scale", "change"):
        for place, kind in enumerate(("embedding", "hidden state", "logits")):
            values = [values[place] for values in expected[measure]]
            assert getattr(observer, measure)[kind] == pytest.approx(values, rel=1e-4, abs=1e-7), (measure, kind)
    assert all(len(values) == 2 and values[1] > 0 for values in observer.change.values())
    layers = [module for name, module in model.named_modules() if name.endswith("o_proj")]
    assert len(layers) == len(observer.first["attention output"]) == 2


def test_slopes_of_made_up_sizes(books):
    settings = settings_of([*COORDINATES, "--seeds", "0", "1", "--steps", "1"])
    powers = {"mup": 0.0, "standard": 1.5}
    cells = []
    for cell in settings.cells():
        size = cell.width ** powers[cell.parametrization] * (1 + cell.seed)
        values = {kind: [size, 3 * size] for kind in KINDS.values()}
        change = {kind: [0.0, size] for kind in KINDS.values()}
        cells.append({**vars(cell), "scale": values, "change": change})
    summary = summarize_coordinates(settings, cells)
    assert summary["largest_at_the_end"] == {
        "mup": {"scale": 0, "change": 0},
        "standard": {"scale": 1.5, "change": 1.5},
    }
    assert summary["slopes"]["standard"]["change"]["logits"] == [None, 1.5]
    assert slope([1, 2, 4], [8.0, 4.0, 2.0]) == -1
    assert slope([128, 512], [1.0, 2.0]) == 0.5
    assert slope([128, 512], [1.0, None]) is None and slope([128, 512], [0.0, 2.0]) is None


def test_the_best_rate_of_made_up_losses():
    def rows(*losses):
        return [
            {"learning_rate": 0.01 * 2**power, "loss": loss, "by_seed": [loss, loss]}
            for power, loss in enumerate(losses)
        ]

    # a parabola in log2(rate) with its lowest point at power 1.25
    best = find_best(rows(*(1 + (power - 1.25) ** 2 for power in range(4))))
    assert best["learning_rate"] == 0.02 and best["loss"] == 1.0625
    assert best["margin"] == pytest.approx(0.5) and best["by_seed"] == [0.02, 0.02]
    assert best["optimum"] == pytest.approx(0.01 * 2**1.25, rel=1e-3)
    assert find_best(rows(1.0, 2.0, None))["optimum"] is None  # at the end of the grid
    assert find_best(rows(None, 2.0, 1.5))["learning_rate"] == 0.04
    assert find_best(rows(None, None))["learning_rate"] is None


def test_what_transfers(books):
    settings = settings_of([*RATES, "--seeds", "0", "1"])
    table = {  # loss at rates 0.001, 0.01, 0.1
        ("mup", 32): (3.0, 2.0, 2.5),
        ("mup", 64): (2.5, 1.5, 2.0),
        ("standard", 32): (3.0, 2.0, 2.5),
        ("standard", 64): (1.75, 2.0, None),
    }
    cells = []
    for cell in settings.cells():
        place = settings.learning_rates.index(cell.learning_rate)
        loss = table[cell.parametrization, cell.width][place]
        cells.append({**vars(cell), "loss": loss if loss is None else loss + 0.1 * cell.seed})
    summary = summarize_rates(settings, cells)
    assert summary["transfers"] == {"mup": True, "standard": False}
    assert summary["cost_of_transfer"] == {"mup": 0.0, "standard": 0.25}
    diverged = [row for row in summary["losses"] if row["loss"] is None]
    assert [(row["width"], row["learning_rate"], row["by_seed"]) for row in diverged] == [(64, 0.1, [None, None])]
    assert summary["losses"][0]["loss"] == pytest.approx(3.05)


def test_a_sweep_in_pieces_is_the_sweep(records, books, tmp_path, capsys):
    whole, _ = records["learning-rates"]
    path = tmp_path / "pieces.json"
    pieces = 0
    while run([*RATES, "--max-seconds", "1e-9"], books, path) == 3:
        # nothing starts after no time, so a cell is lent from the whole sweep
        record = json.loads(path.read_text()) if path.exists() else {**whole, "cells": []}
        record.update(cells=[*record["cells"], whole["cells"][len(record["cells"])]], summary=None)
        path.write_text(json.dumps(record))
        pieces += 1
    assert pieces == len(whole["cells"])
    assert "12 runs done: give the same command again" in capsys.readouterr().out
    assert json.loads(path.read_text())["summary"] == whole["summary"]

    record = json.loads(path.read_text())
    del record["cells"][5]
    path.write_text(json.dumps({**record, "summary": None}))
    assert run(RATES, books, path) == 0
    again = json.loads(path.read_text())
    assert again["summary"] == whole["summary"] and len(again["cells"]) == len(whole["cells"])
    assert {**again["cells"][-1], "seconds": 0} == {**whole["cells"][5], "seconds": 0}
    assert [entry.name for entry in tmp_path.iterdir()] == ["pieces.json"]


def test_a_diverged_run_is_null(books, tmp_path, capsys):
    arguments = [*RATES, "--learning-rates", "1e30", "--parametrizations", "mup"]
    assert run(arguments, books, tmp_path / "record.json") == 0
    text = (tmp_path / "record.json").read_text()
    record = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [cell["loss"] for cell in record["cells"]] == [None, None]
    assert record["summary"]["transfers"] == {"mup": False}
    assert "none at width 64 (all diverged)" in capsys.readouterr().out

    arguments = [*COORDINATES, "--learning-rates", "1e30", "--parametrizations", "mup"]
    assert run(arguments, books, tmp_path / "other.json") == 0
    summary = json.loads((tmp_path / "other.json").read_text())["summary"]
    assert summary["largest_at_the_end"] == {"mup": {"scale": None, "change": None}}
    assert "mup, slope of change: not finite" in capsys.readouterr().out
    if importlib.util.find_spec("matplotlib"):
        plot = ["plot", str(tmp_path / "record.json"), "--output", str(tmp_path / "figure.svg")]
        assert main(plot) == 0
        plot[1] = str(tmp_path / "other.json")
        assert main(plot) == 2
        assert "Every run of the record diverged: there is nothing to draw" in capsys.readouterr().err


def test_what_is_printed(records, books, capsys):
    for arguments in (COORDINATES, RATES):
        assert run(arguments, books, records[arguments[0]][1]) == 0  # complete already: only the summary
    printed = capsys.readouterr().out
    assert re.search(r"^mup, slope of scale: (not )?flat \(at most \d\.\d\d", printed, re.M)
    assert re.search(r"^standard: best rate (not )?the same: \S+ at width 32 \(loss \d\.\d{3}\)", printed, re.M)


def test_figures(records, tmp_path):
    pytest.importorskip("matplotlib")
    for name, (record, path) in records.items():
        assert main(["plot", str(path), "--output", str(tmp_path / f"{name}.svg")]) == 0
        figure = (tmp_path / f"{name}.svg").read_text()
        assert figure == plot_record(record) and figure.startswith("<?xml")
        assert "muP" in figure and "standard parametrisation" in figure
    assert "residual stream" in (tmp_path / "coordinates.svg").read_text()
    assert "width 64" in (tmp_path / "learning-rates.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--widths", "32", "40"], "`widths` must be multiples of 32 (2 key heads of 16), got 40."),
        (["--widths", "32"], "`widths` must be at least two, to compare, got [32]."),
        (["--seeds", "1", "1"], "`seeds` must be different values, at least one, got [1, 1]."),
        (["--length", "400"], "bytes, and sequences of 400 need 8020."),
        (["--steps", "2"], "`num_training_steps` must be at least the 1 steps of warm-up and the 2 of decay together"),
        (["--floor-share", "0"], "An exponential decay does not reach 0"),
        (["--books", "missing"], "`--books` must be a folder of *.txt files, and 'missing' is not a folder."),
        (["--books", "."], "'.' holds no *.txt file to train on."),
        (["--output", "missing/record.json"], "The folder of 'missing/record.json' does not exist."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input(books, tmp_path, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    assert main([*RATES, "--books", str(books), "--output", "record.json", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and sentence in captured.err
    assert captured.out == "" and not list(tmp_path.iterdir())


def test_another_sweep_is_not_continued(records, books, tmp_path, capsys):
    record, path = records["coordinates"]
    before = path.read_bytes()
    wrong = [
        ([*COORDINATES[:-1], "3"], "settings['steps'] is 2, not 3; give it the same arguments to go on with it"),
        (RATES, 'benchmark is "mup-coordinates", not "mup-learning-rates"'),
    ]
    for arguments, sentence in wrong:
        assert run(arguments, books, path) == 2
        assert sentence in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_bytes(b"abc" * 2000)
    assert run(COORDINATES, other, path) == 2
    assert "has a sweep whose books['a'] is " in capsys.readouterr().err
    assert path.read_bytes() == before
    for name, content, sentence in (
        ("text.json", "text", "is not JSON ("),
        ("list.json", "[]", "is not a record of `python -m minicpm4_hf.eval.mup`."),
        ("speed.json", '{"benchmark": "speed"}', "is not a record of `python -m minicpm4_hf.eval.mup`."),
    ):
        (tmp_path / name).write_text(content)
        assert run(COORDINATES, books, tmp_path / name) == 2
        assert sentence in capsys.readouterr().err
    (tmp_path / "part.json").write_text(json.dumps({**record, "summary": None}))
    assert main(["plot", str(tmp_path / "part.json"), "--output", str(tmp_path / "part.svg")]) == 2
    assert "The record has no summary yet (4 cells): finish the sweep first." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--learning-rates", "0"], "must be a number greater than 0, got 0"),
        (["--max-seconds", "nan"], "must be a number greater than 0, got nan"),
        (["--seeds", "-1"], "must be at least 0, got -1"),
        (["--dtype", "float16"], "invalid choice: 'float16'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_flags(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stopped:
        main([*RATES, "--books", "books", "--output", "record.json", *arguments])
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


def test_help():
    done = subprocess.run(
        [sys.executable, "-m", "minicpm4_hf.eval.mup", "learning-rates", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--max-seconds" in done.stdout and "(default: 128 512)" in done.stdout


COMMITTED = [("coordinates", summarize_coordinates), ("learning-rates", summarize_rates)]


@pytest.mark.parametrize(("name", "summarize"), COMMITTED, ids=lambda value: value if isinstance(value, str) else "")
def test_committed_summary_is_of_the_committed_cells(name, summarize):
    record = json.loads((RESULTS / f"mup-{name}.json").read_text())
    settings = read_settings(build_parser().parse_args(record["command"].split()[3:]))
    assert json.loads(json.dumps(vars(settings))) == record["settings"]
    keys = [tuple(cell[field] for field in vars(next(settings.cells()))) for cell in record["cells"]]
    assert keys == [tuple(vars(cell).values()) for cell in settings.cells()]
    assert summarize(settings, record["cells"]) == record["summary"]
    assert not {"dracula", "emma"} & set(record["books"]) and len(record["books"]) == 14


@pytest.mark.parametrize("name", ["coordinates", "learning-rates"])
def test_committed_figure_is_of_the_committed_record(name):
    matplotlib = pytest.importorskip("matplotlib")
    figure = (RESULTS / f"mup-{name}.svg").read_text()
    if f"Matplotlib v{matplotlib.__version__}" not in figure:
        pytest.skip("drawn by another matplotlib")
    assert plot_record(json.loads((RESULTS / f"mup-{name}.json").read_text())) == figure


def test_what_the_committed_records_show():
    record = json.loads((RESULTS / "mup-coordinates.json").read_text())
    assert record["settings"]["widths"] == [128, 256, 512, 1024]
    largest = record["summary"]["largest_at_the_end"]
    assert max(largest["mup"].values()) <= record["summary"]["flat"] < 1 < min(largest["standard"].values())
    summary = json.loads((RESULTS / "mup-learning-rates.json").read_text())["summary"]
    assert summary["transfers"] == {"mup": True, "standard": False}
    assert summary["cost_of_transfer"]["mup"] == 0
