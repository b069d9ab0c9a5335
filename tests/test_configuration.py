"""MiniCPM4Config: the muP scales, what it refuses and in which words, and round trips."""

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from minicpm4_hf import MiniCPM4Config
from minicpm4_hf.configuration_minicpm4 import DEFAULT_SPARSE_CONFIG, complete_sparse_config

# Source: spec of the official checkpoints: 1.4 / sqrt(layers) and hidden_size / 256.
SCALES = {
    "MiniCPM4-8B": (4096, 32, 0.2474874, 16.0),
    "MiniCPM4-0.5B": (1024, 24, 0.2857738, 4.0),
    "BitCPM4-1B": (1536, 52, 0.1941451, 6.0),
}

WRONG_SPARSE_CONFIGS = [
    ({"kernel_size": 0}, "`sparse_config['kernel_size']` must be an integer of at least 1, got 0."),
    ({"kernel_stride": 0}, "`sparse_config['kernel_stride']` must be an integer of at least 1, got 0."),
    ({"kernel_stride": -16}, "`sparse_config['kernel_stride']` must be an integer of at least 1, got -16."),
    ({"init_blocks": -1}, "`sparse_config['init_blocks']` must be an integer of at least 0, got -1."),
    ({"block_size": 0}, "`sparse_config['block_size']` must be an integer of at least 1, got 0."),
    ({"window_size": -64}, "`sparse_config['window_size']` must be an integer of at least 0, got -64."),
    ({"topk": 0}, "`sparse_config['topk']` must be an integer of at least 1, got 0."),
    ({"topk": 1.5}, "`sparse_config['topk']` must be an integer of at least 1, got 1.5."),
    ({"topk": "64"}, "`sparse_config['topk']` must be an integer of at least 1, got '64'."),
    ({"topk": True}, "`sparse_config['topk']` must be an integer of at least 1, got True."),
    ({"topk": None}, "`sparse_config['topk']` must be an integer of at least 1, got None."),
    ({"dense_len": -2}, "`sparse_config['dense_len']` must be an integer of at least -1, got -2."),
    ({"use_nope": 1}, "`sparse_config['use_nope']` must be true or false, got 1."),
    ({"kernel_size": 24}, "`sparse_config['kernel_size']` must be a multiple of `kernel_stride` (16), got 24."),
    ({"block_size": 72}, "`sparse_config['block_size']` must be a multiple of `kernel_stride` (16), got 72."),
    ({"window_size": 100}, "`sparse_config['window_size']` must be a multiple of `block_size` (64), got 100."),
    ({"init_blocks": 64}, "`sparse_config['topk']` must be at least `init_blocks` + 1 (65)"),
    ({"top_k": 64}, "`sparse_config` has no key 'top_k'; the allowed keys are kernel_size, kernel_stride,"),
]


@pytest.mark.parametrize("name", SCALES)
def test_scales(name):
    hidden_size, layers, residual_scale, logits_scaling = SCALES[name]
    config = MiniCPM4Config(hidden_size=hidden_size, num_hidden_layers=layers)
    assert config.residual_scale == pytest.approx(residual_scale, abs=5e-8)
    assert config.logits_scaling == logits_scaling
    assert config.scale_emb == 12


@pytest.mark.parametrize(("wrong", "sentence"), WRONG_SPARSE_CONFIGS, ids=lambda case: str(case)[:40])
def test_wrong_sparse_config_gives_one_sentence(wrong, sentence):
    with pytest.raises(ValueError) as error:
        MiniCPM4Config(sparse_config=wrong)
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", ["yes", 64, [64]])
def test_sparse_config_is_a_dict(wrong):
    with pytest.raises(ValueError, match="`sparse_config` must be a dict or None, got"):
        complete_sparse_config(wrong)
    with pytest.raises(StrictDataclassError, match="sparse_config"):
        MiniCPM4Config(sparse_config=wrong)


def test_missing_sparse_keys_get_the_official_values():
    given = {"topk": 32}
    config = MiniCPM4Config(sparse_config=given)
    assert config.sparse_config == {**DEFAULT_SPARSE_CONFIG, "topk": 32}
    assert given == {"topk": 32}


def test_always_sparse_is_written_as_minus_one():
    assert MiniCPM4Config(sparse_config={"dense_len": -1}).sparse_config["dense_len"] == -1


def test_sparse_config_set_later_is_completed_and_checked(tmp_path):
    config = MiniCPM4Config()
    assert config.sparse_config is None
    config.sparse_config = {"topk": 32}
    assert config.sparse_config == {**DEFAULT_SPARSE_CONFIG, "topk": 32}
    with pytest.raises(ValueError, match="at least 1"):
        config.sparse_config = {"topk": -1}
    config.sparse_config = None
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path, sparse_config={"window_size": 1024})
    assert loaded.sparse_config == {**DEFAULT_SPARSE_CONFIG, "window_size": 1024}


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"scale_emb": 0}, "`scale_emb` must be greater than 0, got 0."),
        ({"scale_depth": -1.4}, "`scale_depth` must be greater than 0, got -1.4."),
        ({"dim_model_base": 0}, "`dim_model_base` must be greater than 0, got 0."),
        ({"dim_model_base": None}, "The config has no `dim_model_base`"),
        ({"num_key_value_heads": 3}, "must be a multiple of `num_key_value_heads` (3)."),
    ],
)
def test_wrong_scales_and_heads(wrong, sentence):
    with pytest.raises((ValueError, StrictDataclassError)) as error:
        MiniCPM4Config(**wrong)
    assert sentence in str(error.value)


def test_file_without_dim_model_base_is_refused_with_the_reason():
    file = MiniCPM4Config(num_hidden_layers=2).to_dict()
    del file["dim_model_base"]
    with pytest.raises(ValueError, match=r'no `dim_model_base`.*size 4096.*gibberish.*"dim_model_base": 256'):
        MiniCPM4Config.from_dict(file)
    assert MiniCPM4Config.from_dict(file, dim_model_base=512).logits_scaling == 8


def test_round_trip(tmp_path):
    config = MiniCPM4Config(sparse_config={"topk": 32}, mup_denominator=32, tie_word_embeddings=True)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MiniCPM4Config
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "configuration_minicpm4.py"]
