"""PIQA: which of two ways to do something works.

name: piqa
source: baber/piqa, split validation (1,838 questions), which is ybisk/piqa without its script
licence: AFL-3.0
shots: 0
metric: accuracy of the choice with the highest log-likelihood a byte
paper: no value
prompts: OpenCompass piqa_ppl_1cf9f0, plain text in every format
chosen: the paper does not have it; a byte of the answer, as lm-eval's acc_norm, where OpenCompass takes the mean over
    the tokens of question and answer
"""

from minicpm4_hf.eval.benchmarks.data import Source
from minicpm4_hf.eval.benchmarks.sample import Benchmark, PromptSettings, Sample

SOURCE = Source("piqa", "baber/piqa", "default", "validation", ("goal", "sol1", "sol2", "label"))


def build(read, settings: PromptSettings) -> list[Sample]:
    """The set, in its order."""
    TASK.take_shots(settings, (), "piqa")
    samples = []
    for index, row in enumerate(read(SOURCE, "validation")):
        context = f"The following makes sense: \nQ: {row['goal']}\nA:"
        ways = (row["sol1"], row["sol2"])
        pairs = tuple((context, f" {way}") for way in ways)
        samples.append(Sample("piqa", index, ways[row["label"]], pairs=pairs, gold=row["label"]))
    return samples


TASK = Benchmark(build, per_byte=True)
