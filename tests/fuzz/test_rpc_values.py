"""Frames with values in them, changed at random: read, or refused with an error of the protocol; no Ref is lost.

The reader runs in a host process, with Refs to real memory.
"""

from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmrpc_cxl.errors import BadRef, CannotSend, OutOfFrames, RefConsumed, RemoteProtocolError
from dmrpc_cxl.rpc import frames
from dmrpc_cxl.rpc.frames import Kind
from dmrpc_cxl.rpc.marshal import Marshaller, Reader
from tests.fabrics import At, HostProcess
from tests.standing import Standing

REFUSALS = (RemoteProtocolError, msgspec.ValidationError, BadRef, RefConsumed)
READERS = [Reader(), Reader(list[int]), Reader(tuple[np.ndarray]), Reader(dict[str, bytes])]

VALUES = [
    [1, "two", {"three": 3.0}],
    [np.arange(1000)],
    [np.arange(10), np.zeros((3, 4), "f4"), np.zeros(3, [("a", "i4"), ("b", "S2")])],
    [b"x" * 3000, bytearray(b"y" * 10)],
    {"a": b"z" * 5000},
]


@pytest.fixture(scope="module")
def host() -> Iterator[HostProcess]:
    """One host, for all examples."""
    standing = Standing({})
    with standing.use() as (_, [host]):
        yield host
    standing.close()


def frame_of(at: At, number: int, transfer: str) -> bytearray:
    encoded = Marshaller(at.host, 256).write([VALUES[number]], transfer)  # type: ignore[arg-type]
    head = frames.head(
        Kind.CALL, 1, flags=encoded.flags, refs=encoded.refs, body=encoded.body, inline_bytes=encoded.inline_bytes
    )  # fmt: skip
    return bytearray(b"".join((head, *encoded.inline)))


def read_changed(
    at: At, number: int, transfer: str, changes: list[tuple[int, int]], cut: int, reader: int
) -> str:
    """Change a frame and read it; return what came of it. Nothing may be in use afterwards."""
    try:
        data = frame_of(at, number, transfer)
    except (OutOfFrames, CannotSend) as error:
        return repr(error)
    refs = bytes(frames.parse(data).refs)
    for place, value in changes:
        data[place % len(data)] = value
    if cut:
        data = data[:-cut]
        data[:4] = len(data).to_bytes(4, "little")
    try:
        READERS[reader].read(at.host, frames.parse(data))
        outcome = "read"
    except REFUSALS as error:
        outcome = type(error).__name__
        del error
    at.host.drop_refs(refs)
    return outcome


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, len(VALUES) - 1),
    st.sampled_from(["auto", "value", "ref"]),
    st.lists(st.tuples(st.integers(0, 10_000) | st.integers(0, 200), st.integers(0, 255)), max_size=5),
    st.integers(0, 50) | st.just(0),
    st.integers(0, len(READERS) - 1),
)  # fmt: skip
def test_a_changed_frame_is_read_or_refused(
    host: HostProcess, number: int, transfer: str, changes: list[tuple[int, int]], cut: int, reader: int
) -> None:  # fmt: skip
    host.call(read_changed, number, transfer, changes, cut, reader)
