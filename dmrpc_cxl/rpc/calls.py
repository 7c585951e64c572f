"""The call that is being served: deadline, cancellation, metadata. What nested calls inherit.

The context of a call is a context variable: it follows threads of the server's pool, tasks, and whatever copies the context.
A client asks for it and never waits longer than the caller up the chain; a cancelled call cancels the calls it waits for.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from ..errors import CallCancelled, DeadlineExceeded

__all__ = ["Call", "current_call"]

log = logging.getLogger("dmrpc.rpc")

_current: contextvars.ContextVar[Call | None] = contextvars.ContextVar("dmrpc call", default=None)


_hooks_lock = (
    threading.Lock()
)  # one for all calls: it is held for a moment, by nested and cancelled calls only


class Call:
    """A call, seen from the method that serves it.

    Attributes:
        method: its name.
        metadata: what the caller sent along.
        deadline: time.monotonic() at which the caller gives up; None: never.
    """

    __slots__ = (
        "_hooks",
        "about_to_block",
        "cancelled",
        "deadline",
        "metadata",
        "method",
        "peer",
        "since",
    )

    def __init__(
        self,
        method: str = "",
        metadata: dict[str, str] | None = None,
        deadline: float | None = None,
        peer: int = 0,
    ) -> None:
        self.method = method
        self.metadata = metadata if metadata is not None else {}
        self.deadline = deadline
        self.peer = peer
        self.since = 0.0  # time.monotonic() when it was read
        self.cancelled = False
        self.about_to_block: Callable[[], None] | None = None  # the server's: others may read on
        self._hooks: list[Callable[[], Any]] | None = None

    @property
    def time_left(self) -> float | None:
        """Seconds until the deadline; None: as long as it takes."""
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def check(self) -> None:
        """Raise CallCancelled or DeadlineExceeded when nobody waits for the result any more; for long methods."""
        if self.cancelled:
            raise CallCancelled(f"{self.method}: the caller cancelled this call")
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise DeadlineExceeded(f"{self.method}: the caller has given up waiting")

    def when_cancelled(self, hook: Callable[[], Any]) -> Callable[[], None]:
        """Have hook() called once the call is cancelled, at once if it is; returns what takes the hook away."""
        with _hooks_lock:
            now = self.cancelled
            if not now:
                if self._hooks is None:
                    self._hooks = []
                self._hooks.append(hook)
        if now:
            hook()

        def forget() -> None:
            with _hooks_lock:
                if self._hooks and hook in self._hooks:
                    self._hooks.remove(hook)

        return forget

    def cancel(self) -> None:
        """Mark the call as cancelled, and cancel what it waits for."""
        with _hooks_lock:
            if self.cancelled:
                return
            self.cancelled = True
            hooks, self._hooks = self._hooks or [], None
        for hook in hooks:
            try:
                hook()
            except (
                Exception
            ):  # an event loop that was closed; the others are to be told all the same
                log.debug("a call could not be told that it was cancelled", exc_info=True)


def current_call() -> Call | None:
    """Return the call that the running method serves; None outside of methods."""
    return _current.get()
