"""pass@k: of k programs that a model wrote for a task, does one pass its tests?

Source: Chen et al. 2021 (arXiv:2107.03374), section 2.1 for the estimator and section 3.1 for where a completion ends;
HumanEval's form is that of openai/human-eval `execution.py`, MBPP's that of Austin et al. 2021 (arXiv:2108.07732).
"""

import math
import re
from collections.abc import Sequence

from minicpm4_hf.eval.sandbox import run_many

from .normalise import check_pairs

_BLOCK = re.compile(r"```\w*[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_STOPS = re.compile(r"\n(?:class |def |#|if |print)")


def estimate_pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that one of k samples, drawn from those there are, is right: 1 - C(n - c, k) / C(n, k).

    Raises:
        ValueError: `k` not of 1 to `num_samples`, or `num_correct` not of 0 to `num_samples`.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"`k` must be 1 to the number of samples of each task, {num_samples}, got {k}.")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"`num_correct` must be 0 to `num_samples` {num_samples}, got {num_correct}.")
    all_ways = math.comb(num_samples, k)
    return (all_ways - math.comb(num_samples - num_correct, k)) / all_ways


def extract_code(answer: str) -> str:
    """The first block in backquotes, or all where there is none, with its indentation."""
    block = _BLOCK.search(answer)
    return (block[1] if block else answer).strip("\r\n").rstrip()


def humaneval_program(prompt: str, answer: str, test: str, entry_point: str) -> str:
    """HumanEval: the prompt, which begins a function, what goes on from it or defines it anew, and its tests.

    A completion that goes on ends before the next thing at the margin.
    """
    code = extract_code(answer)
    if not re.search(rf"^(?:async )?def {re.escape(entry_point)}\b", code, re.MULTILINE):
        code = _STOPS.split("\n" + code, maxsplit=1)[0].removeprefix("\n") if code[:1].isspace() else code
    return f"{prompt.rstrip()}\n{code}\n\n{test}\n\ncheck({entry_point})\n"


def mbpp_program(answer: str, tests: str) -> str:
    """MBPP: what the model wrote, and the tests' lines."""
    return f"{extract_code(answer)}\n\n{tests}\n"


def build_program(answer: str, task: dict) -> str:
    """The program of a task with "test" and, in HumanEval, "prompt" and "entry_point"."""
    if task.get("entry_point"):
        return humaneval_program(task["prompt"], answer, task["test"], task["entry_point"])
    return mbpp_program(answer, task["test"])


def pass_at_k(
    predictions: Sequence[Sequence[str]],
    references: Sequence[dict],
    *,
    k: Sequence[int] = (1,),
    workers: int | None = None,
    **settings,
) -> dict[str, float]:
    """Run every sample with its task's tests in the sandbox; a sample passes if it runs to the end.

    Args:
        predictions: the samples of each task.
        references: a task's "test"; for HumanEval also its "prompt" and "entry_point", which MBPP has not.
        k: one figure each.
        workers: as of `run_many`.
        settings: limits, and `unsafe`, as of `run_python`.

    Returns:
        `{"pass@1": ...}`, the mean over the tasks, 0 to 1.

    Raises:
        ValueError: a `k` above the samples of a task, or lists that are empty or of different lengths.
        SandboxError: nothing here can isolate a program.
    """
    check_pairs(predictions, references)
    for one in k:
        estimate_pass_at_k(min(map(len, predictions)), 0, one)  # before anything runs
    programs = [build_program(answer, task) for samples, task in zip(predictions, references) for answer in samples]
    passed = iter([result.passed for result in run_many(programs, workers=workers, **settings)])
    counts = [(len(samples), sum(next(passed) for _ in samples)) for samples in predictions]
    return {f"pass@{one}": sum(estimate_pass_at_k(*count, one) for count in counts) / len(counts) for one in k}
