"""A service that runs, and what it counts."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

import msgspec

import dmrpc_cxl


class Counting:
    """What services count, by name; threads may share it."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, what: str) -> int:
        """Add one, and return how many there are now."""
        with self._lock:
            self._counts[what] += 1
            return self._counts[what]

    def counts(self) -> dict[str, int]:
        """Return all counts so far."""
        with self._lock:
            return dict(self._counts)


class Account(msgspec.Struct):
    """What a service has counted."""

    counts: dict[str, int]
    bytes_forwarded: int = 0
    """Of the calls and replies that it passed on."""


class Running:
    """A service that runs."""

    def __init__(
        self,
        end: dmrpc_cxl.Server | dmrpc_cxl.Forwarder,
        counts: Callable[[], dict[str, int]] = dict,
    ) -> None:
        self.end = end
        self._counts = counts

    def account(self) -> Account:
        """Return what was counted so far."""
        if isinstance(self.end, dmrpc_cxl.Forwarder):
            forwarded = {f"to {name}": n for name, n in self.end.forwarded_to.items()}
            return Account({**self._counts(), **forwarded}, self.end.bytes_forwarded)
        return Account(self._counts())

    def stop(self) -> None:
        """End it."""
        self.end.stop()
