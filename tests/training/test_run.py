"""Whole training runs on made-up text: what they leave, and that a kill, a full disk or a bad loss loses nothing."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from minicpm4_cli import main
from minicpm4_hf.training.recipe import load_recipe
from minicpm4_hf.training.run import run_recipe
from minicpm4_hf.training.trainer import MiniCPM4Trainer, TrainingStopped, read_log

SPARSE = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "window_size": 32, "topk": 3, "dense_len": 40}


def book(seed: int, words: int = 3000) -> str:
    """A made-up book: words of made-up syllables, some far more frequent than others."""
    rng = random.Random(seed)
    syllables = [a + b for a in "bcdfghlmnprst" for b in ("a", "e", "i", "ou")]
    vocabulary = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(300)]
    chosen = rng.choices(vocabulary, weights=[1 / (i + 1) for i in range(300)], k=words)
    return "".join(word + (".\n" if i % 40 == 39 else " ") for i, word in enumerate(chosen))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for seed, name in enumerate(("one", "two", "held")):
        (folder / f"{name}.txt").write_text(book(seed))
    return folder


@pytest.fixture
def recipe_file(tmp_path, corpus):
    """A recipe of two stages, dense and sparse, that takes seconds."""
    short = {"name": "short", "num_steps": 6, "length": 32, "sequences_per_step": 4, "micro_batch": 2}
    short |= {"warmup_steps": 2, "log_every": 1, "checkpoint_every": 2, "evaluation_tokens": 200}
    long = {"name": "long", "num_steps": 4, "length": 96, "sequences_per_step": 2, "warmup_steps": 0}
    long |= {"decay_steps": 4, "sparse_config": SPARSE, "log_every": 1, "checkpoint_every": 2, "evaluate_every": 2}
    architecture = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    architecture |= {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512}
    recipe = {
        "output": str(tmp_path / "run"),
        "text": {"train": [str(corpus)], "held_out": [str(corpus / "held.txt")]},
        "vocab_size": 400,
        "architecture": {**architecture, "dim_model_base": 16, "tie_word_embeddings": True},
        "precision": "fp32",
        "stages": [short, long],
    }
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


def losses(folder) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_log(folder) if "loss" in record]


def test_a_run_from_text_to_a_checkpoint(recipe_file, tmp_path, capsys):
    assert main(["train", str(recipe_file), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    run = tmp_path / "run"
    assert result["model"] == str(run / "model") and [s["name"] for s in result["stages"]] == ["short", "long"]
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert model.dtype == torch.bfloat16 and model.config.sparse_config["topk"] == 3
    assert model.config.use_cache  # or it would generate without a cache
    assert "sou" in tokenizer.decode(tokenizer("sou").input_ids)
    assert model.generate(**tokenizer("ba", return_tensors="pt"), max_new_tokens=3).shape[1] > 3

    for stage, steps in (("short", 6), ("long", 4)):
        assert [step for step, _ in losses(run / stage)] == list(range(1, steps + 1))
        assert (run / stage / "curve.svg").read_text().startswith("<?xml")
        assert (
            not list((run / stage).glob("**/training_args.bin"))
            or not (run / stage / "model" / "training_args.bin").exists()
        )
        assert not list((run / stage).glob(".*"))
    first, last = losses(run / "short")[0][1], losses(run / "long")[-1][1]
    assert last < first  # it learns
    evaluations = [record["eval_loss"] for record in read_log(run / "long") if "eval_loss" in record]
    assert evaluations[-1] == pytest.approx(result["stages"][1]["held_out_loss"])
    assert 0 < result["stages"][1]["held_out_bits_per_byte"] < 8
    # the held-out book is in the folder that is trained on, and was left out of it
    index = json.loads((run / "shards" / "train" / "index.json").read_text())
    assert [source["name"] for source in index["sources"]] == ["one.txt", "two.txt"]


def test_the_second_stage_goes_on_with_weights_and_moments(recipe_file, tmp_path, monkeypatch):
    seen = []
    train = MiniCPM4Trainer.train

    def watch(self, *args, **kwargs):
        state = self.optimizer.state_dict()["state"] if self.optimizer else {}
        seen.append((len(state), next(self.model.parameters()).detach().clone()))
        return train(self, *args, **kwargs)

    monkeypatch.setattr(MiniCPM4Trainer, "train", watch)
    run_recipe(load_recipe(recipe_file))
    finished = load_file(tmp_path / "run" / "short" / "model" / "model.safetensors")
    assert [count > 0 for count, _ in seen] == [False, True]
    assert torch.equal(seen[1][1], finished["model.embed_tokens.weight"])


def test_a_run_with_a_head_for_the_second_token_and_fp8(recipe_file, tmp_path):
    run_recipe(load_recipe(recipe_file, ["mtp_loss_weight=0.5", "fp8=true"]))
    run = tmp_path / "run"
    for stage in ("short", "long"):
        records = [record for record in read_log(run / stage) if "loss" in record]
        assert records
        for record in records:
            assert record["loss"] == pytest.approx(record["ntp_loss"] + 0.5 * record["mtp_loss"], rel=1e-5)
    weights = load_file(run / "model" / "model.safetensors")
    assert "mtp.layers.0.eh_proj.weight" in weights
    plain = AutoModelForCausalLM.from_pretrained(run / "model")
    assert plain.mtp is None
    ids = AutoTokenizer.from_pretrained(run / "model")("ba cou di", return_tensors="pt").input_ids
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(plain.generate(ids, **options), plain.generate(ids, use_mtp=True, **options))


def test_a_run_that_trains_the_selection(recipe_file, tmp_path):
    run_recipe(load_recipe(recipe_file, ['stages.1.selection={"weight": 0.5, "num_queries": 4}']))
    short, long = (
        [line for line in read_log(tmp_path / "run" / stage) if "loss" in line] for stage in ("short", "long")
    )
    assert len(long) == 4 and not any("selection_loss" in line for line in short)
    for line in long:
        assert line["selection_loss"] > 0
        assert line["loss"] == pytest.approx(line["ntp_loss"] + 0.5 * line["selection_loss"], rel=1e-5)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config.sparse_config is not None


KILLED_RUN = """
import os, signal, sys
from minicpm4_cli import main
from minicpm4_hf.training.trainer import MiniCPM4Trainer

stage, killed_at = sys.argv[1], int(sys.argv[2])
real = MiniCPM4Trainer.training_step

def training_step(self, *args, **kwargs):
    if self.args.output_dir.endswith(stage) and self.state.global_step == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *args, **kwargs)

MiniCPM4Trainer.training_step = training_step
main(["train", *sys.argv[3:]])
"""


def test_killed_and_resumed_is_the_run_never_killed(recipe_file, tmp_path):
    # Processes of their own, all with one thread: another number of threads adds in another order.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run(*arguments):
        return subprocess.run([sys.executable, *arguments], env=environment).returncode

    command = ["-m", "minicpm4_cli", "train", str(recipe_file)]
    assert run(*command) == 0
    whole = tmp_path / "whole"
    shutil.move(tmp_path / "run", whole)
    for stage, step, flags in (("short", 5, []), ("long", 3, ["--resume"])):
        assert run("-c", KILLED_RUN, stage, str(step), str(recipe_file), *flags) == -signal.SIGKILL
    assert run(*command, "--resume") == 0
    for stage in ("short", "long"):
        assert losses(tmp_path / "run" / stage) == losses(whole / stage)
        one, other = (
            load_file(folder / stage / "model" / "model.safetensors") for folder in (tmp_path / "run", whole)
        )
        assert all(torch.equal(one[name], other[name]) for name in other)


def test_a_full_disk_leaves_the_last_checkpoint(recipe_file, tmp_path, monkeypatch, capsys):
    save = MiniCPM4Trainer._save_optimizer_and_scheduler

    def full(self, output_dir):
        if self.state.global_step == 4:
            raise OSError(28, "No space left on device")
        save(self, output_dir)

    with monkeypatch.context() as patch:
        patch.setattr(MiniCPM4Trainer, "_save_optimizer_and_scheduler", full)
        assert main(["train", str(recipe_file)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "The checkpoint of step 4 could not be written" in error and "No space left" in error
    folder = tmp_path / "run" / "short"
    assert sorted(path.name for path in folder.glob("*check*")) == ["checkpoint-2"]
    assert not (folder / ".saving").exists()
    assert main(["train", str(recipe_file), "--resume"]) == 0


def test_a_loss_that_is_not_finite_stops_with_the_batch(recipe_file, monkeypatch, capsys):
    compute = MiniCPM4Trainer.compute_loss

    def broken(self, *args, **kwargs):
        loss = compute(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 3 else loss

    monkeypatch.setattr(MiniCPM4Trainer, "compute_loss", broken)
    assert main(["train", str(recipe_file)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "The loss is nan at step 4, in the batch of sequences 12 to 15" in error


def test_stages_that_have_not_begun_may_change(recipe_file, tmp_path, capsys):
    recipe = json.loads(recipe_file.read_text())
    first, second = recipe["stages"]

    def train(stages, *flags):
        recipe_file.write_text(json.dumps({**recipe, "stages": stages}))
        return main(["train", str(recipe_file), *flags])

    assert train([first]) == 0
    published = tmp_path / "run" / "model" / "model.safetensors"
    before = published.read_bytes()
    assert train([first, {**second, "num_steps": 5}], "--resume") == 0
    assert published.read_bytes() != before
    assert [record["step"] for record in read_log(tmp_path / "run" / "long") if "loss" in record] == [1, 2, 3, 4, 5]
    assert train([first, second], "--resume") == 2
    assert "with another `stages.1.num_steps` (5, now 4)" in capsys.readouterr().err
    assert train([first], "--resume") == 2  # one that has begun cannot be taken away
    assert "with another `stages`" in capsys.readouterr().err


def test_what_does_not_fit_is_named(recipe_file, tmp_path, corpus, capsys):
    def error_of(*flags):
        assert main(["train", str(recipe_file), *flags]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "must be a multiple of `micro_batch`" in error_of("--set", "stages.0.micro_batch=3")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "diary.txt").write_text("dear diary")
    assert "is not empty and holds no training run" in error_of()
    shutil.rmtree(tmp_path / "run")
    assert "nothing but the held-out text" in error_of("--text", str(corpus / "held.txt"))
    assert "There is no file or folder" in error_of("--text", str(corpus / "hold.txt"))
    assert not (tmp_path / "run").exists()  # a slip does not take the folder
    assert main(["train", str(recipe_file)]) == 0
    assert "already holds a run: go on with `--resume`" in error_of()
    assert "with another `seed` (0, now 1)" in error_of("--resume", "--set", "seed=1")
    shard = next((tmp_path / "run" / "shards" / "train").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 255
    shard.write_bytes(content)
    shutil.rmtree(tmp_path / "run" / "long")
    assert shard.name in error_of("--resume")


TWO_PROCESSES = """
import sys
from minicpm4_cli import main
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(recipe_file, tmp_path):
    flags = ["--set", "stages.0.num_steps=20", "--set", "stages.0.learning_rate=0.003"]
    assert main(["train", str(recipe_file), *flags]) == 0
    alone = losses(tmp_path / "run" / "short")
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    command += [str(recipe_file), *flags, "--output", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    together = losses(tmp_path / "two" / "short")
    assert len(alone) == 20
    for (step, one), (other_step, other) in zip(alone, together):
        assert step == other_step and one == pytest.approx(other, abs=1e-5)


def test_the_error_is_an_ordinary_one():
    assert issubclass(TrainingStopped, ValueError)  # one sentence and exit code 2 on the command line
