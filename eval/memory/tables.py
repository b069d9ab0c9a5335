"""Figures as text."""


def format_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Columns as wide as they need to be, the first flush left, the others right."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))])
        for line in lines
    )
