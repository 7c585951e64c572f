"""A load balancer that passes calls on as they are.

It reads headers only: payload is neither decoded nor copied to anywhere but the next connection, and DM is never touched.
A Ref in a call stays its sender's until the backend accepts it, so a forwarder that dies takes nothing with it. A reply that
can no longer be delivered is handed back to its backend with DISCARD, which drops its Refs.

One thread does everything and never waits for one peer: what a connection does not take at once is kept for it, up to a
limit, after which it is closed.

Paper: VI-B (application-layer load balancer).
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import socket
import threading
import time
from collections.abc import Sequence

from .._native import WaitSet
from ..errors import (
    AccessDenied,
    DmError,
    InterfaceMismatch,
    Overloaded,
    PeerError,
    PeerLost,
    RemoteProtocolError,
    ServiceNotFound,
    ServiceStopping,
)
from ..host import Host
from . import endpoint, frames
from .channel import Channel, Parts, RingChannel
from .client import Backoff
from .endpoint import RING_BYTES, Handshake, error_frame, listen_tcp, listen_unix
from .frames import Code, Frame, Kind, Welcome

__all__ = ["Forwarder"]

log = logging.getLogger("dmrpc.rpc")

MAX_BACKLOG_BYTES = 256 << 20
KICK = -1


class _Peer:
    """A connection of either side."""

    def __init__(self, channel: Channel, key: int) -> None:
        self.channel = channel
        self.key = key
        self.closed = False
        self.backlog: collections.deque[tuple[Parts, int, int]] = collections.deque()
        self.backlog_bytes = 0


class _Client(_Peer):
    def __init__(self, channel: Channel, key: int) -> None:
        super().__init__(channel, key)
        self.last_id = 0
        self.calls: dict[int, tuple[_Backend, int]] = {}  # its id -> backend, id there


class _Backend(_Peer):
    def __init__(self, channel: Channel, key: int, name: str) -> None:
        super().__init__(channel, key)
        self.name = name
        self.ids = itertools.count(1)
        self.calls: dict[int, tuple[_Client, int]] = {}  # id there -> client, its id
        self.leaving = False


class Forwarder:
    """Serves under a name by passing every call on to the least loaded of several services with the same methods.

    Load is the number of calls without reply; among equals they take turns. A backend that dies is left out, its calls fail
    with PeerLost, and it is tried again with growing pauses.

    Args:
        host: whose name service is used; the process needs no DM of its own.
        name: to publish.
        backends: names of services.
        tcp: where to listen; None: rings only.
        max_outstanding: calls under way in all; more are refused as Overloaded.

    Raises:
        ServiceNotFound, PeerLost: no backend can be reached.
        InterfaceMismatch: backends have different methods.

    Paper: VI-B.
    """

    def __init__(
        self,
        host: Host,
        name: str,
        backends: Sequence[str],
        *,
        transport: endpoint.Transport = "auto",
        tcp: str | tuple[str, int] | None = "127.0.0.1",
        max_outstanding: int = 4096,
        max_connections: int = 1024,
        ring_bytes: int = RING_BYTES,
        connect_timeout: float = 5.0,
    ) -> None:
        if not backends:
            raise ValueError("a forwarder needs the name of one backend at least")
        self.host = host
        self.name = name
        self.nr_forwarded = 0
        self.bytes_forwarded = 0
        self.forwarded_to: collections.Counter[str] = collections.Counter()
        self._names = list(dict.fromkeys(backends))
        self._transport: endpoint.Transport = transport
        self._connect_timeout = connect_timeout
        self._max_outstanding = max_outstanding
        self._max_connections = max_connections
        self._ring_bytes = ring_bytes
        self._nr_outstanding = 0
        self._turn = itertools.count()
        self._keys = itertools.count(1)
        self._peers: dict[int, _Client | _Backend] = {}
        self._backends: dict[str, _Backend] = {}
        self._again: dict[str, tuple[Backoff, float]] = {}  # backends to try again, and when
        self._controls: dict[int, _Client | _Backend] = {}
        self._handshakes: dict[int, Handshake] = {}
        self._stopping = False
        self._welcome: Welcome | None = None
        self._waits = WaitSet()
        self._fds: dict[int, int] = {}  # key in the wait set -> descriptor
        failure: DmError | None = None
        for backend in self._names:
            try:
                self._connect(backend)
            except (PeerLost, ServiceNotFound) as error:
                failure = error
                self._again[backend] = (Backoff(), time.monotonic())
        if not self._backends:
            self._waits.close()
            assert failure is not None
            raise failure
        self._listeners: dict[int, tuple[socket.socket, str]] = {}
        unix, ring_name = listen_unix(host.fabric)
        self._listen(unix, "ring")
        address = None
        if tcp is not None:
            sock, address = listen_tcp(*((tcp, 0) if isinstance(tcp, str) else tcp))
            self._listen(sock, "tcp")
        self.endpoint = {"protocol": frames.PROTOCOL, "ring": ring_name, "tcp": address}
        self._thread = threading.Thread(target=self._run, name=f"{name}-forwarder", daemon=True)
        self._thread.start()
        try:
            host.publish(name, self.endpoint)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Forwarder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    # ------------------------------------------------------------ connections

    def _watch(self, fd: int) -> int:
        key = next(self._keys)
        self._fds[key] = fd
        self._waits.add_fd(fd, key, False)
        return key

    def _unwatch(self, fd: int) -> None:
        for key, known in list(self._fds.items()):
            if known == fd:
                del self._fds[key]
                self._waits.remove(fd)

    def _listen(self, sock: socket.socket, kind: str) -> None:
        self._listeners[sock.fileno()] = (sock, kind)
        self._watch(sock.fileno())

    def _add(self, peer: _Client | _Backend) -> None:
        self._peers[peer.key] = peer
        channel = peer.channel
        if isinstance(channel, RingChannel):
            fd = channel.control.fileno()
            self._controls[fd] = peer
            self._watch(fd)
            self._waits.add_ring(channel.ring, peer.key)
        else:
            self._waits.add_fd(channel.fileno(), peer.key, True)

    def _connect(self, name: str) -> None:
        channel, welcome = endpoint.connect(self.host, name, self._transport, self._connect_timeout)
        mine = self._welcome
        if mine is not None and mine.methods != welcome.methods:
            channel.close()
            raise InterfaceMismatch(f"{name} has other methods than {self._names[0]}")
        if mine is None:
            self._welcome = welcome
        backend = _Backend(channel, next(self._keys), name)
        self._backends[name] = backend
        self._add(backend)

    def _close(self, peer: _Client | _Backend, why: str) -> None:
        if peer.closed:
            return
        peer.closed = True
        self._peers.pop(peer.key, None)
        channel = peer.channel
        if isinstance(channel, RingChannel):
            fd = channel.control.fileno()
            self._controls.pop(fd, None)
            self._unwatch(fd)
            self._waits.remove(channel.ring)
        else:
            self._waits.remove(channel.fileno())
        log.debug("%s: a connection ended: %s", self.name, why)
        if isinstance(peer, _Backend):
            self._lose_backend(peer, why)
        else:
            for backend, there in peer.calls.values():
                # Its reply finds nobody and is discarded then; the backend need not go on.
                if not backend.closed:
                    self._send(backend, (frames.short(Kind.CANCEL, there),))
            peer.calls.clear()
        channel.close()

    def _lose_backend(self, backend: _Backend, why: str) -> None:
        if self._backends.get(backend.name) is backend:
            del self._backends[backend.name]
            self._again[backend.name] = (Backoff(), time.monotonic())
        error = PeerLost(f"{self.name}: backend {backend.name}: {why}")
        self._nr_outstanding -= len(backend.calls)
        for client, call_id in backend.calls.values():
            if client.calls.pop(call_id, None) is not None and not client.closed:
                self._send(client, (error_frame(call_id, Code.PEER, error),))
        backend.calls.clear()

    def _reconnect(self) -> None:
        now = time.monotonic()
        for name, (backoff, when) in list(self._again.items()):
            if now < when:
                continue
            try:
                self._connect(name)
                del self._again[name]
            except DmError as error:
                log.debug("%s: backend %s: %s", self.name, name, error)
                self._again[name] = (backoff, now + backoff.pause())

    # ------------------------------------------------------------ the loop

    def _run(self) -> None:
        while not self._stopping:
            timeout = None
            if self._again or self._handshakes:
                timeout = 0.05
            try:
                key = self._waits.wait(timeout)
            except ValueError:
                return
            try:
                self._event(key)
                if self._again:
                    self._reconnect()
                if self._handshakes:
                    self._expire()
            except Exception:
                if self._stopping:
                    return
                log.exception("%s: the forwarder stumbled", self.name)

    def _event(self, key: int | None) -> None:
        if key is None or key == KICK:
            return
        peer = self._peers.get(key)
        if peer is not None:
            self._read(peer)
            return
        fd = self._fds.get(key, -1)
        if fd in self._listeners:
            self._accept(*self._listeners[fd])
        elif fd in self._handshakes:
            self._shake(fd)
        elif fd in self._controls:
            peer = self._controls[fd]
            assert isinstance(peer.channel, RingChannel)
            peer.channel.peer_ended()
            self._read(peer)
            self._close(peer, "the peer closed the connection or died")

    def _read(self, peer: _Client | _Backend) -> None:
        channel = peer.channel
        try:
            while not peer.closed:
                data = channel.recv()
                if data is None:
                    if peer.backlog:
                        self._flush(peer)
                    if channel.arm():
                        continue
                    return
                frame = frames.parse(data)
                if isinstance(peer, _Client):
                    self._from_client(peer, frame)
                else:
                    self._from_backend(peer, frame)
        except PeerLost as error:
            self._close(peer, str(error))
        except RemoteProtocolError as error:
            log.warning("%s: closing a connection: %s", self.name, error)
            with contextlib.suppress(DmError):
                channel.try_send((error_frame(0, Code.VERSION, error),), 0)
            self._close(peer, str(error))

    def _from_client(self, client: _Client, frame: Frame) -> None:
        call_id = frame.call_id
        if frame.kind == Kind.CALL:
            if call_id <= client.last_id:
                raise RemoteProtocolError(f"call {call_id} came after call {client.last_id}")
            client.last_id = call_id
            self._forward(client, frame)
        elif frame.kind in (Kind.CANCEL, Kind.DISCARD):
            found = client.calls.get(call_id)
            if found is not None:
                self._send(found[0], (frames.short(frame.kind, found[1]),))
        else:
            raise RemoteProtocolError(f"a client does not send frames of kind {frame.kind}")

    def _forward(self, client: _Client, frame: Frame) -> None:
        call_id = frame.call_id
        backend = self._least_loaded()
        if backend is None:
            error: DmError = PeerLost(f"{self.name}: no backend can be reached")
            self._send(client, (error_frame(call_id, Code.PEER, error),))
            return
        if self._nr_outstanding >= self._max_outstanding:
            error = Overloaded(f"{self.name} has {self._max_outstanding} calls under way")
            self._send(client, (error_frame(call_id, Code.OVERLOADED, error),))
            return
        there = next(backend.ids)
        backend.calls[there] = (client, call_id)
        client.calls[call_id] = (backend, there)
        self._nr_outstanding += 1
        frames.readdress(frame, there)
        self._send(backend, (frame.data,))
        self.nr_forwarded += 1
        self.bytes_forwarded += len(frame.data)
        self.forwarded_to[backend.name] += 1

    def _least_loaded(self) -> _Backend | None:
        backends = [backend for backend in self._backends.values() if not backend.leaving]
        if len(backends) < 2:
            return backends[0] if backends else None
        first = next(self._turn) % len(backends)
        return min(backends[first:] + backends[:first], key=lambda backend: len(backend.calls))

    def _from_backend(self, backend: _Backend, frame: Frame) -> None:
        if frame.kind in (Kind.REPLY, Kind.ERROR) and frame.call_id:
            client, call_id = backend.calls.pop(frame.call_id, (None, 0))
            if client is None:
                raise RemoteProtocolError(f"a reply to call {frame.call_id}, which was not made")
            self._nr_outstanding -= 1
            client.calls.pop(call_id, None)
            there = frame.call_id
            if not client.closed:
                frames.readdress(frame, call_id)
                self.bytes_forwarded += len(frame.data)
                if self._send(client, (frame.data,)):
                    return
            if frame.nr_refs:
                self._send(backend, (frames.short(Kind.DISCARD, there),))
        elif frame.kind == Kind.GOAWAY:
            backend.leaving = True
        else:
            raise RemoteProtocolError(f"a server does not send frames of kind {frame.kind}")

    # ------------------------------------------------------------ sending

    def _send(self, peer: _Client | _Backend, parts: Parts) -> bool:
        """Send, or keep for later; False: there is no peer any more."""
        if peer.closed:
            return False
        total = sum(len(part) for part in parts)
        try:
            sent = 0 if peer.backlog else peer.channel.try_send(parts, 0)
        except (PeerLost, RemoteProtocolError, ValueError) as error:
            self._close(peer, str(error))
            return False
        if sent < total:
            peer.backlog.append((parts, sent, total))
            peer.backlog_bytes += total - sent
            if peer.backlog_bytes > MAX_BACKLOG_BYTES:
                self._close(peer, f"it left {peer.backlog_bytes} bytes unread")
                return False
        return True

    def _flush(self, peer: _Client | _Backend) -> None:
        while peer.backlog:
            parts, sent, total = peer.backlog[0]
            n = peer.channel.try_send(parts, sent)
            peer.backlog_bytes -= n
            if sent + n < total:
                peer.backlog[0] = (parts, sent + n, total)
                return
            peer.backlog.popleft()

    # ------------------------------------------------------------ accepting

    def _accept(self, listener: socket.socket, kind: str) -> None:
        try:
            sock, _ = listener.accept()
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                log.warning("%s: cannot accept: %s", self.name, error)
            return
        handshake = Handshake(sock, kind)
        if len(self._peers) + len(self._handshakes) >= self._max_connections:
            handshake.refuse(Code.OVERLOADED, Overloaded(f"{self.name} has too many connections"))
            return
        self._handshakes[sock.fileno()] = handshake
        self._watch(sock.fileno())

    def _shake(self, fd: int) -> None:
        handshake = self._handshakes[fd]
        try:
            hello = handshake.read(self.host)
            if hello is None:
                return
            self._forget(fd)
            if hello.service != self.name:
                handshake.refuse(
                    Code.UNKNOWN_SERVICE, PeerError(f"{hello.service!r} is not served here")
                )
                return
            assert self._welcome is not None
            self._add(_Client(handshake.welcome(self._welcome, self._ring_bytes), next(self._keys)))
        except (AccessDenied, InterfaceMismatch) as error:
            self._forget(fd)
            handshake.refuse(
                Code.DENIED if isinstance(error, AccessDenied) else Code.VERSION, error
            )
        except (DmError, OSError):
            self._forget(fd)
            handshake.channel.close()

    def _forget(self, fd: int) -> None:
        if self._handshakes.pop(fd, None) is not None:
            self._unwatch(fd)

    def _expire(self) -> None:
        now = time.monotonic()
        for fd, handshake in list(self._handshakes.items()):
            if now > handshake.give_up:
                self._forget(fd)
                handshake.channel.close()

    # ------------------------------------------------------------ the end

    def stop(self) -> None:
        """Withdraw the name and end every connection; calls under way fail with PeerLost. Idempotent."""
        if self._stopping:
            return
        with contextlib.suppress(DmError):
            self.host.withdraw(self.name)
        self._stopping = True
        self._waits.kick(1)
        if threading.current_thread() is not self._thread:
            self._thread.join(5)
        error = ServiceStopping("stopped")
        for peer in list(self._peers.values()):
            self._close(peer, str(error))
        for sock, _ in self._listeners.values():
            sock.close()
        for handshake in self._handshakes.values():
            handshake.channel.close()
        self._waits.close()

    def wait(self) -> None:
        """Wait until the forwarder is stopped by another thread or a signal handler."""
        while self._thread.is_alive():
            self._thread.join(0.5)
