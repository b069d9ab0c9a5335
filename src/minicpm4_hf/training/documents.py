"""Where training text comes from: plain files, JSON lines, parquet or a data set of the Hub, document by document."""

import json
import os
import re
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import HfApi

SPLITS = ("file", "paragraph", "line")
TRAIN_EXTRA = "it comes with `pip install minicpm4-hf[train]`"


def read_documents(
    sources: str | Path | Iterable[str | Path], *, text_field: str = "text", split_documents: str = "file"
) -> Iterator[str]:
    """The texts of `sources`, one a document, in a fixed order; documents of white space alone are left out.

    Args:
        sources: one or several of: a `.txt` file (UTF-8), a `.jsonl` file, a `.parquet` file, a folder (its files of
            these kinds at any depth, by name; others are passed over), or a data set of the Hub as
            `hub:OWNER/NAME?config=...&split=...&revision=...`, of which all after the name may be left out.
        text_field: the field of the text in all but `.txt`.
        split_documents: what a document of a `.txt` file is: `file`, `paragraph` (up to a blank line) or `line`.

    Raises:
        FileNotFoundError: a source, or a file of these kinds in a folder, does not exist.
        ValueError: another suffix, not UTF-8, not JSON, no such field, or a field that is not text.
        ImportError: `.parquet` or the Hub without the package `datasets`.
    """
    resolved = resolve_sources(sources, split_documents)
    return (text for text, _ in read_sources(resolved, text_field, split_documents))


def resolve_sources(sources, split_documents: str) -> list[tuple[str, Path | None]]:
    """Name and path of each file, no path for the Hub; the name is without the folder that the caller gave.

    Raises what `read_documents` does for sources that do not exist or cannot be read.
    """
    if split_documents not in SPLITS:
        raise ValueError(f"`split_documents` must be one of {', '.join(SPLITS)}, got {split_documents!r}.")
    found = []
    for source in [sources] if isinstance(sources, (str, os.PathLike)) else sources:
        if isinstance(source, str) and source.startswith("hub:"):
            parse_hub(source)
            found.append((source, None))
            continue
        path = Path(source)
        if path.is_dir():
            files = sorted(
                (file.relative_to(path).as_posix(), file)
                for file in path.rglob("*")
                if file.suffix in READERS and file.is_file()
            )
            if not files:
                raise FileNotFoundError(f"The folder {str(path)!r} holds no file that ends in {' or '.join(READERS)}.")
            found += files
        elif not path.is_file():
            raise FileNotFoundError(
                f"There is no file or folder {str(path)!r}; a data set of the Hub is written 'hub:OWNER/NAME'."
            )
        elif path.suffix not in READERS:
            raise ValueError(f"{str(path)!r} ends in {path.suffix!r}; what can be read is {', '.join(READERS)}.")
        else:
            found.append((path.name, path))
    if not found:
        raise ValueError("`sources` is empty; give a file, a folder or a data set of the Hub.")
    return found


def read_sources(resolved, text_field: str, split_documents: str) -> Iterator[tuple[str, int]]:
    """Each document, and how many bytes of all the files are read so far (nothing is counted for the Hub)."""
    finished = 0
    for name, path in resolved:
        if path is None:
            rows = ((text, 0) for text in _read_hub(name, text_field))
        else:
            rows = READERS[path.suffix](path, text_field, split_documents)
        for text, place in rows:
            if text.strip():
                yield text, finished + place
        finished += path.stat().st_size if path is not None else 0


def _read_txt(path: Path, text_field: str, split_documents: str) -> Iterator[tuple[str, int]]:
    with path.open("rb") as file:
        if split_documents == "file":
            raw = file.read()
            yield _decode(raw, path, 0), len(raw)
            return
        paragraph, place = [], 0
        for raw in file:
            line = _decode(raw, path, place)
            place += len(raw)
            if split_documents == "line":
                yield line.rstrip("\r\n"), place
            elif line.strip():
                paragraph.append(line)
            elif paragraph:
                yield "".join(paragraph).rstrip("\r\n"), place
                paragraph = []
        if paragraph:
            yield "".join(paragraph).rstrip("\r\n"), place


def _read_jsonl(path: Path, text_field: str, split_documents: str) -> Iterator[tuple[str, int]]:
    # Not by `datasets`: that infers a type for the field, and texts that look like dates come out as dates.
    place = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            line, where = _decode(raw, path, place), f"{str(path)!r}, line {number}"
            place += len(raw)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error}); a .jsonl file holds one object a line.") from error
            text = _text_of(row, text_field, where)
            if "\\u" in line and re.search("[\ud800-\udfff]", text):
                raise ValueError(f"{where}: {text_field!r} holds half of a surrogate pair, which is no character.")
            yield text, place


def _read_parquet(path: Path, text_field: str, split_documents: str) -> Iterator[tuple[str, int]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"Reading .parquet files needs pyarrow; {TRAIN_EXTRA}.") from error
    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{str(path)!r} is not a whole .parquet file ({error}).") from error
    with file:
        names, size, row = file.schema_arrow.names, path.stat().st_size, 0
        if text_field not in names:
            raise ValueError(_missing_field(text_field, str(path), names))
        for batch in file.iter_batches(columns=[text_field]):
            for value in batch.column(0).to_pylist():
                row += 1
                text = _text_of({text_field: value}, text_field, f"{str(path)!r}, row {row}")
                yield text, size * row // file.metadata.num_rows


READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _read_hub(source: str, text_field: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"Reading a data set of the Hub needs datasets; {TRAIN_EXTRA}.") from error
    name, options = parse_hub(source)
    rows = datasets.load_dataset(
        name, options["config"], split=options["split"], revision=options["revision"], streaming=True
    )
    for number, row in enumerate(rows, 1):
        yield _text_of(row, text_field, f"{source!r}, row {number}")


def parse_hub(source: str) -> tuple[str, dict]:
    """`hub:OWNER/NAME?split=test` -> `OWNER/NAME` and `{"config": None, "split": "test", "revision": None}`."""
    name, _, query = source.removeprefix("hub:").partition("?")
    options = {"config": None, "split": "train", "revision": None}
    given = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    unknown = sorted(given.keys() - options)
    if unknown or not name:
        raise ValueError(
            f"{source!r} must be 'hub:OWNER/NAME', then '?' and any of config=, split=, revision= joined by '&'"
            + (f"; {unknown[0]!r} is none of them." if unknown else ".")
        )
    return name, options | given


def pin_revision(source: str) -> str:
    """The same data set at the commit that its revision is now, so that a build can go on over the same rows."""
    name, options = parse_hub(source)
    if not re.fullmatch("[0-9a-f]{40}", options["revision"] or ""):
        options["revision"] = HfApi().dataset_info(name, revision=options["revision"]).sha
    return f"hub:{name}?" + urllib.parse.urlencode({key: value for key, value in options.items() if value})


def _decode(raw: bytes, path: Path, place: int) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} is not UTF-8 text (byte {place + error.start}); convert it to UTF-8 first."
        ) from error
    return text if place else text.removeprefix("\ufeff")


def _text_of(row, text_field: str, where: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be a JSON object with a field {text_field!r}, got {type(row).__name__}.")
    if text_field not in row:
        raise ValueError(_missing_field(text_field, where, row))
    if not isinstance(row[text_field], str):
        raise ValueError(f"{where}: {text_field!r} must be text, got {type(row[text_field]).__name__}.")
    return row[text_field]


def _missing_field(text_field: str, where: str, names) -> str:
    return f"{where}: there is no field {text_field!r}; set `text_field` to one of {', '.join(names) or '(none)'}."
