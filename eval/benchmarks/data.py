"""Rows of a benchmark's set: from the Hub, or from a folder that has the Hub's files.

In a folder a file is looked for under these names, `.parquet`, `.jsonl` and `.json` in turn; the Hub's own
`test-00000-of-00001.parquet` is found too:

    FOLDER/mmlu/all/test.parquet     task, config, split
    FOLDER/mmlu/test.parquet         task, split (not where the config is a part: mmlu_redux, cmmlu, ceval, bbh)
    FOLDER/bbh/object_counting.json  task, config
    FOLDER/bbh_object_counting.json  the same, flat; also gsm8k_test.parquet, humaneval.jsonl
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".parquet", ".jsonl", ".json")


@dataclass(frozen=True)
class Source:
    """A set on the Hub.

    Args:
        task: what its files are called in a folder.
        repo: the data set's id.
        config: None where each part has its own.
        main_split: the split whose name a file may leave out.
        columns: that a row must have.
    """

    task: str
    repo: str
    config: str | None
    main_split: str
    columns: tuple[str, ...]


def open_reader(folder: Path | None) -> Callable[..., list[dict]]:
    """A function `read(source, split, part=None)` that gives rows.

    Raises:
        ValueError: `folder` is none.
    """
    if folder is not None and not folder.is_dir():
        raise ValueError(f"`--data-dir` must be a folder, and there is none at {str(folder)!r}.")
    kept: dict[tuple, list[dict]] = {}

    def read(source: Source, split: str, part: str | None = None) -> list[dict]:
        """Rows of a split, in the set's order.

        Raises:
            ValueError: there are no such rows, or they lack a column.
            OSError: they cannot be read.
        """
        key = (source, split, part)
        if key not in kept:
            rows = fetch_rows(source, split, part) if folder is None else read_folder(folder, source, split, part)
            check_rows(rows, source, split, part)
            kept[key] = rows
        return kept[key]

    return read


def candidates(source: Source, split: str, part: str | None) -> list[str]:
    """Names without a suffix that the rows may have in a folder, the most exact first."""
    task, config = source.task, part or source.config
    names = [f"{task}/{config}/{split}", f"{task}/{config}/{split}-*"]
    if not part:
        names += [f"{task}/{split}", f"{task}/{split}-*", f"{task}_{split}"]
    if split == source.main_split:
        names += [f"{task}/{part}", f"{task}_{part}"] if part else [task]
    else:
        names += [f"{task}/{part}_{split}", f"{task}_{part}_{split}"] if part else []
    return names


def read_folder(folder: Path, source: Source, split: str, part: str | None) -> list[dict]:
    """Rows of the files that a folder has.

    Raises:
        ValueError: it has none, or they cannot be read as what they are called.
    """
    names = candidates(source, split, part)
    for name in names:
        for suffix in SUFFIXES:
            if paths := sorted(path for path in folder.glob(name + suffix) if path.is_file()):
                return [row for path in paths for row in read_file(path)]
    looked_for = ", ".join(name for name in names if "*" not in name)
    what = f"{split!r} of {source.task}" + (f", part {part!r}" if part else "")
    raise ValueError(
        f"`--data-dir` {str(folder)!r} lacks the split {what}: looked for {looked_for} "
        f"({', '.join(SUFFIXES)}); put it there as it is in {source.repo} on the Hub, or leave `--data-dir` out to "
        "download it."
    )


def read_file(path: Path) -> list[dict]:
    """Rows of a parquet, JSON lines or JSON file; a JSON object has them under `examples`.

    Raises:
        ValueError: it does not hold rows.
    """
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{str(path)!r} is no parquet file ({error}).") from error
    try:
        text = path.read_text(encoding="utf-8")
        content = [json.loads(line) for line in text.splitlines() if line.strip()] if path.suffix == ".jsonl" else None
        content = json.loads(text) if content is None else content
    except ValueError as error:  # also what is not UTF-8
        raise ValueError(f"{str(path)!r} is not JSON in UTF-8 ({error}).") from error
    rows = content.get("examples") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{str(path)!r} must hold a list of JSON objects.")
    return rows


def fetch_rows(source: Source, split: str, part: str | None) -> list[dict]:
    """Rows from the Hub.

    Raises:
        ValueError: it cannot be reached, or has no such set.
    """
    import datasets

    datasets.disable_progress_bars()
    config = part or source.config
    try:
        return datasets.load_dataset(source.repo, config, split=split).to_list()
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"The split {split!r} of {source.repo} ({config}) could not be read from the Hub ({reason[:200]}); check "
            "the connection, or give its files with `--data-dir`."
        ) from error


def check_rows(rows: list[dict], source: Source, split: str, part: str | None) -> None:
    """Raises `ValueError` where there are no rows or one lacks a column."""
    where = f"The split {split!r} of {source.task}{f', part {part!r}' if part else ''}"
    if not rows:
        raise ValueError(f"{where} has no rows.")
    for number, row in enumerate(rows, 1):
        missing = [column for column in source.columns if row.get(column) is None]
        if missing:
            raise ValueError(
                f"{where} must have the columns {', '.join(source.columns)}; row {number} lacks {missing[0]}."
            )
