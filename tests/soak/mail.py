"""Refs on their way from host to host: datagrams, each with the bytes of a Ref and what it must show.

Each slot has a socket, which its newest process has bound. What lies in the socket of a process that dies is lost; the Ref is
still its sender's, who takes it back once it sees on the board that the addressee's life is over.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import struct
from pathlib import Path
from typing import Any

WIRE_BYTES = 40
_FORMAT = struct.Struct("<HIHIQIIB40s")


@dataclasses.dataclass(frozen=True)
class Letter:
    """A Ref that is sent."""

    from_slot: int
    from_life: int
    to_slot: int
    to_life: int
    nbytes: int
    crc: int
    page_offset: int
    revocable: int  # 1: its sender may drop it at any time
    wire: bytes

    def pack(self) -> bytes:
        return _FORMAT.pack(*dataclasses.astuple(self))

    @classmethod
    def unpack(cls, data: bytes) -> Letter:
        fields: list[Any] = list(_FORMAT.unpack(data))
        return cls(*fields)


class Mail:
    """The socket of one process."""

    def __init__(self, folder: Path, slot: int) -> None:
        self._folder = folder
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        new = folder / f"mail-{slot}.new"
        new.unlink(missing_ok=True)
        self._socket.bind(str(new))
        os.replace(new, folder / f"mail-{slot}")

    def send(self, letter: Letter) -> bool:
        """Send a letter; False: nobody is there, or has room."""
        try:
            self._socket.sendto(letter.pack(), str(self._folder / f"mail-{letter.to_slot}"))
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            return False
        return True

    def receive(self) -> Letter | None:
        """Return a letter, if there is one."""
        try:
            return Letter.unpack(self._socket.recv(256))
        except BlockingIOError:
            return None
