"""A load balancer that passes calls on as they are.

It reads headers only: payload is neither decoded nor copied to anywhere but the next connection, and DM is never touched.
A Ref in a call stays its sender's until the backend accepts it, so a forwarder that dies takes nothing with it. A reply that
can no longer be delivered is handed back to its backend with DISCARD, which drops its Refs.

One thread does everything and never waits for one peer: what a connection does not take at once is kept for it, up to a
limit, after which it is closed. A second one exists while a backend is missing, and tries to connect to it.

Whether a client took the Refs of a reply, a forwarder cannot know. It remembers the replies with Refs that it passed on last:
so a client's DISCARD, or its end, reaches the backend that holds them. Of Refs taken the backend knows, and lets them be.

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
    DeadlineExceeded,
    DmError,
    ForkedError,
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
from .forks import not_for_children, release
from .frames import Code, Frame, Kind, Welcome

__all__ = ["Forwarder"]

log = logging.getLogger("dmrpc.rpc")

MAX_BACKLOG_BYTES = 256 << 20
MAX_DELIVERED = 4096  # replies with Refs remembered for each client
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
        self.delivered: dict[int, tuple[_Backend, int]] = {}  # the same, of replies with Refs


class _Backend(_Peer):
    def __init__(self, channel: Channel, key: int, name: str) -> None:
        super().__init__(channel, key)
        self.name = name
        self.ids = itertools.count(1)
        self.calls: dict[int, tuple[_Client, int]] = {}  # id there -> client, its id


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
        self._found: collections.deque[tuple[str, Channel, Welcome]] = collections.deque()
        self._seeker: threading.Thread | None = None
        self._seek_lock = threading.Lock()  # over _again and _seeker
        self._enough = threading.Event()  # no more seeking
        self._published = False
        self._forked = False
        self._controls: dict[int, _Client | _Backend] = {}
        self._handshakes: dict[int, Handshake] = {}
        self._stopping = False
        self._welcome: Welcome | None = None
        self._waits = WaitSet()
        self._fds: dict[int, int] = {}  # key in the wait set -> descriptor
        self._listeners: dict[int, tuple[socket.socket, str]] = {}
        try:
            self._begin(tcp)
        except BaseException:
            self._end()
            raise
        self._thread = threading.Thread(target=self._run, name=f"{name}-forwarder", daemon=True)
        self._thread.start()
        if self._again:
            self._seek()
        try:
            host.publish(name, self.endpoint)
            self._published = True
        except BaseException:
            self.stop()
            raise
        not_for_children(self)
        ends = getattr(host, "_ends", None)  # what a host that detaches stops
        if ends is not None:
            ends.add(self)

    def _begin(self, tcp: str | tuple[str, int] | None) -> None:
        failure: DmError | None = None
        for name in self._names:
            try:
                self._add_backend(
                    name,
                    *endpoint.connect(self.host, name, self._transport, self._connect_timeout),
                )
            except (PeerLost, ServiceNotFound, DeadlineExceeded) as error:
                failure = error
                self._again[name] = (Backoff(), time.monotonic())
        if not self._backends:
            assert failure is not None
            raise failure
        unix, ring_name = listen_unix(self.host.fabric)
        self._listen(unix, "ring")
        address = None
        if tcp is not None:
            where = (tcp, 0) if isinstance(tcp, str) else tcp
            try:
                sock, address = listen_tcp(*where)
            except OSError as error:
                raise PeerError(f"cannot listen on {where}: {error}") from error
            self._listen(sock, "tcp")
        self.endpoint = {"protocol": frames.PROTOCOL, "ring": ring_name, "tcp": address}

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

    def _add_backend(self, name: str, channel: Channel, welcome: Welcome) -> None:
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
            # A reply to such a call finds nobody and is discarded then; the backend need not go on.
            calls, peer.calls = peer.calls, {}
            for backend, there in list(calls.values()):
                self._send(backend, (frames.short(Kind.CANCEL, there),))
            for backend, there in list(peer.delivered.values()):
                self._send(backend, (frames.short(Kind.DISCARD, there),))
            peer.delivered.clear()
        channel.close()

    def _lose_backend(self, backend: _Backend, why: str) -> None:
        self._leave_out(backend)
        error = PeerLost(f"{self.name}: backend {backend.name}: {why}")
        self._nr_outstanding -= len(backend.calls)
        calls, backend.calls = backend.calls, {}
        for client, call_id in calls.values():
            if client.calls.pop(call_id, None) is not None and not client.closed:
                self._send(client, (error_frame(call_id, Code.PEER, error),))

    def _leave_out(self, backend: _Backend) -> None:
        """Give a backend no more calls, and look for its successor."""
        if self._backends.get(backend.name) is backend:
            del self._backends[backend.name]
            with self._seek_lock:
                self._again[backend.name] = (Backoff(), time.monotonic())
            self._seek()

    def _seek(self) -> None:
        """Have missing backends looked for by a thread that may wait."""
        with self._seek_lock:
            if self._seeker is None and not self._stopping:
                self._seeker = threading.Thread(
                    target=self._look_for_backends, name=f"{self.name}-seeker", daemon=True
                )
                self._seeker.start()

    def _look_for_backends(self) -> None:
        while not self._enough.is_set():
            with self._seek_lock:
                missing = list(self._again.items())
                if not missing:
                    self._seeker = None
                    return
            name, (backoff, when) = min(missing, key=lambda item: item[1][1])
            if self._enough.wait(max(0.0, when - time.monotonic())):
                return
            try:
                found = endpoint.connect(self.host, name, self._transport, self._connect_timeout)
            except Exception as error:
                log.debug("%s: backend %s: %s", self.name, name, error)
                with self._seek_lock:
                    self._again[name] = (backoff, time.monotonic() + backoff.pause())
                continue
            with self._seek_lock:
                del self._again[name]
            self._found.append((name, *found))
            with contextlib.suppress(ValueError):
                self._waits.kick(1)

    def _take_found(self) -> None:
        while self._found:
            name, channel, welcome = self._found.popleft()
            try:
                self._add_backend(name, channel, welcome)
            except DmError as error:  # other methods: perhaps the next one of that name
                log.warning("%s: backend %s: %s", self.name, name, error)
                with self._seek_lock:
                    backoff = Backoff()
                    self._again[name] = (backoff, time.monotonic() + 1.0)
                self._seek()

    # ------------------------------------------------------------ the loop

    def _run(self) -> None:
        while not self._stopping:
            timeout = 0.05 if self._handshakes else None
            try:
                key = self._waits.wait(timeout)
            except ValueError:
                return
            try:
                self._event(key)
                if self._found:
                    self._take_found()
                if self._handshakes:
                    self._expire()
            except Exception:
                if self._stopping:
                    return
                log.exception("%s: the forwarder stumbled", self.name)
                peer = self._peers.get(key) if key is not None else None
                if peer is not None:  # nobody would be told of it again
                    self._close(peer, "the forwarder stumbled")

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
            if found is None and frame.kind == Kind.DISCARD:
                found = client.delivered.pop(call_id, None)
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
        backends = list(self._backends.values())
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
                if frame.nr_refs:
                    client.delivered[call_id] = (backend, there)
                    if len(client.delivered) > MAX_DELIVERED:
                        del client.delivered[next(iter(client.delivered))]
                if self._send(client, (frame.data,)):
                    return
            if frame.nr_refs:
                self._send(backend, (frames.short(Kind.DISCARD, there),))
        elif frame.kind == Kind.GOAWAY:
            self._leave_out(backend)  # its calls go on; its successor may be there already
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
        if self._forked:
            raise ForkedError(f"{self.name} is served by the parent of this forked child")
        with self._seek_lock:
            if self._stopping:
                return
            self._stopping = True
            seeker = self._seeker
        if self._published:
            with contextlib.suppress(DmError):
                self.host.withdraw(self.name)
        self._enough.set()
        self._waits.kick(1)
        me = threading.current_thread()
        for thread in (self._thread, seeker):
            if thread is not None and thread is not me:
                thread.join(self._connect_timeout + 1.0)
        self._end()

    def _end(self) -> None:
        error = ServiceStopping("stopped")
        for peer in list(self._peers.values()):
            self._close(peer, str(error))
        while self._found:
            self._found.popleft()[1].close()
        for sock, _ in self._listeners.values():
            sock.close()
        for handshake in self._handshakes.values():
            handshake.channel.close()
        self._waits.close()

    def _after_fork(self) -> None:
        """In a child: let go of descriptors, or peers would not notice when the parent ends."""
        self._forked = self._stopping = True
        for sock, _ in self._listeners.values():
            sock.close()
        for handshake in list(self._handshakes.values()):
            handshake.channel.socket.close()
        for peer in list(self._peers.values()):
            peer.closed = True
            release(peer.channel)

    def wait(self) -> None:
        """Wait until the forwarder is stopped by another thread or a signal handler."""
        while self._thread.is_alive():
            self._thread.join(0.5)
