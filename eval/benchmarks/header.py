"""The header of a benchmark: fixed fields in its module's docstring."""

import ast
from dataclasses import dataclass
from pathlib import Path

FIELDS = ("name", "source", "licence", "shots", "metric", "paper", "prompts", "chosen")
FOLDER = Path(__file__).resolve().parent / "tasks"


@dataclass(frozen=True)
class Header:
    """What is said of a benchmark: the title, and a text a field."""

    title: str
    fields: dict[str, str]


def parse_header(docstring: str) -> Header:
    """The title, a blank line, then `field: text`; a line that is indented goes on with the field before.

    Raises:
        ValueError: a field is missing, unknown or there twice.
    """
    title, _, body = docstring.partition("\n")
    fields: dict[str, str] = {}
    for line in body.splitlines():
        if not line.strip():
            continue
        if line[0].isspace():
            if not fields:
                raise ValueError(f"A header must begin with `name:`, got {line.strip()!r}.")
            last = next(reversed(fields))
            fields[last] += " " + line.strip()
            continue
        name, _, text = line.partition(":")
        if name not in FIELDS or name in fields:
            raise ValueError(f"A header has each of {', '.join(FIELDS)} once, got {name!r}.")
        fields[name] = text.strip()
    missing = [name for name in FIELDS if not fields.get(name)]
    if missing:
        raise ValueError(f"The header of {title!r} lacks {', '.join(missing)}.")
    return Header(title.strip(), fields)


def read_headers() -> dict[str, Header]:
    """The headers of all benchmarks by name; nothing is imported."""
    headers = {}
    for path in sorted(FOLDER.glob("[a-z]*.py")):
        header = parse_header(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
        headers[header.fields["name"]] = header
    return headers


def format_headers(headers: dict[str, Header]) -> str:
    """For a reader: a paragraph a benchmark."""
    width = max(map(len, FIELDS)) + 1
    return "\n\n".join(
        "\n".join([header.title, *(f"  {name + ':':{width}} {header.fields[name]}" for name in FIELDS)])
        for header in headers.values()
    )
