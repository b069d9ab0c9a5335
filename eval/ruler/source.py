"""What samples are made of: the words of a text for haystacks, keys, and words to count."""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property

from minicpm4_hf.training.synthetic import ADJECTIVES, NOUNS, keys_of

from .questions import Questions

SHORTEST_WORD = 3
_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"'\u201d\u2019)]))\s+")


@dataclass(frozen=True)
class Sample:
    """One task to solve.

    Args:
        prompt: what is asked.
        answer_prefix: what the answer begins with; the model goes on from there.
        outputs: the strings that the answer must have, or one of them, as the task's score says.
    """

    prompt: str
    answer_prefix: str
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A text, and questions about documents.

    RULER's haystack is a collection of Paul Graham's essays, which may not be passed on; any text does the same, and
    that collection can be given.

    Args:
        text: prose, at least a few sentences.
        questions: by the task's name, `qa_1` and `qa_2`.

    Raises:
        ValueError: a text without words.
    """

    text: str
    questions: dict[str, Questions]

    def __post_init__(self):
        if not self.words:
            raise ValueError("The text for the haystack has no words.")

    @cached_property
    def words(self) -> list[str]:
        """The text's words with their punctuation, in order."""
        return self.text.split()

    @property
    def digest(self) -> str:
        """SHA-256 of the text, 16 digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    @cached_property
    def keys(self) -> list[str]:
        """Names of needles, `adjective-noun` as in RULER; those that the package's own training never uses."""
        return [key.replace(" ", "-") for key in keys_of("test")]

    @cached_property
    def plain_words(self) -> list[str]:
        """The text's different words of lower-case letters, in alphabetic order."""
        letters = re.compile(rf"[a-z]{{{SHORTEST_WORD},}}")
        return sorted({word for word in self.words if letters.fullmatch(word)})

    @cached_property
    def all_words(self) -> list[str]:
        """The same, and pairs such as `old-garden`."""
        return self.plain_words + [f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS]

    def vocabulary(self, size: int) -> list[str]:
        """At least `size` different words where there are so many, pairs only where those of the text are too few."""
        return self.plain_words if size <= len(self.plain_words) else self.all_words

    def passage(self, begin: int, num_words: int) -> list[str]:
        """So many words from a place on; behind the last comes the first again."""
        begin %= len(self.words)
        repeats = -(-(begin + num_words) // len(self.words))
        return (self.words * repeats)[begin : begin + num_words]


def split_sentences(text: str) -> list[str]:
    """The sentences of a text; what stands between them is left out."""
    return [sentence for sentence in _SENTENCE_END.split(text.strip()) if sentence]
