"""The shortest way through the whole fabric."""

import pytest

import dmrpc_cxl
from dmrpc_cxl.errors import RefConsumed
from tests.fabrics import At, Fabric


def make(at: At, value: int) -> bytes:
    at.array = at.host.array([value] * 2000, dtype="i4")
    return at.host.create_ref(at.array).to_bytes()


def first(at: At) -> int:
    return int(at.array[0])


def map_and_write(at: At, wire: bytes, value: int) -> list[int]:
    buffer = at.host.map_ref(wire)
    seen = buffer.numpy("i4")
    before = int(seen[0])
    seen[0] = value
    return [before, int(seen[0]), int(seen[-1])]


def test_a_mapper_sees_the_creators_bytes_and_its_stores_stay_its_own(fabric: Fabric) -> None:
    creator, mapper = fabric.host(), fabric.host()
    wire = creator.call(make, 7)
    assert mapper.call(map_and_write, wire, 99) == [7, 99, 7]
    assert creator.call(first) == 7
    with pytest.raises(RefConsumed):
        mapper.call(map_and_write, wire, 1)
    assert dmrpc_cxl.__version__
