"""The side that lm-eval sees: a benchmark as its task, a checkpoint as its model, and a model that remembers.

`lm_eval.evaluator.evaluate` makes the requests, splits the samples among processes, asks the model, scores and
gathers. `Remembering` stands between it and the model: it hands on batch after batch, the longest prompts first, and
each sample's answers and score go to a file as they come.
"""

import hashlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.task import Task
from lm_eval.config.task import TaskConfig
from lm_eval.models.huggingface import HFLM

from minicpm4_hf.eval.memory.cases import SECONDS_BETWEEN_LINES, Journal
from minicpm4_hf.eval.memory.subject import Subject

from .prompts import render_choices, render_prompt
from .sample import Benchmark, Sample

SURROGATE = re.compile("[\ud800-\udfff]")
THOUGHT_END = "</think>"


class BenchmarkTask(Task):
    """A benchmark as a task of lm-eval.

    Args:
        label: what the record calls it.
        name: the benchmark's, under which results are kept.
        samples: those to ask.
        passes: runs a program and says whether it ran to its end.
    """

    VERSION = 1

    def __init__(
        self,
        label: str,
        name: str,
        benchmark: Benchmark,
        samples: list[Sample],
        passes: Callable[[str], bool] | None,
    ):
        self.name, self.benchmark, self.samples, self.passes = name, benchmark, samples, passes
        self.OUTPUT_TYPE = "multiple_choice" if samples[0].is_choice else "generate_until"
        self.scores: dict[tuple[str, int], float] = {}  # by a sample's part and index
        super().__init__()
        self._config = TaskConfig(task=label, output_type=self.OUTPUT_TYPE)

    def download(self, *args, **kwargs) -> None:
        """Nothing: the samples are there."""

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list[Sample]:
        return self.samples

    def doc_to_text(self, doc: Sample) -> str:
        return doc.question

    def doc_to_target(self, doc: Sample) -> str:
        return doc.reference

    def build_all_requests(self, *, rank: int = 0, world_size: int = 1, chat_template=None, **kwargs) -> None:
        """The requests of this process's samples."""
        docs = self.doc_iterator(rank=rank, world_size=world_size)
        self._instances = [
            request for number, doc in docs for request in self.construct_requests(doc, number, chat_template)
        ]

    def construct_requests(self, doc: Sample, ctx: int, chat_template=None, **kwargs) -> list[Instance]:
        """One a choice, or one for a written answer; `ctx` is the sample's place among those to ask."""
        metadata = (self.config.task, ctx, 1)
        if doc.is_choice:
            pairs = render_choices(doc, chat_template)
            return [Instance("loglikelihood", doc, pair, idx, metadata) for idx, pair in enumerate(pairs)]
        options = {"until": list(self.benchmark.stops), "max_gen_toks": self.benchmark.max_tokens, "do_sample": False}
        if chat_template is not None:
            options["until"] = [stop for stop in self.benchmark.stops if not stop.startswith("\n")]
        return [Instance("generate_until", doc, (render_prompt(doc, chat_template), options), 0, metadata)]

    def score(self, doc: Sample, answers: list) -> float:
        """Of a sample's answers: (log-likelihood, is greedy) of each choice, or one text."""
        if doc.is_choice:
            return float(choose(answers, self.lengths_of(doc)) == doc.gold)
        text = clean_text(answers[0])
        if text is None:
            return 0.0
        text = text.rpartition(THOUGHT_END)[2]
        if self.benchmark.program is None:
            return self.benchmark.score(doc, text)
        return float(self.passes(self.benchmark.program(doc, text)))

    def lengths_of(self, doc: Sample) -> list[int]:
        """What log-likelihoods are divided by."""
        choices = doc.choices or [continuation for _, continuation in doc.pairs]
        return [len(choice.strip().encode()) if self.benchmark.per_byte else 1 for choice in choices]

    def process_results(self, doc: Sample, results: list) -> dict:
        place = (doc.subset, doc.index)
        if place not in self.scores:
            self.scores[place] = self.score(doc, results)
        item = (doc.subset, self.scores[place])
        return {"score": item, "standard_error": item}

    def aggregation(self) -> dict:
        return {"score": mean_over_parts, "standard_error": standard_error}

    def higher_is_better(self) -> dict:
        return {"score": True, "standard_error": False}


def choose(answers: list, lengths: list[int]) -> int:
    """The place of the likeliest choice, the first of equals."""
    values = [answer[0] / length for answer, length in zip(answers, lengths)]
    return max(range(len(values)), key=values.__getitem__)


def clean_text(text: str) -> str | None:
    """A text that is UTF-8, or None."""
    return None if SURROGATE.search(text) else text


def by_part(items: Iterable[tuple[str, float]]) -> list[list[float]]:
    """Scores, a list a part."""
    parts: dict[str, list[float]] = {}
    for part, score in items:
        parts.setdefault(part, []).append(score)
    return list(parts.values())


def mean_over_parts(items: list[tuple[str, float]]) -> float:
    """The mean of the parts' means."""
    parts = by_part(items)
    return math.fsum(math.fsum(scores) / len(scores) for scores in parts) / len(parts)


def standard_error(items: list[tuple[str, float]]) -> float | None:
    """Of the mean of the parts' means; from all scores together where a part has one; None for a single score."""
    parts = by_part(items)
    if min(map(len, parts)) < 2:
        parts = [[score for scores in parts for score in scores]]
    if len(parts[0]) < 2:
        return None
    total = 0.0
    for scores in parts:
        mean = math.fsum(scores) / len(scores)
        variance = math.fsum((score - mean) ** 2 for score in scores) / (len(scores) - 1)
        total += variance / len(scores)
    return math.sqrt(total) / len(parts)


class Checkpoint(HFLM):
    """A loaded checkpoint as a model of lm-eval; one of several where accelerate or torchrun started them.

    A chat's template says which special tokens there are, a plain prompt has the tokenizer's own.
    """

    def __init__(self, subject: Subject, *, batch: int, style: str):
        super().__init__(
            subject.model,
            backend="causal",
            tokenizer=subject.tokenizer,
            batch_size=batch,
            max_length=subject.model.config.max_position_embeddings,
            add_bos_token=False if style == "chat" else None,
        )
        if num_processes() > 1:
            from accelerate import Accelerator

            self.accelerator = Accelerator(cpu=subject.model.device.type == "cpu")
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes

    @property
    def tokenizer_name(self) -> str:
        return ""

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Raises `ValueError` for a prompt without room for the answer, which lm-eval would cut off in front."""
        for request in requests:
            self.check_length(len(self.tok_encode(request.args[0])) + request.args[1]["max_gen_toks"], request)
        return super().generate_until(requests, disable_tqdm=True)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Raises `ValueError` for a prompt that is longer than the context."""
        for request in requests:
            self.check_length(len(self.tok_encode("".join(request.args))) - 1, request)
        return super().loglikelihood(requests, disable_tqdm=True)

    def check_length(self, tokens: int, request: Instance) -> None:
        """Raises `ValueError` for more tokens than the context has."""
        if tokens > self.max_length:
            raise ValueError(
                f"Sample {request.doc.index} of {request.doc.subset} needs {tokens} tokens, and the model's context "
                f"is {self.max_length}; extend it with `--context`, or take fewer `--shots`."
            )


class Remembering(LM):
    """Asks a model what the journal does not know, a batch at a time.

    A batch is asked again as a whole if one of its answers is missing, so that a sample has the same neighbours.

    Args:
        journal: where results are looked for; the process of rank 0 adds to it.
        tasks: by name; their scores are filled in.
        batch: samples that are asked together.
    """

    def __init__(self, model: LM, journal: Journal, tasks: dict[str, BenchmarkTask], batch: int):
        super().__init__()
        self.model, self.journal, self.tasks, self.batch = model, journal, tasks, batch
        self._rank, self._world_size, self._device = model.rank, model.world_size, model.device
        for name in ("all_gather", "gather_object", "barrier", "apply_chat_template"):
            setattr(self, name, getattr(model, name))

    @property
    def tokenizer_name(self) -> str:
        return ""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return self.ask(requests, self.model.loglikelihood)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return self.ask(requests, self.model.generate_until)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError("No benchmark here needs it.")

    def ask(self, requests: list[Instance], run: Callable[[list[Instance]], list]) -> list:
        """The answers, in the order of the requests."""
        groups: dict[str, dict[int, list[Instance]]] = {}
        for request in requests:
            found = groups.setdefault(request.task_name, {}).setdefault(request.doc_id, [])
            if all(other.idx != request.idx for other in found):  # processes with fewer samples repeat some
                found.append(request)
        answers: dict[tuple[str, int], list] = {}
        for name, samples in groups.items():
            for doc_id, found in self.ask_task(self.tasks[name], list(samples.values()), run).items():
                answers[name, doc_id] = found
        return [answers[request.task_name, request.doc_id][request.idx] for request in requests]

    def ask_task(self, task: BenchmarkTask, samples: list[list[Instance]], run) -> dict[int, list]:
        """The answers to each sample of a task, by its `doc_id`."""
        samples = sorted(samples, key=lambda found: -max(len(request.args[0]) for request in found))
        keys = {found[0].doc_id: key_of(found) for found in samples}
        results = {doc_id: self.journal.find(task.name, key) for doc_id, key in keys.items()}
        batches = [samples[i : i + self.batch] for i in range(0, len(samples), self.batch)]
        missing = [found for found in batches if any(results[sample[0].doc_id] is None for sample in found)]
        rounds = self.agree(len(missing))
        clock = Clock(task.config.task, len(batches) - len(missing), len(missing), self.rank == 0)
        for number in range(rounds):
            lines = []
            if number < len(missing):
                started = time.perf_counter()
                found = self.run_batch(task, missing[number], run)
                seconds = round((time.perf_counter() - started) / len(found), 4)
                for doc_id, result in found.items():
                    if results[doc_id] is None:
                        results[doc_id] = {**result, "seconds": seconds}
                        lines.append((keys[doc_id], results[doc_id]))
            gathered = self.gather_object(lines)
            if self.rank == 0:
                lines = [line for others in gathered for line in others]
                self.journal.add(task.name, [key for key, _ in lines], [result for _, result in lines])
            clock.tick(number + 1)
        for found in samples:
            doc = found[0].doc
            task.scores[doc.subset, doc.index] = results[found[0].doc_id]["score"]
        return {doc_id: result["answers"] for doc_id, result in results.items()}

    def run_batch(self, task: BenchmarkTask, samples: list[list[Instance]], run) -> dict[int, dict]:
        """The results of a batch, ready for JSON, by `doc_id`."""
        answers = iter(run([request for found in samples for request in found]))
        results = {}
        for found in samples:
            own = [next(answers) for _ in found]
            doc = found[0].doc
            result = {"score": task.score(doc, own), "reference": doc.fields.get("target", doc.reference)}
            if doc.is_choice:
                own = [[float(value), bool(greedy)] for value, greedy in own]
                result["chosen"] = choose(own, task.lengths_of(doc))
            else:
                if clean_text(own[0]) is None:
                    result["not_utf8"] = True
                own = [SURROGATE.sub("\ufffd", own[0])]
            results[found[0].doc_id] = {**result, "answers": own}
        return results

    def agree(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self.world_size == 1:
            return number
        return int(self.all_gather(torch.tensor([number], device=self.device)).max())


class Clock:
    """Progress of a task on stderr, with the time left."""

    def __init__(self, name: str, num_known: int, num_missing: int, talks: bool):
        self.name, self.num_missing, self.talks = name, num_missing, talks
        self.started, self.said = time.perf_counter(), -SECONDS_BETWEEN_LINES
        if talks and num_known:
            print(f"{name}: {num_known} of {num_known + num_missing} batches measured before", file=sys.stderr)

    def tick(self, done: int) -> None:
        """After so many batches."""
        spent = time.perf_counter() - self.started
        if self.talks and done <= self.num_missing:
            if spent - self.said >= SECONDS_BETWEEN_LINES or done == self.num_missing:
                self.said = spent
                left = (self.num_missing - done) * spent / done
                print(
                    f"{self.name}: {done} of {self.num_missing} batches, {spent:.0f} s, about {left:.0f} s left",
                    file=sys.stderr,
                )


def key_of(requests: list[Instance]) -> dict:
    """What sets a sample's result apart: its place, its part, and a hash of what is asked and what is right."""
    doc = requests[0].doc
    asked = json.dumps(
        [[request.request_type, request.args] for request in requests] + [doc.reference, doc.gold, doc.fields],
        sort_keys=True,
    )
    return {"subset": doc.subset, "index": doc.index, "asked": hashlib.sha256(asked.encode()).hexdigest()[:16]}


def num_processes() -> int:
    """How many run together, by accelerate or torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))
