"""LongRoPE factor lists of the official checkpoints, from their formulas, and the recipe for longer contexts."""

import copy
import math

from .configuration_minicpm4 import MiniCPM4Config

# f(i) = low + span / (1 + exp(-slope * (i - (n - 1) / 2))), i = 0 .. n - 1: fitted to the published lists; the largest
# relative error is 2e-16 for 8B, 7e-16 for 4.1, 1e-7 for head size 64 (that list was published in float32).
_LOGISTIC = {
    "MiniCPM4-8B": (64, 0.9157734670477343, 30.190175865146283, 0.18747656542932134),
    "MiniCPM4.1-8B": (64, 0.8288299491615245, 62.349134516403346, 0.18747656542932134),
    "MiniCPM4-0.5B": (32, 0.85382356, 49.14617655, 0.37495313),
}

# YaRN's correction range (arXiv:2309.00071, section 3.2) is computed for these, whatever the checkpoint's own length:
# they reproduce the official 128K lists.
_YARN_BETA_FAST, _YARN_BETA_SLOW, _YARN_ORIGINAL_TOKENS = 32, 1, 4096


def longrope_factors(name: str) -> list[float]:
    """The base LongRoPE list of an official model: one factor for each of the `head_dim / 2` frequencies.

    Args:
        name: "MiniCPM4-8B" (32K, head size 128), "MiniCPM4.1-8B" (64K, head size 128) or "MiniCPM4-0.5B" (32K, head
            size 64; also the ternary sizes with that head size).

    Raises:
        ValueError: no list of that name.

    Source: the official config.json files; the logistic form is a fit to them (`_LOGISTIC`).
    """
    if name not in _LOGISTIC:
        raise ValueError(f"No LongRoPE list named {name!r}; the known ones are {', '.join(_LOGISTIC)}.")
    n, low, span, slope = _LOGISTIC[name]
    return [low + span / (1 + math.exp(-slope * (i - (n - 1) / 2))) for i in range(n)]


def extend_factors(factors: list[float], scale: float, theta: float = 10000.0) -> list[float]:
    """Stretch a LongRoPE list by `scale` with YaRN's NTK-by-parts rule.

    `f'(i) = f(i) / ((1 - r) + r / scale)` with `r` rising from 0 to 1 over YaRN's correction range, so that fast
    frequencies stay as they are and slow ones are stretched by the full `scale`.

    Source: reproduces the official 128K lists (MiniCPM README; CPM.cu `cpmcu/common/utils.py`) to 4e-5, which is the
    rounding of their half-precision ramp.
    """
    return [f / ((1 - r) + r / scale) for f, r in zip(factors, _yarn_ramp(len(factors), theta))]


def _yarn_ramp(half: int, theta: float) -> list[float]:
    def frequency_of(rotations: float) -> float:
        return half * math.log(_YARN_ORIGINAL_TOKENS / (rotations * 2 * math.pi)) / math.log(theta)

    low = max(math.floor(frequency_of(_YARN_BETA_FAST)), 0)
    high = min(math.ceil(frequency_of(_YARN_BETA_SLOW)), half - 1)
    return [min(max((i - low) / max(high - low, 1), 0.0), 1.0) for i in range(half)]


def extend_context(config: MiniCPM4Config, length: int) -> MiniCPM4Config:
    """A copy of `config` for contexts of `length` tokens: the official recipe, for any length.

    Both factor lists are replaced by the stretched one and `max_position_embeddings` is raised; the attention factor
    stays 1, as in the official instruction for 128K (which leaves `max_position_embeddings` alone to that end).

    Args:
        config: a MiniCPM4 config with LongRoPE parameters.
        length: the wanted context in tokens.

    Raises:
        ValueError: `config` has no LongRoPE lists, or its lists for short and long contexts differ.

    Source: MiniCPM README, section on 128K; quality at other lengths than 128K is not published.
    """
    rope = config.rope_parameters or {}
    if rope.get("rope_type") != "longrope":
        raise ValueError(
            f"`extend_context` needs LongRoPE factors, got rope type {rope.get('rope_type', 'default')!r}."
        )
    if rope["short_factor"] != rope["long_factor"]:
        raise ValueError("`extend_context` needs equal `short_factor` and `long_factor`, got two different lists.")
    extended = copy.deepcopy(config)
    if length <= config.max_position_embeddings:
        return extended
    original, theta = rope["original_max_position_embeddings"], rope["rope_theta"]
    ramp = _yarn_ramp(len(rope["long_factor"]), theta)
    stretched = max(config.max_position_embeddings / original, 1.0)  # above 1 where `config` was extended before
    base = [f * ((1 - r) + r / stretched) for f, r in zip(rope["long_factor"], ramp)]
    factors = extend_factors(base, length / original, theta)
    extended.rope_parameters = {**rope, "short_factor": factors, "long_factor": list(factors), "factor": 1.0}
    extended.max_position_embeddings = length
    return extended
