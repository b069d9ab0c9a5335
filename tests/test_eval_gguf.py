"""`python -m minicpm4_hf.eval.gguf`: both programs side by side."""

import importlib.util
import json
import shutil

import pytest
from gguf_folders import ODD, change_config, longrope, minicpm4, save
from gguf_tokenizers import official_kind, write_tokenizer

pytest.importorskip("gguf")

from minicpm4_hf.eval.gguf import main

SIZES = {
    **ODD,
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 64,
    "eos_token_id": [2, 4088],
    "rope_parameters": longrope(1024),
}
PACKED = {"quant_method": "bitcpm", "group_size": -1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval") / "tiny"
    return write_tokenizer(save(minicpm4(**SIZES), folder), official_kind())


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("It was a dark night, and nobody spoke.\n\n" * 5)
    return path


def test_a_record(folder, text, tmp_path, capsys):
    pytest.importorskip("llama_cpp")
    arguments = ["--model", str(folder), "--text", str(text), "--tokens", "40", "--new-tokens", "10"]
    arguments += ["--types", "f32", "q4_0", "--keep", str(tmp_path), "--output", str(tmp_path / "record.json")]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert "f32" in table and "0 of 4" in table and "texts are cut into other tokens" in table
    record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert record["text"] == "text.txt" and record["num_tokens"] == 40 and record["llama_cpp_system"]
    (part,) = record["checkpoints"]
    assert part["model"] == "tiny" and part["ternary_group"] is None
    tokens = part["tokenizer"]
    assert tokens["different_texts"] == 0 and tokens["texts"] > 35
    assert tokens["found_special_tokens"] == tokens["special_tokens"] == 11
    assert tokens["chat_template"] and tokens["stops"]
    assert list(part["rotary_error"]) == ["rope_factors_long", "rope_factors_short"]
    assert max(part["rotary_error"].values()) < 1e-6
    exact, rounded = part["types"]["f32"], part["types"]["q4_0"]
    assert exact["greedy_equal"] == 10 and exact["same_top"] == 1.0
    assert exact["difference"] == exact["same_weights_difference"] == exact["same_arithmetic_difference"]
    assert exact["difference"]["max"] < 1e-4 * exact["logits_std"]
    assert exact["weight_errors"]["layers"] == 0 < rounded["weight_errors"]["layers"]
    assert rounded["same_weights_difference"]["max"] < rounded["difference"]["max"]
    assert rounded["same_arithmetic_difference"]["mean"] < rounded["same_weights_difference"]["mean"]
    assert exact["file_bytes"] == (tmp_path / "tiny-f32.gguf").stat().st_size


def test_a_ternary_copy(text, tmp_path):
    pytest.importorskip("llama_cpp")
    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16, "num_hidden_layers": 1}
    folder = write_tokenizer(save(minicpm4(**sizes), tmp_path / "wide"), official_kind())
    arguments = ["--model", str(folder), "--text", str(text), "--tokens", "40", "--new-tokens", "5"]
    arguments += ["--types", "tq2_0", "--ternary", "256", "--output", str(tmp_path / "record.json")]
    assert main(arguments) == 0
    plain, ternary = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))["checkpoints"]
    assert (plain["ternary_group"], ternary["ternary_group"]) == (None, 256)
    assert plain["types"]["tq2_0"]["layers"] == "quantised"
    assert ternary["types"]["tq2_0"]["layers"] == "exact codes"
    assert ternary["types"]["tq2_0"]["weight_errors"]["layers"] == 0


def test_packed_weights(folder, text, tmp_path, capsys):
    pytest.importorskip("llama_cpp")
    packed = change_config(shutil.copytree(folder, tmp_path / "packed"), quantization_config=PACKED)
    assert main(["--model", str(packed), "--text", str(text)]) == 2
    assert "packed has packed weights; give the checkpoint that it was made of." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--tokens", "400"], "The text has"),
        (["--model", "./nowhere"], "There is no model folder './nowhere'"),
        (["--output", "./nowhere/a.json"], "nowhere' does not exist; make it"),
        (["--text", "./nowhere.txt"], "nowhere.txt"),
        (["--keep", "./nowhere"], "The folder 'nowhere' does not exist"),
    ],
    ids=lambda change: change[0] if isinstance(change, list) else "",
)
def test_wrong_input(folder, text, capsys, change, sentence):
    pytest.importorskip("llama_cpp")
    assert main(["--model", str(folder), "--text", str(text), "--tokens", "20", *change]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and sentence in error


def test_without_llama_cpp(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else find(name))
    assert main([]) == 2
    sentence = (
        "error: Comparing GGUF files needs the package llama_cpp; install both with `pip install llama-cpp-python"
    )
    assert capsys.readouterr().err.startswith(sentence)
