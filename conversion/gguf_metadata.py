"""What a GGUF file says of a model: sizes, scales and rotary embedding.

Source: llama.cpp's `src/models/minicpm.cpp` and `llama.cpp`, and the key names of its GGUF specification.
"""

import gguf
import torch

from minicpm4_hf.modeling_minicpm4 import MiniCPM4RotaryEmbedding

# `model_type` -> architecture of the file.
ARCHITECTURES = {"minicpm4": "minicpm", "minicpm": "minicpm", "llama": "llama"}


def add_sizes(writer: gguf.GGUFWriter, config, context_tokens: int | None = None) -> None:
    """Sizes of a model with Llama's layers, and its rotary base.

    Args:
        context_tokens: the context length that the file claims; the config's if None.
    """
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_tokens or config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def add_scales(writer: gguf.GGUFWriter, config) -> None:
    """MiniCPM's three scales. llama.cpp divides the logits by its `logit_scale`."""
    writer.add_embedding_scale(float(config.scale_emb))
    writer.add_residual_scale(config.residual_scale)
    writer.add_logit_scale(config.logits_scaling)


def rotary_factors(config) -> tuple[dict[str, torch.Tensor], float]:
    """Divisors of the rotary frequencies, float32 `[head_dim / 2]` by tensor name, and the factor on cosine and sine.

    LongRoPE has a list for short and one for long contexts. llama.cpp takes the long one where its context is set
    above the original length; MiniCPM's model has one of them for good, so both tensors hold that one. Other types
    ("linear", "yarn", "llama3") are written as the divisors that they come to.

    Raises:
        NotImplementedError: a type that changes with the length of the text.
    """
    rope = config.rope_parameters
    inv_freq, attention_factor = MiniCPM4RotaryEmbedding.compute_inv_freq(config)
    if rope["rope_type"] == "longrope":
        short, long = (torch.tensor(rope[f"{which}_factor"], dtype=torch.float32) for which in ("short", "long"))
        if config.model_type != "llama":
            is_long = config.max_position_embeddings > rope["original_max_position_embeddings"]
            short = long = long if is_long else short
        return {"rope_factors_long.weight": long, "rope_factors_short.weight": short}, float(attention_factor)
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    factors = (rope["rope_theta"] ** -exponents / inv_freq.double()).float()
    if rope["rope_type"] == "default":
        return {}, 1.0
    return {"rope_freqs.weight": factors}, float(attention_factor)


def add_rotary(writer: gguf.GGUFWriter, config, attention_factor: float) -> None:
    """How llama.cpp reads the factors."""
    if config.rope_parameters["rope_type"] == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(config.rope_parameters["original_max_position_embeddings"])
    if attention_factor != 1.0:
        writer.add_rope_scaling_attn_factors(attention_factor)
