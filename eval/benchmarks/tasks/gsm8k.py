"""GSM8K: grade-school mathematics in words.

name: gsm8k
source: openai/gsm8k, config main, split test (1,319 questions)
licence: MIT
shots: 4, worked; of the training split, in shots.jsonl
metric: accuracy of the number that the answer announces, else of its last
paper: Table 3: BitCPM4-0.5B 25.55, BitCPM4-1B 60.80; Table 5: MiniCPM4-0.5B 52.08, MiniCPM4-8B 91.51
prompts: OpenCompass gsm8k_gen_1d7fe4
chosen: the paper names OpenCompass but no settings; an answer has at most 512 tokens and ends at "Question:", as
    there, and thousands may have commas
"""

from minicpm4_hf.eval.benchmarks.data import Source
from minicpm4_hf.eval.benchmarks.sample import Benchmark, PromptSettings, Sample, read_examples
from minicpm4_hf.eval.metrics.normalise import is_match, number_of

SOURCE = Source("gsm8k", "openai/gsm8k", "main", "test", ("question", "answer"))


def ask(question: str) -> str:
    """The user's turn."""
    return f"Question: {question}\nLet's think step by step\nAnswer:"


def read_gold(answer: str) -> str:
    """The number behind the four hashes of an answer of the set.

    Raises:
        ValueError: there is none.
    """
    number = number_of(answer) if "####" in answer else ""
    if not number:
        raise ValueError(f"An answer of gsm8k must end in #### and a number, got {answer[-40:]!r}.")
    return number


def build(read, settings: PromptSettings) -> list[Sample]:
    """The set, in its order."""
    examples = TASK.take_shots(settings, read_examples("gsm8k"), "shots.jsonl")
    shots = tuple((ask(example["question"]), example["answer"] + "\n") for example in examples)
    samples = []
    for index, row in enumerate(read(SOURCE, "test")):
        gold = read_gold(row["answer"])
        samples.append(Sample("gsm8k", index, row["answer"], ask(row["question"]), shots, fields={"target": gold}))
    return samples


def score(sample: Sample, answer: str) -> float:
    """1 where the number that the answer ends in is the right one.

    Unlike lm-eval's `flexible-extract`, which takes the last number and compares as text: 18.00 is 18, dots behind a
    number are none, and a number that is announced goes before a later one.
    """
    return float(is_match(answer, sample.fields["target"], "number"))


TASK = Benchmark(build, score=score, num_shots=4, max_tokens=512, stops=("Question:",))
