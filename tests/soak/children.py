"""Forked processes: a few milliseconds each, where a new interpreter would take half a second.

The driver has no threads and is attached to nothing, so its children may do what any process may. They die with it. A
pidfd says when one has ended, and is what signals are sent to.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


class Child:
    """One process."""

    def __init__(
        self, log: Path, keep: tuple[int, ...], function: Callable[..., Any], *args: Any
    ) -> None:
        """Start a process that calls a function, with its stderr at the end of a file, and these descriptors."""
        driver = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _run(driver, log, keep, function, args)
        self.pidfd = os.pidfd_open(self.pid)
        self.stopped = False
        self.exit_code: int | None = None

    def fileno(self) -> int:
        """Return what becomes readable when the process has ended."""
        return self.pidfd

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        if self.exit_code is None:
            if number == signal.SIGSTOP:
                self.stopped = True
            elif number == signal.SIGCONT:
                self.stopped = False
            signal.pidfd_send_signal(self.pidfd, number)

    def wait(self) -> int:
        """Wait until it has ended; return its exit code, negative if it was a signal."""
        if self.exit_code is None:
            _, status = os.waitpid(self.pid, 0)
            self.exit_code = os.waitstatus_to_exitcode(status)
            os.close(self.pidfd)
        return self.exit_code


def _close_all_but(keep: tuple[int, ...]) -> None:
    begin = 3
    for fd in (*sorted(keep), os.sysconf("SC_OPEN_MAX")):
        os.closerange(begin, fd)
        begin = fd + 1


def _run(
    driver: int,
    log: Path,
    keep: tuple[int, ...],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> NoReturn:
    code = 1
    try:
        _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != driver:
            os._exit(1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _close_all_but(keep)
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(fd, 2)
        os.close(fd)
        gc.freeze()
        faulthandler.enable()
        function(*args)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(bool(error.code))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


class KillTimer:
    """A timer of the kernel that kills this very process, at whatever instruction it is then.

    Operations last microseconds, and what lies between them much longer. So whoever is about to begin one calls `strike`,
    from which on the time counts.
    """

    class _Event(ctypes.Structure):  # struct sigevent
        _fields_ = (
            ("value", ctypes.c_void_p),
            ("signo", ctypes.c_int),
            ("notify", ctypes.c_int),
            ("rest", ctypes.c_char * 48),
        )

    class _Times(ctypes.Structure):  # struct itimerspec
        _fields_ = (
            ("interval_s", ctypes.c_long),
            ("interval_ns", ctypes.c_long),
            ("first_s", ctypes.c_long),
            ("first_ns", ctypes.c_long),
        )

    def __init__(self) -> None:
        library = _libc if hasattr(_libc, "timer_create") else ctypes.CDLL("librt.so.1")
        self._settime = library.timer_settime
        self._timer = ctypes.c_void_p()
        event = self._Event(signo=int(signal.SIGKILL), notify=0)  # SIGEV_SIGNAL
        monotonic = 1
        if library.timer_create(monotonic, ctypes.byref(event), ctypes.byref(self._timer)):
            raise OSError("timer_create failed")

        self._times: Any = None
        self.stop()  # the first call takes long
        self.stop()

    def arm(self, nanoseconds: int) -> None:
        """Have the next strike kill this process after so long."""
        assert 0 < nanoseconds < 1_000_000_000
        self._times = ctypes.byref(self._Times(first_s=0, first_ns=nanoseconds))

    def strike(self) -> None:
        """Let the time run, if armed; harmless to call again."""
        if self._times is not None:
            self._settime(self._timer, 0, self._times, None)
            self._times = None

    def stop(self) -> None:
        """Kill nobody."""
        self._times = None
        self._settime(self._timer, 0, ctypes.byref(self._Times()), None)
