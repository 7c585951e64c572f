"""The asyncio client: a connection for one event loop, driven by the doorbell."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from .._native import crash_point
from ..errors import (
    CallCancelled,
    DeadlineExceeded,
    DmError,
    ForkedError,
    PeerLost,
    ProtocolViolation,
    ServiceNotFound,
)
from . import frames
from .calls import _current
from .channel import Channel, Parts
from .client import Options, Prepared
from .connection import Connection, Pending
from .forks import release
from .frames import Welcome
from .link import Backoff, Link, MethodTable
from .marshal import Encoded, Reader
from .places import Attachment

__all__ = ["AsyncMethods"]

T = TypeVar("T")
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
        host: Attachment,
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
            await _in_time(self._room.wait(), pending.deadline, f"{self.service}.{pending.method}")
        if self.lost is not None:
            raise PeerLost(str(self.lost))
        pending.call_id = next(self.ids)
        left = None if pending.deadline is None else pending.deadline - time.monotonic()
        head = call.head(pending.call_id, encoded, meta, left, self.channel.max_frame)
        self.pending[pending.call_id] = pending
        try:
            self._send((head, *encoded.inline))
        except (PeerLost, ValueError) as error:
            self.pending.pop(pending.call_id, None)
            self.close(PeerLost(f"{self.service}: {error}"))
            raise PeerLost(f"{self.service}: {error}") from None

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
        self._parted: list[AsyncConnection] = []  # replaced, with calls under way
        link.asyncs.add(self)

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
            else:
                self._parted.append(connection)
            self._connection = None
        self._link.check_usable()
        for parted in list(self._parted):
            if parted.lost is not None or not parted.pending or parted.loop.is_closed():
                parted.close(PeerLost(f"{self._link.service}: reconnecting"))
                self._parted.remove(parted)
        task = self._connecting
        if task is None or task.done() or task.get_loop() is not loop:
            self._connecting = task = loop.create_task(self._connect())
            task.add_done_callback(_heard)
        # Others wait for the same task: it has the time of none of them.
        return await _in_time(asyncio.shield(task), deadline, self._link.service)

    async def _connect(self) -> AsyncConnection:
        link = self._link
        loop = asyncio.get_running_loop()
        give_up = time.monotonic() + link.connect_timeout
        backoff = Backoff()
        while True:
            link.check_usable()
            try:
                left = max(0.05, give_up - time.monotonic())
                channel, welcome, table = await _opened(loop, link, left)
                if link.closed:
                    channel.close()
                    continue
                self._connection = AsyncConnection(
                    link.host, link.service, channel, welcome, table, loop
                )
                return self._connection
            except (PeerLost, ServiceNotFound):
                pause = backoff.pause()
                if link.closed or link.nr_connects == 0 or time.monotonic() + pause >= give_up:
                    raise
                await asyncio.sleep(pause)

    async def close(self) -> None:
        """End the connection; calls under way fail with PeerLost. Idempotent."""
        self._close_now()

    def _close_now(self) -> None:
        gone = PeerLost(f"{self._link.service}: the client was closed")
        for connection in (*self._parted, self._connection):
            if connection is not None:
                connection.close(gone)
        self._parted.clear()
        self._connection = None

    def after_fork(self) -> None:
        """In a child: let go of descriptors."""
        for connection in (*self._parted, self._connection):
            if connection is not None:
                connection.lost = ForkedError(f"{self._link.service}: used in a forked child")
                release(connection.channel)

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
            self.look_up(connection.table)
        encoded = self.encode(arguments, keywords)
        pending = _AsyncPending(self.name, self.reader, deadline, connection.loop)
        pending.refs = encoded.refs
        if encoded.refs:
            crash_point("call_written")
        try:
            try:
                await connection.submit(self, pending, encoded, self.meta)
            except PeerLost:
                connection = await self.methods._get(deadline)
                if self.table is not connection.table:
                    self.look_up(connection.table)
                    pending.reader = self.reader
                await connection.submit(self, pending, encoded, self.meta)
        except BaseException:
            self.link.marshaller.take_back(encoded)
            raise
        if encoded.refs:
            crash_point("call_sent")
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
                functools.partial(
                    connection.loop.call_soon_threadsafe, connection.give_up, pending, gone
                )
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
            del pending  # no circle over this frame, which would keep the arguments


async def _in_time(what: Awaitable[T], deadline: float | None, where: str) -> T:
    """Wait for something until a deadline.

    Raises:
        DeadlineExceeded: it takes longer.
    """
    if deadline is None:
        return await what
    try:
        return await asyncio.wait_for(what, max(0.0, deadline - time.monotonic()))
    except asyncio.TimeoutError as error:
        if isinstance(error, DmError):  # its own
            raise
        raise DeadlineExceeded(f"{where}: not sent in time") from None


async def _opened(
    loop: asyncio.AbstractEventLoop, link: Link, timeout: float
) -> tuple[Channel, Welcome, MethodTable]:
    """Connect on a thread that nobody waits for: neither a call with less time, nor the loop when it ends."""
    opened: asyncio.Future[tuple[Channel, Welcome, MethodTable]] = loop.create_future()

    def deliver(found: tuple[Channel, Welcome, MethodTable] | None, error: Exception) -> None:
        if opened.done():
            if found is not None:
                found[0].close()
        elif found is None:
            opened.set_exception(error)
        else:
            opened.set_result(found)

    def work() -> None:
        found, failure = None, Exception()
        try:
            found = link.open(timeout)
        except Exception as error:
            failure = error
        try:
            loop.call_soon_threadsafe(deliver, found, failure)
        except RuntimeError:  # the loop was closed
            if found is not None:
                found[0].close()

    thread = threading.Thread(target=work, name=f"{link.service}-connect", daemon=True)
    errands = getattr(link.host, "_errands", None)
    if errands is not None:
        errands.add(thread)
    thread.start()
    return await opened


def _heard(task: asyncio.Task[AsyncConnection]) -> None:
    """Keep asyncio from complaining of an exception that nobody was left to see."""
    if not task.cancelled():
        task.exception()
