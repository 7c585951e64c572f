"""Calling: a client's methods are the service's, waited for, as futures, or from asyncio (aio.py)."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, TypeAlias

from .._native import crash_point
from ..errors import (
    CallCancelled,
    DeadlineExceeded,
    LocalProtocolError,
    PeerLost,
)
from . import frames
from .calls import _current
from .frames import CALL
from .link import Link, MethodTable, positional
from .marshal import FLAGS_OF, TRANSFERS, Encoded, Serializer, Transfer
from .sync import CallFuture, SyncPending, await_nested

if TYPE_CHECKING:
    from .aio import AsyncMethods

__all__ = ["CallFuture", "Client", "ClientInterceptor"]

log = logging.getLogger("dmrpc.rpc")

ClientInterceptor: TypeAlias = Callable[["Outbound", Callable[[], Any]], Any]

READ_ALONG = (
    64  # every so many calls sent ahead, replies are taken: the server must not be left with them
)
IDLE_SECONDS = 0.001  # a connection that was not used for so long is looked at before it is used


class Outbound:
    """A call about to be made: what interceptors of a client see, and may change before they proceed.

    Attributes:
        service, method: names.
        arguments: positional; keywords have been turned into positions.
        metadata: str to str, sent along.
        timeout: seconds; None: as long as it takes.
    """

    __slots__ = ("arguments", "metadata", "method", "service", "timeout")

    def __init__(
        self,
        service: str,
        method: str,
        arguments: tuple[Any, ...],
        metadata: dict[str, str],
        timeout: float | None,
    ) -> None:
        self.service = service
        self.method = method
        self.arguments = arguments
        self.metadata = metadata
        self.timeout = timeout


class Options:
    """How calls are made; shared by a client and changed by :meth:`Client.using` for a copy of it."""

    __slots__ = ("interceptors", "metadata", "serializer", "timeout", "transfer")

    def __init__(
        self,
        timeout: float | None,
        transfer: Transfer,
        serializer: Serializer,
        metadata: dict[str, str],
        interceptors: Sequence[ClientInterceptor],
    ) -> None:
        if transfer not in TRANSFERS:
            raise ValueError(f"transfer: one of {', '.join(TRANSFERS)}, not {transfer!r}")
        if serializer not in ("msgpack", "pickle"):
            raise ValueError(f"serializer: 'msgpack' or 'pickle', not {serializer!r}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"a timeout of {timeout} s")
        self.timeout = timeout
        self.transfer = transfer
        self.serializer: Serializer = serializer
        self.metadata = metadata
        self.interceptors = tuple(interceptors)


class Client:
    """A service, called from here: its methods are the service's. Made by :meth:`Host.connect`; thread-safe.

    ``client.method(...)`` waits for the result, ``client.future.method(...)`` returns a CallFuture, ``await
    client.aio.method(...)`` is for asyncio. ``client.using(timeout=1).method(...)`` calls with other options.
    """

    def __init__(self, link: Link, options: Options) -> None:
        self._link = link
        self._options = options
        self._aio: AsyncMethods | None = None
        self._future: FutureMethods | None = None

    # Methods of the service are found here, once; afterwards they are attributes.
    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if self._link.table is None:
            self._link.get(None)
        assert self._link.table is not None
        self._link.table.get(self._link.service, name)
        bound = _Caller(self._link, self._options, name)
        self.__dict__[name] = bound
        return bound

    def __dir__(self) -> list[str]:
        table = self._link.table
        return sorted({*object.__dir__(self), *(table.methods if table else ())})

    @property
    def future(self) -> FutureMethods:
        """The methods of the service, returning a CallFuture at once: many calls outstanding on one connection."""
        if self._future is None:
            self._future = FutureMethods(self)
        return self._future

    @property
    def aio(self) -> AsyncMethods:
        """The methods of the service as coroutines, for the running asyncio loop; a connection of its own."""
        if self._aio is None:
            from .aio import AsyncMethods

            self._aio = AsyncMethods(self._link, self._options)
        return self._aio

    def using(
        self,
        *,
        timeout: float | EllipsisType | None = ...,
        transfer: Transfer | None = None,
        serializer: Serializer | None = None,
        metadata: dict[str, str] | None = None,
    ) -> Any:
        """Return the same client with other options; the connection is shared.

        Args:
            timeout: seconds per call; None: none of its own.
            transfer: "auto", "value", "ref", "copy".
            serializer: "msgpack" or "pickle".
            metadata: sent along with every call, added to the client's.
        """
        mine = self._options
        options = Options(
            mine.timeout if isinstance(timeout, EllipsisType) else timeout,
            transfer or mine.transfer,
            serializer or mine.serializer,
            {**mine.metadata, **(metadata or {})},
            mine.interceptors,
        )
        return Client(self._link, options)

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received in messages so far, handshakes left out; calls from asyncio are not counted."""
        return self._link.traffic()

    def close(self) -> None:
        """End the connection; calls under way fail with PeerLost. Idempotent."""
        self._link.close()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        connection = self._link.connection
        how = (
            connection.channel.kind
            if connection is not None and connection.lost is None
            else "not connected"
        )
        return f"<Client of {self._link.service!r}, {how}>"


_NO_ARGUMENTS = Encoded(b"\x90", 0, b"", (), 0)
_new_tuple = tuple.__new__
_head, _parse = frames.head, frames.parse
_monotonic = time.monotonic


class Prepared:
    """Makes the calls of one method."""

    __slots__ = ("flags", "link", "meta", "method", "name", "number", "options", "reader", "table")

    def __init__(self, link: Link, options: Options, name: str) -> None:
        self.link = link
        self.options = options
        self.name = name
        self.table: MethodTable | None = None
        self.flags = FLAGS_OF[options.transfer]
        self.meta = frames.encode(options.metadata) if options.metadata else b""

    def look_up(self, table: MethodTable) -> None:
        """Find the method in the table of the connection, which may be a new one."""
        self.number, self.method = table.get(self.link.service, self.name)
        self.reader = table.readers[self.name]
        self.table = table
        self.flags = FLAGS_OF[self.options.transfer] | table.flags

    def deadline(self, timeout: float | None) -> float | None:
        """Return when the call is to end: its own time-out, or the caller's up the chain."""
        deadline = None if timeout is None else time.monotonic() + timeout
        call = _current.get()
        if call is not None:
            call.check()
            if call.deadline is not None and (deadline is None or call.deadline < deadline):
                deadline = call.deadline
        return deadline

    def encode(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Encoded:
        """Return the arguments as the parts of a frame."""
        method, options = self.method, self.options
        if keywords or not method.nr_required <= len(arguments) <= len(method.parameters):
            assert self.table is not None
            defaults = self.table.defaults.get(self.name, {})
            arguments = positional(self.link.service, method, arguments, keywords, defaults)
        marshaller, transfer, serializer = (
            self.link.marshaller,
            options.transfer,
            options.serializer,
        )
        if serializer == "msgpack":
            if not arguments:
                return _NO_ARGUMENTS
            body = marshaller.plain(arguments, transfer)
            if body is not None:
                return _new_tuple(Encoded, (body, 0, b"", (), 0, ()))
        assert self.table is not None
        return marshaller.write(arguments, transfer, serializer, reach=self.table.reach)

    def head(
        self, call_id: int, encoded: Encoded, meta: bytes, left: float | None, max_frame: int
    ) -> bytes:
        """Return the frame of a call up to the inline part; left is its time in seconds.

        Raises:
            LocalProtocolError: the server would not take it.
            DeadlineExceeded: there is no time left.
        """
        left_us = 0
        if left is not None:
            if left <= 0:
                raise DeadlineExceeded(f"{self.link.service}.{self.name}: no time is left")
            left_us = int(left * 1e6) or 1
        body, flags, refs, _, inline_bytes, _ = encoded
        head = _head(
            CALL, call_id, self.flags | flags, refs, meta, body, self.number, left_us, inline_bytes
        )
        if len(head) + encoded.inline_bytes > max_frame:
            raise LocalProtocolError(
                f"{self.link.service}.{self.name}: a message of {len(head) + encoded.inline_bytes} bytes; the service "
                f"takes at most {max_frame}: send large arguments by Ref"
            )
        return head


class _Caller(Prepared):
    """A method of a client."""

    __slots__ = ()

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        if self.options.interceptors:
            return self._intercepted(arguments, keywords)
        return self._wait(self.start(arguments, keywords, self.options.timeout, self.meta))

    def _wait(self, pending: SyncPending) -> Any:
        try:
            if _current.get() is None:
                pending.connection.await_(pending)
            else:
                await_nested(pending)
        except BaseException as error:  # Ctrl-C: nobody will wait for it any more
            pending.connection.give_up(pending, CallCancelled(f"interrupted: {error!r}"))
            raise
        if pending.error is not None:
            try:
                raise pending.error
            finally:  # no circle over this frame: it would keep the arguments until the collector runs
                del pending
        return pending.value

    def start(
        self,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        timeout: float | None,
        meta: bytes,
    ) -> SyncPending:
        """Send a call. When the connection turns out to be dead before the call is sent, over a new one."""
        link = self.link
        now = _monotonic()
        if _current.get() is None:
            deadline = None if timeout is None else now + timeout
        else:
            deadline = self.deadline(timeout)
        connection = link.connection
        if connection is None or connection.lost is not None or connection.leaving:
            connection = link.get(deadline)
        if now - connection.used > IDLE_SECONDS and not connection.pending:
            connection.look()
            if connection.lost is not None or connection.leaving:
                connection = link.get(deadline)
        connection.used = now
        if self.table is not connection.table:
            self.look_up(connection.table)
        encoded = self.encode(arguments, keywords)
        pending = SyncPending(self.name, self.reader, deadline)
        pending.refs = encoded.refs
        if encoded.refs:
            crash_point("call_written")
        try:
            try:
                connection.submit(self, pending, encoded, meta)
            except PeerLost:
                connection = link.get(deadline)
                if self.table is not connection.table:
                    self.look_up(connection.table)
                    pending.reader = self.reader
                connection.submit(self, pending, encoded, meta)
        except BaseException:
            link.marshaller.take_back(encoded)
            raise
        if encoded.refs:
            crash_point("call_sent")
        return pending

    def _intercepted(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        if self.table is None:
            self.look_up(self.link.get(self.deadline(self.options.timeout)).table)
        assert self.table is not None
        defaults = self.table.defaults.get(self.name, {})
        arguments = positional(self.link.service, self.method, arguments, keywords, defaults)
        outbound = Outbound(
            self.link.service,
            self.name,
            arguments,
            dict(self.options.metadata),
            self.options.timeout,
        )

        def proceed() -> Any:
            meta = frames.encode(outbound.metadata) if outbound.metadata else b""
            return self._wait(self.start(outbound.arguments, {}, outbound.timeout, meta))

        for interceptor in reversed(self.options.interceptors):
            proceed = _Step(interceptor, outbound, proceed)
        return proceed()


class _Step:
    """An interceptor and what comes behind it."""

    __slots__ = ("interceptor", "outbound", "proceed")

    def __init__(
        self, interceptor: ClientInterceptor, outbound: Outbound, proceed: Callable[[], Any]
    ) -> None:
        self.interceptor = interceptor
        self.outbound = outbound
        self.proceed = proceed

    def __call__(self) -> Any:
        return self.interceptor(self.outbound, self.proceed)


class FutureMethods:
    """The methods of a service; each returns a :class:`CallFuture`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., CallFuture]:
        if name.startswith("_"):
            raise AttributeError(name)
        caller: _Caller = getattr(self._client, name)

        def start(*arguments: Any, **keywords: Any) -> CallFuture:
            pending = caller.start(arguments, keywords, caller.options.timeout, caller.meta)
            if not pending.call_id % READ_ALONG:
                pending.connection.poll()
            return CallFuture(pending)

        self.__dict__[name] = start
        return start
