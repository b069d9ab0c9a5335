"""Folders in the official layout through the Auto classes: what they become, equal numbers, refusals."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from minicpm4_hf import MiniCPM4Config, MiniCPM4ForCausalLM, MiniCPM4ForSequenceClassification, MiniCPM4Model
from minicpm4_hf.official_layout import (
    MiniCPMConfig,
    MiniCPMForCausalLM,
    MiniCPMForSequenceClassification,
    MiniCPMModel,
    from_official,
    to_official,
)

AUTO_MAP = {
    "AutoConfig": "configuration_minicpm.MiniCPMConfig",
    "AutoModel": "modeling_minicpm.MiniCPMModel",
    "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
    "AutoModelForSeq2SeqLM": "modeling_minicpm.MiniCPMForCausalLM",
    "AutoModelForSequenceClassification": "modeling_minicpm.MiniCPMForSequenceClassification",
}
FACTORS = [1.0, 1.25, 2.5, 20.0]  # head size 8

# The official key sets at a tiny width.
SHARED = {
    "architectures": ["MiniCPMForCausalLM"],
    "auto_map": AUTO_MAP,
    "bos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.1,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "use_cache": True,
    "scale_emb": 12,
    "dim_model_base": 8,
    "scale_depth": 1.4,
}
LONGROPE = {
    "rope_type": "longrope",
    "long_factor": FACTORS,
    "short_factor": FACTORS,
    "original_max_position_embeddings": 32768,
}
MINICPM4_8B = {
    **SHARED,
    "_name_or_path": "openbmb/MiniCPM4-8B",
    "eos_token_id": [2, 73440],
    "pad_token_id": 2,
    "max_position_embeddings": 32768,
    "model_type": "minicpm",
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": LONGROPE,
    "torch_dtype": "float32",
    "transformers_version": "4.46.1",
    "vocab_size": 73448,
    "tie_word_embeddings": False,
    "mup_denominator": 32,
}
# No `model_type`, no `mup_denominator`; tied by the class's default; `type` instead of `rope_type`.
MINICPM4_05B = {
    key: value
    for key, value in {**MINICPM4_8B, "rope_scaling": {**LONGROPE, "type": "longrope"}, "rms_norm_eps": 1e-5}.items()
    if key not in ("model_type", "mup_denominator", "tie_word_embeddings", "pad_token_id")
}
MINICPM4_05B["rope_scaling"].pop("rope_type")
BITCPM4_1B = {**MINICPM4_05B, "num_key_value_heads": 4, "_name_or_path": "openbmb/BitCPM4-1B"}
MINICPM_2B = {
    **SHARED,
    "_name_or_path": "openbmb/CPM-2B",
    "eos_token_id": 2,
    "max_position_embeddings": 4096,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "torch_dtype": "float32",
    "transformers_version": "4.36.0",
    "vocab_size": 611,
}

# Files -> the same model written down in the minicpm4 layout, by hand.
OURS_SHARED = {
    key: value for key, value in SHARED.items() if key not in ("architectures", "auto_map", "initializer_range")
}
OURS_LONGROPE = {**LONGROPE, "rope_theta": 10000.0, "factor": 1.0}
OURS_8B = {
    **OURS_SHARED,
    "model_type": "minicpm4",
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "rope_parameters": OURS_LONGROPE,
    "vocab_size": 73448,
    "tie_word_embeddings": False,
}
OURS_05B = {**OURS_8B, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
OURS_2B = {
    **OURS_05B,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "vocab_size": 611,
}
FILES = {
    "MiniCPM4-8B": (MINICPM4_8B, OURS_8B, MiniCPM4Config),
    "MiniCPM4-0.5B": (MINICPM4_05B, OURS_05B, MiniCPM4Config),
    "BitCPM4-1B": (BITCPM4_1B, {**OURS_05B, "num_key_value_heads": 4}, MiniCPM4Config),
    "MiniCPM-2B": (MINICPM_2B, OURS_2B, MiniCPMConfig),
}
TRUST = pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}], ids=["plain", "trust_remote_code"])


def write_folder(folder, config, state_dict=None):
    """A checkpoint folder; its remote code ends the process if it is ever imported."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("configuration_minicpm.py", "modeling_minicpm.py"):
        (folder / name).write_text("raise SystemExit('remote code was run')\n")
    if state_dict is not None:
        save_file(state_dict, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_weights(config):
    generator = torch.Generator().manual_seed(0)
    size, heads = config["hidden_size"], config["num_attention_heads"]
    kv_size, middle = size // heads * config["num_key_value_heads"], config["intermediate_size"]
    shapes = {"model.embed_tokens": (config["vocab_size"], size), "model.norm": (size,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.input_layernorm": (size,), f"{layer}.post_attention_layernorm": (size,)}
        shapes |= {f"{layer}.self_attn.{name}_proj": (size, size) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj": (kv_size, size) for name in "kv"}
        shapes |= {f"{layer}.mlp.{name}_proj": (middle, size) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj": (size, middle)}
    if not config.get("tie_word_embeddings", True):
        shapes["lm_head"] = (config["vocab_size"], size)
    return {f"{name}.weight": torch.randn(*shape, generator=generator) * 0.3 for name, shape in shapes.items()}


@torch.no_grad()
def logits(model, num_tokens=17):
    ids = torch.randint(3, 600, (2, num_tokens), generator=torch.Generator().manual_seed(1))
    return model.eval()(ids).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> (folder in the official layout, folder with the same weights in the minicpm4 layout)."""
    root = tmp_path_factory.mktemp("checkpoints")
    pairs = {}
    for name, (official, ours, _) in FILES.items():
        weights = random_weights(official)
        pairs[name] = (
            write_folder(root / name, official, weights),
            write_folder(root / f"{name}-hf", ours, weights),
        )
    return pairs


@TRUST
@pytest.mark.parametrize("name", FILES)
def test_loads_with_exactly_the_same_logits(folders, name, trust):
    official, ours = folders[name]
    config_class = FILES[name][2]
    reference = logits(MiniCPM4ForCausalLM.from_pretrained(ours))
    model, info = AutoModelForCausalLM.from_pretrained(official, output_loading_info=True, **trust)
    assert type(model) is {MiniCPM4Config: MiniCPM4ForCausalLM, MiniCPMConfig: MiniCPMForCausalLM}[config_class]
    assert type(AutoConfig.from_pretrained(official, **trust)) is config_class
    assert not any(info.values())
    assert torch.equal(logits(model), reference)


@TRUST
@pytest.mark.parametrize("name", ["MiniCPM4-8B", "MiniCPM-2B"])
def test_other_auto_classes(folders, name, trust):
    folder = folders[name][0]
    ours = name == "MiniCPM4-8B"
    model = AutoModel.from_pretrained(folder, **trust)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **trust)
    assert type(model) is (MiniCPM4Model if ours else MiniCPMModel)
    assert type(classifier) is (MiniCPM4ForSequenceClassification if ours else MiniCPMForSequenceClassification)
    assert classifier.num_labels == 3
    assert "auto_map" not in model.config.to_dict()
    assert AutoModelForCausalLM.from_config(model.config, **trust).config.hidden_size == 32


@pytest.mark.parametrize("name", FILES)
def test_equals_llama_with_the_scales_folded_in(folders, name):
    """A second opinion: MiniCPM is Llama whose embeddings, branch outputs and head carry the scales."""
    official, ours, _ = FILES[name]
    weights = random_weights(official)
    head = weights.pop("lm_head.weight", weights["model.embed_tokens.weight"]) / (32 / 8)
    folded = {key: value * 12 if "embed" in key else value for key, value in weights.items()}
    folded = {key: v * 1.4 / 2**0.5 if "o_proj" in key or "down_proj" in key else v for key, v in folded.items()}
    keys = set(OURS_SHARED) - {"scale_emb", "dim_model_base", "scale_depth"}
    keys |= {"num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "rope_parameters", "vocab_size"}
    llama = LlamaForCausalLM(LlamaConfig(**copy.deepcopy({key: ours[key] for key in keys})))
    llama.load_state_dict({**folded, "lm_head.weight": head})
    model = AutoModelForCausalLM.from_pretrained(folders[name][0])
    torch.testing.assert_close(logits(model), logits(llama), rtol=1e-4, atol=1e-4)


def test_our_own_classes_read_the_official_layout_too(folders):
    official, ours = folders["MiniCPM4-0.5B"]
    model, info = MiniCPM4ForCausalLM.from_pretrained(official, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(model), logits(MiniCPM4ForCausalLM.from_pretrained(ours)))
    assert MiniCPM4Config.from_pretrained(official).tie_word_embeddings


def test_keys_that_the_file_leaves_out_get_the_official_defaults():
    file = {key: MINICPM4_05B[key] for key in ("auto_map", "vocab_size", "hidden_size", "num_attention_heads")}
    config = MiniCPMConfig.from_dict({**file, "dim_model_base": 256})
    assert type(config) is MiniCPM4Config
    assert config.num_key_value_heads == config.num_attention_heads == 4
    assert config.tie_word_embeddings is True
    assert (config.scale_emb, config.scale_depth) == (1, 1)
    assert (config.intermediate_size, config.max_position_embeddings) == (11008, 2048)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, MiniCPMConfig),
        ({"mup_denominator": 32}, MiniCPM4Config),
        ({"sparse_config": {"topk": 64}}, MiniCPM4Config),
        ({"vocab_size": 73448}, MiniCPM4Config),
        ({"rope_scaling": LONGROPE, "num_key_value_heads": 2}, MiniCPM4Config),
        ({"rope_scaling": LONGROPE}, MiniCPMConfig),
        ({"rope_scaling": {**LONGROPE, "short_factor": [1.0] * 4}, "num_key_value_heads": 2}, MiniCPMConfig),
        ({"num_key_value_heads": 2}, MiniCPMConfig),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, MiniCPMConfig),
    ],
    ids=["2B", "mup_denominator", "sparse_config", "vocabulary", "longrope-2", "longrope", "unequal", "2", "dynamic"],
)
def test_what_tells_minicpm4_from_2024(tmp_path, change, expected):
    file = {**MINICPM_2B, "model_type": "minicpm", **change}
    assert type(MiniCPMConfig.from_dict(copy.deepcopy(file))) is expected
    assert type(AutoConfig.from_pretrained(write_folder(tmp_path, file))) is expected


def test_a_factor_in_longrope_does_not_change_the_attention(tmp_path):
    file = {**MINICPM4_8B, "rope_scaling": {**LONGROPE, "factor": 4.0}}
    config = AutoConfig.from_pretrained(write_folder(tmp_path, file))
    assert config.rope_parameters["factor"] == 1.0


def test_settings_given_at_load_time(folders):
    folder = folders["MiniCPM4-8B"][0]
    model = AutoModelForCausalLM.from_pretrained(folder, sparse_config={"topk": 40}, dtype=torch.bfloat16)
    assert model.config.sparse_config["topk"] == 40
    assert model.config.sparse_config["dense_len"] == 8192
    assert model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="A 2024 MiniCPM model has dense attention only"):
        AutoModelForCausalLM.from_pretrained(folders["MiniCPM-2B"][0], sparse_config={"topk": 40})


def test_2024_is_saved_as_what_it_is(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders["MiniCPM-2B"][0])
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    saved = json.loads((tmp_path / "config.json").read_text())
    file = {key: value for key, value in MINICPM_2B.items() if key not in ("auto_map", "_name_or_path")}
    file |= {"model_type": "minicpm", "transformers_version": saved["transformers_version"]}
    assert {key: saved[key] for key in file} == file
    assert not {"rope_parameters", "dtype", "sparse_config", "mup_denominator"} & set(saved)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(again) is MiniCPMForCausalLM
    assert torch.equal(logits(again), logits(model))


def test_minicpm4_is_saved_with_its_remote_code_files(folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders["MiniCPM4-8B"][0])
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.py")) == [
        "configuration_minicpm4.py",
        "modeling_minicpm4.py",
        "sparse_attention.py",
        "sparse_cache.py",
    ]
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "minicpm4"
    assert saved["auto_map"] == {
        "AutoConfig": "configuration_minicpm4.MiniCPM4Config",
        "AutoModelForCausalLM": "modeling_minicpm4.MiniCPM4ForCausalLM",
    }
    assert saved["architectures"] == ["MiniCPM4ForCausalLM"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(again) is MiniCPM4ForCausalLM  # the installed class, not the copy
    assert torch.equal(logits(again), logits(model))


@pytest.mark.slow
def test_saved_folder_loads_without_the_package(folders, tmp_path):
    """As remote code in a process that cannot import `minicpm4_hf`."""
    model = AutoModelForCausalLM.from_pretrained(folders["MiniCPM4-8B"][0])
    model.save_pretrained(tmp_path / "saved")
    code = (
        "import sys, torch\n"
        "sys.modules['minicpm4_hf'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'saved')!r}, trust_remote_code=True)\n"
        "assert type(model).__module__.startswith('transformers_modules.'), type(model)\n"
        "ids = torch.randint(3, 600, (2, 17), generator=torch.Generator().manual_seed(1))\n"
        f"torch.save(model.eval()(ids).logits.detach(), {str(tmp_path / 'logits.pt')!r})\n"
    )
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([sys.executable, "-I", "-c", code], check=True, env=environment, cwd=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in FILES if name != "MiniCPM-2B"])
def test_round_trip(folders, tmp_path, name):
    """official -> minicpm4 -> official: the same settings, and it loads with the same logits."""
    official = FILES[name][0]
    model = AutoModelForCausalLM.from_pretrained(folders[name][0])
    model.save_pretrained(tmp_path / "hf")
    back = to_official(json.loads((tmp_path / "hf" / "config.json").read_text()))
    assert "auto_map" not in back
    assert back["model_type"] == "minicpm"
    assert back["rope_scaling"] == LONGROPE
    dropped = ("_name_or_path", "auto_map", "transformers_version", "rope_scaling", "model_type")
    assert {key: back.get(key) for key in official if key not in dropped} == {
        key: value for key, value in official.items() if key not in dropped
    }
    weights = random_weights(official)
    again = AutoModelForCausalLM.from_pretrained(write_folder(tmp_path / "back", back, weights))
    assert type(again) is MiniCPM4ForCausalLM
    assert torch.equal(logits(again), logits(model))


def test_translation_leaves_its_argument_alone():
    file = copy.deepcopy(MINICPM4_05B)
    new = from_official(file)
    assert file == MINICPM4_05B
    before = copy.deepcopy(new)
    to_official(new)
    assert new == before


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"num_experts": 8, "num_experts_per_tok": 2}, "a mixture of experts (MiniCPM-MoE, BlockFFN)"),
        ({"attention_type": "mla"}, "a model with latent attention (BlockFFN)"),
        ({"hidden_act": "fatrelu"}, "a model with thresholded activations (MiniCPM-S)"),
        ({"is_causal": False}, "a bidirectional encoder (MiniCPM-Embedding, MiniCPM-Reranker)"),
        ({"no_rope": True}, "a backbone without rotary embedding (VoxCPM)"),
    ],
    ids=lambda case: next(iter(case)) if isinstance(case, dict) else "",
)
@TRUST
def test_relatives_are_refused_by_name(tmp_path, change, what, trust):
    folder = write_folder(tmp_path, {**MINICPM_2B, **change})
    for auto_class in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError) as error:
            auto_class.from_pretrained(folder, **trust)
        assert f"but is {what};" in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", [MINICPM4_8B, MINICPM_2B], ids=["MiniCPM4-8B", "MiniCPM-2B"])
def test_a_file_without_dim_model_base_is_refused_with_the_reason(tmp_path, file):
    folder = write_folder(tmp_path, {key: value for key, value in file.items() if key != "dim_model_base"})
    for auto_class in (AutoConfig, AutoModelForCausalLM):
        with pytest.raises(ValueError, match=r"no `dim_model_base`.*\(size 32\).*gibberish.*add the value"):
            auto_class.from_pretrained(folder)
    assert AutoConfig.from_pretrained(folder, dim_model_base=8).logits_scaling == 4


def test_a_backbone_without_mup(tmp_path):
    """VoxCPM's language model: `use_mup: false` turns all three scales off, `kv_channels` is the head size."""
    config = AutoConfig.from_pretrained(write_folder(tmp_path, {**MINICPM4_8B, "use_mup": False, "kv_channels": 16}))
    assert (config.scale_emb, config.residual_scale, config.logits_scaling) == (1, 1.0, 1.0)
    assert config.head_dim == 16
    assert not {"use_mup", "kv_channels"} & set(config.to_dict())


def test_other_model_types_are_untouched(tmp_path):
    llama = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 73448,
        "max_position_embeddings": 32768,
        "rope_scaling": {**LONGROPE, "factor": 1.0},
    }
    config = AutoConfig.from_pretrained(write_folder(tmp_path / "BitCPM-CANN-1B", llama))
    assert type(config) is LlamaConfig
    minicpm3 = AutoConfig.from_pretrained(write_folder(tmp_path / "MiniCPM3-4B", {"model_type": "minicpm3"}))
    assert type(minicpm3).__module__.startswith("transformers.")
    nameless = {**MINICPM_2B, "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMVConfig"}}
    with pytest.raises(ValueError, match="custom code"):
        AutoConfig.from_pretrained(write_folder(tmp_path / "MiniCPM-V", nameless), trust_remote_code=False)


@TRUST
@pytest.mark.parametrize(
    "config",
    [MINICPM4_8B, MINICPM4_05B, MINICPM_2B, OURS_8B, {**MINICPM_2B, "num_experts": 8}],
    ids=["MiniCPM4-8B", "MiniCPM4-0.5B", "MiniCPM-2B", "minicpm4", "MoE"],
)
def test_tokenizer_is_the_file_as_it_is(tmp_path, config, trust):
    """Published folders say LlamaTokenizer; rebuilt as one, a space at the start of a message would be lost."""
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "▁", "a", "▁a", "<|im_start|>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<|im_start|>"])
    folder = write_folder(tmp_path, config)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "unk_token": "<unk>"}))
    loaded = AutoTokenizer.from_pretrained(folder, **trust)
    for text, ids in (("<|im_start|>a a", [6, 5, 5]), ("<|im_start|> a", [6, 3, 5])):
        assert loaded(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text).ids == ids
