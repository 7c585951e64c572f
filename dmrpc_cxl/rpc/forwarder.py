"""A load balancer, or a gate, that passes calls on as they are.

Frames are passed on by native code (Relay; csrc/relay.c says how): it reads headers only, payload is neither decoded nor
copied to anywhere but the next connection, and DM is never touched. A Ref in a call stays its sender's until the backend
accepts it, so a forwarder that dies takes nothing with it. A reply that can no longer be delivered is handed back to its
backend with DISCARD, which drops its Refs.

Python is asked about a call only where somebody gave a function for that. It sees the plain values of the message and says
where the call goes, or raises; the frame itself stays where it is.

What is here happens to connections, not to frames: listening, handshakes, finding backends again, and what to say when one is
lost. One thread does it, and runs the relay in between. A second one exists while a backend is missing, and tries to
connect to it.

Paper: VI-B (application-layer load balancer).
"""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import msgspec

from .._native import RELAY_BROKE, RELAY_CALL, RELAY_ENDED, RELAY_FD, RELAY_LEAVING, Relay
from ..errors import (
    AccessDenied,
    DeadlineExceeded,
    DmError,
    ForkedError,
    InterfaceMismatch,
    Overloaded,
    PeerLost,
    RemoteProtocolError,
    ServiceExists,
    ServiceNotFound,
    WrongArguments,
)
from . import endpoint
from .channel import Channel, RingChannel, TcpChannel
from .client import Client
from .door import Door
from .endpoint import RING_BYTES, error_frame
from .forks import not_for_children, release
from .frames import Code, Welcome
from .link import Backoff
from .passing import Passing
from .places import Attachment

__all__ = ["Forwarder", "Policy", "Route"]

Policy: TypeAlias = Literal["least-loaded", "round-robin"]
Route: TypeAlias = Callable[[Passing], str | None]

log = logging.getLogger("dmrpc.rpc")

MAX_BACKLOG_BYTES = 256 << 20


class _Peer:
    """A connection of either side."""

    def __init__(self, channel: Channel, key: int, backend: str | None) -> None:
        self.channel = channel
        self.key = key
        self.backend = backend  # its name; None: a client


def published_once(host: Attachment, name: str) -> None:
    """Raise ServiceExists if this host itself publishes that name: it might, for the name service, do so again."""
    for end in list(getattr(host, "_ends", ())):
        if not isinstance(end, Client) and end.name == name and getattr(end, "published", False):
            raise ServiceExists(f"this host serves {name!r} already")


# What the function that decides may raise besides errors of its own, which arrive as those of methods do.
_CODES: dict[type[BaseException], Code] = {
    WrongArguments: Code.BAD_ARGUMENTS,
    RemoteProtocolError: Code.BAD_ARGUMENTS,
    AccessDenied: Code.NOT_ALLOWED,
    Overloaded: Code.OVERLOADED,
    PeerLost: Code.PEER,
}


class Forwarder:
    """Serves under a name by passing every call on to one of several services with the same methods.

    A backend that dies is left out, its calls fail with PeerLost, and it is tried again with growing pauses.

    Args:
        host: whose name service is used; the process needs no DM of its own.
        name: to publish.
        backends: names of services.
        policy: "least-loaded", the one with the fewest calls without reply, among equals in turn; "round-robin", strictly in
            turn, whatever their load.
        route: called with each call, a Passing, in the thread that passes calls on: it must not wait. It returns the name
            of a backend, or None to leave it to the policy. What it raises is raised in the caller, and the call goes
            nowhere: its Refs are the caller's again.
        tcp: where to listen; None: rings only.
        max_outstanding: calls under way in all; more are refused as Overloaded.

    Raises:
        ServiceNotFound, PeerLost: no backend can be reached.
        InterfaceMismatch: backends have different methods.

    Paper: VI-B.
    """

    def __init__(
        self,
        host: Attachment,
        name: str,
        backends: Sequence[str],
        *,
        policy: Policy = "least-loaded",
        route: Route | None = None,
        transport: endpoint.Transport = "auto",
        tcp: str | tuple[str, int] | None = "127.0.0.1",
        max_outstanding: int = 4096,
        max_connections: int = 1024,
        ring_bytes: int = RING_BYTES,
        connect_timeout: float = 5.0,
    ) -> None:
        if not backends:
            raise ValueError("a forwarder needs the name of one backend at least")
        if policy not in ("least-loaded", "round-robin"):
            raise ValueError(f"policy: 'least-loaded' or 'round-robin', not {policy!r}")
        self.host = host
        self.name = name
        self._names = list(dict.fromkeys(backends))
        self._route = route
        self._transport: endpoint.Transport = transport
        self._connect_timeout = connect_timeout
        self._max_connections = max_connections
        self.counts: collections.Counter[str] = collections.Counter()  # of clients sent away
        self._peers: dict[int, _Peer] = {}
        self._backends: dict[str, _Peer] = {}  # those that are given calls
        self._forwarded_before: collections.Counter[str] = collections.Counter()
        self._count_lock = threading.Lock()  # over that, and backends that come and go
        self._again: dict[str, tuple[Backoff, float]] = {}  # backends to try again, and when
        self._found: collections.deque[tuple[str, Channel, Welcome]] = collections.deque()
        self._seeker: threading.Thread | None = None
        self._seek_lock = threading.Lock()  # over _again and _seeker
        self._enough = threading.Event()  # no more seeking
        self._published = False
        self._forked = False
        self._stopping = False
        self._welcome: Welcome | None = None
        self._relay = Relay(
            max_outstanding,
            max_connections + 2 * len(self._names),  # a backend that leaves and its successor
            MAX_BACKLOG_BYTES,
            error_frame(
                0, Code.OVERLOADED, Overloaded(f"{name} has as many calls under way as it takes")
            ),
            error_frame(0, Code.PEER, PeerLost(f"{name}: no backend can be reached")),
            in_turn=policy == "round-robin",
            asks=route is not None,
        )
        self._door = Door(
            host,
            name,
            self._told,
            ring_bytes,
            watch=self._relay.watch,
            unwatch=self._relay.unwatch,
            full=self._is_full,
            enter=lambda channel: self._add(channel, None),
            counts=self.counts,
        )
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
            published_once(host, name)
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
        self.endpoint = self._door.open(tcp)

    @property
    def published(self) -> bool:
        """Whether clients find this forwarder under its name."""
        return self._published and not self._stopping

    def __enter__(self) -> Forwarder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    # ------------------------------------------------------------ counters

    @property
    def nr_forwarded(self) -> int:
        """Calls passed on."""
        return self._relay.nr_forwarded

    @property
    def bytes_forwarded(self) -> int:
        """Bytes of calls and replies passed on."""
        return self._relay.bytes_forwarded

    @property
    def forwarded_to(self) -> collections.Counter[str]:
        """Calls passed on, by name of the backend."""
        with self._count_lock:
            found = self._forwarded_before.copy()
            for peer in self._peers.values():
                if peer.backend is not None:
                    found[peer.backend] += self._relay.forwarded(peer.key)
        return +found

    # ------------------------------------------------------------ connections

    def _told(self) -> Welcome:
        assert self._welcome is not None
        return self._welcome

    def _is_full(self) -> str | None:
        if len(self._peers) - len(self._backends) < self._max_connections:
            return None
        return f"{self.name} has {self._max_connections} connections already"

    def _add(self, channel: Channel, backend: str | None) -> _Peer:
        if isinstance(channel, RingChannel):
            ring, fd, rest = channel.ring, channel.control.fileno(), b""
        else:
            assert isinstance(channel, TcpChannel)
            ring, fd, rest = None, channel.fileno(), channel.take_rest()
        try:
            key = self._relay.add(ring, fd, backend is not None, channel.max_frame, rest)
        except BaseException:
            channel.close()
            raise
        peer = _Peer(channel, key, backend)
        with self._count_lock:
            self._peers[key] = peer
        return peer

    def _add_backend(self, name: str, channel: Channel, welcome: Welcome) -> None:
        mine = self._welcome
        if mine is not None and mine.methods != welcome.methods:
            channel.close()
            raise InterfaceMismatch(f"{name} has other methods than {self._names[0]}")
        if mine is None:
            self._welcome = welcome
        elif not set(mine.reach) <= set(welcome.reach):
            if self._published:  # clients were told
                channel.close()
                raise InterfaceMismatch(f"{name} reaches less memory than {', '.join(mine.reach)}")
            reach = tuple(place for place in mine.reach if place in welcome.reach)
            self._welcome = msgspec.structs.replace(mine, reach=reach)
        self._backends[name] = self._add(channel, name)

    def _close(self, peer: _Peer, why: str, farewell: bytes | None = None) -> None:
        if peer.key not in self._peers:
            return
        log.debug("%s: a connection ended: %s", self.name, why)
        lost = PeerLost(f"{self.name}: backend {peer.backend}: {why}")
        with self._count_lock:
            del self._peers[peer.key]
            nr = self._relay.remove(peer.key, error_frame(0, Code.PEER, lost))
            if peer.backend is not None:
                self._forwarded_before[peer.backend] += nr
        if farewell is not None:
            with contextlib.suppress(DmError):
                peer.channel.try_send((farewell,), 0)
        peer.channel.close()
        self._leave_out(peer)

    def _leave_out(self, peer: _Peer) -> None:
        """Look for the successor of a backend that is given no more calls."""
        name = peer.backend
        if name is not None and self._backends.get(name) is peer:
            del self._backends[name]
            with self._seek_lock:
                self._again[name] = (Backoff(), time.monotonic())
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
                self._relay.kick()

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
        try:
            while not self._stopping:
                what, key, text = self._relay.run(0.05 if self._door.nr_handshakes else None)
                try:
                    self._event(what, key, text)
                    if self._found:
                        self._take_found()
                    if self._door.nr_handshakes:
                        self._door.expire()
                except Exception:
                    log.exception("%s: the forwarder stumbled", self.name)
                    peer = self._peers.get(key)
                    if peer is not None:  # nobody would be told of it again
                        self._close(peer, "the forwarder stumbled")
        except Exception:
            log.exception("%s: the forwarder ends", self.name)
        finally:
            self._end()

    def _event(self, what: int, key: int, text: str) -> None:
        if what == RELAY_CALL:
            self._decide()
            return
        if what == RELAY_FD:
            self._door.readable(key)
            return
        peer = self._peers.get(key)
        if peer is None:
            return
        if what == RELAY_LEAVING:
            self._leave_out(peer)  # its calls go on; its successor may be there already
        elif what == RELAY_ENDED:
            self._close(peer, text)
        elif what == RELAY_BROKE:
            log.warning("%s: closing a connection: %s", self.name, text)
            self._close(peer, text, error_frame(0, Code.VERSION, RemoteProtocolError(text)))

    def _decide(self) -> None:
        """Ask where a call is to go, and send it there, or back."""
        assert self._route is not None
        assert self._welcome is not None
        number, flags, left_us, meta, body = self._relay.call()
        methods = self._welcome.methods
        try:
            if number >= len(methods):
                name = None  # the backend says that it has no such method
            else:
                name = self._route(Passing(methods[number].name, flags, left_us, meta, body))
            if name is None:
                self._relay.pass_on()
                return
            peer = self._backends.get(name)
            if peer is not None:
                self._relay.pass_on(peer.key)
                return
            if name not in self._names:
                raise LookupError(f"{self.name} has no backend {name!r}")
            raise PeerLost(f"{self.name}: backend {name} cannot be reached")
        except Exception as error:
            code = next((c for kind, c in _CODES.items() if isinstance(error, kind)), Code.REMOTE)
            self._relay.refuse(error_frame(0, code, error))

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
        with contextlib.suppress(DmError):
            self._relay.kick()
        me = threading.current_thread()
        for thread in (self._thread, seeker):
            if thread is not None and thread is not me:
                thread.join(self._connect_timeout + 1.0)
        self._drop_found()

    def _end(self) -> None:
        """Let go of everything; in the thread that runs the relay, or when there is none."""
        for peer in list(self._peers.values()):
            self._close(peer, "stopped")
        self._drop_found()
        self._door.close()
        self._relay.close()

    def _drop_found(self) -> None:
        while self._found:
            self._found.popleft()[1].close()

    def _after_fork(self) -> None:
        """In a child: let go of descriptors, or peers would not notice when the parent ends."""
        self._forked = self._stopping = True
        self._door.after_fork()
        for peer in list(self._peers.values()):
            release(peer.channel)

    def wait(self) -> None:
        """Wait until the forwarder is stopped by another thread or a signal handler."""
        while self._thread.is_alive():
            self._thread.join(0.5)
