"""Serving: connections, worker threads, limits, draining.

Who reads. All workers wait for all connections (_native.WaitSet). Whoever gets one takes a frame off it and runs the call
itself: no hand-over, so a lone client costs one wake-up per call. While a call runs nobody reads on its connection, until

- the method is about to wait for another service: it says so (Call.about_to_block), and another worker is let in;
- the warden thread, which ticks while calls run, finds a call that takes long: it reads what came behind it, and queues
  that for the other workers. When no worker is left to wait, it starts one; when there are as many as there may be, it reads
  every connection. That is how CANCEL reaches a server whose workers are all busy, and where calls beyond the limits
  are refused: the queue is full, and no call has ended for PATIENCE ticks. Before that, calls wait where they are.

Nobody waits for a slow reader: what a connection does not take at once is kept for it, up to a limit, then it is closed.

Who reads looks a little ahead, for CANCEL: a call whose caller has given up meanwhile is not run. The calls it finds wait
in connection.ahead, and are taken from there before anything else is read.

No wake-up is lost: a worker notes its call and then looks whether the warden is parked; the warden says that it is parked,
and then looks for calls. What does not fit into a connection is in its backlog before the connection is asked to tell of
room.

Refs. Those of a call stay the caller's until its arguments are read. Those of a reply are remembered until somebody has
accepted them, and dropped when the connection ends or the reply is discarded.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import inspect
import itertools
import logging
import os
import select
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import msgspec

from .._native import WaitSet, crash_point
from ..errors import (
    AccessDenied,
    BadRef,
    CallCancelled,
    CannotSend,
    DeadlineExceeded,
    DmError,
    ForkedError,
    InterfaceMismatch,
    LocalProtocolError,
    Overloaded,
    PeerError,
    PeerLost,
    RefConsumed,
    RemoteProtocolError,
    ServiceStopping,
    UnknownMethod,
    WrongArguments,
)
from ..host import Host
from . import frames
from .calls import Call, _current
from .channel import Channel, Parts, RingChannel, TcpChannel
from .endpoint import RING_BYTES, Handshake, error_frame, listen_tcp, listen_unix
from .forks import not_for_children, release
from .frames import CALL, PICKLED, REPLY, TRANSFER_MASK, Code, Frame, Kind, Welcome
from .interface import MISSING, Bound, Interface
from .marshal import TRANSFER_OF, Marshaller, Serializer

__all__ = ["Interceptor", "Server"]

log = logging.getLogger("dmrpc.rpc")

Interceptor: TypeAlias = Callable[[Call, Callable[[], Any]], Any]

KICK = -1
TICK_SECONDS = 0.005
TICKS_WITHOUT_WORK = 20
AHEAD, AHEAD_BYTES = (
    32,
    1 << 20,
)  # calls, and about how many bytes, taken off a connection before they run
PATIENCE = 5  # ticks without a call that ended: from then on calls beyond the queue are refused
JOIN_SECONDS = 5.0  # for all threads of a server together, when it stops
MAX_BACKLOG_BYTES = 256 << 20  # kept for a connection that does not read
MAX_HANDSHAKES = 256
UNSETTLED_REPLIES = 64
NO_ARGUMENTS = b"\x90"  # an empty list
_astuple = msgspec.structs.astuple
_head, _parse = frames.head, frames.parse


class _Connection:
    """A client."""

    __slots__ = (
        "ahead",
        "backlog",
        "backlog_bytes",
        "calls",
        "channel",
        "closed",
        "has_more",
        "inline",
        "key",
        "last_id",
        "let_others_in",
        "read_lock",
        "send_lock",
        "unsettled",
    )

    def __init__(self, channel: Channel, key: int) -> None:
        self.channel = channel
        self.key = key
        self.closed = False
        self.let_others_in: Callable[[], None] = lambda: None
        self.read_lock = threading.Lock()
        self.send_lock = threading.Lock()
        self.has_more = _look_at(channel)  # without a system call
        self.last_id = 0
        self.ahead: collections.deque[tuple[Frame, Call]] = collections.deque()
        self.calls: dict[int, Call] = {}
        self.inline: dict[
            int, float
        ] = {}  # calls that run on the thread that read them, since when
        self.backlog: collections.deque[tuple[Parts | bytes, int, int]] = (
            collections.deque()
        )  # parts, sent, total
        self.backlog_bytes = 0
        self.unsettled: collections.deque[tuple[int, bytes]] = (
            collections.deque()
        )  # call id, Refs of its reply


def _look_at(channel: Channel) -> Callable[[], bool]:
    """Return what tells whether more has arrived, as far as this process knows."""
    if isinstance(channel, RingChannel):
        return channel.ring.has_data
    assert isinstance(channel, TcpChannel)
    return lambda: channel._to != channel._from


class Server:
    """A service that runs. Made by :meth:`Host.serve`; a context manager that stops it.

    Attributes:
        name: under which it is published.
        endpoint: what is published.
    """

    def __init__(  # noqa: PLR0915
        self,
        host: Host,
        service: object,
        name: str,
        marshaller: Marshaller,
        *,
        threads: int = 8,
        queue: int = 128,
        tcp: str | tuple[str, int] | None = "127.0.0.1",
        ring_bytes: int = RING_BYTES,
        max_frame: int = frames.MAX_FRAME_BYTES,
        max_connections: int = 1024,
        interceptors: Sequence[Interceptor] = (),
        loop: asyncio.AbstractEventLoop | None = None,
        pickle: bool = False,
        tracebacks: bool = True,
    ) -> None:
        if threads < 1 or queue < 0 or max_connections < 1:
            raise ValueError(
                "a server needs one thread and one connection at least, and no negative queue"
            )
        self.host = host
        self.name = name
        self.service = service
        self._marshaller = marshaller
        interface = Interface(type(service))
        self._methods: list[Bound] = interface.bind(service)
        self._welcome = Welcome(
            frames.PROTOCOL, interface.name, tuple(interface.methods), host.id, pickle, max_frame
        )
        self._max_plain = max_frame - frames.HEADER_BYTES
        self._interceptors = tuple(interceptors)
        self._pickle = pickle
        self._tracebacks = tracebacks
        self._max_threads = threads
        self._max_queue = queue
        self._max_connections = max_connections
        self._ring_bytes = ring_bytes
        self._given_loop = loop
        self._loop: asyncio.AbstractEventLoop | None = loop
        self._loop_thread: threading.Thread | None = None
        self._tasks: set[asyncio.Task[None]] = set()  # a loop holds its tasks only weakly

        self._lock = threading.Lock()  # over what follows
        self._idle = threading.Condition(self._lock)
        self._connections: dict[int, _Connection] = {}
        self._keys = itertools.count(1)
        self._queue: collections.deque[tuple[_Connection, Frame, Call]] = collections.deque()
        self._attention: collections.deque[_Connection] = (
            collections.deque()
        )  # have frames, and nobody was told
        self._threads: list[threading.Thread] = []
        self._waiting: set[int] = set()  # workers in WaitSet.wait
        self._running: dict[int, float] = {}  # threads that run queued calls, and since when
        self._draining = False
        self._stopped = False
        self._ended = threading.Event()  # stop() is through
        self._stopper: threading.Thread | None = None
        self._published = False
        self._forked = False
        self._ticks_stuck = 0  # since a call has ended
        self._ticks_full = 0  # since a worker was seen waiting
        self._warden_parked = True
        self._nr_served = 0
        self.counts: collections.Counter[str] = collections.Counter()

        self._waits = WaitSet()
        self._wake, self._woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)[::-1]
        self._listeners: dict[int, tuple[socket.socket, str]] = {}
        self._handshakes: dict[int, Handshake] = {}
        self._controls: dict[int, _Connection] = {}  # control sockets of ring connections
        self._poll = select.poll()
        self._poll.register(self._woken, select.POLLIN)
        unix, ring_name = listen_unix(host.fabric)
        self._listen(unix, "ring")
        address = None
        if tcp is not None:
            where = (tcp, 0) if isinstance(tcp, str) else tcp
            try:
                sock, address = listen_tcp(*where)
            except OSError as error:
                self._waits.close()
                self._close_all()
                raise PeerError(f"cannot listen on {where}: {error}") from error
            self._listen(sock, "tcp")
        self.endpoint = {"protocol": frames.PROTOCOL, "ring": ring_name, "tcp": address}
        self._warden = threading.Thread(target=self._guard, name=f"{name}-warden", daemon=True)
        self._warden.start()
        with self._lock:
            self._add_worker()
        try:
            host.publish(name, self.endpoint)
            self._published = True
        except BaseException:
            self.stop(0)
            raise
        not_for_children(self)

    @property
    def published(self) -> bool:
        """Whether clients find this server under its name."""
        return self._published and not self._draining

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return (
            f"<Server {self.name!r}: {self._welcome.service}, {len(self._connections)} connections>"
        )

    # ------------------------------------------------------------ workers

    def _add_worker(self) -> None:
        thread = threading.Thread(
            target=self._work, name=f"{self.name}-{len(self._threads)}", daemon=True
        )
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        waits, connections, waiting = self._waits, self._connections, self._waiting
        me = threading.get_ident()
        while not self._stopped:
            waiting.add(me)
            try:
                key = waits.wait(None)
            except ValueError:  # closed
                return
            finally:
                waiting.discard(me)
            try:
                if key == KICK:
                    self._work_off_queue()
                    while (waits_for_us := self._next_attention()) is not None:
                        self._attend(waits_for_us)
                        self._work_off_queue()
                else:
                    connection = None if key is None else connections.get(key)
                    if connection is not None:
                        self._attend(connection)
                if self._queue:
                    self._work_off_queue()
            except Exception:  # of ours: what methods raise is their callers'
                log.exception("%s: a worker stumbled", self.name)

    def _next_attention(self) -> _Connection | None:
        try:
            return self._attention.popleft()
        except IndexError:
            return None

    def _attend(self, connection: _Connection) -> None:
        """Read and run what a connection has, until it has nothing."""
        channel = connection.channel
        call: Call | None
        while not connection.closed:
            # Whoever holds it may have armed the ring just now, and this thread got its report: it has to look.
            connection.read_lock.acquire()
            try:
                if self._queue:
                    # Queued calls are older, and a connection that always has more must not keep them waiting. One of
                    # them may take long: another worker is to go on here.
                    self._attention.append(connection)
                    self._kick_worker(1)
                    return
                try:
                    waited = bool(connection.ahead)
                    if waited:
                        frame, call = connection.ahead.popleft()
                    else:
                        data = channel.recv()
                        if data is None:
                            if connection.backlog:
                                self._flush(connection)
                            if channel.arm():
                                continue
                            return
                        frame = _parse(data)
                        del data
                        call = self._admit(connection, frame)
                    if connection.has_more():
                        self._read_ahead(connection)
                except (PeerLost, ValueError) as error:
                    self._close(connection, error)
                    return
                except RemoteProtocolError as error:
                    self._violation(connection, error)
                    return
            finally:
                connection.read_lock.release()
            if call is None:
                continue
            call_id = frame.call_id
            connection.inline[call_id] = time.monotonic() if waited else call.since
            if self._warden_parked:
                self._kick_warden()
            call.about_to_block = connection.let_others_in
            try:
                self._run(connection, frame, call, waited)
            finally:
                del connection.inline[call_id]
            del frame, call

    def _read_ahead(self, connection: _Connection) -> None:
        """Look for CANCEL among the next frames. Context: read_lock held."""
        ahead = connection.ahead
        room = AHEAD_BYTES
        while len(ahead) < AHEAD and room > 0:
            data = connection.channel.recv()
            if data is None:
                return
            room -= len(data)
            frame = _parse(data)
            call = self._admit(connection, frame)
            if call is not None:
                ahead.append((frame, call))

    def _let_others_in(self, connection: _Connection) -> None:
        """Let another worker read: the call that this thread runs is about to wait for another service."""
        if connection.closed or not connection.read_lock.acquire(False):
            return
        try:
            more = bool(connection.ahead) or connection.channel.arm()
        except ValueError:
            return
        finally:
            connection.read_lock.release()
        with self._lock:
            if not self._waiting and len(self._threads) < self._max_threads and not self._stopped:
                self._add_worker()
        if more:
            self._attention.append(connection)
            self._kick_worker(1)

    def _kick_worker(self, n: int) -> None:
        with contextlib.suppress(ValueError):  # closed: the server is being stopped
            self._waits.kick(n)

    def _work_off_queue(self) -> None:
        me = threading.get_ident()
        while True:
            with self._lock:
                if not self._queue:
                    return
                connection, frame, call = self._queue.popleft()
            self._running[me] = time.monotonic()
            if self._warden_parked:
                self._kick_warden()
            try:
                self._run(connection, frame, call, True)
            finally:
                del self._running[me]
            del connection, frame, call

    # ------------------------------------------------------------ frames

    def _admit(self, connection: _Connection, frame: Frame) -> Call | None:
        """Look at a frame that was just read; return the call that is to be run for it. Context: read_lock held."""
        if frame.kind == CALL:
            call_id = frame.call_id
            if call_id <= connection.last_id:
                raise RemoteProtocolError(f"call {call_id} came after call {connection.last_id}")
            connection.last_id = call_id
            left_us = frame.time_left_us
            now = time.monotonic()
            deadline = now + left_us * 1e-6 if left_us else None
            if frame.method >= len(self._methods):
                self._refuse(
                    connection,
                    call_id,
                    Code.UNKNOWN_METHOD,
                    UnknownMethod(f"no method {frame.method}"),
                )
                return None
            if self._draining:
                self._refuse(
                    connection,
                    call_id,
                    Code.STOPPING,
                    ServiceStopping(f"{self.name} is being stopped"),
                )
                return None
            call = Call(
                self._methods[frame.method].name, frames.read_meta(frame), deadline, connection.key
            )
            call.since = now
            connection.calls[call_id] = call
            if frame.nr_refs:
                crash_point("call_admitted")
            return call
        if frame.kind == Kind.CANCEL:
            self._cancel(connection, frame.call_id)
        elif frame.kind == Kind.DISCARD:
            self._discard(connection, frame.call_id)
        else:
            raise RemoteProtocolError(f"a client does not send frames of kind {frame.kind}")
        return None

    def _cancel(self, connection: _Connection, call_id: int) -> None:
        call = connection.calls.get(call_id)
        if call is not None:
            self.counts["cancelled"] += 1
            call.cancel()

    def _discard(self, connection: _Connection, call_id: int) -> None:
        for known, refs in list(connection.unsettled):
            if known == call_id:
                self.host.drop_refs(refs)
                crash_point("reply_discarded")

    def _refuse(self, connection: _Connection, call_id: int, code: Code, error: DmError) -> None:
        self.counts[code.name.lower()] += 1
        self._send(connection, error_frame(call_id, code, error))

    def _violation(self, connection: _Connection, error: RemoteProtocolError) -> None:
        log.warning("%s: closing a connection: %s", self.name, error)
        self.counts["violations"] += 1
        with contextlib.suppress(DmError, ValueError):
            self._send(connection, error_frame(0, Code.VERSION, error))
        self._close(connection, error)

    # ------------------------------------------------------------ calls

    def _run(self, connection: _Connection, frame: Frame, call: Call, waited: bool = False) -> None:
        """Run a call and answer it. Never raises."""
        bound = self._methods[frame.method]
        call_id = frame.call_id
        token = _current.set(call)
        phase = Code.BAD_ARGUMENTS
        try:
            if waited or call.cancelled:
                call.check()
            if bound.takes_none and frame.body == NO_ARGUMENTS:
                box: list[Any] = [()]
            else:
                box = [self._arguments(bound, frame)]
            phase = Code.REMOTE
            if bound.is_async:
                self._start_async(connection, frame, call, bound, box)
                return
            if self._interceptors:
                self._invoke(call, bound.function, box)
            else:
                # Whatever it returns is referred to by the box alone: see may_move.
                box.append(bound.function(*box.pop()))
            if call.cancelled:  # Refs in the reply would lie there until the client reads again
                call.check()
            if frame.nr_refs:
                crash_point("method_returned")
            phase = Code.BAD_RESULT
            self._reply(connection, call_id, frame.flags, box)
        except BaseException as error:  # whatever a method raises is the caller's
            self._failed(connection, call_id, error, phase)
        finally:
            _current.reset(token)
        self._settle(connection, call_id)

    def _invoke(self, call: Call, function: Callable[..., Any], box: list[Any]) -> None:
        """Put the result of a function where its arguments were; whatever it returns is referred to by the box alone."""
        if not self._interceptors:
            box.append(function(*box.pop()))
            return

        arguments = box.pop()

        def proceed() -> Any:
            return function(*arguments)

        for interceptor in reversed(self._interceptors):
            proceed = _Step(interceptor, call, proceed)
        box.append(proceed())

    def _arguments(self, bound: Bound, frame: Frame) -> Sequence[Any]:
        if frame.flags & PICKLED:
            if not self._pickle:
                raise AccessDenied(
                    f"{self.name} takes no pickled arguments: serve(..., pickle=True) would"
                )
            arguments = bound.reader.read(self.host, frame)
            if (
                not isinstance(arguments, (tuple, list))
                or not bound.nr_required <= len(arguments) <= bound.nr_max
            ):
                raise WrongArguments(
                    f"{bound.name} takes {bound.nr_required} to {bound.nr_max} arguments"
                )
            return arguments
        try:
            values = _astuple(bound.reader.read(self.host, frame))
        except msgspec.ValidationError as error:
            raise WrongArguments(
                f"{bound.name}: {_named(str(error), bound, self._welcome)}"
            ) from None
        while values and values[-1] is MISSING:
            values = values[:-1]
        return values

    def _reply(self, connection: _Connection, call_id: int, flags: int, box: list[Any]) -> None:
        """Send box[0]; afterwards the box is empty."""
        if not flags & PICKLED:
            body = self._marshaller.plain(box, TRANSFER_OF[flags & TRANSFER_MASK])
            if body is not None and len(body) < self._max_plain:
                self._send(connection, _head(REPLY, call_id, 0, b"", b"", body))
                return
        serializer: Serializer = "pickle" if flags & PICKLED else "msgpack"
        try:
            encoded = self._marshaller.write(
                box, TRANSFER_OF[flags & TRANSFER_MASK], serializer, may_move=True
            )
        finally:
            box.clear()
        refs = bytes(encoded.refs)
        if refs:
            crash_point("reply_written")
        try:
            head = frames.head(
                Kind.REPLY,
                call_id,
                flags=encoded.flags,
                refs=refs,
                body=encoded.body,
                inline_bytes=encoded.inline_bytes,
            )
            nbytes = len(head) + encoded.inline_bytes
            if nbytes > self._welcome.max_frame:
                raise LocalProtocolError(
                    f"a result of {nbytes} bytes in a message; {self.name} sends at most {self._welcome.max_frame}: "
                    "return large data by Ref"
                )
            if refs:
                self._remember(connection, call_id, refs)
                crash_point("reply_remembered")
            self._send(connection, (head, *encoded.inline))
            if refs:
                crash_point("reply_sent")
        except BaseException:
            if refs:
                self.host.drop_refs(refs)
            raise
        if refs and connection.closed:  # it may have been closed before they were remembered
            self.host.drop_refs(refs)

    def _remember(self, connection: _Connection, call_id: int, refs: bytes) -> None:
        unsettled = connection.unsettled
        with connection.send_lock:
            while len(unsettled) >= UNSETTLED_REPLIES and not self._any_held(unsettled[0][1]):
                unsettled.popleft()
            unsettled.append((call_id, refs))

    def _any_held(self, refs: bytes) -> bool:
        size = frames.REF_BYTES
        return any(self.host.ref_is_held(refs[at : at + size]) for at in range(0, len(refs), size))

    def _failed(
        self, connection: _Connection, call_id: int, error: BaseException, phase: Code
    ) -> None:
        code = self._diagnosis(error, phase)
        self.counts["failed"] += 1
        try:
            text = ""
            if code == Code.REMOTE and self._tracebacks:
                text = _plain("".join(traceback.format_exception(error)))
            told = error_frame(call_id, code, error, text)
        except Exception as odd:  # its __str__ raises, or gives what is no text
            told = error_frame(call_id, code, _stand_in(error, odd))
        with contextlib.suppress(DmError, ValueError, OSError):
            self._send(connection, told)

    @staticmethod
    def _diagnosis(error: BaseException, phase: Code) -> Code:
        if isinstance(error, (CallCancelled, asyncio.CancelledError)):
            return Code.CANCELLED
        if isinstance(error, DeadlineExceeded):
            return Code.DEADLINE
        if phase == Code.BAD_ARGUMENTS:
            if isinstance(error, AccessDenied):
                return Code.NOT_ALLOWED
            if isinstance(error, (RefConsumed, BadRef)):
                return Code.BAD_REF
            return (
                phase if isinstance(error, (WrongArguments, RemoteProtocolError)) else Code.REMOTE
            )
        if phase == Code.BAD_RESULT and isinstance(error, (CannotSend, LocalProtocolError)):
            return phase
        return Code.REMOTE

    def _settle(self, connection: _Connection, call_id: int) -> None:
        connection.calls.pop(call_id, None)
        self._ticks_stuck = 0
        self._nr_served += 1
        if self._draining:
            with self._idle:
                self._idle.notify_all()

    # ------------------------------------------------------------ async methods

    def _start_async(
        self, connection: _Connection, frame: Frame, call: Call, bound: Bound, box: list[Any]
    ) -> None:
        loop = self._running_loop()
        call_id, flags = frame.call_id, frame.flags

        async def run() -> None:
            token = _current.set(call)
            me = asyncio.current_task()
            assert me is not None
            forget = call.when_cancelled(lambda: loop.call_soon_threadsafe(me.cancel))
            phase = Code.REMOTE
            try:
                call.about_to_block = None
                self._invoke(call, bound.function, box)
                if inspect.isawaitable(box[0]):  # an interceptor may have answered itself
                    box.append(await box.pop())
                if call.cancelled:
                    call.check()
                if frame.nr_refs:
                    crash_point("method_returned")
                phase = Code.BAD_RESULT
                self._reply(connection, call_id, flags, box)
            except BaseException as error:
                self._failed(connection, call_id, error, phase)
            finally:
                forget()
                _current.reset(token)
                self._settle(connection, call_id)

        def begin() -> None:
            task = loop.create_task(run())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        loop.call_soon_threadsafe(begin)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._loop_thread = threading.Thread(
                    target=_run_loop, args=(self._loop,), name=f"{self.name}-loop", daemon=True
                )
                self._loop_thread.start()
            return self._loop

    # ------------------------------------------------------------ sending

    def _send(self, connection: _Connection, parts: Parts | bytes) -> None:
        total = len(parts) if isinstance(parts, bytes) else sum(len(part) for part in parts)
        with connection.send_lock:
            if connection.closed:
                raise PeerLost("the caller is gone")
            sent = 0
            if not connection.backlog:
                sent = connection.channel.try_send(parts, 0)
                if sent == total:
                    return
            # First in the backlog, then asked for room again: who hears of room looks for a backlog.
            connection.backlog.append((parts, sent, total))
            connection.backlog_bytes += total - sent
            self._send_backlog(connection)
            if connection.backlog_bytes <= MAX_BACKLOG_BYTES:
                return
        self.counts["slow readers"] += 1
        self._close(connection, PeerLost(f"it left {connection.backlog_bytes} bytes unread"))
        raise PeerLost("the caller does not read its replies")

    def _flush(self, connection: _Connection) -> None:
        with connection.send_lock:
            self._send_backlog(connection)

    @staticmethod
    def _send_backlog(connection: _Connection) -> None:
        """Send what fits. Context: send_lock held."""
        while connection.backlog and not connection.closed:
            parts, sent, total = connection.backlog[0]
            n = connection.channel.try_send(parts, sent)
            connection.backlog_bytes -= n
            if sent + n < total:
                connection.backlog[0] = (parts, sent + n, total)
                return
            connection.backlog.popleft()

    # ------------------------------------------------------------ connections

    def _close(self, connection: _Connection, reason: BaseException | None = None) -> None:
        """Let a connection go, with everything that only it needed."""
        with self._lock:
            if self._connections.pop(connection.key, None) is None:
                return
            for fd, known in list(self._controls.items()):
                if known is connection:
                    del self._controls[fd]
                    self._unwatch(fd)
        connection.closed = True
        channel = connection.channel
        with contextlib.suppress(DmError):  # it may not be in there yet, or not any more
            if isinstance(channel, RingChannel):
                self._waits.remove(channel.ring)
            else:
                self._waits.remove(channel.fileno())
        with connection.send_lock:
            channel.close()
            unsettled = b"".join(refs for _, refs in connection.unsettled)
            connection.unsettled.clear()
            connection.backlog.clear()
        if unsettled and not self.host.detached:
            self.host.drop_refs(unsettled)
            crash_point("refs_taken_back")
        for call in list(connection.calls.values()):
            call.cancel()
        log.debug("%s: connection %d closed: %s", self.name, connection.key, reason)

    def _unwatch(self, fd: int) -> None:
        with contextlib.suppress(KeyError, OSError, ValueError):
            self._poll.unregister(fd)

    def _open(self, channel: Channel) -> None:
        connection = _Connection(channel, next(self._keys))
        connection.let_others_in = functools.partial(self._let_others_in, connection)
        with self._lock:
            if self._draining:
                channel.close()
                return
            self._connections[connection.key] = connection
        if isinstance(channel, RingChannel):
            fd = channel.control.fileno()
            self._controls[fd] = connection
            self._poll.register(fd, select.POLLIN)
            self._waits.add_ring(channel.ring, connection.key)
        else:
            self._waits.add_fd(channel.fileno(), connection.key)

    # ------------------------------------------------------------ the warden

    def _listen(self, sock: socket.socket, kind: str) -> None:
        self._listeners[sock.fileno()] = (sock, kind)
        self._poll.register(sock, select.POLLIN)

    def _kick_warden(self) -> None:
        self._warden_parked = False
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake, b"x")

    def _guard(self) -> None:
        """Accept, shake hands, notice ends; tick while calls run."""
        quiet = served = 0
        while not self._stopped:
            busy = quiet < TICKS_WITHOUT_WORK or bool(self._handshakes)
            if not busy:
                self._warden_parked = True
                busy = self._any_running()
            self._warden_parked = not busy
            try:
                events = self._poll.poll(TICK_SECONDS * 1e3 if busy else None)
                for fd, event in events:
                    self._event(fd, event)
                self._expire_handshakes()
                if self._tick() or self._nr_served != served or events:
                    quiet, served = 0, self._nr_served
                else:
                    quiet += 1
            except Exception:
                if not self._is_stopped():
                    log.exception("%s: the warden stumbled", self.name)

    def _is_stopped(self) -> bool:
        return self._stopped  # another thread's doing

    def _event(self, fd: int, event: int) -> None:
        if fd == self._woken:
            with contextlib.suppress(BlockingIOError):
                os.read(fd, 65536)
        elif fd in self._listeners:
            self._accept(*self._listeners[fd])
        elif fd in self._handshakes:
            self._shake(fd)
        elif fd in self._controls:  # the protocol says nothing there any more: it has ended
            connection = self._controls.get(fd)
            if connection is None:
                return
            assert isinstance(connection.channel, RingChannel)
            connection.channel.peer_ended()
            self._read_to_the_end(connection)
            self._close(connection, PeerLost("the client closed the connection or died"))
        else:
            self._unwatch(fd)

    def _read_to_the_end(self, connection: _Connection) -> None:
        """Look for DISCARD, which a client that ended may have sent last."""
        with connection.read_lock, contextlib.suppress(PeerLost, RemoteProtocolError, ValueError):
            while (data := connection.channel.recv()) is not None:
                frame = _parse(data)
                if frame.kind == Kind.DISCARD:
                    self._discard(connection, frame.call_id)

    def _accept(self, listener: socket.socket, kind: str) -> None:
        for _ in range(64):
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:  # out of descriptors, for one
                log.warning("%s: cannot accept: %s", self.name, error)
                self.counts["not accepted"] += 1
                time.sleep(TICK_SECONDS)
                return
            handshake = Handshake(sock, kind)
            if len(self._handshakes) >= MAX_HANDSHAKES:
                self.counts["bad handshakes"] += 1
                handshake.channel.close()
                continue
            self._handshakes[sock.fileno()] = handshake
            self._poll.register(sock, select.POLLIN)

    def _shake(self, fd: int) -> None:
        handshake = self._handshakes[fd]
        try:
            hello = handshake.read(self.host)
            if hello is None:
                return
            self._end_handshake(fd)
            if hello.service != self.name:
                error = PeerError(f"{hello.service!r} is not served here, but {self.name!r}")
                handshake.refuse(Code.UNKNOWN_SERVICE, error)
                return
            if len(self._connections) >= self._max_connections:
                # Said only now: a socket that is closed before HELLO is read takes what was said along.
                full = Overloaded(f"{self.name} has {self._max_connections} connections already")
                self.counts["overloaded"] += 1
                handshake.refuse(Code.OVERLOADED, full)
                return
            self._open(handshake.welcome(self._welcome, self._ring_bytes))
        except AccessDenied as error:
            self._bad_handshake(fd, handshake, Code.DENIED, error)
        except InterfaceMismatch as error:
            self._bad_handshake(fd, handshake, Code.VERSION, error)
        except (DmError, OSError) as error:
            self._end_handshake(fd)
            self.counts["bad handshakes"] += 1
            log.debug("%s: a handshake failed: %s", self.name, error)
            handshake.channel.close()

    def _bad_handshake(self, fd: int, handshake: Handshake, code: Code, error: DmError) -> None:
        self._end_handshake(fd)
        self.counts["bad handshakes"] += 1
        log.warning("%s: refused a connection: %s", self.name, error)
        handshake.refuse(code, error)

    def _end_handshake(self, fd: int) -> None:
        if self._handshakes.pop(fd, None) is not None:
            self._unwatch(fd)

    def _expire_handshakes(self) -> None:
        now = time.monotonic()
        for fd, handshake in list(self._handshakes.items()):
            if now > handshake.give_up:
                self._end_handshake(fd)
                self.counts["bad handshakes"] += 1
                handshake.channel.close()

    def _any_running(self) -> bool:
        return bool(self._queue or self._running) or any(
            connection.inline or connection.backlog
            for connection in list(self._connections.values())
        )

    def _tick(self) -> bool:
        """Read where a call that takes long keeps others from being read. Tell whether anything was running."""
        busy = self._any_running()
        if not busy:
            return False
        self._ticks_stuck += 1
        now = time.monotonic()
        # Nobody waits for connections: what arrives on others is not seen until a worker is done.
        self._ticks_full = 0 if self._waiting else self._ticks_full + 1
        everywhere = self._ticks_full >= 2 and not self._make_a_worker()
        for connection in list(self._connections.values()):
            inline = connection.inline
            if inline and self._long(inline.values(), now):
                self._read_aside(connection)
                if not self._waiting and not self._make_a_worker():
                    everywhere = True
            if connection.backlog:
                with contextlib.suppress(DmError, ValueError):
                    self._flush(connection)
        if everywhere:
            for connection in list(self._connections.values()):
                self._read_aside(connection)
        if self._queue:
            self._expire_queue()
            with contextlib.suppress(IndexError):
                if self._queue[0][2].since < now - 2 * TICK_SECONDS:  # those calls do take long
                    self._call_others(len(self._queue))
        return True

    @staticmethod
    def _long(since: Iterable[float], now: float) -> bool:
        """Tell whether every one of some calls has been running for a tick and more."""
        return now - max(list(since), default=now) >= TICK_SECONDS

    def _make_a_worker(self) -> bool:
        """Start a thread that waits for connections; False: there are as many as there may be."""
        with self._lock:
            if self._stopped or len(self._threads) >= self._max_threads:
                return False
            self._add_worker()
            return True

    def _room(self) -> bool:
        """Tell whether one more call finds a thread, or a place in the queue."""
        idle = self._max_threads - len(self._threads) + len(self._waiting)
        return len(self._queue) < self._max_queue + idle

    def _read_aside(self, connection: _Connection) -> None:
        """Queue what a busy connection has, as long as there is room; refuse the rest when nothing moves any more."""
        nr_queued = 0
        while not connection.closed:
            if not self._room() and self._ticks_stuck < PATIENCE and not self._draining:
                break
            if not connection.read_lock.acquire(False):
                break
            try:
                if connection.ahead:
                    frame, call = connection.ahead.popleft()
                else:
                    data = connection.channel.recv()
                    if data is None:
                        break
                    frame = _parse(data)
                    admitted = self._admit(connection, frame)
                    if admitted is None:
                        continue
                    call = admitted
                if not self._room():
                    connection.calls.pop(frame.call_id, None)
                    error = Overloaded(
                        f"{self.name} runs {self._max_threads} calls at once and has {self._max_queue} waiting"
                    )
                    self._refuse(connection, frame.call_id, Code.OVERLOADED, error)
                    continue
            except (PeerLost, ValueError) as error:
                self._close(connection, error)
                break
            except RemoteProtocolError as error:
                self._violation(connection, error)
                break
            else:  # still locked: a worker that reads on finds the queue as it will be
                call.about_to_block = self._call_others
                self._queue.append((connection, frame, call))
                nr_queued += 1
            finally:
                connection.read_lock.release()
        if nr_queued:
            self._call_others()  # one: several that run short calls would only take the interpreter from each other

    def _call_others(self, n: int = 1) -> None:
        with self._lock:
            if self._stopped:
                return
            for _ in range(n - len(self._waiting)):
                if len(self._threads) < self._max_threads:
                    self._add_worker()
            n = min(n, len(self._threads))
        self._kick_worker(n)

    def _expire_queue(self) -> None:
        """Answer queued calls that nobody waits for any more."""
        with self._lock:
            dead = [
                item
                for item in self._queue
                if item[2].cancelled or (item[2].deadline is not None and item[2].time_left == 0)
            ]
            for item in dead:
                self._queue.remove(item)
        for connection, frame, call in dead:
            try:
                call.check()
            except DmError as error:
                self._failed(connection, frame.call_id, error, Code.REMOTE)
            self._settle(connection, frame.call_id)

    # ------------------------------------------------------------ the end

    def stop(self, drain: float = 10.0) -> None:
        """Take no new calls, let those that run finish, end every connection. Idempotent: who comes second waits.

        Not to be called on the loop that ``async def`` methods run on: they could not finish.

        Args:
            drain: seconds to wait for calls that run; after that they are cancelled and their callers get PeerLost.

        Raises:
            ForkedError: called in a forked child.
        """
        self._check_fork()
        me = threading.current_thread()
        with self._lock:
            first, self._draining = not self._draining, True
        if not first:
            if me not in (self._stopper, self._warden, *self._threads):
                self._ended.wait()
            return
        self._stopper = me
        try:
            self._drain(drain)
        finally:
            self._end(me)
            self._ended.set()

    def _drain(self, seconds: float) -> None:
        if self._published:
            with contextlib.suppress(DmError):
                self.host.withdraw(self.name)
        for connection in list(self._connections.values()):
            with contextlib.suppress(DmError, ValueError, OSError):
                self._send(connection, frames.short(Kind.GOAWAY))
        give_up = time.monotonic() + seconds
        with self._idle:
            while self._busy() and (left := give_up - time.monotonic()) > 0:
                self._idle.wait(min(left, 0.05))
        while (
            any(c.backlog for c in list(self._connections.values())) and time.monotonic() < give_up
        ):
            time.sleep(0.001)

    def _end(self, me: threading.Thread) -> None:
        for connection in list(self._connections.values()):
            self._close(connection, ServiceStopping("stopped"))
        self._stopped = True
        with self._lock:
            self._queue.clear()
        self._waits.close()
        self._kick_warden()
        give_up = time.monotonic() + JOIN_SECONDS
        for thread in [*self._threads, self._warden]:
            if thread is not me:
                thread.join(max(0.0, give_up - time.monotonic()))
        if self._loop is not None and self._given_loop is None:
            with contextlib.suppress(RuntimeError):  # closed already
                self._loop.call_soon_threadsafe(self._loop.stop)
            if self._loop_thread is not None and self._loop_thread is not me:
                self._loop_thread.join(max(0.1, give_up - time.monotonic()))
        self._close_all()

    def _check_fork(self) -> None:
        if self._forked:
            raise ForkedError(f"{self.name} is served by the parent of this forked child")

    def _after_fork(self) -> None:
        """In a child: let go of descriptors, or peers would not notice when the parent ends. Locks may be held for ever."""
        self._forked = True
        self._stopped = True
        for sock, _ in self._listeners.values():
            sock.close()
        for handshake in list(self._handshakes.values()):
            handshake.channel.socket.close()
        for connection in list(self._connections.values()):
            connection.closed = True
            release(connection.channel)

    def _busy(self) -> bool:
        nr_calls = sum(len(connection.calls) for connection in list(self._connections.values()))
        return nr_calls > (self._stopper in self._threads)  # one that stops its own server

    def _close_all(self) -> None:
        for sock, _ in self._listeners.values():
            sock.close()
        self._listeners.clear()
        for handshake in self._handshakes.values():
            handshake.channel.close()
        self._handshakes.clear()
        for fd in (self._wake, self._woken):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._wake = self._woken = -1

    def wait(self) -> None:
        """Wait until the server is stopped by another thread or a signal handler."""
        self._check_fork()
        self._ended.wait()


class _Step:
    """An interceptor and what comes behind it."""

    __slots__ = ("call", "interceptor", "proceed")

    def __init__(self, interceptor: Interceptor, call: Call, proceed: Callable[[], Any]) -> None:
        self.interceptor = interceptor
        self.call = call
        self.proceed = proceed

    def __call__(self) -> Any:
        return self.interceptor(self.call, self.proceed)


def _named(text: str, bound: Bound, welcome: Welcome) -> str:
    """Say parameter names where msgspec counts."""
    method = next(method for method in welcome.methods if method.name == bound.name)
    for i in reversed(range(len(method.parameters))):
        text = text.replace(f"$[{i}]", method.parameters[i])
    return text


def _plain(text: str) -> str:
    """Return a text that UTF-8 can hold: file names may bring lone surrogates."""
    return text.encode("utf-8", "backslashreplace").decode()


def _stand_in(error: BaseException, odd: Exception) -> Exception:
    """Return something that can be told instead of an exception that cannot."""
    kind = type(error)
    try:
        text = _plain(str(error))
    except Exception:
        text = f"a text that cannot be made: {type(odd).__name__}"
    return RuntimeError(_plain(f"{kind.__module__}.{kind.__qualname__}: {text}"))


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop until it is stopped, then end what is left on it."""
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            loop.run_until_complete(asyncio.wait_for(_all(tasks), 1.0))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()


async def _all(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)
