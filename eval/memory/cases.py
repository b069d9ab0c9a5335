"""A measurement as a list of cases, and the file of their results that a run which was cut off goes on from."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECONDS_BETWEEN_LINES = 10.0  # of the progress on stderr


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    Args:
        key: what sets it apart from the part's other cases, and from those of other settings; ready for JSON.
        work: how long it takes beside the others, in any unit.
    """

    key: dict
    work: float


@dataclass(frozen=True)
class Plan:
    """All that a part of the evaluation will do, checked and ready to run.

    Args:
        run: takes the keys of a batch of cases and gives a result for each, ready for JSON.
        summarize: takes the results of all cases, in order, and gives the figures.
        batch: cases that run together.
    """

    cases: list[Case]
    run: Callable[[list[dict]], list[dict]]
    summarize: Callable[[list[dict]], dict]
    batch: int = 1


class Journal:
    """Results of cases, a JSON line each, added as they are measured.

    The lines of other checkpoints or versions, which have another `owner`, and of other settings, which have other
    keys, are left where they are. A last line that was cut off is dropped.

    Args:
        path: the file, which need not exist; None keeps the results in memory only.
        owner: what the results belong to.

    Raises:
        ValueError: a file that no run has written.
    """

    def __init__(self, path: Path | None, owner: str):
        self.path, self.owner = path, owner
        self.results: dict[tuple[str, str], dict] = {}
        if path is None or not path.exists():
            return
        content = path.read_bytes()
        whole = content.rpartition(b"\n")[0] + b"\n" if b"\n" in content else b""
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                entry = json.loads(line)
                if entry["owner"] == owner:
                    self.results[entry["part"], _spell(entry["case"])] = entry["result"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"Line {number} of {str(path)!r} is no result of this evaluation; name another --output, or move "
                    "the file away."
                ) from error
        if len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))

    def find(self, part: str, key: dict) -> dict | None:
        """The result of a case, or None."""
        return self.results.get((part, _spell(key)))

    def add(self, part: str, keys: list[dict], results: list[dict]) -> None:
        """Keep the results of a batch; they reach the file together."""
        lines = []
        for key, result in zip(keys, results):
            self.results[part, _spell(key)] = result
            lines.append(json.dumps({"owner": self.owner, "part": part, "case": key, "result": result}) + "\n")
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))


def _spell(key: dict) -> str:
    return json.dumps(key, sort_keys=True)


def run_plan(part: str, plan: Plan, journal: Journal) -> dict:
    """Run the cases that the journal lacks; the part's figures, with the `seconds` that all its cases took.

    A batch is run again as a whole if one of its cases is missing, so that its cases always have the same neighbours.
    """
    batches = [plan.cases[i : i + plan.batch] for i in range(0, len(plan.cases), plan.batch)]
    missing = [batch for batch in batches if any(journal.find(part, case.key) is None for case in batch)]
    if len(missing) < len(batches):
        print(f"{part}: {len(batches) - len(missing)} of {len(batches)} measured before", file=sys.stderr)
    total, done, spent = sum(case.work for batch in missing for case in batch), 0.0, 0.0
    said = -SECONDS_BETWEEN_LINES
    for number, batch in enumerate(missing, 1):
        keys, started = [case.key for case in batch], time.perf_counter()
        results = plan.run(keys)
        seconds = time.perf_counter() - started
        journal.add(part, keys, [{**result, "seconds": round(seconds / len(batch), 4)} for result in results])
        done, spent = done + sum(case.work for case in batch), spent + seconds
        if spent - said >= SECONDS_BETWEEN_LINES or number == len(missing):
            said = spent
            left = (total - done) * spent / done
            print(f"{part}: {number} of {len(missing)}, {spent:.0f} s, about {left:.0f} s left", file=sys.stderr)
    results = [journal.find(part, case.key) for case in plan.cases]
    return {**plan.summarize(results), "seconds": round(sum(result["seconds"] for result in results), 2)}
