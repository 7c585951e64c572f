"""A coordinator and hosts of different releases: each side says so, and neither takes the other's messages for its own."""

from __future__ import annotations

import os
import socket
import struct
import threading
from pathlib import Path

import pytest

import dmrpc_cxl
from dmrpc_cxl.coordinator.client import Client
from dmrpc_cxl.coordinator.messages import HEADER, MAGIC, VERSION, Header, MsgType, Status
from dmrpc_cxl.errors import RemoteProtocolError
from dmrpc_cxl.fabric import device as devices
from dmrpc_cxl.fabric.liveness import start_time
from tests.coordinators import coordinated


def read(peer: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = peer.recv(size - len(data))
        assert more, "the other side hung up"
        data += more
    return data


def test_a_host_of_another_release_is_told_both_versions_and_hung_up_on(tmp_path: Path) -> None:
    with coordinated(tmp_path) as fabric:
        superblock = fabric.device.superblock
        hello = struct.pack("<Q", superblock["fabric_id"]) + superblock["secret"]
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(60)
            peer.connect(str(fabric.socket))
            peer.sendall(HEADER.pack(MAGIC, VERSION - 1, MsgType.HELLO, 0, len(hello), 1) + hello)
            header = Header._make(HEADER.unpack(read(peer, HEADER.size)))
            text = read(peer, header.length).decode()
            assert peer.recv(1) == b""
        assert header.status == Status.VERSION_MISMATCH
        assert f"version {VERSION - 1}" in text
        assert f"here it is {VERSION}" in text
        assert fabric.stats()["epoch"] == 1  # it goes on serving others


class Foreign:
    """A coordinator of the next release, as far as the first answer goes."""

    def __init__(self, fabric: str, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.settimeout(60)
        self._listener.bind(str(path))
        self._listener.listen()
        with devices.open(fabric) as device:
            device.start_coordinator(
                os.getpid(), start_time(os.getpid()) or 0, str(path), "127.0.0.1", 0
            )
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def _answer(self) -> None:
        peer, _ = self._listener.accept()
        with peer:
            asked = Header._make(HEADER.unpack(read(peer, HEADER.size)))
            read(peer, asked.length)
            text = b"please upgrade"
            status = Status.VERSION_MISMATCH
            head = (MAGIC, VERSION + 1, asked.type, status, len(text), asked.request)
            peer.sendall(HEADER.pack(*head) + text)

    def close(self) -> None:
        self._thread.join()
        self._listener.close()


@pytest.mark.parametrize("who", ["host", "tool"])
def test_who_meets_a_coordinator_of_another_release_is_told_both_versions(
    tmp_path: Path, who: str
) -> None:
    with coordinated(tmp_path, serve=False) as fabric:
        foreign = Foreign(fabric.name, tmp_path / "foreign.sock")
        with pytest.raises(RemoteProtocolError) as caught:
            if who == "host":
                dmrpc_cxl.attach(fabric.name)
            else:
                Client.to(fabric.name)
        foreign.close()
        assert f"version {VERSION + 1}" in str(caught.value)
        assert f"here it is {VERSION}" in str(caught.value)
