"""The tables and figures of the paper as numbers, from `paper_tables.json`, which says where each comes from."""

import json
from dataclasses import dataclass
from pathlib import Path

PAPER_TABLES = Path(__file__).resolve().parent.parent / "paper_tables.json"

Cell = tuple[str, str, str]  # a table's id, a row, a column


@dataclass(frozen=True)
class PaperTable:
    """One table, or the data of one figure.

    Args:
        id: `table-5`; `label` is what the paper calls it.
        source: the paper, by its arXiv number.
        origin: whether the numbers are printed there or read from a figure.
        decimals: as printed; None where they differ.
        models: of each column the name of the model that it is about, as a record has it, case aside; empty where
            columns are about something else.
        values: a list a row, None where the paper has nothing.
    """

    id: str
    label: str
    title: str
    unit: str
    source: str
    origin: str
    decimals: int | None
    columns: list[str]
    rows: list[str]
    values: list[list[float | None]]
    models: tuple[str, ...] = ()

    def cells(self) -> dict[Cell, float]:
        """The paper's value of each cell that has one."""
        return {
            (self.id, row, column): value
            for row, line in zip(self.rows, self.values)
            for column, value in zip(self.columns, line)
            if value is not None
        }

    def format(self, value: float) -> str:
        """A value as the paper would print it."""
        return f"{value:.5g}" if self.decimals is None else f"{value:,.{self.decimals}f}"


def read_paper(path: Path = PAPER_TABLES) -> list[PaperTable]:
    """All tables, in the paper's order."""
    return [PaperTable(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["tables"]]
