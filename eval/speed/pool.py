"""The worker processes: started when first needed, ended when done or when their memory is needed."""

import json
import os
import signal
import subprocess
import sys
import tempfile

COMMAND = [sys.executable, "-m", "minicpm4_hf.eval.speed.worker"]
SIGNAL_HINTS = {signal.SIGKILL: " (out of memory?)"}


class WorkerError(RuntimeError):
    """A worker could not do what it was asked, or is gone."""


class Worker:
    """One contestant's process."""

    def __init__(self, settings: dict):
        self.name = settings["contestant"]
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(settings["threads"]), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C reaches this process only, which ends the worker itself
        )
        self.resident_bytes = 0
        try:
            self.facts = self.ask(settings)
        except WorkerError:
            self.end()
            raise

    def ask(self, request: dict) -> dict:
        """Send a request and wait for its result.

        Raises:
            WorkerError: it failed, or the process ended.
        """
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        self.resident_bytes = answer["resident_bytes"]
        return answer["result"]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            try:
                stream.close()
            except BrokenPipeError:
                pass  # a request that the process did not read any more

    def _last_words(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().splitlines() if line.strip()]
        if code < 0:
            return f"the worker was ended by signal {-code}{SIGNAL_HINTS.get(-code, '')}"
        return f"the worker ended with exit code {code}: {lines[-1] if lines else 'no message'}"


class Pool:
    """At most one worker a contestant, together within a limit of memory."""

    def __init__(self, settings: dict, memory_limit: int):
        self.settings = settings
        self.memory_limit = memory_limit
        self.workers: dict[str, Worker] = {}

    def get(self, contestant: str, engine: str, need_bytes: int) -> Worker:
        """The contestant's worker, after ending others until `need_bytes` for it fit the limit.

        Raises:
            WorkerError: it cannot be started.
        """
        others = [worker for name, worker in self.workers.items() if name != contestant]
        # llama.cpp last: what it has evaluated would have to be evaluated again.
        others.sort(key=lambda worker: (worker.name.startswith("llama.cpp"), -worker.resident_bytes))
        while others and need_bytes + sum(worker.resident_bytes for worker in others) > self.memory_limit:
            self.end(others.pop(0).name)
        if contestant not in self.workers:
            settings = {**self.settings, "contestant": contestant, "engine": engine}
            self.workers[contestant] = Worker(settings)
        return self.workers[contestant]

    def end(self, contestant: str) -> None:
        worker = self.workers.pop(contestant, None)
        if worker is not None:
            worker.end()

    def end_all(self) -> None:
        for contestant in list(self.workers):
            self.end(contestant)
