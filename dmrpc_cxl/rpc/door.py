"""Where clients come in: listening sockets, and peers that have connected and not said who they are yet.

Whoever owns a door watches its descriptors and hands it what becomes readable; nothing here waits, but for a peer that does
not take its WELCOME. A peer that does not finish its handshake in time is sent away, and so is one too many.
"""

from __future__ import annotations

import collections
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

from ..errors import AccessDenied, DmError, InterfaceMismatch, Overloaded, PeerError
from . import frames
from .channel import Channel
from .endpoint import Handshake, listen_tcp, listen_unix
from .frames import Code, Welcome
from .places import Attachment

__all__ = ["Door"]

log = logging.getLogger("dmrpc.rpc")

MAX_HANDSHAKES = 256
ACCEPTED_AT_ONCE = 64
PAUSE_SECONDS = 0.005  # when a connection cannot be accepted: out of descriptors, for one


class Door:
    """The entrance of one service.

    Args:
        host: whose secret is asked for.
        name: of the service; nothing else is served here.
        welcome: returns what clients are told.
        ring_bytes: capacity of the rings that are made.
        watch, unwatch: begin and cease to watch a descriptor for being readable.
        full: tells whether there is no room for one more client.
        enter: is given the channel of each client that has come in.
        counts: where what goes wrong is counted.
    """

    def __init__(
        self,
        host: Attachment,
        name: str,
        welcome: Callable[[], Welcome],
        ring_bytes: int,
        *,
        watch: Callable[[int], object],
        unwatch: Callable[[int], object],
        full: Callable[[], str | None],
        enter: Callable[[Channel], object],
        counts: collections.Counter[str],
    ) -> None:
        self._host = host
        self._name = name
        self._welcome = welcome
        self._ring_bytes = ring_bytes
        self._watch = watch
        self._unwatch = unwatch
        self._full = full
        self._enter = enter
        self._counts = counts
        self._listeners: dict[int, tuple[socket.socket, str]] = {}
        self._handshakes: dict[int, Handshake] = {}

    def open(self, tcp: str | tuple[str, int] | None) -> dict[str, Any]:
        """Listen, on a Unix socket and where tcp says; return the endpoint to publish.

        Raises:
            PeerError: the address is not to be had.
        """
        unix, ring_name = listen_unix(self._host.fabric)
        self._listen(unix, "ring")
        address = None
        if tcp is not None:
            where = (tcp, 0) if isinstance(tcp, str) else tcp
            try:
                sock, address = listen_tcp(*where)
            except OSError as error:
                raise PeerError(f"cannot listen on {where}: {error}") from error
            self._listen(sock, "tcp")
        return {"protocol": frames.PROTOCOL, "ring": ring_name, "tcp": address}

    def _listen(self, sock: socket.socket, kind: str) -> None:
        self._listeners[sock.fileno()] = (sock, kind)
        self._watch(sock.fileno())

    def __contains__(self, fd: int) -> bool:
        return fd in self._listeners or fd in self._handshakes

    @property
    def nr_handshakes(self) -> int:
        """Number of peers in the midst of a handshake."""
        return len(self._handshakes)

    def readable(self, fd: int) -> None:
        """Take note that a descriptor of this door's is readable."""
        if fd in self._listeners:
            self._accept(*self._listeners[fd])
        elif fd in self._handshakes:
            self._shake(fd)

    def _accept(self, listener: socket.socket, kind: str) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                log.warning("%s: cannot accept: %s", self._name, error)
                self._counts["not accepted"] += 1
                time.sleep(PAUSE_SECONDS)
                return
            handshake = Handshake(sock, kind)
            if len(self._handshakes) >= MAX_HANDSHAKES:
                self._counts["bad handshakes"] += 1
                handshake.channel.close()
                continue
            self._handshakes[sock.fileno()] = handshake
            self._watch(sock.fileno())

    def _shake(self, fd: int) -> None:
        handshake = self._handshakes[fd]
        try:
            hello = handshake.read(self._host)
            if hello is None:
                return
            self._forget(fd)
            if hello.service != self._name:
                error = PeerError(f"{hello.service!r} is not served here, but {self._name!r}")
                handshake.refuse(Code.UNKNOWN_SERVICE, error)
                return
            # Said only now: a socket that is closed before HELLO is read takes what was said along.
            if (why := self._full()) is not None:
                self._counts["overloaded"] += 1
                handshake.refuse(Code.OVERLOADED, Overloaded(why))
                return
            self._enter(handshake.welcome(self._welcome(), self._ring_bytes))
        except AccessDenied as error:
            self._refuse(fd, handshake, Code.DENIED, error)
        except InterfaceMismatch as error:
            self._refuse(fd, handshake, Code.VERSION, error)
        except (DmError, OSError) as error:
            self._forget(fd)
            self._counts["bad handshakes"] += 1
            log.debug("%s: a handshake failed: %s", self._name, error)
            handshake.channel.close()

    def _refuse(self, fd: int, handshake: Handshake, code: Code, error: DmError) -> None:
        self._forget(fd)
        self._counts["bad handshakes"] += 1
        log.warning("%s: refused a connection: %s", self._name, error)
        handshake.refuse(code, error)

    def _forget(self, fd: int) -> None:
        if self._handshakes.pop(fd, None) is not None:
            self._unwatch(fd)

    def expire(self) -> None:
        """Send those away who take too long over their handshake."""
        now = time.monotonic()
        for fd, handshake in list(self._handshakes.items()):
            if now > handshake.give_up:
                self._forget(fd)
                self._counts["bad handshakes"] += 1
                handshake.channel.close()

    def close(self) -> None:
        """Close every socket. Idempotent."""
        for sock, _ in self._listeners.values():
            sock.close()
        self._listeners.clear()
        for handshake in self._handshakes.values():
            handshake.channel.close()
        self._handshakes.clear()

    def after_fork(self) -> None:
        """In a child: let go of the descriptors, and take no lock, for it may be held for ever."""
        for sock, _ in self._listeners.values():
            sock.close()
        for handshake in list(self._handshakes.values()):
            handshake.channel.socket.close()
