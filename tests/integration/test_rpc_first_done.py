"""first_done(): of several calls, the one that ends first; and what clients count of their traffic."""

from __future__ import annotations

import concurrent.futures
import threading
from typing import Any

import numpy as np
import pytest

from dmrpc_cxl.errors import CallCancelled, DeadlineExceeded, PeerLost
from dmrpc_cxl.rpc import first_done
from tests.fabrics import At
from tests.rpc_services import Desk, Rpc, noted
from tests.standing import until


def test_the_first_to_end_is_returned_whichever_was_sent_first(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk", threads=4)
    desk = rpc.connect("desk", transport=transport)
    blocked = [desk.future.block(key) for key in ("a", "b")]
    quick = desk.future.echo(5)
    assert first_done([*blocked, quick]) is quick
    desk.open("b")
    assert first_done(blocked) is blocked[1]
    assert first_done(blocked[1:]).result() == "b"
    desk.open("a")
    assert first_done(blocked[:1]).result() == "a"


def test_of_those_that_have_ended_the_first_in_the_list_is_returned(rpc: Rpc) -> None:
    rpc.serve(0, Desk, "desk")
    desk = rpc.connect("desk")
    futures = [desk.future.echo(i) for i in range(5)]
    for future in futures:
        future.result()
    assert first_done(futures) is futures[0]


def test_waiting_ends_with_the_time_given_and_the_calls_go_on(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk", threads=4)
    desk = rpc.connect("desk", transport=transport)
    futures = [desk.future.block(key) for key in ("a", "b")]
    with pytest.raises(concurrent.futures.TimeoutError):
        first_done(futures, timeout=0.01)
    for key in ("a", "b"):
        desk.open(key)
    assert [future.result() for future in futures] == ["a", "b"]


def test_a_call_whose_own_time_is_over_has_ended(rpc: Rpc) -> None:
    rpc.serve(0, Desk, "desk", threads=4)
    desk = rpc.connect("desk")
    patient = desk.future.block("a")
    hasty = desk.using(timeout=0.05).future.patient("b")
    assert first_done([patient, hasty]) is hasty
    assert isinstance(hasty.exception(), DeadlineExceeded)
    desk.open("a")
    assert patient.result() == "a"


def test_calls_of_two_clients_or_none_are_refused(rpc: Rpc) -> None:
    rpc.serve(0, Desk, "one", threads=4)
    rpc.serve(0, Desk, "two", threads=4)
    one, two = rpc.connect("one"), rpc.connect("two")
    futures = [one.future.block("a"), two.future.block("a")]
    with pytest.raises(ValueError, match="one client"):
        first_done(futures)
    with pytest.raises(ValueError, match="at least one"):
        first_done([])
    for client, future in zip((one, two), futures, strict=True):
        client.open("a")
        assert future.result() == "a"


def test_a_service_that_dies_ends_the_wait(rpc: Rpc, transport: str) -> None:
    process = rpc.extra_host()
    rpc.serve(2, Desk, "desk", threads=4)
    desk = rpc.connect("desk", transport=transport)
    futures = [desk.future.block(key) for key in ("a", "b")]
    noted(desk, "began b")
    process.kill()
    assert isinstance(first_done(futures).exception(), PeerLost)
    assert isinstance(futures[1].exception(), PeerLost)


def test_threads_may_wait_for_calls_of_one_client_side_by_side(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk", threads=8)
    desk = rpc.connect("desk", transport=transport)
    futures = {key: desk.future.block(key) for key in "abcdef"}
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda keys=keys: found.append(first_done([futures[k] for k in keys])))
        for keys in ("ab", "cd", "ef")
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    for key in "fdb":
        desk.open(key)
    for thread in threads:
        thread.join(60)
    assert {id(future) for future in found} == {id(futures[key]) for key in "bdf"}
    for key in "ace":
        desk.open(key)
        assert futures[key].result() == key


def serve_waiter(at: At) -> None:
    desk: Any = at.host.connect("desk", timeout=None)

    class Nested:
        def first(self) -> str:
            futures = [desk.future.block("never"), desk.future.block("soon")]
            done = first_done(futures)
            return str(done.result())

    at.servers = {"nested": at.host.serve(Nested(), name="nested")}
    at.desk = desk


def test_a_call_that_waits_for_the_first_of_others_ends_with_its_caller(rpc: Rpc) -> None:
    rpc.serve(0, Desk, "desk", threads=8)
    rpc.hosts[1].call(serve_waiter)
    desk, nested = rpc.connect("desk"), rpc.connect("nested")
    future = nested.future.first()
    noted(desk, "began soon")
    assert future.cancel()
    assert isinstance(future.exception(), CallCancelled)
    again = nested.future.first()
    desk.open("soon")
    assert again.result() == "soon"
    desk.open("never")
    rpc.hosts[1].call(close_desk)


def close_desk(at: At) -> None:
    at.desk.close()


# ---------------------------------------------------------------- traffic


def test_traffic_counts_every_byte_of_messages_also_of_connections_that_ended(
    rpc: Rpc, transport: str
) -> None:
    process = rpc.extra_host()
    rpc.serve(2, Desk, "desk")
    desk = rpc.connect("desk", transport=transport, transfer="value")
    assert desk.traffic == (0, 0)
    n = 1 << 20
    assert desk.double(np.ones(n, "u1")).sum() == 2 * n
    sent, received = desk.traffic
    assert n < sent < n + 500
    assert n < received < n + 500
    process.kill()
    until(lambda: not rpc.host.services("desk"))
    rpc.extra_host()
    rpc.serve(3, Desk, "desk")
    assert desk.double(np.ones(n, "u1")).sum() == 2 * n
    again = desk.traffic
    assert (again[0] - sent, again[1] - received) == (sent, received)
    desk.close()
    assert desk.traffic == again


def test_by_ref_an_array_is_no_traffic(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk")
    desk = rpc.connect("desk", transport=transport, transfer="ref")
    assert desk.double(np.ones(1 << 20, "u1"))[0] == 2
    assert all(nbytes < 500 for nbytes in desk.traffic)
