"""Making requests: on schedule, whatever has become of those before (an open loop), or so many at a time (a closed one).

In an open loop the gaps between requests are drawn from an exponential distribution. A latency runs from the moment that a request
was to be sent, so a generator that is late hides nothing; by how much it was late is kept as well. Latencies go into
HdrHistograms, in ns, one for each kind of request.

Who asks reads the posts: a latency ends when they are decoded.

One event loop makes all requests. It waits by select(), for asyncio's other selectors wait in whole milliseconds.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import math
import random
import selectors
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from hdrh.histogram import HdrHistogram

import dmrpc_cxl
from dmrpc_cxl.errors import DmError
from dmrpc_cxl.rpc.endpoint import Transport

from .records import Front, Kind, Reply, Request, failure_of
from .roles import LOAD_BALANCER, PATIENCE_SECONDS
from .variants import VARIANTS

CONNECTIONS = 4
LONGEST_NS = 3600 * 10**9
DIGITS = 3
BACKLOG_SECONDS = 2.0
KINDS = (Kind.HOME_TIMELINE, Kind.USER_TIMELINE, Kind.COMPOSE)


def histogram() -> HdrHistogram:
    """Return an empty histogram of ns."""
    return HdrHistogram(1, LONGEST_NS, DIGITS)


@dataclass
class Tally:
    """What a loop has done, without its warm-up."""

    seconds: float = 0.0
    """Until the last request was done."""
    scheduled_seconds: float = 0.0
    """Until the last request was to be sent; of an open loop."""
    offered: int = 0
    done: int = 0
    nr_posts: int = 0
    aborted: bool = False
    """Requests were under way for BACKLOG_SECONDS that should have been done long ago: the rate is too high."""
    errors: Counter[str] = field(default_factory=Counter)
    latencies: dict[Kind, HdrHistogram] = field(
        default_factory=lambda: {kind: histogram() for kind in KINDS}
    )
    each_ns: list[int] = field(default_factory=list)
    """The same, one by one, in the order in which requests ended."""
    lag: HdrHistogram = field(default_factory=histogram)
    """By how much requests were sent late."""

    @property
    def per_second(self) -> float:
        """Requests done per second."""
        return self.done / self.seconds if self.seconds else 0.0

    def overall(self) -> HdrHistogram:
        """Return the latencies of all kinds."""
        total = histogram()
        for one in self.latencies.values():
            total.add(one)
        return total

    def add(self, other: Tally) -> None:
        """Add what another loop has done."""
        self.seconds += other.seconds
        self.scheduled_seconds += other.scheduled_seconds
        self.offered += other.offered
        self.done += other.done
        self.nr_posts += other.nr_posts
        self.aborted |= other.aborted
        self.errors.update(other.errors)
        for kind, one in other.latencies.items():
            self.latencies[kind].add(one)
        self.each_ns += other.each_ns
        self.lag.add(other.lag)


class Generator:
    """A user of the services: one event loop, a few connections to the load balancer.

    Args:
        host: of this process.
        variant: how lists of posts travel, a name of VARIANTS.
        timeout: seconds for a request.
        patience: seconds to look for a load balancer that was lost.
    """

    def __init__(
        self,
        host: dmrpc_cxl.Host,
        variant: str = "cxl",
        *,
        transport: Transport = "auto",
        connections: int = CONNECTIONS,
        service: str = LOAD_BALANCER,
        timeout: float = 10.0,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self.variant = VARIANTS[variant]
        self.host = host
        self._clients: list[Any] = [
            host.connect(
                service,
                Front,
                transport=transport,
                transfer=self.variant.transfer,
                timeout=timeout,
                connect_timeout=patience,
            )
            for _ in range(connections)
        ]
        self._turn = itertools.cycle(self._clients)
        self._loop = asyncio.SelectorEventLoop(selectors.SelectSelector())

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connections."""
        for client in self._clients:
            client.close()
        self._loop.run_until_complete(asyncio.sleep(0))  # what they have to say to the loop
        self._loop.close()

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received so far."""
        each = [client.traffic for client in self._clients]
        return sum(sent for sent, _ in each), sum(received for _, received in each)

    def ask(self, request: Request) -> Reply:
        """Make one request, and wait."""
        reply: Reply = self._clients[0].handle(request)
        return reply

    async def _one(self, request: Request, scheduled: float, tally: Tally | None) -> None:
        client = next(self._turn)
        try:
            reply = await client.aio.handle(request)
            posts = self.variant.posts(self.host, reply)
        except DmError as error:
            if tally is not None:
                tally.errors[type(failure_of(error) or error).__name__] += 1
            return
        if tally is not None:
            took = max(int((time.perf_counter() - scheduled) * 1e9), 1)
            tally.done += 1
            tally.nr_posts += len(posts)
            tally.each_ns.append(took)
            tally.latencies[request.kind].record_value(took)

    def open_loop(
        self,
        requests: Sequence[Request],
        rate: float,
        seconds: float | None = None,
        *,
        count: int | None = None,
        warm_up: float = 0.5,
        seed: int = 1,
    ) -> Tally:
        """Make requests on schedule, for a while or so many that count, and wait for the last.

        Args:
            requests: in turn.
            rate: per second, on average.
            warm_up: seconds before those that count.
        """
        if (seconds is None) == (count is None):
            raise ValueError("open_loop: for how long, or how many?")
        end = math.inf if seconds is None else seconds
        most = math.inf if count is None else count
        return self._run(self._open(requests, rate, end, most, warm_up, random.Random(seed)))

    async def _open(
        self,
        requests: Sequence[Request],
        rate: float,
        seconds: float,
        most: float,
        warm_up: float,
        draw: random.Random,
    ) -> Tally:
        tally = Tally()
        under_way: dict[asyncio.Task[None], float] = {}
        now = time.perf_counter
        begin = now() + warm_up
        due = now()
        for request in itertools.cycle(requests):
            due += draw.expovariate(rate)
            if due >= begin + seconds or tally.offered >= most:
                break
            wait = due - now()
            await asyncio.sleep(max(wait, 0))  # at least one look at replies before each request
            counted = tally if due >= begin else None
            if counted is not None:
                counted.offered += 1
                counted.scheduled_seconds = due - begin
                counted.lag.record_value(max(int((now() - due) * 1e9), 1))
            task = self._loop.create_task(self._one(request, due, counted))
            under_way[task] = due
            task.add_done_callback(under_way.pop)
            if now() - min(due, next(iter(under_way.values()))) > BACKLOG_SECONDS:
                tally.aborted = True
                break
        if under_way:
            await asyncio.wait(list(under_way))
        tally.seconds = max(now() - begin, 1e-9)
        return tally

    def closed_loop(
        self,
        requests: Sequence[Request],
        seconds: float | None = None,
        *,
        count: int | None = None,
        window: int = 8,
        warm_up: float = 0.2,
    ) -> Tally:
        """Keep so many requests under way, for a while or until so many have counted; latencies run from sending."""
        if (seconds is None) == (count is None):
            raise ValueError("closed_loop: for how long, or how many?")
        end = math.inf if seconds is None else seconds
        most = math.inf if count is None else count
        return self._run(self._closed(itertools.cycle(requests), end, most, window, warm_up))

    async def _closed(
        self,
        requests: Iterator[Request],
        seconds: float,
        most: float,
        window: int,
        warm_up: float,
    ) -> Tally:
        tally = Tally()
        now = time.perf_counter
        begin = now() + warm_up

        async def one_after_another() -> None:
            while (sent := now()) < begin + seconds and tally.offered < most:
                counted = tally if sent >= begin else None
                if counted is not None:
                    counted.offered += 1
                await self._one(next(requests), sent, counted)

        await asyncio.gather(*(one_after_another() for _ in range(window)))
        tally.seconds = max(now() - begin, 1e-9)
        return tally

    def _run(self, what: Any) -> Tally:
        was_enabled = gc.isenabled()
        gc.collect()
        gc.disable()
        try:
            tally: Tally = self._loop.run_until_complete(what)
            return tally
        finally:
            if was_enabled:
                gc.enable()
