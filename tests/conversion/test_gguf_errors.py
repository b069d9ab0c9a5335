"""`python -m minicpm4_hf.conversion gguf`: what is refused, in one sentence, and that nothing half-made is left."""

import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("gguf")

from gguf_folders import (
    WIDE,
    change_config,
    change_weights,
    fake_quantise,
    gptq,
    map_linear,
    minicpm4,
    pack,
    save,
)

from minicpm4_hf.conversion import gguf_file
from minicpm4_hf.conversion.__main__ import main
from minicpm4_hf.conversion.gguf import convert_to_gguf

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def odd(tmp_path):
    return save(minicpm4(), tmp_path / "odd")


@pytest.fixture
def wide(tmp_path):
    return save(minicpm4(**WIDE), tmp_path / "wide")


def refuse(folder, path, sentence, capsys, **settings):
    """The command ends with 2, the sentence is on stderr, and nothing new is there."""
    before = sorted(path.parent.iterdir())
    options = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in settings.items()
    ]
    assert main(["gguf", str(folder), str(path), "--no-tokenizer", *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    error = captured.err.splitlines()[-1]  # progress may come before it
    assert error.startswith("error: ") and error.endswith(".") and sentence in error
    assert sorted(path.parent.iterdir()) == before


def test_names_and_settings(odd, tmp_path, capsys):
    path = tmp_path / "a.gguf"
    refuse(odd, tmp_path / "a.bin", "must be a file name ending in .gguf", capsys)
    refuse(odd, path, "`group_size` must be -1 (a whole row) or a multiple of 256, got 128", capsys, group_size=128)
    refuse(odd, path, "`group_size` is for full-precision checkpoints", capsys, group_size=-1)
    refuse(odd, path, "`round_scales` is for ternary types, not for f32", capsys, round_scales=True)
    refuse(odd, path, "rows of 40 weights, which is no multiple of the 32 that q8_0 takes", capsys, type="q8_0")
    refuse(odd, path, "model.embed_tokens has rows of 40", capsys, type="f16", embedding_type="q4_0")
    path.touch()
    refuse(odd, path, "already exists", capsys)
    refuse(tmp_path / "none", tmp_path / "b.gguf", "is not a folder", capsys)
    for settings in ({"type": "q3"}, {"embedding_type": "tq2_0"}):
        with pytest.raises(ValueError, match=f"`{next(iter(settings))}` must be .*one of"):
            convert_to_gguf(odd, tmp_path / "b.gguf", **settings)
    with pytest.raises(ValueError, match=r"where b\.gguf is to be created, is not a folder"):
        convert_to_gguf(odd, tmp_path / "none" / "b.gguf", tokenizer=False)


def test_group_size_that_does_not_divide(wide, tmp_path, capsys):
    sentence = "`group_size` must be -1 (a whole row) or divide the 256 columns"
    refuse(wide, tmp_path / "a.gguf", sentence, capsys, type="tq2_0", group_size=512)


@pytest.mark.parametrize("form", [fake_quantise, pack])
@pytest.mark.parametrize("group_size", [128, 32])
def test_groups_finer_than_a_block(wide, tmp_path, capsys, form, group_size):
    form(wide, group_size)
    sentence = {
        fake_quantise: f"is ternary in groups of {group_size} columns, and tq2_0 has one scale for 256",
        pack: f"has a scale for every {group_size} columns, and tq2_0 has one for 256",
    }[form]
    refuse(wide, tmp_path / "a.gguf", sentence, capsys, type="tq2_0")
    refuse(wide, tmp_path / "a.gguf", "self_attn.q_proj", capsys, type="tq2_0")


def test_scales_beyond_float16(wide, tmp_path, capsys):
    pack(wide, -1, scale=1 + 2**-13)
    refuse(wide, tmp_path / "a.gguf", "float16 scales, which cannot hold it exactly", capsys, type="tq2_0")
    result = convert_to_gguf(wide, tmp_path / "a.gguf", round_scales=True, tokenizer=False)
    assert 0 < result["errors"]["layers"] < 2**-11


def test_one_layer_that_is_not_ternary(wide, tmp_path, capsys):
    fake_quantise(wide, -1)
    damaged = {f"{UP}.weight": torch.randn(512, 256)}
    change_weights(wide, lambda tensors: {**tensors, **damaged})
    refuse(wide, tmp_path / "a.gguf", f"{UP}.weight in {wide} is not ternary, though", capsys, type="tq1_0")


def test_4_bit_weights(wide, tmp_path, capsys):
    gptq(wide, 64)
    refuse(wide, tmp_path / "a.gguf", "has 4-bit weights, and tq2_0 holds ternary ones", capsys, type="tq2_0")
    config = json.loads((wide / "config.json").read_text())["quantization_config"]
    change_config(wide, quantization_config={**config, "bits": 8})
    refuse(wide, tmp_path / "a.gguf", "has GPTQ weights of 8 bits", capsys)
    change_config(wide, quantization_config={**config, "quant_method": "awq"})
    refuse(wide, tmp_path / "a.gguf", "is quantised by 'awq'", capsys)


def test_damaged_4_bit_weights(wide, tmp_path, capsys):
    gptq(wide, 64, qzeros=lambda zeros: zeros + 1)
    refuse(wide, tmp_path / "a.gguf", "q_proj: The zero points in `qzeros`", capsys)
    change_weights(wide, lambda tensors: {k: v for k, v in tensors.items() if k != f"{UP}.scales"})
    refuse(wide, tmp_path / "a.gguf", f"{UP}", capsys)


def test_groups_finer_than_q4_0_has_them(tmp_path, capsys):
    folder = gptq(save(minicpm4(**WIDE), tmp_path / "wide"), 16)
    refuse(folder, tmp_path / "a.gguf", "a scale for every 16 columns, and q4_0 has one for 32", capsys)


def test_damaged_ternary_codes(wide, tmp_path, capsys):
    pack(wide, -1)
    change_weights(wide, lambda tensors: {**tensors, f"{UP}.weight": torch.full_like(tensors[f"{UP}.weight"], 0xFF)})
    refuse(wide, tmp_path / "a.gguf", f"{UP}.weight: The packed ternary codes hold the bit pattern 3", capsys)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"weight": lambda w: w[:, :-1].contiguous()}, f"{UP}.weight"),
        ({"weight_scale": lambda s: s[:-1].contiguous()}, f"{UP}.weight_scale"),
        ({"weight_scale": lambda s: s.repeat(1, 3)}, f"{UP}.weight"),
        ({"weight": lambda w: w.to(torch.int16)}, "int16"),
        ({"weight_scale": lambda s: s * float("nan")}, "NaN or infinity"),
        ({"weight_scale": lambda s: s.to(torch.int32)}, f"{UP}.weight_scale"),
    ],
    ids=["codes", "scales", "groups", "dtype", "nan", "scale-dtype"],
)
def test_packed_tensors_that_do_not_fit(wide, tmp_path, capsys, changes, sentence):
    pack(wide, -1)
    for part, change in changes.items():
        name = f"{UP}.{part}"
        change_weights(wide, lambda tensors, name=name, change=change: {**tensors, name: change(tensors[name])})
    refuse(wide, tmp_path / "a.gguf", sentence, capsys)


def test_weights_too_large(odd, tmp_path, capsys):
    change_weights(odd, lambda tensors: {**tensors, f"{UP}.weight": tensors[f"{UP}.weight"] * 1e7})
    refuse(odd, tmp_path / "a.gguf", "too large for f16; choose f32 or bf16", capsys, type="f16")


@pytest.mark.parametrize("layer_type", ["q8_0", "q4_0"])
def test_weights_too_large_for_a_scale(wide, tmp_path, capsys, layer_type):
    change_weights(wide, lambda tensors: {**tensors, f"{UP}.weight": tensors[f"{UP}.weight"] * 1e9})
    refuse(wide, tmp_path / "a.gguf", f"too large for {layer_type}, whose scales are float16", capsys, type=layer_type)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"hidden_act": "gelu"}, "has the activation 'gelu'"),
        ({"architectures": ["MiniCPM4ForSequenceClassification"]}, "only causal language models are converted"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "RoPE type 'dynamic'"),
        ({"model_type": "gpt2"}, "holds a model of type 'gpt2'"),
        ({"hidden_size": 48}, "config.json asks for"),
    ],
)
def test_models_without_a_place_in_llama_cpp(odd, tmp_path, capsys, settings, sentence):
    change_config(odd, **settings)
    refuse(odd, tmp_path / "a.gguf", sentence, capsys)


def test_an_unknown_tensor(odd, tmp_path, capsys):
    change_weights(odd, lambda tensors: {**tensors, "model.layers.0.extra.weight": torch.ones(3)})
    refuse(odd, tmp_path / "a.gguf", "has the tensor model.layers.0.extra.weight", capsys)


def test_hostile_folders(odd, tmp_path, capsys):
    weights = odd / "model.safetensors"
    whole = weights.read_bytes()
    path = tmp_path / "a.gguf"
    for content, sentence in (
        (whole[:-100], "is damaged or cut off"),
        ((2**60).to_bytes(8, "little") + whole[8:], "is damaged or cut off"),
        (b"", "is damaged or cut off"),
    ):
        weights.write_bytes(content)
        refuse(odd, path, sentence, capsys)
    weights.unlink()
    (odd / "pytorch_model.bin").write_bytes(b"\x80\x04\x95")
    refuse(odd, path, "a pickle, which can run code when opened", capsys)
    (odd / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    refuse(odd, path, "which is no file of this folder", capsys)


def test_nan_weights(odd, tmp_path, capsys):
    map_linear(odd, lambda name, weight: {f"{name}.weight": weight * (float("nan") if name == UP else 1.0)})
    refuse(odd, tmp_path / "a.gguf", f"{UP}.weight", capsys)


def test_without_the_gguf_package(odd, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    refuse(odd, tmp_path / "a.gguf", 'install it with `pip install "gguf>=0.19"`', capsys)


def test_a_full_disk(odd, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gguf_file.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 100, 0))
    refuse(odd, tmp_path / "a.gguf", "and its disk has 0.0 kB free", capsys)
    monkeypatch.undo()

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf_file, "write_gguf", fail)
    refuse(odd, tmp_path / "a.gguf", "could not be written (No space left on device); free some space", capsys)


def test_two_runs_at_once(odd, tmp_path, capsys):
    with gguf_file.new_file(tmp_path / "a.gguf"):
        refuse(odd, tmp_path / "a.gguf", "Another run is making", capsys)
        (tmp_path / ".a.gguf.partial").write_bytes(b"x")
    assert (tmp_path / "a.gguf").read_bytes() == b"x"


def test_what_a_killed_run_left_is_written_over(odd, tmp_path, capsys):
    (tmp_path / ".a.gguf.partial").write_bytes(b"x" * 10**6)
    (tmp_path / "a.gguf.md").write_text("half a ca")
    assert main(["gguf", str(odd), str(tmp_path / "a.gguf"), "--no-tokenizer", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["files"] == ["a.gguf", "a.gguf.md"]
    assert result["num_bytes"] == (tmp_path / "a.gguf").stat().st_size < 10**6
    assert "Measured error" in (tmp_path / "a.gguf.md").read_text()
    assert not (tmp_path / ".a.gguf.partial").exists()


def test_a_dry_run_writes_nothing(odd, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    assert main(["gguf", str(odd), str(tmp_path / "a.gguf"), "--no-tokenizer", "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert sorted(tmp_path.iterdir()) == before
    assert main(["gguf", str(odd), str(tmp_path / "a.gguf"), "--no-tokenizer", "--dry-run"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.gguf'} would be {planned['num_bytes'] / 1e3:.1f} kB\n"
    found = convert_to_gguf(odd, tmp_path / "a.gguf", tokenizer=False)
    assert 0 < found["num_bytes"] - planned["num_bytes"] < 5000  # metadata


def test_a_source_that_changes_meanwhile_leaves_nothing(odd, tmp_path, monkeypatch):
    monkeypatch.setattr("minicpm4_hf.conversion.gguf_plan.read_entry", lambda *args: iter([torch.zeros(1, 40)]))
    with pytest.raises(ValueError, match=r"token_embd.weight came to 160 bytes, but its info says 15520"):
        convert_to_gguf(odd, tmp_path / "a.gguf", tokenizer=False)
    assert [path.name for path in tmp_path.iterdir()] == ["odd"]


@pytest.mark.slow
def test_kill_at_any_moment(tmp_path):
    folder = save(minicpm4(**{**WIDE, "num_hidden_layers": 24}), tmp_path / "model")
    path = tmp_path / "a.gguf"
    # What takes long to import is there before "go", so that the moments are spread over the writing.
    code = (
        "import sys, minicpm4_hf.conversion.gguf_plan as plan\n"
        "from minicpm4_hf.conversion.gguf import convert_to_gguf\n"
        "print('go', flush=True)\n"
        "sys.exit(not convert_to_gguf(sys.argv[1], sys.argv[2], type='q8_0', tokenizer=False))\n"
    )
    command = [sys.executable, "-c", code, str(folder), str(path)]
    begin = time.monotonic()
    complete = convert_to_gguf(folder, tmp_path / "b.gguf", type="q8_0", tokenizer=False)
    seconds = time.monotonic() - begin
    expected, killed = (tmp_path / "b.gguf").read_bytes(), 0
    for moment in range(6):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(seconds * moment / 5)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if path.exists():
            assert path.read_bytes() == expected
            path.unlink()
        else:
            killed += 1
    assert killed
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert path.read_bytes() == expected
    assert sorted(os.listdir(tmp_path)) == ["a.gguf", "a.gguf.md", "b.gguf", "b.gguf.md", "model"]
    assert complete["num_bytes"] == len(expected)
