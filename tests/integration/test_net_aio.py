"""Memory servers from asyncio: the same calls, awaited; together with threads, breaks, deadlines and cancellation."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

import dmrpc_net
from dmrpc_cxl.errors import BadAddress, DeadlineExceeded, HostClosed, MisuseError, RefConsumed
from dmrpc_net import ServerLost
from tests.net_proxy import between
from tests.net_servers import Servers, StandingServers, serving

PAGE = 4096
_standing = StandingServers(shards=2)


@pytest.fixture(scope="module", autouse=True)
def _stopped() -> Iterator[None]:
    yield
    _standing.close()


@pytest.fixture
def servers() -> Iterator[Servers]:
    with _standing.use() as servers:
        yield servers


@pytest.fixture
def client(servers: Servers) -> dmrpc_net.Client:
    return servers.client()


def test_every_call_can_be_awaited(client):
    async def main() -> None:
        aio = client.aio
        address = await aio.ralloc(3 * PAGE)
        await aio.rwrite(address, b"x" * 3 * PAGE)
        into = bytearray(5)
        await aio.rread(address, into)
        assert into == b"xxxxx"
        ref = await aio.create_ref(address, PAGE)
        clone = await aio.clone_ref(ref)
        mapped = await aio.map_ref(ref)
        await aio.rwrite(mapped, b"y")
        assert await aio.get(clone) == b"x" * PAGE
        assert (await aio.read(mapped, 2)) == b"yx"
        put, kept = await aio.put(b"z" * 100, keep=True)
        assert await aio.ref_is_held(put)
        assert await aio.drop_ref(put) is True
        assert await aio.drop_ref(put) is False
        for range_ in (address, mapped, kept):
            await aio.rfree(range_)
        with pytest.raises(BadAddress):
            await aio.read(address, 1)

    asyncio.run(main())


def test_many_calls_are_under_way_at_once(client):
    async def main() -> None:
        address = await client.aio.ralloc(64 * PAGE)
        await asyncio.gather(
            *(client.aio.rwrite(address + i * PAGE, bytes([i]) * PAGE) for i in range(64))
        )
        pages = await asyncio.gather(
            *(client.aio.read(address + i * PAGE, PAGE) for i in range(64))
        )
        assert all(page == bytes([i]) * PAGE for i, page in enumerate(pages))

    asyncio.run(main())


def test_large_transfers_do_not_stop_the_loop(client):
    """Answers that are all there already are taken a few at a time: others have their turns in between."""

    async def main() -> None:
        data = bytes(range(256)) * (1 << 12)  # 1 MiB
        address = await client.aio.ralloc(len(data), server=0, shard=0)
        await client.aio.rwrite(address, data)
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        reads = [client.aio.read(address, len(data)).start() for _ in range(16)]
        done = await asyncio.gather(*reads)
        ticking.cancel()
        assert all(part == data for part in done)
        assert ticks >= 3  # at most four large answers in one turn

    asyncio.run(main())


def test_transfers_in_both_directions_at_once_do_not_block_each_other(client):
    """Together far beyond what sockets take: who does not read while it sends would wait for ever."""

    async def main() -> None:
        data = bytes(range(256)) * (1 << 13)  # 2 MiB
        address = await client.aio.ralloc(len(data), server=0, shard=0)
        await client.aio.rwrite(address, data)
        calls = []
        for _ in range(6):
            calls.append(client.aio.read(address, len(data)).start())
            calls.append(client.aio.rwrite(address, data).start())
        done = await asyncio.gather(*calls)
        assert all(part == data for part in done[::2])

    asyncio.run(main())


def test_a_client_serves_one_loop_after_the_other_but_not_two_at_once(client):
    async def one() -> None:
        await client.aio.rfree(await client.aio.ralloc(1))

    for _ in range(3):
        asyncio.run(one())

    async def other() -> None:
        aio = client.aio
        await aio.ping()

        def elsewhere() -> None:
            async def call() -> None:
                with pytest.raises(MisuseError):
                    await aio.ping()

            asyncio.run(call())

        await asyncio.get_running_loop().run_in_executor(None, elsewhere)

    asyncio.run(other())


def test_threads_and_the_loop_share_connections(client):
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                data = b"t" * 5000
                assert client.get(client.put(data)) == data
        except BaseException as error:
            failures.append(error)

    async def main() -> None:
        for i in range(300):
            data = bytes([i % 256]) * 3000
            assert await client.aio.get(await client.aio.put(data)) == data

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        asyncio.run(main())
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not failures


def test_a_cancelled_call_leaves_nothing_behind(client, servers):
    server = servers.servers[0]

    async def main() -> None:
        await client.aio.ping(0, 0)
        with server.paused():
            calls = [client.aio.ralloc(PAGE, server=0).start() for _ in range(5)]
            calls += [client.aio.put(b"x" * 1000, server=0).start() for _ in range(5)]
            await asyncio.sleep(0)
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)
            assert all(call.cancelled() for call in calls)
        await client.aio.ping(0, 0)

    asyncio.run(main())
    found = client.audit()
    assert (found["nr_ranges"], found["nr_refs"]) == (0, 0)


@pytest.mark.parametrize("what", ["put", "ralloc", "clone_ref"])
def test_a_call_that_is_cancelled_when_its_answer_is_there_gives_back_what_it_got(client, what):
    address = client.ralloc(PAGE)
    ref = client.create_ref(address, PAGE)
    make = {
        "put": lambda: client.aio.put(b"x" * 1000),
        "ralloc": lambda: client.aio.ralloc(PAGE),
        "clone_ref": lambda: client.aio.clone_ref(ref),
    }[what]

    async def main() -> None:
        for shard in (0, 1):
            await client.aio.ping(0, shard)
        for _ in range(20):
            call = make().start()
            for shard in (0, 1):
                client.ping(0, shard)  # a thread reads the answer; the loop has not heard of it
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

    asyncio.run(main())
    client.drop_ref(ref)
    client.rfree(address)
    found = client.audit()
    assert (found["nr_ranges"], found["nr_refs"], found["in_use"]) == (0, 0, 0)


def test_a_pipeline_that_an_error_ends_gives_back_what_was_answered(client):
    with pytest.raises(KeyError), client.pipeline() as pipeline:
        for _ in range(20):
            pipeline.put(b"x" * 50, server=0, shard=0)
            pipeline.ralloc(PAGE, server=0, shard=0)
        pipeline.flush()
        client.ping(0, 0)
        raise KeyError
    found = client.audit()
    assert (found["nr_ranges"], found["nr_refs"]) == (0, 0)


def test_the_loop_goes_on_while_a_first_call_waits_for_its_connection(servers):
    client = servers.client(deadline=30)
    longest = 0.0

    async def main() -> None:
        nonlocal longest
        with servers.servers[0].paused():
            calls = [client.aio.ping(0, 0).start(), client.aio.ralloc(PAGE).start()]
            for _ in range(50):
                before = time.monotonic()
                await asyncio.sleep(0.01)
                longest = max(longest, time.monotonic() - before)
            assert not any(call.done() for call in calls)
        _, address = await asyncio.gather(*calls)
        await client.aio.rfree(address)
        with pytest.raises(BadAddress, match="no shard 77"):
            await client.aio.ping(0, 77)

    asyncio.run(main())
    assert longest < 5


def test_calls_that_wait_for_a_connection_are_sent_in_the_order_in_which_they_were_made(servers):
    maker = servers.client()

    async def main(client: dmrpc_net.Client, wire: bytes) -> None:
        calls = [client.aio.map_ref(wire).start() for _ in range(5)]  # the first one uses it up
        first, *others = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(first, int)
        assert all(isinstance(one, RefConsumed) for one in others), others
        await client.aio.rfree(first)

    for i in range(20):
        ref = maker.put(bytes(PAGE), server=0, shard=i % 2)
        with servers.client() as client:
            asyncio.run(main(client, ref.to_bytes()))


def test_a_first_call_that_is_cancelled_keeps_no_later_one_waiting(servers):
    client = servers.client()

    async def main() -> None:
        first = client.aio.ping(0, 0).start()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        client.aio.ping(0, 1)  # and is not awaited
        assert not client.aio.queued
        await client.aio.ping(0, 0)

    asyncio.run(main())


def test_a_deadline_ends_an_awaited_call(client, servers):
    server = servers.servers[0]

    async def main() -> None:
        await client.aio.ping()
        with server.paused(), pytest.raises(DeadlineExceeded):
            await client.aio.ralloc(1, timeout=0.1, server=0)
        await client.aio.ping()

    asyncio.run(main())
    assert client.audit()["nr_ranges"] == 0


def test_awaited_calls_survive_breaks(servers):
    with between(servers.servers[0].where) as proxy:
        client = dmrpc_net.attach(proxy.address, secret=servers.secret, deadline=60)

        async def main() -> None:
            address = await client.aio.ralloc(64 * PAGE)
            for round_ in range(10):
                calls = [
                    client.aio.rwrite(address + i * PAGE, bytes([i + round_]) * PAGE).start()
                    for i in range(64)
                ]
                proxy.cut()
                await asyncio.gather(*calls)
                proxy.cut()
                assert await client.aio.read(address + 63 * PAGE, 1) == bytes([63 + round_])
            await client.aio.rfree(address)

        asyncio.run(main())
        client.close()


def test_awaited_calls_end_when_the_server_dies():
    with serving(shards=1) as servers:
        client = servers.client()

        async def main() -> None:
            address = await client.aio.ralloc(PAGE)
            with servers.servers[0].paused():
                calls = [client.aio.read(address, 1).start() for _ in range(20)]
                await asyncio.sleep(0)
                servers.servers[0].kill()
            done = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(error, ServerLost) for error in done), done

        asyncio.run(main())
        servers.servers[0].start()


def test_closing_ends_awaited_calls(servers):
    client = servers.client()
    server = servers.servers[0]

    async def main() -> None:
        await client.aio.ping()
        with server.paused():
            call = client.aio.ping().start()
            await asyncio.sleep(0)
            closing = asyncio.get_running_loop().run_in_executor(None, client.close)
            with pytest.raises(HostClosed):
                await call
        await closing

    asyncio.run(main())
