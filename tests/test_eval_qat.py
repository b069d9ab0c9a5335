"""`python -m minicpm4_hf.eval.qat`: tiny runs against arithmetic by hand, resuming, wrong input, the figure."""

import json
import random
import shlex
import statistics
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minicpm4_hf.eval.ablation.experiment import HELD_OUT
from minicpm4_hf.eval.qat.__main__ import build_parser, main
from minicpm4_hf.eval.qat.experiment import FULL, NAMES, VARIANTS, build_recipe
from minicpm4_hf.eval.qat.figures import plot_record
from minicpm4_hf.eval.qat.summary import describe, summarize
from minicpm4_hf.perplexity import score_tokens
from minicpm4_hf.quantization import dequantize_ternary, quantize_ternary
from minicpm4_hf.training.fp8 import PROJECTIONS
from minicpm4_hf.training.trainer import MiniCPM4Trainer

pytest.importorskip("matplotlib")
pytest.importorskip("accelerate")

TRAINED = ("ternary-40", "ternary-100", "ternary-40-g32")
STAGE = {"num_steps": 10, "warmup_steps": 1, "length": 32, "buckets": [32], "log_every": 1}
STAGE |= {"sequences_per_step": 4, "micro_batch": 2}
SMALL = [f"stages.0.{key}={json.dumps(value)}" for key, value in STAGE.items()]
SMALL += ["vocab_size=400", "precision=fp32", "architecture.hidden_size=64", "architecture.intermediate_size=64"]
SMALL += ["architecture.num_hidden_layers=1", "architecture.num_attention_heads=4", "architecture.head_dim=16"]


def book(seed: int, words: int = 2500) -> str:
    """Words of made-up syllables, some far more frequent than others."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bcdfghlmnprst" for b in ("a", "e", "i", "ou")]
    vocabulary = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(300)]
    return " ".join(rng.choices(vocabulary, weights=[1 / (i + 1) for i in range(300)], k=words))


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """Two books to train on, and the two that must not be."""
    folder = tmp_path_factory.mktemp("books")
    for seed, name in enumerate(("one", "two", *HELD_OUT)):
        (folder / f"{name}.txt").write_text(book(seed))
    return folder


def arguments(books, work, output, *more, only=TRAINED):
    words = ["run", "--books", str(books), "--work", str(work), "--output", str(output), "--rows", "4"]
    words += [word for setting in SMALL for word in ("--set", setting)]
    return [*words, *(["--only", *only] if only else []), *more]


@pytest.fixture(scope="module")
def ablation(books, tmp_path_factory):
    """The folder and the record of a few tiny runs."""
    folder = tmp_path_factory.mktemp("qat")
    assert main(arguments(books, folder / "work", folder / "record.json")) == 0
    return folder / "work", json.loads((folder / "record.json").read_text())


def run_of(record, name):
    return next(run for run in record["runs"] if run["name"] == name)


def test_the_record_says_what_was_run(ablation, books):
    _, record = ablation
    assert record["benchmark"] == "qat-ablation" and set(record["books"]) == {"one", "two", *HELD_OUT}
    assert str(books) not in json.dumps(record)
    assert [run["name"] for run in record["runs"]] == [FULL, *TRAINED[:2], TRAINED[2]]
    per_step = 4 * 32
    for name, steps in ((FULL, 10), ("ternary-40", 4), ("ternary-100", 10), ("ternary-40-g32", 4)):
        run = run_of(record, name)
        assert run["tokens"] == steps * per_step and run["versions"]["torch"] == version("torch")
        assert len(run["held_out"]["short"]) == 4
    assert list(run_of(record, FULL)["held_out"]["after_training"]) == ["-1", "64", "32"]
    assert run_of(record, "ternary-40")["recipe"]["model"] == "checkpoint-6"
    again = build_parser().parse_args(shlex.split(record["command"])[3:])
    assert (again.seeds, again.rows, again.rate_share, again.set) == (1, 4, 0.5, SMALL)


def test_the_runs_read_the_same_tokens_and_decay_together(books, tmp_path):
    recipes = {name: build_recipe(name, 3, books, tmp_path) for name in NAMES}
    assert len(NAMES) == 13 and [VARIANTS[name].percent for name in NAMES[1:11]] == list(range(10, 101, 10))
    stable, decay = recipes[FULL].stages
    total = stable.num_steps + decay.num_steps
    assert decay.decay_steps == decay.num_steps == total // 10 and stable.decay_steps == 0
    assert stable.keep_checkpoints * stable.checkpoint_every >= stable.num_steps  # none is thrown away
    for name, variant in VARIANTS.items():
        (stage,) = recipes[name].stages
        assert stage.num_steps == total * variant.percent // 100
        assert stage.ternary.group_size == variant.group_size and stage.warmup_steps == stable.warmup_steps
        assert stage.decay_steps == min(total // 10, stage.num_steps - stage.warmup_steps)
        if variant.percent < 100:
            expected = tmp_path / "full-3" / "stable" / f"checkpoint-{total - stage.num_steps}"
            assert recipes[name].model == str(expected)
            assert stage.learning_rate == stable.learning_rate / 2
    first = recipes["ternary-100"]
    assert first.architecture == recipes[FULL].architecture and first.seed == recipes[FULL].seed == 3
    assert first.stages[0].learning_rate == stable.learning_rate
    other = build_recipe("ternary-20", 3, books, tmp_path, rate_share=0.25)
    assert other.stages[0].learning_rate == stable.learning_rate / 4


def test_held_out_losses_by_another_way(ablation, books):
    """Rows cut from the books by hand, scored one by one with plain layers whose weights are rounded by hand."""
    work, record = ablation
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    rows = []
    for name in HELD_OUT:
        ids = [1, *tokenizer((books / f"{name}.txt").read_text(), add_special_tokens=False).input_ids, 2]
        rows += [ids[:32], ids[-32:]]

    def losses(folder, group_size):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if group_size and name.rpartition(".")[0].rpartition(".")[2] in PROJECTIONS:
                    parameter.copy_(dequantize_ternary(*quantize_ternary(parameter, group_size)))
        return [score_tokens(model, torch.tensor(row)).mean().item() for row in rows]

    full = run_of(record, FULL)["held_out"]
    folder = work / "full-0" / "decay" / "model"
    assert full["short"] == pytest.approx(losses(folder, None), abs=1e-4)
    for size in (-1, 64, 32):
        assert full["after_training"][str(size)] == pytest.approx(losses(folder, size), abs=1e-4)
    for name, size in zip(TRAINED, (-1, -1, 32)):
        expected = losses(work / f"{name}-0" / "model", size)
        # embedding and norms are packed in bfloat16
        assert run_of(record, name)["held_out"]["short"] == pytest.approx(expected, abs=0.02)


def test_the_summary_is_of_the_runs(ablation):
    _, record = ablation
    summary = record["summary"]
    assert summary == json.loads(json.dumps(summarize(record["runs"], record["held_out"])))
    mean = {run["name"]: statistics.fmean(run["held_out"]["short"]) for run in record["runs"]}
    assert list(summary["shares"]) == ["40", "100"] and list(summary["groups"]) == ["32"]
    assert summary["shares"]["40"]["difference"] == pytest.approx(mean["ternary-40"] - mean[FULL], abs=2e-6)
    expected = mean["ternary-40-g32"] - mean["ternary-40"]
    assert summary["groups"]["32"]["difference"] == pytest.approx(expected, abs=2e-6)
    text = describe(record)
    assert "ternary for 40 % of the tokens: " in text and "group size 32 at 40 %: " in text
    assert "rounded after training, group size 64: " in text and "Of one seed" in text


def test_differences_of_made_up_runs():
    def made_up(name, seed, losses, **more):
        return {"name": name, "seed": seed, "held_out": {"short": losses, **more}, "seconds": 2.0}

    runs = [
        made_up(FULL, 0, [2.0, 4.0], after_training={"-1": [5.0, 8.0]}),
        made_up("ternary-20", 0, [2.5, 4.5]),
        made_up("ternary-20", 1, [2.1, 4.1]),
        made_up(FULL, 1, [2.0, 4.0], after_training={"-1": [5.0, 7.0]}),
        made_up("ternary-40", 0, [2.0, 5.0]),
        made_up("ternary-40-g64", 0, [1.0, 5.0]),
    ]
    summary = summarize(runs, {"tokens": 16, "bytes": 32})
    assert summary["shares"]["20"]["by_seed"] == [0.5, 0.1] and summary["shares"]["20"]["difference"] == 0.3
    assert summary["shares"]["20"]["seeds_deviation"] == pytest.approx(0.4 / 2**0.5, abs=1e-6)
    # rows 0 and 1: deviation sqrt(1 / 2), and standard error 1 / 2
    assert summary["shares"]["40"]["standard_error"] == 0.5 and summary["shares"]["40"]["seeds_deviation"] is None
    assert summary["after_training"]["-1"]["by_seed"] == [3.5, 3.0]
    assert summary["groups"] == {
        "64": {"difference": -0.5, "by_seed": [-0.5], "seeds_deviation": None, "standard_error": 0.5}
    }
    text = describe({"summary": summary, "held_out": {"tokens": 16, "length": 9}, "runs": runs})
    assert "ternary for 20 % of the tokens: +0.3000 (rows 0.0000; seeds 0.2828)" in text and "Of one seed" not in text


def test_a_run_that_was_stopped_goes_on(ablation, books, tmp_path, capsys, monkeypatch):
    _, whole = ablation
    work, output = tmp_path / "work", tmp_path / "record.json"
    step = MiniCPM4Trainer.training_step

    def stop_late(trainer, *rest, **named):
        if trainer.args.output_dir.endswith("qat") and trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return step(trainer, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(MiniCPM4Trainer, "training_step", stop_late)
        assert main(arguments(books, work, output, only=["ternary-40"])) == 130
    assert "stopped; give the same command to go on" in capsys.readouterr().err and not output.exists()
    assert not (work / "ternary-40-0" / "result.json").exists()
    assert main(arguments(books, work, output, "--json", only=["ternary-40"])) == 0
    captured = capsys.readouterr()
    assert "going on after step 3" in captured.err and "[1/2]" not in captured.err
    record = json.loads(output.read_text())
    assert json.loads(captured.out) == record and [run["name"] for run in record["runs"]] == [FULL, "ternary-40"]
    changing = {"seconds": 0, "evaluation_seconds": 0, "date": 0}
    for run in record["runs"]:
        assert {**run, **changing} == {**run_of(whole, run["name"]), **changing}
    assert run_of(record, "ternary-40")["seconds"] is None

    assert main(["plot", str(output), str(tmp_path / "figure.svg")]) == 2
    assert "needs runs of a share and of several group sizes, and has full, ternary-40" in capsys.readouterr().err


def test_finished_runs_are_not_trained_again(ablation, books, tmp_path, monkeypatch, capsys):
    work, record = ablation
    monkeypatch.setattr("minicpm4_hf.eval.qat.runs.run_recipe", lambda *_, **__: pytest.fail("trained"))
    assert main(arguments(books, work, tmp_path / "again.json", only=["full"])) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert {**again, "command": ""} == {**record, "command": ""}  # with what is finished, asked for or not
    assert main(arguments(books, work, tmp_path / "other.json", "--set", "stages.0.num_steps=20")) == 2
    assert "full-0' holds a finished run of another recipe; give the same" in capsys.readouterr().err
    assert main(arguments(books, work, tmp_path / "other.json", "--rate-share", "0.4")) == 2
    assert "ternary-40-0' holds a finished run of another recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--set", "seed=1"], "The ablation chooses `seed` itself, so 'seed=1' cannot be set."),
        (
            ["--set", "stages.1.length=8"],
            "The ablation chooses `stages` itself, so 'stages.1.length=8'",
        ),
        (["--set", "stages=[]"], "The ablation chooses `stages` itself"),
        (["--set", "stages.0.num_step=1"], "`stages.0` has no setting 'num_step'"),
        (["--set", "stages.0.num_steps=11"], "`stages.0.num_steps` must be a multiple of 10, got 11."),
        (["--set", "stages.0.log_every=3"], "must be a multiple of `log_every` (3)"),
        (["--rows", "3"], "`--rows` must be a multiple of the 2 held-out books, got 3."),
        (["--books", "missing"], "`--books` must be a folder of *.txt files, and 'missing' is not a folder."),
        (["--output", "missing/record.json"], "The folder of 'missing/record.json' does not exist."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input(books, tmp_path, monkeypatch, capsys, more, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minicpm4_hf.eval.qat.runs.run_recipe", lambda *_, **__: pytest.fail("trained"))
    assert main(arguments(books, "work", "record.json", *more)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and sentence in captured.err
    assert captured.out == "" and not (tmp_path / "record.json").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [(["--only", "ternary-45"], "invalid choice: 'ternary-45'"), (["--rate-share", "0"], "must be a number above 0")],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_flags(capsys, more, sentence):
    with pytest.raises(SystemExit) as stopped:
        main(arguments("books", "work", "record.json", *more, only=None))
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err.splitlines()[-1]


def test_other_files_are_no_records(tmp_path, capsys):
    for content, sentence in (
        ("text", "is not JSON ("),
        ("[]", "is not a record of `python -m minicpm4_hf.eval.qat`"),
    ):
        (tmp_path / "x.json").write_text(content)
        assert main(["plot", str(tmp_path / "x.json"), str(tmp_path / "x.svg")]) == 2
        assert sentence in capsys.readouterr().err


def test_figure(ablation, tmp_path):
    _, record = ablation
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record))
    assert main(["plot", str(path), str(tmp_path / "figure.svg")]) == 0
    figure = (tmp_path / "figure.svg").read_text()
    assert figure == plot_record(record) and figure.startswith("<?xml")
    assert "full precision" in figure and "group of 32" in figure and "rounded after training" in figure


def test_help():
    command = [sys.executable, "-m", "minicpm4_hf.eval.qat", "run", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--rate-share" in done.stdout and "ternary-40-g64" in done.stdout
