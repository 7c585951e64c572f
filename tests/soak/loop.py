"""What the driver waits for: descriptors, and moments."""

from __future__ import annotations

import heapq
import itertools
import selectors
import time
from collections.abc import Callable
from typing import Any

from .holdings import Violation

SECONDS = 120.0  # longest wait for what is bound to happen


class Loop:
    """One thread that waits."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def watch(self, what: Any, call: Callable[[], None]) -> None:
        """Call whenever something is readable."""
        self._selector.register(what, selectors.EVENT_READ, call)

    def forget(self, what: Any) -> None:
        self._selector.unregister(what)

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call once, so much later."""
        heapq.heappush(self._agenda, (time.monotonic() + seconds, next(self._numbers), call))

    def turn(self, longest: float = 0.1) -> None:
        """Wait for the next thing to happen, not for long, and see to it."""
        if self._agenda:
            longest = min(longest, max(0.0, self._agenda[0][0] - time.monotonic()))
        for key, _ in self._selector.select(longest):
            key.data()
        now = time.monotonic()
        while self._agenda and self._agenda[0][0] <= now:
            heapq.heappop(self._agenda)[2]()

    def until(self, what: Callable[[], Any], text: str, longest: float = 0.1) -> Any:
        """Turn until something is true; return it."""
        give_up = time.monotonic() + SECONDS
        while not (value := what()):
            if time.monotonic() > give_up:
                raise Violation(f"not within {SECONDS:.0f} s: {text}")
            self.turn(longest)
        return value
