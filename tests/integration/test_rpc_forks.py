"""Forked children of a process with clients and servers; clients and event loops."""

import asyncio
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from dmrpc_cxl.errors import ForkedError, PeerLost
from dmrpc_cxl.rpc import Forwarder
from tests.fabrics import At
from tests.rpc_services import Desk, Rpc, noted
from tests.standing import until


def in_child(work: Callable[[], None]) -> None:
    """Run something in a forked child; fail if it raises, or ends otherwise."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(30)
            work()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_forked_child_gets_a_clear_error_and_the_parent_goes_on(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk", threads=4)
    desk = rpc.connect("desk", transport=transport)
    server = rpc.host.serve(Desk(), name="here")
    here = rpc.connect("here", transport=transport)
    front = Forwarder(rpc.host, "front", ["desk"])
    through = rpc.connect("front", transport=transport)
    assert [client.echo(1) for client in (desk, here, through)] == [1, 1, 1]
    future = desk.future.block("door")
    noted(desk, "began door")

    def child() -> None:
        for client in (desk, here, through):
            with pytest.raises(ForkedError):
                client.echo(2)
            with pytest.raises(ForkedError):
                client.future.echo(2)
            with pytest.raises(ForkedError):
                asyncio.run(client.aio.echo(2))
        with pytest.raises(ForkedError):
            future.result()
        for end in (server, front):
            with pytest.raises(ForkedError):
                end.stop()
        for client in (desk, here, through):
            client.close()

    in_child(child)
    assert not future.done()
    assert [client.echo(3) for client in (desk, here, through)] == [3, 3, 3]
    desk.open("door")
    assert future.result() == "door"
    front.stop()
    server.stop()


def _fork_and_stay(at: At) -> int:
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        while True:
            signal.pause()
    return pid


def test_a_child_does_not_hide_its_parents_death_from_clients(rpc: Rpc, transport: str) -> None:
    process = rpc.extra_host()
    rpc.serve(2, Desk, "desk")
    desk = rpc.connect("desk", transport=transport, timeout=30, connect_timeout=0.1)
    future = desk.future.block("door")
    noted(desk, "began door")
    child = process.call(_fork_and_stay)
    try:
        process.process.kill()
        with pytest.raises(PeerLost):
            future.result()
    finally:
        os.kill(child, signal.SIGKILL)
        process.kill()


def test_a_client_belongs_to_one_loop_at_a_time(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk")
    desk = rpc.connect("desk", transport=transport)
    for _ in range(3):  # each time a new loop, the last one closed
        assert asyncio.run(desk.aio.echo(1)) == 1
    entered, leave = threading.Event(), threading.Event()

    async def stay() -> None:
        await desk.aio.echo(2)
        entered.set()
        await asyncio.to_thread(leave.wait)
        assert await desk.aio.echo(3) == 3

    other = threading.Thread(target=asyncio.run, args=(stay(),))
    other.start()
    assert entered.wait(20)
    with pytest.raises(RuntimeError, match="another event loop"):
        asyncio.run(desk.aio.echo(4))
    leave.set()
    other.join(20)


def test_two_loops_in_two_threads_each_with_a_client(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk")
    results: list[Any] = []

    def work(who: int) -> None:
        async def many() -> list[int]:
            with rpc.host.connect("desk", transport=transport) as desk:
                return list(await asyncio.gather(*(desk.aio.echo(who + i) for i in range(300))))

        results.append(asyncio.run(many()) == [who + i for i in range(300)])

    threads = [threading.Thread(target=work, args=(1000 * i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results == [True, True]


def test_closing_a_client_ends_what_tasks_wait_for(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk")
    desk = rpc.connect("desk", transport=transport)

    async def scene() -> None:
        task = asyncio.create_task(desk.using(timeout=20).aio.patient("a"))
        other = asyncio.create_task(desk.aio.patient("b"))
        while len(await desk.aio.notes()) < 2:
            await asyncio.sleep(0)
        desk.close()
        for waiting in (task, other):
            with pytest.raises(PeerLost):
                await waiting

    asyncio.run(scene())
    direct = rpc.connect("desk")
    noted(direct, "CallCancelled a")
    noted(direct, "CallCancelled b")


def test_methods_run_on_the_loop_that_serve_was_given(rpc: Rpc, transport: str) -> None:
    class Where:
        async def thread(self) -> int:
            return threading.get_ident()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        with (
            rpc.host.serve(Where(), name="here", loop=loop),
            rpc.host.connect("here", transport=transport) as client,
        ):
            assert client.thread() == thread.ident
        until(lambda: not asyncio.all_tasks(loop))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()
