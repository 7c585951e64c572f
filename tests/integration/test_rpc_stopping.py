"""Servers that stop, in order or not, and clients that find their successors."""

import asyncio
import signal
import threading
import time
from typing import Any

import pytest

import dmrpc_cxl
from dmrpc_cxl.errors import (
    DeadlineExceeded,
    PeerLost,
    ServiceExists,
    ServiceNotFound,
    ServiceStopping,
)
from tests.rpc_services import (
    Desk,
    Rpc,
    Typed,
    descriptors_and_threads,
    grow_idle,
    new_since,
    noted,
    stop,
    until_nothing_is_new,
)
from tests.standing import until


def _open(at: Any, name: str, key: str) -> None:
    at.service.open(key)


def _keep_service(at: Any, name: str) -> None:
    at.service = at.servers[name].service


def _stop_in_background(at: Any, name: str, drain: float) -> None:
    server = at.servers.pop(name)
    at.stopping = threading.Thread(target=server.stop, args=(drain,))
    at.stopping.start()


def _wait_stopped(at: Any) -> None:
    at.stopping.join(30)
    assert not at.stopping.is_alive()


def _published(rpc: Rpc, name: str) -> bool:
    try:
        rpc.host.lookup(name)
    except ServiceNotFound:
        return False
    return True


def test_stop_lets_running_calls_finish_while_a_successor_takes_over(
    rpc: Rpc, transport: str
) -> None:
    rpc.serve(0, Desk, "desk", threads=4)
    rpc.hosts[0].call(_keep_service, "desk")
    desk = rpc.connect("desk", transport=transport)
    first = desk.pid()
    future = desk.future.block("door")
    noted(desk, "began door")
    rpc.hosts[0].call(_stop_in_background, "desk", 30)
    until(lambda: not _published(rpc, "desk"))
    rpc.serve(1, Desk, "desk")

    def pid() -> int | None:
        try:
            return int(desk.pid())
        except ServiceStopping:
            return None

    until(lambda: pid() not in (None, first))
    assert not future.done()
    rpc.hosts[0].call(_open, "desk", "door")
    assert future.result(20) == "door"
    rpc.hosts[0].call(_wait_stopped)


def test_callers_get_peer_lost_when_the_drain_time_is_over(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk", threads=4)
    desk = rpc.connect("desk", transport=transport, connect_timeout=0.1)
    cooperative, task = desk.future.patient("a"), desk.future.task("b")
    noted(desk, "began a")
    noted(desk, "began b")
    assert rpc.hosts[0].call(stop, "desk", 0.2) < 5
    for future in (cooperative, task):
        with pytest.raises(PeerLost):
            future.result()
    with pytest.raises((PeerLost, ServiceNotFound)):
        desk.echo(1)


def test_a_server_leaves_neither_descriptors_nor_threads(rpc: Rpc, transport: str) -> None:
    rpc.host.threshold  # noqa: B018  # measured once

    def round_() -> None:
        with rpc.host.serve(Desk(), name="here", threads=3) as server:
            desk = rpc.host.connect("here", transport=transport)
            future = desk.future.block("door")
            noted(desk, "began door")
            desk.open("door")
            assert future.result() == "door"

            async def later() -> None:
                async with desk.aio as aio:
                    task = asyncio.create_task(aio.task("task"))
                    await aio.metadata_later()
                    task.cancel()

            asyncio.run(later())
            desk.close()
            desk.close()
            server.stop()
        server.stop()

    round_()
    before = descriptors_and_threads()
    for _ in range(3):
        round_()
    assert new_since(before) == []


def test_stop_is_idempotent_and_whoever_comes_second_waits(rpc: Rpc) -> None:
    server = rpc.host.serve(Desk(), name="here")
    desk = rpc.host.connect("here")
    future = desk.future.block("door")
    noted(desk, "began door")
    threads = [threading.Thread(target=server.stop, args=(20,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: not _published(rpc, "here"))
    assert all(thread.is_alive() for thread in threads)
    server.service.open("door")
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert future.result() == "door"
    server.wait()
    desk.close()


class Suicidal:
    def __init__(self) -> None:
        self._server: Any = None

    def end(self) -> str:
        self._server.stop()
        return "never arrives"


def test_a_method_may_stop_its_own_server(rpc: Rpc, transport: str) -> None:
    service = Suicidal()
    begin = time.monotonic()
    server = service._server = rpc.host.serve(service, name="here")
    with rpc.host.connect("here", transport=transport) as client, pytest.raises(PeerLost):
        client.end()
    server.wait()
    assert time.monotonic() - begin < 5


def test_detaching_stops_servers_and_closes_clients(rpc: Rpc, transport: str) -> None:
    before = descriptors_and_threads()
    host = dmrpc_cxl.attach(rpc.fabric.name)
    host.serve(Typed(), name="typed")
    client = host.connect("typed", Typed, transport=transport)
    assert client.add(1, 2, 3) == 6
    host.detach()
    assert not _published(rpc, "typed")
    with pytest.raises(PeerLost):
        client.add(1, 2, 3)
    del host, client
    until_nothing_is_new(before)


def test_detaching_waits_for_a_connection_that_nobody_waits_for_any_more(rpc: Rpc) -> None:
    rpc.serve(0, Desk, "desk")
    host = dmrpc_cxl.attach(rpc.fabric.name)
    client = host.connect("desk", connect_timeout=1.0)
    rpc.fabric.coordinator.send_signal(signal.SIGSTOP)  # so that looking the name up takes its time
    resume = threading.Timer(0.5, rpc.fabric.coordinator.send_signal, (signal.SIGCONT,))
    try:

        async def call() -> None:
            await client.using(timeout=0.05).aio.pid()

        with pytest.raises(DeadlineExceeded):
            asyncio.run(call())
        resume.start()
        host.detach()
        assert host.detached
    finally:
        rpc.fabric.coordinator.send_signal(signal.SIGCONT)
        resume.cancel()
        host.detach()


def test_a_name_that_is_taken_stays_with_its_first_server(rpc: Rpc) -> None:
    with rpc.host.serve(Typed(), name="typed"):
        before = descriptors_and_threads()
        with pytest.raises(ServiceExists):
            rpc.host.serve(Desk(), name="typed")
        assert new_since(before) == []
        with rpc.host.connect("typed") as client:
            assert client.add(1) == 111


@pytest.mark.parametrize("kind", ["sync", "aio"])
def test_after_a_kill_calls_fail_at_once_and_the_next_finds_the_new_server(
    rpc: Rpc, transport: str, kind: str
) -> None:
    process = rpc.extra_host()
    rpc.serve(2, Desk, "desk", threads=4)
    desk = rpc.connect("desk", transport=transport, connect_timeout=20.0)
    first = desk.pid()

    async def scene() -> None:
        async with desk.aio as aio:
            task = asyncio.create_task(aio.block("never"))
            while "began never" not in await aio.notes():
                await asyncio.sleep(0)
            process.kill()
            with pytest.raises(PeerLost):
                await asyncio.wait_for(task, 5)
            until(lambda: not _published(rpc, "desk"))
            rpc.serve(1, Desk, "desk")
            assert await aio.pid() != first

    if kind == "aio":
        asyncio.run(scene())
        return
    future = desk.future.block("never")
    noted(desk, "began never")
    begin = time.monotonic()
    process.kill()
    with pytest.raises(PeerLost):
        future.result()
    assert time.monotonic() - begin < 5
    until(lambda: not _published(rpc, "desk"))
    rpc.serve(1, Desk, "desk")
    assert desk.pid() != first


def test_a_client_that_was_idle_notices_before_it_sends(rpc: Rpc, transport: str) -> None:
    process = rpc.extra_host()
    rpc.serve(2, Desk, "desk")
    desk = rpc.connect("desk", transport=transport)
    first = desk.pid()
    process.kill()
    until(lambda: not _published(rpc, "desk"))
    rpc.serve(1, Desk, "desk")
    grow_idle(desk)
    assert desk.pid() != first  # the first call after the death, and it works


def test_a_call_waits_for_a_service_that_comes_back_in_time(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk")
    desk = rpc.connect("desk", transport=transport, connect_timeout=20.0)
    first = desk.pid()
    rpc.hosts[0].call(stop, "desk")
    grow_idle(desk)
    pids: list[int] = []
    caller = threading.Thread(target=lambda: pids.append(desk.pid()))
    caller.start()
    until(lambda: desk._link._lock.locked())
    rpc.serve(1, Desk, "desk")
    caller.join(20)
    assert pids
    assert pids[0] != first


def test_a_service_that_is_gone_for_good_is_reported_in_time(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk")
    desk = rpc.connect("desk", transport=transport, connect_timeout=0.3)
    rpc.hosts[0].call(stop, "desk")
    begin = time.monotonic()
    with pytest.raises((PeerLost, ServiceNotFound)):
        desk.echo(1)

    async def waiting() -> None:
        async with desk.aio as aio:
            await aio.echo(1)

    with pytest.raises((PeerLost, ServiceNotFound)):
        asyncio.run(waiting())
    assert time.monotonic() - begin < 5


def test_close_does_not_wait_for_a_thread_that_reconnects(rpc: Rpc) -> None:
    rpc.serve(0, Desk, "desk")
    desk = rpc.connect("desk", connect_timeout=60.0)
    rpc.hosts[0].call(stop, "desk")
    grow_idle(desk)
    errors: list[BaseException] = []

    def call() -> None:
        try:
            desk.echo(1)
        except BaseException as error:
            errors.append(error)

    caller = threading.Thread(target=call)
    caller.start()
    until(lambda: desk._link._lock.locked())
    desk.close()
    caller.join(10)
    assert isinstance(errors[0], (PeerLost, ServiceNotFound))
