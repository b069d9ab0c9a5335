"""Configurations of the official checkpoints by name.

Sources: the config.json files of the openbmb repositories on the Hugging Face Hub, the MiniCPM4 technical report
(arXiv:2506.07900) and the BitCPM-CANN paper. What a file was not seen for says "unconfirmed" next to it: such a value
is a consistent guess, and loading the real checkpoint takes the file's own.
"""

from transformers import LlamaConfig

from .configuration_minicpm4 import DEFAULT_SPARSE_CONFIG, MiniCPM4Config
from .longrope import longrope_factors

# `longrope` names a list of `longrope_factors`; every other key is a field of the config class.
_MINICPM4_8B = {"rms_norm_eps": 1e-6, "mup_denominator": 32, "longrope": "MiniCPM4-8B"}

_MINICPM4_05B = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,  # unconfirmed: backbones that name MiniCPM4-0.5B as their source have 1e-5
    "tie_word_embeddings": True,  # the released shards hold 434M values: no separate head
    "pad_token_id": None,
    "longrope": "MiniCPM4-0.5B",  # from those same backbones, three copies agree
}

# The Llama-type sizes have no muP scales. Published sizes of the files fit an untied head and head size 128.
_CANN_LLAMA = {
    "model_type": "llama",
    "vocab_size": 73448,
    "num_key_value_heads": 2,
    "head_dim": 128,  # 3B: unconfirmed; 1.1 GB of 2.06-bit GGUF needs it (3.61B values, 3.34B with head size 80)
    "max_position_embeddings": 32768,  # 1B: unconfirmed
    "rms_norm_eps": 1e-6,  # unconfirmed
    "initializer_range": 0.1,  # unconfirmed
    "eos_token_id": [2, 73440],  # unconfirmed
    "pad_token_id": 2,  # unconfirmed
    "longrope": "MiniCPM4-8B",  # unconfirmed: the list of that head size and length
}

PRESETS = {
    "MiniCPM4-8B": _MINICPM4_8B,
    "MiniCPM4.1-8B": {**_MINICPM4_8B, "max_position_embeddings": 65536, "longrope": "MiniCPM4.1-8B"},
    "MiniCPM4-0.5B": _MINICPM4_05B,
    "BitCPM4-1B": {
        "hidden_size": 1536,
        "intermediate_size": 3840,
        "num_hidden_layers": 52,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,  # unconfirmed
        "rms_norm_eps": 1e-5,  # unconfirmed
        "tie_word_embeddings": True,  # the released file holds 1.36B values: no separate head
        "longrope": "MiniCPM4-0.5B",  # unconfirmed: the list of that head size, used by the 1B training script
    },
    "BitCPM4-0.5B": _MINICPM4_05B,  # unconfirmed: eos and pad token
    "BitCPM-CANN-0.5B": _MINICPM4_05B,
    "BitCPM-CANN-1B": {
        **_CANN_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "BitCPM-CANN-3B": {
        **_CANN_LLAMA,
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "BitCPM-CANN-8B": _MINICPM4_8B,  # unconfirmed: MiniCPM4-8B's sizes; whether with muP scales or as a Llama
}


def build_config(name: str, *, sparse: bool = False, **overrides) -> MiniCPM4Config | LlamaConfig:
    """The configuration of an official checkpoint.

    Args:
        name: a key of `PRESETS`.
        sparse: turn on InfLLM v2 attention with the settings the MiniCPM README recommends; the official files leave
            `sparse_config` out, so the default is dense.
        overrides: config fields to set otherwise, for example `num_hidden_layers=2` or `sparse_config={"topk": 32}`.

    Returns:
        A `MiniCPM4Config`, or a `LlamaConfig` for BitCPM-CANN-1B and -3B, which are stock Llama models.

    Raises:
        ValueError: no preset of that name; `sparse=True` for a Llama-type size; a head size without matching LongRoPE
            factors.

    Source: see the module's docstring; the LongRoPE lists come from `longrope_factors`.
    """
    if name not in PRESETS:
        raise ValueError(f"No preset named {name!r}; the known ones are {', '.join(PRESETS)}.")
    settings = dict(PRESETS[name])
    config_class = LlamaConfig if settings.pop("model_type", None) == "llama" else MiniCPM4Config
    factors = longrope_factors(settings.pop("longrope"))
    settings["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 1.0,  # the attention factor of every official checkpoint is 1
        "short_factor": factors,
        "long_factor": list(factors),
        "original_max_position_embeddings": settings.get("max_position_embeddings", 32768),
    }
    if sparse:
        if config_class is LlamaConfig:
            raise ValueError(f"{name} is a Llama model without sparse attention; leave `sparse` out.")
        settings["sparse_config"] = dict(DEFAULT_SPARSE_CONFIG)
    config = config_class(**{**settings, **overrides})
    if "rope_parameters" not in overrides and len(factors) != config.head_dim // 2:
        raise ValueError(
            f"{name} has LongRoPE factors for head size {2 * len(factors)}, and the overrides give head size "
            f"{config.head_dim}; pass `rope_parameters` too (None for plain rotary embedding)."
        )
    return config
