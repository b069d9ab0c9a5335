"""Runs sharded with FSDP over two processes: the losses, models and moments of one process, from real shards."""

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from minicpm4_cli import main
from minicpm4_hf.training.fsdp import MOMENTS, ShardedMoments, fsdp_settings
from minicpm4_hf.training.trainer import read_log

STAGES = ("short", "long")
SPARSE = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "window_size": 32, "topk": 3, "dense_len": 40}
CLIP_NORM = 0.3

# `minicpm4 train` in each process, with what the process holds at a stage's end written down; or killed at a step.
PROCESS = """
import json, os, signal, sys
from torch.distributed.tensor import DTensor
from minicpm4_cli import main
from minicpm4_hf.training.trainer import MiniCPM4Trainer

notes, killed_at = sys.argv[1:3]
train, step = MiniCPM4Trainer.train, MiniCPM4Trainer.training_step

def sizes(tensors):
    pairs = [(tensor, tensor.to_local() if isinstance(tensor, DTensor) else tensor) for tensor in tensors]
    return [(isinstance(whole, DTensor), local.numel(), whole.numel()) for whole, local in pairs]

def noted(self, *args, **kwargs):
    result = train(self, *args, **kwargs)
    state = self.optimizer.state_dict()["state"]
    content = {"device": self.args.device.type, "parameters": sizes(self.model.parameters())}
    content["moments"] = sizes(s[key] for s in state.values() for key in ("exp_avg", "exp_avg_sq"))
    with open(f"{notes}-{os.path.basename(self.args.output_dir)}-{self.args.process_index}.json", "w") as file:
        json.dump(content, file)
    return result

def killed(self, *args, **kwargs):
    if f"{os.path.basename(self.args.output_dir)}-{self.state.global_step}" == killed_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)

MiniCPM4Trainer.train, MiniCPM4Trainer.training_step = noted, killed
sys.exit(main(["train", *sys.argv[3:]]))
"""


def write_recipe(folder):
    """Two stages, dense and sparse, of a model with everything that is shared or odd: tied weights, a head for the
    second token, a vocabulary that two processes cannot halve, micro-batches, and gradients that are clipped."""
    rng = random.Random(0)
    syllables = [a + b for a in "bcdfghlmnprst" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(300)]
    for name in ("one", "held"):
        text = rng.choices(words, weights=[1 / (i + 1) for i in range(300)], k=4000)
        (folder / f"{name}.txt").write_text(" ".join(text))
    stage = {
        "sequences_per_step": 4,
        "micro_batch": 1,
        "learning_rate": 0.003,
        "log_every": 1,
        "evaluation_tokens": 200,
    }
    short = {**stage, "name": "short", "num_steps": 20, "length": 32, "warmup_steps": 2, "checkpoint_every": 10}
    long = {**stage, "name": "long", "num_steps": 4, "length": 96, "warmup_steps": 0, "decay_steps": 4}
    long |= {"sparse_config": SPARSE, "checkpoint_every": 2}
    architecture = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    architecture |= {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512, "dim_model_base": 16}
    recipe = {
        "output": str(folder / "run"),
        "text": {"train": [str(folder / "one.txt")], "held_out": [str(folder / "held.txt")]},
        "vocab_size": 401,
        "architecture": {**architecture, "tie_word_embeddings": True},
        "mtp_loss_weight": 0.5,
        "precision": "fp32",
        "clip_norm": CLIP_NORM,
        "stages": [short, long],
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


class Workshop:
    """Trains by one recipe in processes of their own, each with one thread, on CPUs or on a GPU each."""

    def __init__(self, folder, device):
        self.folder, self.device, self.recipe = folder, device, write_recipe(folder)
        (folder / "process.py").write_text(PROCESS)

    def train(self, name, *flags, processes=1, killed_at="never"):
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command += [self.folder / "process.py", self.folder / name, killed_at, self.recipe]
        command += ["--output", self.folder / name, *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if self.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=600)
        assert (done.returncode == 0) == (killed_at == "never"), done.stderr[-3000:]
        return self.folder / name

    def notes(self, name, stage, process):
        return json.loads((self.folder / f"{name}-{stage}-{process}.json").read_text())


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop(tmp_path_factory.mktemp("fsdp"), "cpu")


@pytest.fixture(scope="module")
def sharded(workshop):
    return workshop.train("sharded", "--set", "fsdp=true", processes=2)


def curve(run, stage, key):
    return [(record["step"], record[key]) for record in read_log(run / stage) if key in record]


def assert_sharded(workshop, name, device):
    """Every parameter and both its moments lie in two parts, which together are the whole."""
    for stage in STAGES:
        halves = [workshop.notes(name, stage, process) for process in (0, 1)]
        assert all(half["device"] == device for half in halves)
        for kind in ("parameters", "moments"):
            assert len(halves[0][kind]) >= 20
            for (first, size, whole), (second, other_size, _) in zip(*(half[kind] for half in halves)):
                assert first and second and size + other_size == whole
                assert max(size, other_size) < whole


def assert_same_run(one, other, tolerance):
    for stage in STAGES:
        for key in ("loss", "ntp_loss", "mtp_loss", "grad_norm", "learning_rate", "eval_loss"):
            expected, reached = curve(one, stage, key), curve(other, stage, key)
            assert expected and [step for step, _ in expected] == [step for step, _ in reached]
            assert [value for _, value in reached] == pytest.approx([value for _, value in expected], abs=tolerance)
        assert (
            min(norm for _, norm in curve(one, stage, "grad_norm")) > CLIP_NORM
        )  # clipping is part of the comparison
        models = [run / stage / "model" for run in (one, other)]
        files = [sorted(path.name for path in model.iterdir()) for model in models]
        assert files[0] == files[1] and "modeling_minicpm4.py" in files[1]
        assert (models[0] / "config.json").read_text() == (models[1] / "config.json").read_text()
        expected, reached = (load_file(model / "model.safetensors") for model in models)
        torch.testing.assert_close(reached, expected, rtol=0, atol=tolerance)


def moments(run, stage, steps, name):
    """The averages in a stage's last checkpoint by the place of their parameter in muP's groups."""
    saved = torch.load(run / stage / f"checkpoint-{steps}" / name, weights_only=True)
    return [saved["state"][key] for group in saved["param_groups"] for key in group["params"]]


@pytest.mark.slow
def test_two_sharded_processes_give_the_run_of_one(workshop, sharded):
    alone = workshop.train("alone")
    assert [step for step, _ in curve(alone, "short", "loss")] == list(range(1, 21))
    assert_sharded(workshop, "sharded", "cpu")
    assert not any(dtensor for dtensor, _, _ in workshop.notes("alone", "short", 0)["parameters"])
    assert_same_run(alone, sharded, 1e-5)
    for stage, steps, counted in (("short", 20, 20), ("long", 4, 24)):  # the second stage goes on with the first's
        expected, reached = moments(alone, stage, steps, "optimizer.pt"), moments(sharded, stage, steps, MOMENTS)
        assert all(state["step"] == counted for state in expected)
        torch.testing.assert_close(reached, expected, rtol=0, atol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(sharded / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "mtp.layers.0.eh_proj.weight" in load_file(sharded / "model" / "model.safetensors")


@pytest.mark.slow
def test_sharded_killed_and_resumed_is_the_run_never_killed(workshop, sharded):
    flags = ["--set", "fsdp=true"]
    workshop.train("killed", *flags, processes=2, killed_at="long-3")
    resumed = workshop.train("killed", *flags, "--resume", processes=2)
    for stage in STAGES:
        assert curve(resumed, stage, "loss") == curve(sharded, stage, "loss")
        one, other = (load_file(run / stage / "model" / "model.safetensors") for run in (sharded, resumed))
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_bfloat16_layers_keep_float32_weights(workshop):
    flags = ["--set", "precision=bf16", "--set", "stages.0.num_steps=10"]
    alone = workshop.train("alone-bf16", *flags)
    together = workshop.train("sharded-bf16", *flags, "--set", "fsdp=true", processes=2)
    assert_sharded(workshop, "sharded-bf16", "cpu")
    expected, reached = (dict(curve(run, "short", "loss")) for run in (alone, together))
    assert reached == pytest.approx(expected, abs=0.02)  # losses near 6, which bfloat16 would hold to 1/64
    assert any(torch.tensor(loss).bfloat16().item() != loss for loss in reached.values())
    weights = load_file(together / "short" / "model" / "model.safetensors")
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in weights.values())


@pytest.mark.requires_cuda
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_run_of_one(tmp_path):
    workshop = Workshop(tmp_path, "cuda")
    alone = workshop.train("alone")
    together = workshop.train("sharded", "--set", "fsdp=true", processes=2)
    assert_sharded(workshop, "sharded", "cuda")
    assert_same_run(alone, together, 1e-4)


def test_what_does_not_fit_is_named(tmp_path, monkeypatch, capsys):
    recipe = write_recipe(tmp_path)
    assert main(["train", str(recipe), "--set", "fsdp=true"]) == 2
    assert "this is the only one: start several with `torchrun" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(["train", str(recipe)]) == 2
    assert "set the recipe's `fsdp` to true" in capsys.readouterr().err
    assert fsdp_settings(True, 2)["fsdp"]


def test_moments_of_another_model_are_refused(tmp_path):
    model = nn.Linear(2, 2)
    torch.save({"state": {"weight": {}, "gate": {}}}, tmp_path / MOMENTS)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="are of another model: 'bias' is not in both"):
        ShardedMoments(tmp_path / MOMENTS).on_train_begin(None, None, None, model=model, optimizer=optimizer)
