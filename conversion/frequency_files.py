"""FR-Spec's frequency files: the V tokens that a draft scores, most frequent first.

    freq_V.safetensors   `token_ids` int32 [V], and `counts` int64 [V] where they are known
    freq_V.pt            the same ids as a list of ints, which CPM.cu and FR-Spec read

Source of the second: CPM.cu `cpmcu/common/utils.py::setup_frspec_vocab`.
"""

import io
import pickle
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .output import in_words

SUFFIXES = (".safetensors", ".pt")
_MAX_PT_BYTES = 2**26
_FILE_NAME = re.compile(r"freq_(\d{1,9})(\.safetensors|\.pt)")


def choose_ids(counts: torch.Tensor, size: int, forced: Iterable[int] = ()) -> torch.Tensor:
    """`forced` and the most frequent other ids, int32 `[size]`: most frequent first, of equals the lower id first.

    Args:
        counts: of each id, int64 `[V]`.
        size: how many ids.
        forced: ids that are held in any case.

    Raises:
        ValueError: more ids than there are tokens, or more forced ones than places.
    """
    forced = torch.tensor(sorted(set(forced)), dtype=torch.int64)
    if not max(1, len(forced)) <= size <= len(counts):
        raise ValueError(f"`size` must lie between {max(1, len(forced))} and {len(counts)}, got {size}.")
    order = torch.argsort(counts, descending=True, stable=True)
    is_forced = torch.isin(order, forced)
    return order[is_forced | ((~is_forced).cumsum(0) <= size - len(forced))].to(torch.int32)


def save_frequencies(
    folder: Path, ids: torch.Tensor, counts: torch.Tensor | None = None, suffixes: Iterable[str] = SUFFIXES
) -> None:
    """Write the files of `ids` into a folder that is being made.

    Args:
        folder: where to.
        ids: integer `[V]`.
        counts: of every id of the vocabulary, int64; the file is without counts if None.
        suffixes: which of the two files.
    """
    ids = ids.to(torch.int32)
    contents = {}  # made in memory: a full disk is then an OSError for both formats
    if ".safetensors" in suffixes:
        tensors = {"token_ids": ids} if counts is None else {"token_ids": ids, "counts": counts[ids.long()]}
        contents[".safetensors"] = save(tensors)
    if ".pt" in suffixes:
        buffer = io.BytesIO()
        torch.save(ids.tolist(), buffer)
        contents[".pt"] = buffer.getvalue()
    for suffix, content in contents.items():
        (folder / f"freq_{len(ids)}{suffix}").write_bytes(content)


def list_frequency_files(folder: str | Path) -> dict[int, list[Path]]:
    """V -> the files of that size in a folder, one or two."""
    found: dict[int, list[Path]] = {}
    for path in sorted(Path(folder).iterdir()):
        name = _FILE_NAME.fullmatch(path.name)
        if name is not None and path.is_file():
            found.setdefault(int(name[1]), []).append(path)
    return dict(sorted(found.items()))


def read_frequencies(path: str | Path) -> torch.Tensor:
    """The ids of a frequency file, int32 `[V]`; a `.pt` file is read without running what it may hold.

    Raises:
        ValueError: a file that is damaged, holds anything but different ids, or not as many as its name says.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no frequency file {path}.")
    content = _read_pt(path) if path.suffix == ".pt" else _read_safetensors(path)
    if isinstance(content, list) and all(type(id_) is int and 0 <= id_ < 2**31 for id_ in content):
        content = torch.tensor(content, dtype=torch.int32)
    if not isinstance(content, torch.Tensor) or content.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{path} must hold token ids, whole numbers from 0; make it again with `freq`.")
    content = content.long()  # 2**31 does not fit the type of the ids
    if content.ndim != 1 or not len(content) or content.min() < 0 or content.max() >= 2**31:
        raise ValueError(f"{path} must hold one row of token ids, whole numbers from 0; make it again with `freq`.")
    if len(content.unique()) != len(content):
        raise ValueError(f"{path} holds a token id twice; make it again with `freq`.")
    name = _FILE_NAME.fullmatch(path.name)
    if name is not None and int(name[1]) != len(content):
        raise ValueError(
            f"{path} holds {len(content)} token ids, but its name says {name[1]}; make it again with `freq`."
        )
    return content.to(torch.int32)


def check_ids(ids: torch.Tensor, vocab_size: int, what: str) -> None:
    """Refuse ids that are not different tokens of a vocabulary; `what` names them in the sentence.

    Raises:
        ValueError: an id out of range, or one that is there twice.
    """
    if ids.min() < 0 or ids.max() >= vocab_size or len(ids.unique()) != len(ids):
        raise ValueError(f"{what} must name different tokens of the vocabulary, 0 to {vocab_size - 1}.")


def _read_safetensors(path: Path) -> torch.Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            if "token_ids" not in file.keys():
                raise ValueError(f"{path} has no `token_ids`, so it is no frequency file; make it again with `freq`.")
            return file.get_tensor("token_ids")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut off ({error}); make it again with `freq`.") from error


def _read_pt(path: Path):
    if path.stat().st_size > _MAX_PT_BYTES:
        raise ValueError(f"{path} is {in_words(path.stat().st_size)}, too large for a list of token ids.")
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than a list of token ids, or is damaged, and was not loaded: it could run code."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is no whole .pt file; make it again with `freq`.") from error
