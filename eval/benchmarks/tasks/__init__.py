"""The benchmarks, one a file; `TASKS` is the order in which they are listed and run."""

import importlib

from minicpm4_hf.eval.benchmarks.sample import Benchmark

PAPER = ("mmlu", "cmmlu", "ceval", "bbh", "gsm8k", "math500", "mbpp", "humaneval")
TERNARY = ("arc_challenge", "arc_easy", "boolq", "piqa", "winogrande", "mmlu_redux")
TASKS = PAPER + TERNARY


def load_benchmark(name: str) -> Benchmark:
    """The benchmark of that name."""
    return importlib.import_module(f"{__name__}.{name}").TASK
