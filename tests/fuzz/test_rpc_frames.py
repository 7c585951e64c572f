"""RPC frames and what is in them against any bytes: one kind of error may come of it."""

import socket
import struct
import types
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmrpc_cxl.errors import AccessDenied, InterfaceMismatch, PeerLost, RemoteProtocolError
from dmrpc_cxl.rpc import frames
from dmrpc_cxl.rpc.channel import READ_BYTES, TcpChannel
from dmrpc_cxl.rpc.endpoint import Handshake
from dmrpc_cxl.rpc.frames import HEADER_BYTES, REF_BYTES, Hello, Kind

HEADER = struct.Struct("<IBBHQQIIII")
U8, U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (8, 16, 32, 64))
SMALL = st.integers(0, 200)
HEADERS = st.tuples(
    SMALL | U32, st.sampled_from(list(Kind)) | U8, st.sampled_from([0, 1, 2, 4, 12]) | U8, st.integers(0, 3) | U16,
    U64, U64, U32, SMALL | U32, SMALL | U32, st.sampled_from([0, 64, 128]) | U32,
)  # fmt: skip
ANY = st.binary(max_size=300)


def assert_within(frame: frames.Frame, data: bytes) -> None:
    """Assert that the parts of a frame lie in it, one behind the other."""
    at = HEADER_BYTES
    for part, nbytes in (
        (frame.refs, REF_BYTES * frame.nr_refs),
        (frame.meta, frame.meta_bytes),
        (frame.body, frame.body_bytes),
    ):
        assert bytes(part) == data[at : at + nbytes]
        assert len(part) == nbytes
        at += nbytes
    if frame.inline_at:
        assert at <= frame.inline_at <= len(data)
    else:
        assert at == len(data)


@given(ANY)
def test_any_bytes_are_a_frame_or_a_protocol_error(data: bytes) -> None:
    with suppress(RemoteProtocolError):
        assert_within(frames.parse(data), data)


@given(HEADERS, ANY, st.booleans())
def test_any_header_is_that_of_a_frame_or_a_protocol_error(
    header: tuple[int, ...], rest: bytes, right_size: bool
) -> None:
    size = HEADER_BYTES + len(rest) if right_size else header[0]
    data = HEADER.pack(size, *header[1:]) + rest
    with suppress(RemoteProtocolError):
        assert_within(frames.parse(data), data)


@given(
    st.sampled_from([Kind.CALL, Kind.REPLY, Kind.ERROR]), U64, st.integers(0, 5), ANY, ANY, U32, U64, SMALL
)  # fmt: skip
def test_what_is_written_is_read_again(
    kind: Kind, call_id: int, nr_refs: int, meta: bytes, body: bytes, method: int, time_left: int, inline: int
) -> None:  # fmt: skip
    refs = bytes(range(40)) * nr_refs
    data = frames.head(
        kind, call_id, refs=refs, meta=meta, body=body, method=method, time_left_us=time_left, inline_bytes=inline
    )  # fmt: skip
    data += b"i" * inline
    frame = frames.parse(data)
    assert_within(frame, data)
    assert (frame.kind, frame.call_id, frame.method, frame.time_left_us) == (
        kind,
        call_id,
        method,
        time_left,
    )
    assert (bytes(frame.refs), bytes(frame.meta), bytes(frame.body)) == (refs, meta, body)
    assert bool(frame.inline_at) == bool(inline)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=9) | ANY,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=12,
)  # fmt: skip
BODIES = ANY | PLAIN.map(msgspec.msgpack.encode) | st.integers(1, 5000).map(lambda n: b"\x91" * n)


@given(BODIES)
def test_any_body_of_the_layer_itself_is_read_or_a_protocol_error(body: bytes) -> None:
    for kind, read in (
        (Kind.HELLO, frames.read_hello),
        (Kind.WELCOME, frames.read_welcome),
        (Kind.ERROR, frames.read_error),
    ):
        with suppress(RemoteProtocolError):
            read(frames.parse(frames.head(kind, 0, body=body)))
    with suppress(RemoteProtocolError):
        frames.read_meta(frames.parse(frames.head(Kind.CALL, 1, meta=body)))


# ---------------------------------------------------------------- from a stream


SIZES = st.integers(HEADER_BYTES, 200) | st.sampled_from(
    [READ_BYTES - 1, READ_BYTES, READ_BYTES + 1, 3 * READ_BYTES, 1_500_000]
)


@given(
    st.lists(SIZES, max_size=8), st.lists(st.integers(1, 2 * READ_BYTES), max_size=12), st.data()
)
def test_frames_come_out_of_a_stream_as_they_went_in_however_it_is_cut(
    sizes: list[int], cuts: list[int], data: st.DataObject
) -> None:
    sent = [
        size.to_bytes(4, "little") + bytes([i + 1]) * (size - 4) for i, size in enumerate(sizes)
    ]
    stream = memoryview(b"".join(sent))
    ours, theirs = socket.socketpair()
    channel = TcpChannel(ours)
    received: list[bytes] = []
    with theirs:
        theirs.setblocking(False)
        turns = iter([*cuts, *[1 << 20] * (len(stream) // 1000 + 10)])
        while stream:
            with suppress(BlockingIOError):
                stream = stream[theirs.send(stream[: next(turns)]) :]
            while (frame := channel.recv()) is not None:
                received.append(bytes(frame))
        while len(received) < len(sent):
            frame = channel.recv()
            assert frame is not None, "all of it is in the socket"
            received.append(bytes(frame))
        assert received == sent
        assert channel.recv() is None
    with pytest.raises(PeerLost):
        channel.recv()
    channel.close()


@given(ANY, st.integers(40, 300))
def test_any_stream_is_frames_or_a_protocol_error_or_an_end(data: bytes, limit: int) -> None:
    ours, theirs = socket.socketpair()
    channel = TcpChannel(ours, limit)
    with theirs:
        theirs.sendall(data)
    with suppress(RemoteProtocolError, PeerLost):
        while (frame := channel.recv()) is not None:
            assert HEADER_BYTES <= len(frame) <= limit
    channel.close()


# ---------------------------------------------------------------- HELLO


HOST: Any = types.SimpleNamespace(secret=b"s" * 16, fabric_id=7)


def hello(**changes: Any) -> bytes:
    body = Hello(frames.MAGIC, frames.PROTOCOL, 7, b"s" * 16, "name", "tcp")
    for name, value in changes.items():
        setattr(body, name, value)
    return frames.head(Kind.HELLO, 0, body=frames.encode(body))


def read(data: bytes) -> Hello | None:
    ours, theirs = socket.socketpair()
    handshake = Handshake(ours, "tcp")
    try:
        with theirs:
            theirs.sendall(data)
            return handshake.read(HOST)
    finally:
        handshake.channel.close()


@given(st.integers(0, len(hello()) - 1), U8)
def test_a_hello_with_a_byte_changed_is_refused_or_says_the_same_of_who_it_is(
    at: int, value: int
) -> None:
    data = bytearray(hello())
    data[at] = value
    with suppress(RemoteProtocolError, AccessDenied, InterfaceMismatch, PeerLost):
        said = read(bytes(data))
        if said is not None:
            assert said.secret == HOST.secret
            assert (said.fabric_id, said.protocol, said.transport) == (7, frames.PROTOCOL, "tcp")


@given(BODIES)
def test_any_hello_is_refused(body: bytes) -> None:
    with pytest.raises((RemoteProtocolError, AccessDenied, InterfaceMismatch, PeerLost)):
        read(frames.head(Kind.HELLO, 0, body=body))


@given(st.binary(max_size=40))
def test_any_other_secret_is_refused(secret: bytes) -> None:
    if secret == HOST.secret:
        return
    with pytest.raises(AccessDenied):
        read(hello(secret=secret))
