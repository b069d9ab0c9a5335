"""Variable tracking: which variables end up with a value, through a chain of assignments hidden in noise.

Prompt and settings: NVIDIA/RULER (Apache-2.0), `scripts/data/synthetic/{variable_tracking,constants}.py` and
`scripts/synthetic.yaml` at c3f5e3b. As there, one solved example with shorter names comes first.
"""

import itertools
import random
import string

from .needles import NOISE
from .source import Sample, Source

PROMPT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\nQuestion: "
    "Find all variables that are assigned the value {value} in the text above."
)
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {value}, they are: "
)
NAME_LETTERS, EXAMPLE_NAME_LETTERS = 5, 3
EXAMPLE_LINES = 14  # of noise in the solved example; RULER's fills 500 tokens, which are about as many


def draw_names(rng: random.Random, count: int, letters: int) -> list[str]:
    """Different names in capitals."""
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
    return list(names)


def make_chain(rng: random.Random, names: list[str], num_lines: int) -> tuple[str, str]:
    """A value that passes from each name to the next, an assignment a line; the text and the value."""
    value = str(rng.randrange(10000, 99999))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {after} = VAR {before} " for before, after in itertools.pairwise(names)]
    lines = [NOISE] * num_lines
    for offset, (place, line) in enumerate(zip(sorted(rng.sample(range(num_lines), len(chain))), chain)):
        lines.insert(place + offset, line)
    return "\n".join(lines).replace(". \n", ".\n"), value


def make_tracing(rng: random.Random, source: Source, size: int, *, hops: int = 4) -> Sample:
    """A sample with one chain of `hops` assignments in `size` lines of noise."""
    shown = draw_names(rng, hops + 1, EXAMPLE_NAME_LETTERS)
    text, value = make_chain(rng, shown, EXAMPLE_LINES)
    fields = {"value": value, "count": hops + 1}
    example = f"{PROMPT.format(context=text, **fields)}{PREFIX.format(**fields)} {' '.join(shown)}\n\n"
    names = draw_names(rng, hops + 1, NAME_LETTERS)
    text, value = make_chain(rng, names, size)
    fields = {"value": value, "count": hops + 1}
    return Sample(example + PROMPT.format(context=text, **fields), PREFIX.format(**fields), tuple(names))
