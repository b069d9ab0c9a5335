"""The system calls that a program in the sandbox is refused, as a filter in the kernel's own language.

Namespaces are the wall; the filter takes away what reaches around it (vsock, keyrings, memory that no limit counts),
the way to namespaces of its own, and parts of the kernel that an answer has no use for.

Source of the numbers: Linux `arch/x86/entry/syscalls/syscall_64.tbl` and `include/uapi/asm-generic/unistd.h`; of the
language: `include/uapi/linux/{filter,seccomp,audit}.h`.
"""

import errno
import socket
import struct

# Name -> number on x86_64, on aarch64. From 424 on every machine has the same.
REFUSED = {
    "add_key": (248, 217),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "fsopen": (430, 430),
    "io_uring_setup": (425, 425),
    "kcmp": (312, 272),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "request_key": (249, 218),
    "semget": (64, 190),
    "setns": (308, 268),
    "shmget": (29, 194),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
CLONE, CLONE3, SOCKET = (56, 220), (435, 435), (41, 198)
FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, 16)  # 16: netlink
NEW_NAMESPACES = 0x7E020080  # CLONE_NEW{USER,PID,NET,IPC,UTS,CGROUP,NS,TIME}

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column, AUDIT_ARCH
X32_BIT = 0x40000000  # x86_64's other numbering; above all numbers elsewhere

LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER, ARCH, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
ALLOW, KILL, FAIL = 0x7FFF0000, 0x80000000, 0x00050000


def build_filter(machine: str) -> bytes:
    """The filter for a machine of `platform.machine()`; empty where there is none, which leaves the namespaces alone.

    Returns:
        `struct sock_filter`s in a row.
    """
    if machine not in ARCHITECTURES:
        return b""
    column, arch = ARCHITECTURES[machine]
    refuse = (RETURN, 0, 0, FAIL | errno.EPERM)
    unknown = (RETURN, 0, 0, FAIL | errno.ENOSYS)
    allow = (RETURN, 0, 0, ALLOW)
    program = [
        (LOAD, 0, 0, ARCH),
        (EQUAL, 1, 0, arch),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER),
        (AT_LEAST, 0, 1, X32_BIT),
        unknown,
        (EQUAL, 0, 1, CLONE3[column]),  # its flags are in memory, out of the filter's sight; the C library then clones
        unknown,
    ]
    for numbers in REFUSED.values():
        program += [(EQUAL, 0, 1, numbers[column]), refuse]
    program += [(EQUAL, 0, 4, CLONE[column]), (LOAD, 0, 0, FIRST_ARGUMENT), (ANY_BIT, 0, 1, NEW_NAMESPACES)]
    program += [refuse, allow]
    program += [(EQUAL, 0, len(FAMILIES) + 2, SOCKET[column]), (LOAD, 0, 0, FIRST_ARGUMENT)]
    program += [(EQUAL, len(FAMILIES) - place, 0, family) for place, family in enumerate(FAMILIES)]
    program += [(RETURN, 0, 0, FAIL | errno.EAFNOSUPPORT), allow]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
