"""What this machine can isolate a program with, found out by trying."""

import base64
import functools
import os
import platform
import random
import shutil
import sys
from pathlib import Path

from .seccomp import build_filter

# The program and its libraries may need these; who has secrets does not keep them here.
SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/localtime")
FOLDER = "/box"  # the program's working directory
INNER_ID = 1000  # what a user's own id is called inside
# Ids that no distribution and no container manager gives to anybody, by https://systemd.io/UIDS-GIDS/.
FREE_IDS = (0x70000000, 0x7FFFFFFE)
# More threads than `num_processes` would fail to start.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
ENTER = Path(__file__).with_name("enter.py")
ADVICE = (
    "install bubblewrap (`apt-get install bubblewrap`), allow user namespaces, or choose `unsafe=True` (`--unsafe`), "
    "which limits time and memory and isolates nothing"
)
UNSAFE = "limits"

# The program that tries an isolation: it must not see the file, the network or other processes, become root, or start
# more processes than it may.
PROBE = """
import os, socket, time
assert not os.path.exists({secret!r}), "files are visible"
assert [name for _, name in socket.if_nameindex()] == ["lo"], "the network is visible"
assert not any(name.isdigit() and int(name) > 99 for name in os.listdir("/proc")), "other processes are visible"
try:
    os.setuid(0)
except OSError:
    pass
else:
    raise AssertionError("the user can become root")
try:
    for _ in range(64):
        if os.fork() == 0:
            time.sleep(60)
except BlockingIOError:
    pass
else:
    raise AssertionError("processes are not limited")
"""


class SandboxError(RuntimeError):
    """A program cannot be run as asked; it says nothing about the program."""


def free_id() -> int | None:
    """A user id that nobody has, drawn anew at each call; None where there are too few to draw from."""
    rows = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    first, _, count = max(rows, key=lambda row: row[2])
    if first + count > FREE_IDS[1]:
        return random.SystemRandom().randint(*FREE_IDS)
    return random.SystemRandom().randrange(first + count // 2, first + count - 1) if count > 1000 else None


def list_binds() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What the program sees of the file system: this Python and the system's libraries.

    Returns:
        Pairs of a folder or file and where it is seen, and pairs of a link and where it points.

    Raises:
        SandboxError: a Python in whose folder the user's own files lie.
    """
    home = os.path.realpath(os.path.expanduser("~"))
    prefixes = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    for prefix in prefixes:
        if home == os.path.realpath(prefix) or home.startswith(os.path.realpath(prefix).rstrip("/") + "/"):
            raise SandboxError(f"The folder of this Python, {prefix!r}, holds the home directory; use another Python.")
    links = [(path, os.readlink(path)) for path in SYSTEM if os.path.islink(path) and path.count("/") == 1]
    linked = {path for path, _ in links}
    wanted = [path for path in (*SYSTEM, *prefixes) if path not in linked and os.path.exists(path)]
    binds: dict[str, str] = {}  # where it is seen -> what it is
    for path in sorted({*wanted, *map(os.path.realpath, wanted)}):
        if not any(path.startswith(seen.rstrip("/") + "/") for seen in binds):
            binds[path] = os.path.realpath(path)
    return [(source, target) for target, source in binds.items()], links


def describe_job(isolation: str, folder: str) -> dict:
    """What `enter.py` has to know of an isolation; `folder` is the working directory without one.

    Raises:
        SandboxError: see `list_binds`.
    """
    isolated = isolation != UNSAFE
    binds, links = list_binds() if isolated else ([], [])
    identity = free_id() if isolation == "namespaces" else INNER_ID
    if identity is None:
        raise SandboxError("There is no user id to run the program with.")
    return {
        "isolation": isolation,
        "binds": binds,
        "links": links,
        "uid": identity,
        "gid": identity,
        "folder": FOLDER if isolated else folder,
        "filter": base64.b64encode(build_filter(platform.machine())).decode() if isolated else "",
        "python": sys.executable,
        "environment": ENVIRONMENT,
        "answer": ENTER.with_name("answer.py").read_text(encoding="utf-8"),
    }


def spell_command(job: dict, descriptor: int) -> list[str]:
    """The command that begins a run, of which `descriptor` gets the outcome."""
    script = [sys.executable, "-I", "-S"]
    if job["isolation"] != "bubblewrap":
        return [*script, str(ENTER), str(descriptor)]
    words = ["bwrap", "--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    words += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--as-pid-1", "--cap-drop", "ALL"]
    words += ["--hostname", "sandbox", "--uid", str(job["uid"]), "--gid", str(job["gid"])]
    for source, target in job["binds"]:
        words += ["--ro-bind", source, target]
    for target, path in job["links"]:
        words += ["--symlink", path, target]
    words += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev", "--ro-bind", str(ENTER), "/run/enter.py"]
    for folder in ("/dev/shm", "/tmp", FOLDER):
        words += ["--size", str(job["file_bytes"]), "--tmpfs", folder]
    words += ["--remount-ro", "/", "--"]
    words[0] = shutil.which("bwrap") or words[0]
    return [*words, *script, "/run/enter.py", str(descriptor)]


def list_candidates() -> list[str]:
    """The isolations worth trying here, best first.

    The processes of root are not counted by the kernel, whatever a user namespace calls it: nothing would stop a
    program that forks. So as root the program gets another id, which only our own namespaces can do.
    """
    if sys.platform != "linux":
        return []
    if os.geteuid() == 0:
        return ["namespaces"]
    return ["bubblewrap", "user_namespaces"] if shutil.which("bwrap") else ["user_namespaces"]


@functools.cache
def find_isolation() -> str:
    """The best isolation that works on this machine, tried once a process.

    Returns:
        "namespaces" (as root), "user_namespaces" or "bubblewrap".

    Raises:
        SandboxError: none does; says why, and what to do.
    """
    from .runner import run_isolated

    problems = []
    for isolation in list_candidates():
        try:
            result = run_isolated(PROBE.format(secret=str(ENTER)), isolation)
        except SandboxError as error:
            problems.append(f"{isolation}: {str(error).rstrip('.')}")
            continue
        if result.passed:
            return isolation
        last = (result.stderr.strip().splitlines() or [result.reason])[-1]
        problems.append(f"{isolation}: {last}")
    if sys.platform != "linux":
        problems = ["that needs Linux"]
    elif not shutil.which("bwrap"):
        problems.append("bwrap is not installed")
    raise SandboxError(f"A model's program cannot be isolated here ({'; '.join(problems)}): {ADVICE}.")
