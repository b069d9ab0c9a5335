"""The JSON record: what was measured of which checkpoint, one entry a part."""

import hashlib
import json
import time
from importlib.metadata import version
from pathlib import Path

from minicpm4_cli.info import attention_backend
from minicpm4_hf.kernels.bench.__main__ import describe_machine, write_atomically

from .subject import Subject, Text

BENCHMARK = "memory"
NEEDLE_BENCHMARKS = (BENCHMARK, "ruler")  # whose records can have the part "needle"
PACKAGES = ("minicpm4-hf", "torch", "transformers", "tokenizers", "numpy")


def begin_record(subject: Subject, texts: list[Text]) -> dict:
    """A record without parts."""
    backend, reason = attention_backend(subject.sparse_config, subject.identity["device"])
    return {
        "benchmark": BENCHMARK,
        "model": {"name": subject.name, **subject.identity},
        "versions": {package: version(package) for package in PACKAGES},
        "machine": describe_machine(subject.identity["device"]),
        "backend": f"{backend} ({reason})",
        "texts": {text.name: {"bytes": len(text.content), "sha256": text.sha256} for text in texts},
        "parts": {},
    }


def owner_of(record: dict) -> str:
    """What results belong to, in 16 hexadecimal digits: weights, their dtype and device, sparse settings, versions."""
    model = {key: value for key, value in record["model"].items() if key != "name"}
    return hashlib.sha256(json.dumps([model, record["versions"]], sort_keys=True).encode()).hexdigest()[:16]


def read_record(path: Path, benchmarks: tuple[str, ...] = (BENCHMARK,)) -> dict:
    """A record of this package, or of one of `benchmarks`.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON ({error}).") from error
    if not isinstance(record, dict) or record.get("benchmark") not in benchmarks:
        raise ValueError(f"{str(path)!r} is not a record of `python -m minicpm4_hf.eval.memory`.")
    return record


def resume_record(path: Path | None, record: dict) -> dict:
    """`record` with the parts that the file at `path` has, if there is one.

    Raises:
        ValueError: the file has figures of another checkpoint, of other sparse settings, versions or texts.
    """
    if path is None or not path.exists():
        return record
    found = read_record(path)
    sections = [("model", {**found["model"], "name": record["model"]["name"]}), ("versions", found["versions"])]
    texts = {**record["texts"], **found["texts"]}
    sections.append(("texts", {name: texts[name] for name in record["texts"]}))
    for section, was in sections:
        now = record[section]
        for name in {**was, **now}:
            if was.get(name) != now.get(name):
                raise ValueError(
                    f"{str(path)!r} has figures whose {section}[{name!r}] is {json.dumps(was.get(name))}, not "
                    f"{json.dumps(now.get(name))}; name another --output for these."
                )
    return {**record, "texts": {**found["texts"], **record["texts"]}, "parts": found["parts"]}


def add_part(record: dict, part: str, command: str, settings: dict, texts: list[Text], figures: dict) -> dict:
    """The record with the figures of a part, in place of those that it had."""
    entry = {
        "command": command,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "settings": settings,
        "texts": [text.name for text in texts],
        **figures,
    }
    return {**record, "parts": {**record["parts"], part: entry}}


def write_record(path: Path, record: dict) -> None:
    """Put a record in place of the one before in one step."""
    write_atomically(path, json.dumps(record, allow_nan=False) + "\n")
