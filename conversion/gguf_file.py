"""A single file that appears complete or not at all, and a GGUF file written into it row by row."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np

from .output import in_words

try:
    import fcntl
except ImportError:  # Windows: two runs with the same OUT are not told from each other
    fcntl = None

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """The name of an empty file beside `path`, which takes its name at the end of the `with` statement.

    After an error nothing is left; what a killed run left is written over by the next one.

    Raises:
        ValueError: `path` exists, its folder does not, or another run is making it.
        OSError: the disk is full, or cannot be written.
    """
    path = path.absolute()
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent}, where {path.name} is to be created, is not a folder.")
    partial = path.with_name(f".{path.name}.partial")
    with _locked(partial, path):
        try:
            if path.exists() or path.is_symlink():
                raise ValueError(f"{path} already exists; name a file that does not.")
            yield partial
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise OSError(
                    f"{path} could not be written ({error.strerror}); free some space and run the same command again."
                ) from error
            raise
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def _locked(partial: Path, path: Path) -> Iterator[None]:
    """`partial`, empty and in this process's hands alone; a process that ends in any way lets go of it."""
    while True:
        with open(partial, "ab") as file:
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"Another run is making {path} at this moment; wait for it to end.") from None
            # The run that held it may have renamed or removed it before we locked it.
            if partial.exists() and os.path.samestat(os.fstat(file.fileno()), os.stat(partial)):
                file.truncate(0)
                yield
                return


def write_text(path: Path, text: str) -> None:
    """Write a text file, over one that is there, so that it is whole at any moment."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def require_space(path: Path, num_bytes: int) -> None:
    """Say it now if the disk cannot hold a file of `num_bytes`.

    Raises:
        OSError: it cannot.
    """
    free = shutil.disk_usage(path.parent).free
    if free < num_bytes:
        raise OSError(
            f"{path} needs {in_words(num_bytes)}, and its disk has {in_words(free)} free; free some space or name an "
            "OUT on another disk."
        )


def write_gguf(writer: gguf.GGUFWriter, path: Path, tensors: Iterable[Iterable[np.ndarray]]) -> None:
    """Write the metadata and tensor infos that `writer` has been given, then the tensors in that order.

    Args:
        writer: a writer that has no file yet.
        path: where to; a file there is written over.
        tensors: for each tensor its bytes, in pieces.

    Raises:
        ValueError: a tensor has another number of bytes than its info says.
    """
    sizes = {name: info.nbytes for name, info in writer.tensors[0].items()}
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "ab") as file:
        _pad(file, writer.data_alignment)
        for (name, size), pieces in zip(sizes.items(), tensors, strict=True):
            begin = file.tell()
            for piece in pieces:
                file.write(memoryview(np.ascontiguousarray(piece)).cast("B"))
            if file.tell() - begin != size:
                raise ValueError(f"{name} came to {file.tell() - begin} bytes, but its info says {size}.")
            _pad(file, writer.data_alignment)


def _pad(file, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))
