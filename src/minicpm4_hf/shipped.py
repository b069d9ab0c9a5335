"""Where the files lie that the package ships: a small trained checkpoint, and the text its demonstration reads."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def shipped_checkpoint() -> Path:
    """Folder of the shipped checkpoint `minicpm4-books`, ready for `from_pretrained`.

    Raises:
        FileNotFoundError: this installation came without it.
    """
    return _existing(_PACKAGE / "checkpoints" / "minicpm4-books", "config.json")


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


__all__ = ["shipped_checkpoint", "shipped_excerpt"]
