"""Deadlines and cancellation: they reach the server, and what it calls in turn."""

import asyncio
import time
from typing import Any

import pytest

from dmrpc_cxl.errors import CallCancelled, DeadlineExceeded
from tests.rpc_services import Bottom, Desk, Relay, Rpc, ask, noted, pause
from tests.standing import until


def test_a_call_has_its_own_deadline_or_the_clients_or_none(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk")
    desk = rpc.connect("desk", transport=transport)
    assert 29 < desk.time_left() <= 30
    assert 6 < desk.using(timeout=7).time_left() <= 7
    assert desk.using(timeout=None).time_left() is None
    with pytest.raises(ValueError, match="timeout"):
        desk.using(timeout=0)


def test_a_deadline_shrinks_along_nested_calls(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Bottom, "c")
    rpc.serve(1, Relay, "b", "c", transport)
    rpc.serve(0, Relay, "a", "b", transport)
    client = rpc.connect("a", transport=transport)
    left = client.using(timeout=20).times_left()
    assert 20 >= left[0] > left[1] > left[2] > 10
    left = client.using(timeout=None).times_left()
    assert left[0] is None
    assert 50 >= left[1] > left[2] > 40  # the relays' own


def test_deadlines_are_kept_though_the_server_hangs(rpc: Rpc, transport: str) -> None:
    process = rpc.extra_host()
    rpc.serve(2, Desk, "hanging")
    desk = rpc.connect("hanging", transport=transport)
    assert desk.echo(1) == 1
    go_on = pause(process.pid)
    try:
        begin = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"hanging\.echo"):
            desk.using(timeout=0.2).echo(1)
        future = desk.using(timeout=0.2).future.echo(b"x" * 100_000)
        with pytest.raises(DeadlineExceeded):
            future.result(timeout=50)

        async def waiting() -> None:
            async with desk.using(timeout=0.2).aio as aio:
                await aio.echo(1)

        with pytest.raises(DeadlineExceeded):
            asyncio.run(waiting())
        assert 0.6 <= time.monotonic() - begin < 10
    finally:
        go_on()
    assert desk.echo(2) == 2


def test_what_a_hanging_server_does_not_read_blocks_nobody_beyond_the_deadline(
    rpc: Rpc, transport: str
) -> None:
    """The way to the server is full; other calls' deadlines, done() and cancel() do not wait for it."""
    process = rpc.extra_host()
    rpc.serve(2, Desk, "hanging")
    desk = rpc.connect("hanging", transport=transport, transfer="value", timeout=1.0)
    assert desk.echo(1) == 1
    go_on = pause(process.pid)
    try:
        begin = time.monotonic()
        small = desk.future.echo(1)
        with pytest.raises(DeadlineExceeded):
            desk.echo(b"x" * (32 << 20))
        assert 0.9 < time.monotonic() - begin < 10
        begin = time.monotonic()
        until(small.done)
        small.cancel()
        assert time.monotonic() - begin < 0.9
    finally:
        go_on()
    assert desk.using(timeout=20).echo(b"y" * 100) == b"y" * 100


def test_a_call_that_comes_too_late_does_not_run(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk", threads=2)
    desk, other = (rpc.connect("desk", transport=transport) for _ in range(2))
    door = other.future.block("door")
    window = other.future.block("window")
    until(lambda: {"began door", "began window"} <= set(rpc.hosts[0].call(_notes, "desk")))
    with pytest.raises(DeadlineExceeded):
        desk.using(timeout=0.1).note("too late")
    until(lambda: rpc.hosts[0].call(ask, "desk", "counts").get("failed"))  # the server knows, too
    rpc.hosts[0].call(_open, "desk", ["door", "window"])
    assert (door.result(), window.result()) == ("door", "window")
    assert "too late" not in desk.notes()


def test_a_server_that_was_stopped_does_not_run_what_was_given_up(rpc: Rpc, transport: str) -> None:
    process = rpc.extra_host()
    rpc.serve(2, Desk, "hanging")
    desk = rpc.connect("hanging", transport=transport)
    go_on = pause(process.pid)
    try:
        with pytest.raises(DeadlineExceeded):
            desk.using(timeout=0.1).note("too late")
        cancelled = desk.future.note("cancelled")
        cancelled.cancel()
    finally:
        go_on()
    assert desk.notes() == []


def _open(at: Any, name: str, keys: list[str]) -> None:
    for key in keys:
        at.servers[name].service.open(key)


def _notes(at: Any, name: str) -> list[str]:
    return list(at.servers[name].service.notes())


@pytest.mark.parametrize(("method", "word"), [("patient", "CallCancelled"), ("task", "cancelled")])
def test_cancel_and_deadline_end_the_method_at_the_server(
    rpc: Rpc, transport: str, method: str, word: str
) -> None:
    rpc.serve(0, Desk, "desk")
    desk = rpc.connect("desk", transport=transport)
    future = getattr(desk.future, method)("one")
    noted(desk, "began one")
    future.cancel()
    noted(desk, f"{word} one")
    with pytest.raises(DeadlineExceeded):
        getattr(desk.using(timeout=0.1), method)("two")
    until(lambda: any(note.endswith(" two") and "began" not in note for note in desk.notes()))


def test_cancel_reaches_a_server_whose_threads_are_all_busy(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk", threads=1)
    desk = rpc.connect("desk", transport=transport)
    future = desk.future.spin("one")  # and it holds the GIL
    until(lambda: "began one" in rpc.hosts[0].call(_notes, "desk"))
    future.cancel()
    noted(desk, "cancelled one")


def test_cancel_reaches_calls_that_were_queued_before_they_ran(rpc: Rpc, transport: str) -> None:
    """All threads run calls from the queue: nobody but the warden is left to read."""
    rpc.serve(0, Desk, "desk", threads=2)
    desk = rpc.connect("desk", transport=transport)
    doors = [desk.future.block("a"), desk.future.block("b")]
    until(lambda: {"began a", "began b"} <= set(rpc.hosts[0].call(_notes, "desk")))
    queued = [desk.future.patient("c"), desk.future.patient("d")]
    desk.future.echo(0)
    rpc.hosts[0].call(_open, "desk", ["a", "b"])
    until(lambda: {"began c", "began d"} <= set(rpc.hosts[0].call(_notes, "desk")))
    for future in queued:
        future.cancel()
    noted(desk, "CallCancelled c")
    noted(desk, "CallCancelled d")
    assert [door.result() for door in doors] == ["a", "b"]


def test_a_queued_call_that_is_cancelled_never_runs(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk", threads=1)
    desk = rpc.connect("desk", transport=transport)
    door = desk.future.block("door")
    until(lambda: "began door" in rpc.hosts[0].call(_notes, "desk"))
    queued = desk.future.note("never")
    queued.cancel()
    rpc.hosts[0].call(_open, "desk", ["door"])
    assert door.result() == "door"
    assert "never" not in desk.notes()


@pytest.mark.parametrize("method", ["patient", "patient_future", "patient_task"])
def test_cancelling_a_call_cancels_what_it_waits_for(rpc: Rpc, transport: str, method: str) -> None:
    rpc.serve(0, Desk, "desk")
    rpc.serve(1, Relay, "relay", "desk", transport)
    relay, desk = (rpc.connect(name, transport=transport) for name in ("relay", "desk"))
    future = getattr(relay.future, method)("deep")
    noted(desk, "began deep")
    future.cancel()
    noted(desk, "CallCancelled deep")


def test_a_relay_is_free_again_though_what_it_waits_for_is_deaf(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk")
    rpc.serve(1, Relay, "relay", "desk", transport, threads=1)
    relay, desk = (rpc.connect(name, transport=transport) for name in ("relay", "desk"))
    future = relay.future.blocked("deaf")
    noted(desk, "began deaf")
    future.cancel()
    with pytest.raises(CallCancelled):
        future.result()
    desk.open("door")
    assert relay.using(timeout=20).blocked("door") == "door"
    desk.open("deaf")


def test_cancelling_a_task_cancels_its_call(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk")
    desk = rpc.connect("desk", transport=transport)

    async def scene() -> None:
        async with desk.aio as aio:
            task = asyncio.create_task(aio.patient("task"))
            while "began task" not in await aio.notes():
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while "CallCancelled task" not in await aio.notes():
                await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(scene(), 20))


def test_a_storm_of_cancelled_tasks_leaves_nothing_behind(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk", threads=4)
    desk = rpc.connect("desk", transport=transport)

    async def scene() -> None:
        async with desk.aio as aio:
            for delay in (0, 1, 3):
                tasks = [asyncio.create_task(aio.echo(i)) for i in range(200)]
                for _ in range(delay):
                    await asyncio.sleep(0)
                for task in tasks[::2]:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                assert [task.result() for task in tasks[1::2]] == list(range(1, 200, 2))
            connection = aio._connection
            assert connection is not None
            assert not connection.pending

    asyncio.run(asyncio.wait_for(scene(), 40))
