"""Where services are reached: listening, connecting, and the handshake.

A service publishes ``{"protocol", "ring", "tcp"}`` under its name. ``ring`` is an abstract Unix socket: it exists in one network
namespace, leaves no file behind, and over it the server passes shared memory for the rings. ``tcp`` is for everybody else.
Whoever connects says HELLO first, with the fabric's secret: whoever may open the device has it. It is compared in constant
time, before anything else is looked at; on the Unix socket the kernel vouches for the user id as well.
"""

from __future__ import annotations

import array
import contextlib
import hmac
import os
import secrets
import socket
import struct
import time
from typing import Any, Literal, TypeAlias

from .._native import Ring, crash_point
from ..errors import (
    AccessDenied,
    DeadlineExceeded,
    DmError,
    InterfaceMismatch,
    Overloaded,
    PeerLost,
    RemoteProtocolError,
    ServiceNotFound,
    ServiceStopping,
)
from . import frames
from .channel import Channel, RingChannel, TcpChannel
from .frames import Code, Frame, Hello, Kind, Welcome
from .places import Attachment

__all__ = ["Handshake", "Transport", "connect", "listen_tcp", "listen_unix"]

Transport: TypeAlias = Literal["auto", "ring", "tcp"]
HANDSHAKE_SECONDS = 5.0
MAX_HELLO_BYTES = 4096
MAX_WELCOME_BYTES = 4 << 20
RING_BYTES = 2 << 20
NR_DESCRIPTORS = 3
BACKLOG = 128


def listen_unix(fabric: str) -> tuple[socket.socket, str]:
    """Listen on an abstract Unix socket; return it and its name without the leading zero byte."""
    name = f"dmrpc/{fabric}/{os.getpid()}/{secrets.token_hex(8)}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(b"\0" + name.encode())
    sock.listen(BACKLOG)
    sock.setblocking(False)
    return sock, name


def listen_tcp(host: str, port: int) -> tuple[socket.socket, tuple[str, int]]:
    """Listen on TCP; return the socket and its address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.create_server((host, port), family=family, backlog=BACKLOG)
    sock.setblocking(False)
    return sock, (host, sock.getsockname()[1])


# ---------------------------------------------------------------- the server's half


class Handshake:
    """A peer that has connected and not said who it is yet."""

    def __init__(self, sock: socket.socket, transport: str) -> None:
        self.transport = transport
        self.channel = TcpChannel(sock, MAX_HELLO_BYTES)
        self.give_up = time.monotonic() + HANDSHAKE_SECONDS

    def read(self, host: Attachment) -> Hello | None:
        """Return HELLO once it is there, checked.

        Raises:
            AccessDenied, RemoteProtocolError, PeerLost: close the connection.
        """
        data = self.channel.recv()
        if data is None:
            return None
        if self.transport == "ring" and _peer_uid(self.channel.socket) not in (os.getuid(), 0):
            raise AccessDenied("a process of another user")
        hello = frames.read_hello(frames.parse(data))
        if not hmac.compare_digest(hello.secret, host.secret) or hello.fabric_id != host.fabric_id:
            raise AccessDenied("the fabric's secret is wrong, or it is another fabric's")
        if hello.protocol != frames.PROTOCOL:
            raise InterfaceMismatch(
                f"the client speaks protocol {hello.protocol}, this server {frames.PROTOCOL}"
            )
        if hello.transport != self.transport:
            raise RemoteProtocolError(f"a HELLO for {hello.transport!r} on {self.transport!r}")
        return hello

    def refuse(self, code: Code, error: DmError) -> None:
        """Say why not, and close."""
        with contextlib.suppress(DmError, OSError):
            self.channel.try_send((error_frame(0, code, error),), 0)
        self.channel.close()

    def welcome(self, welcome: Welcome, ring_bytes: int) -> Channel:
        """Answer HELLO; return the channel for what follows.

        Raises:
            PeerLost: it is gone already.
        """
        answer = frames.head(Kind.WELCOME, 0, body=frames.encode(welcome))
        sock = self.channel.socket
        if self.transport == "tcp":
            self.channel.send((answer,), HANDSHAKE_SECONDS)
            crash_point("welcome_sent")
            self.channel.max_frame = welcome.max_frame
            return self.channel
        ring = Ring.create(ring_bytes, welcome.max_frame)
        memory, mine, theirs = ring.fds
        rights = array.array("i", (memory, theirs, mine))
        try:
            sent = sock.sendmsg([answer], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            if sent < len(answer):
                self.channel.send((answer[sent:],), HANDSHAKE_SECONDS)
        except OSError as error:
            ring.close()
            raise PeerLost(f"the client went away: {error.strerror}") from error
        except DmError:
            ring.close()
            raise
        crash_point("welcome_sent")
        return RingChannel(ring, sock, welcome.max_frame)


def _peer_uid(sock: socket.socket) -> int:
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", raw)[1])


def error_frame(call_id: int, code: Code, error: BaseException, traceback: str = "") -> bytes:
    """Return an ERROR frame."""
    kinds = tuple(
        kind.__name__
        for kind in type(error).__mro__
        if kind.__module__ == "builtins" and kind is not object
    )
    named = type(error)
    body = frames.ErrorBody(
        f"{named.__module__}.{named.__qualname__}"
        if named.__module__ != "builtins"
        else named.__qualname__,
        str(error)[:65536],
        traceback[:262144],
        kinds,
    )
    return frames.head(Kind.ERROR, call_id, method=code, body=frames.encode(body))


# ---------------------------------------------------------------- the client's half


def connect(
    host: Attachment, service: str, transport: Transport, timeout: float
) -> tuple[Channel, Welcome]:
    """Find a service by name and connect to it.

    Raises:
        ServiceNotFound: nobody publishes that name.
        PeerLost: it cannot be reached.
        AccessDenied, InterfaceMismatch: it does not want us.
        DeadlineExceeded: no answer in time.
    """
    found = host.lookup(service)
    endpoint = found["endpoint"]
    if not _is_endpoint(endpoint):
        raise ServiceNotFound(f"{service!r} is published, but not as an RPC service")
    if endpoint["protocol"] != frames.PROTOCOL:
        raise InterfaceMismatch(
            f"{service!r} speaks protocol {endpoint['protocol']}, this client {frames.PROTOCOL}"
        )
    give_up = time.monotonic() + timeout
    if transport in ("auto", "ring") and endpoint.get("ring"):
        try:
            return _connect_ring(host, service, endpoint["ring"], give_up)
        except ConnectionRefusedError as error:  # not in this network namespace, or gone
            if transport == "ring" or not endpoint.get("tcp"):
                raise PeerLost(
                    f"{service!r} cannot be reached over rings: {error.strerror}"
                ) from error
    if transport == "ring" or not endpoint.get("tcp"):
        raise PeerLost(f"{service!r} offers no {'rings' if transport == 'ring' else 'TCP'}")
    return _connect_tcp(host, service, tuple(endpoint["tcp"]), give_up)


def _is_endpoint(endpoint: Any) -> bool:
    """Tell whether what is published under a name is what services publish; anybody may publish anything."""
    if not isinstance(endpoint, dict) or endpoint.get("protocol") is None:
        return False
    ring, tcp = endpoint.get("ring"), endpoint.get("tcp")
    return isinstance(ring, (str, type(None))) and (
        tcp is None
        or (
            isinstance(tcp, list)
            and [type(part) for part in tcp] == [str, int]
            and 0 < tcp[1] < 65536
        )
    )


def _hello(host: Attachment, service: str, transport: str) -> bytes:
    hello = Hello(frames.MAGIC, frames.PROTOCOL, host.fabric_id, host.secret, service, transport)
    return frames.head(Kind.HELLO, 0, body=frames.encode(hello))


def _welcome(frame: Frame, service: str) -> Welcome:
    if frame.kind == Kind.ERROR:
        body = frames.read_error(frame)
        text = f"{service}: {body.message}"
        if frame.method == Code.DENIED:
            raise AccessDenied(text)
        if frame.method == Code.VERSION:
            raise InterfaceMismatch(text)
        if frame.method == Code.UNKNOWN_SERVICE:
            raise ServiceNotFound(text)
        if frame.method == Code.OVERLOADED:
            raise Overloaded(text)
        raise ServiceStopping(text)
    if frame.kind != Kind.WELCOME:
        raise RemoteProtocolError(f"WELCOME comes first, not a frame of kind {frame.kind}")
    welcome = frames.read_welcome(frame)
    if welcome.protocol != frames.PROTOCOL:
        raise InterfaceMismatch(
            f"{service!r} speaks protocol {welcome.protocol}, this client {frames.PROTOCOL}"
        )
    if not frames.HEADER_BYTES <= welcome.max_frame <= frames.MAX_FRAME_BYTES:
        raise RemoteProtocolError(f"a WELCOME to frames of {welcome.max_frame} bytes")
    return welcome


def _receive(channel: TcpChannel, give_up: float) -> bytearray:
    while (data := channel.recv()) is None:
        if not channel.wait(max(0.0, give_up - time.monotonic())):
            raise DeadlineExceeded("the server accepted the connection and does not answer")
    return data


def _connect_tcp(
    host: Attachment, service: str, address: tuple[Any, ...], give_up: float
) -> tuple[Channel, Welcome]:
    try:
        sock = socket.create_connection(address, timeout=max(0.01, give_up - time.monotonic()))
    except OSError as error:
        raise PeerLost(f"{service!r} cannot be reached at {address}: {error}") from error
    channel = TcpChannel(sock, MAX_WELCOME_BYTES)
    try:
        channel.send((_hello(host, service, "tcp"),), max(0.0, give_up - time.monotonic()))
        welcome = _welcome(frames.parse(_receive(channel, give_up)), service)
    except BaseException:
        channel.close()
        raise
    channel.max_frame = welcome.max_frame
    return channel, welcome


def _connect_ring(
    host: Attachment, service: str, name: str, give_up: float
) -> tuple[Channel, Welcome]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    descriptors: list[int] = []
    try:
        sock.settimeout(max(0.01, give_up - time.monotonic()))
        sock.connect(b"\0" + name.encode())
        if _peer_uid(sock) not in (os.getuid(), 0):
            raise AccessDenied(f"{service!r} is a process of another user")
        sock.sendall(_hello(host, service, "ring"))
        data, descriptors = _receive_with_descriptors(sock, give_up)
        welcome = _welcome(frames.parse(data), service)
        if len(descriptors) != NR_DESCRIPTORS:
            raise RemoteProtocolError(
                f"{len(descriptors)} descriptors came with WELCOME, not {NR_DESCRIPTORS}"
            )
        memory, mine, theirs = descriptors
        ring = Ring.attach(memory, mine, theirs, welcome.max_frame)
        return RingChannel(ring, sock, welcome.max_frame), welcome
    except (TimeoutError, DeadlineExceeded):
        sock.close()
        raise DeadlineExceeded(f"{service!r} does not answer") from None
    except ConnectionRefusedError:
        sock.close()
        raise
    except OSError as error:
        sock.close()
        if isinstance(error, DmError):
            raise
        raise PeerLost(f"{service!r} went away: {error}") from error
    except BaseException:
        sock.close()
        raise
    finally:
        for fd in descriptors:
            os.close(fd)


def _receive_with_descriptors(sock: socket.socket, give_up: float) -> tuple[bytes, list[int]]:
    data = b""
    descriptors: list[int] = []
    try:
        while len(data) < 4 or len(data) < (size := int.from_bytes(data[:4], "little")):
            if len(data) >= 4 and not frames.HEADER_BYTES <= size <= MAX_WELCOME_BYTES:
                raise RemoteProtocolError(f"a WELCOME of {size} bytes")
            sock.settimeout(max(0.01, give_up - time.monotonic()))  # for all of it, not each part
            if time.monotonic() > give_up:
                raise TimeoutError
            chunk, ancillary, _, _ = sock.recvmsg(
                65536, socket.CMSG_SPACE(16 * 4), socket.MSG_CMSG_CLOEXEC
            )
            for level, kind, raw in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    descriptors += array.array("i", raw[: len(raw) // 4 * 4])
            if not chunk:
                raise PeerLost("the server closed the connection")
            data += chunk
    except BaseException:
        for fd in descriptors:
            os.close(fd)
        raise
    return data, descriptors
