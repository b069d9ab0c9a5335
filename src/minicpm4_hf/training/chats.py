"""Chats to fine-tune on: read, checked, rendered by the chat template, and labelled where the assistant writes.

    rows = load_chats(["chats.jsonl"], tokenizer, length=4096)   # a data set with `input_ids` and `labels`

A chat is a JSON object `{"messages": [{"role": "user", "content": "..."}, ...]}`, TRL's conversational format, with
`tools` (a list of schemas; in a table better its JSON) if the template shows them; other fields are passed over.
"""

import array
import hashlib
import itertools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jinja2 import TemplateError

from minicpm4_hf.training.documents import parse_hub, resolve_sources
from minicpm4_hf.training.packing import IGNORED
from minicpm4_hf.training.tokenizer import CHAT_TEMPLATE
from minicpm4_hf.training.trainer import SECONDS_BETWEEN_LINES, say

try:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet
except ModuleNotFoundError as error:
    if error.name not in ("datasets", "pyarrow"):
        raise
    raise ImportError(f"Reading chats needs {error.name}; it comes with `pip install minicpm4-hf[sft]`.") from error

ROLES = ("system", "user", "assistant", "tool")
GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def read_chats(sources: list[str], *, without: list[str] = ()) -> Iterator[tuple[str, dict]]:
    """Each chat of the sources and where it stands, checked.

    Args:
        sources: as in `SFTSettings.data`.
        without: sources whose files are passed over.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: another suffix, not UTF-8, not JSON, or no chat: see the sentence.
    """
    excluded = [path.resolve() if path else name for name, path in _resolve(without)] if without else []
    files = [(n, path) for n, path in _resolve(sources) if (path.resolve() if path else n) not in excluded]
    if not files:
        raise ValueError(f"There is nothing in {_names(sources)} but the held-out chats.")
    for name, path in files:
        for where, row in _read_hub(name) if path is None else _READERS[path.suffix](path):
            yield where, _check_chat(where, row)


def _resolve(sources: list[str]) -> list[tuple[str, Path | None]]:
    """Name and path of each file; a Hub data set has no path."""
    for path in map(Path, sources):
        if path.is_file() and path.suffix not in _READERS:
            raise ValueError(f"{str(path)!r} ends in {path.suffix!r}; chats are read from {' and '.join(_READERS)}.")
    files = [file for file in resolve_sources(sources, "file") if file[1] is None or file[1].suffix in _READERS]
    if not files:
        raise FileNotFoundError(f"There is no {' or '.join(_READERS)} file in {_names(sources)}.")
    return files


def _names(sources: list[str]) -> str:
    return ", ".join(repr(str(source)) for source in sources)


def _read_jsonl(path: Path) -> Iterator[tuple[str, dict]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            where = f"{str(path)!r}, line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8")) if line.strip() else None
            except ValueError as error:  # of the UTF-8 or of the JSON
                raise ValueError(f"{where}: not JSON ({error}); a .jsonl file holds one object a line.") from error
            if line.strip():
                yield where, row


def _read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    try:
        file = pa.parquet.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{str(path)!r} is not a whole .parquet file ({error}).") from error
    with file:
        columns = [name for name in ("messages", "tools") if name in file.schema_arrow.names]
        if "messages" not in columns:
            raise ValueError(_missing_messages(repr(str(path)), file.schema_arrow.names))
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(columns=columns))
        yield from ((f"{str(path)!r}, row {number}", row) for number, row in enumerate(rows, 1))


def _read_hub(source: str) -> Iterator[tuple[str, dict]]:
    name, options = parse_hub(source)
    rows = datasets.load_dataset(
        name, options["config"], split=options["split"], revision=options["revision"], streaming=True
    )
    yield from ((f"{source!r}, row {number}", row) for number, row in enumerate(rows, 1))


_READERS = {".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _missing_messages(where: str, names) -> str:
    return (
        f"{where}: there is no field 'messages' (only {', '.join(map(str, names)) or 'none'}); a chat is "
        '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}.'
    )


def _check_chat(where: str, row) -> dict:
    """`messages` and `tools` of a row, without what a table fills in as None."""
    if not isinstance(row, dict) or "messages" not in row:
        raise ValueError(_missing_messages(where, row if isinstance(row, dict) else ()))
    messages, tools = row["messages"], row.get("tools")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: 'messages' must be a list of at least one message, got {messages!r}.")
    cleaned = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise ValueError(f"{where}: the role of message {number} must be one of {', '.join(ROLES)}, got {role!r}.")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise ValueError(f"{where}: the content of message {number} must be text, got {type(content).__name__}.")
        if re.search("[\ud800-\udfff]", content or ""):
            raise ValueError(f"{where}: message {number} holds half of a surrogate pair, which is no character.")
        cleaned.append({key: value for key, value in message.items() if value is not None})
    if all(message["role"] != "assistant" for message in cleaned):
        raise ValueError(f"{where}: no message is the assistant's, so there is nothing to learn from it.")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: 'tools' is not JSON ({error}).") from error
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"{where}: 'tools' must be a list of schemas, got {type(tools).__name__}.")
    return {"messages": cleaned, "tools": tools or None}


def encode_chat(tokenizer, chat: dict, where: str = "the chat") -> tuple[list[int], list[int]]:
    """Token ids of a chat as its template renders it, and labels: the ids the assistant writes, -100 for the others.

    A template without `{% generation %}` marks is replaced by the package's, which has them, if both render the same
    text.

    Args:
        chat: `messages`, and `tools` or None.
        where: what the sentence of an error begins with.

    Raises:
        ValueError: no template, one that fails on this chat, that has no marks and differs from the package's, that
            leaves out the tools, or that marks nothing.
    """
    messages, tools = chat["messages"], chat.get("tools")
    if tokenizer.chat_template is None:
        raise ValueError(
            "The tokenizer has no chat template; put the chat_template.jinja of a chat checkpoint into its folder."
        )
    template = tokenizer.get_chat_template(None, tools)

    def render(messages=messages, tools=tools, template=template, **options):
        try:
            return tokenizer.apply_chat_template(messages, tools=tools, chat_template=template, **options)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"{where}: the chat template fails on it ({error}).") from error

    text = render(tokenize=False)
    if tools and render(tools=None, tokenize=False) == text:
        raise ValueError(
            f"{where}: the chat template leaves 'tools' out of the text; describe them in the system message instead."
        )
    without_calls = [{key: value for key, value in m.items() if key != "tool_calls"} for m in messages]
    if without_calls != messages and all("content" in m for m in messages):
        if render(without_calls, tokenize=False) == text:
            raise ValueError(
                f"{where}: the chat template leaves 'tool_calls' out of the text; write them into the content instead."
            )
    if not GENERATION_MARK.search(template):
        if render(template=CHAT_TEMPLATE, tokenize=False) != text:
            raise ValueError(
                f"{where}: the tokenizer's chat template has no generation marks, and this package's, which has them, "
                "renders another text; put {% generation %} and {% endgeneration %} around what the assistant writes."
            )
        template = CHAT_TEMPLATE
    encoded = render(template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    turns = sum(message["role"] == "assistant" for message in messages)
    begun = sum(now > before for before, now in itertools.pairwise([0, *mask]))
    if not begun or (template == CHAT_TEMPLATE and begun != turns):
        raise ValueError(f"{where}: only {begun} of the assistant's {turns} messages have tokens of their own.")
    labels = [token if scored else IGNORED for token, scored in zip(ids, mask)]
    labels[0] = IGNORED  # nothing is before it that could predict it
    return ids, labels


def load_chats(sources: list[str], tokenizer, *, length: int, without: list[str] = ()) -> datasets.Dataset:
    """The chats as `input_ids` and `labels`, cut at `length` tokens; what is cut is told on stderr.

    Chats with no token of the assistant in their first `length` are left out.

    Raises:
        ValueError, FileNotFoundError: as `read_chats` and `encode_chat`, or nothing is left.
    """
    ids, labels, ends = array.array("i"), array.array("i"), array.array("q", [0])
    num_chats = num_cut = num_lost = 0
    printed = time.monotonic()
    for where, chat in read_chats(sources, without=without):
        chat_ids, chat_labels = encode_chat(tokenizer, chat, where)
        num_chats += 1
        num_cut += len(chat_ids) > length
        if all(label == IGNORED for label in chat_labels[:length]):
            num_lost += 1
            continue
        ids.extend(chat_ids[:length])
        labels.extend(chat_labels[:length])
        ends.append(len(ids))
        if time.monotonic() - printed > SECONDS_BETWEEN_LINES:
            printed = time.monotonic()
            say(f"{num_chats:,} chats read")
    names = _names(sources)
    if not num_chats:
        raise ValueError(f"There is no chat in {names}.")
    if num_lost == num_chats:
        raise ValueError(f"No chat in {names} has a token of the assistant in its first {length}; raise `length`.")
    if num_cut:
        lost = f", and {num_lost:,} of them left out, the assistant's text lying behind it" if num_lost else ""
        say(f"{num_cut:,} of {num_chats:,} chats in {names} are cut at {length:,} tokens{lost}")
    columns = {
        name: pa.LargeListArray.from_arrays(np.array(ends), np.frombuffer(values, dtype=np.int32))
        for name, values in (("input_ids", ids), ("labels", labels))
    }
    return datasets.Dataset.from_dict(columns)


def read_columns(rows: datasets.Dataset, *names: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each column, piece by piece: the lengths of its lists, and their values one after the other."""
    for table in rows.select_columns(list(names)).with_format("arrow").iter(batch_size=1000):
        for column in table.combine_chunks().itercolumns():
            lists = column.chunk(0)
            yield np.asarray(lists.value_lengths()), np.asarray(lists.flatten())


def digest_of(chats: datasets.Dataset | None) -> str | None:
    """SHA-256 of the tokens and labels, in their order."""
    digest = hashlib.sha256()
    for lengths, values in read_columns(chats, "input_ids", "labels") if chats else ():
        digest.update(lengths.astype("<i8").tobytes() + values.astype("<i4").tobytes())
    return digest.hexdigest() if chats else None


__all__ = ["GENERATION_MARK", "ROLES", "digest_of", "encode_chat", "load_chats", "read_chats", "read_columns"]
