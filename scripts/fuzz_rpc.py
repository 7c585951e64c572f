"""Feed the readers of the RPC layer with bytes, guided by what they cover: ``make fuzz-rpc``.

atheris (libFuzzer) changes inputs and keeps those that reach new branches of dmrpc_cxl.rpc. Each input is taken for a frame,
for a HELLO, for metadata, for a value of each of several types, and for a stream in pieces. Errors of the protocol are what
is to come of it; anything else is a crash, and its input is written to the corpus folder.

There is no DM here: every Ref is refused, as the DM layer refuses one that is forged.

Usage: fuzz_rpc.py [libFuzzer options] [corpus folders that exist]
"""

from __future__ import annotations

import dataclasses
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import atheris  # type: ignore[import-untyped, import-not-found, unused-ignore]

with atheris.instrument_imports(include=["dmrpc_cxl.rpc"]):
    from dmrpc_cxl.rpc import frames, marshal
    from dmrpc_cxl.rpc.channel import TcpChannel

import msgspec
import numpy as np

from dmrpc_cxl.errors import BadRef, PeerLost, RemoteProtocolError


class NoMemory:
    """What a reader needs of a host."""

    def view_ref(self, ref: bytes) -> Any:
        """Refuse, as for a forged Ref."""
        raise BadRef("forged")


@dataclasses.dataclass
class Point:
    """A type for a reader."""

    x: int
    image: np.ndarray
    blobs: dict[str, bytes]


HOST: Any = NoMemory()
EXPECTED = (RemoteProtocolError, BadRef, PeerLost, msgspec.ValidationError)
READERS = [marshal.Reader(wanted) for wanted in (Any, list[int], tuple[np.ndarray], Point)]
LAYER = (frames.read_hello, frames.read_welcome, frames.read_error, frames.read_meta)
ALLOWED = int(frames.Flag.BLOBS)  # pickles run code: they are refused before


def read_whole(data: bytes) -> None:
    """Take bytes for one frame."""
    frame = frames.parse(bytearray(data))
    for read in LAYER:
        with suppress(*EXPECTED):
            read(frame)
    if not frame.flags & frames.Flag.PICKLED:
        for reader in READERS:
            with suppress(*EXPECTED):
                reader.read(HOST, frame)


def read_value(data: bytes) -> None:
    """Take bytes for what stands in a frame that is right: half of them for the body, half for what is outside."""
    if len(data) < 2:
        return
    cut = data[0] * (len(data) - 2) // 255
    body, inline = data[2 : 2 + cut], data[2 + cut :]
    head = frames.head(
        frames.Kind.CALL, 1, flags=data[1] & ALLOWED, body=body, inline_bytes=len(inline)
    )
    read_whole(head + inline)


def read_stream(data: bytes) -> None:
    """Take bytes for what comes over a socket, in two pieces."""
    ours, theirs = socket.socketpair()
    channel = TcpChannel(ours, 4096)
    try:
        half = len(data) // 2
        for piece in (data[:half], data[half:]):
            theirs.send(piece) if piece else None
            while (frame := channel.recv()) is not None:
                read_whole(bytes(frame))
    finally:
        theirs.close()
        channel.close()


def one_input(data: bytes) -> None:
    """Read bytes in every way."""
    for read in (read_whole, read_value, read_stream):
        with suppress(*EXPECTED):
            read(data)


def plant(folder: Path) -> None:
    """Put real frames into a corpus folder that is empty, to begin from."""
    if any(folder.iterdir()):
        return
    values: list[Any] = [
        [1, "two", {"three": 3.0}],
        np.arange(5),
        np.zeros((2, 0), [("a", "i4"), ("b", "S2")]),
        Point(1, np.zeros(2, "M8[s]"), {"a": b"x" * 300}),
        {"x": 1, "image": np.array(1.0), "blobs": {"a": b"x"}},
    ]
    marshaller = marshal.Marshaller(HOST, 256)
    for i, value in enumerate(values):
        made = marshaller.write([value], "value")
        head = frames.head(
            frames.Kind.CALL, 1, flags=made.flags, body=made.body, inline_bytes=made.inline_bytes
        )
        inline = b"".join(bytes(part) for part in made.inline)
        (folder / f"frame{i}").write_bytes(head + inline)
        cut = bytes([255 * len(made.body) // max(1, len(made.body) + len(inline)), made.flags])
        (folder / f"value{i}").write_bytes(cut + made.body + inline)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        if not argument.startswith("-"):
            plant(Path(argument))
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
