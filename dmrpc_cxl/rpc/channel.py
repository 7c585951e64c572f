"""One interface over two transports: frames in, frames out. Neither knows what is in a frame but its size.

A channel is used by one reader and one writer at a time; its owner sees to that. Nothing here blocks but send and wait.

- RingChannel: rings in shared memory (_native.Ring). The Unix socket over which the memory came stays open and says
  nothing more: its end is the peer's end.
- TcpChannel: a socket, also used for the few frames of a handshake over a Unix socket.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeAlias

from .._native import Ring, begin_frame, grow_frame
from ..errors import DeadlineExceeded, PeerLost, RemoteProtocolError, RingClosed
from .frames import HEADER_BYTES, MAX_FRAME_BYTES

__all__ = ["Channel", "Parts", "RingChannel", "TcpChannel"]

Part: TypeAlias = bytes | bytearray | memoryview
Parts: TypeAlias = Sequence[Part]

READ_BYTES = 256 << 10
SEND_BUFFER_BYTES = 512 << 10  # asked of the kernel: docs/decisions/0019-what-sockets-hold.md
MAX_IOV = 512
_SIZE = struct.Struct("<I")


class Channel(ABC):
    """Frames to and from a peer."""

    kind = ""
    max_frame = MAX_FRAME_BYTES

    @abstractmethod
    def send(self, parts: Parts | bytes, timeout: float | None) -> None:
        """Send a frame, waiting while the peer does not read.

        Raises:
            DeadlineExceeded: it does not; the frame may be in the stream in part, the channel is of no use then.
            PeerLost: there is no peer any more.
        """

    @abstractmethod
    def try_send(self, parts: Parts | bytes, skip: int) -> int:
        """Send what can be sent at once of the bytes from skip on; return how many. The rest: when writable."""

    @abstractmethod
    def recv(self) -> bytearray | None:
        """Return the next frame if it is there already.

        Raises:
            PeerLost: nothing more will come.
            RemoteProtocolError: its size is impossible.
        """

    @abstractmethod
    def wait(self, timeout: float | None) -> bool:
        """Wait until recv() is worth a try; return False when the time is over."""

    @abstractmethod
    def arm(self) -> bool:
        """Ask for fileno() to become readable when something comes; True: something is there already."""

    @abstractmethod
    def fileno(self) -> int:
        """Return the descriptor to poll."""

    @abstractmethod
    def quiet(self) -> None:
        """Take back what made fileno() readable, for level-triggered loops; before recv()."""

    @abstractmethod
    def traffic(self) -> tuple[int, int]:
        """Return the bytes sent and received so far; also after close()."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything; idempotent."""


class RingChannel(Channel):
    """Rings in shared memory."""

    kind = "ring"

    def __init__(
        self, ring: Ring, control: socket.socket, max_frame: int = MAX_FRAME_BYTES
    ) -> None:
        self.ring = ring
        self.control = control
        self.max_frame = max_frame
        control.setblocking(False)
        ring.set_peer_fd(control.fileno())
        self.gone = False
        self._traffic = (0, 0)
        # Straight to the ring: a method in between is a measurable part of a small call.
        self.try_send = ring.try_send  # type: ignore[method-assign]
        self.arm = ring.arm  # type: ignore[method-assign]
        self.fileno_ = ring.bell_fd
        self._recv = ring.recv
        self._send = ring.send

    def send(self, parts: Parts | bytes, timeout: float | None) -> None:
        """See Channel."""
        self._send(parts, timeout)

    def try_send(self, parts: Parts | bytes, skip: int) -> int:
        """See Channel."""
        return self.ring.try_send(parts, skip)

    def arm(self) -> bool:
        """See Channel."""
        return self.ring.arm()

    def recv(self) -> bytearray | None:
        """See Channel."""
        data = self._recv()
        if data is None and (self.gone or self.ring.peer_gone) and not self.ring.has_data():
            raise PeerLost("the peer closed the connection or died")
        return data

    def wait(self, timeout: float | None) -> bool:
        """See Channel."""
        ring = self.ring
        return ring.wait(timeout) or ring.peer_gone or ring.peer_spoke

    def fileno(self) -> int:
        """See Channel."""
        return self.fileno_

    def quiet(self) -> None:
        """See Channel."""
        self.ring.drain_bell()

    def peer_ended(self) -> None:
        """Say that the control socket came to its end."""
        self.gone = True

    def traffic(self) -> tuple[int, int]:
        """See Channel."""
        with contextlib.suppress(RingClosed):
            stats = self.ring.stats()
            self._traffic = stats["bytes_sent"], stats["bytes_received"]
        return self._traffic

    def close(self) -> None:
        """See Channel."""
        self.traffic()
        with contextlib.suppress(RingClosed):
            self.ring.set_peer_fd(-1)
        self.ring.close()
        self.control.close()


class TcpChannel(Channel):
    """A stream socket."""

    kind = "tcp"

    def __init__(self, sock: socket.socket, max_frame: int = MAX_FRAME_BYTES) -> None:
        self.socket = sock
        self.max_frame = max_frame
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            # A peer that vanished without a word is noticed within some 25 s.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._buffer = bytearray(READ_BYTES)
        self._view = memoryview(self._buffer)
        self._from = self._to = 0
        self._large: bytearray | None = (
            None  # a frame that does not fit the buffer, as far as it came
        )
        self._large_to = self._large_size = 0
        self._bytes_sent = self._bytes_received = 0

    # ------------------------------------------------------------ sending

    def try_send(self, parts: Parts | bytes, skip: int = 0) -> int:
        """See Channel."""
        if isinstance(parts, bytes):
            parts = (parts,)
        sent = 0
        rest = _after(parts, skip)
        try:
            while rest:
                n = self.socket.sendmsg(rest[:MAX_IOV])
                sent += n
                rest = _after(rest, n)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            raise PeerLost(f"sending failed: {error.strerror}") from error
        finally:
            self._bytes_sent += sent
        return sent

    def send(self, parts: Parts | bytes, timeout: float | None) -> None:
        """See Channel."""
        if isinstance(parts, bytes):
            parts = (parts,)
        total = sum(len(part) for part in parts)
        sent = self.try_send(parts, 0)
        if sent == total:
            return
        give_up = None if timeout is None else time.monotonic() + timeout
        writable = select.poll()
        writable.register(self.socket, select.POLLOUT)
        while sent < total:
            left = None if give_up is None else give_up - time.monotonic()
            if left is not None and left <= 0:
                raise DeadlineExceeded("the peer does not read what it is sent")
            writable.poll(None if left is None else left * 1e3)
            sent += self.try_send(parts, sent)

    # ------------------------------------------------------------ receiving

    def recv(self) -> bytearray | None:
        """See Channel."""
        while True:
            if self._large is not None:
                if not self._fill_large():
                    return None
                frame, self._large = self._large, None
                return frame
            have = self._to - self._from
            if have >= 4:
                (size,) = _SIZE.unpack_from(self._buffer, self._from)
                if not HEADER_BYTES <= size <= self.max_frame:
                    raise RemoteProtocolError(
                        f"a frame of {size} bytes; allowed are {HEADER_BYTES} to {self.max_frame}"
                    )
                if size <= have:
                    frame = self._buffer[self._from : self._from + size]
                    self._from += size
                    return frame
                if size > READ_BYTES:
                    self._begin_large(size)
                    continue
            if self._from:
                self._buffer[:have] = self._buffer[self._from : self._to]
                self._from, self._to = 0, have
            n = self._read(self._view[self._to :])
            if n == 0:
                return None
            self._to += n

    def _begin_large(self, size: int) -> None:
        have = self._to - self._from
        self._large = begin_frame(size)
        self._large[:have] = self._view[self._from : self._to]
        self._large_to, self._large_size = have, size
        self._from = self._to = 0

    def _fill_large(self) -> bool:
        large = self._large
        assert large is not None
        while self._large_to < self._large_size:
            if self._large_to == len(large):  # only as much as has come is believed
                grow_frame(large, self._large_size)
            with memoryview(large) as view:
                n = self._read(view[self._large_to :])
            if n == 0:
                return False
            self._large_to += n
        return True

    def _read(self, into: memoryview) -> int:
        try:
            n = self.socket.recv_into(into)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise PeerLost(f"receiving failed: {error.strerror}") from error
        if n == 0:
            raise PeerLost("the peer closed the connection or died")
        self._bytes_received += n
        return n

    def take_rest(self) -> bytes:
        """Return what was read and belongs to no frame that recv() has returned; whoever goes on reading has it."""
        rest = bytes(self._view[self._from : self._to])
        self._from = self._to = 0
        return rest

    def wait(self, timeout: float | None) -> bool:
        """See Channel."""
        return bool(self._poll.poll(None if timeout is None else max(0.0, timeout) * 1e3))

    def arm(self) -> bool:
        """See Channel; a socket is always armed."""
        return False

    def fileno(self) -> int:
        """See Channel."""
        return self.socket.fileno()

    def quiet(self) -> None:
        """See Channel; reading is what makes a socket quiet."""

    def traffic(self) -> tuple[int, int]:
        """See Channel."""
        return self._bytes_sent, self._bytes_received

    def close(self) -> None:
        """See Channel."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def _after(parts: Parts, skip: int) -> list[Part]:
    """Return what comes behind the first skip bytes."""
    rest: list[Part] = []
    for part in parts:
        if skip >= len(part):
            skip -= len(part)
            continue
        rest.append(memoryview(part)[skip:] if skip else part)
        skip = 0
    return rest
