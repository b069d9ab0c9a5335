"""What is measured, in which order, and what is left out."""

import sys
import time
from dataclasses import dataclass

import torch

from .contestants import CONTESTANTS, choose_chunk, estimate_bytes
from .pool import Pool, WorkerError
from .records import Records

PROBE_TOKENS = 256
GIB = 1024**3
# Relative difference of logits within a family: 16-bit arithmetic through all layers, and float32's.
TOLERANCE_16_BIT, TOLERANCE_32_BIT = 0.05, 1e-3


@dataclass(frozen=True)
class Settings:
    """A run."""

    contestants: tuple[str, ...]
    prompts: tuple[int, ...]
    depths: tuple[int, ...]
    rounds: int
    steps: int  # timed decode steps a round
    preset: str
    dtype: str
    threads: int
    seed: int
    chunk: int | None
    once_above_s: float
    memory_limit: int  # bytes, of the device
    device: str = "cpu"

    @property
    def context_tokens(self) -> int:
        """What llama.cpp must hold: the longest prompt, or what the probe takes, and the decoded tokens."""
        return max(*self.prompts, PROBE_TOKENS, 0) + self.steps + 8


@dataclass(frozen=True)
class Task:
    """One measurement of one contestant."""

    measure: str  # "prompt" or "decode"
    tokens: int
    round: int
    contestant: str

    @property
    def key(self) -> dict:
        return {"contestant": self.contestant, "measure": self.measure, "tokens": self.tokens, "round": self.round}

    def __str__(self) -> str:
        where = f"prompt of {self.tokens}" if self.measure == "prompt" else f"decode at {self.tokens}"
        return f"{self.contestant}, {where}, round {self.round + 1}"


def order_cells(prompts: tuple[int, ...], depths: tuple[int, ...]) -> list[tuple[str, int]]:
    """Prompts from the shortest; then depths within the longest one from the deepest, then the others.

    In this order llama.cpp, which cannot be handed keys and values, has them of the last prompt and only drops some.
    """
    longest = max(prompts, default=0)
    within = sorted({depth for depth in depths if depth <= longest}, reverse=True)
    beyond = sorted({depth for depth in depths if depth > longest})
    return [("prompt", n) for n in sorted(set(prompts))] + [("decode", n) for n in (*within, *beyond)]


class DisagreementError(RuntimeError):
    """A contestant does not run, or gives other logits than it must."""


class Benchmark:
    """One run: the parity check, then every cell round by round, each contestant in turn."""

    def __init__(self, settings: Settings, shapes: dict[str, dict], records: Records):
        self.settings, self.shapes, self.records = settings, shapes, records
        worker_settings = {name: getattr(settings, name) for name in ("preset", "dtype", "threads", "seed", "device")}
        worker_settings["context_tokens"] = settings.context_tokens
        self.pool = Pool(worker_settings, settings.memory_limit)
        self.left_out: dict[tuple[str, str, int], str] = {}
        self.facts: dict[str, dict] = {line["contestant"]: line["facts"] for line in records.find("worker")}
        self.parity: list[dict] = []

    def run(self) -> None:
        """Measure what is not in the records yet.

        Raises:
            DisagreementError: contestants with the same weights give different logits; nothing is measured then.
            ValueError: nothing can be measured, or a contestant is not what the records have it for.
        """
        tasks = self.plan()
        if not tasks:
            raise ValueError(f"Nothing can be measured: {'; '.join(sorted(set(self.left_out.values())))}.")
        try:
            self.check_parity(list(dict.fromkeys(task.contestant for task in tasks)))
            for index, task in enumerate(tasks):
                self.measure(task, index, tasks)
                if all(later.contestant != task.contestant for later in tasks[index + 1 :]):
                    self.pool.end(task.contestant)
        finally:
            self.pool.end_all()

    def plan(self) -> list[Task]:
        """Every task in order, those that cannot run left out with a reason."""
        tasks = []
        for measure, tokens in order_cells(self.settings.prompts, self.settings.depths):
            for name in self.settings.contestants:
                reason = self.find_obstacle(name, measure, tokens)
                if reason:
                    self.left_out[name, measure, tokens] = reason
            for round_index in range(self.settings.rounds):
                for name in self.settings.contestants:
                    if (name, measure, tokens) not in self.left_out:
                        tasks.append(Task(measure, tokens, round_index, name))
        return tasks

    def find_obstacle(self, name: str, measure: str, tokens: int) -> str | None:
        """Why a contestant cannot run a cell; None if it can."""
        longest = max(self.settings.prompts, default=0)
        if CONTESTANTS[name].engine == "llama.cpp" and self.settings.device != "cpu":
            return "runs on the CPU only here"
        if CONTESTANTS[name].engine == "llama.cpp" and measure == "decode" and tokens > longest:
            return f"reaches a depth by evaluating a prompt, and the longest --prompt is {longest}"
        need = self.need_bytes(name, measure, tokens)
        if need > self.settings.memory_limit:
            return (
                f"takes about {need / GIB:.1f} GiB, and --memory-limit is {self.settings.memory_limit / GIB:.1f} GiB"
            )
        return None

    def need_bytes(self, name: str, measure: str, tokens: int) -> int:
        shape, dtype = self.shapes[name], getattr(torch, self.settings.dtype)
        chunk = choose_chunk(CONTESTANTS[name], shape, max(tokens, 1), self.settings.chunk)
        return estimate_bytes(CONTESTANTS[name], shape, dtype, measure, tokens, chunk, self.settings.context_tokens)

    def ask(self, name: str, measure: str, tokens: int, **request) -> dict:
        """One request to a contestant's worker, which is started if it is not there."""
        need = self.need_bytes(name, measure, tokens)
        worker = self.pool.get(name, CONTESTANTS[name].engine, need)
        if self.facts.get(name) != worker.facts:
            if name in self.facts:  # measured before, in a run that is gone on with
                before = self.facts[name]
                field = next(key for key in {**before, **worker.facts} if before.get(key) != worker.facts.get(key))
                raise ValueError(
                    f"{name} was measured with {field} {before.get(field)}, and now it is {worker.facts.get(field)}: "
                    "the figures do not belong together; go back to that, or choose another --output."
                )
            self.facts[name] = worker.facts
            self.records.add("worker", contestant=name, facts=worker.facts)
        try:
            return worker.ask({"measure": measure, "tokens": tokens, **request})
        except WorkerError:
            self.pool.end(name)
            raise

    def measure(self, task: Task, index: int, tasks: list[Task]) -> None:
        """Run a task, unless it is in the records, or its cell failed before or is too slow to repeat."""
        cell = (task.contestant, task.measure, task.tokens)
        if self.records.find("measurement", **task.key) or cell in self.left_out or self.is_slow(task):
            return
        self.report(f"[{index + 1}/{len(tasks)}] {task}; {self.time_left(tasks[index:])}")
        if task.measure == "prompt":
            shape = self.shapes[task.contestant]
            chunk = choose_chunk(CONTESTANTS[task.contestant], shape, task.tokens, self.settings.chunk)
            request = {"chunk": chunk}
        else:
            request = {"steps": self.settings.steps}
        started = time.perf_counter()
        try:
            result = self.ask(task.contestant, task.measure, task.tokens, **request)
        except WorkerError as error:
            self.left_out[cell] = str(error)
            self.records.add("failure", **task.key, reason=str(error))
            self.report(f"  failed: {error}")
            return
        wall_s = time.perf_counter() - started
        self.records.add("measurement", **task.key, **request, **result, wall_s=wall_s)

    def is_slow(self, task: Task) -> bool:
        """Whether an earlier round of the task took too long to repeat it."""
        key = {name: value for name, value in task.key.items() if name != "round"}
        lines = self.records.find("measurement", **key)
        return any(sum(line["seconds"]) > self.settings.once_above_s for line in lines)

    def time_left(self, tasks: list[Task]) -> str:
        """An estimate from the measurements so far."""
        rates: dict[tuple[str, str], float] = {}
        for line in self.records.find("measurement"):
            rates[line["contestant"], line["measure"]] = line["wall_s"] / work(line["measure"], line["tokens"])
        seconds, slow, unknown = 0.0, set(), False
        for task in tasks:
            cell = (task.contestant, task.measure, task.tokens)
            if cell in slow or cell in self.left_out or self.is_slow(task):
                continue
            if self.records.find("measurement", **task.key):
                continue
            others = [rate for (_, measure), rate in rates.items() if measure == task.measure]
            rate = rates.get((task.contestant, task.measure), max(others, default=None))
            if rate is None:
                unknown = True
                continue
            expected = rate * work(task.measure, task.tokens)
            seconds += expected
            if expected > self.settings.once_above_s:
                slow.add(cell)
        if unknown:
            return f"more than {format_seconds(seconds)} left" if seconds else "time left not known yet"
        return f"about {format_seconds(seconds)} left"

    def check_parity(self, contestants: list[str]) -> None:
        """Compare the logits of contestants that have the same weights.

        Raises:
            DisagreementError: they differ, or some are not finite, or one does not run.
        """
        budgets = [
            (sparse["topk"] + sparse["window_size"] // sparse["block_size"]) * sparse["block_size"]
            for sparse in (self.shapes[name].get("sparse_config") for name in contestants)
            if sparse
        ]
        tokens = min([PROBE_TOKENS, *budgets]) - 1  # sparse attention that covers every block is dense attention
        found = {line["contestant"]: line["logits"] for line in self.records.find("probe", tokens=tokens)}
        logits = {name: found.get(name) or self.probe(name, tokens) for name in contestants}
        for name in contestants:
            twin = CONTESTANTS[name].twin if CONTESTANTS[name].twin in logits else name
            exact = self.settings.dtype == "float32" and CONTESTANTS[name].engine == "torch"
            limit = CONTESTANTS[name].tolerance or (TOLERANCE_32_BIT if exact else TOLERANCE_16_BIT)
            values, expected = (torch.tensor(logits[key], dtype=torch.float64) for key in (name, twin))
            error = float((values - expected).norm() / expected.norm())
            if not error <= limit:  # also where it is not a number
                raise DisagreementError(
                    f"{name} differs from {twin}, which has the same weights, by {error:.2e} in the logits (allowed "
                    f"{limit:.0e}); nothing was measured."
                )
            if twin != name:
                self.parity.append({"contestant": name, "against": twin, "error": error, "limit": limit})
        for name in logits.keys() - found.keys():
            self.records.add("probe", contestant=name, tokens=tokens, logits=logits[name])

    def probe(self, name: str, tokens: int) -> list[float]:
        """A contestant's logits.

        Raises:
            DisagreementError: it does not run.
        """
        self.report(f"checking {name}")
        try:
            return self.ask(name, "probe", tokens)["logits"]
        except WorkerError as error:
            raise DisagreementError(f"{name} does not run: {error}") from error

    def report(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def work(measure: str, tokens: int) -> float:
    """A measurement's size, to scale times by: a prompt's attention grows with its square."""
    return tokens * (1 + tokens / 8192) if measure == "prompt" else tokens + 8192


def format_seconds(seconds: float) -> str:
    """`45 s`, `12 min` or `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
