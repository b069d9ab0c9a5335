"""Runs the Python that a model wrote where it can do no harm: `run_python`, `run_many`.

`runner.py` starts a run and reads what comes of it, `isolation.py` finds out what this machine can isolate with,
`enter.py` makes the namespaces and waits for the program, `seccomp.py` says which system calls are refused, and
`answer.py` is the Python process that the program runs in.
"""

from .isolation import SandboxError, find_isolation
from .runner import SandboxResult, run_many, run_python

__all__ = ["SandboxError", "SandboxResult", "find_isolation", "run_many", "run_python"]
