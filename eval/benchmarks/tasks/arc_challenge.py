"""ARC-Challenge: questions of school science, the hard ones.

name: arc_challenge
source: allenai/ai2_arc, config ARC-Challenge, split test (1,172 questions)
licence: CC-BY-SA-4.0
shots: 0
metric: accuracy of the choice with the highest log-likelihood a byte
paper: no value
prompts: OpenCompass ARC_c_ppl_a450bd
chosen: the paper does not have it; the test split, where OpenCompass has the dev split; a byte of the answer, as
    lm-eval's acc_norm, where OpenCompass takes the mean over the tokens of question and answer
"""

from minicpm4_hf.eval.benchmarks.choices import build_arc
from minicpm4_hf.eval.benchmarks.data import Source
from minicpm4_hf.eval.benchmarks.sample import Benchmark, PromptSettings, Sample

SOURCE = Source("arc_challenge", "allenai/ai2_arc", "ARC-Challenge", "test", ("question", "choices", "answerKey"))


def build(read, settings: PromptSettings) -> list[Sample]:
    """The set, in its order."""
    TASK.take_shots(settings, (), "arc_challenge")
    return build_arc(read(SOURCE, "test"), "arc_challenge")


TASK = Benchmark(build, per_byte=True)
