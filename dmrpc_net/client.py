"""A process that uses memory servers: attach, and what becomes of connections.

A client has one control connection to each server, which is its life there, and one data connection to each shard it
used. When a data connection breaks, the thread that notices opens another one, with pauses that grow, until its deadline;
what had no answer is sent again. When a control connection has ended, the server has freed all that this process held: every call to
it raises ServerLost. Allocations go to the other servers meanwhile; the lost one is tried again now and then, and
addresses of before stay refused.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dmrpc_cxl.errors import BadRef, BadSize, DeadlineExceeded, MisuseError, RemoteProtocolError

from . import _native
from ._native import OUTCOME_CLOSED, OUTCOME_LOST, WIRE, Link, Pipeline
from .errors import PidTaken, ServerLost
from .greeting import (
    SECRET_BYTES,
    Address,
    Forgotten,
    Welcome,
    connect,
    greet,
    hello_of,
    parse_address,
    show_address,
    sockaddr_of,
)

if TYPE_CHECKING:
    from .aio import Aio

__all__ = ["Client", "attach"]

FIRST_PAUSE = 0.01
LONGEST_PAUSE = 0.5
PID_TRIES = 8


@dataclass
class _Server:
    """A server, as far as this client knows it."""

    number: int
    address: Address
    control: socket.socket | None = None  # None: lost
    welcome: Welcome | None = None
    session: int = -1
    retry_at: float = 0.0  # monotonic: when a lost one may be tried again
    pause: float = FIRST_PAUSE
    lock: Any = field(default_factory=threading.RLock)

    @contextlib.contextmanager
    def locked(self, until: float) -> Iterator[None]:
        """Hold the lock: one thread at a time opens connections.

        Raises:
            DeadlineExceeded: others took too long over that.
        """
        if not self.lock.acquire(timeout=max(until - time.monotonic(), 0)):
            raise DeadlineExceeded(f"no connection to {show_address(self.address)} in time")
        try:
            yield
        finally:
            self.lock.release()


class Client(_native.Client):
    """A process at its memory servers. Made by :func:`attach`; thread-safe; not usable in forked children."""

    def __init__(
        self, addresses: Sequence[Address], secret: bytes, *, deadline: float, connect_within: float
    ) -> None:
        """Say hello to all servers; see :func:`attach`."""
        super().__init__(deadline)
        self.secret = secret
        self.addresses = tuple(map(show_address, addresses))
        self._token = secrets.randbits(64) or 1
        self._servers = [_Server(number, address) for number, address in enumerate(addresses)]
        self._aio: Aio | None = None
        self.pid = 0
        until = time.monotonic() + connect_within
        try:
            self._introduce(until)
        except BaseException:
            self._hang_up()
            raise
        rota = [
            (server.number, shard)
            for shard in range(max(map(self._shards_to_try, self._servers)))
            for server in self._servers
            if shard < self._shards_to_try(server)
        ]
        self.set_rota(rota, random.randrange(len(rota)))

    # ---------------------------------------------------------------- beginning and end

    def _introduce(self, until: float) -> None:
        """Get a process id from server 0, and make it known to the others."""
        for _ in range(PID_TRIES):
            try:
                for server in self._servers:
                    self._join_if_there(server, until)
                return
            except PidTaken:
                self._hang_up()
                self.pid = 0
        raise PidTaken("other processes have every id that server 0 gave; is it one of this group?")

    def _join_if_there(self, server: _Server, until: float) -> None:
        """Join a server; one that is down may come later, but for server 0, who gives process ids."""
        try:
            self._join(server, until)
        except ServerLost:
            if server.number == 0:
                raise
            server.retry_at = time.monotonic() + server.pause

    def _join(self, server: _Server, until: float) -> None:
        """Open a server's control connection."""
        try:
            sock = connect(server.address, until)
        except OSError as error:
            if isinstance(error, DeadlineExceeded):
                raise
            raise ServerLost(
                f"cannot reach the memory server at {show_address(server.address)}: "
                f"{error.strerror or error}"
            ) from error
        try:
            welcome = greet(
                sock,
                until,
                kind=WIRE["control"],
                secret=self.secret,
                token=self._token,
                pid=self.pid,
            )
            if welcome.server != server.number:
                raise RemoteProtocolError(
                    f"the memory server at {show_address(server.address)} is number "
                    f"{welcome.server}, not {server.number}: give them in their order"
                )
        except BaseException:
            sock.close()
            raise
        sock.settimeout(None)
        self.pid = welcome.pid
        server.control, server.welcome = sock, welcome
        server.session = (server.session + 1) % WIRE["nr_sessions"]
        server.pause = FIRST_PAUSE

    def _hang_up(self) -> None:
        for server in self._servers:
            if server.control is not None:
                server.control.close()
                server.control = None

    def close(self) -> None:
        """Free everything that this process holds at the servers, and leave. Idempotent.

        Refs that others accepted live on. Calls under way end with HostClosed.
        """
        if self.is_closed:
            return
        for link in self.set_closed():
            link.fail(OUTCOME_CLOSED)
        aio, self._aio = self._aio, None
        if aio is not None:
            aio.close()
        if self.owner != os.getpid():
            return  # the parent's connections: closing our copies of their descriptors ends nothing
        for server in self._servers:
            with server.lock, contextlib.suppress(OSError):
                if server.control is not None:
                    server.control.shutdown(socket.SHUT_WR)
        for server in self._servers:
            with server.lock, contextlib.suppress(OSError):
                if server.control is not None:
                    # It closes its end when everything is freed.
                    server.control.settimeout(LONGEST_PAUSE * 10)
                    while server.control.recv(1):
                        pass
        self._hang_up()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    # ---------------------------------------------------------------- links

    def _about(self, server: _Server) -> Welcome:
        if server.welcome is None:  # it was down when this client began
            until = time.monotonic() + LONGEST_PAUSE
            with server.locked(until):
                if server.control is None:
                    self._rejoin(server, until)
        assert server.welcome is not None
        return server.welcome

    @staticmethod
    def _shards_to_try(server: _Server) -> int:
        return server.welcome.nr_shards if server.welcome is not None else 1

    def open_link(self, server: int, shard: int, deadline_ns: int) -> Link | None:
        """Connect to a shard; None: there is no such shard."""
        if server >= len(self._servers) or shard >= self._about(self._servers[server]).nr_shards:
            return None
        at = self._servers[server]
        with at.locked(deadline_ns / 1e9):
            for link in self.open_links():
                if (link.server, link.shard) == (server, shard):
                    return link
            if at.control is None:
                self._rejoin(at, deadline_ns / 1e9)
            about = self._about(at)
            link = Link(server, shard, about.slice_bytes, about.max_outstanding, self._reopen)
            self.set_link(server, shard, link)
            try:
                self._reopen(link, deadline_ns)
            except BaseException:
                self.set_link(server, shard, None)
                raise
            if not link.healthy:
                raise ServerLost(f"the memory server at {show_address(at.address)} is gone")
            return link

    def _connect(self, server: _Server, link: Link, until: float) -> None:
        """Give a link a data connection; one attempt."""
        sock = connect(server.address, until)
        try:
            greet(
                sock,
                until,
                kind=WIRE["data"],
                secret=self.secret,
                token=self._token,
                pid=self.pid,
                shard=link.shard,
                session=server.session,
            )
            sock.setblocking(False)
        except BaseException:
            sock.close()
            raise
        link.resume(sock.detach())

    def _reopen(self, link: Link, deadline_ns: int) -> None:
        """Open a link's connection again; returns when it works, or has failed for good.

        Raises:
            DeadlineExceeded: not in time.
        """
        server = self._servers[link.server]
        until, pause = deadline_ns / 1e9, FIRST_PAUSE
        with server.locked(until):
            while not (self.is_closed or link.healthy or link.failed):
                if server.control is None or self._control_ended(server.control):
                    self._lose(server)
                    return
                try:
                    self._connect(server, link, min(until, time.monotonic() + LONGEST_PAUSE * 10))
                    return
                except Forgotten:
                    self._lose(server)
                    return
                except (DeadlineExceeded, ServerLost, OSError):
                    pass  # refused, unreachable, hung up on: perhaps not for long
                if time.monotonic() + pause >= until:
                    raise DeadlineExceeded(
                        f"the connection to the memory server at {show_address(server.address)} "
                        "broke, and cannot be made again"
                    )
                time.sleep(pause * random.uniform(0.5, 1))
                pause = min(2 * pause, LONGEST_PAUSE)

    @staticmethod
    def _control_ended(control: socket.socket) -> bool:
        """Tell whether the server has closed a control connection, without waiting."""
        try:
            return not control.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _lose(self, server: _Server) -> None:
        """Take note that a server has let go of us: all its links fail, and addresses of before with them."""
        with server.lock:
            if server.control is not None:
                server.control.close()
                server.control = None
            server.retry_at = time.monotonic() + server.pause
            server.pause = min(2 * server.pause, LONGEST_PAUSE)
            for link in self.open_links():
                if link.server == server.number:
                    self.set_link(link.server, link.shard, None)
                    link.fail(OUTCOME_LOST)

    def distrust(self, link: Link) -> None:
        """Leave the server of a link that was sent what answers no request: the next call begins anew there, and holds nothing."""
        server = self._servers[link.server]
        with server.lock:
            if link in self.open_links():
                self._lose(server)

    def _rejoin(self, server: _Server, until: float) -> None:
        """Begin anew at a server that was lost, if it is back."""
        if time.monotonic() < server.retry_at:
            raise ServerLost(f"the memory server at {show_address(server.address)} is gone")
        try:
            self._join(server, min(until, time.monotonic() + LONGEST_PAUSE))
        except BaseException as error:
            self._lose(server)
            if isinstance(error, DeadlineExceeded):
                raise ServerLost(str(error)) from error
            raise

    # ---------------------------------------------------------------- for who reads beside this client

    def is_joined(self, server: int) -> bool:
        """Tell whether this process is known at a server, as far as can be seen without asking."""
        control = self._servers[server].control
        return control is not None and not self._control_ended(control)

    def session_of(self, server: int) -> int:
        """Return how often this process has begun anew at a server."""
        return self._servers[server].session if server < len(self._servers) else -1

    def introduction(self, server: int, shard: int) -> tuple[bytes, bytes]:
        """Return a server's address and the hello of a data connection, as C has them, for connecting without Python.

        Whoever uses them has this client's data connection to that shard: this client must not be used for it.

        Raises:
            BadRef: there is no such shard.
            ServerLost: there is no server.
        """
        if server >= len(self._servers) or shard >= self._about(self._servers[server]).nr_shards:
            raise BadRef(f"there is no shard {shard} on a server {server}")
        at = self._servers[server]
        until = time.monotonic() + LONGEST_PAUSE * 10
        with at.locked(until):
            if at.control is not None and self._control_ended(at.control):
                self._lose(at)
                at.retry_at = 0.0
            if at.control is None:
                self._rejoin(at, until)
            assert at.control is not None
            hello = hello_of(
                kind=WIRE["data"],
                secret=self.secret,
                token=self._token,
                pid=self.pid,
                shard=shard,
                session=at.session,
            )
            return sockaddr_of(at.control), hello

    # ---------------------------------------------------------------- more ways to call

    def pipeline(self) -> Pipeline:
        """Return a pipeline: calls that are sent without waiting, and waited for at the end of a ``with``."""
        return Pipeline(self)

    @property
    def aio(self) -> Aio:
        """The same calls for asyncio; the first use ties them to the event loop that runs, for as long as it lives."""
        if self._aio is not None and not self._aio.usable:
            self._aio.close()
            self._aio = None
        if self._aio is None:
            from .aio import Aio

            self._aio = Aio(self)
        return self._aio

    # ---------------------------------------------------------------- about the servers

    @property
    def nr_servers(self) -> int:
        """How many servers there are."""
        return len(self._servers)

    @property
    def page_size(self) -> int:
        """Bytes of a page."""
        return self._about(self._servers[0]).page_size

    def nr_shards(self, server: int = 0) -> int:
        """Return how many shards a server has."""
        return self._about(self._servers[server]).nr_shards

    def _over_shards(self, ask: Any, server: int | None) -> dict[str, int]:
        numbers = range(len(self._servers)) if server is None else [server]
        total: dict[str, int] = {}
        for number in numbers:
            for shard in range(self.nr_shards(number)):
                for name, value in ask(number, shard).items():
                    total[name] = total.get(name, 0) + value
        return total

    def stats(self, server: int | None = None) -> dict[str, int]:
        """Add up the counters of all shards of a server, or of all servers; their names are in COUNTERS."""
        return self._over_shards(self.shard_stats, server)

    def audit(self, server: int | None = None) -> dict[str, int]:
        """Have every shard account for each of its pages; the sums. `nr_violations` is 0, or something is wrong."""
        found = self._over_shards(self.shard_audit, server)
        found.pop("first_violation", None)
        return found


def attach(
    servers: str | Sequence[str] | None = None,
    *,
    secret: bytes | str | os.PathLike[str] | None = None,
    deadline: float = 10.0,
    connect_within: float = 10.0,
) -> Client:
    """Become a process of one or more memory servers.

    Args:
        servers: addresses, ``HOST:PORT`` or ``unix:PATH``, in the order of the servers' numbers; None: those of
            the environment variable DMRPC_MEMORY, with commas between.
        secret: the servers' secret, or the path of the file that has it; None: that in DMRPC_MEMORY_SECRET.
        deadline: seconds that a call may take, unless it says otherwise.
        connect_within: seconds for all servers together to answer now.

    A server that cannot be reached is used as soon as it is there; the first one has to be.

    Raises:
        ServerLost: the first one cannot be reached.
        AccessDenied: the secret is another.
        NoHostSlot: a server has as many clients as it takes.
    """
    if servers is None:
        servers = [text for text in os.environ.get("DMRPC_MEMORY", "").split(",") if text]
        if not servers:
            raise MisuseError(
                "attach: which servers? DMRPC_MEMORY is not set; `dmrpc fabric run --memory-servers N` sets it"
            )
    if secret is None:
        secret = os.environ.get("DMRPC_MEMORY_SECRET") or os.devnull
    texts = [servers] if isinstance(servers, str) else list(servers)
    if not texts or len(texts) > WIRE["max_servers"]:
        raise MisuseError(f"attach: 1 to {WIRE['max_servers']} servers, not {len(texts)}")
    if not isinstance(secret, bytes):
        secret = read_secret(secret)
    if len(secret) != SECRET_BYTES:
        raise BadSize(f"attach: a secret has {SECRET_BYTES} bytes, not {len(secret)}")
    return Client(
        [parse_address(text) for text in texts],
        secret,
        deadline=deadline,
        connect_within=connect_within,
    )


def read_secret(path: str | os.PathLike[str]) -> bytes:
    """Read a secret file: one line of hexadecimal digits."""
    with open(path, encoding="ascii") as file:
        text = file.read().strip()
    try:
        return bytes.fromhex(text)
    except ValueError:
        raise MisuseError(f"{path} does not hold a secret: {2 * SECRET_BYTES} hex digits") from None
