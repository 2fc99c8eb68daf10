"""Names for processes that others can tell alive from dead, where they run on the same machine."""

import contextlib
import functools
import os
import socket
from pathlib import Path

_BOOT = "/proc/sys/kernel/random/boot_id"  # another one after each start of each machine


def signature(pid: int | None = None) -> str:
    """<machine>-<process id>-<when it started>; of this process by default.

    The machine is its host name and, in Linux, its boot and the namespace of process ids. Machines
    may share a host name, and all have the same first namespace; containers may share both others
    and do not see each other's processes.
    """
    pid = os.getpid() if pid is None else pid
    return f"{_machine()}-{pid}-{_started(pid) or 0}"


def alive(name: str) -> bool | None:
    """Whether the process with this signature lives; None where it is not of this machine."""
    machine, _, rest = name.rpartition("-")[0].rpartition("-")
    pid, started = rest, name.rpartition("-")[2]
    if machine != _machine() or not (pid.isdecimal() and started.isdecimal()):
        return None
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    except OverflowError:
        return None
    now = _started(int(pid))
    return now is None or now == int(started)


def pid_of(name: str) -> int:
    """The process id in a signature."""
    return int(name.rsplit("-", 2)[1])


def parent_of(pid: int) -> int | None:
    """Id of the process that started this one; None where the system does not say."""
    fields = _fields(pid)
    return int(fields[1]) if fields else None


@functools.cache
def _machine() -> str:
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):  # no Linux
        found.append(f"{os.stat('/proc/self/ns/pid').st_ino:x}")
        found.append(Path(_BOOT).read_text().strip().replace("-", "")[:12])
    return ".".join(found)


def _started(pid: int) -> int | None:
    """In ticks since the machine started; 0 for one that is dead and waits to be noticed; None
    where the system does not say."""
    fields = _fields(pid)
    if len(fields) < 20:
        return None
    return 0 if fields[0] in "ZX" else int(fields[19])


def _fields(pid: int) -> list[str]:
    """What Linux says of a process, from its state on; nothing where the system does not say."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
