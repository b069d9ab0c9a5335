"""How a measuring command ends: its exit code, and one sentence on stderr where something is wrong."""

import sys
from collections.abc import Callable

import torch


def run_command(measure: Callable[[], None], *, threads: int | None = None, errors: tuple = ()) -> int:
    """Run what a command does.

    Args:
        measure: checks its input first, measures, and prints.
        threads: torch's inside; None leaves them.
        errors: exceptions that say what the user can put right, besides the usual ones.

    Returns:
        The exit code: 0, 2 for wrong input or a missing package, 130 for a command that was stopped.
    """
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads or before)
        measure()
    except (ValueError, OSError, ImportError, *errors) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; with --output, the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        torch.set_num_threads(before)
    return 0
