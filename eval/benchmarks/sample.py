"""What a benchmark is made of: samples, and how their answers are scored."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SHOTS = Path(__file__).with_name("shots.jsonl")


@dataclass(frozen=True)
class Sample:
    """One question, ready to be asked.

    The model either writes an answer, or one of `choices` is the most likely, or one of `pairs`.

    Args:
        subset: the part it belongs to; the benchmark's name where there are no parts.
        index: its place in the part.
        reference: the right answer, as text that is scored 1.
        question: the last turn of the user.
        shots: turns before it, the user's and the assistant's.
        prefix: what the answer of a plain prompt begins with.
        choices: answers to choose from.
        pairs: (context, continuation) a choice, where a prompt is plain text in every format.
        gold: the place of the right choice.
        fields: what else the score needs.
    """

    subset: str
    index: int
    reference: str
    question: str = ""
    shots: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    choices: tuple[str, ...] = ()
    pairs: tuple[tuple[str, str], ...] = ()
    gold: int = -1
    fields: dict = field(default_factory=dict)

    @property
    def is_choice(self) -> bool:
        """Whether the most likely choice is the answer."""
        return bool(self.choices or self.pairs)


@dataclass(frozen=True)
class PromptSettings:
    """What a benchmark is asked for.

    Args:
        style: `chat` or `plain`.
        parts: some of its parts, or None for all.
        shots: examples in the prompt, or None for the benchmark's own number.
    """

    style: str
    parts: tuple[str, ...] | None = None
    shots: int | None = None


@dataclass(frozen=True)
class Benchmark:
    """A benchmark; its module's docstring is its header.

    Args:
        build: gives all samples; takes the reader of its data and a `PromptSettings`.
        score: of a written answer, between 0 and 1.
        program: the code that tells whether a written answer is right, by running to its end; instead of `score`.
        parts: whose mean is the benchmark's score; empty where it is the mean over samples.
        num_shots: examples in the prompt.
        max_tokens: of a written answer.
        stops: texts that end a written answer.
        per_byte: whether choices compare by log-likelihood a byte.
        check: raises `ImportError` where what scores the answers is not installed.
    """

    build: Callable[[Callable, PromptSettings], list[Sample]]
    score: Callable[[Sample, str], float] | None = None
    program: Callable[[Sample, str], str] | None = None
    parts: tuple[str, ...] = ()
    num_shots: int = 0
    max_tokens: int = 256
    stops: tuple[str, ...] = ()
    per_byte: bool = False
    check: Callable[[], None] | None = None

    def parts_of(self, settings: PromptSettings) -> tuple[str, ...]:
        """The parts that are asked for, in their order."""
        return self.parts if settings.parts is None else tuple(part for part in self.parts if part in settings.parts)

    def take_shots(self, settings: PromptSettings, examples: Sequence, source: str) -> Sequence:
        """The first of the examples, as many as there must be.

        Raises:
            ValueError: there are fewer.
        """
        wanted = self.num_shots if settings.shots is None else settings.shots
        if len(examples) < wanted:
            raise ValueError(
                f"{source} has {len(examples)} examples for the prompt, and {wanted} are needed; add some, or ask for "
                "fewer with `--shots`."
            )
        return examples[:wanted]


def read_examples(task: str) -> list[dict]:
    """The worked examples of a benchmark whose prompt has the same ones for all; each names its source and licence."""
    rows = [json.loads(line) for line in SHOTS.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if row["task"] == task]
