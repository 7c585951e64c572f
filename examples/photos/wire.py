"""How the messages travel: one Unix socket between each two, found through the coordinator's name service.

Nothing else in this package knows of sockets. multiprocessing.connection keeps messages apart and has
both sides prove that they know the fabric's secret.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path

import msgspec

import dmrpc_cxl
from dmrpc_cxl.coordinator.client import Client
from dmrpc_cxl.coordinator.messages import MsgType
from dmrpc_cxl.fabric import device
from dmrpc_cxl.fabric.place import Place

from .messages import Message

SECONDS = 30.0  # for the others to come up, and for an answer

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


class PeerGone(ConnectionError):
    """The process at the other end has ended."""


class Channel:
    """A connection that carries messages."""

    def __init__(self, peer: str, raw: connection.Connection) -> None:
        self.peer = peer
        self.bytes_sent = 0
        self.bytes_received = 0
        self.raw = raw

    def send(self, message: Message) -> None:
        """Send a message.

        Raises:
            PeerGone: nobody will read it.
        """
        data = _encoder.encode(message)
        try:
            self.raw.send_bytes(data)
        except OSError:
            raise PeerGone(f"{self.peer} has ended") from None
        self.bytes_sent += len(data)

    def receive(self, seconds: float | None = SECONDS) -> Message:
        """Wait for a message.

        Raises:
            PeerGone: there will be none.
            TimeoutError: there was none in that time.
        """
        try:
            if not self.raw.poll(seconds):
                raise TimeoutError(f"nothing from {self.peer} for {seconds} s")
            data = self.raw.recv_bytes()
        except (EOFError, ConnectionError):
            raise PeerGone(f"{self.peer} has ended") from None
        self.bytes_received += len(data)
        return _decoder.decode(data)

    def close(self) -> None:
        self.raw.close()


def ready(channels: Sequence[Channel]) -> list[Channel]:
    """Wait until there is something to receive, and return the channels that have it."""
    found = connection.wait([channel.raw for channel in channels])
    return [channel for channel in channels if channel.raw in found]


def _secret(host: dmrpc_cxl.Host) -> bytes:
    with device.open(host.fabric, writable=False) as opened:
        return bytes(opened.superblock["secret"])


@contextmanager
def listening(host: dmrpc_cxl.Host, service: str) -> Iterator[connection.Listener]:
    """Listen under the name of a service; give the listener to `accept`."""
    path = Path(Place.of_environment().runtime_dir) / f"{service}.sock"
    with connection.Listener(str(path), "AF_UNIX", authkey=_secret(host)) as listener:
        ask = {"name": f"photos/{service}", "endpoint": str(path)}
        host.request(MsgType.PUBLISH, json.dumps(ask).encode())
        yield listener


def accept(listener: connection.Listener, peer: str) -> Channel:
    """Wait for somebody to connect."""
    return Channel(peer, listener.accept())


def connect(host: dmrpc_cxl.Host, service: str) -> Channel:
    """Wait until a service is there, and connect to it.

    Raises:
        DeadlineExceeded: it does not come.
        PeerGone: it came, and went.
    """
    tcp = Place.of_environment().transport == "tcp"
    with Client.to(host.fabric, tcp=tcp) as coordinator:
        coordinator.wait_for_service(f"photos/{service}", SECONDS)
        path = coordinator.lookup(f"photos/{service}")["endpoint"]
    try:
        return Channel(service, connection.Client(path, "AF_UNIX", authkey=_secret(host)))
    except (OSError, EOFError):
        raise PeerGone(f"{service} has ended") from None
