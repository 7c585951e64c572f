"""Serving: connections, worker threads, limits, draining.

Who reads. All workers wait for all connections (_native.WaitSet). Whoever gets one takes a frame off it and runs the call
itself: no hand-over, so a lone client costs one wake-up per call. While a call runs nobody reads on its connection, until

- the method is about to wait for another service: it says so (Call.about_to_block), and another worker is let in;
- the warden thread, which ticks while calls run, finds a call that takes long: it reads what came behind it, and queues
  that for the other workers. When no worker is left to wait, it starts one; when there are as many as there may be, it reads
  every connection. That is how CANCEL reaches a server whose workers are all busy, and where calls beyond the limits
  are refused: the queue is full, and no call has ended for PATIENCE ticks. Before that, calls wait where they are.

Who reads looks a little ahead, for CANCEL: a call whose caller has given up meanwhile is not run. The calls it finds wait
in connection.ahead, and are taken from there before anything else is read.

No wake-up is lost: a worker notes its call and then looks whether the warden is parked; the warden says that it is parked,
and then looks for calls.

A server is made of three parts more: door.py lets clients in, attended.py is one of them, running.py runs its calls.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import itertools
import logging
import os
import select
import threading
import time
from collections.abc import Iterable, Sequence

from .._native import WaitSet, crash_point
from ..errors import (
    DmError,
    ForkedError,
    Overloaded,
    PeerLost,
    RemoteProtocolError,
    ServiceStopping,
    UnknownMethod,
)
from . import frames
from .attended import Attended
from .calls import Call
from .channel import Channel, RingChannel
from .door import Door
from .endpoint import RING_BYTES, error_frame
from .forks import not_for_children, release
from .frames import CALL, Code, Frame, Kind, Welcome
from .interface import Bound, Interface
from .marshal import Marshaller
from .places import Attachment
from .running import Interceptor, Runner

__all__ = ["Interceptor", "Server"]

log = logging.getLogger("dmrpc.rpc")

KICK = -1
TICK_SECONDS = 0.005
TICKS_WITHOUT_WORK = 20
AHEAD, AHEAD_BYTES = (
    32,
    1 << 20,
)  # calls, and about how many bytes, taken off a connection before they run
PATIENCE = 5  # ticks without a call that ended: from then on calls beyond the queue are refused
JOIN_SECONDS = 5.0  # for all threads of a server together, when it stops
_parse = frames.parse


class Server:
    """A service that runs. Made by :meth:`Host.serve`; a context manager that stops it.

    Attributes:
        name: under which it is published.
        endpoint: what is published.
    """

    def __init__(
        self,
        host: Attachment,
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
            frames.PROTOCOL,
            interface.name,
            tuple(interface.methods),
            host.id,
            pickle,
            max_frame,
            tuple(place.name for place in marshaller.places.values()),
        )
        self._max_threads = threads
        self._max_queue = queue
        self._max_connections = max_connections
        self._lock = threading.Lock()  # over what follows
        self._idle = threading.Condition(self._lock)
        self._connections: dict[int, Attended] = {}
        self._keys = itertools.count(1)
        self._queue: collections.deque[tuple[Attended, Frame, Call]] = collections.deque()
        self._attention: collections.deque[Attended] = (
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
        self._runner = Runner(
            name,
            self._methods,
            self._welcome,
            marshaller,
            interceptors=interceptors,
            pickle=pickle,
            tracebacks=tracebacks,
            loop=loop,
            counts=self.counts,
            settled=self._settle,
        )

        self._waits = WaitSet()
        self._wake, self._woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)[::-1]
        self._controls: dict[int, Attended] = {}  # control sockets of ring connections
        self._poll = select.poll()
        self._poll.register(self._woken, select.POLLIN)
        self._door = Door(
            host,
            name,
            lambda: self._welcome,
            ring_bytes,
            watch=lambda fd: self._poll.register(fd, select.POLLIN),
            unwatch=self._unwatch,
            full=self._is_full,
            enter=self._open,
            counts=self.counts,
        )
        try:
            self.endpoint = self._door.open(tcp)
        except BaseException:
            self._waits.close()
            self._close_all()
            raise
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

    def _next_attention(self) -> Attended | None:
        try:
            return self._attention.popleft()
        except IndexError:
            return None

    def _attend(self, connection: Attended) -> None:
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
                                connection.flush()
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
                self._runner.run(connection, frame, call, waited)
            finally:
                del connection.inline[call_id]
            del frame, call

    def _read_ahead(self, connection: Attended) -> None:
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

    def _let_others_in(self, connection: Attended) -> None:
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
                self._runner.run(connection, frame, call, True)
            finally:
                del self._running[me]
            del connection, frame, call

    # ------------------------------------------------------------ frames

    def _admit(self, connection: Attended, frame: Frame) -> Call | None:
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

    def _cancel(self, connection: Attended, call_id: int) -> None:
        call = connection.calls.get(call_id)
        if call is not None:
            self.counts["cancelled"] += 1
            call.cancel()

    def _discard(self, connection: Attended, call_id: int) -> None:
        for refs in connection.refs_of(call_id):
            self.host.drop_refs(refs)
            crash_point("reply_discarded")

    def _refuse(self, connection: Attended, call_id: int, code: Code, error: DmError) -> None:
        self.counts[code.name.lower()] += 1
        connection.send(error_frame(call_id, code, error))

    def _violation(self, connection: Attended, error: RemoteProtocolError) -> None:
        log.warning("%s: closing a connection: %s", self.name, error)
        self.counts["violations"] += 1
        with contextlib.suppress(DmError, ValueError):
            connection.send(error_frame(0, Code.VERSION, error))
        self._close(connection, error)

    def _settle(self, connection: Attended, call_id: int) -> None:
        """Note that a call was answered."""
        connection.calls.pop(call_id, None)
        self._ticks_stuck = 0
        self._nr_served += 1
        if self._draining:
            with self._idle:
                self._idle.notify_all()

    # ------------------------------------------------------------ connections

    def _close(self, connection: Attended, reason: BaseException | None = None) -> None:
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
        unsettled = connection.close()
        if unsettled and not self.host.detached:
            self.host.drop_refs(unsettled)
            crash_point("refs_taken_back")
        for call in list(connection.calls.values()):
            call.cancel()
        log.debug("%s: connection %d closed: %s", self.name, connection.key, reason)

    def _give_up(self, connection: Attended, reason: PeerLost) -> None:
        self.counts["slow readers"] += 1
        self._close(connection, reason)

    def _is_full(self) -> str | None:
        if len(self._connections) < self._max_connections:
            return None
        return f"{self.name} has {self._max_connections} connections already"

    def _unwatch(self, fd: int) -> None:
        with contextlib.suppress(KeyError, OSError, ValueError):
            self._poll.unregister(fd)

    def _open(self, channel: Channel) -> None:
        connection = Attended(channel, next(self._keys), self.host)
        connection.let_others_in = functools.partial(self._let_others_in, connection)
        connection.give_up = functools.partial(self._give_up, connection)
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

    def _kick_warden(self) -> None:
        self._warden_parked = False
        with contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake, b"x")

    def _guard(self) -> None:
        """Accept, shake hands, notice ends; tick while calls run."""
        quiet = served = 0
        while not self._stopped:
            busy = quiet < TICKS_WITHOUT_WORK or self._door.nr_handshakes > 0
            if not busy:
                self._warden_parked = True
                busy = self._any_running()
            self._warden_parked = not busy
            try:
                events = self._poll.poll(TICK_SECONDS * 1e3 if busy else None)
                for fd, event in events:
                    self._event(fd, event)
                self._door.expire()
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
        elif fd in self._door:
            self._door.readable(fd)
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

    def _read_to_the_end(self, connection: Attended) -> None:
        """Look for DISCARD, which a client that ended may have sent last."""
        with connection.read_lock, contextlib.suppress(PeerLost, RemoteProtocolError, ValueError):
            while (data := connection.channel.recv()) is not None:
                frame = _parse(data)
                if frame.kind == Kind.DISCARD:
                    self._discard(connection, frame.call_id)

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
                    connection.flush()
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

    def _read_aside(self, connection: Attended) -> None:
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
                self._runner.failed(connection, frame.call_id, error, Code.REMOTE)
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
                connection.send(frames.short(Kind.GOAWAY))
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
        self._runner.stop(lambda: give_up - time.monotonic())
        self._close_all()

    def _check_fork(self) -> None:
        if self._forked:
            raise ForkedError(f"{self.name} is served by the parent of this forked child")

    def _after_fork(self) -> None:
        """In a child: let go of descriptors, or peers would not notice when the parent ends. Locks may be held for ever."""
        self._forked = True
        self._stopped = True
        self._door.after_fork()
        for connection in list(self._connections.values()):
            connection.closed = True
            release(connection.channel)

    def _busy(self) -> bool:
        nr_calls = sum(len(connection.calls) for connection in list(self._connections.values()))
        return nr_calls > (self._stopper in self._threads)  # one that stops its own server

    def _close_all(self) -> None:
        self._door.close()
        for fd in (self._wake, self._woken):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._wake = self._woken = -1

    def wait(self) -> None:
        """Wait until the server is stopped by another thread or a signal handler."""
        self._check_fork()
        self._ended.wait()
