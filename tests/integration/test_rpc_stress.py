"""Everything at once against servers with few threads: every call ends, and nothing is left of it.

A lost wake-up shows as a call that ends at its deadline, 30 s, or never. DMRPC_STRESS_SECONDS makes it longer.
"""

import concurrent.futures
import contextlib
import os
import random
import time
from typing import Any

import numpy as np
import pytest

from dmrpc_cxl.errors import CallCancelled, DeadlineExceeded, Overloaded, PeerLost
from tests.rpc_services import Desk, Relay, Rpc, ask, stop
from tests.standing import until

SECONDS = float(os.environ.get("DMRPC_STRESS_SECONDS", "1.5"))


def _torment(client: Any, seed: int, end: float) -> int:
    """Make calls of all kinds; return how many. Whatever takes 10 s was forgotten by somebody."""
    rng = random.Random(seed)
    n = 0
    while time.monotonic() < end:
        n += 1
        kind = rng.randrange(8)
        begin = time.monotonic()
        try:
            if kind < 3:
                assert client.echo(n) == n
            elif kind == 3:
                futures = [client.future.echo([seed, i]) for i in range(rng.randrange(1, 60))]
                for future in rng.sample(futures, len(futures) // 2):
                    future.cancel()
                for i, future in enumerate(futures):
                    error = future.exception()
                    if error is None:
                        assert future.result() == [seed, i]
                    else:
                        assert isinstance(error, (CallCancelled, Overloaded)), error
            elif kind == 4:
                client.using(timeout=rng.uniform(0.0005, 0.01)).patient(f"{seed}")
            elif kind == 5:
                future = client.future.patient(f"{seed}")
                if rng.random() < 0.5:
                    future.done()
                del future
            elif kind == 6:
                array = np.full(rng.randrange(1, 20_000), seed)
                assert (client.double(array) == 2 * seed).all()
            else:
                client.future.double(np.ones(5_000))
        except (DeadlineExceeded, Overloaded):
            assert time.monotonic() - begin < 10
        assert time.monotonic() - begin < 10, kind
    return n


@pytest.mark.parametrize(("threads", "queue"), [(1, 2), (2, 0), (3, 16), (8, 128)])
def test_all_kinds_of_calls_at_once_lose_no_wake_up(
    rpc: Rpc, transport: str, threads: int, queue: int
) -> None:
    rpc.serve(0, Desk, "desk", threads=threads, queue=queue)
    shared = rpc.connect("desk", transport=transport)
    clients = [shared, shared, *(rpc.connect("desk", transport=transport) for _ in range(3))]
    end = time.monotonic() + SECONDS
    with concurrent.futures.ThreadPoolExecutor(len(clients)) as pool:
        done = list(pool.map(_torment, clients, range(len(clients)), [end] * len(clients)))
    assert min(done) > 0
    until(lambda: _answers(shared))
    for client in clients:
        client.close()
    until(lambda: rpc.hosts[0].call(_nr_calls, "desk") == 0, 20)


def _answers(client: Any) -> bool:
    try:
        return bool(client.echo(1) == 1)
    except Overloaded:
        return False


def _nr_calls(at: Any, name: str) -> int:
    server = at.servers[name]
    return sum(len(c.calls) for c in list(server._connections.values())) + len(server._queue)


def test_single_calls_are_answered_at_once_while_others_take_long(rpc: Rpc, transport: str) -> None:
    """The warden parks and wakes between calls; long and short ones meet it at every moment."""
    rpc.serve(0, Desk, "desk", threads=3)
    clients = [rpc.connect("desk", transport=transport, timeout=20) for _ in range(2)]
    rng = random.Random(1)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        time.sleep(rng.choice((0, 0, 0.001, 0.11)))  # 0.1 s without calls park it
        key = f"{rng.random()}"
        future = clients[0].future.block(key)
        for client in rng.sample(clients * 2, 3):
            assert client.echo(key) == key
        clients[1].open(key)
        assert future.result() == key


def test_nested_calls_from_many_threads_do_not_stick(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Relay, "a", "b", transport, threads=8)
    rpc.serve(1, Relay, "b", "a", transport, threads=8)
    client = rpc.connect("a", transport=transport)
    end = time.monotonic() + SECONDS

    def work(_: int) -> None:
        while time.monotonic() < end:
            assert client.using(timeout=20).down(3) == 3

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        list(pool.map(work, range(3)))


def test_servers_that_come_and_go_under_load_end_every_call(rpc: Rpc, transport: str) -> None:
    rpc.serve(0, Desk, "desk", threads=2)
    client = rpc.connect("desk", transport=transport, connect_timeout=20.0)
    end = time.monotonic() + SECONDS

    def work(who: int) -> int:
        n = 0
        while time.monotonic() < end:
            futures = []
            with contextlib.suppress(PeerLost):
                futures = [client.future.echo([who, i]) for i in range(20)]
            for i, future in enumerate(futures):
                error = future.exception()
                assert error is None or isinstance(error, (PeerLost, Overloaded)), error
                if error is None:
                    assert future.result() == [who, i]
                    n += 1
        return n

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        working = [pool.submit(work, who) for who in range(3)]
        turn = 0
        while time.monotonic() < end:
            rpc.hosts[turn].call(stop, "desk", 5)
            turn = 1 - turn
            rpc.serve(turn, Desk, "desk", threads=2)
        assert sum(future.result(60) for future in working) > 0
    assert rpc.hosts[turn].call(ask, "desk", "name") == "desk"
