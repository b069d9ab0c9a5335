"""Low-bit models with random weights: a packed folder that transformers loads, and a GGUF file of the same codes.

Each is written the first time, into the folder that `gguf_file.cache_folder` names. Scales are float16, which both
sides hold exactly: ternary ones a row, those of 4 bits in groups of 32, the block of Q4_0. Beside ternary layers,
embedding and head have 8 bits on both sides (rounded once more for Q8_0, whose blocks are smaller), beside 4-bit ones
16.
"""

import hashlib
import json
import tempfile
from pathlib import Path

from .gguf_file import cache_folder

EMBEDDING_TYPES = {"ternary": "q8_0", "int4": "f16"}


def ensure_folder(kind: str, config, seed: int) -> Path:
    """The packed folder of a MiniCPM4's config and seed.

    Args:
        kind: "ternary" or "int4".
    """
    # Not above: `torch_engine` imports this module, and a worker that finds its file written needs none of these.
    import torch
    from transformers import AutoModelForCausalLM

    from minicpm4_hf.conversion.gptq_model import Int4Settings
    from minicpm4_hf.conversion.int4 import quantize_checkpoint
    from minicpm4_hf.conversion.source import open_checkpoint
    from minicpm4_hf.quantization import BitCPMConfig

    from .contestants import build_model
    from .torch_engine import fill_weights_
    from .weights import random_buffer

    folder = _path(kind, config, seed)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as work:
        full, packed = Path(work, "full"), Path(work, "packed")
        model = build_model(config, torch.bfloat16, None)
        fill_weights_(model, random_buffer(seed))
        model.save_pretrained(full)
        del model
        if kind == "ternary":
            settings = BitCPMConfig(embeddings="int8", scale_dtype="float16")
            model = AutoModelForCausalLM.from_pretrained(full, dtype=torch.bfloat16, quantization_config=settings)
            model.save_pretrained(packed)
        else:
            quantize_checkpoint(open_checkpoint(full), packed, Int4Settings(method="rtn", group_size=32))
        _put(packed, folder)
    return folder


def ensure_gguf(kind: str, config, seed: int) -> Path:
    """The GGUF file of the folder that `ensure_folder` gives: TQ2_0 or Q4_0, the same codes and scales."""
    path = _path(kind, config, seed).with_suffix(".gguf")
    if path.exists():
        return path
    from minicpm4_hf.conversion.gguf import convert_to_gguf

    folder = ensure_folder(kind, config, seed)
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as work:
        written = Path(work, path.name)
        convert_to_gguf(folder, written, embedding_type=EMBEDDING_TYPES[kind], tokenizer=False)
        _put(written, path)
    return path


def _path(kind: str, config, seed: int) -> Path:
    key = json.dumps([config.to_diff_dict(), seed], sort_keys=True, default=str)
    return cache_folder() / f"minicpm4-{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def _put(written: Path, target: Path) -> None:
    """In its place in one step; another process may have been faster, with the same content."""
    try:
        written.replace(target)
    except OSError:
        if not target.exists():
            raise
