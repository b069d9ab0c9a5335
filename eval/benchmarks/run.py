"""A whole run: which samples, asked of which model, and the rows of the record."""

import difflib
import hashlib
import random
from collections.abc import Callable
from pathlib import Path

from minicpm4_hf.eval.memory.cases import Journal
from minicpm4_hf.eval.memory.tables import format_table

from .data import open_reader
from .sample import Benchmark, PromptSettings, Sample
from .tasks import TASKS, load_benchmark


def choose_tasks(names: list[str]) -> dict[str, tuple[str, ...] | None]:
    """Benchmarks and their parts, or None for all parts, of names such as `gsm8k` and `bbh/object_counting`.

    Raises:
        ValueError: a name that there is not, with the one that comes close; one that is there twice.
    """
    known = {spell(name): name for name in TASKS}
    chosen: dict[str, list[str] | None] = {}
    for given in names:
        name, _, part = given.partition("/")
        if spell(name) not in known:
            raise ValueError(f"`--tasks` must be of {', '.join(TASKS)}, got {given!r}{suggest(spell(name), known)}")
        name = known[spell(name)]
        parts = load_benchmark(name).parts
        if part and part not in parts:
            allowed = f"one of the {len(parts)} parts of {name}" if parts else f"{name}, which has no parts"
            raise ValueError(f"`--tasks` must be {allowed}, got {given!r}{suggest(part, dict(zip(parts, parts)))}")
        if name in chosen and (not part or chosen[name] is None or part in chosen[name]):
            raise ValueError(f"`--tasks` must name each task once, got {given!r} again.")
        chosen[name] = [*(chosen.get(name) or []), part] if part else None
    return {name: parts and tuple(parts) for name, parts in chosen.items()}


def spell(name: str) -> str:
    """A name without what spellings differ in: MATH-500 is math500."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def suggest(name: str, known: dict[str, str]) -> str:
    """The end of a sentence about a name that there is not."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {known[close[0]]!r}?" if close else "."


def label_task(name: str, parts: tuple[str, ...] | None, limit: int | None) -> str:
    """What a row is called; only a whole benchmark has its plain name, which stands in the paper's tables."""
    label = f"{name}/{'+'.join(parts)}" if parts else name
    return f"{label}, {limit} samples" if limit else label


def draw_samples(samples: list[Sample], limit: int | None, seed: int, name: str) -> list[Sample]:
    """All samples, or so many of them, in the set's order.

    Raises:
        ValueError: there are fewer.
    """
    if limit is None:
        return samples
    if limit > len(samples):
        raise ValueError(f"`--limit` must be at most the {len(samples)} samples of {name}, got {limit}.")
    drawn = random.Random(f"{seed}/{name}").sample(range(len(samples)), limit)
    return [samples[place] for place in sorted(drawn)]


def build_samples(
    chosen: dict[str, tuple[str, ...] | None],
    folder: Path | None,
    *,
    style: str,
    shots: int | None,
    limit: int | None,
    seed: int,
) -> dict[str, tuple[str, Benchmark, list[Sample]]]:
    """The name, the benchmark and the samples to ask, by what its row is called.

    Raises:
        ValueError, OSError: data that is missing or not what it must be.
        ImportError: what scores the answers is missing.
    """
    read, built = open_reader(folder), {}
    for name, parts in chosen.items():
        benchmark = load_benchmark(name)
        if benchmark.check is not None:
            benchmark.check()
        samples = benchmark.build(read, PromptSettings(style, parts, shots))
        if not samples:
            raise ValueError(f"{name} has no samples.")
        built[label_task(name, parts, limit)] = name, benchmark, draw_samples(samples, limit, seed, name)
    return built


def find_runner(benchmarks: list[Benchmark], unsafe: bool) -> Callable[[str], bool] | None:
    """What runs the programs of the benchmarks that have any.

    Raises:
        SandboxError: they cannot be isolated here, and `unsafe` is not set.
    """
    if all(benchmark.program is None for benchmark in benchmarks):
        return None
    from minicpm4_hf.eval.sandbox import find_isolation, run_python

    if not unsafe:
        find_isolation()
    return lambda code: run_python(code, timeout_seconds=10.0, memory_bytes=1 << 30, unsafe=unsafe).passed


def measure(
    model,
    built: dict[str, tuple[str, Benchmark, list[Sample]]],
    journal: Journal,
    *,
    style: str,
    batch: int,
    passes: Callable[[str], bool] | None,
    shots: int | None = None,
) -> list[dict] | None:
    """Ask a model of lm-eval all samples.

    Args:
        model: an `lm_eval.api.model.LM`.
        built: as of `build_samples`.
        style: `chat` or `plain`.
        batch: samples that are asked together.
        passes: runs a program; of `find_runner`.
        shots: what `build_samples` was given.

    Returns:
        The record's rows, in which `asked` is a hash of the samples; None where another process has them.

    Raises:
        ValueError: fewer samples than processes, or a prompt that is longer than the model's context.
    """
    from lm_eval.evaluator import evaluate

    from .engine import BenchmarkTask, Remembering

    for name, (_, _, samples) in built.items():
        if len(samples) < model.world_size:
            raise ValueError(f"{name} has {len(samples)} samples for {model.world_size} processes; start fewer.")
    tasks = {label: BenchmarkTask(label, *entry, passes) for label, entry in built.items()}
    remembering = Remembering(model, journal, tasks, batch)
    found = evaluate(
        remembering,
        {"tasks": tasks},
        bootstrap_iters=0,
        log_samples=False,
        apply_chat_template=style == "chat",
    )
    if found is None:
        return None
    rows = []
    for name, (_, benchmark, samples) in built.items():
        result = found["results"][name]
        error = result["standard_error,none"]
        rows.append(
            {
                "task": name,
                "samples": len(samples),
                "parts": len({sample.subset for sample in samples}),
                "shots": benchmark.num_shots if shots is None else shots,
                "asked": hashlib.sha256(repr(samples).encode("utf-8", "surrogatepass")).hexdigest()[:16],
                "score": 100 * result["score,none"],
                "standard_error": None if error is None else 100 * error,
            }
        )
    return rows


def describe_rows(rows: list[dict]) -> str:
    """A table, a line a benchmark, and the mean."""
    lines = [
        (
            row["task"],
            f"{row['samples']:,}",
            f"{row['score']:.2f}",
            "" if row["standard_error"] is None else f"{row['standard_error']:.2f}",
        )
        for row in rows
    ]
    if len(rows) > 1:
        lines.append(("average", "", f"{sum(row['score'] for row in rows) / len(rows):.2f}", ""))
    return format_table(("task", "samples", "score, %", "standard error"), lines)
