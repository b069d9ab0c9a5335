"""The model card of an int4 checkpoint: the words; `card.py` lays them out."""

from .card import model_card
from .gptq_layer import LINEARS
from .gptq_model import Int4Settings
from .output import Plan, plan_bytes
from .source import Checkpoint

_GPTQ = (
    "Symmetric int4 by GPTQ (arXiv:2210.17323): column by column, each column's rounding error is made up for by the "
    "columns after it, given the second moments of the layer's inputs on calibration text."
)
_PREFIX_LEFT_OUT = (
    "The first positions of each sequence, whose activations are many times larger, are left out of the moments "
    "(P-GPTQ, arXiv:2506.07900)."
)
_SMOOTHED = (
    "Inputs were smoothed first: divided by a scale a channel, which went into the norms and weights before them "
    "(AWQ's search, arXiv:2306.00978)."
)
_METHOD_NOTES = {
    "rtn": "Symmetric int4, each weight rounded to the nearest code of its group.",
    "gptq": _GPTQ,
    "p-gptq": f"{_GPTQ} {_PREFIX_LEFT_OUT}",
    "s-gptq": f"{_GPTQ} {_SMOOTHED}",
    "s-p-gptq": f"{_GPTQ} {_PREFIX_LEFT_OUT} {_SMOOTHED}",
}
_ROTATED = (
    "Hadamard rotations of the residual stream and of each head's values were folded into the weights first (QuaRot's "
    "offline part, arXiv:2404.00456); the head is therefore stored for itself."
)
_PREFIXED = (
    "Keys and values of a few tokens are stored in full precision and stand before every text (PrefixQuant, "
    "arXiv:2410.05265)."
)
_REQUIRES = {
    "gptq": "The layout is GPTQ's, as GPTQModel and vLLM read it; transformers reads it with GPTQModel and optimum.",
    "compressed-tensors": "transformers reads it with the package compressed-tensors; vLLM does too.",
}
_LOADING = """

```python
import minicpm4_hf
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
```"""
_PREFIX_USAGE = """

The stored prefix is used where it is asked for; without it the model works as well as without `--prefix`, or worse.

```python
from minicpm4_hf.quantization.prefix import Prefix

prefix = Prefix.load("FOLDER")
ids = prefix.prepend(tokenizer("It was", return_tensors="pt").input_ids)
model.generate(ids, past_key_values=prefix.build_cache(model))
```"""


def int4_card(checkpoint: Checkpoint, settings: Int4Settings, described: dict, plan: Plan, records: list[dict]) -> str:
    """The text of README.md.

    Args:
        described: settings to show, name -> value.
        plan: every tensor that was written.
        records: what `quantize_layers` returned.
    """
    of_what = "outputs on the calibration inputs" if settings.is_calibrated else "weights"
    errors = {}
    for linear in LINEARS:
        values = [record["errors"][linear] for record in records]
        worst = max(range(len(values)), key=values.__getitem__)
        mean = sum(values) / len(values)
        errors[f"`{linear}`, relative squared error of its {of_what}"] = (
            f"{mean:.2e} on average, {values[worst]:.2e} in layer {worst}, the worst"
        )
    notes = [_METHOD_NOTES[settings.method]]
    notes += [_ROTATED] * settings.rotate + [_PREFIXED] * bool(settings.prefix_ids)
    return model_card(
        checkpoint.folder,
        command="int4",
        method=" ".join(notes),
        settings={name: value for name, value in described.items() if value not in (None, [])},
        sizes={"weights of the source": checkpoint.num_bytes, "weights": plan_bytes(plan)},
        error=errors,
        usage=_REQUIRES[settings.layout] + _LOADING + (_PREFIX_USAGE if settings.prefix_ids else ""),
        tags=("int4", settings.layout),
        relation="quantized",
    )


__all__ = ["int4_card"]
