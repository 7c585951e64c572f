"""Refs of memory servers in messages: whatever bytes stand where a token should, nobody else's Ref is lost, and errors are typed."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmrpc_cxl.errors import DmError
from dmrpc_cxl.rpc import frames
from dmrpc_cxl.rpc.frames import Kind
from dmrpc_cxl.rpc.marshal import ARRAY, BLOB, REF, Reader
from dmrpc_net.memory import MARK, TOKEN_BYTES, Memory
from tests.net_servers import serving

LENGTH = 10_000


class Fixed:
    """What a frame is read with: a Memory, as a host without the pool has it."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.view_ref = memory.view
        self.take_ref = memory.take


@pytest.fixture(scope="module")
def here() -> Iterator[Fixed]:
    with serving() as servers:
        memory = Memory.attach(servers.addresses, secret=servers.secret)
        yield Fixed(memory)
        memory.close()


def tokens(real: bytes) -> st.SearchStrategy[bytes]:
    changed = st.tuples(st.integers(0, TOKEN_BYTES - 1), st.integers(0, 255)).map(
        lambda change: real[: change[0]] + bytes([change[1]]) + real[change[0] + 1 :]
    )
    ends = st.binary(min_size=24, max_size=24).map(lambda end: real[:16] + end)
    group = st.binary(min_size=32, max_size=32).map(lambda end: MARK + end)
    return st.one_of(st.binary(min_size=40, max_size=40), changed, ends, group)


@given(data=st.data())
def test_a_frame_with_any_token_is_read_or_refused_and_the_ref_of_others_stays(
    here: Fixed, data: st.DataObject
) -> None:
    memory = here.memory
    source = np.arange(LENGTH, dtype="u1")
    ref = memory.place(source)
    token = memory.token_of(ref)
    said = data.draw(tokens(token))
    code = data.draw(st.sampled_from([ARRAY, BLOB, REF]))
    length = data.draw(st.sampled_from([LENGTH, 0, 1, 1 << 40]))
    place = data.draw(st.integers(-2, 3))
    inner = {
        ARRAY: (place, length, "|u1", (length,)),
        BLOB: (place, length, 2),
        REF: place,
    }[code]
    body = msgspec.msgpack.encode([msgspec.msgpack.Ext(code, msgspec.msgpack.encode(inner))])
    frame = frames.parse(bytearray(frames.head(Kind.REPLY, 1, refs=said, body=body)))
    read = False
    try:
        got = Reader().read(here, frame)[0]  # type: ignore[arg-type]
        read = True
    except (DmError, ValueError):
        got = None
    if read and said == token and code == ARRAY and length == LENGTH:
        assert (got == source).all()
    memory.forget([said])
    if (
        said != token
    ):  # 64 bits of a key are not guessed; who changes only the length does not get it either
        assert memory.is_held(token)
        assert (memory.view(token).numpy() == source).all()
    memory.forget([token])
    del got
    memory.client.ping(ref.server, ref.shard)


def test_every_page_is_back(here: Fixed) -> None:
    found = here.memory.client.audit()
    assert not found["nr_violations"]
    assert found["nr_free"] == found["nr_pages"], found
