"""The service that hosts have, and calls of it. Each call may end in the ways that its situation allows, and in no other."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

import dmrpc_cxl
from dmrpc_cxl.errors import (
    CallCancelled,
    DeadlineExceeded,
    OutOfFrames,
    Overloaded,
    PeerLost,
    RemoteError,
    ServiceExists,
    ServiceNotFound,
)
from dmrpc_cxl.rpc import Forwarder, move

from .board import Board
from .holdings import Claim, Held, Holdings, Violation, crc_of
from .plan import BALANCERS, SERVICES, SLOTS, Life

AWAY = (PeerLost, ServiceNotFound, Overloaded)
LATE = (DeadlineExceeded, CallCancelled)
AWAY_NAMES = {  # of what a service may raise that calls another one
    *("PeerLost", "ServiceNotFound", "ServiceStopping", "Overloaded"),
    *("DeadlineExceeded", "OutOfFrames"),
}
THREADS = 24  # more than there are callers: nested calls wait in circles otherwise
CALL_SECONDS = 60.0  # a call that takes longer was forgotten by somebody
CONNECT_SECONDS = 0.3
SIZES = (1, 100, 3_000, 20_000, 60_000)
MODES = ("auto", "value", "ref", "copy")
THRESHOLD = 8192
UNDER_WAY = 8
NAP_SECONDS = 0.003


class Work:
    """The service. What it is left with goes to the shelf of its host."""

    def __init__(self, holdings: Holdings) -> None:
        self._holdings = holdings
        self._lock = threading.Lock()
        self._clients: dict[str, Any] = {}

    def _client(self, name: str) -> Any:
        with self._lock:
            if name not in self._clients:
                self._clients[name] = connect(self._holdings.host, name, "auto")
            return self._clients[name]

    def _close_clients(self) -> None:
        with self._lock:
            for client in self._clients.values():
                client.close()
            self._clients.clear()

    def total(self, data: np.ndarray) -> int:
        return int(data.sum(dtype="u8"))

    def add(self, data: np.ndarray, n: int) -> np.ndarray:
        data += np.uint8(n)
        return data

    def echo(self, value: Any) -> Any:
        return value

    def keep(self, ref: dmrpc_cxl.Ref, crc: int, page_offset: int) -> int:
        """Keep a Ref."""
        self._holdings.shelf.append(Claim(ref, ref.nbytes, crc, page_offset))
        return ref.nbytes

    def give(self, nbytes: int) -> list[Any]:
        """Give a Ref away."""
        host = self._holdings.host
        buffer = host.ralloc(nbytes, zero=False)
        with memoryview(buffer) as view:
            view[:] = bytes([nbytes % 251]) * nbytes
            crc = crc_of(view)
        page_offset = buffer.address % host.page_size
        return [host.create_ref(buffer, move=True), crc, page_offset]

    def through(self, name: str, data: np.ndarray, n: int) -> np.ndarray:
        """Have another service add."""
        result: np.ndarray = self._client(name).add(data, n)
        return result

    def hand_on(self, name: str, data: np.ndarray, n: int) -> np.ndarray:
        """Have another service add to the very same memory."""
        mine = self._holdings.host.contains(data)
        result: np.ndarray = self._client(name).add(move(data) if mine else data, n)
        return result

    def fail(self, data: np.ndarray) -> None:
        raise ValueError("as asked")

    def nap(self, data: np.ndarray, seconds: float) -> np.ndarray:
        threading.Event().wait(seconds)
        return data

    async def later(self, data: np.ndarray) -> np.ndarray:
        await asyncio.sleep(0)
        return data


def connect(host: dmrpc_cxl.Host, name: str, transport: Any) -> Any:
    return host.connect(
        name, transport=transport, timeout=CALL_SECONDS, connect_timeout=CONNECT_SECONDS
    )


class Services:
    """What a host serves."""

    def __init__(self, life: Life, holdings: Holdings, give_up: Callable[[], bool]) -> None:
        """Serve what the plan says; return when give_up() says that it is of no use."""
        self._life = life
        self.work = Work(holdings)
        self.ends: list[Any] = []
        host = holdings.host
        if life.serves:
            name = SERVICES[life.slot]
            self._begin(lambda: host.serve(self.work, name=name, threads=THREADS), give_up)
        self._host = host

    def balance(self) -> None:
        """Start the forwarder, if there shall be one and it finds a backend."""
        life = self._life
        if life.balances and not any(isinstance(end, Forwarder) for end in self.ends):
            with contextlib.suppress(*AWAY, DeadlineExceeded, ServiceExists):
                self.ends.append(
                    Forwarder(self._host, BALANCERS[life.slot], life.balances, connect_timeout=0.1)
                )

    def _begin(self, make: Callable[[], Any], give_up: Callable[[], bool]) -> None:
        """Make a server. The name is still taken while the slot's last process is being reclaimed."""
        while not give_up():
            try:
                self.ends.append(make())
                return
            except ServiceExists:
                threading.Event().wait(0.005)

    def close_clients(self) -> None:
        self.work._close_clients()

    def stop(self) -> None:
        for end in self.ends:
            end.stop()
        self.ends.clear()
        self.close_clients()


class Calls:
    """The calls that a host makes."""

    def __init__(self, life: Life, board: Board, holdings: Holdings) -> None:
        self.life = life
        self.board = board
        self.holdings = holdings
        self.host = holdings.host
        self.tally: Counter[str] = Counter()
        self.lost: list[
            tuple[int, int]
        ] = []  # slot of a server that was lost, how often disturbed before
        self._clients: dict[str, tuple[Any, int]] = {}
        self._called: tuple[int, int] | None = None
        self.kinds: dict[Callable[[random.Random], None], int] = {
            self.total: 4,
            self.add: 6,
            self.add_moved: 3,
            self.keep: 4,
            self.give: 4,
            self.nested: 4,
            self.futures: 2,
            self.awaited: 1,
            self.refused: 2,
            self.late: 2,
            self.anew: 1,
        }

    def act(self, rng: random.Random) -> None:
        """Make one call, or some of one kind."""
        (kind,) = rng.choices(list(self.kinds), list(self.kinds.values()))
        self._called = None
        self.holdings.strike()
        began = time.monotonic()
        try:
            kind(rng)
            self.tally[kind.__name__] += 1
        except AWAY as error:
            self.tally["away"] += 1
            if self._called is not None and type(error) is PeerLost:
                self.lost.append(self._called)
        except OutOfFrames:
            self.tally["out of frames"] += 1
        except DeadlineExceeded as error:
            if time.monotonic() - began > CALL_SECONDS / 2:
                raise Violation(f"{self._where(kind.__name__)}: forgotten: {error}") from error
            self.tally["not connected in time"] += 1  # to one that is stopped
        except RemoteError as error:
            if error.remote_type.rpartition(".")[2] not in AWAY_NAMES:
                raise Violation(f"{self._where(kind.__name__)}: {error!r}") from error
            self.tally["away there"] += 1

    def _where(self, what: str) -> str:
        return f"slot {self.life.slot}, life {self.life.number}, {what}"

    def close_clients(self) -> None:
        for client, _ in self._clients.values():
            client.close()
        self._clients.clear()

    def _name(self, rng: random.Random) -> tuple[str, int]:
        slot = rng.randrange(SLOTS - 1)
        slot += slot >= self.life.slot
        return (BALANCERS if rng.random() < 0.15 else SERVICES)[slot], slot

    def _client(self, rng: random.Random) -> Any:
        name, slot = self._name(rng)
        transport = rng.choice(("auto", "ring", "tcp"))
        mode = rng.choice(MODES)
        disturbed = self.board.disturbed(slot)
        if name not in self._clients:
            client = connect(self.host, name, transport)
            self._clients[name] = client, disturbed
            self.tally["connects"] += 1
        client, disturbed = self._clients[name]
        if name in SERVICES:
            self._called = slot, disturbed
        return client.using(transfer=mode)

    def _data(self, rng: random.Random) -> np.ndarray:
        data = np.frombuffer(rng.randbytes(rng.choice(SIZES)), "u1")
        if rng.random() < 0.5:
            return self.host.array(data)
        return data.copy()

    def _same(self, found: Any, expected: Any, what: str) -> None:
        if not np.array_equal(found, expected):
            raise Violation(f"{self._where(what)}: another result than must be")

    def _take(self, rng: random.Random, result: np.ndarray, expected: np.ndarray) -> None:
        """Check a result, and perhaps keep it."""
        self._same(result, expected, "result")
        if rng.random() < 0.3 and self.host.contains(result):
            self.holdings.held.append(Held(result, bytearray(expected.tobytes())))

    # ---------------------------------------------------------------- kinds

    def total(self, rng: random.Random) -> None:
        client, data = self._client(rng), self._data(rng)
        self._same(client.total(data), int(data.sum(dtype="u8")), "total")

    def add(self, rng: random.Random) -> None:
        client, data, n = self._client(rng), self._data(rng), rng.randrange(256)
        before = bytes(data)
        expected = data + np.uint8(n)
        self._take(rng, client.add(data, n), expected)
        self._same(np.frombuffer(before, "u1"), data, "what was sent")

    def add_moved(self, rng: random.Random) -> None:
        client, n = self._client(rng), rng.randrange(256)
        data = self.host.array(np.frombuffer(rng.randbytes(rng.choice(SIZES)), "u1"))
        expected = data + np.uint8(n)
        self._take(rng, client.add(move(data), n), expected)

    def keep(self, rng: random.Random) -> None:
        """Leave a Ref with the service; if the call fails, nobody has it any more."""
        client = self._client(rng)
        if not self.holdings.claims:
            return
        claim = self.holdings.claims.pop(rng.randrange(len(self.holdings.claims)))
        try:
            self._same(
                client.keep(claim.ref, claim.crc, claim.page_offset), claim.nbytes, "bytes kept"
            )
        finally:
            claim.ref.drop()

    def give(self, rng: random.Random) -> None:
        client, nbytes = self._client(rng), rng.randrange(1, 1 << 14)
        ref, crc, page_offset = client.give(nbytes)
        self._same(crc, crc_of(bytes([nbytes % 251]) * nbytes), "what was given")
        self.holdings.claims.append(Claim(ref, nbytes, crc, page_offset))

    def nested(self, rng: random.Random) -> None:
        client, data, n = self._client(rng), self._data(rng), rng.randrange(256)
        name = rng.choice(SERVICES)
        method = client.through if rng.random() < 0.5 else client.hand_on
        expected = data + np.uint8(n)
        self._take(rng, method(name, data, n), expected)

    def futures(self, rng: random.Random) -> None:
        client, data = self._client(rng), self._data(rng)
        calls = [client.future.add(data, i) for i in range(UNDER_WAY)]
        for i in rng.sample(range(UNDER_WAY), UNDER_WAY // 3):
            calls[i].cancel()
        for i, call in enumerate(calls[: UNDER_WAY - 2]):  # nobody waits for the last two
            with contextlib.suppress(CallCancelled):
                self._same(call.result(), data + np.uint8(i), "future")

    def awaited(self, rng: random.Random) -> None:
        client, data = self._client(rng), self._data(rng)

        async def all_of_them() -> None:
            async with client.aio as methods:
                calls = [methods.later(data) for _ in range(UNDER_WAY)]
                for result in await asyncio.gather(*calls, return_exceptions=True):
                    if not isinstance(result, BaseException):
                        self._same(result, data, "awaited")
                    elif not isinstance(result, AWAY):
                        raise result
                with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                    await asyncio.wait_for(methods.nap(data, NAP_SECONDS), NAP_SECONDS / 4)

        asyncio.run(all_of_them())

    def refused(self, rng: random.Random) -> None:
        client, data = self._client(rng), self._data(rng)
        try:
            client.fail(data)
        except ValueError as error:
            if not isinstance(error, RemoteError) or "as asked" not in str(error):
                raise
        else:
            raise Violation(self._where("a method that raises returned"))

    def late(self, rng: random.Random) -> None:
        client, data = self._client(rng), self._data(rng)
        with contextlib.suppress(*LATE):  # a reply that is there is taken, however late
            seconds = NAP_SECONDS * rng.choice((0.1, 0.5, 1))
            self._same(client.using(timeout=seconds).nap(data, NAP_SECONDS), data, "late")

    def anew(self, rng: random.Random) -> None:
        self.close_clients()
