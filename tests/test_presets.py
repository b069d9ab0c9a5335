"""The presets against the published sizes."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from minicpm4_hf import PRESETS, MiniCPM4Config, build_config
from minicpm4_hf.configuration_minicpm4 import DEFAULT_SPARSE_CONFIG

# Known sizes in billions: from the byte sizes of the published bfloat16 files (16.4 GB, 868 MB, 2.72 GB) and, for the
# BitCPM-CANN sizes, from the counts their GGUF files state.
BILLIONS = {
    "MiniCPM4-8B": 8.19,
    "MiniCPM4.1-8B": 8.19,
    "MiniCPM4-0.5B": 0.434,
    "BitCPM4-1B": 1.36,
    "BitCPM4-0.5B": 0.434,
    "BitCPM-CANN-0.5B": 0.434,
    "BitCPM-CANN-1B": 1.62,
    "BitCPM-CANN-3B": 3.6,
    "BitCPM-CANN-8B": 8.19,
}
LLAMA = ("BitCPM-CANN-1B", "BitCPM-CANN-3B")


def count_by_formula(config):
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    attention = 2 * hidden * heads * config.head_dim + 2 * hidden * kv_heads * config.head_dim
    layer = attention + 3 * hidden * config.intermediate_size + 2 * hidden
    embeddings = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return config.num_hidden_layers * layer + embeddings + hidden


def test_every_official_size_is_there():
    assert set(PRESETS) == set(BILLIONS)


@pytest.mark.parametrize("name", BILLIONS)
def test_parameter_counts(name):
    config = build_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    count = model.num_parameters()
    assert count == count_by_formula(config)
    assert count / 1e9 == pytest.approx(BILLIONS[name], rel=5e-3)


@pytest.mark.parametrize("name", BILLIONS)
def test_configs(name):
    config = build_config(name)
    assert type(config) is (LlamaConfig if name in LLAMA else MiniCPM4Config)
    assert config.vocab_size == 73448
    rope = config.rope_parameters
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("longrope", 10000.0, 1.0)
    assert rope["short_factor"] == rope["long_factor"]
    assert len(rope["long_factor"]) == config.head_dim // 2
    assert rope["original_max_position_embeddings"] == config.max_position_embeddings
    if name not in LLAMA:
        assert (config.scale_emb, config.scale_depth, config.dim_model_base) == (12, 1.4, 256)
        assert config.sparse_config is None


def test_lengths():
    lengths = {name: build_config(name).max_position_embeddings for name in PRESETS}
    assert lengths.pop("MiniCPM4.1-8B") == 65536
    assert set(lengths.values()) == {32768}


def test_sparse():
    assert build_config("MiniCPM4-8B", sparse=True).sparse_config == DEFAULT_SPARSE_CONFIG
    assert build_config("MiniCPM4-8B", sparse=True, sparse_config={"topk": 8}).sparse_config["topk"] == 8
    with pytest.raises(ValueError, match="BitCPM-CANN-1B is a Llama model without sparse attention"):
        build_config("BitCPM-CANN-1B", sparse=True)


def test_overrides_and_independence():
    config = build_config("MiniCPM4-8B", num_hidden_layers=2, vocab_size=100)
    assert (config.num_hidden_layers, config.vocab_size, config.hidden_size) == (2, 100, 4096)
    config.rope_parameters["long_factor"][0] = 0.0
    assert build_config("MiniCPM4-8B").rope_parameters["long_factor"][0] > 0.9
    assert build_config("MiniCPM4-8B").num_hidden_layers == 32


def test_refusals():
    with pytest.raises(ValueError, match="No preset named 'MiniCPM5'; the known ones are MiniCPM4-8B, "):
        build_config("MiniCPM5")
    with pytest.raises(ValueError, match="for head size 128, and the overrides give head size 16"):
        build_config("MiniCPM4-8B", hidden_size=64, num_attention_heads=4)
    assert build_config("MiniCPM4-8B", hidden_size=64, num_attention_heads=4, rope_parameters=None).head_dim == 16
