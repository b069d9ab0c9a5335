"""Makes the namespaces, starts the program in them and waits for it; a script of its own that imports nothing of ours.

    python -I -S enter.py DESCRIPTOR < a job as one JSON line, on a pipe that stays open

What came of it is written to the descriptor as JSON lines: `{"failed": "why"}` where the program could not be
started, else `{"started": true}` and, in the end, `{"cause": ..., "status": ..., "ended": ..., "said": ...}`. When
the pipe closes, everything is killed.

The process that waits is the first of its pid namespace: nothing inside can kill it, and with it everything ends. As
root the program gets a user id that nobody has, other than that of any run beside, so that the kernel's limit of
processes counts this run alone; else a user namespace of its own does that.

Source: man 7 namespaces, pid_namespaces and user_namespaces, man 2 pivot_root, mount_setattr and seccomp; bubblewrap
(https://github.com/containers/bubblewrap) for the order of the steps.
"""

import base64
import ctypes
import json
import os
import resource
import select
import signal
import sys
import time

LIBC = ctypes.CDLL(None, use_errno=True)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 8, 0x1000, 0x4000, 1 << 18
NEW_NS, NEW_CGROUP, NEW_UTS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = (1 << bit for bit in (17, 25, 26, 27, 28, 29, 30))
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
SYS_MOUNT_SETATTR, AT_RECURSIVE, AT_FDCWD = 442, 0x8000, -100
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4
SECCOMP_FILTER = 2

OLD = "/.old"  # where the former root is until it is gone
PAYLOAD, REPORT = 3, 4  # descriptors in the program's process
NUM_INODES = 4096
POLL_SECONDS = (0.01, 0.05)  # how often the memory is looked at, at first and later
SHORT_SECONDS = 0.3


def call(name, *arguments):
    """A function of the C library; raises `OSError` with its name where it fails."""
    if getattr(LIBC, name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def prctl(option, value):
    """`prctl` with one argument."""
    call("prctl", option, ctypes.c_ulong(value), 0, 0, 0)


def mount(source, target, kind, flags, options=""):
    """`mount`; the error names the target."""
    arguments = [text.encode() for text in (source, target, kind, options)]
    try:
        call("mount", *arguments[:3], ctypes.c_ulong(flags), arguments[3])
    except OSError as error:
        raise OSError(error.errno, f"mount of {target}: {os.strerror(error.errno)}") from None


def protect(target):
    """Make a mount and all below it read-only, without devices and set-user-id programs."""
    attributes = (ctypes.c_uint64 * 4)(ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, 0, 0, 0)
    call(
        "syscall",
        ctypes.c_long(SYS_MOUNT_SETATTR),
        ctypes.c_int(AT_FDCWD),
        target.encode(),
        ctypes.c_uint(AT_RECURSIVE),
        attributes,
        ctypes.c_size_t(ctypes.sizeof(attributes)),
    )


def write_text(path, text):
    """Write to a file that is there."""
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def leave_namespaces(job):
    """Go on in namespaces of our own, as the first process of a pid namespace; the caller's process stays to wait."""
    flags = NEW_NS | NEW_PID | NEW_NET | NEW_IPC | NEW_UTS | NEW_CGROUP
    if job["isolation"] == "user_namespaces":
        uid, gid = os.geteuid(), os.getegid()
        call("unshare", NEW_USER | flags)
        write_text("/proc/self/setgroups", "deny")
        write_text("/proc/self/uid_map", f"{job['uid']} {uid} 1")
        write_text("/proc/self/gid_map", f"{job['gid']} {gid} 1")
    else:
        call("unshare", flags)
    child = os.fork()
    if child:
        os.closerange(1, job["descriptor"] + 1)
        os.waitpid(child, 0)
        os._exit(0)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def bind(source, target):
    """Show a file or folder of the former root, read-only."""
    if os.path.isdir(OLD + source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
    mount(OLD + source, target, "", MS_BIND | MS_REC)
    protect(target)


def build_root(job):
    """A new root: the folders named in the job read-only, devices without state, processes of here, room to write."""
    os.umask(0o022)
    mount("", "/", "", MS_REC | MS_PRIVATE)
    options = f"size={job['file_bytes']},nr_inodes={NUM_INODES},mode=755"
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.mkdir("/tmp" + OLD)
    call("pivot_root", b"/tmp", b"/tmp" + OLD.encode())
    os.chdir("/")
    for source, target in job["binds"]:
        bind(source, target)
    for target, path in job["links"]:
        os.symlink(path, target)
    os.makedirs("/dev/shm")
    for name in ("null", "zero", "full", "random", "urandom"):
        os.close(os.open(f"/dev/{name}", os.O_CREAT | os.O_WRONLY, 0o644))
        mount(f"{OLD}/dev/{name}", f"/dev/{name}", "", MS_BIND)
    for target, path in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        os.symlink("/proc/self/fd" + path, f"/dev/{target}")
    os.makedirs("/proc", exist_ok=True)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY, "subset=pid,hidepid=2")
    os.makedirs("/tmp", exist_ok=True)
    for folder in ("/tmp", "/dev/shm"):
        os.chmod(folder, 0o1777)
    os.mkdir(job["folder"], 0o700)
    os.chown(job["folder"], job["uid"], job["gid"])
    call("umount2", OLD.encode(), MNT_DETACH)
    os.rmdir(OLD)
    call("sethostname", b"sandbox", 7)


def limit(kind, soft, hard=None):
    """Set a limit, or leave a lower one that is there."""
    ceiling = resource.getrlimit(kind)[1]
    hard = soft if hard is None else hard
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(kind, (soft, hard))


def become_program(job, payload, report):
    """In the child: limits, a user of its own, the filter; then the program's Python in place of this one."""
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(payload, PAYLOAD)
    os.dup2(report, REPORT)
    os.chdir(job["folder"])
    os.umask(0o077)
    seconds = int(job["timeout_seconds"]) + 1
    limit(resource.RLIMIT_CPU, seconds, seconds + 1)
    limit(resource.RLIMIT_AS, job["memory_bytes"])
    limit(resource.RLIMIT_FSIZE, job["file_bytes"])
    limit(resource.RLIMIT_NOFILE, 256)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_MEMLOCK, 0)
    limit(resource.RLIMIT_MSGQUEUE, 0)
    if job["isolation"] != "limits":  # there it would count all that the user runs
        limit(resource.RLIMIT_NPROC, job["num_processes"])
    if job["isolation"] == "namespaces":
        os.setgroups([])
        os.setresgid(job["gid"], job["gid"], job["gid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    if job["filter"]:
        code = base64.b64decode(job["filter"])

        class Program(ctypes.Structure):
            _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]

        program = Program(len(code) // 8, code)
        call("prctl", PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_FILTER), ctypes.byref(program), 0, 0)
    arguments = [job["python"], "-I", "-X", "utf8", "-c", job["answer"]]
    os.execve(job["python"], arguments, job["environment"])


def start_program(job, secret):
    """Start the program.

    Returns:
        Its process id, and the descriptor that gives what it says in the end.
    """
    payload = os.memfd_create("program")
    content = memoryview(secret + job["code"].encode("utf-8", "surrogatepass"))
    while content:
        content = content[os.write(payload, content) :]
    os.lseek(payload, 0, os.SEEK_SET)
    said, report = os.pipe()
    trouble, complain = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            high = [os.dup(descriptor) for descriptor in (payload, report, complain)]
            while min(high) <= max(REPORT, job["descriptor"]):
                high = [os.dup(descriptor) for descriptor in high]
            complain = high[2]
            os.closerange(3, min(high))
            for descriptor in high:
                os.set_inheritable(descriptor, False)
            become_program(job, *high[:2])
        except OSError as error:
            os.write(complain, str(error).encode())
        finally:
            os._exit(1)
    for descriptor in (payload, report, complain):
        os.close(descriptor)
    problem = os.read(trouble, 4096)
    os.close(trouble)
    if problem:
        raise OSError(problem.decode(errors="replace"))
    return child, said


def descendants(root):
    """Ids of the living processes below one, by what /proc tells."""
    children = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                state, parent = file.read().rpartition(b")")[2].split()[:2]
        except OSError:
            continue
        if state != b"Z":
            children.setdefault(int(parent), []).append(int(name))
    found, queue = [], [root]
    while queue:
        new = children.get(queue.pop(), [])
        found += new
        queue += new
    return found


def kill_all(isolated):
    """Kill every process of the run, however often it forks, and wait for the end of those."""
    patience = time.monotonic() + 5
    while time.monotonic() < patience:
        if isolated:
            try:
                os.kill(-1, signal.SIGKILL)
            except ProcessLookupError:
                pass
        else:
            for process in descendants(os.getpid()):
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def memory_of(processes):
    """Bytes that processes have in memory, what they share counted once where that matters."""
    total = 0
    for process in processes:
        try:
            with open(f"/proc/{process}/smaps_rollup", "rb") as file:
                total += sum(int(line.split()[1]) << 10 for line in file if line.startswith(b"Pss:"))
        except OSError:
            continue
    return total


def resident_of(processes):
    """Bytes that processes have in memory, what they share counted for each: never less than `memory_of`."""
    total = 0
    for process in processes:
        try:
            with open(f"/proc/{process}/statm", "rb") as file:
                total += int(file.read().split()[1]) * resource.getpagesize()
        except OSError:
            continue
    return total


def find_excess(job):
    """Which limit all processes of the run together are above, or None."""
    processes = descendants(os.getpid())
    if len(processes) > job["num_processes"]:
        return "processes"
    if resident_of(processes) > job["memory_bytes"] and memory_of(processes) > job["memory_bytes"]:
        return "memory"
    return None


def reap_orphans(child):
    """Take the dead off the list of processes, but not the program itself."""
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if found is None or found.si_pid == child:
            return
        os.waitpid(found.si_pid, os.WNOHANG)


def wait_for(job, child):
    """Wait for the program's end or the first reason to end it.

    Returns:
        The reason, None where it ended by itself.
    """
    began = time.monotonic()
    ended = os.pidfd_open(child)
    poll = select.poll()
    poll.register(ended, select.POLLIN)
    poll.register(0, select.POLLIN)
    while True:
        passed = time.monotonic() - began
        if passed >= job["timeout_seconds"]:
            return "timeout"
        pause = min(job["timeout_seconds"] - passed, POLL_SECONDS[passed > SHORT_SECONDS])
        events = [descriptor for descriptor, _ in poll.poll(pause * 1000)]
        if ended in events:
            return None
        if events:
            return "stopped"
        reap_orphans(child)
        excess = find_excess(job)
        if excess:
            return excess


def supervise(job, tell):
    """Run the program and tell what came of it."""
    isolated = job["isolation"] != "limits"
    if not isolated:
        prctl(PR_SET_CHILD_SUBREAPER, 1)
    prctl(PR_SET_DUMPABLE, 0)
    secret = os.urandom(16)
    child, said = start_program(job, secret)
    tell(started=True)
    cause = wait_for(job, child)
    try:
        if cause:
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    finally:
        kill_all(isolated)
    os.set_blocking(said, False)
    try:
        words = os.read(said, 4096)
    except BlockingIOError:
        words = b""
    how = words[:16].decode(errors="replace")  # the program's word for it, for a failure only
    tell(cause=cause, status=os.waitstatus_to_exitcode(status), ended=secret in words, said=how)


def read_job():
    """The job from stdin, which stays open behind it."""
    text = b""
    while not text.endswith(b"\n"):
        part = os.read(0, 1 << 20)
        if not part:
            os._exit(1)
        text += part
    return json.loads(text)


def main():
    descriptor = int(sys.argv[1])
    job = {**read_job(), "descriptor": descriptor}

    def tell(**what):
        os.write(descriptor, json.dumps(what).encode() + b"\n")

    try:
        write_text("/proc/self/oom_score_adj", "500")
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if job["isolation"] in ("namespaces", "user_namespaces"):
            leave_namespaces(job)
            build_root(job)
        supervise(job, tell)
    except OSError as error:
        tell(failed=str(error))
    os._exit(0)


if __name__ == "__main__":
    main()
