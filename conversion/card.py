"""The model card beside every output: source, method, settings, sizes, measured error, and the source's own card."""

import re
from pathlib import Path

import yaml

from minicpm4_hf import __version__

from .keys import CARD_FILE
from .output import in_words

_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)^---\r?\n", re.DOTALL | re.MULTILINE)
# What is true of a converted model as it is of its source.
_INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")


def model_card(
    source: str | Path,
    *,
    command: str,
    method: str,
    settings: dict,
    sizes: dict[str, int],
    error: dict[str, str] | str,
    usage: str = "",
    tags: tuple[str, ...] = (),
    relation: str | None = None,
    library: str = "transformers",
) -> str:
    """The text of README.md.

    Args:
        source: folder of the checkpoint that was converted; its card's licence and languages are taken over, and its
            text stands at the end.
        command: name of the conversion.
        method: what was done to the weights, a paragraph.
        settings: name -> value of what was set or detected.
        sizes: what -> bytes, as in "source", "output".
        error: what was measured -> result in words, or one sentence, as in "None: every weight is bit-exact."
        usage: Python or shell lines that load the result, as Markdown.
        tags: further tags for the Hub.
        relation: `base_model_relation` on the Hub: "quantized" or None.
        library: `library_name` on the Hub.
    """
    source = Path(source).resolve()
    metadata, text = _read_card(source)
    front = {key: metadata[key] for key in _INHERITED if key in metadata}
    front |= {"library_name": library, "base_model": metadata.get("base_model", source.name)}
    if relation is not None:
        front["base_model_relation"] = relation
    front["tags"] = ["minicpm4", *tags]
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {source.name}, {command}",
        f"Made from `{source.name}` by `python -m minicpm4_hf.conversion {command}` (minicpm4-hf {__version__}).",
        f"## Method\n\n{method}",
        f"## Settings\n\n{_table(('setting', 'value'), settings)}" if settings else "",
        f"## Sizes\n\n{_table(('what', 'size'), {what: in_words(size) for what, size in sizes.items()})}",
        f"## Measured error\n\n{error if isinstance(error, str) else _table(('what', 'error'), error)}",
        f"## Usage\n\n{usage}" if usage else "",
        f"## Card of the source\n\n{text}" if text else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _read_card(folder: Path) -> tuple[dict, str]:
    """Front matter and text of a folder's card; a front matter that cannot be read counts as text."""
    path = folder / CARD_FILE
    if not path.is_file():
        return {}, ""
    content = path.read_text(encoding="utf-8", errors="replace").strip()
    found = _FRONT_MATTER.match(content + "\n")
    if found is None:
        return {}, content
    try:
        metadata = yaml.safe_load(found[1])
    except yaml.YAMLError:
        return {}, content
    return (metadata if isinstance(metadata, dict) else {}), content[found.end() :].strip()


def _table(head: tuple[str, str], rows: dict) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {str(value).replace('|', ' ')} |" for what, value in rows.items())])
