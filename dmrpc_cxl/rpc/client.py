"""Calling: connections, replies, reconnecting. What the synchronous and the asyncio client share, and the first of them.

Who reads. There is no reader thread: a thread that waits for its reply reads the connection and hands others theirs; when it
leaves, another waiting thread takes over. A lone caller is woken once per call, straight from the ring.

Refs. Those of a call are this host's until the server accepts them. However the call ends, what nobody has accepted by then
is dropped. A reply that nobody waits for any more gives its Refs back as soon as it is read.
"""

from __future__ import annotations

import builtins
import collections
import concurrent.futures
import contextlib
import itertools
import logging
import random
import select
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import (
    AccessDenied,
    BadRef,
    CallCancelled,
    DeadlineExceeded,
    DmError,
    ForkedError,
    InterfaceMismatch,
    LocalProtocolError,
    Overloaded,
    PeerLost,
    ProtocolViolation,
    RefConsumed,
    RemoteError,
    RemoteProtocolError,
    ServiceNotFound,
    ServiceStopping,
    UnknownMethod,
    WrongArguments,
)
from ..host import Host
from . import endpoint, frames
from .calls import _current
from .channel import Channel
from .forks import not_for_children, release
from .frames import CALL, ERROR, PICKLED, REPLY, Code, Frame, Kind, Method, Welcome
from .interface import Interface
from .marshal import FLAGS_OF, TRANSFERS, Encoded, Marshaller, Reader, Serializer, Transfer

if TYPE_CHECKING:
    from .aio import AsyncMethods

__all__ = ["CallFuture", "Client", "ClientInterceptor"]

log = logging.getLogger("dmrpc.rpc")

ClientInterceptor: TypeAlias = Callable[["Outbound", Callable[[], Any]], Any]

READ_ALONG = (
    64  # every so many calls sent ahead, replies are taken: the server must not be left with them
)
SLICE_SECONDS = 0.1  # longest sleep of a thread that waits: another one may cancel its call
IDLE_SECONDS = 0.001  # a connection that was not used for so long is looked at before it is used
FIRST_BACKOFF = 0.01  # seconds before the second attempt to connect; doubles
LONGEST_BACKOFF = 1.0


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


class Pending:
    """A call without its reply. The class of what waits for it: synchronous and asyncio calls derive from this."""

    __slots__ = ("call_id", "deadline", "method", "reader", "refs")

    def __init__(self, method: str, reader: Reader, deadline: float | None) -> None:
        self.method = method
        self.reader = reader
        self.deadline = deadline
        self.call_id = 0
        self.refs = b""

    def settle(self, value: Any, error: BaseException | None) -> None:
        """Take the outcome; called once."""
        raise NotImplementedError


# ---------------------------------------------------------------- errors that arrive

_kinds: dict[tuple[type[RemoteError], str], type[RemoteError]] = {}


def _remote_kind(names: Sequence[str]) -> type[RemoteError]:
    """Return RemoteError, or a class that is also of the built-in type that the method raised."""
    for name in names:
        if name == "StopIteration":  # cannot be raised into a coroutine
            continue
        key = (RemoteError, name)
        if key in _kinds:
            return _kinds[key]
        kind = getattr(builtins, name, None)
        if not isinstance(kind, type) or not issubclass(kind, Exception) or kind is Exception:
            continue
        with contextlib.suppress(TypeError):  # layouts may conflict
            made = type(
                f"Remote{name}", (RemoteError, kind), {"__module__": RemoteError.__module__}
            )
            made("")  # some want more arguments than a text
            _kinds[key] = made
            return made
    return RemoteError


_PLAIN: dict[int, type[DmError]] = {
    Code.UNKNOWN_METHOD: UnknownMethod,
    Code.BAD_ARGUMENTS: WrongArguments,
    Code.OVERLOADED: Overloaded,
    Code.DEADLINE: DeadlineExceeded,
    Code.CANCELLED: CallCancelled,
    Code.STOPPING: ServiceStopping,
    Code.DENIED: AccessDenied,
    Code.NOT_ALLOWED: AccessDenied,
    Code.VERSION: InterfaceMismatch,
    Code.PEER: PeerLost,
    Code.UNKNOWN_SERVICE: ServiceNotFound,
}


def error_of(frame: Frame, service: str, method: str) -> DmError:
    """Return the exception that an ERROR frame stands for."""
    body = frames.read_error(frame)
    where = f"{service}.{method}: "
    if frame.method in _PLAIN:
        return _PLAIN[frame.method](where + body.message)
    if frame.method == Code.BAD_REF:
        kind = RefConsumed if body.type.endswith("RefConsumed") else BadRef
        return kind(where + body.message)
    error = _remote_kind(body.builtins)(f"{where}{body.type}: {body.message}")
    error.remote_type = body.type
    error.remote_traceback = body.traceback
    if body.traceback and hasattr(error, "add_note"):
        error.add_note(f"On the server:\n{body.traceback.rstrip()}")
    return error


# ---------------------------------------------------------------- one connection


class Connection:
    """What the two kinds of client share: ids, calls without reply, what happens to a frame that came."""

    def __init__(self, host: Host, service: str, channel: Channel, welcome: Welcome) -> None:
        self.host = host
        self.service = service
        self.channel = channel
        self.welcome = welcome
        self.pending: dict[int, Pending] = {}
        self.ids = itertools.count(1)
        self.lost: DmError | None = None  # why it is of no use any more
        self.leaving = False  # the server said GOAWAY
        self.send_lock = threading.Lock()

    def take(self, frame: Frame) -> None:
        """Act on a frame that came."""
        kind = frame.kind
        if kind == REPLY or (kind == ERROR and frame.call_id):
            pending = self.pending.pop(frame.call_id, None)
            if pending is None:  # nobody waits for it any more
                if frame.nr_refs:
                    self.host.drop_refs(frame.refs)
                return
            if kind == REPLY and not (frame.nr_refs or frame.flags or pending.refs):
                try:
                    value = _only(pending.reader.read(self.host, frame))
                except (RemoteProtocolError, ValueError):
                    self._outcome(pending, frame)  # which says what is wrong
                else:
                    pending.settle(value, None)
                return
            self._outcome(pending, frame)
        elif kind == Kind.GOAWAY:
            self.leaving = True
        elif kind == Kind.ERROR:
            raise RemoteProtocolError(
                f"{self.service} objects to what it was sent: {frames.read_error(frame).message}"
            )
        else:
            raise RemoteProtocolError(f"a server does not send frames of kind {kind}")

    def _outcome(self, pending: Pending, frame: Frame) -> None:
        value: Any = None
        failure: BaseException | None = None
        try:
            if frame.kind == ERROR:
                failure = error_of(frame, self.service, pending.method)
            elif frame.flags & PICKLED and not self.welcome.pickle:
                failure = RemoteProtocolError(
                    f"{self.service} sent a pickle, which was not asked for"
                )
            else:
                value = _only(pending.reader.read(self.host, frame))
        except DmError as error:
            failure = error
        except ValueError as error:  # not of the annotated type
            failure = InterfaceMismatch(f"{self.service}.{pending.method}: its result: {error}")
        except (
            BaseException
        ) as error:  # whoever waits for this call has to hear of it, and may be another thread
            failure = error
            if not isinstance(error, Exception):  # such as Ctrl-C, which is for this thread
                self._end_of(pending, frame, None, PeerLost(f"interrupted: {error!r}"))
                raise
        self._end_of(pending, frame, value, failure)

    def _end_of(
        self, pending: Pending, frame: Frame, value: Any, failure: BaseException | None
    ) -> None:
        if frame.nr_refs:
            self.host.drop_refs(frame.refs)  # those the value did not use
        self.settle(pending, value, failure)

    def settle(self, pending: Pending, value: Any, error: BaseException | None) -> None:
        """End a call; what nobody has accepted of it comes back."""
        if pending.refs:
            self.host.drop_refs(pending.refs)
        pending.settle(value, error)

    def give_up(self, pending: Pending, error: BaseException) -> None:
        """End a call that has no reply, and tell the server."""
        if self.pending.pop(pending.call_id, None) is None:
            return
        with contextlib.suppress(DmError, ValueError):
            self.send_short(frames.short(Kind.CANCEL, pending.call_id))
        self.settle(pending, None, error)

    def send_short(self, frame: bytes) -> None:
        """Send a frame that is all header."""
        raise NotImplementedError

    def fail(self, error: DmError) -> None:
        """End everything: the connection is of no use any more."""
        if self.lost is None:
            self.lost = error
        while self.pending:
            with contextlib.suppress(KeyError):
                _, pending = self.pending.popitem()
                # One for each: raised, it holds the frames of its call, and ours lives as long as the connection.
                self.settle(pending, None, type(self.lost)(str(self.lost)))


def _only(values: Any) -> Any:
    if not isinstance(values, (list, tuple)) or len(values) != 1:
        raise RemoteProtocolError("a reply holds one value")
    return values[0]


class SyncConnection(Connection):
    """A connection that threads share."""

    def __init__(
        self, host: Host, service: str, channel: Channel, welcome: Welcome, table: MethodTable
    ) -> None:
        super().__init__(host, service, channel, welcome)
        self.table = table
        self.used = time.monotonic()
        self.unsent: collections.deque[bytes] = collections.deque()  # short frames, oldest first
        self.read_lock = threading.Lock()
        self.turn = threading.Condition()  # for threads that wait while another one reads
        self.nr_followers = 0

    def send_short(self, frame: bytes) -> None:
        """See Connection. Never waits: not for another thread that sends, nor for the server to read.

        Also called by the garbage collector, perhaps while this very thread sends.
        """
        self.unsent.append(frame)
        if self.send_lock.acquire(False):
            try:
                self._send_unsent()
            finally:
                self.send_lock.release()

    def _send_unsent(self) -> None:
        """Context: send_lock held."""
        unsent = self.unsent
        while unsent:
            frame = unsent[0]
            n = self.channel.try_send((frame,), 0)
            if n < len(frame):
                unsent[0] = frame[n:]
                return
            unsent.popleft()

    def look(self) -> None:
        """Find out whether the server is still there; for a connection that nobody has read for a while."""
        control = getattr(self.channel, "control", None)
        if control is not None and self.lost is None:
            ended = select.poll()
            try:
                ended.register(control, select.POLLIN)
                if ended.poll(0):
                    self.channel.peer_ended()  # type: ignore[attr-defined]
            except (ValueError, OSError):  # closed by another thread
                return
        self.poll()

    def submit(self, call: Prepared, pending: SyncPending, encoded: Encoded, meta: bytes) -> None:
        """Send a call.

        Raises:
            PeerLost, DeadlineExceeded: it was not sent; its Refs are the caller's.
        """
        with self.send_lock:
            if self.lost is not None:
                raise PeerLost(str(self.lost))
            pending.connection = self
            pending.call_id = call_id = next(self.ids)  # in the order of sending: the server checks
            left = None if pending.deadline is None else pending.deadline - _monotonic()
            head = call.head(call_id, encoded, meta, left, self.channel.max_frame)
            self.pending[call_id] = pending
            try:
                if self.unsent:
                    self._send_rest(left)
                self.channel.send((head, *encoded.inline) if encoded.inline else head, left)
                if self.unsent:
                    self._send_unsent()
            except (DmError, ValueError) as error:
                # A ring that has taken a part says so itself, the next time; a socket does not.
                late = isinstance(error, DeadlineExceeded) and self.channel.kind == "ring"
                failure: DmError = PeerLost(f"{self.service}: {error}")
                if isinstance(error, DeadlineExceeded):
                    failure = DeadlineExceeded(f"{self.service}.{pending.method}: not sent in time")
                if not late and self.lost is None:
                    self.lost = PeerLost(f"{self.service}: {error}")
                if self.pending.pop(call_id, None) is None:
                    return  # whoever reads has noticed as well, and ended the call
                try:
                    raise failure from None
                finally:
                    del failure  # no circle over this frame, and those of its callers

    def _send_rest(self, timeout: float | None) -> None:
        """Send what comes before the next call. Context: send_lock held."""
        self._send_unsent()
        if self.unsent:
            self.channel.send((b"".join(self.unsent),), timeout)
            self.unsent.clear()

    def pump(self) -> None:
        """Take what is there. Context: read_lock held."""
        try:
            while (data := self.channel.recv()) is not None:
                self.take(_parse(data))
                del data
        except (PeerLost, ProtocolViolation) as error:
            self.fail(PeerLost(f"{self.service}: {error}"))
        except ValueError:
            self.fail(PeerLost(f"{self.service}: the client was closed"))
        if self.lost is not None and self.pending:  # one that was sent meanwhile
            self.fail(self.lost)

    def await_(self, pending: SyncPending, timeout: float | None = None) -> None:
        """Return when the call has ended, one way or another; or when the time is over, and it has not."""
        channel, lock = self.channel, self.read_lock
        give_up = None if timeout is None else time.monotonic() + timeout
        while not pending.done:
            if give_up is not None and time.monotonic() >= give_up:
                self.poll()
                return
            if lock.acquire(False):
                try:
                    while not pending.done:
                        left = SLICE_SECONDS
                        if pending.deadline is not None:
                            left = pending.deadline - time.monotonic()
                            if left <= 0:
                                break
                            if left > SLICE_SECONDS:
                                left = SLICE_SECONDS
                        if give_up is not None:
                            left = min(left, give_up - time.monotonic())
                            if left <= 0:
                                break
                        try:
                            channel.wait(left)
                        except ValueError:
                            self.fail(PeerLost(f"{self.service}: the client was closed"))
                        else:
                            self.pump()
                finally:
                    lock.release()
                    if self.nr_followers:
                        with self.turn:
                            self.turn.notify_all()
                if self._is_late(pending):
                    self._too_late(pending)
            else:
                self._follow(pending, give_up)

    @staticmethod
    def _is_late(pending: SyncPending) -> bool:
        return pending.deadline is not None and time.monotonic() >= pending.deadline

    def _follow(self, pending: SyncPending, give_up: float | None) -> None:
        """Another thread reads: wait for it to bring our reply, or to leave."""
        with self.turn:
            self.nr_followers += 1
            try:
                while not pending.done and self.read_lock.locked():
                    left, now = SLICE_SECONDS, time.monotonic()
                    for end in (pending.deadline, give_up):
                        if end is not None and end - now < left:
                            left = end - now
                    if left <= 0:
                        break
                    self.turn.wait(left)
            finally:
                self.nr_followers -= 1
        if not pending.done and self._is_late(pending):
            self._too_late(pending)

    def _too_late(self, pending: SyncPending) -> None:
        late = DeadlineExceeded(f"{self.service}.{pending.method}: no reply in time")
        self.give_up(pending, late)
        if not pending.done:  # another thread is about to end it
            time.sleep(0.001)
            assert pending.deadline is not None
            if time.monotonic() > pending.deadline + 1.0:  # it was interrupted right then
                self.settle(pending, None, late)

    def poll(self) -> None:
        """Take what is there, if no other thread is at it."""
        if self.read_lock.acquire(False):
            try:
                self.pump()
            finally:
                self.read_lock.release()
            if self.nr_followers:
                with self.turn:
                    self.turn.notify_all()

    def close(self, error: DmError) -> None:
        """End it; waiting threads get the error."""
        self.lost = self.lost or error
        self.channel.close()
        self.fail(error)
        with self.turn:
            self.turn.notify_all()


class SyncPending(Pending):
    """A call that a thread waits for, or a future."""

    __slots__ = ("connection", "done", "error", "value")

    connection: SyncConnection

    def __init__(self, method: str, reader: Reader, deadline: float | None) -> None:
        # All fields by hand: a call to super().__init__() is a tenth of what a small call costs here.
        self.method = method
        self.reader = reader
        self.deadline = deadline
        self.refs = b""
        self.done = False
        self.value: Any = None
        self.error: BaseException | None = None

    def settle(self, value: Any, error: BaseException | None) -> None:
        """See Pending."""
        self.value = value
        self.error = error
        self.done = True
        connection = self.connection
        if connection.nr_followers:
            with connection.turn:
                connection.turn.notify_all()


def _done(pending: SyncPending) -> bool:
    return pending.done


class CallFuture:
    """A call that is under way: ``client.future.method(...)``.

    Replies are read by whoever waits, so a future makes progress while somebody waits on the same client, or asks done().
    A future that is dropped cancels its call: nobody would take the Refs of its reply.
    """

    __slots__ = ("__weakref__", "_pending")

    def __init__(self, pending: SyncPending) -> None:
        self._pending = pending

    def done(self) -> bool:
        """Tell whether the call has ended; takes what has arrived, and never waits."""
        pending = self._pending
        if not pending.done:
            pending.connection.poll()
            if (
                not _done(pending)  # may have changed
                and pending.deadline is not None
                and time.monotonic() > pending.deadline
            ):
                pending.connection.give_up(
                    pending, DeadlineExceeded(f"{pending.method}: no reply in time")
                )
        return pending.done

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the result.

        Args:
            timeout: seconds to wait at most; the call goes on after that. None: until the call's own deadline.

        Raises:
            TimeoutError: timeout is over.
            CallError, and whatever else the call may raise.
        """
        pending = self._pending
        error = pending.error if pending.done else self.exception(timeout)
        if error is not None:
            try:
                raise error
            finally:
                del self, pending, error  # no circle over this frame
        return pending.value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end of the call; return what it raises, None if it gave a result."""
        pending = self._pending
        if not pending.done:
            _await_nested(pending, timeout)
            if not pending.done:
                raise concurrent.futures.TimeoutError(f"{pending.method}: no reply in {timeout} s")
        return pending.error

    def cancel(self) -> bool:
        """Give the call up and tell the server; False if it has ended already."""
        pending = self._pending
        if pending.done:
            return False
        pending.connection.give_up(pending, CallCancelled(f"{pending.method}: cancelled"))
        return True

    def __del__(self) -> None:
        if not self._pending.done:
            self._abandon()

    def _abandon(self) -> None:
        pending = self._pending
        if pending.connection.lost is None:
            with contextlib.suppress(DmError, ValueError, OSError):
                pending.connection.give_up(pending, CallCancelled("nobody waits for it any more"))


def _await_nested(pending: SyncPending, timeout: float | None = None) -> None:
    """Wait for a call, perhaps while serving one: let its server go on, and end with it when it is cancelled.

    Args:
        timeout: seconds after which to return whatever has become of it; None: when it has ended.
    """
    call, connection = _current.get(), pending.connection
    if call is None:
        connection.await_(pending, timeout)
        return
    if call.about_to_block is not None:
        call.about_to_block()
    forget = call.when_cancelled(
        lambda: connection.give_up(pending, CallCancelled(f"{call.method}: the caller cancelled"))
    )
    try:
        connection.await_(pending, timeout)
    finally:
        forget()


# ---------------------------------------------------------------- clients


class MethodTable:
    """The methods of a service, as the server named them."""

    def __init__(self, welcome: Welcome, interface: Interface | None) -> None:
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
        host: Host,
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
        self.table: MethodTable | None = None  # of the newest connection
        self.asyncs: weakref.WeakSet[AsyncMethods] = weakref.WeakSet()
        not_for_children(self)

    def open(self, timeout: float) -> tuple[Channel, Welcome, MethodTable]:
        """Connect, and check what is there."""
        channel, welcome = endpoint.connect(self.host, self.service, self.transport, timeout)
        try:
            if self.interface is not None:
                check_interface(self.service, welcome, self.interface)
            self.table = table = MethodTable(welcome, self.interface)
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
                connection.close(PeerLost(f"{self.service}: reconnecting"))
                self._parted.remove(connection)

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
                connection.close(gone)
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
        return marshaller.write(arguments, transfer, serializer)

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
                _await_nested(pending)
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
