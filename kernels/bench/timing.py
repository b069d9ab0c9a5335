"""How the bench times: candidates in turns, and what the machine can do at best."""

import time
from collections.abc import Callable

import torch

from minicpm4_hf.kernels import resolve_backend

COLD_BYTES = 256 * 1024 * 1024  # more than the last-level cache of today's CPUs and GPUs
SLOW_SECONDS = 30  # a candidate that has taken so long in all is called three times, not more
MATMUL, MEMORY = "torch matmul 2048", "memory read"  # the ceilings


def time_in_turns(
    candidates: dict[str, Callable], repeats: int, device: str, calls: int = 1
) -> dict[str, list[float]]:
    """Call each candidate with 0 .. `calls` - 1, once to warm up and then in turns; milliseconds a call.

    Decoding takes several calls a turn, as the layers of a model follow one another: alone, a call of a tenth of a
    millisecond would mostly measure how long its own code takes to come from memory.
    """
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    times_ms = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, call in candidates.items():
            if len(times_ms[name]) >= 3 and calls * sum(times_ms[name]) > SLOW_SECONDS * 1e3:
                continue
            synchronize()
            start = time.perf_counter()
            for i in range(calls):
                call(i)
            synchronize()
            seconds = time.perf_counter() - start
            if turn or seconds > SLOW_SECONDS:  # nothing to warm up in that
                times_ms[name].append(seconds / calls * 1e3)
    return times_ms


def ceilings(dtype: torch.dtype, device: str) -> dict[str, tuple[Callable, float]]:
    """What the machine can do at best: a call, and the operations (matrix product) or bytes (memory) of it."""
    square = torch.randn(2048, 2048, device=device).to(dtype)
    rows = COLD_BYTES // (4096 * 2)
    if torch.device(device).type == "cpu" and resolve_backend("cpu")[0] == "cpu":
        from minicpm4_hf.kernels.cpu.linear import linear

        weight, x = torch.randn(rows, 4096).bfloat16(), torch.randn(1, 4096).bfloat16()
        read = lambda i: linear(x, weight)  # noqa: E731
    else:
        weight = torch.randn(rows, 2048, device=device)
        read = lambda i: weight.sum()  # noqa: E731
    return {MATMUL: (lambda i: square @ square, 2 * 2048**3), MEMORY: (read, weight.numel() * weight.itemsize)}
