"""Signals to the launcher, as something that select(2) can wait for."""

from __future__ import annotations

import contextlib
import signal
import socket
from types import TracebackType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """While entered, signals that ask to stop are collected and not acted upon.

    One that was ignored before stays ignored: nohup and background jobs of scripts rely on it. Main
    thread only.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self._read, self._write = socket.socketpair()
        self._before: dict[signal.Signals, Any] = {}
        self._fd_before = -1

    def __enter__(self) -> Interrupts:
        self._read.setblocking(False)
        self._write.setblocking(False)
        # Python writes the number of every signal that it handles to this descriptor.
        self._fd_before = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, lambda *_: None)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        self._read.close()
        self._write.close()

    def fileno(self) -> int:
        """Return a descriptor that is readable when there is something to take."""
        return self._read.fileno()

    def take(self) -> list[signal.Signals]:
        """Return the signals since the last call."""
        found = bytearray()
        with contextlib.suppress(BlockingIOError):
            while data := self._read.recv(4096):
                found += data
        return [signal.Signals(number) for number in found if number in (*STOPPING, signal.SIGPIPE)]

    def post(self, number: signal.Signals) -> None:
        """Behave as if a signal had come; from any thread, also after the end."""
        with contextlib.suppress(OSError):
            self._write.send(bytes([number]))
