"""Forwarders that take turns strictly, and those that somebody decides for: who gets a call, and whose its Refs are."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from dmrpc_cxl.errors import (
    AccessDenied,
    Overloaded,
    PeerLost,
    RemoteError,
    UnknownMethod,
    WrongArguments,
)
from dmrpc_cxl.rpc import Forwarder, Passing
from tests.rpc_services import Desk, Rpc, ask, noted
from tests.standing import until

MIXES = [("ring", "ring"), ("tcp", "tcp"), ("ring", "tcp"), ("tcp", "ring")]
mixed = pytest.mark.parametrize(("front", "back"), MIXES)
KEPT = 5 << 20  # bytes, more than a ring or the buffers of a socket hold


class Letter(msgspec.Struct, array_like=True):
    """What the route reads."""

    to: str
    note: str


class Parcel(Letter, array_like=True):
    """What is sent."""

    content: np.ndarray | None = None  # type: ignore[type-arg]


class Office:
    """A service that tells its name with what it gets."""

    def __init__(self, name: str) -> None:
        self._name = name

    def take(self, parcel: Parcel) -> tuple[str, int]:
        return self._name, 0 if parcel.content is None else int(parcel.content.sum())

    def nothing(self) -> str:
        return self._name


class Unwanted(PermissionError):
    pass


def by_address(passing: Passing) -> str | None:
    """Send parcels where they are addressed to, if they are wanted."""
    if passing.method != "take":
        return None
    letter = passing.first(Letter)
    if letter.note == "forbidden":
        raise Unwanted(f"nothing for {letter.to}")
    if letter.note == "overloaded":
        raise Overloaded("not now")
    if letter.note == "denied":
        raise AccessDenied("not you")
    return letter.to or None


def by_metadata(passing: Passing) -> str:
    assert passing.time_left is not None
    return passing.metadata["to"]


def sort_of(passing: Passing) -> str:
    return str(passing.first(int))


def offices(rpc: Rpc, back: str, route: Any, **options: Any) -> None:
    rpc.serve(0, Office, "one", "one")
    rpc.serve(1, Office, "two", "two")
    rpc.extra_host()
    rpc.forward(2, "front", ["one", "two"], route=route, transport=back, **options)


# ---------------------------------------------------------------- in turn


@mixed
def test_in_turn_means_also_when_one_is_busy(rpc: Rpc, front: str, back: str) -> None:
    rpc.serve(0, Desk, "one", threads=8)
    rpc.serve(1, Desk, "two", threads=8)
    process = rpc.extra_host()
    rpc.forward(2, "front", ["one", "two"], transport=back, policy="round-robin")
    desk = rpc.connect("front", transport=front)
    busy = [desk.future.block("door"), *(desk.future.pid() for _ in range(5))]
    pids = [future.result() for future in busy[1:]]
    assert pids[0] == pids[2] == pids[4] != pids[1] == pids[3]
    for name in ("one", "two"):
        rpc.connect(name).open("door")
    assert busy[0].result() == "door"
    assert process.call(ask, "front", "forwarded_to") == {"one": 3, "two": 3}


def test_a_policy_that_does_not_exist_is_refused(rpc: Rpc) -> None:
    with pytest.raises(ValueError, match="round-robin"):
        Forwarder(rpc.host, "front", ["one"], policy="random")  # type: ignore[arg-type]


# ---------------------------------------------------------------- a function decides


@mixed
def test_a_call_goes_where_the_route_says_and_its_array_with_it(
    rpc: Rpc, front: str, back: str
) -> None:
    offices(rpc, back, by_address)
    for transfer in ("ref", "value", "auto"):
        office = rpc.connect("front", transport=front, transfer=transfer)
        for n in (1, 1000, KEPT):
            content = np.ones(n, "u1")
            assert office.take(Parcel("two", "", content)) == ["two", n]
            assert office.take(Parcel("one", "", content)) == ["one", n]
        names = [office.take(Parcel("", "by policy"))[0] for _ in range(4)]
        assert sorted(names) == ["one", "one", "two", "two"]
        assert office.nothing() in ("one", "two")


def test_a_route_is_not_given_what_travels_outside_of_the_message(rpc: Rpc) -> None:
    """The forwarder's process touches no DM, and takes no Ref, whatever it decides."""
    offices(rpc, "auto", by_address)
    process = rpc.hosts[2]
    before = process.call(stats)
    office = rpc.connect("front", transfer="ref")
    for note in ("", "forbidden", ""):
        try:
            office.take(Parcel("two", note, np.ones(KEPT, "u1")))
        except PermissionError:
            assert note == "forbidden"
    assert process.call(stats) == before


def stats(at: Any) -> dict[str, int]:
    at.host.threshold = 32 << 10  # or it would be measured, in DM
    return dict(at.host.stats())


@mixed
def test_what_the_route_raises_is_the_callers_and_so_are_the_refs(
    rpc: Rpc, front: str, back: str
) -> None:
    offices(rpc, back, by_address)
    office = rpc.connect("front", transport=front, transfer="ref")
    array = rpc.host.array(np.full(KEPT, 3, "u1"))
    with pytest.raises(RemoteError, match="nothing for two") as caught:
        office.take(Parcel("two", "forbidden", array))
    assert isinstance(caught.value, PermissionError)
    assert caught.value.remote_type == f"{__name__}.Unwanted"
    until(lambda: rpc.fabric.audit()["live_refs"] == 0)
    assert rpc.fabric.audit()["in_use"] == -(-KEPT // 4096)  # our own, with one holder each
    assert office.take(Parcel("two", "", array)) == ["two", 3 * KEPT]
    del array, caught


@mixed
def test_pictures_by_value_that_are_refused_do_not_harm_those_behind_them(
    rpc: Rpc, front: str, back: str
) -> None:
    offices(rpc, back, by_address)
    office = rpc.connect("front", transport=front, transfer="value")
    notes = ["", "forbidden", "", "", "forbidden", "forbidden", ""]
    content = np.ones(KEPT, "u1")
    futures = [office.future.take(Parcel("two", note, content)) for note in notes]
    for note, future in zip(notes, futures, strict=True):
        if note:
            assert isinstance(future.exception(), PermissionError)
        else:
            assert future.result() == ["two", KEPT]


def test_errors_of_the_library_arrive_as_what_they_are(rpc: Rpc) -> None:
    offices(rpc, "auto", by_address)
    office = rpc.connect("front")
    with pytest.raises(Overloaded):
        office.take(Parcel("two", "overloaded"))
    with pytest.raises(AccessDenied):
        office.take(Parcel("two", "denied"))
    with pytest.raises(WrongArguments, match=r"take: .*\$\[1\]"):
        office.take(["two", 5])
    with pytest.raises(RemoteError, match="no backend 'three'") as caught:
        office.take(Parcel("three", ""))
    assert isinstance(caught.value, LookupError)
    assert office.take(Parcel("two", "")) == ["two", 0]


def test_a_route_sees_metadata_and_the_time_that_is_left(rpc: Rpc) -> None:
    offices(rpc, "auto", by_metadata)
    for name in ("one", "two"):
        assert rpc.connect("front", metadata={"to": name}).nothing() == name
    with pytest.raises(RemoteError) as caught:
        rpc.connect("front").nothing()
    assert isinstance(caught.value, KeyError)


def test_pickled_and_missing_arguments_are_not_read_on_the_way(rpc: Rpc) -> None:
    rpc.serve(0, Desk, "7")
    rpc.extra_host()
    rpc.forward(2, "front", ["7"], route=sort_of)
    desk = rpc.connect("front")
    assert desk.echo(7) == 7
    with pytest.raises(WrongArguments, match="pickled"):
        desk.using(serializer="pickle").echo(7)
    with pytest.raises(WrongArguments, match="without arguments"):
        desk.pid()
    with pytest.raises(UnknownMethod):
        desk.absent()


def test_a_backend_that_is_asked_for_and_gone_is_told_of(rpc: Rpc) -> None:
    rpc.serve(0, Office, "one", "one")
    process = rpc.extra_host()
    rpc.serve(2, Office, "two", "two")
    rpc.forward(1, "front", ["one", "two"], route=by_address)
    office = rpc.connect("front")
    assert office.take(Parcel("two", "")) == ["two", 0]
    process.kill()
    until(lambda: _is_lost(office))
    assert office.take(Parcel("one", "")) == ["one", 0]


def _is_lost(office: Any) -> bool:
    try:
        office.take(Parcel("two", ""))
    except PeerLost as error:
        return "backend two" in str(error)
    return False


def test_calls_that_a_route_passes_on_are_cancelled_as_others(rpc: Rpc) -> None:
    rpc.serve(0, Desk, "desk")
    rpc.extra_host()
    rpc.forward(2, "front", ["desk"], route=nowhere_else)
    desk = rpc.connect("front")
    future = desk.future.patient("cancelled")
    noted(desk, "began cancelled")
    assert future.cancel()
    noted(desk, "CallCancelled cancelled")


def nowhere_else(passing: Passing) -> str:
    return "desk"
