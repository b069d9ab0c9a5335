"""The eight needle tasks: find the values of keys in noise, in prose, or among other needles.

Prompts and settings: NVIDIA/RULER (Apache-2.0), `scripts/data/synthetic/{niah,constants}.py` and
`scripts/synthetic.yaml` at c3f5e3b.
"""

import random
import uuid

from .source import Sample, Source, split_sentences

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NUM_DEPTHS = 40  # places in prose, evenly from its beginning to its end
PROMPTS = {  # by whether one value is asked for
    True: (
        "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the {kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided "
        "text?",
        " The special magic {kind} for {query} mentioned in the provided text is",
    ),
    False: (
        "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the "
        "provided text?",
        " The special magic {kind} for {query} mentioned in the provided text are",
    ),
}


def draw(rng: random.Random, kind: str, source: Source) -> str:
    """A word, a number of seven digits, or a random UUID."""
    if kind == "words":
        return rng.choice(source.keys)
    if kind == "numbers":
        return str(rng.randrange(10**6, 10**7))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def draw_different(rng: random.Random, kind: str, source: Source, count: int) -> list[str]:
    """So many that differ."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw(rng, kind, source)] = None
    return list(found)


def make_needles(
    rng: random.Random,
    source: Source,
    size: int,
    *,
    haystack: str,
    keys: str = "words",
    values: str = "numbers",
    num_keys: int = 1,
    num_values: int = 1,
    num_queries: int = 1,
    depth: float | None = None,
) -> Sample:
    """A sample.

    Args:
        size: lines of noise, words of prose or other needles, by the haystack.
        haystack: `"noise"`, `"essay"` (prose) or `"needle"` (needles with other keys).
        keys, values: `"words"`, `"numbers"` or `"uuids"`.
        num_keys: needles' keys, of which `num_queries` are asked for.
        num_values: a key's.
        depth: where a single needle stands, from 0 (before the haystack) to 1 (behind it); None for anywhere.
    """
    num_keys = max(num_keys, num_queries)
    names = draw_different(rng, keys, source, num_keys)
    found = draw_different(rng, values, source, num_keys * num_values)
    numbers = {name: found[i * num_values : (i + 1) * num_values] for i, name in enumerate(names)}
    needles = [NEEDLE.format(kind=values, key=name, value=value) for name in names for value in numbers[name]]
    rng.shuffle(needles)
    asked = rng.sample(names, num_queries)
    if haystack == "essay":
        context = hide_in_prose(rng, source.passage(0, size), needles, depth)
    elif haystack == "noise":
        context = hide_between_lines(rng, [NOISE] * size, needles, depth)
    else:
        others = [
            NEEDLE.format(kind=values, key=draw_other(rng, keys, source, numbers), value=draw(rng, values, source))
            for _ in range(size)
        ]
        context = hide_between_lines(rng, others, needles, depth)
    is_single = num_queries * num_values == 1
    fields = {"kind": values.removesuffix("s") if is_single else values, "query": spell_list(asked)}
    prompt, prefix = PROMPTS[is_single]
    outputs = tuple(value for name in asked for value in numbers[name])
    return Sample(prompt.format(context=context, **fields), prefix.format(**fields), outputs)


def draw_other(rng: random.Random, kind: str, source: Source, taken) -> str:
    """A key that is none of the needles', whose question would have two answers."""
    while (key := draw(rng, kind, source)) in taken:
        pass
    return key


def hide_in_prose(rng: random.Random, words: list[str], needles: list[str], depth: float | None = None) -> str:
    """The needles between the sentences of a passage, at different ones of `NUM_DEPTHS` depths, or at `depth`."""
    sentences = split_sentences(" ".join(words))
    shares = [round(100 * place / (NUM_DEPTHS - 1)) / 100 for place in range(NUM_DEPTHS)]
    shares = rng.sample(shares, len(needles)) if depth is None else [depth]
    places = sorted(int(len(sentences) * share) for share in shares)
    parts, begin = [], 0
    for place, needle in zip(places, needles):
        parts += [*sentences[begin:place], needle]
        begin = place
    return " ".join([*parts, *sentences[begin:]])


def hide_between_lines(rng: random.Random, lines: list[str], needles: list[str], depth: float | None = None) -> str:
    """The needles before different lines, or at `depth`."""
    lines = list(lines)
    places = rng.sample(range(len(lines)), len(needles)) if depth is None else [int(len(lines) * depth)]
    for place, needle in zip(sorted(places, reverse=True), needles):
        lines.insert(place, needle)
    return "\n".join(lines)


def spell_list(names: list[str]) -> str:
    """`a`, or `a, b, and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
