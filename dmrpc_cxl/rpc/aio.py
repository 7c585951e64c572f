"""The asyncio client: a connection for one event loop, driven by the doorbell."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import Callable, Coroutine
from typing import Any

from ..errors import CallCancelled, DeadlineExceeded, DmError, PeerLost, ProtocolViolation
from ..host import Host
from . import frames
from .calls import _current
from .channel import Channel, Parts
from .client import Backoff, Connection, Link, MethodTable, Options, Pending, Prepared
from .frames import Welcome
from .marshal import Encoded, Reader

__all__ = ["AsyncMethods"]

MAX_BACKLOG_BYTES = 64 << 20


class _AsyncPending(Pending):
    """A call that a task waits for."""

    __slots__ = ("future",)

    def __init__(
        self, method: str, reader: Reader, deadline: float | None, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(method, reader, deadline)
        self.future: asyncio.Future[Any] = loop.create_future()

    def settle(self, value: Any, error: BaseException | None) -> None:
        """See Pending."""
        if self.future.done():
            return
        if error is None:
            self.future.set_result(value)
        else:
            self.future.set_exception(error)


class AsyncConnection(Connection):
    """A connection that belongs to one event loop. Context: everything runs there."""

    def __init__(
        self,
        host: Host,
        service: str,
        channel: Channel,
        welcome: Welcome,
        table: MethodTable,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(host, service, channel, welcome)
        self.table = table
        self.loop = loop
        self._backlog: collections.deque[tuple[Parts, int, int]] = collections.deque()
        self._backlog_bytes = 0
        self._room = asyncio.Event()
        self._room.set()
        self._writing = False
        loop.add_reader(channel.fileno(), self._ring)
        self._control = getattr(channel, "control", None)
        if self._control is not None:
            loop.add_reader(self._control.fileno(), self._ended)
        self._ring()

    def _ring(self) -> None:
        channel = self.channel
        channel.quiet()
        try:
            while True:
                while (data := channel.recv()) is not None:
                    self.take(frames.parse(data))
                    del data
                if self._backlog:
                    self._flush()
                if not channel.arm():
                    return
        except (PeerLost, ProtocolViolation) as error:
            self.close(PeerLost(f"{self.service}: {error}"))
        except ValueError:
            self.close(PeerLost(f"{self.service}: the client was closed"))

    def _ended(self) -> None:
        self.channel.peer_ended()  # type: ignore[attr-defined]
        self._ring()

    def send_short(self, frame: bytes) -> None:
        """See Connection."""
        self._send((frame,))

    def _send(self, parts: Parts) -> None:
        total = sum(len(part) for part in parts)
        sent = 0 if self._backlog else self.channel.try_send(parts, 0)
        if sent < total:
            self._backlog.append((parts, sent, total))
            self._backlog_bytes += total - sent
            if self._backlog_bytes > MAX_BACKLOG_BYTES:
                self._room.clear()
            self._watch_writing()

    def _flush(self) -> None:
        while self._backlog:
            parts, sent, total = self._backlog[0]
            n = self.channel.try_send(parts, sent)
            self._backlog_bytes -= n
            if sent + n < total:
                self._backlog[0] = (parts, sent + n, total)
                break
            self._backlog.popleft()
        if self._backlog_bytes <= MAX_BACKLOG_BYTES:
            self._room.set()
        self._watch_writing()

    def _watch_writing(self) -> None:
        """Ask a socket to say when there is room; a ring's bell tells of room as well."""
        if self.channel.kind != "tcp" or bool(self._backlog) == self._writing:
            return
        self._writing = bool(self._backlog)
        if self._writing:
            self.loop.add_writer(self.channel.fileno(), self._writable)
        else:
            self.loop.remove_writer(self.channel.fileno())

    def _writable(self) -> None:
        try:
            self._flush()
        except PeerLost as error:
            self.close(PeerLost(f"{self.service}: {error}"))

    async def submit(
        self, call: Prepared, pending: _AsyncPending, encoded: Encoded, meta: bytes
    ) -> None:
        """Send a call; waits while too much is unsent.

        Raises:
            PeerLost: it was not sent.
        """
        if not self._room.is_set():
            await self._room.wait()
        if self.lost is not None:
            raise PeerLost(str(self.lost))
        pending.call_id = next(self.ids)
        left = None if pending.deadline is None else pending.deadline - time.monotonic()
        head = call.head(pending.call_id, encoded, meta, left)
        self.pending[pending.call_id] = pending
        try:
            self._send((head, *encoded.inline))
        except PeerLost as error:
            self.pending.pop(pending.call_id, None)
            self.close(PeerLost(f"{self.service}: {error}"))
            raise

    def close(self, error: DmError) -> None:
        """End it; tasks that wait get the error."""
        if self.lost is None:
            self.lost = error
            if not self.loop.is_closed():
                self.loop.remove_reader(self.channel.fileno())
                if self._writing:
                    self.loop.remove_writer(self.channel.fileno())
                if self._control is not None:
                    self.loop.remove_reader(self._control.fileno())
            self.channel.close()
        self.fail(error)
        self._room.set()


class AsyncMethods:
    """The methods of a service as coroutines; ``async with`` or :meth:`close` ends the connection."""

    def __init__(self, link: Link, options: Options) -> None:
        self._link = link
        self._options = options
        self._connection: AsyncConnection | None = None
        self._connecting: asyncio.Task[AsyncConnection] | None = None

    def __getattr__(self, name: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        if name.startswith("_"):
            raise AttributeError(name)
        caller = _AsyncCaller(self, name)
        self.__dict__[name] = caller.call
        return caller.call

    async def _get(self, deadline: float | None) -> AsyncConnection:
        loop = asyncio.get_running_loop()
        connection = self._connection
        if connection is not None:
            if connection.loop is not loop:
                if not connection.loop.is_closed():
                    raise RuntimeError(
                        f"{self._link.service}: this client's .aio belongs to another event loop; connect() again for this one"
                    )
                connection.close(PeerLost("its event loop was closed"))
            elif connection.lost is None and not connection.leaving:
                return connection
        if self._connecting is None or self._connecting.done():
            self._connecting = loop.create_task(self._connect(deadline))
        return await asyncio.shield(self._connecting)

    async def _connect(self, deadline: float | None) -> AsyncConnection:
        link = self._link
        loop = asyncio.get_running_loop()
        limit = time.monotonic() + link.connect_timeout
        give_up = limit if deadline is None else min(limit, deadline)
        backoff = Backoff()
        while True:
            if link.closed:
                raise PeerLost(f"{link.service}: the client was closed")
            try:
                left = max(0.05, give_up - time.monotonic())
                channel, welcome = await loop.run_in_executor(None, link.open, left)
                assert link.table is not None
                self._connection = AsyncConnection(
                    link.host, link.service, channel, welcome, link.table, loop
                )
                return self._connection
            except PeerLost:
                pause = backoff.pause()
                if link.nr_connects == 0 or time.monotonic() + pause >= give_up:
                    raise
                await asyncio.sleep(pause)

    async def close(self) -> None:
        """End the connection; calls under way fail with PeerLost. Idempotent."""
        self._close_now()

    def _close_now(self) -> None:
        if self._connection is not None:
            self._connection.close(PeerLost(f"{self._link.service}: the client was closed"))
            self._connection = None

    def close_soon(self) -> None:
        """End the connection, from any thread."""
        connection = self._connection
        if connection is not None:
            if connection.loop.is_closed() or not connection.loop.is_running():
                self._close_now()
            else:
                connection.loop.call_soon_threadsafe(self._close_now)

    async def __aenter__(self) -> AsyncMethods:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


class _AsyncCaller(Prepared):
    """A method of an asyncio client."""

    __slots__ = ("methods",)

    def __init__(self, methods: AsyncMethods, name: str) -> None:
        super().__init__(methods._link, methods._options, name)
        self.methods = methods

    async def call(self, *arguments: Any, **keywords: Any) -> Any:
        """Call the method."""
        deadline = self.deadline(self.options.timeout)
        connection = await self.methods._get(deadline)
        if self.table is not connection.table:
            self.link.table = connection.table
            self.look_up()
        encoded = self.encode(arguments, keywords)
        pending = _AsyncPending(self.name, self.reader, deadline, connection.loop)
        pending.refs = encoded.refs
        try:
            try:
                await connection.submit(self, pending, encoded, self.meta)
            except PeerLost:
                connection = await self.methods._get(deadline)
                await connection.submit(self, pending, encoded, self.meta)
        except BaseException:
            if pending.refs:
                self.link.host.drop_refs(pending.refs)
            raise
        return await self._wait(connection, pending)

    async def _wait(self, connection: AsyncConnection, pending: _AsyncPending) -> Any:
        timer = forget = None
        where = f"{self.link.service}.{self.name}"
        if pending.deadline is not None:
            late = DeadlineExceeded(f"{where}: no reply in time")
            timer = connection.loop.call_later(
                pending.deadline - time.monotonic(), connection.give_up, pending, late
            )
        call = _current.get()
        if call is not None:
            gone = CallCancelled(f"{call.method}: the caller cancelled")
            forget = call.when_cancelled(
                lambda: connection.loop.call_soon_threadsafe(connection.give_up, pending, gone)
            )
        try:
            return await pending.future
        except asyncio.CancelledError:
            connection.give_up(pending, CallCancelled(f"{where}: cancelled"))
            raise
        finally:
            if timer is not None:
                timer.cancel()
            if forget is not None:
                forget()
            with contextlib.suppress(asyncio.CancelledError, asyncio.InvalidStateError):
                if pending.future.done() and not pending.future.cancelled():
                    pending.future.exception()
