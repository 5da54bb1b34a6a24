"""What a process can be kept from, by the kernel: time, memory, files, network, other processes.

Each guard that the kernel allows stays for the process and all that it starts, and cannot be taken back. All of them
work without privileges. Only the standard library: this runs under `python -s -P -S`.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys

NAMESPACES, LANDLOCK, SECCOMP = "namespaces", "landlock", "seccomp"
ALL = (NAMESPACES, LANDLOCK, SECCOMP)
CUT_THE_NETWORK = (NAMESPACES, SECCOMP)

_NEW_USER, _NEW_NET, _NEW_IPC, _NEW_MOUNTS = 0x10000000, 0x40000000, 0x08000000, 0x00020000
_NOSUID_NODEV_NOEXEC = 2 | 4 | 8
_MOST_FILES = 4096
_SET_DEATH_SIGNAL, _SET_DUMPABLE, _SET_SECCOMP, _NO_NEW_PRIVILEGES = 1, 4, 22, 38
_EPERM, _ENOSYS = 1, 38
_SIGKILL = 9
_CAPABILITIES_3 = 0x20080522
"""Version of capset's arguments: three sets of 64 bits, in two halves."""

_DENIED = {
    "socket": (41, 198), "connect": (42, 203), "accept": (43, 202), "accept4": (288, 242), "sendto": (44, 206),
    "sendmsg": (46, 211), "bind": (49, 200), "listen": (50, 201), "socketpair": (53, 199), "fork": (57, None),
    "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "kill": (62, 129), "tkill": (200, 130),
    "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "setpgid": (109, 154), "setsid": (112, 157),
    "setrlimit": (160, 164), "prlimit64": (302, 261), "mount": (165, 40), "umount2": (166, 39), "chroot": (161, 51),
    "pivot_root": (155, 41), "unshare": (272, 97), "setns": (308, 268), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190),
    "init_module": (175, 105), "finit_module": (313, 273), "reboot": (169, 142),
    # Landlock is about the content of files. These change what else there is about one, wherever it is; truncate is
    # content, which Landlock knows since its third version only.
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "setxattrat": (463, 463), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "removexattrat": (466, 466), "file_setattr": (469, 469), "truncate": (76, 45),
    # How much of the machine other processes of the user get: their priority, processors, memory nodes.
    "setpriority": (141, 140), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122), "sched_setattr": (314, 274), "ioprio_set": (251, 30), "migrate_pages": (256, 238),
    "move_pages": (279, 239), "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272),
    # Memory that neither the limit of the address space nor that of the disk counts.
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
}  # fmt: skip
"""System calls that an answer to a programming task has no use for, with their numbers on x86_64 and on aarch64; None:
there is no such call."""
_MACHINES = ("x86_64", "aarch64")
_AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_CLONE, _CLONE3 = {"x86_64": 56, "aarch64": 220}, 435
_CLONE_THREAD = 0x10000

_libc = ctypes.CDLL(None, use_errno=True)


def limit(*, cpu_s: int, memory_bytes: int, file_bytes: int, processes: int | None) -> None:
    """Resource limits; `processes` holds for users other than root, None: no limit."""
    wanted = {
        resource.RLIMIT_CPU: cpu_s,
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        **{getattr(resource, name): 0 for name in ("RLIMIT_NICE", "RLIMIT_RTPRIO") if hasattr(resource, name)},
    }
    if processes is not None:
        wanted[resource.RLIMIT_NPROC] = processes
    for what, most in wanted.items():
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def die_with_parent() -> None:
    """Ends this process when the one that started it ends."""
    if sys.platform == "linux":
        _libc.prctl(_SET_DEATH_SIGNAL, _SIGKILL, 0, 0, 0)


def hide_memory() -> None:
    """Other processes of the user cannot look into this one."""
    if sys.platform == "linux":
        _libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0)


def drop_privileges() -> None:
    """Nothing that only root may do is allowed any more: the clock, device files, modules, the names of the machine. A
    user namespace gives such rights anew, though only over itself."""
    if sys.platform == "linux":
        header, none = struct.pack("=Ii", _CAPABILITIES_3, 0), bytes(24)
        if _libc.capset(header, none) != 0:
            raise OSError(ctypes.get_errno(), "the privileges could not be dropped")


def enter_namespaces() -> bool:
    """A user namespace without privileges outside, a network that has no interface up, and mounts of its own."""
    return sys.platform == "linux" and _libc.unshare(_NEW_USER | _NEW_NET | _NEW_IPC | _NEW_MOUNTS) == 0


def small_disk(path: str, total_bytes: int, *, user: int, group: int) -> bool:
    """In namespaces: an empty disk in memory at `path`, which holds so many bytes and is gone with the processes."""
    try:  # without a number of its own in the namespace, a user can make no files there
        for name, content in (
            ("setgroups", "deny"),
            ("uid_map", f"{user} {user} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as setting:
                setting.write(content)
    except OSError:
        return False
    options = f"size={total_bytes},nr_inodes={_MOST_FILES},mode=700".encode()
    return _libc.mount(b"answer", os.fsencode(path), b"tmpfs", _NOSUID_NODEV_NOEXEC, options) == 0


def only_files(*, readable: list[str], writable: list[str]) -> bool:
    """Landlock: nothing else of the file system can be opened. Paths that do not exist are passed over."""
    version = _libc.syscall(444, None, 0, 1) if sys.platform == "linux" else -1
    if version < 1:
        return False
    # Rights by version of the interface: files and directories; moving; truncating; ioctl on devices.
    everything = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    for_files = everything & (0b111 | 1 << 14 | 1 << 15)
    read = 1 << 0 | 1 << 2 | 1 << 3  # execute, read a file, list a directory
    attribute = struct.pack("Q", everything)
    rules = _libc.syscall(444, attribute, len(attribute), 0)
    if rules < 0:
        return False
    for path, rights in [*((p, read) for p in readable), *((p, everything) for p in writable)]:
        if os.path.exists(path):
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rights &= everything if os.path.isdir(path) else for_files
            added = _libc.syscall(445, rules, 1, struct.pack("=Qi", rights, place), 0)
            os.close(place)
            if added != 0:
                return False
    _libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    done = _libc.syscall(446, rules, 0) == 0
    os.close(rules)
    return done


def deny_calls() -> bool:
    """Seccomp: no sockets, no new processes or programs, no signals to others or looks at them. Threads are allowed."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _MACHINES:
        return False
    code = _filter(machine)
    buffer = ctypes.create_string_buffer(code, len(code))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    program = Program(len(code) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    _libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    return _libc.prctl(_SET_SECCOMP, 2, ctypes.byref(program), 0, 0) == 0


def _filter(machine: str) -> bytes:
    """A classic BPF program over (number, architecture, …, first argument) of a system call."""
    load, jump_equal, jump_at_least, jump_bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000

    def line(operation: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", operation, if_true, if_false, value)

    lines = [
        line(load, 4),
        line(jump_equal, _AUDIT_ARCHITECTURE[machine], 1, 0),
        line(answer, kill),
        line(load, 0),
        line(jump_at_least, 0x40000000, 0, 1),  # x32, the other numbering of x86_64
        line(answer, refuse | _EPERM),
        line(jump_equal, _CLONE3, 0, 1),  # its arguments cannot be seen from here; glibc falls back to clone
        line(answer, refuse | _ENOSYS),
    ]
    for numbers in _DENIED.values():
        number = numbers[_MACHINES.index(machine)]
        if number is not None:
            lines += [line(jump_equal, number, 0, 1), line(answer, refuse | _EPERM)]
    lines += [
        line(jump_equal, _CLONE[machine], 0, 3),
        line(load, 16),
        line(jump_bits, _CLONE_THREAD, 1, 0),
        line(answer, refuse | _EPERM),
        line(answer, allow),
    ]
    return b"".join(lines)
