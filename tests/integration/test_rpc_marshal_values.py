"""What arrives is what was sent: every kind of value, by value and by Ref, there and back."""

import contextlib
import dataclasses
import datetime
import gc
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from dmrpc_cxl.errors import AccessDenied, CannotSend, OutOfFrames
from tests.fabrics import At, Fabric, HostProcess
from tests.rpc_peers import LARGE, THRESHOLD, connect, serve
from tests.standing import Standing, take_all_frames

TRANSFERS = ["auto", "value", "ref", "copy"]


@pytest.fixture(scope="module")
def standing() -> Iterator[Standing]:
    standing = Standing({}, {})
    yield standing
    standing.close()


@pytest.fixture(params=["ring", "tcp"])
def pair(request: pytest.FixtureRequest, standing: Standing) -> Iterator[list[HostProcess]]:
    """A host that serves a Depot, and one with a client of it."""
    with standing.use() as (_, hosts):
        hosts[0].call(serve, pickle=True)
        hosts[1].call(connect, transport=request.param)
        yield hosts
        hosts[1].call(end)
        hosts[0].call(end)


def end(at: At) -> None:
    if hasattr(at, "server"):
        at.server.stop()
    else:
        at.depot.close()


@dataclasses.dataclass
class Point:
    x: int
    name: str
    image: Any = None


class Shape(msgspec.Struct):
    points: list[Any]
    data: Any = None


# ---------------------------------------------------------------- arrays


def made(kind: str, n: int) -> np.ndarray:
    """Return an array of about n bytes."""
    rng = np.random.default_rng(1)
    numbers = rng.integers(0, 255, n, "u1")
    if kind in ("structured", "padded", "nested"):
        dtype: Any = {
            "structured": [("a", "<i4"), ("b", "S3"), ("c", ">f8", (2,))],
            "padded": np.dtype([("a", "u1"), ("b", "f8")], align=True),
            "nested": [("in", [("x", "i2"), ("y", "U2")]), ("z", "M8[s]")],
        }[kind]
        array = np.zeros(n // np.dtype(dtype).itemsize + 1, dtype)
        name = array.dtype.names[0]  # type: ignore[index]
        target = array["in"]["x"] if kind == "nested" else array[name]
        target[:] = np.arange(len(array)) % 100
        return array
    if kind == "datetime64":
        return np.arange(n // 8).astype("M8[us]")
    if kind == "timedelta64":
        return np.arange(n // 8).astype("m8[ns]")
    if kind == "strings":
        return np.array([f"é{i}" for i in range(n // 32)])
    if kind == "bytes":
        return np.array([b"a%d" % i for i in range(n // 8)])
    if kind == "bool":
        return numbers > 100
    if kind in ("void", "longdouble", "big-endian", "half", "c16", "c8"):
        code = {"void": "V7", "longdouble": "g", "big-endian": ">i4", "half": "e"}.get(kind, kind)
        plain = np.arange(n // np.dtype(code).itemsize)
        return numbers[: n // 7 * 7].view("V7") if kind == "void" else plain.astype(code)
    square = numbers[: int(n**0.5) ** 2].reshape(int(n**0.5), -1)
    frozen = square.copy()
    frozen.setflags(write=False)
    return {
        "zero-size": np.zeros((3, 0, 2), "f4"),
        "0-d": np.array(3.5),
        "strided": square[::2, ::3],
        "F-order": np.asfortranarray(square),
        "reversed": square[::-1, ::-1],
        "read-only": frozen,
        "broadcast": np.broadcast_to(numbers[: n // 16], (16, n // 16)),
        "itemsize 0": np.zeros(5, "S0"),
        "7-d": numbers[: n // 64 * 64].reshape(2, 2, 2, 2, 2, 2, -1),
    }[kind]


ARRAYS = [
    "structured",
    "padded",
    "nested",
    "datetime64",
    "timedelta64",
    "strings",
    "bytes",
    "bool",
    "void",
    "longdouble",
    "big-endian",
    "half",
    "c16",
    "c8",
    "zero-size",
    "0-d",
    "strided",
    "F-order",
    "reversed",
    "read-only",
    "broadcast",
    "7-d",
]


def same(array: np.ndarray, other: np.ndarray) -> bool:
    if array.dtype.names:  # what is in the gaps between fields, numpy does not copy
        return np.array_equal(array, other)
    return array.tobytes() == other.tobytes()


def there_and_back(at: At, kind: str, n: int, transfer: str, in_dm: bool) -> None:
    array = made(kind, n)
    if in_dm and array.nbytes:
        array = at.host.array(array)
    expected = array.copy()
    back = at.depot.using(transfer=transfer).echo(array)
    assert (back.dtype, back.shape) == (expected.dtype, expected.shape)
    assert same(back, expected)
    assert back.flags.writeable
    if back.nbytes:
        back.reshape(-1).view("u1")[...] = 0xFF if back.dtype != bool else 1
    assert same(array, expected)


@pytest.mark.parametrize("transfer", TRANSFERS)
@pytest.mark.parametrize("kind", ARRAYS)
def test_every_kind_of_array_comes_back_equal_writable_and_isolated(
    pair: list[HostProcess], kind: str, transfer: str
) -> None:
    for n in (1000, LARGE):
        for in_dm in (False, True):
            pair[1].call(there_and_back, kind, n, transfer, in_dm)


def refuse_arrays(at: At) -> None:
    for wrong in (
        np.array([object()]),
        np.zeros(2, [("a", "O")]),
        np.ma.masked_array([1, 2], [0, 1]),
        np.zeros(2, {"names": ["a", "b"], "formats": ["i4", "i4"], "offsets": [0, 2]}),
        *([np.array(["a"], np.dtypes.StringDType())] if hasattr(np.dtypes, "StringDType") else []),
    ):
        for transfer in TRANSFERS:
            with pytest.raises(CannotSend):
                at.depot.using(transfer=transfer).echo([np.zeros(LARGE), wrong])


def test_arrays_of_objects_and_other_memory_layouts_are_refused_before_anything_leaves(
    pair: list[HostProcess],
) -> None:
    pair[1].call(refuse_arrays)


# ---------------------------------------------------------------- other values


def plain(at: At, transfer: str) -> None:
    depot = at.depot.using(transfer=transfer)
    utc = datetime.timezone.utc
    values = [
        None, True, -1, 2**63, 1.5, "é" * 10, "x" * LARGE, [], {}, {"a": [1, {"b": 2}]}, {1: "one"},
        b"", b"x", datetime.datetime(2026, 1, 2, tzinfo=utc),
    ]  # fmt: skip
    for value in values:
        assert depot.echo(value) == value
    assert depot.echo(np.float32(1.5)) == 1.5
    assert depot.echo(np.bool_(True)) is True
    # Beside large bytes they are written in another way, and have to arrive the same.
    assert depot.echo([values, b"x" * LARGE])[0] == values
    assert depot.echo(Point(1, "p")) == {"x": 1, "name": "p", "image": None}
    assert depot.echo(Shape([1])) == {"points": [1], "data": None}


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_plain_values_dataclasses_and_structs_arrive_the_same_with_or_without_large_bytes(
    pair: list[HostProcess], transfer: str
) -> None:
    pair[1].call(plain, transfer)


def blobs(at: At, transfer: str, n: int) -> None:
    depot = at.depot.using(transfer=transfer)
    data = bytes(range(256)) * (n // 256)
    buffer = at.host.ralloc(len(data))
    buffer.numpy()[:] = np.frombuffer(data, "u1")
    grid = np.frombuffer(data, "u1").reshape(16, -1)
    for value in (
        data,
        bytearray(data),
        memoryview(data),
        memoryview(buffer),
        buffer,
        memoryview(grid),
        memoryview(np.frombuffer(data, "<f8")),
    ):
        expected = memoryview(value).tobytes()
        for back in (depot.echo(value), depot.echo({"a": [value, 1]})["a"][0]):
            assert bytes(back) == expected
            if isinstance(back, (bytearray, memoryview)):
                assert not memoryview(back).readonly
                memoryview(back).cast("B")[:] = bytes(len(expected))
        assert memoryview(value).tobytes() == expected
        del value, back
    with pytest.raises(CannotSend):
        depot.echo(memoryview(data)[::2])


@pytest.mark.parametrize("transfer", TRANSFERS)
@pytest.mark.parametrize("n", [256, LARGE])
def test_bytes_bytearrays_memoryviews_and_buffers_arrive_equal(
    pair: list[HostProcess], n: int, transfer: str
) -> None:
    pair[1].call(blobs, transfer, n)


def several(at: At, transfer: str) -> None:
    depot = at.depot.using(transfer=transfer)
    small, large = np.arange(10), at.host.array(np.arange(LARGE))
    value = {
        "a": [small, large, {"b": (large, small)}],
        "p": Point(1, "x", large),
        "s": Shape([small], large),
    }
    back = depot.echo(value)
    for got in (back["a"][1], back["a"][2]["b"][0], back["p"]["image"], back["s"]["data"]):
        assert np.array_equal(got, large)
        got[:] = -1  # each is another copy
    assert np.array_equal(back["s"]["points"][0], small)
    one, other = depot.two(large, large)
    one[:] = 1
    assert np.array_equal(other, large)
    many = depot.echo([np.full(3, i) for i in range(300)])
    assert [int(array[0]) for array in many] == list(range(300))


@pytest.mark.parametrize("transfer", TRANSFERS)
def test_arrays_may_be_nested_several_and_the_same_one_twice(
    pair: list[HostProcess], transfer: str
) -> None:
    pair[1].call(several, transfer)


def unsendable(at: At) -> None:
    loop: list[Any] = []
    loop.append(loop)
    for wrong in (
        object(),
        {1, object()},
        1j,
        np.complex64(1),
        np.longdouble(1),
        2**70,
        loop,
        "\udc80",
        lambda: 1,
    ):
        for beside in (None, b"x" * LARGE, np.zeros(LARGE)):
            with pytest.raises(CannotSend):
                at.depot.echo([beside, wrong])


def test_what_cannot_be_sent_is_refused_and_nothing_is_left_behind(
    pair: list[HostProcess],
) -> None:
    pair[1].call(unsendable)
    pair[1].call(plain, "auto")


# ---------------------------------------------------------------- which way


def counted(at: At, transfer: str, n: int, in_dm: bool) -> dict[str, int]:
    array = at.host.zeros(n, "u1") if in_dm else np.zeros(n, "u1")
    depot = at.depot.using(transfer=transfer)
    before = at.host.stats()
    depot.nothing(array)
    after = at.host.stats()
    return {name: after[name] - before[name] for name in after}


@pytest.mark.parametrize(
    ("transfer", "n", "by_ref"),
    [
        ("auto", THRESHOLD - 1, False),
        ("auto", THRESHOLD, True),
        ("value", LARGE, False),
        ("ref", 1, True),
        ("copy", 1, True),
        ("ref", LARGE, True),
    ],
)
@pytest.mark.parametrize("in_dm", [False, True])
def test_transfer_and_threshold_say_which_way(
    pair: list[HostProcess], transfer: str, n: int, by_ref: bool, in_dm: bool
) -> None:
    added = pair[1].call(counted, transfer, n, in_dm)
    copied = by_ref and (transfer == "copy" or not in_dm)
    assert added["ralloc_calls"] == added["move_ref_calls"] == int(copied)
    assert added["create_ref_calls"] == int(by_ref and not copied)
    assert added["bytes_copied"] == 0


def way_of_results(at: At, transfer: str, per_client: bool) -> tuple[int, int]:
    depot = (
        at.host.connect("depot", transfer=transfer)
        if per_client
        else at.depot.using(transfer=transfer)
    )
    before = at.host.stats()
    depot.fresh(100)
    small = at.host.stats()["map_views"] - before["map_views"]
    depot.fresh(LARGE)
    large = at.host.stats()["map_views"] - before["map_views"] - small
    if per_client:
        depot.close()
    return small, large


@pytest.mark.parametrize("per_client", [True, False])
@pytest.mark.parametrize(
    ("transfer", "expected"),
    [("auto", (0, 1)), ("value", (0, 0)), ("ref", (1, 1)), ("copy", (1, 1))],
)
def test_results_go_the_way_that_the_caller_wants(
    pair: list[HostProcess], transfer: str, expected: tuple[int, int], per_client: bool
) -> None:
    assert pair[1].call(way_of_results, transfer, per_client) == expected


def isolated(at: At, sender_stores: bool) -> None:
    array = at.host.array(np.arange(LARGE))
    future = at.depot.future.keep("a", array)
    future.result()
    array[:] = -1
    kept = at.depot.kept("a")
    assert np.array_equal(kept, np.arange(LARGE))
    kept[:] = -2
    assert np.array_equal(at.depot.kept("a"), np.arange(LARGE))
    assert (array == -1).all()
    at.depot.drop()


def test_what_either_side_stores_the_other_does_not_see(pair: list[HostProcess]) -> None:
    pair[1].call(isolated, True)


def round_trip_costs(at: At, part: bool) -> dict[str, int]:
    array = at.host.array(np.arange(LARGE))
    at.depot.echo(array)
    before = at.host.stats()
    back = at.depot.first(array, 20_000) if part else at.depot.echo(array)
    after = at.host.stats()
    assert np.array_equal(back, np.arange(len(back)))
    return {name: after[name] - before[name] for name in after}


def service_costs(at: At) -> dict[str, int]:
    return at.host.stats()


@pytest.mark.parametrize("part", [False, True])
def test_returning_an_argument_or_a_slice_of_it_copies_nothing(
    pair: list[HostProcess], part: bool
) -> None:
    service, client = pair
    service_before = service.call(service_costs)
    added = client.call(round_trip_costs, part)
    after = service.call(service_costs)
    assert added["bytes_copied"] == added["ralloc_calls"] == 0
    for name in ("bytes_copied", "frames_copied", "ralloc_calls"):
        assert after[name] == service_before[name]


# ---------------------------------------------------------------- without memory


def top_up(at: At) -> None:
    """Take the frames that others gave back meanwhile."""
    with contextlib.suppress(OutOfFrames):
        while True:
            at.rest.append(at.host.ralloc(at.host.page_size, zero=False))


def without_frames(at: At) -> None:
    large = np.arange(LARGE)
    take_all_frames(at)
    assert np.array_equal(at.depot.echo(large), large)
    assert at.depot.echo(b"x" * LARGE) == b"x" * LARGE
    for transfer in ("ref", "copy"):
        for value in (large, b"x" * LARGE, [np.zeros(1), large]):
            top_up(at)
            try:
                at.depot.using(transfer=transfer).echo(value)
            except OutOfFrames:
                continue
            raise AssertionError((transfer, type(value)))
    at.rest.clear()
    gc.collect()


@pytest.mark.parametrize("transport", ["ring", "tcp"])
def test_out_of_frames_auto_goes_by_value_and_ref_says_so(fabric: Fabric, transport: str) -> None:
    service, client = fabric.host(), fabric.host()
    service.call(serve)
    client.call(connect, transport=transport)
    client.call(without_frames)
    client.call(end)


# ---------------------------------------------------------------- pickles


def pickled(at: At) -> None:
    depot = at.depot.using(serializer="pickle")
    assert depot.echo({1, 2}) == {1, 2}
    value = {
        "a": [at.host.array(np.arange(LARGE)), 1j],
        "e": np.zeros(0),
        "b": bytearray(b"x" * LARGE),
    }
    before = at.host.stats()["map_views"]
    back = depot.echo(value)
    assert at.host.stats()["map_views"] - before >= 1
    assert np.array_equal(back["a"][0], np.arange(LARGE))
    back["a"][0][:] = 0
    assert value["a"][0][1] == 1
    with pytest.raises(CannotSend):
        depot.echo(lambda: 1)
    with pytest.raises(CannotSend):
        depot.two(np.zeros(LARGE), at.host)


def test_pickles_carry_what_msgpack_cannot_with_arrays_by_ref(pair: list[HostProcess]) -> None:
    pair[1].call(pickled)


class Caller:
    """Calls a service while it is pickled, and while it is read."""

    def __init__(self, depot: Any, data: np.ndarray) -> None:
        self.depot = depot
        self.data = data

    def __reduce__(self) -> Any:
        assert self.depot.total(np.ones(LARGE)) == LARGE
        return (np.copy, (self.data,))


def pickled_with_calls_inside(at: At) -> None:
    depot = at.depot.using(serializer="pickle")
    back = depot.echo([Caller(at.depot, np.arange(LARGE)), np.ones(LARGE)])
    assert np.array_equal(back[0], np.arange(LARGE))
    assert back[1].sum() == LARGE


def test_a_pickle_may_call_services_while_it_is_made(pair: list[HostProcess]) -> None:
    pair[1].call(pickled_with_calls_inside)


def refused_pickle(at: At) -> None:
    depot = at.host.connect("shy", serializer="pickle")
    with pytest.raises(AccessDenied):
        depot.echo(np.arange(LARGE))
    with pytest.raises(AccessDenied):
        depot.echo({1})
    assert depot.using(serializer="msgpack").echo(1) == 1
    depot.close()


def serve_shy(at: At) -> None:
    end(at)
    serve(at, "shy")


def test_a_service_that_has_not_opted_in_refuses_pickles(pair: list[HostProcess]) -> None:
    pair[0].call(serve_shy)
    pair[1].call(refused_pickle)
