"""The record of a training run: what it takes from the folder, what it leaves out, and what it refuses."""

import hashlib
import itertools
import json
import re

import pytest

from minicpm4_hf.eval.training_record import main, thin

STAGES = {"short": {"steps": 10, "tokens": 640}, "long": {"steps": 3, "tokens": 384}}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    """The folder of a finished run, as `minicpm4 train` leaves it."""
    folder = tmp_path / "run"
    text = {"train": ["/home/me/books"], "held_out": ["/home/me/books/emma.txt"], "text_field": "text"}
    stages = [{"name": name, "length": 32} for name in STAGES]
    recipe = {"output": "/home/me/run", "text": text, "stages": stages, "model": None, "tokenizer": "/home/me/tok"}
    write(folder / "recipe.json", recipe)
    for part, name in (("train", "a.txt"), ("held_out", "emma.txt")):
        source = {"name": name, "bytes": 9, "sha256": part, "mtime_ns": 1}
        write(folder / "shards" / part / "index.json", {"sources": [source], "shards": [{"num_tokens": 4}] * 2})
    for name, stage in STAGES.items():
        figures = {"parameters": 7, "held_out_loss": 4.0, "held_out_bits_per_byte": 1.5, "last_loss": 0.5}
        write(folder / name / "stage.json", {"name": name, **stage, **figures})
        log = [{"step": i + 1, "loss": float(i), "grad_norm": 1.0} for i in range(stage["steps"])]
        log += [{"step": 2, "eval_loss": 8.0}, {"step": stage["steps"], "eval_loss": 4.0, "eval_runtime": 1.0}] * 2
        (folder / name / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log), encoding="utf-8")
    write(folder / "model" / "config.json", {"transformers_version": "5.23.0"})
    (folder / "model" / "model.safetensors").write_bytes(b"weights")
    return folder


def record_of(run, *words):
    path = run.parent / "record.json"
    assert main([str(run), "--output", str(path), *words]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def test_what_the_folder_says(run):
    record = record_of(run)
    assert record["recipe"]["text"] == {"train": ["books"], "held_out": ["emma.txt"], "text_field": "text"}
    assert record["recipe"]["tokenizer"] == "tok" and "output" not in record["recipe"]
    assert "/home" not in json.dumps(record)
    assert record["texts"]["train"] == {"tokens": 8, "sources": [{"name": "a.txt", "bytes": 9, "sha256": "train"}]}
    assert record["weights"] == {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    assert (record["parameters"], record["steps"], record["tokens"]) == (7, 13, 1024)
    assert [stage["name"] for stage in record["stages"]] == list(STAGES)
    # 4 nats a token are 1.5 bits a byte, so 8 are 3; the evaluation of the last step stands once
    assert record["stages"][0]["evaluations"] == [
        {"step": 2, "held_out_bits_per_byte": 3.0},
        {"step": 10, "held_out_bits_per_byte": 1.5},
    ]
    assert record["stages"][0]["log"][-1] == {"step": 10, "loss": 9.0}
    assert len(record["stages"][0]["log"]) == 10
    assert len(record_of(run, "--lines", "5")["stages"][0]["log"]) == 5


def test_what_is_not_known_is_null(run):
    record = record_of(run)
    assert (record["seconds"], record["device"], record["versions"]["torch"]) == (None, None, None)
    told = record_of(run, "--seconds", "1.5", "--device", "one CPU", "--torch", "2.13.0")
    assert (told["seconds"], told["device"]) == (1.5, "one CPU")
    assert told["versions"] == {"torch": "2.13.0", "transformers": "5.23.0"}


def test_a_run_without_held_out_text(run):
    for path in run.glob("*/stage.json"):
        stage = json.loads(path.read_text())
        write(path, {key: value for key, value in stage.items() if not key.startswith("held_out")})
    (run / "shards" / "held_out" / "index.json").unlink()
    (run / "shards" / "held_out").rmdir()
    record = record_of(run)
    assert list(record["texts"]) == ["train"] and record["stages"][0]["evaluations"] == []


@pytest.mark.parametrize(
    ("size", "limit", "kept"), [(0, 3, 0), (1, 3, 1), (3, 3, 3), (4, 3, 2), (10, 3, 3), (7, 1, 1)]
)
def test_thinned_logs_keep_their_end(size, limit, kept):
    lines = list(range(size))
    thinned = thin(lines, limit)
    assert len(thinned) == kept and thinned == sorted(thinned) and thinned[-1:] == lines[-1:]
    assert len({b - a for a, b in itertools.pairwise(thinned)}) <= 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "recipe.json").unlink(), r"recipe.json' does not exist: give the folder of a run that"),
        (lambda run: (run / "long" / "stage.json").unlink(), r"stage.json' does not exist: give the folder of a run"),
        (lambda run: (run / "recipe.json").write_text("{"), r"recipe.json' is not JSON \("),
        (lambda run: (run / "long" / "log.jsonl").unlink(), r"No such file or directory: '.*log.jsonl'"),
    ],
)
def test_what_is_no_finished_run(run, damage, message, capsys):
    damage(run)
    assert main([str(run), "--output", str(run.parent / "record.json")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert not (run.parent / "record.json").exists()


def test_a_run_that_went_on(run, tmp_path):
    """The second run's recipe begins from the first one's model, with the seed that the next stage would have had."""
    first = tmp_path / "first.json"
    recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    write(run / "recipe.json", {**recipe, "seed": 5})
    assert main([str(run), "--output", str(first), "--seconds", "2"]) == 0
    later = {**recipe, "seed": 7, "model": "first", "stages": recipe["stages"][:1]}
    write(run / "recipe.json", later)
    (run / "model" / "model.safetensors").write_bytes(b"later weights")
    record = record_of(run, "--after", str(first), "--seconds", "3")
    assert [stage["name"] for stage in record["stages"]] == ["short", "long", "short"]
    assert [stage["name"] for stage in record["recipe"]["stages"]] == ["short", "long", "short"]
    assert (record["steps"], record["tokens"], record["seconds"]) == (23, 1664, 5)
    assert record["recipe"]["seed"] == 5 and record["recipe"]["model"] is None
    assert record["weights"] == {"model.safetensors": hashlib.sha256(b"later weights").hexdigest()}
    assert record["continued"] == {"stage": 2, "weights": json.loads(first.read_text(encoding="utf-8"))["weights"]}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 6}, "seed, which must be 7,"),
        ({"model": None}, "model, which must be the earlier run's,"),
        ({"text": {"train": ["a.txt"], "held_out": ["emma.txt"]}}, "text"),
    ],
)
def test_runs_that_do_not_follow_one_another(run, tmp_path, capsys, change, named):
    first = tmp_path / "first.json"
    recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
    write(run / "recipe.json", {**recipe, "seed": 5})
    assert main([str(run), "--output", str(first)]) == 0
    write(run / "recipe.json", {**recipe, "seed": 7, "model": "first", **change})
    assert main([str(run), "--output", str(tmp_path / "joined.json"), "--after", str(first)]) == 2
    assert capsys.readouterr().err == (f"error: The runs are not one after another: they differ in {named}.\n")
    assert not (tmp_path / "joined.json").exists()
