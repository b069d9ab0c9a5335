"""BoolQ: questions of yes or no about a passage.

name: boolq
source: google/boolq, split validation (3,270 questions)
licence: CC-BY-SA-3.0
shots: 0
metric: accuracy of the likelier of No and Yes
paper: no value
prompts: OpenCompass SuperGLUE_BoolQ_ppl_314b96
chosen: the paper does not have it; compared by the answer's log-likelihood
"""

from minicpm4_hf.eval.benchmarks.data import Source
from minicpm4_hf.eval.benchmarks.sample import Benchmark, PromptSettings, Sample

SOURCE = Source("boolq", "google/boolq", "default", "validation", ("question", "passage", "answer"))
CHOICES = ("No", "Yes")


def build(read, settings: PromptSettings) -> list[Sample]:
    """The set, in its order."""
    TASK.take_shots(settings, (), "boolq")
    samples = []
    for index, row in enumerate(read(SOURCE, "validation")):
        gold = int(row["answer"])
        question = f"{row['passage']}\nQuestion: {row['question']}?"
        samples.append(Sample("boolq", index, CHOICES[gold], question, choices=CHOICES, gold=gold))
    return samples


TASK = Benchmark(build)
