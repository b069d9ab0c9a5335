"""Counting: the ten common words of a list (`cwe`), and the three most frequent words of a coded text (`fwe`).

Prompts and settings: NVIDIA/RULER (Apache-2.0), `scripts/data/synthetic/{common_words_extraction,
freq_words_extraction,constants}.py` and `scripts/synthetic.yaml` at c3f5e3b. Words come from the text of the haystack
instead of the package wonderwords.
"""

import math
import random
import string

from .source import Sample, Source

LIST_PROMPT = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
)
LIST_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
NUM_COMMON = 10
SHORT = 4096  # tokens; below, words are repeated less
# By whether the length is below `SHORT`: (words, times a common one, times another one) of the solved example, and
# times a common and another one of the task.
REPEATS = {True: ((20, 3, 1), (6, 1)), False: ((40, 10, 3), (30, 3))}

CODED_PROMPT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
    "appeared coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What "
    "are the three most frequently appeared words in the above coded text?"
)
CODED_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
CODED_LETTERS, CODED_ANSWERS, CODED_TOKENS = 6, 3, 50  # the last: tokens that are left for the answer
TOKENS_A_CODED_WORD = 50  # of the length, for each different word
NOISE_WORD = "..."  # what the most frequent word is replaced with
ZETA_2 = math.pi**2 / 6  # the sum of k^-2, which makes the frequencies shares


def number_words(words: list[str]) -> str:
    """`1. a 2. b`"""
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def make_list(rng: random.Random, words: list[str], common_times: int, other_times: int) -> tuple[str, list[str]]:
    """A shuffled list in which the first `NUM_COMMON` of the words are more often than the others; and those."""
    common, others = words[:NUM_COMMON], words[NUM_COMMON:]
    entries = common * common_times + others * other_times
    rng.shuffle(entries)
    return number_words(entries), common


def make_common_words(rng: random.Random, source: Source, size: int, *, length: int) -> Sample:
    """A list of `size` different words, which the source must have."""
    (num_shown, *shown_times), times = REPEATS[length < SHORT]
    context, common = make_list(rng, rng.sample(source.vocabulary(num_shown), num_shown), *shown_times)
    example = f"{LIST_PROMPT.format(context=context)}{LIST_PREFIX} {number_words(common)}\n"
    context, common = make_list(rng, rng.sample(source.vocabulary(size), size), *times)
    return Sample(example + LIST_PROMPT.format(context=context), LIST_PREFIX, tuple(common))


def make_coded_words(rng: random.Random, source: Source, size: int, *, length: int) -> Sample:
    """A text of about `size` words whose frequencies fall as the rank's square; the first rank is noise."""
    count = max(CODED_ANSWERS + 1, (length - CODED_TOKENS) // TOKENS_A_CODED_WORD)
    words: dict[str, None] = {NOISE_WORD: None}
    while len(words) < count:
        words["".join(rng.choices(string.ascii_lowercase, k=CODED_LETTERS))] = None
    ranked = list(words)
    entries = [word for rank, word in enumerate(ranked, 1) for _ in range(int(size / rank**2 / ZETA_2))]
    rng.shuffle(entries)
    answers = tuple(ranked[1 : 1 + CODED_ANSWERS])
    return Sample(CODED_PROMPT.format(context=" ".join(entries)), CODED_PREFIX, answers)
