"""Training steps on text and on generated sequences that need memory: recall, copying, sums, tool calls.

    data = Mixture(PackedDataset(shards, 4096), SyntheticRows(settings, tokenizer, prose, 4096), sequences_per_step=8)
    data[7]   # the same for ever, like a PackedDataset's

A generated sequence is filled with examples of `minicpm4_hf.training.synthetic`, each a segment of its own.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import Dataset

from minicpm4_hf.training.packing import PackedDataset
from minicpm4_hf.training.synthetic import GENERATORS, Prose, make_example

MIN_LENGTH = 96  # tokens in which every task but the chats fits
TOOLS_LENGTH = 600  # below it there may be no room for one chat
TOKENS_PER_FACT = 96  # a fact, its question and its answer take about 50
LABELLED_PROSE = (
    1024  # from this length on the prose around the facts is learned too; below it would drown the answers
)


@dataclass(frozen=True, kw_only=True)
class SyntheticSettings:
    """What share of a stage is generated, and how.

    Args:
        share: of the steps, above 0 and at most 1; the others are text.
        tasks: weight of each task by its name, see `minicpm4_hf.training.synthetic`.
        min_length: of an example; lengths are drawn log-uniformly from it to what is left of the sequence.
        skip_share: of the examples, those whose positions skip (PoSE, arXiv:2309.10400): their pieces stand as far
            apart as in a much longer context, at the price of a short one.
        max_position: that such an example reaches to.
        max_facts: of a `needle` or `lookup` example, the most that are asked for.

    Raises:
        ValueError: a setting out of its range, or an unknown task.
    """

    share: float
    tasks: dict = field(default_factory=lambda: dict.fromkeys(GENERATORS, 1.0))
    min_length: int = 256
    skip_share: float = 0.0
    max_position: int = 0
    max_facts: int = 8

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"`synthetic.share` must be above 0 and at most 1, got {self.share}.")
        if not self.tasks or set(self.tasks) - set(GENERATORS):
            raise ValueError(f"`synthetic.tasks` must be some of {', '.join(GENERATORS)}, got {list(self.tasks)}.")
        weights = list(self.tasks.values())
        if any(isinstance(w, bool) or not isinstance(w, (int, float)) or not 0 <= w < math.inf for w in weights) or (
            not any(weights)
        ):
            raise ValueError(f"The weights in `synthetic.tasks` must be at least 0 and not all 0, got {self.tasks}.")
        if self.min_length < MIN_LENGTH:
            raise ValueError(f"`synthetic.min_length` must be at least {MIN_LENGTH}, got {self.min_length}.")
        if not 0 <= self.skip_share <= 1:
            raise ValueError(f"`synthetic.skip_share` must be from 0 to 1, got {self.skip_share}.")
        if self.skip_share and self.max_position < self.min_length:
            raise ValueError(
                f"`synthetic.max_position` must be at least `min_length` ({self.min_length}) where positions skip, "
                f"got {self.max_position}."
            )
        if self.max_facts < 1:
            raise ValueError(f"`synthetic.max_facts` must be at least 1, got {self.max_facts}.")


def skipping_positions(rng: np.random.Generator, length: int, max_position: int) -> np.ndarray:
    """Ascending positions from 0 for `length` tokens with one to three gaps, the last at most `max_position`.

    Source: positional skip-wise training (PoSE, arXiv:2309.10400), with up to four pieces in place of two.
    """
    reach = int(rng.integers(length, max(max_position, length) + 1))
    cuts = np.sort(rng.choice(np.arange(1, length), int(rng.integers(1, 4)), replace=False))
    gaps = np.diff(np.sort(rng.integers(0, reach - length + 1, len(cuts))), prepend=0)
    steps = np.ones(length, dtype=np.int64)
    steps[0] = 0
    steps[cuts] += gaps
    return steps.cumsum()


class SyntheticRows:
    """Sequences of examples, `row(i)` the same for ever; see `SyntheticSettings`.

    Args:
        tokenizer: of the package's kind.
        prose: for the tasks that hide something in prose.
        length: tokens of a sequence.

    Raises:
        ValueError: `length` too short for the settings.
    """

    def __init__(self, settings: SyntheticSettings, tokenizer, prose: Prose, length: int, *, seed: int = 0):
        self.settings, self.tokenizer, self.prose, self.length, self.seed = settings, tokenizer, prose, length, seed
        only_tools = [name for name, weight in settings.tasks.items() if weight] == ["tools"]
        self._shortest = max(settings.min_length, TOOLS_LENGTH if only_tools else 0)
        if length < self._shortest:
            raise ValueError(
                f"Synthetic sequences of these tasks must have at least {self._shortest} tokens, got `length` "
                f"{length}."
            )

    def row(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids`, `position_ids` and `labels`, each `[length]` int64, as those of `PackedDataset`."""
        rng = np.random.default_rng([self.seed, index])
        columns, room = [], self.length
        while room:
            size = self._draw_length(rng, room)
            columns += self._segments(rng, size)
            room -= size
        names = "input_ids", "labels", "position_ids"
        return {name: torch.from_numpy(np.concatenate(parts)) for name, parts in zip(names, zip(*columns))}

    def _draw_length(self, rng: np.random.Generator, room: int) -> int:
        shortest = self._shortest
        size = round(math.exp(rng.uniform(math.log(shortest), math.log(room)))) if room > shortest else room
        return room if room - size < shortest else size

    def _segments(self, rng: np.random.Generator, size: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Tokens, labels and positions of an example, which may be several problems one after another."""
        settings = self.settings
        fits = {name: w for name, w in settings.tasks.items() if w and (name != "tools" or size >= TOOLS_LENGTH)}
        weights = np.array(list(fits.values()), dtype=np.float64)
        task = list(fits)[int(np.searchsorted(np.cumsum(weights / weights.sum())[:-1], rng.random(), side="right"))]
        options, facts = {}, 1 + int(rng.integers(min(settings.max_facts, max(1, size // TOKENS_PER_FACT))))
        if task == "needle":
            options = {"prose": self.prose, "num_facts": facts}
        elif task == "copy":
            options = {"prose": self.prose}
        elif task == "lookup":
            options = {"num_queries": min(facts, max(1, size // 64))}
        example = make_example(task, self.tokenizer, size, index=int(rng.integers(1 << 62)), seed=self.seed, **options)
        begins = np.flatnonzero(example.input_ids == self.tokenizer.bos_token_id)
        segments = []
        for begin, end in zip(begins, [*begins[1:], size]):
            positions = np.arange(end - begin)
            if len(begins) == 1 and rng.random() < settings.skip_share:
                positions = skipping_positions(rng, size, settings.max_position)
            segments.append((example.input_ids[begin:end], example.labels[begin:end], positions))
        return segments


class Mixture(Dataset):
    """Steps of text and steps of generated sequences, evenly spread: a share of the steps is generated, to within one.

    Of a generated sequence only the answers are labelled, a few tokens in hundreds, and a step's loss is the mean over
    its labelled tokens: mixed with text in one step they would hardly count.

    Args:
        text: the text; its `num_sequences` is the length of the whole.
        synthetic: of the same length a sequence.
        sequences_per_step: how many sequences in a row are of one kind.
    """

    def __init__(self, text: PackedDataset, synthetic: SyntheticRows, sequences_per_step: int):
        self.text, self.synthetic, self.sequences_per_step = text, synthetic, sequences_per_step
        self._share = round(synthetic.settings.share * (1 << 32))

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(f"There is no sequence {index}: the data set holds {len(self)}, counted from 0.")
        step, place = divmod(index, self.sequences_per_step)
        before, after = self._generated(step), self._generated(step + 1)
        if after > before:
            return self.synthetic.row(before * self.sequences_per_step + place)
        return self.text[(step - before) * self.sequences_per_step + place]

    def _generated(self, steps: int) -> int:
        """How many of the first steps are generated."""
        return (steps * self._share + (1 << 31)) >> 32

    def passes(self) -> dict[str, float]:
        """How often the text is read through in the whole run."""
        steps = -(-len(self) // self.sequences_per_step)
        return {name: times * (1 - self._generated(steps) / steps) for name, times in self.text.passes().items()}


__all__ = ["Mixture", "SyntheticRows", "SyntheticSettings", "skipping_positions"]
