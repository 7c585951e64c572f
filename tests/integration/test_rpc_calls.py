"""Calls: typed methods; synchronous, futures, asyncio; many at once."""

import asyncio
import concurrent.futures
import gc
import threading
from typing import Any

import numpy as np
import pytest

from dmrpc_cxl.errors import CallCancelled, InterfaceMismatch, RemoteError
from tests.rpc_services import Desk, Line, Point, Rpc, Typed, noted
from tests.standing import until


def test_methods_take_and_return_what_their_annotations_say(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Typed, "typed")
    typed: Typed = rpc.connect("typed", Typed, transport=transport)
    assert typed.add(1) == 111
    assert typed.add(1, 2) == 103
    assert typed.add(1, c=5, b=4) == 10
    assert typed.add(a=1, b=2, c=3) == 6
    assert typed.add(1, c=5) == 16  # the class that the client was given says what b is
    assert typed.middle(Line(Point(0, 0), Point(2, 4), {"a": [1, 2]})) == Point(1, 2)
    assert typed.sort({"row": [Point(3), Point(1)]}) == {"row": [Point(1), Point(3)]}
    assert typed.nothing() is None
    assert typed.later(1) == 2  # type: ignore[comparison-overlap]
    assert typed.loose({"a": [1, 2.5, None, "x", b"y"]}) == {"a": [1, 2.5, None, "x", b"y"]}
    with pytest.raises(InterfaceMismatch, match=r"typed\.wrong: its result"):
        typed.wrong()


def test_a_client_without_the_class_gets_plain_values(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Typed, "typed")
    typed = rpc.connect("typed", transport=transport)
    assert typed.add(1, 2) == 103
    assert typed.middle({"begin": {"x": 0.0}, "end": {"x": 2.0}}) == {"x": 1.0, "y": 0.0}
    assert typed.wrong() == "no number"
    assert {"add", "middle", "later"} <= set(dir(typed))


def test_sync_future_and_asyncio_share_a_client(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Typed, "typed")
    typed: Any = rpc.connect("typed", Typed, transport=transport)
    future = typed.future.add(1)

    async def together() -> list[int]:
        async with typed.aio as aio:
            return list(await asyncio.gather(*(aio.add(i) for i in range(500))))

    assert asyncio.run(together()) == [i + 110 for i in range(500)]
    assert typed.add(2) == 112
    assert future.result() == 111
    assert future.done()


def test_one_client_serves_many_threads(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk", threads=4)
    desk = rpc.connect("desk", transport=transport)

    def work(who: int) -> list[list[int]]:
        return [desk.echo([who, i]) for i in range(200)]

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        for who, got in enumerate(pool.map(work, range(12))):
            assert got == [[who, i] for i in range(200)]


def test_thousands_of_futures_interleaved_with_calls_that_wait(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk", threads=2)
    desk = rpc.connect("desk", transport=transport)
    futures = []
    for i in range(4000):
        futures.append(desk.future.echo(i))
        if i % 100 == 0:
            assert desk.echo(-i) == -i
    for i in [*range(1, 4000, 2), *reversed(range(0, 4000, 2))]:
        assert futures[i].result() == i


def test_large_pipelined_arguments_and_results_pass_each_other(rpc: Rpc, transport: str) -> None:
    """More is under way in both directions than rings and sockets hold."""
    rpc.serve(0, Desk, "desk", threads=2)
    desk = rpc.connect("desk", transport=transport, transfer="value")
    value = b"v" * 300_000
    futures = [desk.future.echo(value) for _ in range(100)]
    assert all(future.result() == value for future in reversed(futures))


def test_a_future_says_done_without_waiting(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk", threads=2)
    desk = rpc.connect("desk", transport=transport)
    future = desk.future.block("door")
    noted(desk, "began door")
    assert not future.done()
    with pytest.raises(TimeoutError):
        future.result(timeout=0.01)
    desk.open("door")
    until(future.done)
    assert future.result(timeout=0) == "door"


def test_a_future_that_is_dropped_or_cancelled_ends_at_the_server(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk", threads=3)
    desk = rpc.connect("desk", transport=transport)
    dropped, cancelled = desk.future.patient("dropped"), desk.future.patient("cancelled")
    noted(desk, "began dropped")
    noted(desk, "began cancelled")
    assert cancelled.cancel()
    del dropped
    gc.collect()
    noted(desk, "CallCancelled dropped")
    noted(desk, "CallCancelled cancelled")
    with pytest.raises(CallCancelled):
        cancelled.result()
    assert not cancelled.cancel()
    assert desk.echo(1) == 1


def test_cancel_wakes_the_thread_that_waits_though_the_server_does_not_answer(
    rpc: Rpc, transport: str
) -> None:
    rpc.serve(0, Desk, "desk", threads=2)
    desk = rpc.connect("desk", transport=transport, timeout=None)
    future = desk.future.block("door")
    noted(desk, "began door")
    outcome: list[BaseException | None] = []
    waiter = threading.Thread(target=lambda: outcome.append(future.exception()))
    waiter.start()
    until(lambda: future._pending.connection.read_lock.locked())
    future.cancel()
    waiter.join(20)
    assert isinstance(outcome[0], CallCancelled)
    desk.open("door")


def test_results_that_nobody_waits_for_give_their_frames_back(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk", threads=4)
    desk = rpc.connect("desk", transport=transport, transfer="ref")
    futures = [desk.future.array_after(f"{i}", 20_000) for i in range(3)]
    for i in range(3):
        noted(desk, f"began {i}")
    del futures
    gc.collect()
    for i in range(3):
        desk.open(f"{i}")
    np.testing.assert_array_equal(desk.double(np.arange(20_000)), np.arange(20_000) * 2)


def test_remote_failures_reach_each_kind_of_caller(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk")
    desk = rpc.connect("desk", transport=transport)

    async def failing() -> None:
        async with desk.aio as aio:
            await aio.raises("asyncio")

    with pytest.raises(ValueError, match="asyncio"):
        asyncio.run(failing())
    error = desk.future.raises("future").exception()
    assert isinstance(error, RemoteError)
    assert isinstance(error, ValueError)


class Reserved:
    def close(self) -> None: ...


class KeywordOnly:
    def method(self, *, a: int) -> None: ...


class Nothing:
    def _hidden(self) -> None: ...


@pytest.mark.parametrize("service", [Reserved(), KeywordOnly(), Nothing()])
def test_what_cannot_be_served_is_refused_and_leaves_nothing(rpc: Rpc, service: object) -> None:
    with pytest.raises(TypeError):
        rpc.host.serve(service, name="no")
