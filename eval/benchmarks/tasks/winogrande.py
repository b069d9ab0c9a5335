"""WinoGrande: which of two names a sentence is about.

name: winogrande
source: allenai/winogrande, config winogrande_xl, split validation (1,267 sentences)
licence: CC-BY-4.0
shots: 0
metric: accuracy of the name after which the rest of the sentence is likelier
paper: no value
prompts: OpenCompass winogrande_ll_c5cf57, plain text in every format
chosen: the paper does not have it
"""

from minicpm4_hf.eval.benchmarks.data import Source
from minicpm4_hf.eval.benchmarks.sample import Benchmark, PromptSettings, Sample

COLUMNS = ("sentence", "option1", "option2", "answer")
SOURCE = Source("winogrande", "allenai/winogrande", "winogrande_xl", "validation", COLUMNS)


def build(read, settings: PromptSettings) -> list[Sample]:
    """The set, in its order."""
    TASK.take_shots(settings, (), "winogrande")
    samples = []
    for index, row in enumerate(read(SOURCE, "validation")):
        before, _, rest = row["sentence"].partition("_")
        names, gold = (row["option1"], row["option2"]), int(row["answer"]) - 1
        pairs = tuple((before + name, rest) for name in names)
        samples.append(Sample("winogrande", index, names[gold], pairs=pairs, gold=gold))
    return samples


TASK = Benchmark(build)
