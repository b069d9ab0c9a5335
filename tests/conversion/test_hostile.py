"""`ternary`, `int4`, `gguf`, `legacy` and the layouts under hostile input, on a full disk, and killed at any moment.

What `llama`, `draft`, `marlin` and `freq` do then is in `test_other_layouts.py`.
"""

import importlib.util
import os
import shutil

import pytest
import torch
from conversion_runs import (
    DAMAGES,
    check_killed_at_any_moment,
    in_child,
    listing,
    not_a_number,
    write_two_shards,
)

from minicpm4_hf import MiniCPM4Config, MiniCPM4ForCausalLM
from minicpm4_hf.conversion.__main__ import main
from minicpm4_hf.official_layout import to_official
from minicpm4_hf.quantization import dequantize_ternary, quantize_ternary
from minicpm4_hf.shipped import shipped_checkpoint, shipped_excerpt

CONFIG = {
    "vocab_size": 4160,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "eos_token_id": 2,
}
VICTIM = "model.layers.1.mlp.down_proj.weight"
CALIBRATED = ("--calibration", str(shipped_excerpt()), "--sequences", "2", "--length", "32")


def write_source(folder, *, ternary=False, official=False):
    """A bfloat16 model in two shards with the shipped tokenizer; its linear layers ternary or not."""
    torch.manual_seed(0)
    config = MiniCPM4Config(**CONFIG, mup_denominator=2 if official else None)
    tensors = MiniCPM4ForCausalLM(config).state_dict()
    for name, tensor in tensors.items():
        if ternary and name.endswith("_proj.weight"):
            tensor = dequantize_ternary(*quantize_ternary(tensor, 64))
        tensors[name] = tensor.to(torch.bfloat16)
    file = {**config.to_diff_dict(), "architectures": ["MiniCPM4ForCausalLM"]}
    if official:
        file = {**to_official(config.to_diff_dict()), "architectures": ["MiniCPMForCausalLM"]}
    write_two_shards(folder, tensors, file)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(shipped_checkpoint() / name, folder)
    return folder


# Name of a case -> (command and settings, what `write_source` is to write).
CASES = {
    "ternary": (("ternary",), {"ternary": True}),
    "ternary-rounded": (("ternary", "--quantize", "--group-size", "64", "--embeddings", "int4"), {}),
    "int4": (("int4", *CALIBRATED), {}),
    "int4-rtn": (("int4", "--method", "rtn", "--format", "compressed-tensors"), {}),
    "gguf": (("gguf", "--type", "q8_0"), {}),
    "legacy": (("legacy",), {}),
    "to-hf": (("to-hf",), {"official": True}),
    "to-official": (("to-official",), {}),
}
# These copy the weights without reading them, so a NaN goes over as it is.
COPYING = ("legacy", "to-hf", "to-official")


class Case:
    """A source, and the command line of a run into a given OUT."""

    def __init__(self, name, tmp_path):
        (self.command, *settings), described = CASES[name]
        self.name, self.settings, self.suffix = name, settings, ".gguf" if self.command == "gguf" else ""
        self.source = write_source(tmp_path / "in", **described)

    def arguments(self, out):
        return [self.command, str(self.source), str(out), *self.settings]


@pytest.fixture(params=CASES)
def case(request, tmp_path, monkeypatch):
    if request.param == "gguf" and importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the package gguf")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    return Case(request.param, tmp_path)


def errors(text):
    """Lines of stderr without progress and warnings."""
    return [line for line in text.splitlines() if not line.endswith(" left") and not line.startswith("warning: ")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_hostile_checkpoints(case, damage, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if damage is not_a_number and case.name in COPYING:
        pytest.skip("does not read the weights")
    damage(case.source, VICTIM)
    before = listing(tmp_path)
    capsys.readouterr()
    assert main(case.arguments(tmp_path / f"out{case.suffix}")) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (error,) = errors(captured.err)
    assert error.startswith("error: ") and error.endswith(".")
    assert DAMAGES[damage].format(name=VICTIM, folder=case.source) in error
    assert listing(tmp_path) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize("limit_bytes", [1500, 100_000])
def test_full_disk(case, tmp_path, limit_bytes):
    before = listing(tmp_path)
    code, shown = in_child(case.arguments(tmp_path / f"out{case.suffix}"), limit_bytes=limit_bytes)
    (error,) = errors(shown)
    assert code == 2 and "could not be written" in error and "free some space" in error
    if case.command != "int4":
        assert listing(tmp_path) == before
        return
    # int4 keeps its finished layers, out of sight, and goes on from them.
    assert set(listing(tmp_path)) - set(before) <= {".out.partial"}
    assert in_child(case.arguments(tmp_path / "out")) == (0, "")
    assert listing(tmp_path) == sorted([*before, "out"])


def test_too_little_space_is_said_first(case, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    before = listing(tmp_path)
    assert main(case.arguments(tmp_path / f"out{case.suffix}")) == 2
    assert "and its disk has 0.0 kB free; free some space or name an OUT on another disk." in capsys.readouterr().err
    assert listing(tmp_path) == before


def test_out_exists_or_has_no_place(case, tmp_path, capsys):
    there = tmp_path / f"there{case.suffix}"
    there.mkdir()
    before = listing(tmp_path)
    for out, sentence in ((there, "already exists"), (tmp_path / "no" / there.name, "is not a folder")):
        assert main(case.arguments(out)) == 2
        assert sentence in errors(capsys.readouterr().err)[-1]
    assert listing(tmp_path) == before and not listing(there)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_any_moment(case, tmp_path):
    check_killed_at_any_moment(case.arguments, tmp_path, 4, suffix=case.suffix)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_killed_at_fifty_moments(case, tmp_path):
    whole = check_killed_at_any_moment(case.arguments, tmp_path, 50, suffix=case.suffix)
    print(f"{case.name}: OUT was there after {whole} of 50 kills")
