"""A GGUF file of a Llama's shape with the same random weights that the transformers models get."""

import hashlib
import json
import os
from pathlib import Path

import gguf
import numpy as np
from transformers import LlamaConfig

from .weights import make_weight, random_buffer

CONTEXT_TOKENS = 1024 * 1024  # no length is warned of
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def cache_folder() -> Path:
    """Where the files lie: `$XDG_CACHE_HOME/minicpm4_hf/speed`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minicpm4_hf" / "speed"


def ensure_gguf(config: LlamaConfig, seed: int) -> Path:
    """The file of that shape and seed in F16 (norms in F32), written the first time."""
    key = json.dumps([config.to_diff_dict(), seed], sort_keys=True, default=str)
    path = cache_folder() / f"llama-{hashlib.sha256(key.encode()).hexdigest()[:16]}.gguf"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_gguf(partial, config, seed)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def write_gguf(path: Path, config: LlamaConfig, seed: int) -> None:
    """Write the file, a tensor in memory at a time."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(CONTEXT_TOKENS)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("none")
    shapes = tensor_shapes(config)
    for name, (_, shape) in shapes.items():
        dtype = np.dtype(np.float32 if len(shape) == 1 else np.float16)
        writer.add_tensor_info(name, shape, dtype, int(np.prod(shape)) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    buffer = random_buffer(seed)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, (source, shape) in shapes.items():
        weight = make_weight(buffer, source, shape)
        if len(shape) > 1:
            weight = weight.astype(np.float16)
        num_heads = next((count for part, count in heads.items() if f".{part}." in name), None)
        writer.write_tensor_data(weight if num_heads is None else interleave_rotary(weight, num_heads))
    writer.close()


def tensor_shapes(config: LlamaConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF name -> the parameter's name in transformers, and its shape."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    queries, keys = (count * config.head_dim for count in (config.num_attention_heads, config.num_key_value_heads))
    layer_shapes = {
        "attn_norm": (hidden,),
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_norm": (hidden,),
        "ffn_gate": (ffn, hidden),
        "ffn_up": (ffn, hidden),
        "ffn_down": (hidden, ffn),
    }
    shapes = {"token_embd.weight": ("model.embed_tokens.weight", (config.vocab_size, hidden))}
    for i in range(config.num_hidden_layers):
        for name, source in LAYER_TENSORS.items():
            shapes[f"blk.{i}.{name}.weight"] = (f"model.layers.{i}.{source}.weight", layer_shapes[name])
    shapes["output_norm.weight"] = ("model.norm.weight", (hidden,))
    if not config.tie_word_embeddings:
        shapes["output.weight"] = ("lm_head.weight", (config.vocab_size, hidden))
    return shapes


def interleave_rotary(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a query or key projection as llama.cpp rotates them: neighbours in pairs, not halves of a head.

    Source: llama.cpp's `convert_hf_to_gguf.py`, `LlamaModel.permute`.
    """
    rows, columns = weight.shape
    halves = weight.reshape(num_heads, 2, rows // num_heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)
