"""The JSON record of a run: what was measured of which checkpoint, by which command and commit."""

import hashlib
import json
import subprocess
import time
from pathlib import Path

from minicpm4_hf.eval.memory.record import begin_record as begin_memory_record
from minicpm4_hf.eval.memory.subject import Subject, Text


def find_commit() -> str | None:
    """The git commit of this package's checkout; None where it is installed from elsewhere."""
    folder = Path(__file__).resolve().parent
    try:
        run = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:  # no git
        return None
    return run.stdout.strip() or None


def begin_record(benchmark: str, subject: Subject, texts: list[Text], command: str, settings: dict) -> dict:
    """A record without figures."""
    record = begin_memory_record(subject, texts)
    del record["parts"]
    head = {
        "benchmark": benchmark,
        "command": command,
        "commit": find_commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    return {**record, **head, "settings": settings}


def owner_of(record: dict) -> str:
    """What results belong to, in 16 hexadecimal digits: the model without its name, versions and commit."""
    model = {key: value for key, value in record["model"].items() if key != "name"}
    belongs = [record["benchmark"], model, record["versions"], record["commit"]]
    return hashlib.sha256(json.dumps(belongs, sort_keys=True).encode()).hexdigest()[:16]


def check_resumable(path: Path | None, record: dict) -> None:
    """Refuse to go on in, or to write over, the record of something else.

    Raises:
        ValueError: the file at `path` is no record of this benchmark, or one of another model, commit or versions.
        OSError: it cannot be read.
    """
    if path is None or not path.exists():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}); name another --output.") from error
    if not isinstance(found, dict) or found.get("benchmark") != record["benchmark"]:
        raise ValueError(f"{str(path)!r} is not a record of `{record['benchmark']}`; name another --output.")
    if found.get("commit") != record["commit"]:
        raise ValueError(
            f"{str(path)!r} was measured at commit {found.get('commit')}, and this is {record['commit']}; check that "
            "one out to go on, or name another --output."
        )
    for section in ("model", "versions"):
        for name in {**found.get(section, {}), **record[section]}:
            was, now = found.get(section, {}).get(name), record[section].get(name)
            if was != now and name != "name":
                raise ValueError(
                    f"{str(path)!r} has figures whose {section}[{name!r}] is {json.dumps(was)}, not "
                    f"{json.dumps(now)}; name another --output for these."
                )
