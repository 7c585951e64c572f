"""Who lives in a fabric.

A pid alone does not name a process: it is used again. A pid and the start time that the kernel
keeps for it do (/proc/PID/stat, field 22, in clock ticks after boot), and both stand in the device.
A process that has ended but was not yet waited for still has its line in /proc; its memory is gone,
so it is dead here. A pidfd tells: it is readable once the process has ended.

Pids mean something only inside their PID namespace. A tool that runs in another one than the fabric
sees nobody; the lock that the coordinator holds on the device file (see device.py) is seen
everywhere.
"""

from __future__ import annotations

import os
import select
from typing import Any, NamedTuple


def start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks after boot; None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The second field is the command in parentheses, which may hold spaces and parentheses.
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError):
        return None


def is_alive(pid: int, started: int) -> bool:
    """Tell whether the process with this pid that started then is running.

    A start time of 0 stands for an unknown one: any process with that pid will do.
    """
    if pid <= 0:
        return False
    try:
        pidfd = os.pidfd_open(pid)
    except PermissionError:  # a sandbox without pidfds
        return start_time(pid) is not None and started in (0, start_time(pid))
    except OSError:
        return False
    try:
        # While the pidfd is not readable, the pid is its process's: the start time read between is, too.
        found = start_time(pid)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return not poll.poll(0) and found is not None and started in (0, found)
    finally:
        os.close(pidfd)


class Inhabitant(NamedTuple):
    """A live process that belongs to a fabric."""

    role: str
    """"coordinator" or "host"."""
    pid: int
    host: int
    """Host id; 0 for the coordinator."""
    name: str

    def __str__(self) -> str:
        """Say who it is, for messages."""
        if self.role == "coordinator":
            return f"coordinator (pid {self.pid})"
        return f"host {self.host} {self.name!r} (pid {self.pid})"


def inhabitants(superblock: dict[str, Any], hosts: list[dict[str, Any]]) -> list[Inhabitant]:
    """List the live coordinator and hosts that a device's superblock and host entries name."""
    found = []
    pid = superblock["coordinator_pid"]
    if is_alive(pid, superblock["coordinator_start_time"]):
        found.append(Inhabitant("coordinator", pid, 0, ""))
    found.extend(
        Inhabitant("host", host["pid"], host["host"], host["name"])
        for host in hosts
        if is_alive(host["pid"], host["start_time"])
    )
    return found
