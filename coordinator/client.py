"""A synchronous client of the coordinator, for tools and tests. Hosts have one of their own, in
C.
"""

from __future__ import annotations

import array
import os
import secrets
import socket
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

from dmrpc_cxl._native import Device
from dmrpc_cxl.errors import CoordinatorLost, DeadlineExceeded, RemoteProtocolError
from dmrpc_cxl.fabric.device import open as open_device
from dmrpc_cxl.fabric.liveness import start_time

from .ledger import Run
from .messages import Grant, Hello, MsgType, Register, Registered, Rejoin, Status
from .protocol import Notice, PeerSide, Reply
from .refusals import error_of

READ_BYTES = 65536
DEFAULT_TIMEOUT = 10.0


class Client:
    """One connection to a coordinator, introduced with HELLO. A context manager."""

    def __init__(
        self,
        address: str | tuple[str, int],
        fabric_id: int,
        secret: bytes,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        """Connect to a Unix path or a TCP address; every request has `timeout` seconds.

        Raises:
            CoordinatorLost: nobody listens there.
            Refused: wrong fabric or secret.
            DeadlineExceeded: no answer.
        """
        self.timeout = timeout
        self._protocol = PeerSide()
        self._where = address if isinstance(address, str) else "{}:{}".format(*address)
        try:
            if isinstance(address, str):
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._socket.settimeout(timeout)
                self._socket.connect(address)
            else:
                self._socket = socket.create_connection(address, timeout)
        except OSError as error:
            raise CoordinatorLost(
                f"cannot reach the coordinator at {self._where}: {error.strerror or error}"
            ) from error
        try:
            self.epoch: int = self.request(MsgType.HELLO, Hello(fabric_id, secret)).epoch
        except BaseException:
            self.close()
            raise

    @classmethod
    def of(cls, device: Device, *, tcp: bool = False, timeout: float = DEFAULT_TIMEOUT) -> Client:
        """Connect to the coordinator that a device's superblock names.

        Raises:
            CoordinatorLost: it names none, or nobody answers.
        """
        found = device.superblock
        address: str | tuple[str, int] = found["unix_path"]
        if tcp:
            address = (found["tcp_host"], found["tcp_port"])
        if not found["coordinator_pid"] or not (found["tcp_port"] if tcp else address):
            kind = "TCP" if tcp else "a Unix socket"
            raise CoordinatorLost(
                f"no coordinator of fabric {found['name']} listens on {kind}: "
                f"start one with `python -m dmrpc_cxl.coordinator {found['name']}`"
            )
        return cls(address, found["fabric_id"], found["secret"], timeout)

    @classmethod
    def to(cls, fabric: str, *, tcp: bool = False, timeout: float = DEFAULT_TIMEOUT) -> Client:
        """Connect to the coordinator of the fabric of that name."""
        with open_device(fabric, writable=False) as device:
            return cls.of(device, tcp=tcp, timeout=timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    # ---------------------------------------------------------------- one request

    def request(
        self,
        kind: MsgType,
        body: Any = None,
        *,
        descriptors: Sequence[int] = (),
        timeout: float | None = None,
    ) -> Any:
        """Send a request and return what the answer carries.

        After any exception but a refusal the connection is closed.

        Raises:
            LocalProtocolError: not now, or not with that payload; nothing was sent.
            CoordinatorLost, RemoteProtocolError, DeadlineExceeded: no answer, or none that can be
                used.
            OutOfFrames, HostFenced, ServiceNotFound, ServiceExists, Refused, ...: it was refused.
        """
        data = self._protocol.request(kind, body)
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        try:
            self._send(data, descriptors, deadline)
            reply = self._receive(deadline)
            if not isinstance(reply, Reply):
                raise RemoteProtocolError("a notice instead of an answer")
        except BaseException:
            self.close()
            raise
        if reply.status is not Status.OK:
            raise error_of(reply.status, reply.text)
        return reply.body

    def next_notice(self, timeout: float | None = None) -> Notice:
        """Wait for what the coordinator says on a guard connection.

        Raises:
            CoordinatorLost: it closed the connection.
            DeadlineExceeded: it said nothing.
        """
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        notice = self._receive(deadline)
        if not isinstance(notice, Notice):
            raise RemoteProtocolError("an answer instead of a notice")
        return notice

    def _send(self, data: bytes, descriptors: Sequence[int], deadline: float) -> None:
        self._limit(deadline)
        try:
            if descriptors:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
                sent = self._socket.sendmsg([data], rights)
                data = data[sent:]
            self._socket.sendall(data)
        except TimeoutError:
            raise self._no_answer() from None
        except OSError as error:
            raise self._lost(error) from error

    def _receive(self, deadline: float) -> Reply | Notice:
        while True:
            message = self._protocol.next_message()
            if message is not None:
                return message
            self._limit(deadline)
            try:
                data = self._socket.recv(READ_BYTES)
            except TimeoutError:
                raise self._no_answer() from None
            except OSError as error:
                raise self._lost(error) from error
            if not data:
                raise CoordinatorLost(f"the coordinator at {self._where} closed the connection")
            self._protocol.feed(data)

    def _limit(self, deadline: float) -> None:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise self._no_answer()
        self._socket.settimeout(remaining)

    def _no_answer(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"the coordinator at {self._where} did not answer in time")

    def _lost(self, error: OSError) -> CoordinatorLost:
        return CoordinatorLost(f"lost the coordinator at {self._where}: {error.strerror or error}")

    # ---------------------------------------------------------------- being a host

    def register(
        self,
        name: str,
        *,
        token: int | None = None,
        low: int = 0,
        high: int = 0,
        batch: int = 0,
    ) -> Registered:
        """Register this process as a host; `token` is random unless given."""
        token = secrets.randbits(63) + 1 if token is None else token
        pid = os.getpid()
        ask = Register(token, start_time(pid) or 0, pid, low, high, batch, name.encode())
        registered: Registered = self.request(MsgType.REGISTER, ask)
        return registered

    def rejoin(self, host: int, incarnation: int) -> Registered:
        """Speak for a registered host of this process."""
        registered: Registered = self.request(MsgType.REJOIN, Rejoin(incarnation, host))
        return registered

    def guard(self, host: int, incarnation: int, userfaultfd: int) -> None:
        """Have a userfaultfd kept; afterwards only `next_notice` is of use."""
        self.request(MsgType.GUARD, Rejoin(incarnation, host), descriptors=[userfaultfd])

    def grant(self, want: int, min_run: int = 0) -> list[Run]:
        """Ask for frames."""
        runs: list[Run] = self.request(MsgType.GRANT, Grant(want, min_run))
        return runs

    def give_back(self, runs: Iterable[tuple[int, int]]) -> None:
        """Tell of frames whose words name the pool already."""
        self.request(MsgType.RETURN, list(runs))

    def leave(self) -> None:
        """Leave; everything was released."""
        self.request(MsgType.LEAVE)

    # ---------------------------------------------------------------- names and tools

    def publish(self, name: str, endpoint: Any) -> None:
        """Announce a service of the host that this connection belongs to."""
        self.request(MsgType.PUBLISH, {"name": name, "endpoint": endpoint})

    def withdraw(self, name: str) -> None:
        """Take a service back."""
        self.request(MsgType.WITHDRAW, {"name": name})

    def lookup(self, name: str) -> dict[str, Any]:
        """Find a service: its name, endpoint and host."""
        found: dict[str, Any] = self.request(MsgType.LOOKUP, {"name": name})
        return found

    def services(self, prefix: str = "") -> list[dict[str, Any]]:
        """List the services whose names begin with `prefix`."""
        found: list[dict[str, Any]] = self.request(MsgType.LIST, {"prefix": prefix})["services"]
        return found

    def hosts(self) -> list[dict[str, Any]]:
        """List the host entries that are not free."""
        found: list[dict[str, Any]] = self.request(MsgType.HOSTS, {})["hosts"]
        return found

    def check(self, *, repair: bool = False, timeout: float = 1.0) -> dict[str, Any]:
        """Have every frame accounted for now; scrubber.py says what comes back.

        Args:
            repair: take back frames that nothing holds.
            timeout: seconds to try to be certain of what is suspect while hosts are at work.
        """
        ask = {"repair": repair, "timeout": timeout}
        found: dict[str, Any] = self.request(MsgType.CHECK, ask, timeout=timeout + 60)
        return found

    def stats(self) -> dict[str, Any]:
        """Return the coordinator's statistics."""
        found: dict[str, Any] = self.request(MsgType.STATS, {})
        return found

    def wait_for_hosts(self, number: int, seconds: float) -> None:
        """Wait until that many hosts are active.

        Raises:
            DeadlineExceeded: they were not.
        """
        self._wait({"hosts": number, "timeout": seconds}, seconds)

    def wait_for_service(self, name: str, seconds: float) -> None:
        """Wait until a service of that name is published.

        Raises:
            DeadlineExceeded: it was not.
        """
        self._wait({"name": name, "timeout": seconds}, seconds)

    def _wait(self, what: dict[str, Any], seconds: float) -> None:
        try:
            self.request(MsgType.WAIT, what, timeout=seconds + self.timeout)
        except LookupError as error:  # NOT_FOUND
            raise DeadlineExceeded(str(error)) from None

    def shutdown(self) -> None:
        """Stop the coordinator."""
        self.request(MsgType.SHUTDOWN, {})
