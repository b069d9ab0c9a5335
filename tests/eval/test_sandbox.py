"""`minicpm4_hf.eval.sandbox`: programs that try to get out, to stay, to take more than they may, and to lie."""

import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from minicpm4_hf.eval.sandbox import SandboxError, SandboxResult, find_isolation, isolation, run_many, run_python
from minicpm4_hf.eval.sandbox.runner import Tail, run_isolated
from minicpm4_hf.eval.sandbox.seccomp import REFUSED, build_filter

SECRET = "heron-4817"
# Doubles ten times at most, should nothing hold it.
BOMB = """import os, time
for _ in range(10):
    try:
        os.fork()
    except OSError:
        pass
time.sleep(100)
"""
SLEEP = """import os, subprocess, sys
command = [sys.executable, "-c", "import time; time.sleep(60)", {marker!r}]
{ending}
"""


def why_not():
    """Why programs cannot be isolated here; empty where they can."""
    try:
        find_isolation()
    except SandboxError as error:
        return str(error)
    return ""


PROBLEM = why_not()
isolated = pytest.mark.skipif(bool(PROBLEM), reason=PROBLEM)
linux = pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")


def run(code, **settings):
    return run_python(textwrap.dedent(code), **settings)


@isolated
def test_program_that_ends():
    result = run("import math\nprint(math.factorial(5))\nif __name__ == '__main__':\n    print('main')")
    assert result.passed and result.reason == "ok" and result.exit_code == 0
    assert (result.stdout, result.stderr) == ("120\nmain\n", "")


@isolated
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise ValueError('no')", "error"),
        ("assert 1 + 1 == 3", "error"),
        ("def f(:", "error"),
        ("x = '\ud800'", "error"),
        ("raise KeyboardInterrupt", "error"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed"),
        ("import ctypes; ctypes.string_at(0)", "killed"),
        ("import sys; sys.exit(0)\nassert False", "exit"),
        ("import os; os._exit(0)\nassert False", "exit"),
        ("exit()", "exit"),
        ("raise SystemExit", "exit"),
        ("import atexit, os; atexit.register(os._exit, 0)\nassert False", "error"),
        ("import os\nif os.fork() == 0: os._exit(0)\nos.wait()\nassert False", "error"),
        # What would catch the failure is taken away.
        ("import builtins; builtins.__dict__.clear()\nassert False", "error"),
        ("import traceback; traceback.print_exc = lambda **_: None\nassert False", "error"),
        ("import os, sys; os._exit = print; sys.excepthook = print\nassert False", "error"),
        # A right word is not enough: the secret is not known to the program.
        ("import os; os.write(4, b'ok'); os._exit(0)", "exit"),
        ("import os; os.write(4, bytes(16)); os._exit(0)", "exit"),
        ("import os; os.close(4)", "exit"),
    ],
)
def test_what_does_not_pass(code, reason):
    result = run_python(code)
    assert (result.passed, result.reason) == (False, reason), result
    assert result.exit_code is not None


@isolated
def test_secret_is_in_no_frame_and_no_container():
    result = run("""
        import gc, os, sys
        found = set()
        def look(value, depth=0):
            if isinstance(value, bytes) and len(value) == 16:
                found.add(value)
            elif isinstance(value, dict) and depth < 3:
                for item in list(value.values()):
                    look(item, depth + 1)
            elif isinstance(value, (list, tuple, set)) and depth < 3:
                for item in list(value):
                    look(item, depth + 1)
        frame = sys._getframe()
        while frame:
            look(dict(frame.f_locals))
            look(frame.f_globals)
            frame = frame.f_back
        for item in gc.get_objects():
            look(item)
        for item in list(found):
            os.write(4, item)
        for descriptor in range(3, 50):
            try:
                os.write(4, os.read(descriptor, 16))
            except OSError:
                pass
        os._exit(0)
    """)
    assert result.reason == "exit", result


@isolated
def test_passing_needs_no_builtins_and_no_streams():
    assert run("import builtins\nbuiltins.__dict__.clear()").passed
    assert run("import sys\nsys.stdout.close()\nsys.stderr.close()").passed
    assert run("import threading, time\nthreading.Thread(target=time.sleep, args=[60]).start()").passed


@pytest.fixture
def secrets(tmp_path, monkeypatch):
    """A secret in a file of this test, in a home directory and in the environment."""
    monkeypatch.setenv("SANDBOX_TEST_SECRET", SECRET)
    name = f".sandbox-test-{os.getpid()}"
    places = [tmp_path / name, Path.home() / name, Path("/var/tmp") / name]
    for place in places:
        place.write_text(SECRET)
    yield [str(place) for place in places]
    for place in places:
        place.unlink()


@isolated
def test_no_files_and_no_environment_of_the_user(secrets):
    code = f"""
        import glob, os, subprocess, sys
        for path in {secrets!r}:
            for name in (path, "/proc/1/root" + path, "/proc/self/root/.." + path, "/proc/1/cwd" + path):
                try:
                    print(open(name).read())
                except OSError:
                    print("none")
        print(dict(os.environ))
        for path in glob.glob("/proc/*/environ") + glob.glob("/proc/*/cmdline"):
            try:
                print(open(path, errors="replace").read())
            except OSError:
                pass
        print(os.listdir("."), os.getcwd(), sys.flags.isolated, sys.stdin.read())
        print("root", os.listdir("/"))
        print("fds", sorted(os.listdir("/proc/self/fd"), key=int))
    """
    result = run(code)
    assert result.passed, result
    assert SECRET not in result.stdout and str(os.getpid()) + "'" not in result.stdout
    assert "[] /box 1 \n" in result.stdout
    assert "fds ['0', '1', '2', '3', '4']" in result.stdout  # 3: the folder that is being listed, 4: the report
    assert not {".old", "home", "mnt", "var", "sys"} & set(result.stdout.split("root ")[1].split("'"))


@isolated
def test_nothing_of_the_system_is_written(tmp_path):
    outside = [str(tmp_path / "a"), str(Path.home() / "a"), "/usr/a", sys.prefix + "/a", "/etc/a", "/proc/a"]
    outside += ["/proc/sys/kernel/hostname", "/proc/1/comm", "/proc/1/mem", "/proc/self/oom_score_adj", "/dev/sda"]
    result = run(f"""
        import os
        for path in {outside!r}:
            try:
                open(path, "w").write("0")
                print("wrote", path)
            except OSError:
                pass
        for folder in (".", "/tmp", "/dev/shm"):
            open(folder + "/mine", "w").write("1")
        for call in (lambda: os.chroot("/"), lambda: os.setuid(0), lambda: os.mknod("d", 0o60600, os.makedev(8, 0))):
            try:
                call()
                print("could")
            except OSError:
                pass
    """)
    assert (result.reason, result.stdout) == ("ok", "")
    assert not list(tmp_path.iterdir())
    assert run("import os\nassert not os.path.exists('/tmp/mine')").passed


@isolated
def test_no_network(tmp_path):
    path = str(tmp_path / "listener")
    with socket.create_server(("127.0.0.1", 0)) as internet, socket.socket(socket.AF_UNIX) as local:
        with socket.socket(socket.AF_UNIX) as abstract:
            local.bind(path)
            abstract.bind(b"\0sandbox-test-%d" % os.getpid())
            for listener in (local, abstract):
                listener.listen()
            result = run(f"""
                import socket
                addresses = [
                    (socket.AF_INET, ("127.0.0.1", {internet.getsockname()[1]})),
                    (socket.AF_INET, ("1.1.1.1", 53)),
                    (socket.AF_UNIX, {path!r}),
                    (socket.AF_UNIX, b"\\0sandbox-test-{os.getpid()}"),
                    (40, (2, 1)),  # vsock, to the host of a virtual machine
                ]
                for family, address in addresses:
                    try:
                        with socket.socket(family) as client:
                            client.settimeout(2)
                            client.connect(address)
                        print("connected", address)
                    except OSError as error:
                        pass
            """)
    assert (result.reason, result.stdout) == ("ok", "")


@isolated
@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(100)",
        "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, "
        "ValueError): pass\ntime.sleep(100)",
        "import os, time\nfor _ in range(3): os.fork()\nos.setsid() if os.getpid() != os.getpgrp() else 0\n"
        "time.sleep(100)",
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
    ],
    ids=["loop", "sleep", "signals-ignored", "forks", "error-that-loops"],
)
def test_time_limit(code):
    result = run_python(code, timeout_seconds=1)
    assert result.reason == "timeout"
    assert 1 <= result.seconds < 8


@isolated
def test_processor_time_of_threads_is_limited_too():
    # Two children burn at once; neither waits for the wall's limit.
    code = "import os, time\nfor _ in range(2):\n    if os.fork() == 0:\n        while True: pass\ntime.sleep(100)"
    result = run_python(code, timeout_seconds=1)
    assert result.reason == "timeout"


@isolated
def test_fork_bomb_is_contained():
    count = "import os\nassert sum(name.isdigit() for name in os.listdir('/proc')) <= 9"
    beside = f"import time\ntime.sleep(0.5)\n{count}\nos.waitpid(os.fork() or os._exit(0), 0)"
    first, second = run_many([BOMB, beside], workers=2, timeout_seconds=2, num_processes=8)
    assert first.reason in ("timeout", "processes")
    assert second.passed  # the limit is each run's own
    assert run(BOMB.replace("time.sleep(100)", count), num_processes=8).passed


@isolated
def test_threads_and_processes_up_to_the_limit():
    code = """
        import threading
        wait = threading.Event()
        threads = [threading.Thread(target=wait.wait, daemon=True) for _ in range({count})]
        for thread in threads:
            thread.start()
        wait.set()
    """
    assert run(code.format(count=6), num_processes=8).passed
    children = "import subprocess, sys, multiprocessing as m\nsubprocess.run([sys.executable, '-c', ''], check=True)"
    assert run(
        children + "\nq = m.Queue(); p = m.Process(target=q.put, args=[3]); p.start(); assert q.get() == 3"
    ).passed


@isolated
def test_memory_limit():
    assert run("x = bytearray(10 << 30)").reason == "memory"
    assert run("x = [0]\nwhile True: x += x", memory_bytes=256 << 20).reason == "memory"
    together = """
        import os, time
        for _ in range(4):
            if os.fork() == 0:
                x = bytearray(os.urandom(1 << 20)) * 90
                time.sleep(100)
        time.sleep(100)
    """
    assert run(together, memory_bytes=256 << 20).reason == "memory"
    shared = "import os\nx = bytes(1) * (100 << 20)\nfor _ in range(4):\n    if os.fork() == 0: os._exit(sum(x[:9]))\n"
    assert run(shared + "while True:\n    try: os.wait()\n    except OSError: break", memory_bytes=256 << 20).passed


@isolated
def test_disk_limit():
    one = run("open('big', 'wb').write(bytes(64 << 20))")
    assert one.reason == "error" and ("File too large" in one.stderr or "No space" in one.stderr)
    many = run("for n in range(64): open(f'/tmp/{n}', 'wb').write(bytes(1 << 20))", file_bytes=8 << 20)
    assert many.reason == "error" and "No space" in many.stderr
    names = run("for n in range(100_000): open(str(n), 'w').close()")
    assert names.reason == "error" and "No space" in names.stderr


@isolated
def test_output_flood():
    began = time.monotonic()
    result = run("while True: print('x' * 1000)", output_bytes=1000)
    assert result.reason == "output" and time.monotonic() - began < 10
    assert set(result.stdout) <= {"x", "\n"} and len(result.stdout) <= 1000
    tail = run(
        "import sys\nfor n in range(9999): print(n)\nsys.stderr.buffer.write(b'\\xff\\xfe\\x00ok')", output_bytes=99
    )
    assert tail.passed and tail.stdout.endswith("\n9998\n") and len(tail.stdout) == 99
    assert tail.stderr == "\ufffd\ufffd\x00ok"


def test_tail():
    tail = Tail(4)
    for part in (b"a", b"bcdefghijk", b"l"):
        tail.add(part)
    assert (tail.text(), tail.total) == ("ijkl", 12)


@isolated
def test_child_does_not_outlive_the_run(tmp_path):
    marker = f"sandbox-test-{os.getpid()}-{time.monotonic_ns()}"
    result = run(f"""
        import os, signal, subprocess, sys, time
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)", {marker!r}])
            os._exit(0)
        time.sleep(0.3)
    """)
    assert result.passed
    assert not find_processes(marker)


def find_processes(word):
    """Ids of the processes with a word in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [path.parent.name] if word.encode() in path.read_bytes() else []
        except OSError:
            continue
    return found


@isolated
def test_nothing_above_can_be_killed_or_traced():
    result = run("""
        import ctypes, os, signal
        libc = ctypes.CDLL(None, use_errno=True)
        for process in {1, os.getppid()}:
            for number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM):
                try:
                    os.kill(process, number)
                except OSError:
                    pass
            assert libc.ptrace(16, process, 0, 0) == -1  # PTRACE_ATTACH
            try:
                open(f"/proc/{process}/mem", "rb").read(1)
                raise AssertionError("memory")
            except OSError:
                pass
        for call in (lambda: libc.unshare(0x10000000), lambda: libc.mount(b"x", b"/tmp", b"tmpfs", 0, 0)):
            assert call() == -1
        assert libc.syscall(319 if os.uname().machine == "x86_64" else 279, b"x", 0) == -1  # memfd_create
        print("still here")
    """)
    assert (result.reason, result.stdout) == ("ok", "still here\n")
    killed = run("import os\nos.kill(-1, 9)")
    assert not killed.passed


@isolated
def test_run_ends_with_the_process_that_asked(tmp_path):
    marker = f"sandbox-orphan-{os.getpid()}"
    program = SLEEP.format(marker=marker, ending="os.execv(sys.executable, command)")
    package = str(Path(isolation.__file__).parent.parent)  # without ours around it, which would load torch
    code = (
        f"import sys\nsys.path.append({package!r})\nfrom sandbox import run_python\nprint('go', flush=True)\n"
        f"run_python({program!r}, timeout_seconds=60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as caller:
        assert caller.stdout.readline() == b"go\n"
        until = time.monotonic() + 20
        while not find_processes("time.sleep(60)\0" + marker) and time.monotonic() < until:
            time.sleep(0.05)
        assert find_processes("time.sleep(60)\0" + marker)
        caller.kill()
    until = time.monotonic() + 10
    while find_processes("time.sleep(60)\0" + marker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not find_processes("time.sleep(60)\0" + marker)


@isolated
def test_run_many_keeps_the_order():
    codes = [f"import time\ntime.sleep({(3 - n) / 10})\nprint({n})" for n in range(4)] + ["1 / 0"]
    results = run_many(iter(codes), workers=3)
    assert [result.stdout for result in results] == ["0\n", "1\n", "2\n", "3\n", ""]
    assert [result.passed for result in results] == [True] * 4 + [False]
    assert run_many([]) == []


@isolated
@pytest.mark.parametrize("name", ["namespaces", "user_namespaces", "bubblewrap"])
def test_every_isolation_isolates(name, tmp_path):
    if name not in isolation.list_candidates():
        pytest.skip(f"{name} is not for this user, or not installed")
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    try:
        result = run_isolated(isolation.PROBE.format(secret=str(secret)), name)
    except SandboxError as error:
        pytest.skip(str(error))
    assert result.passed, result
    assert run_isolated("import time; time.sleep(9)", name, timeout_seconds=0.5).reason == "timeout"
    assert run_isolated(BOMB, name, timeout_seconds=0.5).reason in ("timeout", "processes")


def test_refusal_where_nothing_isolates(monkeypatch):
    find_isolation.cache_clear()
    try:
        monkeypatch.setattr(isolation, "list_candidates", lambda: ["namespaces", "bubblewrap"])

        def broken(job, descriptor):
            return [sys.executable, "-c", "raise SystemExit('unshare: Operation not permitted')"]

        monkeypatch.setattr("minicpm4_hf.eval.sandbox.runner.spell_command", broken)
        with pytest.raises(
            SandboxError, match=r"Operation not permitted.*install bubblewrap.*`unsafe=True`"
        ) as caught:
            run_python("print(1)")
        assert "\n" not in str(caught.value)
        monkeypatch.setattr(isolation, "list_candidates", lambda: [])
        with pytest.raises(SandboxError, match="cannot be isolated here"):
            run_many(["print(1)"])
    finally:
        find_isolation.cache_clear()


@isolated
def test_isolation_that_leaks_is_not_taken(monkeypatch):
    find_isolation.cache_clear()
    try:
        monkeypatch.setattr(isolation, "list_candidates", lambda: [isolation.UNSAFE])
        with pytest.raises(SandboxError, match="files are visible"):
            find_isolation()
    finally:
        find_isolation.cache_clear()


@linux
def test_unsafe_has_limits_only(tmp_path):
    (tmp_path / "seen").write_text("seen")
    result = run_python(f"import os\nprint(open({str(tmp_path / 'seen')!r}).read(), len(os.environ) < 6)", unsafe=True)
    assert (result.reason, result.stdout) == ("ok", "seen True\n")
    assert run_python("while True: pass", unsafe=True, timeout_seconds=0.5).reason == "timeout"
    assert run_python("x = bytearray(10 << 30)", unsafe=True).reason == "memory"
    assert run_python("import sys; sys.exit(0)", unsafe=True).reason == "exit"
    marker = f"sandbox-unsafe-{os.getpid()}"
    child = SLEEP.format(marker=marker, ending="subprocess.Popen(command, start_new_session=True)")
    assert run_python(child, unsafe=True).passed
    assert not find_processes(marker)
    many = "import os, time\nfor _ in range(30):\n    if os.fork() == 0: time.sleep(20)\ntime.sleep(20)"
    assert run_python(many, unsafe=True).reason == "processes"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout_seconds": 0}, "`timeout_seconds` must be positive, got 0."),
        ({"memory_bytes": -1}, "`memory_bytes` must be positive, got -1."),
        ({"timeout_seconds": float("nan")}, "`timeout_seconds` must be positive, got nan."),
    ],
)
def test_wrong_limits(settings, message):
    with pytest.raises(ValueError) as caught:
        run_python("", **settings)
    assert str(caught.value) == message


def test_wrong_workers():
    with pytest.raises(ValueError, match="`workers` must be at least 1, got 0"):
        run_many(["1"], workers=0)


def test_result_says_whether_it_passed():
    assert SandboxResult("ok", 0, "", "", 0.1).passed
    assert not SandboxResult("exit", 0, "", "", 0.1).passed


def decide(code, arch, number, argument):
    """What a filter decides, by the rules of its language: man 2 seccomp, linux/filter.h."""
    values = {0: number, 4: arch, 16: argument}
    at, held = 0, 0
    while True:
        kind, yes, no, k = (
            int.from_bytes(code[8 * at : 8 * at + 2], sys.byteorder),
            code[8 * at + 2],
            code[8 * at + 3],
            int.from_bytes(code[8 * at + 4 : 8 * at + 8], sys.byteorder),
        )
        if kind == 0x06:
            return k
        if kind == 0x20:
            held = values[k]
        else:
            at += yes if {0x15: held == k, 0x35: held >= k, 0x45: bool(held & k)}[kind] else no
        at += 1


@pytest.mark.parametrize(
    ("machine", "arch", "column", "write", "clone", "connect"),
    [("x86_64", 0xC000003E, 0, 1, 56, 41), ("aarch64", 0xC00000B7, 1, 64, 220, 198)],
)
def test_filter(machine, arch, column, write, clone, connect):
    code = build_filter(machine)
    allow, refuse, unknown, family, kill = 0x7FFF0000, 0x50001, 0x50026, 0x50061, 0x80000000
    assert decide(code, arch, write, 0) == allow
    assert decide(code, 0x40000003, write, 0) == kill  # 32 bits
    assert decide(code, arch, write | 0x40000000, 0) == unknown  # x32
    assert {decide(code, arch, numbers[column], 0) for numbers in REFUSED.values()} == {refuse}
    assert decide(code, arch, 435, 0) == unknown  # clone3
    assert decide(code, arch, clone, 0x3D0F00) == allow  # what threads are made with
    assert decide(code, arch, clone, 0x10000000 | 17) == refuse  # a user namespace
    assert [decide(code, arch, connect, n) for n in (1, 2, 10, 16)] == [allow] * 4
    assert [decide(code, arch, connect, n) for n in (0, 17, 38, 40)] == [family] * 4  # packet, crypto, vsock
    assert build_filter("riscv64") == b""
