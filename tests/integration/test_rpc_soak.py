"""Calls of every kind for as long as one likes: afterwards everything is as it was before.

Two services, a forwarder in front of them and two clients, each a process. In rounds, the clients make calls in every mode of
transfer, synchronous, as futures and from asyncio; some fail, some are cancelled, some time out; clients connect anew, and in
every round a service is stopped and served again while they are at it. `make test` makes a few thousand calls, `make slow` a
million.

After the first round and after the last one everything is closed. What is compared then: descriptors, threads and anonymous
memory of each process; frames and Refs of the device.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import ctypes
import faulthandler
import gc
import os
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dmrpc_cxl
from dmrpc_cxl.errors import (
    CallCancelled,
    DeadlineExceeded,
    Overloaded,
    PeerLost,
    ServiceNotFound,
    ServiceStopping,
    WrongArguments,
)
from dmrpc_cxl.rpc import Forwarder
from tests.fabrics import WATCHDOG_SECONDS, At, HostProcess, running

SERVICES = ("one", "two")
BALANCER = "balancer"
SIZES = (1, 100, 5_000, 40_000, 300_000)  # bytes
MODES = ("auto", "value", "ref", "copy")
GROWTH_BYTES = 4 << 20  # of anonymous memory: what an allocator may keep
UNDER_WAY = 24
AWAY = (PeerLost, ServiceStopping, ServiceNotFound)  # while a service is served again
LATE = (DeadlineExceeded, CallCancelled)
NAP_SECONDS = 0.004

Tally = collections.Counter[str]


class Store:
    def total(self, data: np.ndarray) -> int:
        return int(data.sum(dtype="u8"))

    def add(self, data: np.ndarray, n: int) -> np.ndarray:
        data += np.uint8(n)
        return data

    def fail(self, data: np.ndarray) -> None:
        raise ValueError("as asked")

    def nap(self, data: np.ndarray, seconds: float) -> np.ndarray:
        threading.Event().wait(seconds)
        return data

    async def later(self, data: np.ndarray) -> np.ndarray:
        await asyncio.sleep(0)
        return data


# ---------------------------------------------------------------- in the services' processes


def wind_up(at: At) -> None:
    faulthandler.dump_traceback_later(WATCHDOG_SECONDS, exit=True)


def serve(at: At, name: str) -> None:
    wind_up(at)
    at.server = at.host.serve(Store(), name=name)


def serve_again(at: At, name: str) -> None:
    at.server.stop()
    serve(at, name)


def forward(at: At) -> None:
    wind_up(at)
    at.server = Forwarder(at.host, BALANCER, SERVICES)


def stop(at: At) -> None:
    at.server.stop()
    del at.server


def belongings(at: At) -> tuple[int, int, int]:
    """Return the numbers of descriptors and threads, and the bytes of anonymous memory."""
    wind_up(at)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for a rainy day is no leak
    status = Path("/proc/self/status").read_text()
    (anonymous,) = (line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:"))
    return len(os.listdir("/proc/self/fd")), threading.active_count(), int(anonymous) << 10


# ---------------------------------------------------------------- in the clients' processes


class Caller:
    """A client process's calls, chosen at random; each result is checked."""

    def __init__(self, host: dmrpc_cxl.Host, seed: int) -> None:
        self.host = host
        self.chance = random.Random(seed)
        self.tally: Tally = collections.Counter()
        self.clients: dict[str, Any] = {}

    def client(self) -> Any:
        name = self.chance.choice((*SERVICES, BALANCER))
        if name not in self.clients:
            transport = self.chance.choice(("ring", "ring", "tcp"))
            self.clients[name] = self.host.connect(name, Store, transport=transport)
            self.tally["connects"] += 1
        return self.clients[name].using(transfer=self.chance.choice(MODES))

    def data(self) -> np.ndarray:
        array = np.full(self.chance.choice(SIZES), self.chance.randrange(200), "u1")
        return self.host.array(array) if self.chance.random() < 0.5 else array

    def leave(self) -> None:
        for client in self.clients.values():
            client.close()
        self.clients.clear()

    def some(self) -> int:
        """Make calls of one kind; return how many."""
        kinds = (self.plain, self.futures, self.awaited, self.refused, self.late, self.anew)
        (kind,) = self.chance.choices(kinds, (60, 8, 4, 20, 3, 1))
        try:
            made = kind()
        except AWAY:
            self.tally["away"] += 1
            return 1
        self.tally[kind.__name__] += made
        return made

    def plain(self) -> int:
        client, data = self.client(), self.data()
        wanted = data[0] + 3
        assert client.total(data) == int(data[0]) * data.size
        changed = client.add(data, 3)
        assert changed[0] == changed[-1] == wanted
        assert data[0] == data[-1] == wanted - 3
        return 2

    def futures(self) -> int:
        client, data = self.client(), self.data()
        calls = [client.future.add(data, i % 50) for i in range(UNDER_WAY)]
        for i in self.chance.sample(range(UNDER_WAY), UNDER_WAY // 3):
            calls[i].cancel()
        for i, call in enumerate(calls[: UNDER_WAY // 2]):
            try:
                assert call.result()[-1] == data[-1] + i % 50
            except (CallCancelled, Overloaded):
                self.tally["cancelled"] += 1
        del calls, call  # nobody waits for the other half
        return UNDER_WAY

    def awaited(self) -> int:
        client, data = self.client(), self.data()

        async def all_of_them() -> None:
            async with client.aio as methods:
                calls = [methods.later(data) for _ in range(UNDER_WAY)]
                results = await asyncio.gather(*calls, return_exceptions=True)
                for result in results:
                    if isinstance(result, BaseException):
                        assert isinstance(result, (*AWAY, Overloaded)), repr(result)
                        self.tally["away"] += 1
                    else:
                        assert result[-1] == data[-1]
                with contextlib.suppress(TimeoutError, asyncio.TimeoutError, *AWAY):
                    await asyncio.wait_for(methods.nap(data, NAP_SECONDS), NAP_SECONDS / 4)

        asyncio.run(all_of_them())
        return UNDER_WAY + 1

    def refused(self) -> int:
        client, data = self.client(), self.data()
        for expected, method, *rest in (
            (ValueError, client.fail),
            (WrongArguments, client.add, "three"),
        ):
            try:
                method(data, *rest)
            except expected:
                continue
            raise AssertionError(f"{method} did not raise {expected}")
        return 2

    def late(self) -> int:
        client, data = self.client(), self.data()
        with contextlib.suppress(*LATE):  # a reply that is there is taken, however late
            client.using(timeout=NAP_SECONDS / 4).nap(data, NAP_SECONDS)
        return 1

    def anew(self) -> int:
        self.leave()
        return 0


def make_calls(at: At, count: int, seed: int) -> Tally:
    wind_up(at)
    caller = Caller(at.host, seed)
    made = 0
    while made < count:
        made += caller.some()
    caller.leave()
    caller.tally["calls"] = made
    return caller.tally


# ---------------------------------------------------------------- the tests


def a_round(
    servers: list[HostProcess],
    forwarder: HostProcess,
    clients: list[HostProcess],
    count: int,
    seed: int,
) -> Tally:
    """Serve, have the clients make count calls together, serve one service again meanwhile, stop."""
    for server, name in zip(servers, SERVICES, strict=True):
        server.call(serve, name)
    forwarder.call(forward)
    for i, client in enumerate(clients):
        client.start(make_calls, count // len(clients), 2 * seed + i)
    again = seed % len(servers)
    servers[again].call(serve_again, SERVICES[again])
    tally: Tally = collections.Counter()
    for client in clients:
        tally += client.result()
    for server in (forwarder, *servers):
        server.call(stop)
    return tally


def soak(calls: int, per_round: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # With an arena for each thread, how much of them is in use at once is chance, for a long time.
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    with running(size=128 << 20) as fabric:
        servers = [fabric.host(executed=True) for _ in SERVICES]
        forwarder = fabric.host(executed=True)
        clients = [fabric.host(executed=True) for _ in range(2)]
        hosts = [*servers, forwarder, *clients]
        before: list[tuple[int, int, int]] = []
        tally: Tally = collections.Counter()
        while tally["calls"] < calls:
            tally += a_round(servers, forwarder, clients, per_round, len(before) + tally["calls"])
            now = [host.call(belongings) for host in hosts]  # collects garbage as well
            fabric.wait_until(lambda audit: not audit["live_refs"] and not audit["in_use"])
            fabric.assert_sound()
            before = before or now
        assert set(tally) >= {"plain", "futures", "awaited", "refused", "late", "cancelled"}, tally
        for then, at_the_end in zip(before, now, strict=True):
            assert at_the_end[:2] == then[:2], (before, now, tally)
            assert at_the_end[2] < then[2] + GROWTH_BYTES, (before, now, tally)


def test_twenty_thousand_mixed_calls_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    soak(20_000, 5_000, monkeypatch)


@pytest.mark.slow
def test_a_million_mixed_calls_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    soak(1_000_000, 20_000, monkeypatch)
