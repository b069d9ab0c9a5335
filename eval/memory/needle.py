"""Retrieval of one fact from a long text: accuracy by length, depth and attention.

Ten depths as in the needle test of the MiniCPM4 report (arXiv:2506.07900); every example has its own fact, as in
RULER's single needle (arXiv:2404.06654).

The depths of a sample share the passage that their facts are hidden in, so that an example begins with the tokens of
the one before it, up to that one's fact, and their keys and values are still in the cache. With ten depths 6 of 10
tokens are left to read; of dense attention, whose last tokens cost the most, 7.5 of 10. What comes out is the same but
for rounding: attention is causal, and which blocks a query attends to depends on the keys before it alone. A passage
for each example instead would be little more of a test: of 32K tokens, a novel has a handful that do not overlap.
"""

from collections.abc import Collection

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from minicpm4_hf.training.synthetic import Example, Prose, make_example

from .cases import Case, Plan
from .subject import Subject, Text
from .tables import format_table

CHUNK_TOKENS = 4096  # a pass of a prefill; bounds what lies in memory between the layers


class Haystack:
    """Prose that gives the same passage whoever asks: what all needles of one sample are hidden in."""

    def __init__(self, prose: Prose, seed: list[int]):
        self.prose, self.seed = prose, seed

    def passage(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """As of `Prose`; the caller's generator, which has drawn the fact, does not choose the place."""
        return self.prose.passage(np.random.default_rng(self.seed), length)


class SharedPrefix:
    """Greedy completions of one prompt after another; what a prompt begins with as the last one did is not read again.

    The mode of the model must not change between calls, as a cache belongs to one.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.cache = DynamicCache(config=model.config)
        self.held = torch.zeros(0, dtype=torch.int64)  # the tokens whose keys and values the cache holds
        self.num_read = 0  # tokens that have gone through the model so far

    @torch.no_grad()
    def complete(self, prompt_ids: torch.Tensor, num_tokens: int, ends: Collection[int] = frozenset()) -> list[int]:
        """The `num_tokens` most likely tokens after the prompt `[T]`, one by one, up to the first of `ends`."""
        limit = min(len(self.held), len(prompt_ids) - 1)  # its last token's logits are needed
        differs = (self.held[:limit] != prompt_ids[:limit]).nonzero()
        shared = int(differs[0]) if len(differs) else limit
        if shared < len(self.held):
            self.cache.crop(shared - len(self.held))
        for chunk in prompt_ids[shared:].split(CHUNK_TOKENS):
            logits = self._forward(chunk)
        completion = [int(logits.argmax())]
        while len(completion) < num_tokens and completion[-1] not in ends:
            completion.append(int(self._forward(prompt_ids.new_tensor(completion[-1:])).argmax()))
        self.held = torch.cat((prompt_ids, prompt_ids.new_tensor(completion[:-1])))
        return completion

    def _forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits `[vocab]` after the last of the next tokens `[T]`."""
        self.num_read += len(ids)
        output = self.model(
            input_ids=ids[None].to(self.model.device), past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        return output.logits[0, -1]


def make_needle(tokenizer, prose: Prose, key: dict) -> Example:
    """The example of a case: its fact by `index`, in the haystack of its `length` and `sample`, at its `depth`."""
    haystack = Haystack(prose, [key["seed"], key["length"], key["sample"]])
    return make_example(
        "needle",
        tokenizer,
        key["length"],
        index=key["index"],
        split="test",
        seed=key["seed"],
        prose=haystack,
        depth=key["depth"],
    )


def plan_needle(
    subject: Subject,
    texts: list[Text],
    *,
    lengths: list[int],
    depths: int,
    samples: int,
    modes: list[str],
    seed: int,
) -> Plan:
    """A grid of lengths and depths; the same examples in each mode, and the same facts at each length.

    Args:
        lengths: tokens an example, question and answer included.
        depths: how many, evenly from 0 (before the prose) to 1 (behind it).
        samples: at each length and depth.

    Raises:
        ValueError: a length that the model does not have or that is too small for a fact, or texts without so long a
            passage; a tokenizer that `Prose` refuses.
    """
    limit = subject.model.config.max_position_embeddings
    if max(lengths) > limit:
        raise ValueError(f"`--lengths` must be at most the model's context of {limit} tokens, got {max(lengths)}.")
    prose = Prose([text.content.decode("utf-8") for text in texts], subject.tokenizer)
    keys = [
        {
            "mode": mode,
            "length": length,
            "sample": sample,
            "depth": round(place / max(1, depths - 1), 6),
            "index": sample * depths + place,
            "seed": seed,
            "texts": [text.sha256 for text in texts],
        }
        for length in lengths
        for mode in modes
        for sample in range(samples)
        for place in range(depths)  # in this order for the sake of the shared prefix
    ]
    for length in lengths:
        make_needle(subject.tokenizer, prose, next(key for key in keys if key["length"] == length))
    step = 1 / max(1, depths - 1)
    work = {
        (length, mode, place): subject.estimate_work(int(max(0, place - 1) * step * length), length, mode)
        for length in lengths
        for mode in modes
        for place in range(depths)
    }
    cases = [Case(key, work[key["length"], key["mode"], key["index"] % depths]) for key in keys]
    readers: dict[str, SharedPrefix] = {}

    def run(keys: list[dict]) -> list[dict]:
        (key,) = keys
        example = make_needle(subject.tokenizer, prose, key)
        if key["mode"] not in readers:
            readers.clear()  # one cache at a time
            readers[key["mode"]] = SharedPrefix(subject.model)
        with subject.attending(key["mode"]):
            new = readers[key["mode"]].complete(torch.from_numpy(example.prompt_ids), len(example.completion_ids))
        completion = subject.tokenizer.decode(new)
        return [{"solved": example.is_solved_by(completion), "answer": example.answer, "completion": completion}]

    def summarize(results: list[dict]) -> dict:
        solved: dict[tuple[int, str], dict[float, list[bool]]] = {}
        seconds: dict[tuple[int, str], float] = {}
        for case, result in zip(cases, results):
            cell = case.key["length"], case.key["mode"]
            solved.setdefault(cell, {}).setdefault(case.key["depth"], []).append(result["solved"])
            seconds[cell] = seconds.get(cell, 0.0) + result["seconds"]
        rows = [
            {
                "length": length,
                "mode": mode,
                "depths": list(by_depth),
                "solved_by_depth": [sum(answers) for answers in by_depth.values()],
                "solved": sum(map(sum, by_depth.values())),
                "asked": depths * samples,
                "accuracy": sum(map(sum, by_depth.values())) / (depths * samples),
                "seconds_per_sample": round(seconds[length, mode] / (depths * samples), 4),
            }
            for (length, mode), by_depth in solved.items()
        ]
        return {"samples": samples, "rows": rows}

    return Plan(cases, run, summarize)


def describe_needle(figures: dict) -> str:
    """A table, a line a length and mode; the percentage at each depth, then over all."""
    depths = figures["rows"][0]["depths"]
    return format_table(
        ("length", "attention", *(f"{depth:.0%}" for depth in depths), "all", "s a sample"),
        [
            (
                f"{row['length']:,}",
                row["mode"],
                *(f"{100 * count / figures['samples']:.0f}" for count in row["solved_by_depth"]),
                f"{100 * row['accuracy']:.1f}",
                f"{row['seconds_per_sample']:.2f}",
            )
            for row in figures["rows"]
        ],
    )
