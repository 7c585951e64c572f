"""Waiting for something that others bring about, as long as the one who asked is there."""

from __future__ import annotations

import asyncio

from .connection import Connection


class Changes:
    """Announcements without content: whoever waits looks again at what it waits for."""

    def __init__(self) -> None:
        """Begin with nobody waiting."""
        self.over = False
        """Nothing comes any more: the coordinator stops."""
        self._event = asyncio.Event()

    def announce(self) -> None:
        """Wake everybody who waits now, in the order of their coming."""
        event, self._event = self._event, asyncio.Event()
        event.set()

    def end(self) -> None:
        """Announce for the last time."""
        self.over = True
        self.announce()

    async def next(self, connection: Connection, seconds: float) -> None:
        """Wait for the next announcement, the end of the connection, or so long."""
        waits = {
            asyncio.ensure_future(self._event.wait()),
            asyncio.ensure_future(connection.gone.wait()),
        }
        try:
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
