"""One contestant in a process of its own: settings on the first line of stdin, then a request a line, all JSON.

Started by `pool.py`. Each answer is one line on stdout with `result` and `resident_bytes`, or `error`; whatever else a
library prints there goes to stderr. Between requests the process waits for input and computes nothing.
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import sys
from pathlib import Path

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ENGINES = {
    "torch": ("torch_engine", "TorchEngine"),
    "llama.cpp": ("llama_cpp_engine", "LlamaCppEngine"),
}


def resident_bytes(device: str, *, peak: bool = False) -> int:
    """Memory of this process now, or its highest value since `reset_peak`: a GPU's, or what is resident on the host.

    Elsewhere than on Linux the highest value on the host is the one ever reached.
    """
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_reserved()
    name = "VmHWM:" if peak else "VmRSS:"
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak(device: str) -> None:
    """Let the peak begin anew; see proc_pid_clear_refs(5)."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        pass  # not Linux, or not allowed in this container: the peak is then the process's


def end_with_parent() -> None:
    """Ask Linux to end this process with the one that started it, even in the middle of a measurement."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def load_engine(settings: dict):
    """The engine of the settings, warmed up, and what the process held before it was made."""
    module, name = ENGINES[settings["engine"]]
    engine_class = getattr(importlib.import_module(f"minicpm4_hf.eval.speed.{module}"), name)
    base = resident_bytes(settings["device"])
    engine = engine_class(settings)
    engine.prompt(min(64, settings["context_tokens"] - 4), 64)
    engine.decode(0, 2)
    engine.release()
    return engine, base


def serve(lines, answer) -> None:
    """Answer each request until the input ends."""
    settings = json.loads(next(lines, "null"))
    if settings is None:  # the other side went away at once
        return
    try:
        engine, base = load_engine(settings)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        answer({"error": " ".join(str(error).split())})
        return
    device = settings["device"]
    answer({"result": engine.describe(), "resident_bytes": resident_bytes(device)})
    for line in lines:
        request = json.loads(line)
        reset_peak(device)
        try:
            result = getattr(engine, request.pop("measure"))(**request)
        except (MemoryError, RuntimeError, ValueError) as error:
            engine.release()
            answer({"error": f"{type(error).__name__}: {' '.join(str(error).split())}"})
            continue
        result["peak_bytes"] = resident_bytes(device, peak=True) - base
        engine.release()
        answer({"result": result, "resident_bytes": resident_bytes(device)})


def main() -> int:
    end_with_parent()
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(document: dict) -> None:
        own.write(json.dumps(document) + "\n")
        own.flush()

    serve(iter(sys.stdin.readline, ""), answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
