"""MMLU-Redux 2.0: a hundred questions of each of MMLU's subjects, looked through by people.

name: mmlu_redux
source: edinburgh-dawg/mmlu-redux-2.0, a config a subject, split test (those without an error of 5,700
    questions)
licence: CC-BY-4.0
shots: 5, the first of the subject in MMLU's split dev (cais/mmlu)
metric: accuracy, mean over the subjects; as of mmlu
paper: no value
prompts: OpenCompass mmlu_gen_4d595a (chat), mmlu_ppl_ac766d (plain), which are MMLU's
chosen: the paper does not have it, and OpenCompass no settings: those of mmlu, so that the two compare; only rows
    whose error_type is ok
"""

from minicpm4_hf.eval.benchmarks.data import Source
from minicpm4_hf.eval.benchmarks.sample import Benchmark, PromptSettings, Sample

from .mmlu import TASK as MMLU
from .mmlu import make_sample, read_shots

SOURCE = Source("mmlu_redux", "edinburgh-dawg/mmlu-redux-2.0", None, "test", ("question", "choices", "answer"))


def build(read, settings: PromptSettings) -> list[Sample]:
    """All subjects, in the alphabet's order."""
    samples = []
    for subject in TASK.parts_of(settings):
        shots = read_shots(read, settings, subject)
        rows = [row for row in read(SOURCE, "test", subject) if row.get("error_type", "ok") == "ok"]
        samples += [make_sample(settings, subject, i, shots, row) for i, row in enumerate(rows)]
    return samples


TASK = Benchmark(build, score=MMLU.score, parts=MMLU.parts, num_shots=5)
