"""Where the files lie that the package ships: small trained checkpoints, and the text its demonstration reads."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
# The first is what commands take where no model is named; the second is made from it, with ternary weights.
SHIPPED = ("minicpm4-books", "minicpm4-books-ternary")


def shipped_checkpoint(name: str = SHIPPED[0]) -> Path:
    """Folder of a shipped checkpoint, ready for `from_pretrained`.

    Args:
        name: one of `SHIPPED`.

    Raises:
        ValueError: another name.
        FileNotFoundError: this installation came without it.
    """
    if name not in SHIPPED:
        raise ValueError(f"The package ships {' and '.join(SHIPPED)}, not {name!r}.")
    return _existing(_PACKAGE / "checkpoints" / name, "config.json")


def shipped_excerpt() -> Path:
    """The text file that `minicpm4 demo` reads; `README.md` beside it names the source.

    Raises:
        FileNotFoundError: this installation came without it.
    """
    return _existing(_PACKAGE / "assets" / "dracula-excerpt.txt")


def _existing(path: Path, inside: str = "") -> Path:
    if not (path / inside).is_file():
        raise FileNotFoundError(
            f"The shipped {path.name!r} is missing from this installation of minicpm4-hf; reinstall the package, or "
            "name a model of your own."
        )
    return path


__all__ = ["SHIPPED", "shipped_checkpoint", "shipped_excerpt"]
