"""The memory servers of a run: what to start, what programs are told of them, and counting their pages at the end.

They are processes like the coordinator, but nobody starts them again: what one held went with it. Programs
find them by ``dmrpc_net.attach()`` without arguments.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dmrpc_cxl.errors import DmError

from .topology import Program

SECRET = "memory-secret"  # in the folder of the run, which no other user may enter
COUNT_SECONDS = 10.0


class MemoryServers:
    """Memory servers, one after the other, all with one secret."""

    def __init__(self, folder: Path, number: int, size: int, log_level: str) -> None:
        """Plan so many servers with pools of so many bytes; the secret will be in that folder."""
        self.names = [f"memory-{index}" for index in range(number)]
        self.addresses: list[str] = []
        """Of those that serve."""
        self.pids: list[int] = []
        """Of the same."""
        self.secret = folder / SECRET
        """The file that it is in."""
        self._size = size
        self._log_level = log_level

    def program(self, number: int, ready_fd: int) -> Program:
        """Return what to run for one of them."""
        options = ["--secret", str(self.secret), "--number", str(number), "--size", str(self._size)]
        options += ["--log-level", self._log_level, "--ready-fd", str(ready_fd)]
        return Program((sys.executable, "-m", "dmrpc_net.server", *options))

    def serves(self, line: str) -> None:
        """Take the line that a server writes when it serves."""
        _, pid, address = line.split()[:3]
        self.addresses.append(address)
        self.pids.append(int(pid.removeprefix("pid=")))

    def count(self) -> tuple[bool, str]:
        """Account for every page, now that their clients have gone; tell whether all is well, and what was found."""
        import dmrpc_net  # only for runs that have memory servers

        try:
            with dmrpc_net.attach(
                self.addresses, secret=self.secret, deadline=COUNT_SECONDS
            ) as client:
                found = client.audit()
        except DmError as error:
            return False, f"the pages of the memory servers cannot be counted: {error}"
        total, free = found["nr_pages"], found["nr_free"]
        if free == total and not found["nr_refs"] and not found["nr_violations"]:
            return True, f"all {total} pages of the memory servers are free, and no Ref is alive"
        return False, (
            f"{free} of {total} pages of the memory servers are free, {found['nr_refs']} Refs are alive, "
            f"{found['nr_violations']} violations"
        )
