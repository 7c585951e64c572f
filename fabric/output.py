"""Lines of several programs on one output, whole and each with its program's name.

A program writes to a pipe of its own, stdout and stderr alike, so the order of its lines is its own
order. One thread for each pipe cuts what comes into lines and hands whole lines to write(2) under a
lock that all of them share. A program that writes faster than the output takes it waits, as it would
without us; whoever watches the processes never does.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable

READ_BYTES = 65536
MAX_LINE_BYTES = 1 << 20  # a longer line is cut, lest a program without newlines fills the memory


class Lines:
    """The output of one run."""

    def __init__(self, out: int, err: int, width: int) -> None:
        """Write programs' lines to the descriptor `out`, our own to `err`; names take `width` columns."""
        self.when_broken: Callable[[], None] = lambda: None
        """Called, once and in another thread, when nobody reads `out` any more."""
        self._out = out
        self._err = err
        self._width = width
        self._lock = threading.Lock()
        self._broken = False

    def say(self, text: str) -> None:
        """Print lines of the launcher's own."""
        data = b"".join(self._prefixed("fabric", line.encode()) for line in text.splitlines())
        with self._lock, contextlib.suppress(OSError):  # nobody listens
            _write(self._err, data)

    def follow(self, name: str, pipe: int) -> threading.Thread:
        """Print what comes from a pipe until its end, in a thread of its own, and close it."""
        thread = threading.Thread(target=self._copy, args=(name, pipe), name=name, daemon=True)
        thread.start()
        return thread

    def _copy(self, name: str, pipe: int) -> None:
        rest = b""
        while chunk := os.read(pipe, READ_BYTES):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) >= MAX_LINE_BYTES:
                lines.append(rest)
                rest = b""
            self._print(name, lines)
        self._print(name, [rest] if rest else [])
        os.close(pipe)

    def _print(self, name: str, lines: list[bytes]) -> None:
        data = b"".join(self._prefixed(name, line) for line in lines)
        with self._lock:
            if self._broken:
                return  # go on reading: a full pipe would hold up the program
            try:
                _write(self._out, data)
            except OSError:
                self._broken = True
        if self._broken:
            self.when_broken()

    def _prefixed(self, name: str, line: bytes) -> bytes:
        return f"{name:<{self._width}} | ".encode() + line + b"\n"


def _write(fd: int, data: bytes) -> None:
    """Write everything, also to a descriptor that somebody has made non-blocking."""
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            select.select([], [fd], [])
