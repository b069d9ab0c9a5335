"""The models that are compared: their shapes, and what a measurement of each takes in memory."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from transformers import AutoModelForCausalLM, GlmConfig, LlamaConfig, PreTrainedConfig, Qwen3Config
from transformers.initialization import no_init_weights

from minicpm4_hf import MiniCPM4Config
from minicpm4_hf.presets import build_config

LLAMA_CPP_MISSING = (
    "llama.cpp needs the Python packages llama-cpp-python and gguf: pip install llama-cpp-python gguf (compiles for "
    "some minutes)"
)
SCORE_BYTES = 2 * 1024**3  # what a pass may spend on attention scores where they are formed in full
OVERHEAD_BYTES = 1024**3  # Python, libraries, the allocator
# llama.cpp rounds the inputs of low-bit layers to 8 bits, layer after layer.
ROUNDED_INPUTS = 0.15

# Every model in miniature, for a trial of the whole command.
TINY_SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
TINY_SPARSE = {
    "kernel_size": 8,
    "kernel_stride": 4,
    "init_blocks": 1,
    "block_size": 16,
    "window_size": 32,
    "topk": 3,
    "dense_len": 128,
}
# Source: config.json of Qwen/Qwen3-0.6B.
QWEN3_06B_SHAPE = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "tie_word_embeddings": True,
}
# Source: config.json of Qwen/Qwen3-8B.
QWEN3_8B_SHAPE = {
    **QWEN3_06B_SHAPE,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "tie_word_embeddings": False,
}
# Source: config.json of meta-llama/Meta-Llama-3-8B.
LLAMA3_8B_SHAPE = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
}
# Source: config.json of THUDM/glm-4-9b-chat-hf, which are also the defaults of transformers' GlmConfig.
GLM4_9B_SHAPE = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
# What a Llama of the same shape has in common with a MiniCPM4.
SHAPE_FIELDS = (*TINY_SHAPE, "rms_norm_eps")


def minicpm4_config(preset: str, *, sparse: bool) -> PreTrainedConfig:
    """Ours: a preset, or "tiny"."""
    if preset == "tiny":
        return MiniCPM4Config(dim_model_base=32, sparse_config=TINY_SPARSE if sparse else None, **TINY_SHAPE)
    return build_config(preset, sparse=sparse)


def llama_config(preset: str) -> LlamaConfig:
    """A Llama with ours' shape and plain rotary embedding."""
    ours = minicpm4_config(preset, sparse=False)
    return LlamaConfig(**{name: getattr(ours, name) for name in SHAPE_FIELDS})


def qwen3_config(preset: str) -> Qwen3Config:
    """Qwen3-0.6B, whatever the preset; a small one for "tiny"."""
    return Qwen3Config(**(TINY_SHAPE if preset == "tiny" else QWEN3_06B_SHAPE))


def glm_config(preset: str) -> GlmConfig:
    """A GLM with ours' shape; half of a head's values are rotated."""
    ours = minicpm4_config(preset, sparse=False)
    return GlmConfig(**{name: getattr(ours, name) for name in SHAPE_FIELDS})


def fixed_config(config_class: type[PreTrainedConfig], shape: dict) -> Callable[[str], PreTrainedConfig]:
    """A model of one shape whatever the preset, small for "tiny"."""
    return lambda preset: config_class(**(TINY_SHAPE if preset == "tiny" else shape))


def minicpm3_config(preset: str) -> PreTrainedConfig:
    """MiniCPM3 with ours' depth and widths; the ranks are to the width about as MiniCPM3-4B's are."""
    ours = minicpm4_config(preset, sparse=False)
    shape = {name: getattr(ours, name) for name in SHAPE_FIELDS if name not in ("head_dim", "num_key_value_heads")}
    return transformers.MiniCPM3Config(
        **shape,
        num_key_value_heads=ours.num_attention_heads,
        q_lora_rank=3 * ours.hidden_size // 8,
        kv_lora_rank=ours.hidden_size // 4,
        qk_nope_head_dim=ours.head_dim,
        qk_rope_head_dim=ours.head_dim // 2,
        v_head_dim=ours.head_dim,
    )


@dataclass(frozen=True)
class Contestant:
    """A model and the way it runs."""

    title: str
    make_config: Callable[[str], PreTrainedConfig]  # from a preset's name
    attention: str | None = None  # transformers' `attn_implementation`; None: the model's own choice
    engine: str = "torch"
    twin: str | None = None  # a contestant with the same weights, which must give the same logits
    by_name: bool = False  # takes part only where it is asked for by name
    packed: str | None = None  # low-bit weights, "ternary" or "int4"
    tolerance: float | None = None  # relative difference of its logits from its twin's; None: the dtype's


CONTESTANTS = {
    "ours-sparse": Contestant(
        "MiniCPM4, InfLLM v2", lambda preset: minicpm4_config(preset, sparse=True), twin="ours-dense"
    ),
    "ours-dense": Contestant("MiniCPM4, dense attention", lambda preset: minicpm4_config(preset, sparse=False)),
    "llama-sdpa": Contestant("transformers' Llama of the same shape, SDPA", llama_config, "sdpa"),
    "llama-eager": Contestant("the same, eager attention", llama_config, "eager", twin="llama-sdpa"),
    "minicpm3-sdpa": Contestant("transformers' MiniCPM3 (latent attention), SDPA", minicpm3_config, "sdpa"),
    "qwen3-0.6b": Contestant("transformers' Qwen3 in the shape of Qwen3-0.6B, SDPA", qwen3_config, "sdpa"),
    "glm-sdpa": Contestant("transformers' GLM of ours' shape, SDPA", glm_config, "sdpa", by_name=True),
    # Those of the MiniCPM4 report's figure 1, for the preset MiniCPM4-8B.
    "qwen3-8b": Contestant(
        "transformers' Qwen3 in the shape of Qwen3-8B, SDPA",
        fixed_config(Qwen3Config, QWEN3_8B_SHAPE),
        "sdpa",
        by_name=True,
    ),
    "llama3-8b": Contestant(
        "transformers' Llama in the shape of Llama-3-8B, SDPA",
        fixed_config(LlamaConfig, LLAMA3_8B_SHAPE),
        "sdpa",
        by_name=True,
    ),
    "glm4-9b": Contestant(
        "transformers' GLM in the shape of GLM-4-9B, SDPA",
        fixed_config(GlmConfig, GLM4_9B_SHAPE),
        "sdpa",
        by_name=True,
    ),
    "llama.cpp": Contestant(
        "llama.cpp, the Llama's weights in F16", llama_config, engine="llama.cpp", twin="llama-sdpa"
    ),
    # Low-bit weights, the same codes in ours' packed folders and in llama.cpp's files.
    **{
        f"ours-{kind}": Contestant(
            f"MiniCPM4, InfLLM v2, {kind} layers",
            lambda preset: minicpm4_config(preset, sparse=True),
            by_name=True,
            packed=kind,
        )
        for kind in ("ternary", "int4")
    },
    **{
        f"llama.cpp-{name.lower()}": Contestant(
            f"llama.cpp, the layers of ours-{kind} in {name}",
            lambda preset: minicpm4_config(preset, sparse=False),
            engine="llama.cpp",
            twin=f"ours-{kind}",
            by_name=True,
            packed=kind,
            tolerance=ROUNDED_INPUTS,
        )
        for kind, name in (("ternary", "TQ2_0"), ("int4", "Q4_0"))
    },
}


def missing_reason(name: str) -> str | None:
    """Why a contestant cannot run here; None if it can."""
    if CONTESTANTS[name].engine == "llama.cpp":
        found = all(importlib.util.find_spec(module) for module in ("llama_cpp", "gguf"))
        return None if found else LLAMA_CPP_MISSING
    if name == "minicpm3-sdpa" and not hasattr(transformers, "MiniCPM3Config"):
        return f"transformers {transformers.__version__} has no MiniCPM3: pip install -U transformers"
    return None


def build_model(config: PreTrainedConfig, dtype: torch.dtype, attention: str | None, device: str = "cpu"):
    """The model with memory for its weights, but no values in them."""
    choice = {"attn_implementation": attention} if attention else {}
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **choice).eval()
    model.tie_weights()
    return model


def describe_shape(config: PreTrainedConfig) -> dict:
    """What the figures of a model depend on; fields that a model does not have are left out."""
    latent = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    names = ("model_type", *SHAPE_FIELDS, "sparse_config", *latent)
    shape = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
    return {**shape, "num_parameters": build_model(config, torch.float32, None, "meta").num_parameters()}


def cache_width(shape: dict) -> int:
    """Values that a layer caches for each token."""
    if "kv_lora_rank" in shape:
        return shape["kv_lora_rank"] + shape["qk_rope_head_dim"]
    return 2 * shape["num_key_value_heads"] * shape["head_dim"]


def forms_scores(contestant: Contestant, shape: dict) -> bool:
    """Whether attention writes down the scores of all queries and keys."""
    # MiniCPM3's keys and values differ in size, for which SDPA has no fused kernel.
    return contestant.attention == "eager" or "kv_lora_rank" in shape


def choose_chunk(contestant: Contestant, shape: dict, tokens: int, chunk: int | None) -> int:
    """Prompt tokens a forward pass: the whole prompt, unless attention forms all scores at once."""
    chunk = min(chunk or tokens, tokens)
    if forms_scores(contestant, shape):
        fitting = SCORE_BYTES // (shape["num_attention_heads"] * tokens * 12)  # in the dtype, in float32, and a copy
        chunk = min(chunk, 2 ** max(fitting.bit_length() - 1, 5))
    return chunk


def estimate_bytes(
    contestant: Contestant, shape: dict, dtype: torch.dtype, measure: str, tokens: int, chunk: int, context_tokens: int
) -> int:
    """Resident memory that a worker comes to in a measurement, from above.

    Args:
        shape: `describe_shape` of the contestant's config.
        measure: "prompt", "decode" or "probe".
        context_tokens: what llama.cpp makes room for.
    """
    layers, heads = shape["num_hidden_layers"], shape["num_attention_heads"]
    width = cache_width(shape)
    if contestant.engine == "llama.cpp":  # F16 whatever the others are; room for the whole context from the start
        return 2 * (shape["num_parameters"] + context_tokens * layers * width) + OVERHEAD_BYTES
    layer = tokens * width * dtype.itemsize
    total = shape["num_parameters"] * dtype.itemsize + OVERHEAD_BYTES
    # Ours grows by doubling, and copies what it was given; transformers' joins old and new a layer at a time.
    total += (2 * layers + 1 if "sparse_config" in shape else layers + 2) * layer
    if "kv_lora_rank" in shape:  # keys and values of one layer, expanded and copied; measured: 12.8
        total += 13 * tokens * heads * shape["v_head_dim"] * dtype.itemsize
    elif forms_scores(contestant, shape):  # keys and values of one layer, repeated for every query head
        total += 3 * tokens * heads * shape["head_dim"] * dtype.itemsize
    if measure == "prompt":
        head_dim = shape.get("v_head_dim") or shape["head_dim"]
        widths = 8 * shape["hidden_size"] + 3 * shape["intermediate_size"] + 4 * heads * head_dim
        total += chunk * (widths * dtype.itemsize + 4 * heads * head_dim)  # the rotation is in float32
        if forms_scores(contestant, shape):
            total += SCORE_BYTES
    return total
