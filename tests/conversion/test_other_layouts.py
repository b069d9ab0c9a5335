"""`llama`, `draft`, `marlin` and `freq` under hostile input, on a full disk, and killed at any moment."""

import os
import shutil

import pytest
import torch
from conversion_runs import DAMAGES, check_killed_at_any_moment, in_child, listing, write_two_shards, wrong_shape

from minicpm4_hf import MiniCPM4Config, MiniCPM4ForCausalLM
from minicpm4_hf.conversion.__main__ import main
from minicpm4_hf.quantization.int4 import pack_gptq, quantize_int4
from minicpm4_hf.shipped import shipped_checkpoint

H, INNER, VOCAB = 256, 256, 500
CONFIG = {
    "vocab_size": VOCAB,
    "hidden_size": H,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "eos_token_id": 2,
}
QUANTISED = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
# Command -> a tensor to damage, which is in the second shard.
VICTIMS = {
    "llama": "model.layers.1.mlp.down_proj.weight",
    "draft": "layers.1.mlp.down_proj.weight",
    "marlin": "model.layers.1.mlp.down_proj.scales",
}


def write(folder, tensors, config):
    write_two_shards(folder, tensors, config)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def write_llama_source(folder):
    torch.manual_seed(0)
    config = MiniCPM4Config(**CONFIG)
    file = config.to_diff_dict() | {"architectures": ["MiniCPM4ForCausalLM"]}
    return write(folder, MiniCPM4ForCausalLM(config).state_dict(), file)


def write_draft_source(folder):
    torch.manual_seed(0)
    state = MiniCPM4ForCausalLM(MiniCPM4Config(**CONFIG)).state_dict()
    tensors = {name.removeprefix("model."): tensor for name, tensor in state.items() if "layers." in name}
    tensors |= {"fc.weight": torch.randn(H, 2 * H), "input_norm1.weight": torch.ones(H)}
    return write(folder, tensors | {"input_norm2.weight": torch.ones(H)}, CONFIG)


def write_marlin_source(folder):
    torch.manual_seed(0)
    config = MiniCPM4Config(**CONFIG)
    tensors = {}
    for name, tensor in MiniCPM4ForCausalLM(config).state_dict().items():
        if name.endswith("_proj.weight"):
            parts = pack_gptq(*quantize_int4(tensor, 128))
            tensors |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in parts.items()}
        else:
            tensors[name] = tensor.half()
    return write(folder, tensors, config.to_diff_dict() | {"quantization_config": QUANTISED})


def write_freq_source(folder):
    folder.mkdir()
    words = [f"word{i % 97} " for i in range(30000)]
    (folder / "a.txt").write_text("".join(words))
    return folder


SOURCES = {
    "llama": (write_llama_source, ()),
    "draft": (write_draft_source, ("--to", "ours")),
    "marlin": (write_marlin_source, ()),
    "freq": (write_freq_source, ("--tokenizer", str(shipped_checkpoint()), "--sizes", "64", "512")),
}


@pytest.fixture(params=SOURCES)
def conversion(request, tmp_path, monkeypatch):
    """(command, its source, the arguments of a run into a given OUT)."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    make, settings = SOURCES[request.param]
    source = make(tmp_path / "in")
    return request.param, source, lambda out: [request.param, str(source), str(out), *settings]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_any_moment(conversion, tmp_path):
    check_killed_at_any_moment(conversion[2], tmp_path, 8)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_fifty_moments(conversion, tmp_path):
    whole = check_killed_at_any_moment(conversion[2], tmp_path, 50)
    print(f"{conversion[0]}: OUT was there after {whole} of 50 kills")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("limit_bytes", [100, 1500])
def test_full_disk(conversion, tmp_path, limit_bytes):
    _, _, arguments = conversion
    before = listing(tmp_path)
    code, shown = in_child(arguments(tmp_path / "out"), limit_bytes=limit_bytes)
    assert code == 2 and shown.count("\n") == 1, shown
    assert "could not be written" in shown and "run the same command again." in shown
    assert listing(tmp_path) == before


def test_too_little_space_is_said_first(conversion, tmp_path, capsys, monkeypatch):
    command, _, arguments = conversion
    if command == "freq":
        pytest.skip("its files are a few kB")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    assert main(arguments(tmp_path / "out")) == 2
    assert "and its disk has 0.0 kB free; free some space or name an OUT on another disk." in capsys.readouterr().err
    assert listing(tmp_path) == ["in"]


# A draft's config says nothing of its tensors' shapes; what draft and marlin say differs.
WORDS = {**DAMAGES, wrong_shape: "{name} in {folder}/model-00002-of-00002.safetensors "}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("command", VICTIMS)
def test_hostile_checkpoints(tmp_path, capsys, monkeypatch, command, damage):
    monkeypatch.chdir(tmp_path)
    make, settings = SOURCES[command]
    folder, name = make(tmp_path / "in"), VICTIMS[command]
    damage(folder, name)
    before = listing(tmp_path)
    capsys.readouterr()
    assert main([command, str(folder), str(tmp_path / "out"), *settings]) == 2
    captured = capsys.readouterr()
    error = [line for line in captured.err.splitlines() if not line.endswith(" left")]
    assert captured.out == "" and len(error) == 1
    assert error[0].startswith("error: ") and WORDS[damage].format(name=name, folder=folder) in error[0]
    assert listing(tmp_path) == before


def test_out_exists_or_has_no_place(conversion, tmp_path, capsys):
    _, _, arguments = conversion
    (tmp_path / "there").mkdir()
    for out, sentence in (("there", "already exists"), ("no/out", "is not a folder")):
        assert main(arguments(tmp_path / out)) == 2
        assert sentence in capsys.readouterr().err
    assert listing(tmp_path) == ["in", "there"] and not listing(tmp_path / "there")
