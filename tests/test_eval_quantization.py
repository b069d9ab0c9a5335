"""The benchmark of int4: planted activations are massive where they should be, errors are in order, records whole."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minicpm4_hf.conversion.gptq_model import Int4Settings
from minicpm4_hf.conversion.int4 import quantize_checkpoint
from minicpm4_hf.conversion.source import open_checkpoint
from minicpm4_hf.eval.quantization import __main__ as command
from minicpm4_hf.eval.quantization.measure import QuantizedFolder, layer_errors, score_windows
from minicpm4_hf.eval.quantization.planted import NUM_FIRST, build_planted, random_sequences
from minicpm4_hf.perplexity import score_tokens
from minicpm4_hf.shipped import shipped_excerpt

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "head_dim": 32,
    "vocab_size": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def plant(folder, massive, num_layers=1):
    build_planted(folder, num_layers=num_layers, massive=massive, **SMALL)
    return open_checkpoint(folder)


@pytest.mark.parametrize("massive", [10.0, 1000.0])
def test_the_first_positions_carry_massive_activations(tmp_path, massive):
    plant(tmp_path / "model", massive, num_layers=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    inputs = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, x: inputs.append(x[0][0].abs()))
    with torch.no_grad():
        model(random_sequences(512, 1, 64, 0))
    first = inputs[0][:NUM_FIRST].amax(1)
    assert ((first > massive / 2) & (first < massive * 2)).all()
    assert inputs[0][NUM_FIRST:].median() < 0.5
    if massive == 1000.0:
        assert all(layer[:NUM_FIRST].max() > 20 * layer[NUM_FIRST:].max() for layer in inputs)


def test_errors_are_in_order_with_massive_activations(tmp_path):
    """On texts that were not seen: P-GPTQ below GPTQ below rounding to nearest, for a layer and for `down_proj`."""
    source = plant(tmp_path / "model", 1000.0)
    sequences, unseen = random_sequences(512, 24, 128, 1), random_sequences(512, 6, 128, 2)
    results = [command.measure_variant(source, name, 128, sequences, unseen) for name in ("rtn", "gptq", "p-gptq")]
    for error in ("layer_error", "down_proj_error"):
        nearest, plain, without_first = (result[error] for result in results)
        assert without_first < 0.95 * plain < 0.9 * nearest


@pytest.mark.parametrize("variant", ["p-gptq+rotate", "s-p-gptq", "gptq+prefix"])
def test_layer_errors_undo_what_the_variant_changed(tmp_path, variant):
    source = plant(tmp_path / "model", 10.0, num_layers=2)
    sequences, unseen = random_sequences(512, 12, 96, 1), random_sequences(512, 4, 96, 2)
    nearest, result = (
        command.measure_variant(source, name, 128, sequences, unseen, (0, 1, 2, 3)) for name in ("rtn", variant)
    )
    assert 0 < result["layer_error"] < nearest["layer_error"] and len(result["layer_errors"]) == 2
    assert (result["down_proj_error"] is None) == (variant != "gptq+prefix")


def test_layer_error_of_the_source_itself_is_zero(tmp_path):
    source = plant(tmp_path / "model", 10.0)
    quantize_checkpoint(source, tmp_path / "out", Int4Settings("rtn"))
    quantized = QuantizedFolder(tmp_path / "out")
    names = [name for name in load_file(tmp_path / "model" / "model.safetensors") if "proj" in name]
    quantized.tensors |= {name: source.tensor(name).clone() for name in names}
    errors = layer_errors(source, quantized, random_sequences(512, 2, 32, 0), first=NUM_FIRST)
    assert errors["layer"] == [0.0] and errors["down_proj"][0] > 0  # the codes are still the rounded ones


def test_windows_are_scored_after_bos_or_prefix(tmp_path):
    source = plant(tmp_path / "model", 10.0)
    sequences = random_sequences(512, 4, 32, 1)
    quantize_checkpoint(source, tmp_path / "out", Int4Settings("gptq", prefix_ids=(0, 1)), sequences)
    quantized = QuantizedFolder(tmp_path / "out")
    model, ids = quantized.load_model(), torch.arange(4, 53)
    plain = score_windows(model, ids, 25, 0, None)  # windows of 24 tokens, and one of one token, which says nothing
    expected = [score_tokens(model, torch.cat((torch.tensor([0]), part)))[1:] for part in ids[:48].split(24)]
    assert plain == pytest.approx(torch.cat(expected).mean().item(), rel=1e-5)
    cached = score_windows(model, ids, 25, 0, quantized.prefix)
    assert cached == pytest.approx(plain, rel=0.3) and cached != plain


def test_planted_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "build_planted", lambda folder, **kw: build_planted(folder, **kw, **SMALL))
    words = ["planted", "--layers", "1", "--massive", "100", "--sequences", "3", "--length", "24", "--unseen", "2"]
    assert command.main([*words, "--output", str(tmp_path / "record.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert record == json.loads((tmp_path / "record.json").read_text())
    assert lines[0].startswith("| massive | variant | layer error |") and lines[2].startswith("| 100 | rtn | ")
    assert [result["variant"] for result in record["results"]] == ["rtn", "gptq", "p-gptq"]
    assert record["settings"]["sequences"] == 3 and "cannot" not in record


def test_checkpoint_command(tmp_path, capsys):
    text = str(shipped_excerpt())
    words = ["checkpoint", "--calibration", text, "--held-out", text, "--variants", "rtn", "gptq+prefix"]
    words += ["--sequences", "2", "--length", "32", "--unseen", "1", "--tokens", "64", "--context", "32"]
    assert command.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert record["model"] == "minicpm4-books" and lines[2].startswith("| full precision | - | - | ")
    for result in record["results"]:
        assert result["perplexity"] == pytest.approx(record["full_precision_perplexity"], rel=0.5)
    assert record["settings"]["held_out"] == [shipped_excerpt().name]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["planted", "--massive", "0", "--layers", "1"], "`--massive` must be greater than 0, got 0.0."),
        (["planted", "--length", "5"], "`--length` must be greater than 5, got 5."),
        (
            ["checkpoint", "--calibration", "a.txt", "--held-out", "a.txt", "--context", "2"],
            "`--context` must be 3 to",
        ),
        (["checkpoint", "--calibration", "a.txt", "--held-out", "a.txt"], "There is no file or folder 'a.txt'"),
        (["planted", "--output", "none/record.json"], "The folder of 'none/record.json' does not exist."),
    ],
)
def test_wrong_input_is_one_sentence(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
