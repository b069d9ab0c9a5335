"""What a run has measured, a line of JSON each, written at once: a run that was ended goes on from there."""

import json
import os
import time
from pathlib import Path

from minicpm4_hf.kernels.bench.__main__ import write_atomically


def sidecar_path(output: Path) -> Path:
    """The records beside an output file: `speed.json` has `speed.jsonl`."""
    path = output.with_suffix(".jsonl")
    return path if path != output else output.with_name(output.name + ".jsonl")


class Records:
    """The lines of one run, in memory and, with a path, in a file."""

    def __init__(self, path: Path | None, header: dict, *, resume: bool = False):
        """Begin a file, or go on with one.

        Args:
            header: what must be the same for figures to belong together.

        Raises:
            ValueError: there is a file already and `resume` is not set, or it was made with another header.
        """
        self.path, self.lines = path, []
        if path is None:
            return
        if path.exists():
            self.lines = read_lines(path)
            if not resume and any(line["kind"] != "header" for line in self.lines):
                raise ValueError(
                    f"{str(path)!r} has measurements of an earlier run: add --resume to go on with it, or move it "
                    "away."
                )
            if resume and self.lines:
                check_header(path, self.lines[0], header)
            else:
                self.lines = []
        # Written anew, as a last line that was cut off would spoil the next one.
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in self.lines))
        if not self.lines:
            self.add("header", **header)

    def add(self, kind: str, **fields) -> dict:
        """Keep a line; it is on the disk when this returns."""
        line = {"kind": kind, "at": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **fields}
        self.lines.append(line)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        return line

    def find(self, kind: str, **fields) -> list[dict]:
        """The lines of a kind whose fields have these values."""
        return [
            line
            for line in self.lines
            if line["kind"] == kind and all(line.get(name) == value for name, value in fields.items())
        ]


def read_lines(path: Path) -> list[dict]:
    """The whole lines of a file; a last one that was cut off is left out.

    Raises:
        ValueError: another line is not JSON.
    """
    lines, texts = [], path.read_text(encoding="utf-8").splitlines()
    for i, text in enumerate(texts):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            if i < len(texts) - 1:
                raise ValueError(f"{str(path)!r}: line {i + 1} is not JSON.") from error
    return lines


def check_header(path: Path, found: dict, header: dict) -> None:
    """Refuse to go on with figures that were taken otherwise.

    Raises:
        ValueError: the first field that differs.
    """
    for name, value in json.loads(json.dumps(header)).items():
        if found.get(name) != value:
            raise ValueError(
                f"{str(path)!r} was made with {name} {found.get(name)}, and now it is {value}: the figures do not "
                "belong together; choose another --output."
            )
