"""Whole checkpoints in int4: what the files hold, resuming, loading, the command line, and everything refused."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import build_model
from transformers import AutoConfig, AutoModelForCausalLM

from minicpm4_hf.conversion import gptq_model, int4, output
from minicpm4_hf.conversion.gptq import quantize_gptq
from minicpm4_hf.conversion.gptq_layer import INPUT_GROUPS, LINEARS
from minicpm4_hf.conversion.gptq_model import METHODS, Int4Settings
from minicpm4_hf.conversion.int4 import add_arguments, quantize_checkpoint, run
from minicpm4_hf.conversion.source import open_checkpoint
from minicpm4_hf.quantization.gptq import Int4Quantizer
from minicpm4_hf.quantization.int4 import quantize_int4
from minicpm4_hf.quantization.linear import Int4Linear
from minicpm4_hf.quantization.prefix import Prefix
from minicpm4_hf.shipped import shipped_checkpoint, shipped_excerpt

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "sparse": None}
# Weights of 0.2 would make the model so steep that rounding to nearest moves its logits by a third.
SIZES |= {"initializer_range": 0.1}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small bfloat16 checkpoint with norms that are not 1."""
    folder = tmp_path_factory.mktemp("int4") / "source"
    model = build_model(group=2, tie_word_embeddings=True, **SIZES)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data = torch.linspace(0.5, 2.0, len(parameter))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sequences():
    return torch.randint(0, 96, (12, 48), generator=torch.Generator().manual_seed(5))


def quantize(source, output, sequences=None, **settings):
    settings = Int4Settings(**{"group_size": 32, **settings})
    return quantize_checkpoint(
        open_checkpoint(source), output, settings, sequences if settings.is_calibrated else None
    )


def read_weights(folder):
    """Every weight of a quantised folder by its name in full precision, float32, field by field of the layouts."""
    tensors = load_file(folder / "model.safetensors")
    weights = {}
    for name, tensor in tensors.items():
        linear, _, part = name.rpartition(".")
        if part == "qweight":
            assert (tensors[f"{linear}.qzeros"] == 0x77777777).all()
            fields = torch.stack([(tensor >> 4 * i) & 15 for i in range(8)], 1)  # [K / 8, 8, N]
            codes, scales = fields.flatten(0, 1) - 8, tensors[f"{linear}.scales"].float()
            weights[f"{linear}.weight"] = (codes * scales[tensors[f"{linear}.g_idx"].long()]).t()
        elif part == "weight_packed":
            fields = torch.stack([(tensor >> 4 * i) & 15 for i in range(8)], 2)  # [N, K / 8, 8]
            codes, scales = fields.flatten(1) - 8, tensors[f"{linear}.weight_scale"].float()
            assert tensors[f"{linear}.weight_shape"].tolist() == list(codes.shape)
            groups = torch.arange(codes.shape[1]) // (codes.shape[1] // scales.shape[1])
            weights[f"{linear}.weight"] = codes * scales[:, groups]
        elif part == "weight":
            weights[name] = tensor.float()
    return weights


def load_dequantized(folder, *, source):
    """The model in float32 with the weights that a quantised folder's codes stand for."""
    weights = read_weights(folder)
    config = AutoConfig.from_pretrained(source)
    config.tie_word_embeddings = "lm_head.weight" not in weights
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    report = model.load_state_dict(weights, strict=False)
    assert not report.unexpected_keys and set(report.missing_keys) <= {"lm_head.weight"}
    return model.eval()


def reference_int4(source, sequences, skip, group_size=32):
    """Sequential GPTQ with the whole model run for every group of linears: linear -> codes and scales."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    results = {}
    for index, layer in enumerate(model.model.layers):
        for linears in INPUT_GROUPS.values():
            inputs = []
            handle = layer.get_submodule(linears[0]).register_forward_pre_hook(
                lambda _, x, inputs=inputs: inputs.append(x[0][0])
            )
            with torch.no_grad():
                for ids in sequences:
                    model(ids[None])
            handle.remove()
            hessian = sum(x[skip:].t() @ x[skip:] for x in inputs)
            for linear in linears:
                weight = layer.get_submodule(linear).weight
                codes, scales = quantize_gptq(weight.data, hessian, group_size=group_size)
                weight.data = (codes.view(*scales.shape, -1) * scales.float()[..., None]).flatten(1)
                results[f"model.layers.{index}.{linear}.weight"] = weight.data
    return results


@pytest.mark.parametrize(("method", "skip"), [("gptq", 0), ("p-gptq", 4)])
@pytest.mark.parametrize("layout", ["gptq", "compressed-tensors"])
def test_weights_are_those_of_sequential_gptq(source, sequences, tmp_path, method, skip, layout):
    result = quantize(source, tmp_path / "out", sequences, method=method, layout=layout)
    weights, expected = read_weights(tmp_path / "out"), reference_int4(source, sequences, skip)
    assert len(expected) == 3 * len(LINEARS)
    for name, weight in expected.items():
        # The moments are summed in another order; a code that lies between two may then go either way.
        assert (weights[name] == weight).float().mean() > 0.99, name
    originals = load_file(source / "model.safetensors")
    assert set(weights) == set(originals)
    for name in set(originals) - set(expected):
        assert torch.equal(weights[name], originals[name].float()), name
    errors = [record["errors"] for record in result["layers"]]
    assert all(0 < error[linear] < 0.02 for error in errors for linear in LINEARS)


def test_rtn_rounds_to_nearest(source, tmp_path):
    result = quantize(source, tmp_path / "out", method="rtn")
    weights, originals = read_weights(tmp_path / "out"), load_file(source / "model.safetensors")
    for name in (f"model.layers.{i}.{linear}.weight" for i in range(3) for linear in LINEARS):
        codes, scales = quantize_int4(originals[name], 32)
        assert torch.equal(weights[name], (codes.view(*scales.shape, -1) * scales.float()[..., None]).flatten(1))
    content = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "damp_percent" not in content and result["settings"]["skip_positions"] is None


VARIANTS = {
    "plain": {},
    "act-order": {"act_order": True},
    "rows": {"group_size": -1},
    "smoothed": {"method": "s-p-gptq"},
    "rotated": {"rotate": True},
    "all": {"method": "s-p-gptq", "rotate": True, "act_order": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_stays_near_the_source(source, sequences, tmp_path, name, tokens):
    quantize(source, tmp_path / "out", sequences, **VARIANTS[name])
    full = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    ids = tokens(4, 60)
    with torch.no_grad():
        expected = full(ids).logits
        error = (load_dequantized(tmp_path / "out", source=source)(ids).logits - expected).square().mean()
    assert error < 0.03 * expected.square().mean()


def test_config_and_card_say_what_was_done(source, sequences, tmp_path):
    result = quantize(source, tmp_path / "out", sequences, method="s-p-gptq", rotate=True, prefix_ids=(1, 2))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == result["files"]
    content, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", source))
    described = content.pop("quantization_config")
    assert content == original | {"tie_word_embeddings": False}
    # What CPM.cu's gptq2marlin.py asks for, but the group size, which is smaller in this test.
    wanted = {"bits": 4, "quant_method": "gptq", "checkpoint_format": "gptq", "desc_act": False, "sym": True}
    wanted |= {"lm_head": False, "static_groups": True, "group_size": 32, "damp_percent": 0.01}
    assert wanted.items() <= described.items()
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("P-GPTQ", "smoothed", "Hadamard", "PrefixQuant", "`mlp.down_proj`, relative squared error", "kB"):
        assert words in card
    assert result["settings"]["sequences"] == 12 and result["settings"]["skip_positions"] == 4
    assert result["num_bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


def test_compressed_tensors_config_is_read_by_transformers(source, sequences, tmp_path):
    quantize(source, tmp_path / "out", sequences, layout="compressed-tensors", act_order=True)
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    weights = described["config_groups"]["group_0"]["weights"]
    assert (weights["strategy"], weights["group_size"], weights["actorder"]) == ("group", 32, "static")
    assert described["format"] == "pack-quantized" and described["ignore"] == ["lm_head"]
    rows = gptq_model.LAYOUTS["compressed-tensors"].describe(-1, True, 0.01)["config_groups"]["group_0"]["weights"]
    assert (rows["strategy"], rows["group_size"], rows["actorder"]) == ("channel", None, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loads_without_gptqmodel(source, sequences, tmp_path, dtype, tokens):
    quantize(source, tmp_path / "out", sequences)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
    assert isinstance(model.hf_quantizer, Int4Quantizer)
    modules = [module for module in model.modules() if isinstance(module, Int4Linear)]
    assert len(modules) == 3 * len(LINEARS) and all(module.scales.dtype == torch.float16 for module in modules)
    exact, ids = load_dequantized(tmp_path / "out", source=source), tokens(2, 30)
    with torch.no_grad():
        expected = exact(ids).logits
        rounding = (exact.to(dtype)(ids).logits - expected).abs().max()  # the same maths in the dtype
        error = (model(ids).logits - expected).abs().max()
    assert error < 2 * rounding + 1e-5 * expected.abs().max()
    model.save_pretrained(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_loads_after_importing_the_package_alone(source, sequences, tmp_path):
    """In a new process: nothing that a test imports may be what registers the layout."""
    quantize(source, tmp_path / "out", sequences)
    program = (
        "import sys, minicpm4_hf; from transformers import AutoModelForCausalLM as Auto; "
        "print(type(Auto.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj).__name__)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["Int4Linear"], done.stderr


def test_files_that_need_gptqmodel_are_refused(source, sequences, tmp_path):
    quantize(source, tmp_path / "out", sequences)
    path = tmp_path / "out" / "config.json"
    content = json.loads(path.read_text())
    content["quantization_config"]["bits"] = 8
    path.write_text(json.dumps(content))
    with pytest.raises(
        ImportError, match=r"quantization_config has `bits` 8; only symmetric int4 .*pip install gptqmod"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


class TestPrefix:
    @pytest.fixture(scope="class")
    def folder(self, source, sequences, tmp_path_factory):
        folder = tmp_path_factory.mktemp("prefix") / "out"
        quantize(source, folder, sequences, method="s-p-gptq", prefix_ids=(1, 7, 9))
        return folder

    def test_holds_what_the_full_model_caches(self, source, folder):
        full = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        cache = full(torch.tensor([[1, 7, 9]]), use_cache=True).past_key_values
        prefix = Prefix.load(folder)
        assert prefix.token_ids.tolist() == [1, 7, 9] and prefix.keys.shape == (3, 2, 3, 16)
        for index, layer in enumerate(cache.layers):
            torch.testing.assert_close(prefix.keys[index][None], layer.keys.detach(), rtol=1e-3, atol=1e-4)
        # Smoothing scales values, and `o_proj` undoes it: a channel's ratio is the same at every position.
        ratio = prefix.values[0] / cache.layers[0].values[0].detach()
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3, atol=1e-4)

    def test_a_text_goes_on_from_it(self, source, folder, tokens):
        model, full = load_dequantized(folder, source=source), AutoModelForCausalLM.from_pretrained(source)
        prefix, ids = Prefix.load(folder), tokens(2, 20)
        whole = prefix.prepend(ids)
        assert whole.shape == (2, 23) and torch.equal(whole[:, 3:], ids)
        assert torch.equal(prefix.prepend(whole[:, :1]), whole[:, :3])  # its own first token is left out
        with torch.no_grad():
            behind = model(ids, past_key_values=prefix.build_cache(model, batch_size=2)).logits
            expected = full.float()(whole).logits[:, 3:]
        assert (behind - expected).square().mean() < 0.03 * expected.square().mean()
        generated = model.generate(
            whole, past_key_values=prefix.build_cache(model, 2), max_new_tokens=4, do_sample=False
        )
        assert generated.shape == (2, 27)
        assert torch.equal(generated[:, 23], behind[:, -1].argmax(-1))

    def test_errors(self, source, folder, tmp_path):
        with pytest.raises(ValueError, match=r"has no prefix\.safetensors: this model was quantised without"):
            Prefix.load(source)
        (tmp_path / "prefix.safetensors").write_bytes(b"\0" * 20)
        with pytest.raises(ValueError, match=r"prefix\.safetensors is damaged"):
            Prefix.load(tmp_path)
        prefix = Prefix.load(folder)
        Prefix(prefix.token_ids[:2], prefix.keys, prefix.values).save(tmp_path)
        with pytest.raises(ValueError, match=r"does not fit together: \[2\] tokens, keys \[3, 2, 3, 16\]"):
            Prefix.load(tmp_path)
        other = build_model(group=2, **{**SIZES, "num_hidden_layers": 2})
        with pytest.raises(
            ValueError, match="of a model with 3 layers, 2 key heads of size 16; the model given has 2"
        ):
            prefix.build_cache(other)
        other.config.num_hidden_layers, other.config.sparse_config = 3, {"use_nope": True}
        with pytest.raises(ValueError, match="`sparse_config\\['use_nope'\\]` must be false"):
            prefix.build_cache(other)


class Stopped(BaseException):
    """Stands in for a kill."""


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


RESUMED = {"method": "s-p-gptq", "prefix_ids": (1, 2), "rotate": True}
# What the run is killed in, and how many calls of it come through.
KILLS = [("save_step", 0), ("save_step", 1), ("write_all", 0), ("write_all", 2), ("shards", 0)]

DONE = {("save_step", 1): 1, ("write_all", 2): 1, ("shards", 0): 3}  # layers that need not be done again


@pytest.mark.parametrize(("function", "calls"), KILLS, ids=[f"{name}-{calls}" for name, calls in KILLS])
def test_a_resumed_run_ends_with_the_same_bytes(source, sequences, tmp_path, monkeypatch, function, calls):
    quantize(source, tmp_path / "whole", sequences, **RESUMED)
    owner = gptq_model.HiddenStates if function == "write_all" else gptq_model.Output
    real, count = getattr(owner, function), [0]

    def stopping(self, *args, **kwargs):
        if count[0] == calls:
            raise Stopped
        count[0] += 1
        return real(self, *args, **kwargs)

    monkeypatch.setattr(owner, function, stopping)
    loaded, load = [], gptq_model.LayerRunner.load
    monkeypatch.setattr(
        gptq_model.LayerRunner, "load", lambda self, index, weights: (loaded.append(index), load(self, index, weights))
    )
    with pytest.raises(Stopped):
        quantize(source, tmp_path / "out", sequences, **RESUMED)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(owner, function, real)
    del loaded[:]
    quantize(source, tmp_path / "out", sequences, **RESUMED)
    assert loaded == list(range(DONE.get((function, calls), 0), 3))
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_a_run_killed_while_it_cleans_up_leaves_nothing_to_resume(source, sequences, tmp_path, monkeypatch):
    """OUT is there, and of what lay beside it some steps are removed already; then OUT is removed, and made again."""
    quantize(source, tmp_path / "whole", sequences)
    removed, rmtree = [], shutil.rmtree

    def stopping(folder, **kwargs):
        removed.append(folder)
        next((folder / "steps").glob("*.safetensors")).unlink()
        raise Stopped

    monkeypatch.setattr(output.shutil, "rmtree", stopping)
    with pytest.raises(Stopped):
        quantize(source, tmp_path / "out", sequences)
    monkeypatch.setattr(output.shutil, "rmtree", rmtree)
    assert removed and (tmp_path / ".out.partial").exists()
    shutil.rmtree(tmp_path / "out")
    quantize(source, tmp_path / "out", sequences)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_a_killed_process_is_resumed(source, sequences, tmp_path):
    """SIGKILL while the hidden states after the second layer are written."""
    torch.save(sequences, tmp_path / "sequences.pt")
    code = f"""
import os, signal, sys, torch
torch.set_num_threads(1)
from minicpm4_hf.conversion import gptq_calibration
from minicpm4_hf.conversion.gptq_model import Int4Settings
from minicpm4_hf.conversion.int4 import quantize_checkpoint
from minicpm4_hf.conversion.source import open_checkpoint
write = gptq_calibration.HiddenStates.write_all
def write_all(self, states):
    def some():
        for i, state in enumerate(states):
            if self.path.name == "states-2" and i == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            yield state
    write(self, some())
gptq_calibration.HiddenStates.write_all = write_all
sequences = torch.load({str(tmp_path / "sequences.pt")!r}, weights_only=True)
settings = Int4Settings(group_size=32)
quantize_checkpoint(open_checkpoint({str(source)!r}), {str(tmp_path / "out")!r}, settings, sequences)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial" / "steps" / "states-2.writing").exists()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        quantize(source, tmp_path / "out", sequences)
        quantize(source, tmp_path / "whole", sequences)
    finally:
        torch.set_num_threads(threads)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_other_settings_begin_anew_and_lost_states_are_told(source, sequences, tmp_path, monkeypatch):
    def interrupted():
        real, count = gptq_model.Output.save_step, [0]

        def stopping(self, *args):
            real(self, *args)
            count[0] += 1
            if count[0] == 2:
                raise Stopped

        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(gptq_model.Output, "save_step", stopping)
            quantize(source, tmp_path / "out", sequences)

    interrupted()
    quantize(source, tmp_path / "whole", sequences[1:])
    quantize(source, tmp_path / "out", sequences[1:])  # other calibration tokens
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
    shutil.rmtree(tmp_path / "out")
    interrupted()
    (tmp_path / ".out.partial" / "steps" / "states-2").unlink()
    with pytest.raises(
        ValueError, match=r"has left no hidden states .*; run the same command again, which begins anew"
    ):
        quantize(source, tmp_path / "out", sequences)
    assert not list(tmp_path.glob(".out*"))


def test_progress_is_told(source, sequences, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minicpm4_hf.conversion.output.PROGRESS_SECONDS", 0.0)
    quantize(source, tmp_path / "out", sequences)
    lines = capsys.readouterr().err.splitlines()
    layers = [line for line in lines if line.startswith("layer 2 of 3, down: ")]
    assert len(layers) == 12 and " of 180 passes" in layers[0] and layers[0].endswith(" left")


def arguments(source, output, *words):
    parser = argparse.ArgumentParser()
    for name in ("source", "output"):
        parser.add_argument(name)
    parser.add_argument("--dry-run", action="store_true")
    add_arguments(parser)
    return parser.parse_args([str(source), str(output), *map(str, words)])


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    """A small checkpoint with the shipped one's tokenizer."""
    folder = tmp_path_factory.mktemp("int4") / "with-tokenizer"
    build_model(group=2, **{**SIZES, "vocab_size": 4160, "num_hidden_layers": 1}).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped_checkpoint() / name, folder)
    return folder


SMALL = ("--calibration", shipped_excerpt(), "--sequences", 4, "--length", 32, "--group-size", 32)


def test_the_command_reads_texts(with_tokenizer, tmp_path):
    dry = run(arguments(with_tokenizer, tmp_path / "out", *SMALL, "--dry-run"))
    assert not list(tmp_path.iterdir())
    result = run(arguments(with_tokenizer, tmp_path / "out", *SMALL))
    assert dry["settings"] == result["settings"] and result["settings"]["method"] == "p-gptq"
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert dry["num_bytes"] == sum(tensor.nbytes for tensor in weights.values())
    assert dry["hidden_state_bytes"] == 2 * 4 * 32 * 64 * 4
    assert "of weights in place of" in dry["summary"] and "of disk and about" in dry["summary"]
    assert {"tokenizer.json", "tokenizer_config.json", "README.md"} <= set(result["files"])


def test_the_command_stores_a_prefix(with_tokenizer, tmp_path):
    run(arguments(with_tokenizer, tmp_path / "out", "--method", "rtn", "--prefix", "--group-size", 32))
    prefix = Prefix.load(tmp_path / "out")
    assert prefix.token_ids[0] == 1 and 2 <= len(prefix.token_ids) <= 4
    result = run(arguments(with_tokenizer, tmp_path / "other", *SMALL, "--prefix", "One"))
    assert len(result["settings"]["prefix_ids"]) > 1
    assert result["settings"]["prefix_ids"] == Prefix.load(tmp_path / "other").token_ids.tolist()


def test_the_whole_command_line(with_tokenizer, tmp_path):
    command = [sys.executable, "-m", "minicpm4_hf.conversion", "int4", with_tokenizer, tmp_path / "out", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    wrong = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr.count("\n") == 1
    assert wrong.stderr == "error: `--method p-gptq` needs `--calibration TEXT`; only rtn does without.\n"
    done = subprocess.run([*command, *map(str, SMALL)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == sorted(path.name for path in (tmp_path / "out").iterdir())


REFUSED = {
    "no calibration": (("--method", "gptq"), "`--method gptq` needs `--calibration TEXT`; only rtn does without."),
    "calibrated rtn": ((*SMALL, "--method", "rtn"), "rounds to nearest without calibration; leave out"),
    "short text": ((*SMALL[:2], "--sequences", 128, "--length", 2048), "give more text, or fewer or shorter ones"),
    "nothing left": ((*SMALL, "--length", 4), "leave nothing after the 4 positions that are left out; give longer"),
    "too long": ((*SMALL, "--sequences", 1, "--length", 4097), "of 4097 tokens are longer than the model's 4096"),
    "group size": ((*SMALL, "--group-size", 64), "has 96 inputs, no multiple of the group size 64; give another"),
    "skip": ((*SMALL, "--skip-positions", -1), "`--skip-positions` must be at least 0, got -1."),
    "skip with rtn": (("--method", "rtn", "--skip-positions", 2), "is for methods with calibration; rtn has none"),
    "order with rtn": (("--method", "rtn", "--act-order"), "`--act-order` is for methods with calibration"),
    "no such text": (("--calibration", "none.txt"), "There is no file or folder 'none.txt'"),
    "no such device": ((*SMALL, "--device", "warp"), "`--device` must be a torch device"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_command_refuses(with_tokenizer, tmp_path, name):
    words, message = REFUSED[name]
    with pytest.raises((ValueError, OSError)) as caught:
        run(arguments(with_tokenizer, tmp_path / "out", *words))
    assert message in str(caught.value) and not list(tmp_path.iterdir())


def change_source(source, folder, *, config=None, weights=None):
    """A copy of the checkpoint with another config, or with weights that a function has changed."""
    shutil.copytree(source, folder)
    if config:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | config))
    if weights:
        tensors = load_file(folder / "model.safetensors")
        weights(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


UP = "model.layers.1.mlp.up_proj.weight"


def poison(tensors):
    tensors[UP][3, 4] = float("nan")


BROKEN = {
    "nan": ({"weights": poison}, f"{UP} in "),
    "missing": ({"weights": lambda tensors: tensors.pop(UP)}, f"lack {UP}"),
    "shape": ({"weights": lambda tensors: tensors.update({UP: tensors[UP][:8].clone()})}, r"has shape \[8, 64\]"),
    "quantised": ({"config": {"quantization_config": {"quant_method": "gptq"}}}, "is quantised already; start from"),
    "biases": ({"config": {"attention_bias": True}}, "bias"),
    "headless": ({"config": {"architectures": ["MiniCPM4Model"]}}, "holds a MiniCPM4Model; int4 is for causal"),
    "vocabulary": ({"config": {}}, "The tokenizer gave the token 97, but the model has 97; the two do not belong"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_checkpoints_that_are_refused(source, sequences, tmp_path, name):
    changes, message = BROKEN[name]
    folder = change_source(source, tmp_path / "source", **changes)
    if name == "vocabulary":
        sequences = sequences.clone()
        sequences[0, 0] = 97
    with pytest.raises(ValueError, match=message):
        quantize(folder, tmp_path / "out", sequences)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_biases_mtp_heads_and_unrotated_keys_are_refused(tmp_path, sequences):
    model = build_model(group=2, attention_bias=True, **SIZES)
    model.save_pretrained(tmp_path / "biased")
    with pytest.raises(
        ValueError, match=r"has biases \(`attention_bias` in its config\.json\), for which int4 has no"
    ):
        quantize(tmp_path / "biased", tmp_path / "out", sequences)
    model = build_model(group=2, **SIZES).add_mtp_head_()
    model.save_pretrained(tmp_path / "mtp")
    with pytest.raises(ValueError, match="has an MTP head, which `--rotate` does not rotate; load the model without"):
        quantize(tmp_path / "mtp", tmp_path / "out", sequences, rotate=True)
    quantize(tmp_path / "mtp", tmp_path / "out", sequences)
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(kept["mtp.layers.0.eh_proj.weight"], model.mtp.layers[0].eh_proj.weight)
    build_model(group=2, **{**SIZES, "sparse": {"use_nope": True}}).save_pretrained(tmp_path / "nope")
    with pytest.raises(ValueError, match="`--prefix` stores rotated keys only"):
        quantize(tmp_path / "nope", tmp_path / "other", sequences, prefix_ids=(1, 2))
    build_model(group=2, **{**SIZES, "intermediate_size": 100}).save_pretrained(tmp_path / "odd")
    with pytest.raises(
        ValueError, match=r"proj\.weight has shape \[(100, 64|64, 100)\]; the int4 layouts need multiples"
    ):
        quantize(tmp_path / "odd", tmp_path / "other", sequences)


def test_sequences_and_methods_belong_together(source, sequences, tmp_path):
    for method in METHODS:
        wrong = None if Int4Settings(method).is_calibrated else sequences
        with pytest.raises(ValueError, match=f"The method {method} takes (no )?calibration sequences"):
            quantize_checkpoint(open_checkpoint(source), tmp_path / "out", Int4Settings(method, 32), wrong)


def test_a_full_disk_is_told_before_anything_is_computed(source, sequences, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(int4, "quantize_layers", None)
    with pytest.raises(OSError, match=r"needs .* kB, and its disk has 1\.0 kB free"):
        quantize(source, tmp_path / "out", sequences)
    assert not list(tmp_path.iterdir())


def test_shards_and_official_names_are_kept(source, sequences, tmp_path):
    """A sharded source in the official layout gives what one file in the minicpm4 layout does."""
    from minicpm4_hf.conversion.hf import convert_to_official

    model = AutoModelForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    convert_to_official(tmp_path / "sharded", tmp_path / "official")
    (tmp_path / "official" / "modeling_minicpm.py").write_text("# remote code\n")
    quantize(tmp_path / "official", tmp_path / "out", sequences)
    quantize(source, tmp_path / "whole", sequences)
    first, second = (read_weights(tmp_path / name) for name in ("out", "whole"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "minicpm"
    assert (Path(tmp_path) / "out" / "modeling_minicpm.py").is_file()
