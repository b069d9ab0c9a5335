"""Write a folder that appears complete or not at all, and take up again what was interrupted.

Beside OUT, `.OUT.partial` holds what a run is making: `result/`, which becomes OUT in one rename, and for conversions
with expensive steps a journal and the tensors of each finished step. The name is fixed, so that the run after one that
was killed finds it: it goes on where the same conversion of the same source stopped, and removes it otherwise.
"""

import errno
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .keys import INDEX_FILE, WEIGHT_FILE
from .source import DTYPES

try:
    import fcntl
except ImportError:  # Windows: two runs with the same OUT are not told from each other
    fcntl = None

MAX_SHARD_BYTES = 5 * 10**9
PROGRESS_SECONDS = 2.0
JOURNAL = "journal.jsonl"
_CHUNK_BYTES = 16 * 2**20
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Name -> (dtype, shape) of every tensor that is going to be written.
Plan = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def plan_bytes(plan: Plan) -> int:
    """Bytes of all planned tensors."""
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in plan.values())


def in_words(num_bytes: float) -> str:
    """`num_bytes` in GB, MB or kB."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes / 1e3:.1f} kB"


class Progress:
    """One line on stderr every two seconds, with the time that is left; nothing for what is done sooner.

    Args:
        total: bytes or steps in all.
        what: what is counted, as in "GB copied" or "layers".
        done: of the total, what an earlier run has done.
        is_bytes: show the numbers in units of 10**9.
    """

    def __init__(self, total: int, what: str, *, done: int = 0, is_bytes: bool = True):
        self.total, self.what, self.done, self.is_bytes = total, what, done, is_bytes
        self.begin = self.last = time.monotonic()
        self.begin_done = done

    def advance(self, amount: int, doing: str) -> None:
        """Count `amount` more; `doing` names what it was."""
        self.done += amount
        now = time.monotonic()
        if now - self.last <= PROGRESS_SECONDS:
            return
        self.last = now
        done, total = (f"{n / 1e9:.2f}" for n in (self.done, self.total)) if self.is_bytes else (self.done, self.total)
        rate = (self.done - self.begin_done) / (now - self.begin)
        left = f", {_duration((self.total - self.done) / rate)} left" if rate > 0 else ""
        print(f"{doing}: {done} of {total} {self.what}{left}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Output:
    """What is to become OUT; made by `open_output`.

    Attributes:
        path: OUT.
        folder: where its files are written meanwhile.
    """

    def __init__(self, path: Path, partial: Path):
        self.path, self.partial, self.folder = path, partial, partial / "result"
        self._journal, self._steps = partial / JOURNAL, partial / "steps"
        self._records: dict[str, dict] = {}

    @property
    def num_steps(self) -> int:
        """Finished steps, those of an interrupted run included."""
        return len(self._records)

    def write_text(self, name: str, text: str) -> None:
        """A text file in UTF-8."""
        with open(self.folder / name, "x", encoding="utf-8") as file:
            file.write(text)

    def write_json(self, name: str, content) -> None:
        """A JSON file as transformers writes its configs."""
        self.write_text(name, json.dumps(content, indent=2, sort_keys=True) + "\n")

    def copy_files(self, source: Path, names: list[str]) -> None:
        """Copy files of a folder byte for byte, a piece at a time.

        Raises:
            OSError: too little space, said before anything is copied.
        """
        total = sum((source / name).stat().st_size for name in names)
        self.require_space(total)
        progress = Progress(total, "GB copied")
        for name in names:
            with open(source / name, "rb") as reader, open(self.folder / name, "xb") as writer:
                while chunk := reader.read(_CHUNK_BYTES):
                    writer.write(chunk)
                    progress.advance(len(chunk), name)

    def require_space(self, num_bytes: int) -> None:
        """Say it now if the disk cannot hold `num_bytes` more.

        Raises:
            OSError: it cannot.
        """
        free = shutil.disk_usage(self.partial).free
        if free < num_bytes:
            raise OSError(
                f"{self.path} needs {in_words(num_bytes)}, and its disk has {in_words(free)} free; free some space or "
                "name an OUT on another disk."
            )

    def shards(self, plan: Plan, max_shard_bytes: int = MAX_SHARD_BYTES) -> "ShardWriter":
        """A writer of the planned tensors; use it in a `with` statement.

        Raises:
            OSError: too little space.
        """
        self.require_space(plan_bytes(plan))
        return ShardWriter(self.folder, plan, max_shard_bytes)

    def load_step(self, name: str) -> tuple[dict[str, torch.Tensor], dict] | None:
        """Tensors and record of a finished step, or None."""
        if name not in self._records:
            return None
        path = self._steps / f"{name}.safetensors"
        return (load_file(path) if path.exists() else {}), self._records[name]

    def save_step(self, name: str, tensors: dict[str, torch.Tensor], record: dict) -> None:
        """Keep the result of an expensive step, so that a run that is killed later does not repeat it.

        Args:
            name: of the step, fit for a file name.
            tensors: what it made; an empty dict for nothing.
            record: what else is to be known of it, fit for JSON.
        """
        if tensors:
            self._steps.mkdir(exist_ok=True)
            path, partial = self._steps / f"{name}.safetensors", self._steps / f".{name}"
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
            _sync(partial)
            os.replace(partial, path)
        with open(self._journal, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": name, "record": record}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._records[name] = record

    def summary(self) -> dict:
        """`output`, the `files` written and their `num_bytes`; for after the `with` statement."""
        files = sorted(self.path.iterdir())
        return {
            "output": str(self.path),
            "files": [path.name for path in files],
            "num_bytes": sum(path.stat().st_size for path in files),
        }

    def _begin(self, key: dict, resumable: bool) -> None:
        """Take over the finished steps of an interrupted run with the same key, and clear away all else."""
        if resumable and self._journal.is_file():
            lines = self._journal.read_text(encoding="utf-8").splitlines(keepends=True)
            whole = [json.loads(line) for line in lines if line.endswith("\n")]
            if whole and whole[0] == key:
                self._records = {entry["step"]: entry["record"] for entry in whole[1:]}
        _remove_within(self.partial, keep=("steps",) if self._records else ())
        self.folder.mkdir()
        if resumable:
            entries = [key, *({"step": name, "record": record} for name, record in self._records.items())]
            partial = self._journal.with_name(".journal")
            partial.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
            os.replace(partial, self._journal)

    def _finish(self) -> None:
        for path in self.folder.iterdir():
            _sync(path)
        _sync(self.folder)
        os.rename(self.folder, self.path)
        _sync(self.partial.parent)


@contextmanager
def open_output(
    path: str | Path, *, command: str, settings: dict | None = None, source=None, resumable: bool = False
) -> Iterator[Output]:
    """Make a new folder: write into the `Output` that this gives, and at the end of the `with` statement it is there.

    After an error nothing is left. A resumable conversion with finished steps keeps them, in a hidden folder, after
    anything but a `ValueError`: the same command goes on from there.

    Args:
        path: OUT; must not exist.
        command: name of the conversion.
        settings: what its result depends on beside the source, fit for JSON.
        source: the `Checkpoint` that is converted.
        resumable: whether the conversion saves steps.

    Raises:
        ValueError: `path` exists, its parent does not, or another run is making it.
        OSError: the disk is full, or cannot be written.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path.absolute().parent}, where {path.name} is to be created, is not a folder.")
    partial = path.absolute().with_name(f".{path.name}.partial")
    exists = path.exists() or path.is_symlink()
    if exists and not partial.exists():
        raise ValueError(f"{path} already exists; name a folder that does not.")
    key = {
        "command": command,
        "settings": settings or {},
        "source": None if source is None else source.fingerprint(),
        "format": 1,
    }
    with _locked_folder(partial, path):
        if exists:  # finished by a run that was killed before it had cleaned up
            _discard(partial)
            raise ValueError(f"{path} already exists; name a folder that does not.")
        out = Output(path, partial)
        keep = False
        try:
            out._begin(key, resumable)
            yield out
            out._finish()
        except ValueError:
            raise
        except (OSError, SafetensorError) as error:
            keep = out.num_steps > 0
            number = _error_number(error)
            if number in _NO_SPACE:
                raise OSError(
                    f"{path} could not be written ({os.strerror(number)}); free some space and run the same command "
                    "again."
                ) from error
            if number is not None and isinstance(error, SafetensorError):
                raise OSError(number, os.strerror(number), str(path)) from error
            raise
        except BaseException:
            keep = out.num_steps > 0
            raise
        finally:
            if not keep:
                _discard(partial)


def _discard(partial: Path) -> None:
    """Remove what a run has made, its journal first: a kill in between must not leave one that names removed steps."""
    with suppress(OSError):
        (partial / JOURNAL).unlink()
    shutil.rmtree(partial, ignore_errors=True)


def _error_number(error: OSError | SafetensorError) -> int | None:
    """`errno`; `save_file` has it in its words only."""
    if isinstance(error, OSError):
        return error.errno
    found = _OS_ERROR.search(str(error))
    return int(found[1]) if found else None


@contextmanager
def _locked_folder(folder: Path, path: Path) -> Iterator[None]:
    """`folder`, made if need be, in this process's hands alone; a process that ends in any way lets go of it."""
    while True:
        folder.mkdir(exist_ok=True)
        if fcntl is None:
            yield
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"Another run is making {path} at this moment; wait for it to end.") from None
            if _is_at(descriptor, folder):
                yield
                return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, folder: Path) -> bool:
    """Whether the open folder still lies there; the run that held it may have removed it before we locked it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except FileNotFoundError:
        return False


def _remove_within(folder: Path, keep: tuple[str, ...]) -> None:
    for path in folder.iterdir():
        if path.name in keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(path: Path) -> None:
    """Have a file or folder reach the disk."""
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ShardWriter:
    """Writes planned tensors to safetensors shards one by one, in any order, holding none of them.

    One shard is `model.safetensors`; several are numbered and get an index, as transformers writes them.

    Args:
        folder: where to.
        plan: name -> (dtype, shape), in the order in which they are dealt out to shards.
        max_shard_bytes: of a shard; a larger tensor has one to itself.
    """

    def __init__(self, folder: Path, plan: Plan, max_shard_bytes: int = MAX_SHARD_BYTES):
        self.folder, self.plan = folder, plan
        self._places: dict[str, tuple[Path, int]] = {}  # name -> file, offset in it
        self._left = set(plan)
        self._progress = Progress(plan_bytes(plan), "GB written")
        parts = _deal_out(plan, max_shard_bytes)
        self.shards = [
            WEIGHT_FILE if len(parts) == 1 else f"model-{i:05}-of-{len(parts):05}.safetensors"
            for i in range(1, len(parts) + 1)
        ]
        for shard, names in zip(self.shards, parts, strict=True):
            self._write_header(folder / shard, names)

    def _write_header(self, path: Path, names: list[str]) -> None:
        # Wide dtypes first: every tensor then begins at a multiple of its own size, which readers of views need.
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in sorted(names, key=lambda name: -self.plan[name][0].itemsize):
            dtype, shape = self.plan[name]
            begin, end = end, end + dtype.itemsize * torch.Size(shape).numel()
            header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            self._places[name] = path, 8 + len(text) + header[name]["data_offsets"][0]

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, which must be as planned.

        Raises:
            ValueError: it is not planned, written already, or of another dtype or shape.
        """
        if name not in self._left:
            raise ValueError(f"{name} is {'written already' if name in self.plan else 'not planned'}.")
        if (tensor.dtype, tuple(tensor.shape)) != (self.plan[name][0], tuple(self.plan[name][1])):
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, but planned as {self.plan[name]}.")
        self._left.remove(name)
        path, offset = self._places[name]
        octets = memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        with open(path, "r+b") as file:
            file.seek(offset)
            for begin in range(0, len(octets), _CHUNK_BYTES):
                self._progress.advance(file.write(octets[begin : begin + _CHUNK_BYTES]), name)

    def close(self) -> None:
        """Write the index, where there are several shards.

        Raises:
            ValueError: a planned tensor was not written.
        """
        if self._left:
            raise ValueError(f"{len(self._left)} planned tensors were not written, {min(self._left)} first.")
        if len(self.shards) > 1:
            weight_map = {name: self._places[name][0].name for name in self.plan}
            index = {"metadata": {"total_size": plan_bytes(self.plan)}, "weight_map": weight_map}
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, *rest) -> None:
        if kind is None:
            self.close()


def _deal_out(plan: Plan, max_shard_bytes: int) -> list[list[str]]:
    parts, room = [[]], max_shard_bytes
    for name, entry in plan.items():
        size = plan_bytes({name: entry})
        if size > room and parts[-1]:
            parts.append([])
            room = max_shard_bytes
        parts[-1].append(name)
        room -= size
    return parts
