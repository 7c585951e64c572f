"""A service as a client knows it: its methods, and the connection to it, made anew when it is lost."""

from __future__ import annotations

import logging
import random
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any

from ..errors import (
    DeadlineExceeded,
    ForkedError,
    InterfaceMismatch,
    PeerLost,
    ServiceNotFound,
    UnknownMethod,
    WrongArguments,
)
from . import endpoint
from .channel import Channel
from .forks import not_for_children, release
from .frames import Method, Welcome
from .interface import Interface
from .marshal import Marshaller, Reader
from .places import Attachment, Place, common, flags_of
from .sync import SyncConnection, SyncPending

if TYPE_CHECKING:
    from .aio import AsyncMethods

__all__ = ["Backoff", "Link", "MethodTable", "positional"]

log = logging.getLogger("dmrpc.rpc")

FIRST_BACKOFF = 0.01  # seconds before the second attempt to connect; doubles
LONGEST_BACKOFF = 1.0


class MethodTable:
    """The methods of a service, as the server named them; and where its arguments may lie."""

    def __init__(
        self, welcome: Welcome, interface: Interface | None, places: dict[type, Place]
    ) -> None:
        self.reach = common(places, welcome.reach)
        self.flags = flags_of(self.reach)
        self.methods = {
            method.name: (number, method) for number, method in enumerate(welcome.methods)
        }
        self.defaults = interface.defaults if interface else {}
        self.readers: dict[str, Reader] = {}
        for name in self.methods:
            wanted: Any = interface.results.get(name, Any) if interface else Any
            try:
                self.readers[name] = Reader(
                    tuple.__class_getitem__(wanted) if wanted is not Any else Any
                )
            except TypeError:  # an annotation that msgspec cannot check
                self.readers[name] = Reader()

    def get(self, service: str, name: str) -> tuple[int, Method]:
        """Return number and description of a method."""
        try:
            return self.methods[name]
        except KeyError:
            raise UnknownMethod(
                f"{service} has no method {name!r}; it has {', '.join(sorted(self.methods))}"
            ) from None


def positional(
    service: str,
    method: Method,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    defaults: dict[str, Any],
) -> tuple[Any, ...]:
    """Return all arguments in the order of the parameters.

    Args:
        defaults: by parameter, as the client's class has them: for parameters left out before one that is given. Those
            left out at the end are the server's.

    Raises:
        WrongArguments: too many, too few, unknown, twice; or a gap that the client's own class does not fill.
    """
    names = method.parameters
    where = f"{service}.{method.name}{method.signature}"
    if keywords:
        values = list(arguments)
        rest = dict(keywords)
        for name in names[len(arguments) :]:
            if not rest or (name not in rest and name not in defaults):
                break
            values.append(rest.pop(name) if name in rest else defaults[name])
        if rest:
            raise WrongArguments(
                f"{where}: {', '.join(rest)}: unknown, given twice, or behind a parameter that is not given"
            )
        arguments = tuple(values)
    if not method.nr_required <= len(arguments) <= len(names):
        raise WrongArguments(f"{where}: called with {len(arguments)} arguments")
    return arguments


def check_interface(service: str, welcome: Welcome, interface: Interface) -> None:
    """Compare what a client was promised with what the server has.

    Raises:
        InterfaceMismatch: a method is missing, or takes other parameters.
    """
    theirs = {method.name: method for method in welcome.methods}
    for mine in interface.methods:
        method = theirs.get(mine.name)
        if method is None:
            raise InterfaceMismatch(f"{service} ({welcome.service}) has no method {mine.name}")
        if method.parameters[: len(mine.parameters)] != mine.parameters or method.nr_required > len(
            mine.parameters
        ):
            raise InterfaceMismatch(
                f"{service}.{mine.name} is {mine.name}{method.signature} there, and {mine.name}{mine.signature} here"
            )


def _sum(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] + b[0], a[1] + b[1]


class Backoff:
    """Growing pauses between attempts, with jitter."""

    def __init__(self) -> None:
        self._seconds = FIRST_BACKOFF

    def pause(self) -> float:
        """Return the seconds to wait before the next attempt."""
        seconds = self._seconds * random.uniform(0.5, 1.0)
        self._seconds = min(2 * self._seconds, LONGEST_BACKOFF)
        return seconds


class Link:
    """A service and the connection to it, made anew when it is lost. Shared by all views of one client."""

    def __init__(
        self,
        host: Attachment,
        service: str,
        transport: endpoint.Transport,
        interface: Interface | None,
        marshaller: Marshaller,
        connect_timeout: float,
    ) -> None:
        if transport not in ("auto", "ring", "tcp"):
            raise ValueError(f"transport: 'auto', 'ring' or 'tcp', not {transport!r}")
        self.host = host
        self.service = service
        self.transport: endpoint.Transport = transport
        self.interface = interface
        self.marshaller = marshaller
        self.connect_timeout = connect_timeout
        self.closed = False
        self.nr_connects = 0
        self.forked = False
        self._lock = threading.Lock()
        self.connection: SyncConnection | None = None
        self._parted: list[SyncConnection] = []  # replaced, with calls under way
        self._past_traffic = (0, 0)  # of connections that were closed
        self.table: MethodTable | None = None  # of the newest connection
        self.asyncs: weakref.WeakSet[AsyncMethods] = weakref.WeakSet()
        not_for_children(self)

    def open(self, timeout: float) -> tuple[Channel, Welcome, MethodTable]:
        """Connect, and check what is there."""
        channel, welcome = endpoint.connect(self.host, self.service, self.transport, timeout)
        try:
            if self.interface is not None:
                check_interface(self.service, welcome, self.interface)
            self.table = table = MethodTable(welcome, self.interface, self.marshaller.places)
        except BaseException:
            channel.close()
            raise
        self.nr_connects += 1
        return channel, welcome, table

    def get(self, deadline: float | None) -> SyncConnection:
        """Return a connection that works; make one if need be."""
        connection = self.connection
        if connection is not None and connection.lost is None and not connection.leaving:
            return connection
        self.check_usable()
        if not self._lock.acquire(
            timeout=-1 if deadline is None else max(0.0, deadline - time.monotonic())
        ):
            raise DeadlineExceeded(f"{self.service}: not connected in time")
        try:
            self.check_usable()
            connection = self.connection
            if connection is not None:
                if connection.lost is None and not connection.leaving:
                    return connection
                self.connection = None
                self._parted.append(connection)
            self._part()
            self.connection = connection = self._connect(deadline)
            if self.closed:  # meanwhile
                self._close()
            return connection
        finally:
            self._lock.release()

    def check_usable(self) -> None:
        """Raise PeerLost or ForkedError if no connection can be made any more."""
        if self.forked:
            raise ForkedError(
                f"{self.service}: a forked child cannot use its parent's client; attach again in the child"
            )
        if self.closed:
            raise PeerLost(f"{self.service}: the client was closed")

    def _part(self) -> None:
        """Close connections that were replaced, once their last calls have ended. Context: _lock held."""
        for connection in list(self._parted):
            if connection.lost is not None or not connection.pending:
                self._end_of(connection, PeerLost(f"{self.service}: reconnecting"))
                self._parted.remove(connection)

    def _end_of(self, connection: SyncConnection, why: PeerLost) -> None:
        """Context: _lock held."""
        connection.close(why)
        self._past_traffic = _sum(self._past_traffic, connection.traffic())

    def traffic(self) -> tuple[int, int]:
        """Return the bytes sent and received over all connections for synchronous calls so far."""
        with self._lock:
            total = self._past_traffic
            for connection in (*self._parted, self.connection):
                if connection is not None:
                    total = _sum(total, connection.traffic())
            return total

    def _connect(self, deadline: float | None) -> SyncConnection:
        """Try until it works or the time is over: a service that restarts is back soon."""
        limit = time.monotonic() + self.connect_timeout
        give_up = limit if deadline is None else min(limit, deadline)
        backoff = Backoff()
        while True:
            left = give_up - time.monotonic()
            try:
                channel, welcome, table = self.open(max(0.05, left))
                return SyncConnection(self.host, self.service, channel, welcome, table)
            except (PeerLost, ServiceNotFound) as error:
                pause = backoff.pause()
                if self.closed or self.nr_connects == 0 or time.monotonic() + pause >= give_up:
                    raise error
                time.sleep(pause)

    def close(self) -> None:
        """End the connection. Does not wait for another thread that is connecting: it gives up by itself."""
        if self.forked:
            return
        self.closed = True
        for methods in list(self.asyncs):
            methods.close_soon()
        if self._lock.acquire(False):
            try:
                self._close()
            finally:
                self._lock.release()

    def _close(self) -> None:
        """Context: _lock held."""
        gone = PeerLost(f"{self.service}: the client was closed")
        for connection in (*self._parted, self.connection):
            if connection is not None:
                self._end_of(connection, gone)
        self._parted.clear()
        self.connection = None

    def _after_fork(self) -> None:
        """In a child: let go of descriptors; locks may be held for ever."""
        self.forked = True
        error = ForkedError(f"{self.service}: a forked child cannot use its parent's client")
        for connection in (*self._parted, self.connection):
            if connection is not None:
                connection.lost = error
                for pending in list(connection.pending.values()):
                    if isinstance(pending, SyncPending):
                        pending.error, pending.done = error, True
                connection.pending.clear()
                release(connection.channel)
        for methods in list(self.asyncs):
            methods.after_fork()
