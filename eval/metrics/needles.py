"""Whether an answer has what was hidden in the context, by the rules of the two that make such contexts."""

from collections.abc import Sequence

import numpy as np

from minicpm4_hf.eval.ruler.scoring import match_all, match_part
from minicpm4_hf.training.synthetic import Example

from .normalise import check_pairs


def match_exactly(answer: str, outputs: Sequence[str]) -> float:
    """1 where the answer begins with one of `outputs` and goes on with no letter or digit, else 0."""
    nothing = np.empty(0, dtype=np.int64)
    return float(any(Example(nothing, nothing, 0, 0, output, "").is_solved_by(answer) for output in outputs))


RULES = {"exact": match_exactly, "all": match_all, "part": match_part}


def needle_accuracy(predictions: Sequence[str], references: Sequence[Sequence[str]], *, rule: str = "exact") -> float:
    """The mean score of answers, 0 to 1.

    Args:
        predictions: what the model wrote.
        references: the needles of each.
        rule: "exact" (of `minicpm4_hf.training.synthetic`), or RULER's "all", the share that an answer contains, and
            "part", whether it contains one.

    Raises:
        ValueError: an unknown rule, a sample without needles, or lists that are empty or of different lengths.
    """
    if rule not in RULES:
        raise ValueError(f"`rule` must be one of {', '.join(RULES)}, got {rule!r}.")
    check_pairs(predictions, references)
    if not all(references):
        raise ValueError("`references` must have at least one needle for each prediction, got an empty list.")
    return sum(RULES[rule](answer, outputs) for answer, outputs in zip(predictions, references)) / len(predictions)
