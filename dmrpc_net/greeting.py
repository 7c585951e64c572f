"""The first words on a connection to a memory server, and finding one: addresses, hello, welcome."""

from __future__ import annotations

import os
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

from dmrpc_cxl.errors import DeadlineExceeded, MisuseError, RemoteProtocolError

from ._native import WIRE, error_of
from .errors import ServerLost

_HELLO = struct.Struct(WIRE["structs"]["hello"][0])
_WELCOME = struct.Struct(WIRE["structs"]["welcome"][0])
_WELCOME_FIELDS = WIRE["structs"]["welcome"][1]
SECRET_BYTES: int = WIRE["secret_bytes"]

Address = tuple[str, int] | str
"""Host and port, or the path of a Unix socket."""


def parse_address(text: str) -> Address:
    """Read ``HOST:PORT``, ``[HOST]:PORT``, ``PORT`` or ``unix:PATH``.

    Raises:
        MisuseError: it is none of them.
    """
    if text.startswith("unix:"):
        return text.removeprefix("unix:")
    host, _, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise MisuseError(f"address of a memory server: HOST:PORT or unix:PATH, not {text!r}")
    return host or "127.0.0.1", int(port)


def show_address(address: Address) -> str:
    """Write an address as parse_address reads it."""
    if isinstance(address, str):
        return f"unix:{address}"
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Forgotten(ServerLost):
    """The server does not know this process, or no longer."""


@dataclass(frozen=True)
class Welcome:
    """What a server says of itself."""

    epoch: int
    slice_bytes: int
    last: int
    pid: int
    server: int
    nr_shards: int
    page_size: int
    max_outstanding: int


def connect(address: Address, deadline: float) -> socket.socket:
    """Connect, until a time of the monotonic clock.

    Raises:
        ConnectionRefusedError and other OSErrors: nobody is there.
        DeadlineExceeded: nobody answers.
    """
    left = deadline - time.monotonic()
    if left <= 0:
        raise DeadlineExceeded(f"no time left to connect to {show_address(address)}")
    try:
        if isinstance(address, str):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                sock.settimeout(left)
                sock.connect(address)
            except BaseException:
                sock.close()
                raise
        else:
            sock = socket.create_connection(address, left)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, WIRE["send_buffer"])
    except TimeoutError:
        raise DeadlineExceeded(
            f"no answer from the memory server at {show_address(address)}"
        ) from None
    return sock


def hello_of(
    *, kind: int, secret: bytes, token: int, pid: int = 0, shard: int = 0, session: int = 0
) -> bytes:
    """Return the bytes of a hello."""
    return _HELLO.pack(WIRE["magic"], WIRE["version"], kind, secret, token, pid, shard, session, 0)


def greet(
    sock: socket.socket,
    deadline: float,
    *,
    kind: int,
    secret: bytes,
    token: int,
    pid: int = 0,
    shard: int = 0,
    session: int = 0,
) -> Welcome:
    """Say hello and read the welcome.

    Raises:
        AccessDenied, NoHostSlot, PidTaken, ServerLost, RemoteProtocolError: why the server refused.
        DeadlineExceeded: it does not answer.
        ServerLost: it hung up.
    """
    hello = hello_of(kind=kind, secret=secret, token=token, pid=pid, shard=shard, session=session)
    raw = b""
    try:
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        sock.sendall(hello)
        while len(raw) < _WELCOME.size:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            piece = sock.recv(_WELCOME.size - len(raw))
            if not piece:
                raise ServerLost("the memory server hung up instead of greeting")
            raw += piece
    except TimeoutError:
        raise DeadlineExceeded("the memory server does not greet") from None
    except ServerLost:
        raise
    except OSError as error:
        raise ServerLost(
            f"the connection broke while greeting: {os.strerror(error.errno or 0)}"
        ) from error
    fields: dict[str, Any] = dict(zip(_WELCOME_FIELDS, _WELCOME.unpack(raw), strict=True))
    magic, version, status = fields.pop("magic"), fields.pop("version"), fields.pop("status")
    if magic != WIRE["magic"] or version != WIRE["version"]:
        raise RemoteProtocolError("what answers there is no memory server of this version")
    if status == WIRE["status"]["NO_PROCESS"]:
        raise Forgotten("the memory server has let this process go")
    if status:
        raise error_of(status, "attach")
    welcome = Welcome(**fields)
    if not (
        0 < welcome.nr_shards <= WIRE["max_shards"]
        and welcome.page_size > 0
        and welcome.slice_bytes > 0
        and welcome.max_outstanding > 0
    ):
        raise RemoteProtocolError("what answers there says of itself what no memory server does")
    return welcome


def sockaddr_of(sock: socket.socket) -> bytes:
    """Return the bytes of the struct sockaddr that a socket is connected to."""
    peer = sock.getpeername()
    if sock.family == socket.AF_UNIX:
        path = os.fsencode(peer) if isinstance(peer, str) else peer
        return struct.pack("=H", socket.AF_UNIX) + path + b"\0"
    if sock.family == socket.AF_INET:
        return struct.pack("=H", socket.AF_INET) + struct.pack(
            "!H4s8x", peer[1], socket.inet_aton(peer[0])
        )
    if sock.family == socket.AF_INET6:
        raw = socket.inet_pton(socket.AF_INET6, peer[0].partition("%")[0])
        return (
            struct.pack("=H", socket.AF_INET6)
            + struct.pack("!HI16s", peer[1], 0, raw)
            + (struct.pack("=I", peer[3]))
        )
    raise MisuseError(f"no address of family {sock.family}")
