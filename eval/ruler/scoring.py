"""RULER's two scores of one answer: the share of the strings that it has, or whether it has one of them.

Source: NVIDIA/RULER, `scripts/eval/synthetic/constants.py::{string_match_all, string_match_part}` and
`scripts/eval/evaluate.py::postprocess_pred` at c3f5e3b.
"""

import re
from collections.abc import Sequence

_CONTROL = re.compile(r"[\x00-\x1f]")


def clean_answer(answer: str) -> str:
    """The answer with line ends in place of control characters, and nothing around it."""
    return _CONTROL.sub("\n", answer.strip()).strip()


def match_all(answer: str, outputs: Sequence[str]) -> float:
    """The share of `outputs` that the answer contains, whatever the case; 0 to 1."""
    answer = clean_answer(answer).lower()
    return sum(output.lower() in answer for output in outputs) / len(outputs)


def match_part(answer: str, outputs: Sequence[str]) -> float:
    """1 where the answer contains one of `outputs`, whatever the case, else 0."""
    answer = clean_answer(answer).lower()
    return float(any(output.lower() in answer for output in outputs))
