"""Whether two answers are equal as mathematics, through Hugging Face's library math-verify."""

import importlib.util
import threading
from collections.abc import Sequence

from .normalise import check_pairs

TIMEOUT_SECONDS = 5


def check_math_verify() -> None:
    """Raises `ImportError` with what to install, without math-verify."""
    if importlib.util.find_spec("math_verify") is None:
        raise ImportError('The metric math_verify needs math-verify: pip install "minicpm4-hf[eval]".')


def is_equal(prediction: str, reference: str) -> bool:
    """Whether an answer's last formula or number equals the reference's.

    The library's time limit is an alarm, which only the main thread has; elsewhere there is none.

    Args:
        prediction: what the model wrote, with LaTeX in `$` or `\\boxed{}`, or plain numbers.
        reference: the same, or a bare formula.

    Raises:
        ImportError: without math-verify.
    """
    check_math_verify()
    from math_verify import parse, verify

    seconds = TIMEOUT_SECONDS if threading.current_thread() is threading.main_thread() else None
    if "$" not in reference and "\\boxed" not in reference:
        reference = f"\\boxed{{{reference}}}"
    right = parse(reference, parsing_timeout=seconds)
    said = parse(prediction, parsing_timeout=seconds)
    return verify(right, said, timeout_seconds=seconds)


def math_accuracy(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The share of answers that equal their reference, 0 to 1; see `is_equal`.

    Raises:
        ValueError: lists that are empty or of different lengths.
        ImportError: without math-verify.
    """
    check_pairs(predictions, references)
    return sum(is_equal(answer, right) for answer, right in zip(predictions, references)) / len(predictions)
