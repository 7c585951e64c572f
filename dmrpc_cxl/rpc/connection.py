"""What the synchronous and the asyncio client share: ids, calls without reply, what happens to a frame that came.

Refs. Those of a call are this host's until the server accepts them. However the call ends, what nobody has accepted by then
is dropped. A reply that nobody waits for any more gives its Refs back as soon as it is read.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from abc import ABC, abstractmethod
from typing import Any

from .._native import crash_point
from ..errors import (
    DmError,
    InterfaceMismatch,
    PeerLost,
    RefConsumed,
    RemoteProtocolError,
)
from . import frames
from .channel import Channel
from .frames import ERROR, PICKLED, REPLY, Frame, Kind, Welcome
from .marshal import Reader
from .places import Attachment
from .remote_errors import error_of

__all__ = ["Connection", "Pending"]


class Pending(ABC):
    """A call without its reply. The class of what waits for it: synchronous and asyncio calls derive from this."""

    __slots__ = ("call_id", "deadline", "method", "reader", "refs")

    def __init__(self, method: str, reader: Reader, deadline: float | None) -> None:
        self.method = method
        self.reader = reader
        self.deadline = deadline
        self.call_id = 0
        self.refs = b""

    @abstractmethod
    def settle(self, value: Any, error: BaseException | None) -> None:
        """Take the outcome; called once."""


class Connection(ABC):
    """What the two kinds of client share: ids, calls without reply, what happens to a frame that came."""

    def __init__(self, host: Attachment, service: str, channel: Channel, welcome: Welcome) -> None:
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
        except (
            RefConsumed
        ):  # the server has ended, and what it held came back before it was read here
            failure = PeerLost(
                f"{self.service}.{pending.method}: the service ended before its result was taken"
            )
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
            crash_point("reply_read")
            self.host.drop_refs(frame.refs)  # those the value did not use
        self.settle(pending, value, failure)

    def settle(self, pending: Pending, value: Any, error: BaseException | None) -> None:
        """End a call; what nobody has accepted of it comes back."""
        if pending.refs:
            self.host.drop_refs(pending.refs)
            crash_point("refs_taken_back")
        pending.settle(value, error)

    def give_up(self, pending: Pending, error: BaseException) -> None:
        """End a call that has no reply, and tell the server."""
        if self.pending.pop(pending.call_id, None) is None:
            return
        with contextlib.suppress(DmError, ValueError):
            self.send_short(frames.short(Kind.CANCEL, pending.call_id))
        self.settle(pending, None, error)

    @abstractmethod
    def send_short(self, frame: bytes) -> None:
        """Send a frame that is all header."""

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
