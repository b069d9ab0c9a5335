"""Starts a run, reads what the program prints with a cap, and never waits longer than the program may take."""

import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from .isolation import UNSAFE, SandboxError, describe_job, find_isolation, spell_command

GRACE_SECONDS = 10.0  # to start and to clean up, beside the program's own time
REASONS = ("ok", "error", "exit", "timeout", "memory", "processes", "output", "killed")


@dataclass(frozen=True)
class SandboxResult:
    """What came of a program.

    `reason` is one of REASONS: "ok" where it ran past its last line, "error" for an exception, "exit" where it left
    before (`sys.exit`, `os._exit`, whatever the code), "timeout", "memory", "processes" and "output" for a limit, and
    "killed" for a signal.
    """

    reason: str
    exit_code: int | None  # negative: the signal; None where it was not seen
    stdout: str  # the end of it
    stderr: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether the program ran to its end."""
        return self.reason == "ok"


class Tail:
    """The end of a stream."""

    def __init__(self, limit: int):
        self.limit, self.total, self.kept = limit, 0, bytearray()

    def add(self, data: bytes) -> None:
        """Take more of the stream, forget what is too far back."""
        self.total += len(data)
        self.kept += data
        if len(self.kept) > 2 * self.limit:
            del self.kept[: -self.limit]

    def text(self) -> str:
        """What is kept, decoded."""
        return self.kept[-self.limit :].decode("utf-8", "replace")


def read_streams(streams: dict[int, Tail], outcome: int, deadline: float, flood_bytes: int) -> str | None:
    """Read until the outcome's stream ends.

    Args:
        streams: descriptor -> where it goes, `outcome` among them.
        deadline: of `time.monotonic`.
        flood_bytes: how much the other streams may give together.

    Returns:
        Why reading stopped early: "timeout" or "output"; else None.
    """
    with selectors.DefaultSelector() as selector:
        for descriptor in streams:
            os.set_blocking(descriptor, False)
            selector.register(descriptor, selectors.EVENT_READ)
        while outcome in selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return "timeout"
            for key, _ in selector.select(left):
                data = os.read(key.fd, 1 << 16)
                streams[key.fd].add(data)
                if not data:
                    selector.unregister(key.fd)
            if sum(tail.total for descriptor, tail in streams.items() if descriptor != outcome) > flood_bytes:
                return "output"
        # Nobody writes any more and what is in the pipes is all; without isolation somebody may, so not without end.
        for descriptor in list(selector.get_map()):
            for _ in range(64):
                try:
                    data = os.read(descriptor, 1 << 16)
                except BlockingIOError:
                    break
                if not data:
                    break
                streams[descriptor].add(data)
    return None


def stop(process: subprocess.Popen) -> None:
    """End a run: closing its stdin lets it clean up, and what does not is killed."""
    try:
        process.stdin.close()
    except BrokenPipeError:
        pass
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def judge(outcome: dict, early: str | None) -> str:
    """The reason, of what `enter.py` told and why reading stopped early."""
    if early or "said" not in outcome:
        return early or "killed"
    cause, status, said = outcome["cause"], outcome["status"], outcome["said"]
    if cause:
        return "killed" if cause == "stopped" else cause
    if status == -24:  # SIGXCPU
        return "timeout"
    if status < 0:
        return "killed"
    if outcome["ended"] and status == 0:
        return "ok"
    return said if said in ("error", "memory") else "exit"


def run_isolated(
    code: str,
    isolation: str,
    *,
    timeout_seconds: float = 10.0,
    memory_bytes: int = 1 << 30,
    num_processes: int = 16,
    file_bytes: int = 16 << 20,
    output_bytes: int = 1 << 16,
) -> SandboxResult:
    """`run_python` with an isolation that is named."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        job = {
            **describe_job(isolation, folder),
            "code": code,
            "timeout_seconds": timeout_seconds,
            "memory_bytes": memory_bytes,
            "num_processes": num_processes,
            "file_bytes": file_bytes,
        }
        began = time.monotonic()
        outcome, descriptor = os.pipe()
        process = None
        try:
            process = subprocess.Popen(
                spell_command(job, descriptor),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[descriptor],
                env={},
                cwd="/",
                start_new_session=True,
                bufsize=0,
            )
            os.close(descriptor)
            descriptor = None
            text = memoryview(json.dumps(job).encode() + b"\n")
            try:
                while text:
                    text = text[process.stdin.write(text) :]
            except BrokenPipeError:
                pass  # the outcome tells why
            streams = {
                process.stdout.fileno(): Tail(output_bytes),
                process.stderr.fileno(): Tail(output_bytes),
                outcome: Tail(1 << 16),
            }
            early = read_streams(streams, outcome, began + timeout_seconds + GRACE_SECONDS, file_bytes)
        finally:
            if process:
                stop(process)
                process.stdout.close()
                process.stderr.close()
            if descriptor is not None:
                os.close(descriptor)
            os.close(outcome)
    stdout, stderr, told = (tail.text() for tail in streams.values())
    found: dict = {}
    for line in told.splitlines():
        found.update(json.loads(line))
    if "started" not in found and early != "timeout":
        problem = found.get("failed") or (stderr.strip().splitlines() or ["the start of Python failed"])[-1]
        raise SandboxError(f"The sandbox did not start: {problem}.")
    return SandboxResult(judge(found, early), found.get("status"), stdout, stderr, time.monotonic() - began)


def run_python(
    code: str,
    *,
    timeout_seconds: float = 10.0,
    memory_bytes: int = 1 << 30,
    num_processes: int = 16,
    file_bytes: int = 16 << 20,
    output_bytes: int = 1 << 16,
    unsafe: bool = False,
) -> SandboxResult:
    """Run a program where it sees no files but Python's and the system's, no network and no other process.

    The program passes if it runs past its last line; to leave before, with whatever exit code, is no pass. What it
    starts is killed with it. It has no environment but `ENVIRONMENT`, an empty stdin and an empty working directory.

    Args:
        code: Python.
        timeout_seconds: of wall time, and of processor time a process.
        memory_bytes: address space a process, and memory of all together.
        num_processes: at a time, threads included.
        file_bytes: of each file and of all together, and how much may be printed.
        output_bytes: how much of the end of stdout and of stderr is given back.
        unsafe: run with the user's own rights, where the limits of time, memory and files hold and nothing else does.

    Raises:
        SandboxError: nothing on this machine can isolate a program, and `unsafe` is not set.
        ValueError: a limit that is not positive.
    """
    limits = {
        "timeout_seconds": timeout_seconds,
        "memory_bytes": memory_bytes,
        "num_processes": num_processes,
        "file_bytes": file_bytes,
        "output_bytes": output_bytes,
    }
    for name, value in limits.items():
        if not value > 0:
            raise ValueError(f"`{name}` must be positive, got {value}.")
    if unsafe and sys.platform != "linux":
        raise SandboxError(f"A model's program cannot be limited on {sys.platform}; use Linux.")
    return run_isolated(code, UNSAFE if unsafe else find_isolation(), **limits)


def run_many(codes: Iterable[str], *, workers: int | None = None, **settings) -> list[SandboxResult]:
    """Run programs beside each other.

    Args:
        codes: Python, one text a program.
        workers: how many at a time (default: as many as there are processors for this process).
        settings: as of `run_python`.

    Returns:
        The results in the order of the programs.

    Raises:
        SandboxError, ValueError: as `run_python`; `workers` below 1.
    """
    codes = list(codes)
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers < 1:
        raise ValueError(f"`workers` must be at least 1, got {workers}.")
    if not settings.get("unsafe"):
        find_isolation()  # once, before the threads would each try
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda code: run_python(code, **settings), codes))
