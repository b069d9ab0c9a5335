"""MBPP, sanitized: short Python functions from a sentence and three tests.

name: mbpp
source: google-research-datasets/mbpp, config sanitized, split test (257 tasks)
licence: CC-BY-4.0
shots: 3, of the full set's tasks 2 to 4, in shots.jsonl
metric: pass@1; the answer's code passes the task's tests
paper: Table 3: BitCPM4-0.5B 46.69, BitCPM4-1B 61.48; Table 5: MiniCPM4-0.5B 59.14, MiniCPM4-8B 78.99
prompts: OpenCompass sanitized_mbpp_gen_830460
chosen: the paper does not say which set, but its values are fractions of 257 (152 and 203 of 257 in Table 5); an
    answer has at most 512 tokens
"""

from minicpm4_hf.eval.benchmarks.data import Source
from minicpm4_hf.eval.benchmarks.sample import Benchmark, PromptSettings, Sample, read_examples
from minicpm4_hf.eval.metrics.programs import extract_code, mbpp_program

SOURCE = Source("mbpp", "google-research-datasets/mbpp", "sanitized", "test", ("prompt", "code", "test_list"))


def ask(text: str, tests: list[str], tail: str) -> str:
    """The user's turn; `tail` ends it."""
    head = "You are an expert Python programmer, and here is your task: "
    return f"{head}{text} Your code should pass these tests:\n\n {tail.join(tests)} {tail}"


def build(read, settings: PromptSettings) -> list[Sample]:
    """The set, in its order."""
    examples = TASK.take_shots(settings, read_examples("mbpp"), "shots.jsonl")
    shots = tuple(
        (ask(row["text"], row["test_list"], " \n"), f"[BEGIN]\n '{row['code']}' \n[DONE] \n\n ") for row in examples
    )
    return [
        Sample(
            "mbpp",
            index,
            f" '{row['code']}' \n[DONE]",
            ask(row["prompt"], row["test_list"], "\n"),
            shots,
            prefix="[BEGIN]\n",
            fields={"tests": [*(row.get("test_imports") or []), *row["test_list"]]},
        )
        for index, row in enumerate(read(SOURCE, "test"))
    ]


def write_program(sample: Sample, answer: str) -> str:
    """The answer's code, with or without the marks and quotes of the examples, and the tests."""
    code = (answer.partition("[BEGIN]")[2] or answer).partition("[DONE]")[0]
    code = code.strip().removeprefix("'").removesuffix("'")
    return mbpp_program(extract_code(code), "\n".join(sample.fields["tests"]))


TASK = Benchmark(build, program=write_program, num_shots=3, max_tokens=512, stops=("[DONE]",))
