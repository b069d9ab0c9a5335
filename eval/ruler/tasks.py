"""The thirteen tasks: what makes a sample, how many tokens an answer may have, and its score.

Settings: NVIDIA/RULER, `scripts/synthetic.yaml` and `scripts/data/synthetic/constants.py` at c3f5e3b.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .aggregation import CODED_TOKENS, NUM_COMMON, make_coded_words, make_common_words
from .answering import make_answering
from .needles import make_needles
from .scoring import match_all, match_part
from .source import Sample, Source
from .tracing import make_tracing


@dataclass(frozen=True)
class Task:
    """A task.

    Args:
        make: `make(rng, source, size, **settings)` gives a sample that grows with `size`.
        answer_tokens: how many are generated.
        smallest: the least size that `make` takes.
        settings: of `make`.
        passes: which of the sample's `length`, `task`, `index` and `depth` `make` also takes.
        largest: the greatest size that a source is enough for; None where there is no end.
    """

    make: Callable[..., Sample]
    answer_tokens: int
    smallest: int
    settings: dict = field(default_factory=dict)
    passes: tuple[str, ...] = ()
    score: Callable[[str, Sequence[str]], float] = match_all
    largest: Callable[[Source], int] | None = None

    def sample(
        self, source: Source, size: int, *, task: str, length: int, index: int, seed: int, depth: float | None = None
    ) -> Sample:
        """The sample of an index; of two sizes it asks for the same wherever it can."""
        rng = random.Random(f"{seed}/{task}/{length}/{index}")
        known = {"task": task, "length": length, "index": index, "depth": depth}
        return self.make(rng, source, size, **self.settings, **{name: known[name] for name in self.passes})


NEEDLE_TOKENS, TRACING_TOKENS, COMMON_TOKENS, ANSWERING_TOKENS = 128, 30, 120, 32


def _needles(smallest: int, haystack: str, passes: tuple[str, ...] = (), **settings) -> Task:
    return Task(make_needles, NEEDLE_TOKENS, smallest, {"haystack": haystack, **settings}, passes)


TASKS = {
    "niah_single_1": _needles(1, "noise", ("depth",)),
    "niah_single_2": _needles(1, "essay", ("depth",)),
    "niah_single_3": _needles(1, "essay", ("depth",), values="uuids"),
    "niah_multikey_1": _needles(1, "essay", num_keys=4),
    "niah_multikey_2": _needles(1, "needle"),
    "niah_multikey_3": _needles(1, "needle", keys="uuids", values="uuids"),
    "niah_multivalue": _needles(1, "essay", num_values=4),
    "niah_multiquery": _needles(1, "essay", num_queries=4),
    "vt": Task(make_tracing, TRACING_TOKENS, 5),
    "cwe": Task(
        make_common_words,
        COMMON_TOKENS,
        NUM_COMMON + 1,
        passes=("length",),
        largest=lambda source: len(source.all_words),
    ),
    "fwe": Task(make_coded_words, CODED_TOKENS, 60, passes=("length",)),
    "qa_1": Task(make_answering, ANSWERING_TOKENS, 1, passes=("task", "index"), score=match_part),
    "qa_2": Task(make_answering, ANSWERING_TOKENS, 1, passes=("task", "index"), score=match_part),
}

# Whose one needle can be put at a depth.
DEPTH_TASKS = tuple(name for name, task in TASKS.items() if "depth" in task.passes)
