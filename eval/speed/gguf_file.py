"""A GGUF file of a Llama's shape with the same random weights that the transformers models get."""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from transformers import LlamaConfig

from .weights import make_weight, random_buffer

CONTEXT_TOKENS = 1024 * 1024  # no length is warned of


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
        write_file(partial, config, seed)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def write_file(path: Path, config: LlamaConfig, seed: int) -> None:
    """Write the file, a tensor in memory at a time."""
    # Not above: a process that finds its file written is timed and weighed without torch.
    from minicpm4_hf.conversion.gguf_file import write_gguf
    from minicpm4_hf.conversion.gguf_metadata import add_sizes
    from minicpm4_hf.conversion.gguf_tensors import model_entries, rotary_order

    writer = gguf.GGUFWriter(None, "llama")
    add_sizes(writer, config, CONTEXT_TOKENS)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_tokenizer_model("none")
    entries = model_entries(config)
    for entry in entries:
        dtype = np.dtype(np.float16 if entry.is_matrix else np.float32)
        writer.add_tensor_info(f"{entry.name}.weight", entry.shape, dtype, math.prod(entry.shape) * dtype.itemsize)
    buffer = random_buffer(seed)

    def weights() -> Iterator[list[np.ndarray]]:
        for entry in entries:
            weight = make_weight(buffer, f"{entry.module}.weight", entry.shape)
            if entry.is_matrix:
                weight = weight.astype(np.float16)
            if entry.num_heads is not None:
                weight = weight[rotary_order(len(weight), entry.num_heads).numpy()]
            yield [weight]

    write_gguf(writer, path, weights())
