"""Connections that break, answers that are lost, servers that die or stand still: what a client makes of it."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest

import dmrpc_net
from dmrpc_cxl.errors import (
    AccessDenied,
    BadAddress,
    BadRef,
    DeadlineExceeded,
    ForkedError,
    HostClosed,
    NoHostSlot,
    RemoteProtocolError,
)
from dmrpc_net import AnswerLost, ServerLost
from dmrpc_net.memory import Memory
from tests.net_proxy import Proxy, between
from tests.net_servers import ServerProcess, Servers, StandingServers, serving
from tests.standing import until

PAGE = 4096
_standing = StandingServers(shards=1)


@pytest.fixture(scope="module", autouse=True)
def _stopped() -> Iterator[None]:
    yield
    _standing.close()


@pytest.fixture
def servers() -> Iterator[Servers]:
    with _standing.use() as servers:
        yield servers


@pytest.fixture
def proxy(servers: Servers) -> Iterator[Proxy]:
    with between(servers.servers[0].where) as proxy:
        yield proxy


@pytest.fixture
def client(servers: Servers, proxy: Proxy) -> Iterator[dmrpc_net.Client]:
    with dmrpc_net.attach(proxy.address, secret=servers.secret, deadline=60) as client:
        client.ping()
        yield client


# ---------------------------------------------------------------- connections


def test_a_connection_that_breaks_is_made_again(client, proxy):
    address = client.ralloc(PAGE)
    for i in range(5):
        client.rwrite(address, bytes([i]) * 10)
        proxy.cut()
        assert client.read(address, 10) == bytes([i]) * 10
    client.rfree(address)


def lose_the_answer(proxy: Proxy, ask):
    """Have a call carried out, and its connection break before the answer arrives."""
    proxy.swallow = True
    results = []
    before = [pair.to_server for pair in proxy._pairs]
    thread = threading.Thread(target=lambda: results.append(ask()))
    thread.start()
    until(lambda: [pair.to_server for pair in proxy._pairs] != before)
    return thread, results


def test_a_request_whose_answer_is_lost_is_carried_out_once(client, proxy, servers):
    watcher = servers.client()
    for ask, what in (
        (lambda: client.ralloc(PAGE), "nr_ranges"),
        (lambda: client.put(b"x" * 10), "nr_refs"),
    ):
        count = watcher.stats()[what]
        thread, results = lose_the_answer(proxy, ask)
        until(lambda what=what, count=count: watcher.stats()[what] == count + 1)
        proxy.swallow = False
        proxy.cut()
        thread.join(60)
        assert len(results) == 1
        assert watcher.stats()[what] == count + 1
    assert watcher.stats()["duplicates"] >= 2
    assert client.get(results[0]) == b"x" * 10


def test_a_ref_that_was_got_comes_again_when_the_answer_is_lost(client, proxy, servers):
    watcher = servers.client()
    data = os.urandom(100_000)
    wire = watcher.put(data).to_bytes()
    thread, results = lose_the_answer(proxy, lambda: client.get(wire))
    until(lambda: watcher.stats()["nr_refs"] == 0)
    proxy.swallow = False
    proxy.cut()
    thread.join(60)
    assert results == [data]


def test_a_freed_range_stays_freed_when_the_answer_is_lost(client, proxy, servers):
    watcher = servers.client()
    address = client.ralloc(PAGE)
    thread, results = lose_the_answer(proxy, lambda: client.rfree(address))
    until(lambda: watcher.stats()["nr_ranges"] == 0)
    proxy.swallow = False
    proxy.cut()
    thread.join(60)
    assert results == [None]  # and not BadAddress: it was freed once


def test_an_answer_that_breaks_off_anywhere_is_had_again(client, proxy):
    address = client.ralloc(200_000)
    data = os.urandom(200_000)
    client.rwrite(address, data)
    for cut in (1, 31, 32, 33, 5000, 100_000, 200_031):
        proxy.cut_after = cut
        into = bytearray(200_000)
        client.rread(address, into)
        assert into == data
    client.rfree(address)


def test_calls_of_a_pipeline_survive_a_break_in_order(client, proxy):
    address = client.ralloc(64 * PAGE)
    with client.pipeline() as p:
        for i in range(300):
            p.rwrite(address + i % 64 * PAGE, bytes([i % 251]) * PAGE)
            if i % 50 == 25:
                p.flush()
                proxy.cut()
    for i in range(300 - 64, 300):
        assert client.read(address + i % 64 * PAGE, 2) == bytes([i % 251]) * 2
    client.rfree(address)


def test_a_read_whose_range_was_written_to_since_is_not_answered_with_what_came_later(
    client, proxy, servers
):
    """Both were carried out, both answers are lost: the first cannot be given any more."""
    watcher = servers.client()
    address = client.ralloc(PAGE)
    client.rwrite(address, b"old")
    proxy.swallow = True
    p = client.pipeline()
    read = p.read(address, 3)
    write = p.rwrite(address, b"new")
    other = p.ralloc(1)
    p.flush()
    until(lambda: watcher.stats()["nr_ranges"] == 2)
    proxy.swallow = False
    proxy.cut()
    with pytest.raises(AnswerLost):
        read.result()
    write.result()
    client.rfree(other.result())
    assert client.read(address, 3) == b"new"
    client.rfree(address)


def test_threads_that_share_a_connection_survive_its_breaks(client, proxy):
    failures: list[BaseException] = []

    def work(me: int) -> None:
        try:
            address = client.ralloc(3 * PAGE)
            for i in range(60):
                client.rwrite(address + i, bytes([me, i]) * 2000)
                assert client.read(address + i, 4000) == bytes([me, i]) * 2000
            client.rfree(address)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(me,)) for me in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        accepted = proxy.nr_accepted
        proxy.cut()
        until(
            lambda before=accepted: (
                proxy.nr_accepted > before or not any(t.is_alive() for t in threads)
            )
        )
    assert not failures


def test_a_server_that_cannot_be_reached_again_is_waited_for_until_the_deadline(client, proxy):
    client.ping()
    proxy.refuse = True
    proxy.cut()
    with pytest.raises((DeadlineExceeded, ServerLost)):
        client.ralloc(1, server=0, timeout=0.3)
    proxy.refuse = False
    client.rfree(client.ralloc(1))


def test_what_was_held_goes_with_the_control_connection(client, proxy, servers):
    watcher = servers.client()
    address = client.ralloc(PAGE)
    client.rwrite(address, b"x")
    wire = client.put(b"y").to_bytes()
    watcher.accept_ref(wire)
    proxy.cut_control()
    until(lambda: watcher.audit()["in_use"] == 1)
    with pytest.raises(ServerLost):
        client.read(address, 1)
    assert watcher.get(wire) == b"y"


def test_a_client_that_was_let_go_begins_anew_and_does_not_mistake_its_addresses(
    client, proxy, servers
):
    address = client.ralloc(PAGE)
    client.rwrite(address, b"x")
    proxy.cut_control()
    proxy.cut()
    fresh = until(lambda: _allocated(client))
    assert fresh != address
    with pytest.raises(BadAddress):
        client.read(address, 1)
    client.rfree(fresh)


@pytest.mark.parametrize("way", ["call", "pipeline", "aio"])
def test_after_an_answer_to_nothing_that_was_asked_a_client_begins_anew(
    client, proxy, servers, way
):
    address = client.ralloc(PAGE, server=0, shard=0)
    client.rwrite(address, b"x")
    proxy.garble = True
    with pytest.raises(RemoteProtocolError, match="answers no request"):
        if way == "call":
            client.read(address, 1)
        elif way == "pipeline":
            with client.pipeline() as pipeline:
                pipeline.read(address, 1)
        else:
            asyncio.run(_read(client, address))
    fresh = until(lambda: _allocated(client))
    assert fresh != address
    with pytest.raises(BadAddress):  # what it held there was given up
        client.read(address, 1)
    client.rfree(fresh)
    assert servers.client().audit()["in_use"] == 0


async def _read(client: dmrpc_net.Client, address: int) -> bytes:
    return bytes(await client.aio.read(address, 1))


def _allocated(client: dmrpc_net.Client) -> int | None:
    try:
        return client.ralloc(PAGE)
    except ServerLost:
        return None


# ---------------------------------------------------------------- deadlines


def test_a_server_that_stands_still_costs_no_more_than_the_deadline(servers):
    client = servers.client()
    address = client.ralloc(PAGE)
    server = servers.servers[0]
    with server.paused():
        for call in (
            lambda: client.ralloc(1, timeout=0.1),
            lambda: client.read(address, 10, timeout=0.1),
            lambda: client.rwrite(address, b"x" * PAGE, timeout=0.1),
            lambda: client.put(b"y" * 1000, timeout=0.1),
        ):
            with pytest.raises(DeadlineExceeded):
                call()
        with pytest.raises(TimeoutError):
            client.ping(timeout=0.1)
    # What was carried out after all was given back: nobody knows of it.
    found = client.audit()
    assert (found["nr_ranges"], found["nr_refs"]) == (1, 0)


def test_a_write_that_is_sent_in_part_breaks_its_connection_and_nothing_else(servers):
    client = servers.client()
    address = client.ralloc(16 << 20)
    kept = client.ralloc(PAGE)
    client.rwrite(kept, b"kept")
    server = servers.servers[0]
    with server.paused(), pytest.raises(DeadlineExceeded):
        client.rwrite(address, bytes(16 << 20), timeout=0.2)
    assert client.read(kept, 4) == b"kept"
    client.rwrite(address, b"z" * 10)
    assert client.read(address, 10) == b"z" * 10


def test_what_a_late_answer_carries_does_not_land_in_a_buffer_that_was_given_up(servers):
    client = servers.client()
    address = client.ralloc(PAGE)
    client.rwrite(address, b"x" * PAGE)
    into = bytearray(PAGE)
    server = servers.servers[0]
    with server.paused(), pytest.raises(DeadlineExceeded):
        client.rread(address, into, timeout=0.1)
    assert client.read(address, 1) == b"x"  # the late answer came before this one
    assert into == bytes(PAGE)


@pytest.mark.parametrize("where", ["the waiting thread", "another thread"])
def test_ctrl_c_ends_a_wait(servers, where):
    client = servers.client()
    client.ping()
    server = servers.servers[0]
    with server.paused():
        waiting = client.open_links()[0]

        def interrupt() -> None:
            until(lambda: waiting.stats()["outstanding"])
            os.kill(os.getpid(), signal.SIGINT)

        interrupter = threading.Thread(target=interrupt)
        interrupter.start()
        # The kernel hands it to another thread: as if it had come right before the wait.
        blocked = {signal.SIGINT} if where == "another thread" else set()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        began = time.monotonic()
        try:
            with pytest.raises(KeyboardInterrupt):
                client.ralloc(1, timeout=30)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert time.monotonic() < began + 15
        interrupter.join(60)
    until(lambda: client.audit()["nr_ranges"] == 0)


# ---------------------------------------------------------------- servers that die


def test_the_death_of_a_server_ends_every_call_with_a_typed_error():
    with serving(shards=2, count=1) as servers:
        client = servers.client()
        address = client.ralloc(PAGE)
        errors: list[BaseException] = []
        started = threading.Barrier(9)

        def work() -> None:
            started.wait()
            try:
                while True:
                    client.read(address, 100)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        started.wait()
        servers.servers[0].kill()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert len(errors) == 8
        assert all(isinstance(error, ServerLost) for error in errors), errors
        for call in (
            lambda: client.ralloc(1),
            lambda: client.put(b"x"),
            lambda: client.read(address, 1),
        ):
            with pytest.raises(ConnectionError):
                call()
        servers.servers[0].start()
        until(lambda: _allocated(client))
        with pytest.raises(BadAddress):
            client.read(address, 1)


def test_when_one_of_two_servers_dies_the_other_serves_on():
    with serving(count=2, shards=1) as servers:
        client = servers.client()
        here, there = (client.ralloc(PAGE, server=number) for number in (0, 1))
        client.rwrite(here, b"x")
        servers.servers[1].kill()
        with pytest.raises(ServerLost):
            client.read(there, 1)
        assert client.read(here, 1) == b"x"
        addresses = [client.ralloc(PAGE) for _ in range(10)]  # all on the one that is left
        assert len(set(addresses)) == 10
        servers.servers[1].start()
        before = client.stats(0)["nr_ranges"]
        until(
            lambda: (
                client.ralloc(PAGE)
                and client.stats(0)["nr_ranges"] < before + 10
                and _has(client, 1)
            )
        )


def _has(client: dmrpc_net.Client, server: int) -> bool:
    try:
        return client.stats(server)["nr_ranges"] > 0
    except ServerLost:
        return False


def test_a_client_may_begin_while_a_server_is_down_and_uses_it_when_it_is_back():
    servers = Servers(count=2, shards=1)
    try:
        where = servers.servers[1].where
        servers.servers[1].kill()
        with dmrpc_net.attach(servers.addresses, secret=servers.secret, deadline=20) as client:
            for _ in range(4):
                client.rfree(client.ralloc(PAGE))
            with pytest.raises(ServerLost, match=r"gone|reach"):
                client.ralloc(PAGE, server=1)
            servers.servers[1] = ServerProcess(
                servers.secret, 1, where, ("--size", "8M", "--shards", "1")
            )
            until(lambda: _serves(client, 1))
            client.rfree(client.ralloc(PAGE, server=1))
        servers.servers[0].kill()
        with pytest.raises(ServerLost, match="cannot reach"):
            dmrpc_net.attach(servers.addresses, secret=servers.secret)
    finally:
        servers.end()


def _serves(client: dmrpc_net.Client, server: int) -> bool:
    try:
        client.ping(server)
    except ServerLost:
        return False
    return True


def test_an_array_of_a_server_that_lives_is_had_although_another_has_died():
    servers = Servers(count=2, shards=1)
    try:
        ours, theirs = (
            Memory.attach(servers.addresses, secret=servers.secret, deadline=20) for _ in "ab"
        )
        token = ours.token_of(ours.client.put(b"x" * 100_000, server=0))
        servers.servers[1].kill()
        with memoryview(theirs.view(token)) as view:  # the first one that this process receives
            assert view == b"x" * 100_000
        for one in (ours, theirs):
            one.close()
    finally:
        servers.end()


def test_an_array_is_had_although_its_server_takes_no_more_clients():
    with serving("--max-clients", "2", shards=1) as servers:
        ours, theirs = (
            Memory.attach(servers.addresses, secret=servers.secret, deadline=20) for _ in "ab"
        )
        for _ in range(2):  # the way for the pager would need a third
            token = ours.token_of(ours.client.put(b"x" * 100_000))
            with memoryview(theirs.view(token)) as view:
                assert view == b"x" * 100_000
        for one in (ours, theirs):
            one.close()


def test_what_is_received_after_the_way_of_the_pager_was_cut_is_had_by_another():
    with serving(shards=1) as servers:
        ours, theirs = (
            Memory.attach(servers.addresses, secret=servers.secret, deadline=20) for _ in "ab"
        )
        for _ in range(3):
            token = ours.token_of(ours.client.put(b"x" * 100_000))
            with memoryview(theirs.view(token)) as view:
                assert view == b"x" * 100_000
            reader = theirs._reader
            assert reader is not None
            control = reader._servers[0].control
            assert control is not None
            control.shutdown(socket.SHUT_RDWR)
        for one in (ours, theirs):
            one.close()


def test_a_ref_of_a_server_that_was_started_again_is_none():
    with serving(shards=1) as servers:
        client = servers.client()
        wire = client.put(b"x").to_bytes()
        servers.servers[0].kill()
        servers.servers[0].start()
        other = servers.client()
        with pytest.raises(BadRef):
            other.get(wire)


# ---------------------------------------------------------------- beginnings and ends


def test_who_has_another_secret_is_not_let_in(servers):
    with pytest.raises(AccessDenied):
        dmrpc_net.attach(servers.addresses, secret=bytes(32))


def test_who_finds_no_server_is_told_where_it_was_expected():
    with pytest.raises(ServerLost, match=r"127\.0\.0\.1:1"):
        dmrpc_net.attach("127.0.0.1:1", secret=bytes(32))


def test_servers_in_the_wrong_order_are_noticed():
    with serving(count=2, shards=1) as servers, pytest.raises(RemoteProtocolError):
        dmrpc_net.attach(servers.addresses[::-1], secret=servers.secret)


def test_a_full_server_says_so():
    with serving("--max-clients", "2", shards=1) as servers:
        first, second = servers.client(), servers.client()
        with pytest.raises(NoHostSlot):
            servers.client()
        second.close()
        first.ping()
        until(lambda: _attached(servers))


def _attached(servers: Servers) -> dmrpc_net.Client | None:
    try:
        return servers.client()
    except NoHostSlot:
        return None


def test_a_closed_client_refuses_and_its_waits_end(servers):
    client = servers.client()
    address = client.ralloc(PAGE)
    server = servers.servers[0]
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            client.read(address, 1)
        except BaseException as error:
            errors.append(error)

    with server.paused():
        thread = threading.Thread(target=wait)
        thread.start()
        until(lambda: any(link.stats()["outstanding"] for link in client.open_links()))
        closing = threading.Thread(target=client.close)
        closing.start()
        thread.join(60)
    closing.join(60)
    assert isinstance(errors[0], HostClosed)
    with pytest.raises(HostClosed):
        client.ralloc(1)
    client.close()


def test_a_forked_child_is_refused_and_harms_nobody(servers):
    client = servers.client()
    address = client.ralloc(PAGE)
    client.rwrite(address, b"x")
    child = os.fork()
    if child == 0:
        try:
            client.read(address, 1)
        except ForkedError:
            client.close()
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert client.read(address, 1) == b"x"


def test_a_stopped_server_lets_clients_know():
    with serving(shards=1) as servers:
        client = servers.client()
        client.ping()
        begin = time.monotonic()
        servers.servers[0].stop()
        with pytest.raises(ServerLost):
            client.ping(timeout=60)
        assert time.monotonic() - begin < 60
        servers.servers[0].start()


def test_a_first_call_to_a_shard_waits_no_longer_than_its_deadline(servers):
    client = servers.client()
    server = servers.servers[0]
    with server.paused():
        begin = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.ralloc(1, timeout=0.2)
        assert time.monotonic() - begin < 30
    client.rfree(client.ralloc(1))


def test_threads_that_find_a_connection_broken_wait_for_each_other_no_longer_than_their_deadlines(
    client, proxy
):
    client.ping()
    proxy.refuse = True
    proxy.cut()
    slow = threading.Thread(target=lambda: client.ping(timeout=60))
    slow.start()
    until(lambda: proxy.nr_accepted > 3)  # it tries
    with pytest.raises(DeadlineExceeded):
        client.ping(timeout=0.2)
    proxy.refuse = False
    slow.join(60)
    assert not slow.is_alive()
    client.ping()
