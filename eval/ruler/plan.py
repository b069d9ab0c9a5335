"""All samples of a run as cases: generated when their turn comes, completed greedily, scored."""

from minicpm4_hf.eval.memory.cases import Case, Plan
from minicpm4_hf.eval.memory.needle import SharedPrefix
from minicpm4_hf.eval.memory.subject import Subject
from minicpm4_hf.eval.memory.tables import format_table

from .fitting import Generator, depth_of
from .tasks import TASKS


def end_tokens(model) -> set[int]:
    """Ids after which a model says no more."""
    ends = model.generation_config.eos_token_id
    return set([ends] if isinstance(ends, int) else ends or [])


def plan_ruler(
    subject: Subject,
    generator: Generator,
    *,
    lengths: list[int],
    tasks: list[str],
    samples: int,
    modes: list[str],
) -> Plan:
    """The same samples in each mode; every task's first sample is made now, so that what is wrong shows at once.

    Args:
        lengths: tokens a sample, the room for the answer included.
        samples: of each task at each length.

    Raises:
        ValueError: a length beyond the model's context, or what the generator refuses.
    """
    limit = subject.model.config.max_position_embeddings
    if max(lengths) > limit:
        raise ValueError(
            f"`--lengths` must be at most the model's context of {limit} tokens, got {max(lengths)}; extend it with "
            "`--context`."
        )
    for length in lengths:
        for task in tasks:
            for index in {0, samples - 1}:
                generator.make(task, length, index)
    shared = {"seed": generator.seed, "format": generator.style, "source": describe_source(generator)}
    if generator.depths:
        shared["depths"] = generator.depths
    cases = [
        Case(
            {"task": task, "length": length, "mode": mode, "index": index, **shared},
            subject.estimate_work(0, length, mode),
        )
        for length in lengths
        for mode in modes
        for task in tasks
        for index in range(samples)
    ]
    ends, readers = end_tokens(subject.model), {}

    def run(keys: list[dict]) -> list[dict]:
        (key,) = keys
        sample, ids = generator.make(key["task"], key["length"], key["index"])
        if key["mode"] not in readers:
            readers.clear()  # one cache at a time
            readers[key["mode"]] = SharedPrefix(subject.model)
        task = TASKS[key["task"]]
        with subject.attending(key["mode"]):
            new = readers[key["mode"]].complete(ids, task.answer_tokens, ends)
        answer = subject.tokenizer.decode(new, skip_special_tokens=True)
        score = task.score(answer, sample.outputs)
        return [{"score": score, "outputs": list(sample.outputs), "answer": answer, "prompt_tokens": len(ids)}]

    def summarize(results: list[dict]) -> dict:
        scores: dict[tuple[int, str, str], list[float]] = {}
        for case, result in zip(cases, results):
            scores.setdefault((case.key["length"], case.key["mode"], case.key["task"]), []).append(result["score"])
        rows = [
            {
                "length": length,
                "mode": mode,
                "task": task,
                "samples": len(found),
                "score": 100 * sum(found) / len(found),
            }
            for (length, mode, task), found in scores.items()
        ]
        averages = []
        for length in lengths:
            for mode in modes:
                found = [row["score"] for row in rows if (row["length"], row["mode"]) == (length, mode)]
                averages.append(
                    {"length": length, "mode": mode, "tasks": len(found), "score": sum(found) / len(found)}
                )
        grid = {"parts": {"needle": tabulate_depths(scores, generator.depths, samples)}} if generator.depths else {}
        return {"rows": rows, "averages": averages, **grid}

    return Plan(cases, run, summarize)


def tabulate_depths(scores: dict[tuple[int, str, str], list[float]], depths: int, samples: int) -> dict:
    """The grid of one task by length, mode and depth, as `minicpm4_hf.eval.memory` writes it."""
    return {
        "samples": samples // depths,
        "rows": [
            {
                "length": length,
                "mode": mode,
                "depths": [round(depth_of(place, depths), 6) for place in range(depths)],
                "solved_by_depth": [int(sum(found[place::depths])) for place in range(depths)],
            }
            for (length, mode, _), found in scores.items()
        ],
    }


def describe_source(generator: Generator) -> dict:
    """What samples depend on besides task, length, index and seed: hashes of the text and of the questions' files."""
    return {
        "text": generator.source.digest,
        **{task: found.digest for task, found in generator.source.questions.items()},
    }


def describe_ruler(figures: dict) -> str:
    """A table, a line a task, a column a length and mode."""
    columns = [(row["length"], row["mode"]) for row in figures["averages"]]
    scores = {(row["length"], row["mode"], row["task"]): row["score"] for row in figures["rows"]}
    lines = [
        (task, *(f"{scores[length, mode, task]:.1f}" for length, mode in columns))
        for task in dict.fromkeys(row["task"] for row in figures["rows"])
    ]
    lines.append(("average", *(f"{row['score']:.1f}" for row in figures["averages"])))
    return format_table(("task", *(f"{length:,} {mode}" for length, mode in columns)), lines)
