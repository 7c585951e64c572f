"""Threads, queues, connections: what servers take at once, and who waits for whom."""

import time
from typing import Any

import pytest

from dmrpc_cxl.errors import DmError, LocalProtocolError, Overloaded, PeerLost, ServiceNotFound
from tests.rpc_services import Desk, Relay, Rpc, ask, noted
from tests.standing import until


def _open(at: Any, name: str, keys: list[str]) -> None:
    for key in keys:
        at.servers[name].service.open(key)


def _notes(at: Any, name: str) -> list[str]:
    return list(at.servers[name].service.notes())


def test_calls_beyond_threads_and_queue_are_refused_at_once(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk", threads=2, queue=3)
    desk = rpc.connect("desk", transport=transport)
    futures = [desk.future.block("a"), desk.future.block("b")]
    until(lambda: {"began a", "began b"} <= set(rpc.hosts[0].call(_notes, "desk")))
    begin = time.monotonic()
    futures += [desk.future.block("a") for _ in range(10)]
    until(lambda: sum(future.done() for future in futures) == 7)
    assert time.monotonic() - begin < 5
    with pytest.raises(Overloaded, match="2 calls at once and has 3 waiting"):
        futures[11].result()
    assert [future.done() for future in futures[:5]] == [False] * 5
    rpc.hosts[0].call(_open, "desk", ["a", "b"])
    assert [future.result() for future in futures[:5]] == ["a", "b", "a", "a", "a"]
    assert rpc.hosts[0].call(ask, "desk", "counts")["overloaded"] == 7


def test_without_a_queue_as_many_calls_run_as_there_are_threads(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk", threads=4, queue=0)
    desk = rpc.connect("desk", transport=transport)
    futures = [desk.future.block(f"{i}") for i in range(4)]
    until(lambda: len(rpc.hosts[0].call(_notes, "desk")) == 4)
    extra = desk.future.echo(1)
    with pytest.raises(Overloaded):
        extra.result()
    rpc.hosts[0].call(_open, "desk", [f"{i}" for i in range(4)])
    assert [future.result() for future in futures] == ["0", "1", "2", "3"]


def test_quick_calls_wait_their_turn_instead_of_being_refused(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk", threads=1, queue=1)
    desk, other = (rpc.connect("desk", transport=transport) for _ in range(2))
    futures = [client.future.echo(i) for i in range(1500) for client in (desk, other)]
    for i, future in enumerate(futures):
        assert future.result() == i // 2


def test_a_long_call_does_not_hold_up_those_behind_it(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk", threads=2)
    desk, other = (rpc.connect("desk", transport=transport, timeout=20) for _ in range(2))
    future = desk.future.block("door")
    assert desk.echo(1) == 1  # on the same connection
    assert other.echo(2) == 2  # on another one
    assert not future.done()
    desk.open("door")
    assert future.result() == "door"


def test_a_busy_connection_does_not_starve_another(rpc: Rpc, transport: str) -> None:
    """One thread, and a client that always has more."""
    rpc.serve(0, Desk, "desk", threads=1)
    desk, other = (rpc.connect("desk", transport=transport, timeout=30) for _ in range(2))
    futures = [desk.future.echo(i) for i in range(6000)]
    assert other.echo("short") == "short"
    assert not futures[-1]._pending.done
    assert futures[-1].result() == 5999


def test_connections_beyond_the_limit_are_refused(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk", max_connections=2)
    clients = [rpc.connect("desk", transport=transport) for _ in range(2)]
    with pytest.raises(DmError, match="2 connections already"):
        rpc.connect("desk", transport=transport)
    assert [client.echo(1) for client in clients] == [1, 1]
    clients[0].close()
    until(lambda: _connects(rpc, transport))
    assert clients[1].echo(2) == 2


def _connects(rpc: Rpc, transport: str) -> bool:
    try:
        rpc.host.connect("desk", transport=transport).close()
    except PeerLost:
        return False
    return True


def test_services_may_call_each_other_in_circles(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Relay, "a", "b", transport, threads=3)
    rpc.serve(1, Relay, "b", "a", transport, threads=3)
    client = rpc.connect("a", transport=transport, timeout=20)
    assert client.down(4) == 4
    futures = [client.future.down(1) for _ in range(50)]
    assert [future.result() for future in futures] == [1] * 50


def test_messages_beyond_the_limit_harm_nobody_else(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk", max_frame=1 << 20)
    desk = rpc.connect("desk", transport=transport, transfer="value")
    future = desk.future.block("door")
    with pytest.raises(LocalProtocolError, match="takes at most 1048576"):
        desk.echo(b"x" * (2 << 20))
    with pytest.raises(DmError, match="sends at most 1048576"):
        desk.big(2 << 20)
    with pytest.raises(DmError, match="sends at most 1048576"):
        desk.numbers(1 << 20)
    noted(desk, "began door")
    desk.open("door")
    assert future.result() == "door"


def test_a_slow_reader_gets_all_its_replies(rpc: Rpc, transport: str) -> None:
    """More than rings and sockets hold, read only once everything was sent."""
    rpc.serve(0, Desk, "desk", threads=2)
    desk = rpc.connect("desk", transport=transport, transfer="value")
    futures = [desk.future.big(1_000_000) for _ in range(16)]
    other = rpc.connect("desk", transport=transport)
    until(lambda: rpc.hosts[0].call(ask, "desk", "_nr_served") >= 16)
    assert other.echo(1) == 1
    assert all(len(future.result()) == 1_000_000 for future in futures)


def test_services_that_are_not_there_are_not_found(rpc: Rpc, transport: str) -> None:
    with pytest.raises(ServiceNotFound):
        rpc.connect("nowhere", transport=transport)
