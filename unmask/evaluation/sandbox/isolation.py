"""Namespaces, limits and rights of a process, by the C library: os.unshare comes with Python 3.12, mounts never.

The command `unshare` of util-linux would be a program more for each process, and cannot make a read-only root.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import signal
import socket
import struct
import sys
from typing import Any

NOBODY = 65534
PRIVATE_FOLDER = "/private"  # and /tmp
PROCESSES, OPEN_FILES, FILE_MB, FOLDER_MB = 32, 64, 16, 32  # the limits that no caller sets
# <sched.h>, <sys/mount.h>, <sys/prctl.h>, <linux/mount.h>
NEW_MOUNTS, NEW_NAME, NEW_IPC = 0x20000, 0x4000000, 0x8000000
NEW_USER, NEW_PIDS, NEW_NET = 0x10000000, 0x20000000, 0x40000000
NO_SUID, NO_DEVICES, BIND, RECURSIVE, PRIVATE, DETACH = 2, 4, 4096, 16384, 1 << 18, 2
SET_DEATH_SIGNAL, SET_DUMPABLE, SET_SECCOMP, DROP_BOUNDING, SET_SUBREAPER, SET_NO_NEW_PRIVILEGES = (
    1,
    4,
    22,
    24,
    36,
    38,
)
MOUNT_SETATTR, AT_CWD, AT_RECURSIVE, READ_ONLY = 442, -100, 0x8000, 1

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: Any) -> int:
    """Call a function of the C library; bytes are pointers, None is NULL.

    Raises:
        OSError: the call failed; the message starts with its name.
    """
    result = getattr(libc, name)(
        *(ctypes.c_long(value) if isinstance(value, int) else value for value in args)
    )
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def unshare_all() -> None:
    """Move to new user, mount, IPC, host name and network namespaces; the next child is pid 1 of a new one."""
    call("unshare", NEW_USER | NEW_MOUNTS | NEW_IPC | NEW_NAME | NEW_NET | NEW_PIDS)


def unshare_processes() -> None:
    call("unshare", NEW_PIDS)


def unshare_mounts() -> None:
    call("unshare", NEW_MOUNTS)


def die_with_parent() -> None:
    call("prctl", SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of what children leave behind."""
    call("prctl", SET_SUBREAPER, 1, 0, 0, 0)


def hide_memory() -> None:
    """Let no process of the same user trace this one, or read its memory and files in /proc."""
    call("prctl", SET_DUMPABLE, 0, 0, 0, 0)


def can_be_nobody() -> bool:
    """Whether this is root, who is not bound by a limit of processes, and there is another user to become."""
    if os.geteuid() != 0:
        return False
    with open("/proc/self/uid_map", encoding="ascii") as file:
        return any(int(start) <= NOBODY < int(start) + int(count) for start, _, count in map(str.split, file))


def map_users(pid: int) -> str:
    """Give a child in a new user namespace its users: its own, and for root nobody; "m" and what went wrong."""
    try:
        folder, nobody = f"/proc/{pid}", f"{NOBODY} {NOBODY} 1\n" if can_be_nobody() else ""
        if not nobody:
            write(f"{folder}/setgroups", "deny")
        write(f"{folder}/uid_map", f"{os.geteuid()} {os.geteuid()} 1\n{nobody}")
        write(f"{folder}/gid_map", f"{os.getegid()} {os.getegid()} 1\n{nobody}")
    except OSError as error:
        return f"muid_map: {error.strerror}"
    return "m"


def write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def python_folders() -> dict[str, str]:
    """Where this Python has its files and the system its libraries: the folder, and what it is without links."""
    system = ["/usr", "/bin", "/sbin", "/nix", *(f"/lib{bits}" for bits in ("", "32", "64", "x32"))]
    packages = [path for path in sys.path if "site-packages" in path or "dist-packages" in path]
    found: dict[str, str] = {}
    for path in sorted(map(os.path.abspath, (*system, sys.base_prefix, sys.prefix, *packages)), key=len):
        if (
            path != "/"
            and os.path.isdir(path)
            and not any(f"{path}/".startswith(f"{other}/") for other in found)
        ):
            found[path] = os.path.realpath(path)
    return found


def new_root(folders: dict[str, str]) -> None:
    """Make a root folder of read-only copies of `folders`, with nothing of the old one but a few devices."""
    call("mount", None, b"/", None, RECURSIVE | PRIVATE, None)
    call("mount", b"root", b"/tmp", b"tmpfs", NO_SUID | NO_DEVICES, b"size=1m,mode=755")
    os.mkdir("/tmp/old")
    call("pivot_root", b"/tmp", b"/tmp/old")
    os.chdir("/")
    for name in ("dev", "etc", "home", "proc", "root", "run", "sys", "var", PRIVATE_FOLDER.strip("/")):
        os.mkdir(f"/{name}")
    for path, source in folders.items():
        os.makedirs(path, exist_ok=True)
        bind(source, path)
    for file in ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom", "/etc/ld.so.cache"):
        if os.path.exists(f"/old{file}"):
            write(file, "")
            bind(file, file)
    if not os.path.isdir("/tmp"):  # unless this Python is in there
        os.symlink(PRIVATE_FOLDER, "/tmp")
    call("umount2", b"/old", DETACH)
    os.rmdir("/old")
    socket.sethostname("sandbox")
    attributes = struct.pack("QQQQ", READ_ONLY, 0, 0, 0)
    call("syscall", MOUNT_SETATTR, AT_CWD, b"/", AT_RECURSIVE, attributes, len(attributes))


def bind(source: str, path: str) -> None:
    call("mount", f"/old{source}".encode(), path.encode(), None, BIND | RECURSIVE, None)


def private_folder() -> None:
    """Mount an empty folder that nobody else sees, and go there."""
    options = f"size={FOLDER_MB}m,nr_inodes=1024,mode=1777".encode()
    call("mount", b"private", PRIVATE_FOLDER.encode(), b"tmpfs", NO_SUID | NO_DEVICES, options)
    os.chdir(PRIVATE_FOLDER)


def give_up_rights(root: bool) -> None:
    """Leave no capability to this process and to what it starts."""
    call("prctl", SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    with contextlib.suppress(OSError):  # one after the other until there is none of that number
        for capability in range(64):
            call("prctl", DROP_BOUNDING, capability, 0, 0, 0)
    if root:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    deny_system_calls()


# System calls that a program has no use for: the memory of other processes, namespaces, mounts, keys, programs for
# the kernel, and memory that no limit counts. AUDIT_ARCH, the numbers of clone and of socket, and those, by machine.
DENIED = {
    "x86_64": (0xC000003E, 56, 41, "29 101 155 161 165 166 248 249 250 272 298 304 308 310 311 319 321 323"),
    "aarch64": (0xC00000B7, 220, 198, "39 40 41 51 97 117 194 217 218 219 241 265 268 270 271 279 280 282"),
}
DENIED_EVERYWHERE = "425 428 429 430 431 432 433 438 442 447"
CLONE3, NAMESPACES = 435, 0x7E020000


def deny_system_calls() -> None:
    """Answer them with "not permitted", by a seccomp filter, on the machines whose numbers are known."""
    if platform.machine() not in DENIED:
        return
    machine, clone, new_socket, numbers = DENIED[platform.machine()]
    load, equal, at_least, bits, done = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, deny, missing = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    # struct sock_filter: operation, instructions to skip if true and if false, operand
    code = [(load, 0, 0, 4), (equal, 1, 0, machine), (done, 0, 0, deny), (load, 0, 0, 0)]
    code += [(at_least, 0, 1, 0x40000000), (done, 0, 0, deny)]  # the x32 numbers of x86-64
    for number in (*numbers.split(), *DENIED_EVERYWHERE.split()):
        code += [(equal, 0, 1, int(number)), (done, 0, 0, deny)]
    code += [
        (equal, 0, 1, CLONE3),
        (done, 0, 0, missing),
    ]  # a filter cannot read its flags; clone comes instead
    code += [(equal, 0, 3, clone), (load, 0, 0, 16), (bits, 0, 1, NAMESPACES), (done, 0, 0, deny)]
    # Sockets of AF_UNIX, AF_INET and AF_INET6 belong to the namespace; AF_VSOCK does not, which reaches out of it.
    code += [
        (equal, 0, 6, new_socket),
        (load, 0, 0, 16),
        (equal, 3, 0, 1),
        (equal, 2, 0, 2),
        (equal, 1, 0, 10),
    ]
    code += [(done, 0, 0, deny), (done, 0, 0, allow)]
    code += [(done, 0, 0, allow)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in code))
    header = struct.pack("HxxxxxxP", len(code), ctypes.addressof(program))
    with contextlib.suppress(OSError):  # a kernel without seccomp
        call("prctl", SET_SECCOMP, 2, header, 0, 0)


def limit(seconds: float, address_space: int) -> None:
    """Set the limits of this process and of those it starts."""
    cpu = int(seconds) + 2  # the monitor keeps the time; this one ends what has escaped it
    for kind, value in (
        (resource.RLIMIT_CPU, cpu),
        (resource.RLIMIT_AS, address_space),
        (resource.RLIMIT_NPROC, PROCESSES),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_FSIZE, FILE_MB << 20),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        _, most = resource.getrlimit(kind)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, value))


def only_keep(*handles: int) -> None:
    """Close every open file but these; standard input is empty, output and error go nowhere."""
    null = os.open("/dev/null", os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    start = 3
    for handle in (*sorted(handles), 1 << 20 if most == resource.RLIM_INFINITY else most):
        os.closerange(start, handle)
        start = handle + 1
