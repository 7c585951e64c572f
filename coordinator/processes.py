"""A process that is watched until it is gone.

A pid is reused; a pidfd names one process for ever, and becomes readable when the process has
ended. A zombie has: its memory is gone, only its exit status waits to be fetched. The state letter
in /proc/PID/stat is no substitute: it says Z as well when the main thread alone has ended.
"""

from __future__ import annotations

import errno
import os
import select

from dmrpc_cxl.fabric.liveness import start_time


class Process:
    """A process that was alive when it was looked for. Holds a pidfd until `close`."""

    def __init__(self, pid: int, started: int, pidfd: int) -> None:
        """Wrap what `find` found."""
        self.pid = pid
        self.start_time = started
        self.pidfd = pidfd

    @classmethod
    def find(cls, pid: int, started: int | None = None) -> Process | None:
        """Look for a live process, if `started` is given for the one that started then.

        Returns None when there is none. Raises OSError when descriptors run out.
        """
        if pid <= 0:
            return None
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise
            return None
        # The pidfd is of the process that has the pid now; if that is still alive after the start
        # time was read, then the start time is its own.
        found = start_time(pid)
        process = cls(pid, found or 0, pidfd)
        if found is None or process.gone or (started is not None and found != started):
            process.close()
            return None
        return process

    @property
    def gone(self) -> bool:
        """Tell whether the process has ended."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close the pidfd; does nothing the second time."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
