"""HumanEval: Python functions to be completed from signature and docstring.

name: humaneval
source: openai/openai_humaneval, split test (164 functions)
licence: MIT
shots: 0
metric: pass@1; the completed function passes the tests
paper: Table 3: BitCPM4-0.5B 29.88, BitCPM4-1B 37.20; Table 5: MiniCPM4-0.5B 46.34, MiniCPM4-8B 85.37
prompts: OpenCompass humaneval_gen_8e312c
chosen: the paper names OpenCompass but no settings; an answer has at most 512 tokens
"""

from minicpm4_hf.eval.benchmarks.data import Source
from minicpm4_hf.eval.benchmarks.sample import Benchmark, PromptSettings, Sample
from minicpm4_hf.eval.metrics.programs import humaneval_program

COLUMNS = ("prompt", "entry_point", "canonical_solution", "test")
SOURCE = Source("humaneval", "openai/openai_humaneval", "openai_humaneval", "test", COLUMNS)


def build(read, settings: PromptSettings) -> list[Sample]:
    """The set, in its order."""
    TASK.take_shots(settings, (), "humaneval")
    return [
        Sample(
            "humaneval",
            index,
            row["canonical_solution"],
            f"Complete the following python code:\n{row['prompt']}",
            fields={name: row[name] for name in COLUMNS},
        )
        for index, row in enumerate(read(SOURCE, "test"))
    ]


def write_program(sample: Sample, answer: str) -> str:
    """The completed function, its tests and a call of them.

    SentencePiece drops the space that a text begins with, so that of an indentation three are left (OpenCompass's
    `humaneval_internal_v2_postprocess` puts it back too).
    """
    if answer.startswith("   ") and not answer.startswith("    "):
        answer = f" {answer}"
    fields = sample.fields
    return humaneval_program(fields["prompt"], answer, fields["test"], fields["entry_point"])


TASK = Benchmark(build, program=write_program, max_tokens=512)
