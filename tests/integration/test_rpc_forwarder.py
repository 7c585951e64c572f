"""The forwarder: who gets a call, what it leaves alone, who hears of a death."""

import gc
import threading
import time
from typing import Any

import numpy as np
import pytest

from dmrpc_cxl.errors import (
    DeadlineExceeded,
    InterfaceMismatch,
    Overloaded,
    PeerLost,
    ServiceNotFound,
)
from dmrpc_cxl.rpc import Forwarder
from tests.fabrics import At
from tests.rpc_services import (
    Bottom,
    Desk,
    Relay,
    Rpc,
    Typed,
    ask,
    descriptors_and_threads,
    noted,
    pause,
    stop,
    until_nothing_is_new,
)
from tests.standing import until

MIXES = [("ring", "ring"), ("tcp", "tcp"), ("ring", "tcp"), ("tcp", "ring")]
mixed = pytest.mark.parametrize(("front", "back"), MIXES)


def _counters(at: At) -> dict[str, int]:
    at.host.threshold = 32 << 10  # or it would be measured, in DM
    return dict(at.host.stats())


@mixed
def test_equals_take_turns_and_the_busy_are_spared(rpc: Rpc, front: str, back: str) -> None:
    rpc.serve(0, Desk, "one", threads=4)
    rpc.serve(1, Desk, "two", threads=4)
    process = rpc.extra_host()
    rpc.forward(2, "front", ["one", "two"], transport=back)
    desk = rpc.connect("front", transport=front)
    pids = [desk.pid() for _ in range(10)]
    assert sorted(pids.count(pid) for pid in set(pids)) == [5, 5]
    busy = desk.future.block("door")
    direct = {name: rpc.connect(name) for name in ("one", "two")}
    until(lambda: any("began door" in client.notes() for client in direct.values()))
    loaded = next(c for c in direct.values() if "began door" in c.notes())
    idle = next(c for c in direct.values() if c is not loaded)
    assert {desk.pid() for _ in range(6)} == {idle.pid()}
    loaded.open("door")
    assert busy.result() == "door"
    assert sum(process.call(ask, "front", "forwarded_to").values()) == 17


@mixed
def test_arrays_pass_and_the_forwarder_never_touches_dm(rpc: Rpc, front: str, back: str) -> None:
    rpc.serve(0, Desk, "desk")
    process = rpc.extra_host()
    rpc.forward(2, "front", ["desk"], transport=back)
    before = process.call(_counters)
    for transfer in ("ref", "value", "copy", "auto"):
        desk = rpc.connect("front", transport=front, transfer=transfer)
        for n in (1, 1000, 300_000):
            np.testing.assert_array_equal(desk.double(np.arange(n)), np.arange(n) * 2)
    after = process.call(_counters)
    assert after == before


def test_what_is_no_msgpack_passes_as_it_is(rpc: Rpc, transport: str) -> None:
    """The backend objects to the body, not the forwarder; other calls are not harmed."""
    rpc.serve(0, Desk, "desk")
    process = rpc.extra_host()
    rpc.forward(2, "front", ["desk"])
    desk = rpc.connect("front", transport=transport)
    caller = desk.echo
    assert caller(1) == 1
    original = caller.link.marshaller.plain
    caller.link.marshaller.plain = lambda *_: b"\xc1\xc1\xc1"
    with pytest.raises(Exception, match="cannot be read"):
        caller(1)
    caller.link.marshaller.plain = original
    assert caller(2) == 2
    assert process.call(ask, "front", "nr_forwarded") == 3


@mixed
def test_a_killed_backend_fails_its_calls_alone_and_comes_back(
    rpc: Rpc, front: str, back: str
) -> None:
    rpc.serve(0, Desk, "one", threads=4)
    process = rpc.extra_host()
    rpc.serve(2, Desk, "two", threads=4)
    rpc.forward(1, "front", ["one", "two"], transport=back)
    desk = rpc.connect("front", transport=front)
    direct = {name: rpc.connect(name) for name in ("one", "two")}
    futures = [desk.future.block("door"), desk.future.block("door")]
    for client in direct.values():
        noted(client, "began door")
    process.kill()
    until(lambda: any(future.done() for future in futures))
    lost, kept = sorted(futures, key=lambda future: not future.done())
    with pytest.raises(PeerLost, match="backend two"):
        lost.result()
    assert not kept.done()
    direct["one"].open("door")
    assert kept.result() == "door"
    assert {desk.pid() for _ in range(4)} == {direct["one"].pid()}
    rpc.extra_host()
    until(lambda: not _is_published(rpc, "two"))
    rpc.serve(3, Desk, "two", threads=4)
    until(lambda: len({desk.pid() for _ in range(2)}) == 2)


def _is_published(rpc: Rpc, name: str) -> bool:
    try:
        rpc.host.lookup(name)
    except ServiceNotFound:
        return False
    return True


def test_a_backend_that_hangs_when_it_is_tried_again_stops_nobody(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "one")
    process = rpc.extra_host()
    rpc.serve(2, Desk, "two")
    rpc.forward(1, "front", ["one", "two"], transport=transport)
    desk = rpc.connect("front", timeout=20)
    desk.pid()
    process.call(stop, "two")
    successor = rpc.extra_host()
    rpc.serve(3, Desk, "two-inside")
    go_on = pause(successor.pid)
    try:
        # Under the name stands what accepts connections, and never answers.
        endpoint = rpc.host.lookup("two-inside")["endpoint"]
        rpc.host.publish("two", endpoint)
        begin = time.monotonic()
        while time.monotonic() - begin < 0.5:
            asked = time.monotonic()
            desk.pid()
            assert time.monotonic() - asked < 2
    finally:
        go_on()
    rpc.host.withdraw("two")


def test_a_backend_that_stops_in_order_loses_no_call(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "one")
    rpc.forward(1, "front", ["one"], transport=transport)
    desk = rpc.connect("front", transport=transport)
    pids = {desk.pid()}
    for where in (2, 3):
        rpc.extra_host()
        rpc.hosts[0 if where == 2 else where - 1].call(stop, "one")
        rpc.serve(where, Desk, "one")

        def pid() -> int | None:
            try:
                return int(desk.pid())
            except PeerLost:
                return None

        until(lambda: pid() not in (None, *pids))
        pids.add(desk.pid())
    assert len(pids) == 3


@mixed
def test_cancel_and_deadlines_pass_through(rpc: Rpc, front: str, back: str) -> None:
    rpc.serve(0, Bottom, "bottom")
    rpc.serve(0, Relay, "relay", "bottom", back)
    rpc.serve(0, Desk, "desk")
    rpc.forward(1, "front", ["desk"], transport=back)
    rpc.forward(1, "front-relay", ["relay"], transport=back)
    left = rpc.connect("front-relay", transport=front, timeout=9).times_left()
    assert 9 >= left[0] > left[1] > 5
    desk = rpc.connect("front", transport=front)
    future = desk.future.patient("one")
    noted(desk, "began one")
    future.cancel()
    noted(desk, "CallCancelled one")
    with pytest.raises(DeadlineExceeded):
        desk.using(timeout=0.1).patient("two")
    until(lambda: any(n.endswith(" two") and n != "began two" for n in desk.notes()))


@pytest.mark.parametrize("length", [1, 2, 3])
@mixed
def test_replies_to_clients_that_are_gone_give_their_frames_back(
    rpc: Rpc, front: str, back: str, length: int
) -> None:
    """Cancelled, dropped, closed, and replies that lie unread in the ring of a client that dies."""
    rpc.serve(0, Desk, "desk", threads=8)
    name = "desk"
    for i in range(length):
        rpc.forward(1, f"front{i}", [name], transport=back if i == 0 else front)
        name = f"front{i}"
    direct = rpc.connect("desk")
    desk = rpc.connect(name, transport=front, transfer="ref")
    dropped = desk.future.array_after("dropped", 20_000)
    closing = rpc.connect(name, transport=front, transfer="ref")
    closed = closing.future.array_after("closed", 20_000)
    process = rpc.extra_host()
    process.call(_leave_replies_unread, name, front)
    for key in ("dropped", "closed", "unread"):
        noted(direct, f"began {key}")
    direct.open("unread")
    until(lambda: rpc.hosts[0].call(ask, "desk", "_nr_served") and _settled(rpc))
    process.kill()
    del dropped
    gc.collect()
    closing.close()
    with pytest.raises(PeerLost):
        closed.result()
    # One that was sent before the server heard of it would lie in the idle client's ring until that calls again.
    until(lambda: rpc.hosts[0].call(ask, "desk", "counts").get("cancelled", 0) >= 2)
    direct.open("dropped")
    direct.open("closed")
    until(lambda: rpc.fabric.audit()["live_refs"] == 0, 20)


def _settled(rpc: Rpc) -> bool:
    return int(rpc.fabric.audit()["live_refs"]) > 0


def _leave_replies_unread(at: At, name: str, transport: str) -> None:
    at.client = at.host.connect(name, transport=transport, transfer="ref")
    at.future = at.client.future.array_after("unread", 20_000)


def test_limits_and_mismatches_are_reported(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk", threads=4)
    rpc.serve(0, Typed, "typed")
    before = descriptors_and_threads()
    with pytest.raises(InterfaceMismatch, match="other methods"):
        Forwarder(rpc.host, "front", ["desk", "typed"])
    with pytest.raises(ServiceNotFound):
        Forwarder(rpc.host, "front", ["nobody"])
    until_nothing_is_new(before)
    with Forwarder(rpc.host, "front", ["desk", "nobody"], max_outstanding=2):
        desk = rpc.connect("front", transport=transport)
        futures = [desk.future.block("door") for _ in range(3)]
        with pytest.raises(Overloaded):
            futures[2].result()
        rpc.connect("desk").open("door")
        assert [future.result() for future in futures[:2]] == ["door", "door"]
        desk.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("front")]


def test_many_calls_through_two_backends_come_back_right(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "one")
    rpc.serve(1, Desk, "two")
    rpc.forward(1, "front", ["one", "two"], transport=transport)
    clients: list[Any] = [rpc.connect("front", transport=transport) for _ in range(3)]
    futures = [(i, client.future.echo(i)) for i in range(1000) for client in clients]
    for i, future in futures:
        assert future.result() == i
