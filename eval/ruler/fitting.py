"""The size of a sample that fills a length, and a sample as the tokens that a model goes on from."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase

from .source import Sample, Source
from .tasks import TASKS

FORMATS = ("auto", "chat", "plain")


def choose_format(asked: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """`chat` or `plain`; `auto` is a chat where the tokenizer has a template.

    Raises:
        ValueError: a chat is asked for and there is no template.
    """
    if asked == "chat" and not tokenizer.chat_template:
        raise ValueError(
            "`--format chat` needs a chat template, and the tokenizer of this checkpoint has none; use `--format "
            "plain`, or put chat_template.jinja beside the tokenizer."
        )
    return asked if asked != "auto" else "chat" if tokenizer.chat_template else "plain"


def encode_sample(tokenizer: PreTrainedTokenizerBase, sample: Sample, style: str) -> torch.Tensor:
    """The prompt up to and with the answer's beginning, `[T]` int64.

    In a chat the answer's beginning stands behind the head of the assistant's turn, as in RULER; the template says
    which special tokens there are. A plain prompt has the tokenizer's own.
    """
    if style == "plain":
        ids = tokenizer(sample.prompt + sample.answer_prefix, verbose=False).input_ids
    else:
        chat = [{"role": "user", "content": sample.prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text + sample.answer_prefix, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids)


def largest_fit(cost: Callable[[int], int], smallest: int, limit: int, largest: float = math.inf) -> int:
    """The largest size from `smallest` to `largest` whose cost is at most `limit`; `smallest` where none is.

    The cost must grow with the size.
    """
    if cost(smallest) > limit:
        return smallest
    below, above = smallest, 2 * smallest
    while above <= largest and cost(above) <= limit:
        below, above = above, 2 * above
    above = min(above, largest + 1)
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if cost(middle) <= limit else (below, middle)
    return below


def depth_of(index: int, depths: int) -> float:
    """The depth of a sample in a grid, from 0 to 1."""
    return index % depths / max(1, depths - 1)


@dataclass
class Generator:
    """Makes samples of a length; the same for the same arguments, whatever was made before.

    Args:
        style: `chat` or `plain`.
        depths: of a needle grid: sample i has its needle at the depth `i % depths` of so many; None for anywhere.
    """

    source: Source
    tokenizer: PreTrainedTokenizerBase
    style: str
    seed: int
    depths: int | None = None
    sizes: dict[tuple[str, int], int] = field(default_factory=dict)

    def make(self, task: str, length: int, index: int) -> tuple[Sample, torch.Tensor]:
        """The sample of an index with its prompt `[T]`; prompt and answer take at most `length` tokens.

        The size is found once for a task and length, by sample 0; a sample that is over gets a smaller one.

        Raises:
            ValueError: a length that the smallest sample does not fit in, or what the task raises.
        """
        known = {"task": task, "length": length, "seed": self.seed}
        if self.depths:
            known["depth"] = depth_of(index, self.depths)
        limit = length - TASKS[task].answer_tokens

        def build(size: int, index: int) -> tuple[Sample, torch.Tensor]:
            sample = TASKS[task].sample(self.source, size, index=index, **known)
            return sample, encode_sample(self.tokenizer, sample, self.style)

        smallest = TASKS[task].smallest
        if (task, length) not in self.sizes:
            find = TASKS[task].largest
            largest = find(self.source) if find else math.inf
            self.sizes[task, length] = largest_fit(lambda size: len(build(size, 0)[1]), smallest, limit, largest)
            if self.sizes[task, length] == largest:
                raise ValueError(
                    f"`{task}` at {length} tokens needs more than the {largest} different words that there are; give "
                    "a longer `--text`."
                )
        size = self.sizes[task, length]
        sample, ids = build(size, index)
        while len(ids) > limit:
            if size == smallest:
                raise ValueError(
                    f"`--lengths` {length} is too short for `{task}`: its smallest sample takes "
                    f"{len(ids) + TASKS[task].answer_tokens} tokens of this tokenizer, the answer's "
                    f"{TASKS[task].answer_tokens} included."
                )
            size = max(smallest, min(size - 1, size * limit // len(ids)))
            sample, ids = build(size, index)
        return sample, ids
