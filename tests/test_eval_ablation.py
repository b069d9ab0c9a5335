"""`python -m minicpm4_hf.eval.ablation`: tiny runs against arithmetic by hand, resuming, wrong input, the record."""

import dataclasses
import itertools
import json
import math
import random
import re
import shlex
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from minicpm4_hf.eval.ablation.__main__ import build_parser, main
from minicpm4_hf.eval.ablation.experiment import HELD_OUT, MTP_LOSS_WEIGHT, VARIANTS, build_recipe, without_paths
from minicpm4_hf.eval.ablation.figures import curve_of, plot_record
from minicpm4_hf.eval.ablation.held_out import load_model, score_rows
from minicpm4_hf.eval.ablation.runs import CURVE_POINTS, read_curve
from minicpm4_hf.eval.ablation.summary import compare, describe, summarize
from minicpm4_hf.perplexity import score_tokens
from minicpm4_hf.training.recipe import load_recipe
from minicpm4_hf.training.trainer import MiniCPM4Trainer

pytest.importorskip("matplotlib")
pytest.importorskip("accelerate")

RESULTS = Path(__file__).resolve().parent.parent / "eval" / "results"
SPARSE = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "window_size": 32, "topk": 2, "dense_len": 40}
SETTINGS = {
    "vocab_size": 400,
    "architecture.hidden_size": 32,
    "architecture.intermediate_size": 32,
    "architecture.num_hidden_layers": 1,
    "architecture.head_dim": 16,
    "precision": "fp32",
    "stages.0": {"num_steps": 6, "warmup_steps": 2, "decay_steps": 2, "length": 32, "buckets": [32], "log_every": 2},
    "stages.1": {"num_steps": 4, "length": 96, "buckets": [96], "sequences_per_step": 2, "checkpoint_every": 2},
}
SETTINGS["stages.0"] |= {"sequences_per_step": 4, "micro_batch": 2, "checkpoint_every": 2}
SETTINGS["stages.1"] |= {"learning_rate": 0.004, "sparse_config": SPARSE}
SMALL = [
    f"{key}.{part}={json.dumps(value)}" if part else f"{key}={json.dumps(value)}"
    for key, values in SETTINGS.items()
    for part, value in (values.items() if isinstance(values, dict) else [("", values)])
]


def book(seed: int, words: int = 2500) -> str:
    """Words of made-up syllables, some far more frequent than others."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bcdfghlmnprst" for b in ("a", "e", "i", "ou")]
    vocabulary = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(300)]
    chosen = rng.choices(vocabulary, weights=[1 / (i + 1) for i in range(300)], k=words)
    return "".join(word + (".\n" if i % 40 == 39 else " ") for i, word in enumerate(chosen))


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """Two books to train on, and the two that must not be."""
    folder = tmp_path_factory.mktemp("books")
    for seed, name in enumerate(("one", "two", *HELD_OUT)):
        (folder / f"{name}.txt").write_text(book(seed))
    return folder


def arguments(books, work, output, *more, settings=SMALL):
    words = ["run", "--books", str(books), "--work", str(work), "--output", str(output), "--rows", "4"]
    return [*words, *(word for setting in settings for word in ("--set", setting)), *more]


@pytest.fixture(scope="module")
def ablation(books, tmp_path_factory):
    """All five tiny runs: the folder and the record."""
    folder = tmp_path_factory.mktemp("ablation")
    assert main(arguments(books, folder / "work", folder / "record.json")) == 0
    return folder / "work", json.loads((folder / "record.json").read_text())


def run_of(record, name):
    return next(run for run in record["runs"] if run["name"] == name)


def differing(a, b, name=""):
    """The paths at which two JSON documents differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [path for key in {**a, **b} for path in differing(a.get(key), b.get(key), f"{name}.{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [path for i, pair in enumerate(zip(a, b)) for path in differing(*pair, f"{name}.{i}")]
    return [] if a == b else [name]


def test_the_record_says_what_was_run(ablation, books):
    _, record = ablation
    assert record["benchmark"] == "training-ablation"
    assert record["command"].startswith(f"python -m minicpm4_hf.eval.ablation run --books {books.name} --work work ")
    assert record["settings"]["set"] == SMALL and str(books) not in json.dumps(record) + record["command"]
    assert set(record["books"]) == {"one", "two", *HELD_OUT}
    assert record["books"]["one"]["bytes"] == (books / "one.txt").stat().st_size
    assert [(run["name"], run["seed"]) for run in record["runs"]] == [(name, 0) for name in VARIANTS]
    for run in record["runs"]:
        assert run["versions"]["torch"] == version("torch") and run["seconds"] > 0
        assert run["tokens"] == 6 * 4 * 32 + 4 * 2 * 96
        assert [step for step, _ in run["curves"]["short"]] == [2, 4, 6]
        assert [step for step, _ in run["curves"]["long"]] == [1, 2, 3, 4]
        assert len(run["held_out"]["short"]) == len(run["held_out"]["end"]["dense"]) == 4
    again = build_parser().parse_args(shlex.split(record["command"])[3:])
    assert again.seeds == 1 and again.rows == 4 and len(again.set) == len(SMALL)


def test_a_run_differs_from_the_baseline_in_one_choice(books, tmp_path):
    recipes = {name: build_recipe(name, 3, books, tmp_path) for name in VARIANTS}
    baseline = without_paths(recipes["baseline"])
    assert baseline["mup"] and baseline["mtp_loss_weight"] == 0 and baseline["seed"] == 3
    assert baseline["text"]["held_out"] == ["dracula.txt", "emma.txt"]
    found = {name: sorted(differing(baseline, without_paths(recipe))) for name, recipe in recipes.items()}
    assert found == {
        "baseline": [],
        "standard": [".mup", ".output"],
        "cosine": [".output", ".stages.0.decay_steps", ".stages.0.decay_type"],
        "dense": [".output", ".stages.1.sparse_config"],
        "mtp": [".mtp_loss_weight", ".output"],
    }
    short, long = recipes["cosine"].stages
    assert (short.decay_type, short.decay_steps) == ("cosine", short.num_steps - short.warmup_steps)
    assert short.learning_rate * short.floor_share == long.learning_rate  # neither schedule jumps at the switch
    assert not recipes["standard"].mup and recipes["dense"].stages[1].sparse_config is None
    assert recipes["mtp"].mtp_loss_weight == MTP_LOSS_WEIGHT


def test_runs_have_the_same_tokens_and_weights(ablation):
    """Until its choice shows, a run is the baseline to the last digit."""
    _, record = ablation
    baseline, dense, cosine = (run_of(record, name) for name in ("baseline", "dense", "cosine"))
    assert dense["curves"]["short"] == baseline["curves"]["short"]
    assert dense["held_out"]["switch"] == baseline["held_out"]["switch"]
    assert dense["held_out"]["short"] == baseline["held_out"]["short"]
    assert dense["curves"]["long"][0] != baseline["curves"]["long"][0]
    assert cosine["curves"]["short"][0] == baseline["curves"]["short"][0]  # the warm-up
    assert cosine["curves"]["short"][2] != baseline["curves"]["short"][2]
    first = {run["name"]: run["curves"]["short"][0][1] for run in record["runs"]}
    assert first["standard"] != first["baseline"] and first["mtp"] != first["baseline"]
    assert run_of(record, "mtp")["parameters"] > baseline["parameters"] == run_of(record, "standard")["parameters"]


def test_held_out_losses_by_another_way(ablation, books):
    """Rows cut from the books by hand, and scored one by one over a cache."""
    work, record = ablation
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    rows, size = [], 0
    for name in HELD_OUT:
        ids = [1, *tokenizer((books / f"{name}.txt").read_text(), add_special_tokens=False).input_ids, 2]
        rows += [ids[:96], ids[-96:]]
    size = sum(len(tokenizer.decode(row[1:], skip_special_tokens=True).encode()) for row in rows)
    assert record["held_out"] == {"rows": 4, "length": 96, "tokens": 4 * 95, "bytes": size}
    for name in ("standard", "mtp"):
        run = run_of(record, name)["held_out"]
        for moment, stage in (("switch", "short"), ("end", "long")):
            model = load_model(work / f"{name}-0" / stage / "model", None)
            expected = [score_tokens(model, torch.tensor(row)).mean().item() for row in rows]
            assert run[moment]["dense"] == pytest.approx(expected, abs=1e-4)
            assert run[moment]["sparse"] != pytest.approx(expected, abs=1e-4)
            if moment == "switch":
                parts = [torch.tensor(row).view(3, 32) for row in rows]
                means = [statistics.fmean(score_tokens(model, p).mean().item() for p in part) for part in parts]
                assert run["short"] == pytest.approx(means, abs=1e-4)
            everything = load_model(work / f"{name}-0" / stage / "model", {**SPARSE, "topk": 8})
            assert score_rows(everything, torch.tensor(rows)).tolist() == pytest.approx(expected, abs=1e-4)


def test_the_summary_is_of_the_runs(ablation):
    _, record = ablation
    summary = record["summary"]
    assert summary == json.loads(json.dumps(summarize(record["runs"], record["held_out"])))
    baseline, dense = (run_of(record, name)["held_out"] for name in ("baseline", "dense"))
    expected = statistics.fmean(dense["end"]["dense"]) - statistics.fmean(baseline["end"]["sparse"])
    assert summary["differences"]["dense"]["difference"] == pytest.approx(expected, abs=1e-6)
    assert summary["differences"]["dense"]["short"]["difference"] == 0
    jump = statistics.fmean(baseline["switch"]["sparse"]) - statistics.fmean(baseline["switch"]["dense"])
    assert summary["switch"]["jump"]["difference"] == pytest.approx(jump, abs=1e-6)
    training = summary["switch"]["training"]
    assert training["before"] == run_of(record, "baseline")["curves"]["short"][-1][1]
    assert training["dense"] == [loss for _, loss in run_of(record, "dense")["curves"]["long"]]
    losses = {row["name"]: row for row in summary["losses"]}
    assert losses["dense"]["loss"] == pytest.approx(statistics.fmean(dense["end"]["dense"]), abs=1e-6)
    bits = losses["dense"]["loss"] * record["held_out"]["tokens"] / record["held_out"]["bytes"] / math.log(2)
    assert losses["dense"]["bits_per_byte"] == pytest.approx(bits, abs=1e-5)


def made_up_run(name, seed, end, sparse_config=None):
    stages = [{"name": "short", "sparse_config": None}, {"name": "long", "sparse_config": sparse_config}]
    held_out = {
        "short": [4.0, 6.0],
        "switch": {"dense": [5.0, 5.0], "sparse": [5.5, 5.1]},
        "end": {"dense": end, "sparse": [loss + 1 for loss in end]},
    }
    curves = {"short": [[2, 7.0], [4, 6.0]], "long": [[step, 5.0 + step] for step in range(1, 8)]}
    recipe = {"stages": stages}
    return {"name": name, "seed": seed, "recipe": recipe, "held_out": held_out, "curves": curves, "seconds": None}


def test_differences_of_made_up_runs():
    runs = [
        made_up_run("baseline", 0, [2.0, 4.0], sparse_config={}),  # read sparsely: 3 and 5
        made_up_run("cosine", 0, [2.5, 4.5], sparse_config={}),
        made_up_run("dense", 0, [3.0, 6.0]),
        made_up_run("baseline", 1, [2.0, 4.0], sparse_config={}),
        made_up_run("cosine", 1, [2.1, 4.1], sparse_config={}),
    ]
    size = {"rows": 2, "length": 9, "tokens": 16, "bytes": 32}
    summary = summarize(runs, size)
    cosine, dense = summary["differences"]["cosine"], summary["differences"]["dense"]
    assert list(summary["differences"]) == ["cosine", "dense"]
    assert cosine["by_seed"] == [0.5, 0.1] and cosine["difference"] == 0.3
    assert cosine["seeds_deviation"] == pytest.approx(0.4 / math.sqrt(2), abs=1e-6)
    assert cosine["bits_per_byte"] == pytest.approx(0.3 / 2 / math.log(2), abs=1e-6)
    assert dense["difference"] == 0.5 and dense["seeds_deviation"] is None
    # rows 0 and 1: deviation sqrt(1 / 2) and standard error 1 / 2
    assert dense["standard_error"] == 0.5 and summary["switch"]["jump"]["difference"] == 0.3
    assert summary["switch"]["training"] == {"before": 6.0, "sparse": [6, 7, 8, 9, 10], "dense": [6, 7, 8, 9, 10]}
    assert {pair["difference"] for pair in summary["reading"].values()} == {1.0}
    assert summary["losses"][0] | {"short_loss": 0} == {
        "name": "baseline",
        "seed": 0,
        "short_loss": 0,
        "loss": 4.0,
        "bits_per_byte": pytest.approx(2 / math.log(2), abs=1e-6),
    }
    assert compare([1.0], [1.5]) == {"difference": 0.5, "rows_deviation": None, "standard_error": None}
    assert summarize(runs[1:3], size)["differences"] == {} and summarize(runs[1:3], size)["switch"] is None

    text = describe({"summary": summary, "held_out": size, "runs": runs})
    assert "+0.3000 (rows 0.0000; seeds 0.2828)" in text and "+0.5000 (rows 0.5000; seeds unknown)" in text
    assert "dense 5.0000, sparse 5.3000, jump +0.3000 (standard error over rows 0.2000)" in text
    assert "Of one seed: how far another seed would move a difference is unknown." in text
    summary = summarize(runs[:2] + runs[3:], size)
    assert "Of one seed" not in describe({"summary": summary, "held_out": size, "runs": runs})


def test_curves(tmp_path):
    lines = [{"step": step, "loss": 2.0 * step, "ntp_loss": 1.0 * step} for step in range(1, 302)]
    lines += [{"step": 301, "eval_loss": 1.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    points = read_curve(tmp_path)
    assert len(points) == CURVE_POINTS and points[0] == [1, 1.0] and points[-1] == [301, 301.0]
    assert max(b[0] - a[0] for a, b in itertools.pairwise(points)) <= 4
    short = {"name": "short", "num_steps": 4, "sequences_per_step": 5, "length": 100_000}
    run = {"recipe": {"stages": [short, {**short, "name": "long"}]}}
    run["curves"] = {"short": [[2, 3.0], [4, 2.0]], "long": [[step, 1.0 * step] for step in range(1, 8)]}
    assert curve_of(run) == ([1.0, 2.0, 4.5, 5.5], [3.0, 2.0, 3.0, 6.5])  # means of five, and of the two left


def test_a_run_that_was_stopped_goes_on(ablation, books, tmp_path, capsys, monkeypatch):
    _, whole = ablation
    work, output = tmp_path / "work", tmp_path / "record.json"
    step = MiniCPM4Trainer.training_step

    def stop_late(trainer, *rest, **named):
        if trainer.args.max_steps == 4 and trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return step(trainer, *rest, **named)

    monkeypatch.setattr(MiniCPM4Trainer, "training_step", stop_late)
    assert main(arguments(books, work, output, "--only", "cosine")) == 130
    assert "stopped; give the same command to go on" in capsys.readouterr().err and not output.exists()
    assert not (work / "cosine-0" / "result.json").exists()
    monkeypatch.undo()
    assert main(arguments(books, work, output, "--only", "cosine")) == 0
    assert "going on after step 2" in capsys.readouterr().err
    record = json.loads(output.read_text())
    (run,) = record["runs"]
    assert run["seconds"] is None
    changing = {"seconds": 0, "evaluation_seconds": 0, "date": 0}
    assert {**run, **changing} == {**run_of(whole, "cosine"), **changing}
    assert record["summary"]["differences"] == {} and record["summary"]["switch"] is None

    assert main(["plot", str(output), str(tmp_path / "figure.svg")]) == 2
    assert "needs the baseline and another run, and has cosine: finish more runs first." in capsys.readouterr().err
    (work / "cosine-0" / "result.json").write_text("{")
    assert main(arguments(books, work, output, "--only", "cosine")) == 2
    assert "result.json' is not JSON (" in capsys.readouterr().err


def test_finished_runs_are_not_trained_again(ablation, books, tmp_path, capsys, monkeypatch):
    work, record = ablation
    monkeypatch.setattr("minicpm4_hf.eval.ablation.runs.run_recipe", lambda *_, **__: pytest.fail("trained"))
    for more in ([], ["--only", "mtp"]):  # the record has what is finished, asked for or not
        assert main(arguments(books, work, tmp_path / "again.json", "--json", *more)) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed == json.loads((tmp_path / "again.json").read_text())
        assert {**printed, "command": ""} == {**record, "command": ""}
    assert main(arguments(books, work, tmp_path / "again.json")) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^standard +0 +\d\.\d{4} .* [+-]\d\.\d{4} \(rows \d\.\d{4}; seeds unknown\): ", printed, re.M)
    assert re.search(r"^At the switch, no step taken: dense \d\.\d{4}, sparse ", printed, re.M)


def test_what_a_folder_is_not_continued_with(ablation, books, tmp_path, capsys):
    work, _ = ablation
    output = tmp_path / "record.json"
    other = tmp_path / "other"
    other.mkdir()
    for seed, name in enumerate(("three", *HELD_OUT), 5):
        (other / f"{name}.txt").write_text(book(seed))
    wrong = [
        (arguments(other, work, output), "holds an ablation with different `books`; give the same"),
        (arguments(books, work, output, "--set", "vocab_size=401"), "holds an ablation with different `vocab_size`"),
        (
            arguments(books, work, output, "--set", "stages.1.num_steps=5"),
            "baseline-0' holds a finished run of another",
        ),
        (arguments(books, work, output, "--rows", "6"), "holds a run that read 4 held-out rows, not 6; give the same"),
        (arguments(books, books, output), "is not empty and holds no ablation; choose another --work."),
    ]
    for words, sentence in wrong:
        assert main(words) == 2
        captured = capsys.readouterr()
        assert sentence in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    path = work / "mtp-0" / "result.json"
    before = path.read_text()
    result = json.loads(before)
    path.write_text(json.dumps({**result, "versions": {**result["versions"], "torch": "1.0"}}))
    try:
        assert main(arguments(books, work, output)) == 2
    finally:
        path.write_text(before)
    assert f"was trained with torch 1.0, and this is {version('torch')}; take another" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--set", "seed=1"], "The ablation chooses `seed` itself, so 'seed=1' cannot be set."),
        (["--set", "text.train=[]"], "The ablation chooses `text` itself"),
        (["--set", "stages.0.num_step=1"], "`stages.0` has no setting 'num_step'"),
        (
            ["--set", "stages.1.sparse_config=null"],
            "a dense one and then a sparse one, got short (dense), long (dense).",
        ),
        (["--set", "stages.0.length=40"], "must be a multiple of the first's (40), so that both read the same"),
        (["--set", "stages.1.sparse_config.dense_len=96"], "must be less than the stage's `length` (96), or its rows"),
        (["--rows", "3"], "`--rows` must be a multiple of the 2 held-out books, got 3."),
        (["--set", "stages.1.length=9600"], "The held-out book 'dracula' has "),
        (["--books", "missing"], "`--books` must be a folder of *.txt files, and 'missing' is not a folder."),
        (["--books", "."], "'.' has no 'dracula.txt', which is held out; put it there"),
        (["--output", "missing/record.json"], "The folder of 'missing/record.json' does not exist."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input(books, tmp_path, monkeypatch, capsys, more, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minicpm4_hf.eval.ablation.runs.run_recipe", lambda *_, **__: pytest.fail("trained"))
    assert main(arguments(books, "work", "record.json", *more)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and sentence in captured.err
    assert captured.out == "" and not (tmp_path / "record.json").exists()


def test_other_files_are_no_records(tmp_path, capsys):
    for name, content, sentence in (
        ("text.json", "text", "is not JSON ("),
        ("list.json", "[]", "is not a record of `python -m minicpm4_hf.eval.ablation`."),
        ("mup.json", '{"benchmark": "mup-coordinates"}', "is not a record of `python -m minicpm4_hf.eval.ablation`."),
    ):
        (tmp_path / name).write_text(content)
        assert main(["plot", str(tmp_path / name), str(tmp_path / "x.svg")]) == 2
        assert sentence in capsys.readouterr().err
    (tmp_path / "books").mkdir()
    for name in HELD_OUT:
        (tmp_path / "books" / f"{name}.txt").write_text("text")
    assert main(arguments(tmp_path / "books", tmp_path / "work", tmp_path / "record.json")) == 2
    assert "holds no *.txt file to train on besides the held-out ones." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [(["--only", "adam"], "invalid choice: 'adam'"), (["--seeds", "0"], "0"), (["--rows", "x"], "'x'")],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_flags(capsys, more, sentence):
    with pytest.raises(SystemExit) as stopped:
        main(arguments("books", "work", "record.json", *more))
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err.splitlines()[-1]


def test_figure(ablation, tmp_path):
    _, record = ablation
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    assert main(["plot", str(path), str(tmp_path / "figure.svg")]) == 0
    figure = (tmp_path / "figure.svg").read_text()
    assert figure == plot_record(record) and figure.startswith("<?xml")
    assert all(name in figure for name in VARIANTS) and "held-out loss at the end" in figure


def test_help():
    command = [sys.executable, "-m", "minicpm4_hf.eval.ablation", "run", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--seeds" in done.stdout and "a cosine from the warm-up" in done.stdout


@pytest.fixture(scope="module")
def committed():
    return json.loads((RESULTS / "ablation.json").read_text())


def test_the_committed_record_is_of_this_ablation(committed, tmp_path):
    assert {(name, 0) for name in VARIANTS} <= {(run["name"], run["seed"]) for run in committed["runs"]}
    assert len(committed["books"]) == 16 and set(HELD_OUT) < set(committed["books"])
    assert committed["settings"]["set"] == []
    assert json.loads(json.dumps(summarize(committed["runs"], committed["held_out"]))) == committed["summary"]
    for run in committed["runs"]:
        recipe = build_recipe(run["name"], run["seed"], tmp_path / "books", tmp_path / "work")
        (tmp_path / "recipe.json").write_text(json.dumps(run["recipe"]))
        expected = without_paths(recipe)
        assert without_paths(load_recipe(tmp_path / "recipe.json")) | {"text": 0} == expected | {"text": 0}
        assert run["recipe"]["text"]["held_out"] == expected["text"]["held_out"]
        assert {field.name for field in dataclasses.fields(recipe)} >= set(run["recipe"])
    baseline = run_of(committed, "baseline")
    assert len({run["tokens"] for run in committed["runs"]}) == 1
    assert len({json.dumps(run["versions"]) for run in committed["runs"]}) == 1
    assert run_of(committed, "dense")["curves"]["short"] == baseline["curves"]["short"]


def test_the_committed_figure_is_of_the_committed_record(committed):
    import matplotlib

    figure = (RESULTS / "ablation.svg").read_text()
    if f"Matplotlib v{matplotlib.__version__}" not in figure:
        pytest.skip("drawn by another matplotlib")
    assert plot_record(committed) == figure
