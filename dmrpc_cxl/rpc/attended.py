"""A client of a server: what has been read from it, what runs for it, what it has not taken yet.

Nobody waits for a slow reader: what a connection does not take at once is kept for it, up to a limit, then it is closed. What
does not fit is in the backlog before the channel is asked to tell of room: who hears of room looks for a backlog.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable

from ..errors import PeerLost
from .calls import Call
from .channel import Channel, Parts, RingChannel, TcpChannel
from .frames import REF_BYTES, Frame
from .places import Attachment

__all__ = ["Attended"]

MAX_BACKLOG_BYTES = 256 << 20  # kept for a connection that does not read
UNSETTLED_REPLIES = 64


class Attended:
    """A connection that a server's workers attend to."""

    __slots__ = (
        "ahead",
        "backlog",
        "backlog_bytes",
        "calls",
        "channel",
        "closed",
        "give_up",
        "has_more",
        "host",
        "inline",
        "key",
        "last_id",
        "let_others_in",
        "read_lock",
        "send_lock",
        "unsettled",
    )

    def __init__(self, channel: Channel, key: int, host: Attachment) -> None:
        self.channel = channel
        self.key = key
        self.host = host
        self.closed = False
        self.let_others_in: Callable[[], None] = lambda: None
        self.give_up: Callable[[PeerLost], None] = lambda _: None  # closes it, as a slow reader
        self.read_lock = threading.Lock()
        self.send_lock = threading.Lock()
        self.has_more = _look_at(channel)  # without a system call
        self.last_id = 0
        self.ahead: collections.deque[tuple[Frame, Call]] = collections.deque()
        self.calls: dict[int, Call] = {}
        # calls that run on the thread that read them, since when
        self.inline: dict[int, float] = {}
        # parts, sent, total
        self.backlog: collections.deque[tuple[Parts | bytes, int, int]] = collections.deque()
        self.backlog_bytes = 0
        # call id, Refs of its reply
        self.unsettled: collections.deque[tuple[int, bytes]] = collections.deque()

    # ------------------------------------------------------------ sending

    def send(self, parts: Parts | bytes) -> None:
        """Send a frame, or keep what does not fit.

        Raises:
            PeerLost: the client is gone, or was closed now since it does not read.
        """
        total = len(parts) if isinstance(parts, bytes) else sum(len(part) for part in parts)
        with self.send_lock:
            if self.closed:
                raise PeerLost("the caller is gone")
            sent = 0
            if not self.backlog:
                sent = self.channel.try_send(parts, 0)
                if sent == total:
                    return
            self.backlog.append((parts, sent, total))
            self.backlog_bytes += total - sent
            self._send_backlog()
            if self.backlog_bytes <= MAX_BACKLOG_BYTES:
                return
        self.give_up(PeerLost(f"it left {self.backlog_bytes} bytes unread"))
        raise PeerLost("the caller does not read its replies")

    def flush(self) -> None:
        """Send what fits now."""
        with self.send_lock:
            self._send_backlog()

    def _send_backlog(self) -> None:
        while self.backlog and not self.closed:
            parts, sent, total = self.backlog[0]
            n = self.channel.try_send(parts, sent)
            self.backlog_bytes -= n
            if sent + n < total:
                self.backlog[0] = (parts, sent + n, total)
                return
            self.backlog.popleft()

    # ------------------------------------------------------------ Refs of replies

    def remember(self, call_id: int, refs: bytes) -> None:
        """Keep in mind the Refs of a reply until they were accepted, for a client that ends or discards it."""
        unsettled = self.unsettled
        with self.send_lock:
            while len(unsettled) >= UNSETTLED_REPLIES and not self._any_held(unsettled[0][1]):
                unsettled.popleft()
            unsettled.append((call_id, refs))

    def _any_held(self, refs: bytes) -> bool:
        each = (refs[at : at + REF_BYTES] for at in range(0, len(refs), REF_BYTES))
        return any(self.host.ref_is_held(ref) for ref in each)

    def refs_of(self, call_id: int) -> list[bytes]:
        """Return the Refs of a reply that may not have been accepted yet."""
        return [refs for known, refs in list(self.unsettled) if known == call_id]

    def close(self) -> bytes:
        """Close the channel, forget what was kept; return the Refs of replies that nobody may have accepted."""
        with self.send_lock:
            self.channel.close()
            refs = b"".join(refs for _, refs in self.unsettled)
            self.unsettled.clear()
            self.backlog.clear()
        return refs


def _look_at(channel: Channel) -> Callable[[], bool]:
    """Return what tells whether more has arrived, as far as this process knows."""
    if isinstance(channel, RingChannel):
        return channel.ring.has_data
    assert isinstance(channel, TcpChannel)
    return lambda: channel._to != channel._from
