"""Connections that threads share, and futures.

Who reads. There is no reader thread: a thread that waits for its reply reads the connection and hands others theirs; when it
leaves, another waiting thread takes over. A lone caller is woken once per call, straight from the ring.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import select
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import (
    CallCancelled,
    DeadlineExceeded,
    DmError,
    PeerLost,
    ProtocolViolation,
)
from . import frames
from .calls import _current
from .channel import Channel
from .connection import Connection, Pending
from .frames import Welcome
from .marshal import Encoded, Reader
from .places import Attachment

if TYPE_CHECKING:
    from .client import Prepared
    from .link import MethodTable

__all__ = ["CallFuture", "SyncConnection", "SyncPending", "await_nested", "first_done"]

SLICE_SECONDS = 0.1  # longest sleep of a thread that waits: another one may cancel its call
_head, _parse = frames.head, frames.parse
_monotonic = time.monotonic


class SyncConnection(Connection):
    """A connection that threads share."""

    def __init__(
        self, host: Attachment, service: str, channel: Channel, welcome: Welcome, table: MethodTable
    ) -> None:
        super().__init__(host, service, channel, welcome)
        self.table = table
        self.used = time.monotonic()
        self.unsent: collections.deque[bytes] = collections.deque()  # short frames, oldest first
        self.read_lock = threading.Lock()
        self.turn = threading.Condition()  # for threads that wait while another one reads
        self.nr_followers = 0
        self._shaken = channel.traffic()  # what the handshake took

    def traffic(self) -> tuple[int, int]:
        """Return the bytes sent and received in messages."""
        (sent, received), (first_sent, first_received) = self.channel.traffic(), self._shaken
        return sent - first_sent, received - first_received

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
            await_nested(pending, timeout)
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


def await_nested(pending: SyncPending, timeout: float | None = None) -> None:
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


class _AnyOf:
    """Several calls, waited for as if they were one that ends with the first of them."""

    __slots__ = ("deadline", "pendings")

    def __init__(self, pendings: list[SyncPending]) -> None:
        self.pendings = pendings
        self.deadline = None  # each of them has its own: see first_done()

    @property
    def done(self) -> bool:
        return any(pending.done for pending in self.pendings)


def first_done(futures: Sequence[CallFuture], timeout: float | None = None) -> CallFuture:
    """Wait until one of several calls has ended, and return it; of those that have, the first in the list.

    Args:
        futures: calls of one client.
        timeout: seconds; None: until their own deadlines.

    Raises:
        TimeoutError: timeout is over, and none has ended.
        ValueError: none was given, or some are of another client.
    """
    give_up = None if timeout is None else _monotonic() + timeout
    call = _current.get()
    if call is not None and call.about_to_block is not None:
        call.about_to_block()
    while True:
        for future in futures:
            if future._pending.done:
                return future
        if call is not None:
            call.check()
        now = _monotonic()
        if give_up is not None and now >= give_up:
            raise concurrent.futures.TimeoutError(f"no call of {len(futures)} ended in {timeout} s")
        _await_some([future._pending for future in futures], now, give_up, call is not None)
        for future in futures:
            if future._pending.done:
                return future
        for future in futures:
            future.done()  # gives up on one that is late


def _await_some(
    pendings: list[SyncPending], now: float, give_up: float | None, nested: bool
) -> None:
    """Wait for the first of some calls, or until there is reason to look around."""
    connections = {pending.connection for pending in pendings}
    if len({connection.service for connection in connections}) != 1:
        raise ValueError("first_done: calls of one client, at least one")
    ends = [pending.deadline for pending in pendings if pending.deadline is not None]
    if give_up is not None:
        ends.append(give_up)
    if nested:  # the call that is being served may be cancelled
        ends.append(now + SLICE_SECONDS)
    if len(connections) > 1:  # a client that reconnects has two for a while
        ends.append(now + SLICE_SECONDS / 100)
    left = max(0.0, min(ends) - now) if ends else None
    for connection in connections:
        mine = _AnyOf([pending for pending in pendings if pending.connection is connection])
        connection.await_(mine, left)  # type: ignore[arg-type]
