"""Ternary layers in training: their values and gradients, what a run packs, distillation, and every mistake named."""

import dataclasses
import json
import os
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from small_models import build_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from minicpm4_cli import main
from minicpm4_hf.quantization import TernaryLinear, dequantize_ternary, quantize_ternary, unpack_ternary
from minicpm4_hf.quantization.linear import ternary_linear_reference
from minicpm4_hf.training.distillation import DistillSettings, Teacher, divergence
from minicpm4_hf.training.fp8 import use_fp8_linears_
from minicpm4_hf.training.models import find_model
from minicpm4_hf.training.qat import (
    LatentLinear,
    TernarySettings,
    check_fit,
    ternary_linear,
    ternary_values,
    use_plain_linears_,
    use_ternary_linears_,
)
from minicpm4_hf.training.recipe import load_recipe, shipped_recipe
from minicpm4_hf.training.run import run_recipe
from minicpm4_hf.training.trainer import MiniCPM4Trainer, read_log

GROUP_SIZES = (-1, 256, 128, 64, 32)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- one layer


def test_values_by_hand():
    weight = torch.tensor([[0.5, -0.25, 1.0, 0.25], [3.0, -3.0, 0.0, 0.0]])
    expected = torch.tensor([[0.5, 0.0, 0.5, 0.0], [1.5, -1.5, 0.0, 0.0]])  # scales 0.5 and 1.5; 0.25 is a tie
    assert torch.equal(ternary_values(weight), expected)
    halves = torch.tensor([[0.375, -0.375, 0.625, 0.0], [3.0, -3.0, 0.0, 0.0]])
    assert torch.equal(ternary_values(weight, 2), halves)
    assert torch.equal(ternary_values(torch.zeros(2, 4)), torch.zeros(2, 4))
    spoiled = ternary_values(torch.tensor([[1.0, float("nan")], [1.0, -1.0]]))
    assert spoiled.isnan().tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_values_are_those_of_the_packed_codes(group_size):
    weight = 0.05 * draw(33, 512)
    assert torch.equal(ternary_values(weight, group_size), dequantize_ternary(*quantize_ternary(weight, group_size)))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("autocast", [False, True])
def test_forward_is_the_packed_layer(group_size, autocast):
    linear = nn.Linear(256, 24)
    x = draw(2, 5, 256)
    packed = TernaryLinear.from_linear(linear, group_size)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = ternary_linear(x, linear.weight, linear.bias, group_size=group_size)
    assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
    with torch.no_grad():
        packed.bias.data = packed.bias.to(out.dtype)
        expected = ternary_linear_reference(x.to(out.dtype), packed.weight, packed.weight_scale) + packed.bias
        assert torch.equal(out, expected)
        # A kernel may sum in another order, and scale its sums instead of rounding scaled weights.
        values = ternary_values(linear.weight, group_size).double()
        exact = F.linear(x.to(out.dtype).double(), values, packed.bias.double())
        error, plain_error = (
            ((y.double() - exact).norm() / exact.norm()).item() for y in (packed(x.to(out.dtype)), out)
        )
        assert error <= 2 * plain_error + torch.finfo(out.dtype).eps


@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_gradient_passes_through_the_quantiser(group_size, autocast):
    """Against autograd through a plain product whose leaf is the quantised weight."""
    weight, bias, x, upstream = draw(24, 64), draw(24, seed=1), draw(2, 5, 64, seed=2), draw(2, 5, 24, seed=3)
    latent = [t.clone().requires_grad_() for t in (x, weight, bias)]
    values = dequantize_ternary(*quantize_ternary(weight, group_size))
    plain = [t.clone().requires_grad_() for t in (x, values, bias)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = ternary_linear(*latent, group_size=group_size)
        expected = F.linear(*plain[:2])
        expected = expected + plain[2].to(expected.dtype)
    assert torch.equal(out, expected)
    out.backward(upstream.to(out.dtype))
    expected.backward(upstream.to(out.dtype))
    for ours, theirs in zip(latent, plain):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-2 if autocast else 1e-5, atol=1e-5)
    assert latent[1].grad.abs().min() > 0  # where the code is 0 or clipped, too


def test_codes_come_from_float32():
    """Weights just beside half a scale, whose bfloat16 neighbours have the other code."""
    weight = torch.full((1, 64), 1.0)
    weight[0, 1::2] = 0.33325  # mean 0.666625: half of it is 0.3333125
    rounded = weight.to(torch.bfloat16).float()
    assert quantize_ternary(weight)[0][0, 1] == 0 and quantize_ternary(rounded)[0][0, 1] == 1
    with torch.autocast("cpu", torch.bfloat16):
        out = ternary_linear(torch.eye(64), weight)
    assert out[1, 0] == 0 and out[0, 0] == torch.tensor(0.666625).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"must be float32, got torch\.bfloat16: rounded ones have other codes"):
        ternary_linear(torch.eye(64), weight.to(torch.bfloat16))


def test_inputs_that_do_not_fit():
    with pytest.raises(ValueError, match=r"`x` must be \[\.\.\., 8\], as `weight` has features, got \[2, 4\]"):
        ternary_linear(torch.zeros(2, 4), torch.zeros(4, 8))
    with pytest.raises(ValueError, match=r"got \[8\]"):
        ternary_linear(torch.zeros(8), torch.zeros(4, 8))
    with pytest.raises(ValueError, match="or divide the 8 columns of the weight, got 3"):
        ternary_linear(torch.zeros(2, 8), torch.zeros(4, 8), group_size=3)


# ---- a model


def test_layers_are_swapped_in_and_out(tokens):
    model = build_model(num_mtp_layers=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = tokens(2, 40)
    with torch.no_grad():
        plain = model(ids).logits
    model.mtp or model.add_mtp_head_()
    names = use_ternary_linears_(model, group_size=32)
    assert len(names) == 7 * 2 and not any(name.startswith("mtp") for name in names)
    assert {name for name, module in model.named_modules() if isinstance(module, LatentLinear)} == set(names)
    assert "group_size=32" in repr(model.get_submodule(names[0]))
    with torch.no_grad():
        ternary = model(ids).logits
        assert use_ternary_linears_(model) == names  # switches
        rows = model(ids).logits
    assert not torch.equal(plain, ternary) and not torch.equal(rows, ternary)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert use_plain_linears_(model) == names and use_plain_linears_(model) == []
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain)


def test_models_that_do_not_fit():
    with pytest.raises(ValueError, match="must hold MiniCPM4 or Llama decoder layers, got Linear without any"):
        use_ternary_linears_(nn.Linear(4, 4))
    model = build_model()
    for group_size in (48, 0):
        with pytest.raises(ValueError, match=rf"'model\.layers\.0\.self_attn\.q_proj' cannot be .* got {group_size}"):
            use_ternary_linears_(model, group_size=group_size)
    model.model.layers[1].mlp.up_proj.forward = lambda x: x
    with pytest.raises(
        ValueError, match=r"up_proj' must be a plain nn\.Linear, got Linear with a `forward` of its own"
    ):
        use_ternary_linears_(model)
    assert not any(isinstance(module, LatentLinear) for module in model.modules())
    model = build_model()
    use_fp8_linears_(model)
    with pytest.raises(ValueError, match="got FP8Linear; load the latent weights"):
        use_ternary_linears_(model)


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match=r"`group_size` must be one of -1, 256, 128, 64, 32 .* got 48"):
        TernarySettings(group_size=48)
    with pytest.raises(ValueError, match="`embeddings` must be None, 'int8' or 'int4', got 'int2'"):
        TernarySettings(embeddings="int2")
    with pytest.raises(ValueError, match=r"q_proj cannot be packed: .* divide the 64 inputs, got 128"):
        check_fit(build_model().config, TernarySettings(group_size=128))
    with pytest.raises(ValueError, match=r"embed_tokens cannot be packed: .* divide the 64 inputs, got 128"):
        check_fit(build_model().config, TernarySettings(embeddings="int4"))
    for weight in (0.0, 1.1):
        with pytest.raises(ValueError, match=rf"`distill\.weight` must be above 0 and at most 1, got {weight}"):
            DistillSettings(teacher="x", weight=weight)
    for temperature in (0.0, float("inf")):
        with pytest.raises(ValueError, match=rf"`distill\.temperature` must be a number above 0, got {temperature}"):
            DistillSettings(teacher="x", temperature=temperature)


# ---- distillation


def test_divergence_is_the_sum_over_scored_tokens():
    student, teacher = draw(2, 6, 11), draw(2, 6, 11, seed=1)
    labels = torch.full((2, 6), -100)
    labels[0, 2], labels[1, 5], labels[1, 0] = 3, 7, 4  # the last is no target: nothing comes before it
    for temperature in (1.0, 2.5):
        expected = 0.0
        for row, place in ((0, 1), (1, 4)):
            ours, theirs = (
                torch.distributions.Categorical(logits=logits[row, place] / temperature)
                for logits in (student, teacher)
            )
            expected += torch.distributions.kl_divergence(theirs, ours) * temperature**2
        torch.testing.assert_close(divergence(student, teacher, labels, temperature=temperature), expected)
    leaves = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    divergence(*leaves, labels).backward()
    assert leaves[1].grad is None and leaves[0].grad[0, 1].abs().sum() > 0
    assert leaves[0].grad[[0, 1], [2, 5]].abs().sum() == 0
    assert divergence(student, student, labels).abs() < 1e-6


# ---- runs


def book(seed: int, words: int = 3000) -> str:
    rng = random.Random(seed)
    syllables = [a + b for a in "bcdfghlmnprst" for b in ("a", "e", "i", "ou")]
    vocabulary = ["".join(rng.choices(syllables, k=rng.randint(1, 3))) for _ in range(300)]
    return " ".join(rng.choices(vocabulary, weights=[1 / (i + 1) for i in range(300)], k=words))


STAGE = {"length": 32, "sequences_per_step": 4, "micro_batch": 2, "log_every": 1, "checkpoint_every": 2}
STAGE |= {"warmup_steps": 1, "evaluation_tokens": 200, "learning_rate": 0.01}
ARCHITECTURE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ARCHITECTURE |= {"num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 512, "dim_model_base": 16}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with text, and a small finished model `full/model` in full precision."""
    folder = tmp_path_factory.mktemp("qat")
    (folder / "text.txt").write_text(book(0))
    (folder / "held.txt").write_text(book(1))
    recipe = {
        "output": str(folder / "full"),
        "text": {"train": [str(folder / "text.txt")], "held_out": [str(folder / "held.txt")]},
        "vocab_size": 400,
        "architecture": {**ARCHITECTURE, "tie_word_embeddings": True},
        "precision": "fp32",
        "stages": [{**STAGE, "name": "full", "num_steps": 12, "checkpoint_every": 6}],
    }
    (folder / "full.json").write_text(json.dumps(recipe))
    run_recipe(load_recipe(folder / "full.json"))
    return folder


@pytest.fixture(scope="module")
def recipe_file(base):
    """From the full model: a ternary stage on the text, then one with the full model as teacher."""
    ternary = {"ternary": {"group_size": 32, "embeddings": "int8"}}
    first = {**STAGE, **ternary, "name": "qat", "num_steps": 6}
    second = {**STAGE, **ternary, "name": "distill", "num_steps": 4, "warmup_steps": 0, "decay_steps": 4}
    second["distill"] = {"teacher": str(base / "full" / "model"), "weight": 0.75, "temperature": 2.0}
    recipe = json.loads((base / "full.json").read_text())
    recipe |= {"output": str(base / "whole"), "model": str(base / "full" / "model"), "stages": [first, second]}
    recipe["precision"] = "bf16"
    for name in ("vocab_size", "architecture"):
        del recipe[name]
    path = base / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


@pytest.fixture(scope="module")
def whole(recipe_file, base):
    """The folder and the result of the run."""
    return base / "whole", run_recipe(load_recipe(recipe_file))


def losses(folder) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_log(folder) if "loss" in record]


def test_a_run_ends_in_latent_and_packed_weights(whole, base, tokens):
    run, result = whole
    assert result["model"] == str(run / "model") and result["ternary"] == str(run / "ternary")
    assert [stage["ternary_group_size"] for stage in result["stages"]] == [32, 32]
    assert losses(run / "qat")[-1][1] < losses(run / "qat")[0][1]  # it learns

    # latent weights: an ordinary float32 checkpoint with the names of any other
    latent, full = (load_file(folder / "model" / "model.safetensors") for folder in (run, base / "full"))
    assert latent.keys() == full.keys() and {tensor.dtype for tensor in latent.values()} == {torch.float32}
    stage = load_file(run / "distill" / "model" / "model.safetensors")
    assert all(torch.equal(latent[name], tensor) for name, tensor in stage.items())
    assert "quantization_config" not in json.loads((run / "model" / "config.json").read_text())

    # packed: the quantiser's codes and scales of the float32 weights
    packed = load_file(run / "ternary" / "model.safetensors")
    scales = [name for name in packed if name.endswith("proj.weight_scale")]
    assert len(scales) == 7 * 2
    for name in scales:
        codes, expected = quantize_ternary(latent[name.removesuffix("_scale")], 32)
        assert torch.equal(unpack_ternary(packed[name.removesuffix("_scale")]), codes)
        assert torch.equal(packed[name], expected)
    config = json.loads((run / "ternary" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["group_size"], config["embeddings"]) == ("bitcpm", 32, "int8")
    tokenizer = AutoTokenizer.from_pretrained(run / "ternary")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(base / "full" / "model").get_vocab()

    # and the logits of the model as it was trained, up to the embedding and the norms, which are rounded
    loaded = AutoModelForCausalLM.from_pretrained(run / "ternary", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert model.dtype == torch.float32
    use_ternary_linears_(model, group_size=32)
    ids = tokens(2, 40)
    with torch.no_grad():
        close = model(ids).logits
        model.model.embed_tokens.weight.copy_(loaded.model.embed_tokens.dequantize(torch.float32))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(parameter.to(torch.bfloat16))
        logits = loaded(ids).logits
        torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=1e-5)
    assert 0 < (close - logits).abs().max() < 0.1 < logits.abs().max()


def test_the_loss_of_a_distillation(recipe_file, whole, tmp_path, base):
    records = [record for record in read_log(whole[0] / "distill") if "loss" in record]
    assert len(records) == 4
    for record in records:
        assert record["loss"] == pytest.approx(0.25 * record["ntp_loss"] + 0.75 * record["distill_loss"], rel=1e-5)
        assert record["ntp_loss"] > 3 and record["distill_loss"] > 0
    # the model as its own teacher has nothing to learn from it
    stage = {**STAGE, "name": "own", "num_steps": 1, "checkpoint_every": 1}
    stage["distill"] = {"teacher": str(base / "full" / "model")}
    own = [f"stages={json.dumps([stage])}", f"output={tmp_path / 'own'}", "precision=fp32"]
    assert run_recipe(load_recipe(recipe_file, own))["ternary"] is None
    assert not (tmp_path / "own" / "ternary").exists()
    (record,) = (record for record in read_log(tmp_path / "own" / "own") if "loss" in record)
    assert abs(record["distill_loss"]) < 1e-5 < 3 < record["ntp_loss"] and record["loss"] == record["distill_loss"]
    teacher = Teacher(DistillSettings(**stage["distill"]), device=torch.device("cpu"), dtype=torch.bfloat16)
    assert not teacher.model.training and {weight.requires_grad for weight in teacher.model.parameters()} == {False}
    assert teacher.model.dtype == torch.bfloat16


def test_stopped_and_resumed_is_the_run_never_stopped(recipe_file, whole, tmp_path, monkeypatch):
    step, run = MiniCPM4Trainer.training_step, tmp_path / "run"

    def stop_at(stage, number):
        def stopped(self, *args, **kwargs):
            if self.args.output_dir.endswith(stage) and self.state.global_step == number:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        return stopped

    for stage, number in (("qat", 5), ("distill", 3)):
        with monkeypatch.context() as patch:
            patch.setattr(MiniCPM4Trainer, "training_step", stop_at(stage, number))
            with pytest.raises(KeyboardInterrupt):
                run_recipe(load_recipe(recipe_file, [f"output={run}"]), resume=stage == "distill")
    # how the model is packed may still change
    changes = [f"output={run}", "stages.1.ternary.embeddings=null"]
    run_recipe(load_recipe(recipe_file, changes), resume=True)
    for stage in ("qat", "distill"):
        assert losses(run / stage) == losses(whole[0] / stage)
        one, other = (load_file(folder / stage / "model" / "model.safetensors") for folder in (run, whole[0]))
        assert all(torch.equal(one[name], other[name]) for name in other)
    packed = load_file(run / "ternary" / "model.safetensors")
    assert packed["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_a_new_model_with_a_head_for_the_second_token_and_fp8(base, tmp_path):
    stage = {**STAGE, "num_steps": 2}
    stages = [{**stage, "name": "full"}, {**stage, "name": "qat", "ternary": {"group_size": -1}}]
    changes = [f"stages={json.dumps(stages)}", "mtp_loss_weight=0.5", "fp8=true", f"output={tmp_path / 'run'}"]
    result = run_recipe(load_recipe(base / "full.json", changes))
    packed = load_file(tmp_path / "run" / "ternary" / "model.safetensors")
    assert packed["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    assert packed["mtp.layers.0.eh_proj.weight"].dtype == torch.bfloat16
    plain = AutoModelForCausalLM.from_pretrained(result["ternary"], dtype="auto")
    ids = AutoTokenizer.from_pretrained(result["ternary"])("ba cou di", return_tensors="pt").input_ids
    options = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(plain.generate(ids, **options), plain.generate(ids, use_mtp=True, **options))


def test_mistakes_in_a_recipe_are_named(recipe_file, whole, tmp_path, capsys):
    def error_of(*settings):
        settings = (f"output={tmp_path / 'run'}", *settings)
        assert main(["train", str(recipe_file), *(word for setting in settings for word in ("--set", setting))]) == 2
        lines = capsys.readouterr().err.splitlines()
        return lines[-1]

    assert "'distill' follows the ternary 'qat' and must be ternary as well" in error_of("stages.1.ternary=null")
    assert "`group_size` must be one of" in error_of("stages.0.ternary.group_size=7")
    assert "q_proj cannot be packed: " in error_of("stages.0.ternary.group_size=64")
    assert "embed_tokens cannot be packed: " in error_of("stages.1.ternary.embeddings=int4")
    assert "`stages.0.ternary` has no setting 'groups'" in error_of("stages.0.ternary.groups=1")
    assert "`distill` is for the next token alone" in error_of("mtp_loss_weight=0.3")
    assert "set `precision` to fp32, or `fsdp` to false" in error_of("fsdp=true", "precision=bf16")
    for setting in ("model=no/such/model", "stages.1.distill.teacher=no/such/model"):
        assert "There is no model folder 'no/such/model', and it is no Hub name (owner/name)" in error_of(setting)
    assert not (tmp_path / "run").exists()  # a slip does not take the folder
    assert "must have the tokens of the model that learns from it, and has others (vocabularies of 4096 and" in (
        error_of("stages.1.distill.teacher=minicpm4-books")
    )
    error = error_of(f"model={whole[0] / 'ternary'}", f"output={tmp_path / 'more'}")
    assert "is quantised, and training goes on from full weights: of a ternary run they are in its folder" in error


def test_the_shipped_recipe():
    path = shipped_recipe("minicpm4-books-ternary")
    recipe = load_recipe(path)
    assert find_model(recipe.model) != recipe.model and find_model("a/b") == "a/b"
    first, second = recipe.stages
    assert first.distill is None and second.distill.teacher == recipe.model
    assert first.ternary == second.ternary == TernarySettings(group_size=-1, embeddings="int8")
    # re-warm-up from the floor to half of the rate that the full-precision model began with
    full = load_recipe(shipped_recipe("minicpm4-books"))
    assert first.warmup_steps and first.learning_rate == full.stages[0].learning_rate / 2
    sparse = [stage.sparse_config for stage in full.stages][-1]
    assert second.sparse_config == sparse

    # the rate falls to the end, in the stage that has the teacher
    assert first.decay_steps == 0 < second.decay_steps and second.learning_rate < first.learning_rate
    assert dataclasses.asdict(recipe)["stages"][0]["ternary"] == {"group_size": -1, "embeddings": "int8"}


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_give_the_losses_of_one(recipe_file, tmp_path, fsdp):
    changes = ["precision=fp32", "stages.0.num_steps=12", "stages.0.learning_rate=0.003", "stages.0.micro_batch=1"]
    changes += ["stages.1.learning_rate=0.003", "stages.1.micro_batch=1"]
    flags = [word for change in changes for word in ("--set", change)]
    assert main(["train", str(recipe_file), *flags, "--output", str(tmp_path / "run")]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "minicpm4_cli", "train", str(recipe_file), *flags, "--output", str(tmp_path / "two")]
    command += ["--set", f"fsdp={json.dumps(fsdp)}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    for stage in ("qat", "distill"):
        one, two = ([r for r in read_log(tmp_path / run / stage) if "loss" in r] for run in ("run", "two"))
        assert len(one) == len(two) > 3
        for ours, theirs in zip(one, two):
            for name in {"loss", "ntp_loss", "distill_loss"} & set(ours):
                assert ours[name] == pytest.approx(theirs[name], abs=1e-4), (stage, name)
    assert (tmp_path / "two" / "ternary" / "model.safetensors").is_file()
