"""put() and get(): any picklable object in DM; its arrays are writable, and each reader's own."""

import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dmrpc_cxl import Ref
from dmrpc_cxl.errors import BadRef, CannotSend, OutOfFrames, RefConsumed
from dmrpc_cxl.rpc import objects
from tests.fabrics import At, HostProcess
from tests.standing import Standing

N = 100_000


@pytest.fixture(scope="module")
def standing() -> Iterator[Standing]:
    standing = Standing({}, {})
    yield standing
    standing.close()


@pytest.fixture
def hosts(standing: Standing) -> Iterator[list[HostProcess]]:
    with standing.use() as (_, hosts):
        yield hosts


def put(at: At, how: str) -> bytes:
    value: Any = {
        "arrays": lambda: {"a": [np.arange(N), np.zeros((3, 0)), np.array(2.5)], "s": {1, 2}},
        "many": lambda: [np.full(i % 50, i) for i in range(700)],
        "empty": lambda: [np.zeros(0), bytearray(), b""],
        "buffers": lambda: [pickle.PickleBuffer(b"x" * N), pickle.PickleBuffer(bytearray(b"y" * N))],
        "none": lambda: None,
        "huge": lambda: np.ones(8 << 20, "u1"),
        "in dm": lambda: at.host.array(np.arange(N)),
        "F-order": lambda: np.asfortranarray(np.arange(N).reshape(100, -1)),
    }[how]()  # fmt: skip
    return at.host.put(value).to_bytes()


def get(at: At, wire: bytes, how: str = "") -> Any:
    at.value = at.host.get(wire)
    plain = [bytes(part) for part in at.value] if how == "buffers" else at.value
    return pickle.dumps(plain, 4)


@pytest.mark.parametrize(
    "how", ["arrays", "many", "empty", "buffers", "none", "huge", "in dm", "F-order"]
)
def test_what_was_put_is_what_others_get(hosts: list[HostProcess], how: str) -> None:
    back = pickle.loads(hosts[1].call(get, hosts[0].call(put, how), how))
    if how == "arrays":
        assert np.array_equal(back["a"][0], np.arange(N))
        assert (back["a"][1].shape, back["a"][2].item(), back["s"]) == ((3, 0), 2.5, {1, 2})
    elif how == "many":
        assert all(np.array_equal(array, np.full(i % 50, i)) for i, array in enumerate(back))
    elif how == "empty":
        assert (back[0].size, back[1], back[2]) == (0, bytearray(), b"")
    elif how == "buffers":
        assert [bytes(part) for part in back] == [b"x" * N, b"y" * N]
    elif how == "none":
        assert back is None
    elif how == "huge":
        assert int(back.sum()) == 8 << 20
    elif how == "in dm":
        assert np.array_equal(back, np.arange(N))
    else:
        assert np.array_equal(back, np.arange(N).reshape(100, -1))


def test_buffers_are_placed_once_and_not_copied_by_readers(hosts: list[HostProcess]) -> None:
    wire = hosts[0].call(put, "arrays")
    before = hosts[1].call(stats)
    hosts[1].call(get, wire)
    after = hosts[1].call(stats)
    for name in ("ralloc_calls", "bytes_copied", "wp_faults"):
        assert after[name] == before[name]


def stats(at: At) -> dict[str, int]:
    return at.host.stats()


def clone(at: At, wire: bytes) -> tuple[bytes, bytes]:
    ref = Ref.from_bytes(wire, at.host)
    return ref.clone().to_bytes(), ref.to_bytes()


def store(at: At, wire: bytes, value: int) -> None:
    at.value = at.host.get(wire)["a"][0]
    assert at.value.flags.writeable
    at.value[:] = value


def look(at: At) -> list[int]:
    return np.unique(at.value).tolist()


def test_readers_store_to_copies_of_their_own(hosts: list[HostProcess]) -> None:
    one, other = hosts[0].call(clone, hosts[0].call(put, "arrays"))
    hosts[0].call(store, one, 1)
    hosts[1].call(store, other, 2)
    assert hosts[0].call(look) == [1]
    assert hosts[1].call(look) == [2]


def garbage(at: At, what: str) -> None:
    made: dict[str, Any] = {
        "short": lambda: at.host.zeros(5, "u1"),
        "zeros": lambda: at.host.zeros(N, "u1"),
        "noise": lambda: at.host.array(np.random.default_rng(1).integers(0, 255, N), "u1"),
        "table beyond the end": lambda: header(at, 10, 2**60),
        "pickle beyond the end": lambda: header(at, 2**60, 0),
        "lengths beyond the end": lambda: header(at, 4, 3),
    }
    ref = at.host.create_ref(made[what]())
    with pytest.raises(BadRef):
        at.host.get(ref)


def header(at: At, nr_raw: int, nr_views: int) -> np.ndarray:
    array = at.host.array(np.full(4096, 255), "u1")
    array[:24] = np.frombuffer(objects.HEAD.pack(objects.MAGIC, nr_raw, nr_views), "u1")
    return array


@pytest.mark.parametrize(
    "what",
    ["short", "zeros", "noise", "table beyond the end", "pickle beyond the end", "lengths beyond the end"],
)  # fmt: skip
def test_a_ref_to_something_else_is_no_object(hosts: list[HostProcess], what: str) -> None:
    hosts[0].call(garbage, what)


def used_twice(at: At, wire: bytes) -> None:
    at.host.get(wire)
    for bad, error in ((wire, RefConsumed), (bytes(40), BadRef), (b"x", BadRef), (b"", BadRef)):
        with pytest.raises(error):
            at.host.get(bad)


def test_a_ref_is_used_up_and_bytes_that_are_none_are_refused(hosts: list[HostProcess]) -> None:
    hosts[1].call(used_twice, hosts[0].call(put, "arrays"))


def put_in_vain(at: At) -> None:
    for wrong in (lambda: 1, at.host, memoryview(b"x"), [pickle.PickleBuffer(np.arange(10)[::2])]):
        with pytest.raises(CannotSend):
            at.host.put([np.zeros(N), wrong])
    with pytest.raises(OutOfFrames):
        at.host.put(np.zeros(40 << 20, "u1"))


def test_what_cannot_be_put_is_refused_and_leaves_nothing(hosts: list[HostProcess]) -> None:
    hosts[0].call(put_in_vain)
