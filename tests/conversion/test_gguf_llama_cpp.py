"""GGUF files of small random models, run by llama.cpp: its logits are ours."""

import pytest
import torch

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from gguf_folders import (
    LONG,
    SHORT,
    WIDE,
    fake_quantise,
    gptq,
    llama,
    longrope,
    minicpm4,
    pack,
    save,
)

from minicpm4_hf.conversion.gguf import TYPES, convert_to_gguf
from minicpm4_hf.eval.gguf_reference import greedy_of, load_file_weights_, logits_of, rounded_inputs
from minicpm4_hf.eval.llama_cpp_model import LlamaCppModel

IDS = torch.randint(3, 96, (60,), generator=torch.Generator().manual_seed(0)).tolist()


def assert_same(model, path, **settings):
    """llama.cpp's logits are those of `model`, up to llama.cpp's arithmetic."""
    expected = logits_of(model, IDS)
    with rounded_inputs(model, path):
        rounded = logits_of(model, IDS)
    with LlamaCppModel(path, **settings) as engine:
        found = torch.from_numpy(engine.logits(IDS))
        if rounded.equal(expected):
            assert (found - expected).abs().max() <= 2e-5 * expected.std()
            assert engine.greedy(IDS, 20) == greedy_of(model, IDS, 20)
            return
    # Sums in another order turn the rounding of some numbers, so the two with rounding are near, but not equal.
    assert (found - expected).abs().max() <= 1.5 * (rounded - expected).abs().max()
    assert (found - rounded).abs().mean() <= 0.75 * (rounded - expected).abs().mean()


@pytest.mark.parametrize("layer_type", TYPES)
def test_each_type(tmp_path, layer_type):
    model = minicpm4(**{**WIDE, "num_hidden_layers": 2, "initializer_range": 0.06})
    convert_to_gguf(save(model, tmp_path / "model"), tmp_path / "a.gguf", type=layer_type, tokenizer=False)
    load_file_weights_(model, tmp_path / "a.gguf")
    assert_same(model, tmp_path / "a.gguf")


def with_biases(model):
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


ROPES = {
    "short": longrope(4096),
    "long": longrope(1024),
    "factor": longrope(4096, attention_factor=1.3),
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "theta": {"rope_type": "default", "rope_theta": 500.0},
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("build", [minicpm4, llama], ids=["minicpm", "llama"])
def test_rotary_embeddings(tmp_path, name, build):
    model = build(rope_parameters=ROPES[name])
    convert_to_gguf(save(model, tmp_path / "model"), tmp_path / "a.gguf", tokenizer=False)
    # For so few tokens and so small a context, transformers' Llama and llama.cpp both take the short factors.
    assert_same(model, tmp_path / "a.gguf")


@pytest.mark.parametrize(
    "settings",
    [
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1, "head_dim": 10},
        {"scale_emb": 3.5, "scale_depth": 2.0, "dim_model_base": 7},
        {"attention_bias": True, "mlp_bias": True},
        {"rms_norm_eps": 0.1},
        {"num_hidden_layers": 5},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_shapes_and_scales(tmp_path, settings):
    model = with_biases(minicpm4(**settings))
    convert_to_gguf(save(model, tmp_path / "model"), tmp_path / "a.gguf", tokenizer=False)
    assert_same(model, tmp_path / "a.gguf")


def test_a_long_context_turns_as_the_model_does(tmp_path):
    # llama.cpp's context is above the original length, so it takes the tensor of long factors; the model's own
    # context is not, so it turns by the short list.
    assert SHORT != LONG
    model = minicpm4(rope_parameters=longrope(1024), max_position_embeddings=1024)
    convert_to_gguf(save(model, tmp_path / "model"), tmp_path / "a.gguf", tokenizer=False)
    assert_same(model, tmp_path / "a.gguf", context_tokens=2048)


@pytest.mark.parametrize("form", ["weights", "packed", "gptq"])
def test_carried_codes(tmp_path, form):
    model = minicpm4(**{**WIDE, "initializer_range": 0.06})
    folder = save(model, tmp_path / "model")
    {"weights": fake_quantise, "packed": pack, "gptq": gptq}[form](folder, 64 if form == "gptq" else -1)
    layer_type = "q4_0" if form == "gptq" else "tq2_0"
    convert_to_gguf(folder, tmp_path / "a.gguf", type=layer_type, embedding_type="f32", tokenizer=False)
    load_file_weights_(model, tmp_path / "a.gguf")
    assert_same(model, tmp_path / "a.gguf")


def test_a_file_that_llama_cpp_does_not_load(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"llama\.cpp does not load .*a\.gguf"):
        LlamaCppModel(tmp_path / "a.gguf")
