"""The process that a program runs in; `enter.py` starts it from this text, so it imports nothing of ours.

Descriptor 3 holds a secret of 16 bytes and the program, 4 takes the secret back once the program has run to its end:
no other way to end counts. While the program runs the secret lies on the evaluation stack of this module's last line,
in no variable, container or descriptor, where neither frames nor the garbage collector show it. A program that
searches its own memory or rewrites this module can still lie, as one can that returns objects equal to everything.
"""

import sys
import traceback
import types
from builtins import *  # noqa: F403, UP029 (so that the program cannot take them away)
from os import _exit, close, read, write

PAYLOAD, REPORT = 3, 4
STREAMS = (sys.stdout, sys.stderr)


def read_program() -> str:
    """What the payload has after the secret."""
    parts = []
    while part := read(PAYLOAD, 1 << 20):
        parts.append(part)
    close(PAYLOAD)
    return b"".join(parts).decode("utf-8", "surrogatepass")


def flush() -> None:
    """Write out what the program printed; it may have closed the streams."""
    for stream in STREAMS:
        try:
            stream.flush()
        except (OSError, ValueError):
            pass


def leave(how: bytes, code: int) -> None:
    """End now, saying how; no handler of the program's runs."""
    try:
        flush()
        write(REPORT, how)
    finally:
        _exit(code)


def run(program: str) -> None:
    """Run the program as `__main__`; come back only if it ran to its end."""
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        exec(compile(program, "answer.py", "exec"), module.__dict__)
    except SystemExit as error:
        code = error.code
        if not isinstance(code, int):
            if code is not None:
                print(code, file=STREAMS[1])
            code = 0 if code is None else 1
        leave(b"exit", code & 255)
    except MemoryError:
        leave(b"memory", 1)
    except BaseException:
        try:
            traceback.print_exc(file=STREAMS[1])
        finally:
            leave(b"error", 1)


def finish(secret: bytes, _: None) -> None:
    """The program has run to its end."""
    leave(secret, 0)


if __name__ == "__main__":
    finish(read(PAYLOAD, 16), run(read_program()))
