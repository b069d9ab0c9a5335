"""The model card of a packed ternary checkpoint: the words; `card.py` lays them out."""

import torch

from minicpm4_hf.quantization.bitcpm import BitCPMConfig
from minicpm4_hf.quantization.ternary import ROW

from .card import model_card
from .source import Checkpoint

_PACKED = (
    "The ternary weights of the source, which it holds as ordinary {dtype} numbers, are packed at two bits each, with "
    "their scales in {dtype} beside them. Every packed tensor was unpacked again and is equal to the source's."
)
_QUANTISED = (
    "Each matrix of the decoder layers is made ternary: the scale is the mean absolute value of a group, the codes "
    "are the weights over their scale, rounded to -1, 0 or 1 (BitNet b1.58, arXiv:2402.17764). Both come from the "
    "source's {dtype} weights in float32. That is what a model trained with such weights computes with; of any other "
    "it costs much of the quality."
)
_ROUNDED = "Embedding and head are rounded to the nearest {name} code, with a scale for every {group}."
_USAGE = """```python
import minicpm4_hf
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
```"""


def ternary_card(
    checkpoint: Checkpoint,
    config: BitCPMConfig,
    num_exact: int | None,
    *,
    sizes: dict[str, int],
    dtype: torch.dtype,
    errors: dict[str, float],
) -> str:
    """The text of README.md.

    Args:
        num_exact: matrices that were packed without loss; None where they were rounded.
        sizes: bytes of the "ternary" tensors, of packed "embeddings" and of all "other".
        dtype: of the source's matrices.
        errors: kind of matrix -> relative root mean square of its change.
    """
    is_exact = num_exact is not None
    method = [(_PACKED if is_exact else _QUANTISED).format(dtype=str(dtype).removeprefix("torch."))]
    if config.embeddings is not None:
        group = "row" if config.embeddings == "int8" else f"{config.embeddings_group_size} columns"
        method.append(_ROUNDED.format(name=config.embeddings, group=group))
    error: dict[str, str] | str = {
        f"`{kind}`, root mean square of the rounding, relative to the weights": f"{value:.3g}"
        for kind, value in errors.items()
    }
    if is_exact:
        exact = f"None: all {num_exact} ternary matrices are equal to the source's; a negative zero counts as zero."
        error = {"matrices of the layers": exact, **error} if error else exact
    rounded = {"of these, embedding and head": sizes["embeddings"]} if config.embeddings else {}
    return model_card(
        checkpoint.folder,
        command="ternary",
        method=" ".join(method),
        settings={
            "group size": "a row" if config.group_size == ROW else config.group_size,
            "weights": "packed as they were" if is_exact else "rounded",
            "dtype of the scales": config.scale_dtype,
            "embedding and head": config.embeddings or "as in the source",
        },
        sizes={
            "weights of the source": checkpoint.num_bytes,
            "weights": sum(sizes.values()),
            "of these, ternary": sizes["ternary"],
            **rounded,
        },
        error=error,
        usage=_USAGE,
        tags=("ternary", "bitcpm"),
        relation="quantized",
    )


__all__ = ["ternary_card"]
