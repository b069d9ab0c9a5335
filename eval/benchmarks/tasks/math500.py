"""MATH-500: competition mathematics.

name: math500
source: HuggingFaceH4/MATH-500, split test (500 problems)
licence: MIT
shots: 0
metric: accuracy; the last formula of the answer is equal to the right one, by math-verify
paper: Table 3: BitCPM4-0.5B 10.20, BitCPM4-1B 34.00; Table 5: MiniCPM4-0.5B 29.60, MiniCPM4-8B 78.60
prompts: OpenCompass math_prm800k_500_0shot_cot_gen
chosen: the paper names OpenCompass but no settings; an answer has at most 1,024 tokens, OpenCompass's of MiniCPM3
"""

from minicpm4_hf.eval.benchmarks.data import Source
from minicpm4_hf.eval.benchmarks.sample import Benchmark, PromptSettings, Sample
from minicpm4_hf.eval.metrics.mathematics import check_math_verify, is_equal

SOURCE = Source("math500", "HuggingFaceH4/MATH-500", "default", "test", ("problem", "answer"))
REQUEST = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def build(read, settings: PromptSettings) -> list[Sample]:
    """The set, in its order."""
    TASK.take_shots(settings, (), "math500")
    return [
        Sample(
            "math500",
            index,
            f"The answer is $\\boxed{{{row['answer']}}}$.",
            row["problem"] + REQUEST,
            fields={"target": row["answer"]},
        )
        for index, row in enumerate(read(SOURCE, "test"))
    ]


TASK = Benchmark(
    build,
    score=lambda sample, answer: float(is_equal(answer, sample.fields["target"])),
    max_tokens=1024,
    check=check_math_verify,
)
