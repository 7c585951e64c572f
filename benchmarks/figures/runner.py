"""Measure cases against each other: every process stays alive, short blocks take turns in random order.

A *case* is one point of one line: a variant, a mode, a size, and so on. In each round every case gets one block, in an order
that is shuffled anew. So whatever disturbs the machine for a while disturbs all of them, and what is compared are the ratios
within rounds. A block is as long as the run asks for: how many requests that are is found out while warming up.

CPU time is what the CPU clocks of processes say, user and system, all threads: of the ones that send requests read by
themselves around the block, of the others read here, before and after.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import psutil

from dmrpc_cxl.fabric import device

from .. import machine, rpc_stage
from ..peers import PeerFailed
from ..rpc_stage import SETTLE_SECONDS, Stage, traffic
from . import blocks
from .blocks import Block, Taken

SEED = 1
PATIENCE_SECONDS = 120.0  # for one block
MIN_REQUESTS, MAX_REQUESTS = 4, 20_000
PROBE_REQUESTS = 4
TINY_DEVICE = 256 << 20
FAMILY_SECONDS = 5.0  # a look at all processes takes as long as some blocks


@dataclass
class Options:
    """How much to measure.

    Attributes:
        rounds: blocks of each case.
        seconds: of one block, about.
        quick: fewer points.
        variants: names of those to measure; others are left out.
        places: "one CPU", "free" or both.
        transports: "ring", "tcp" or both.
    """

    rounds: int = 5
    seconds: float = 0.15
    quick: bool = False
    variants: frozenset[str] | None = None
    places: tuple[str, ...] = ("one CPU", "free")
    transports: tuple[str, ...] = ("ring", "tcp")
    tiny: bool = False  # a test: one size, one place

    def wants(self, variant: str) -> bool:
        """Say whether a variant is to be measured."""
        return self.variants is None or variant in self.variants


@dataclass
class Case:
    """One point of one line.

    Attributes:
        variant: its name in the registry.
        mode: "fresh", "pre-shared" or what else the experiment tells apart.
        params: what else makes this point: size, hops, transport ...; plain values.
        clients: names of the processes that send requests, at once.
        factory: factory(host, **arguments) makes the block, in each of them.
        processes: names of all other processes that work for it.
        pids: process ids beyond those, asked for before every block: children that come and go.
    """

    variant: str
    mode: str
    params: dict[str, Any]
    clients: tuple[str, ...]
    factory: Callable[..., Block]
    arguments: dict[str, Any]
    processes: tuple[str, ...] = ()
    pids: Callable[[], Mapping[str, int]] | None = None
    seconds: float | None = None  # of one block, if not the run's
    max_requests: int = MAX_REQUESTS
    traffic: bool = True  # its processes have a host, and rings or sockets
    before: Callable[[], None] | None = None  # called before every block of it
    gauges: Callable[[], Mapping[str, float]] | None = None  # more to read before and after a block
    requests: int = 0  # in one block; found out while warming up
    fastest: float = float("inf")  # seconds for a request, in the fastest block so far

    @property
    def label(self) -> str:
        """Return a line for people."""
        told = ", ".join(f"{key} {value}" for key, value in self.params.items())
        return f"{self.variant} ({self.mode}), {told}"


@dataclass
class Sample:
    """One block: times of all its requests together, counters as differences over it."""

    requests: int
    wall_ns: float
    cpu_ns: dict[str, float]
    counters: dict[str, float]
    histogram: bytes
    block_ns: float = 0.0  # the whole block, with what is not timed

    @property
    def per_second(self) -> float:
        """Requests per second."""
        return self.requests * 1e9 / self.wall_ns

    @property
    def cpu_us(self) -> float:
        """CPU time of one request in us, all processes."""
        return sum(self.cpu_ns.values()) / self.requests / 1e3

    def each(self, counter: str) -> float:
        """Return a counter per request."""
        return self.counters[counter] / self.requests


@dataclass
class Series:
    """A case and its blocks, one for each round."""

    case: Case
    samples: list[Sample] = field(default_factory=list)


class Ticker:
    """Is told how far a measurement has come; this one says nothing."""

    def begin(self, what: str, blocks: int) -> None:
        """Begin with so many blocks."""

    def advance(self, case: Case) -> None:
        """Count one block."""

    def end(self) -> None:
        """End what was begun last."""


class Runner:
    """Measures cases on a stage."""

    def __init__(self, on: Stage, options: Options, ticker: Ticker | None = None) -> None:
        self.on = on
        self.options = options
        self.ticker = ticker or Ticker()
        self.place: str | None = None
        self.foreign: list[Callable[[], Mapping[str, int]]] = []  # processes to pin along
        self._random = random.Random(SEED)
        self._device = device.open(on.fabric)

    def close(self) -> None:
        """Let go of the device."""
        self._device.close()

    def pin(self, place: str) -> None:
        """Put every process on one CPU, or on all of them."""
        cpu = rpc_stage.PINNED_CPU if place == "one CPU" else None
        self.on.pin(cpu)
        for pids in self.foreign:
            pin_processes(pids().values(), cpu)
        self.place = place

    def measure(
        self, cases: Sequence[Case], what: str = "", rounds: int | None = None
    ) -> list[Series]:
        """Measure cases against each other; return what was measured, in the same order.

        Args:
            rounds: if not the run's.

        Raises:
            PeerFailed: something failed, or a result was wrong.
        """
        order = [(str(i), case) for i, case in enumerate(cases)]
        found = [Series(case) for case in cases]
        rounds = rounds or self.options.rounds
        self.ticker.begin(what, (rounds + 1) * len(order))
        try:
            for key, case in order:
                for client in case.clients:
                    self.on.peers[client].call(blocks.make, key, case.factory, case.arguments)
            for key, case in order:
                self._probe(key, case)
            for i in range(rounds):
                self._random.shuffle(order)
                for key, case in order:
                    sample = self._block(key, case, case.requests, wire=i == 0)
                    found[int(key)].samples.append(sample)
                    self._adapt(case, sample)
                    self.ticker.advance(case)
            for client in {client for _, case in order for client in case.clients}:
                keys = [key for key, case in order if client in case.clients]
                self.on.peers[client].call(blocks.forget, keys)
        finally:
            self.ticker.end()
        return found

    def _probe(self, key: str, case: Case) -> None:
        """Warm up, and find out how many requests make a block."""
        seconds = case.seconds or self.options.seconds
        requests = min(PROBE_REQUESTS, case.max_requests)
        while True:
            sample = self._block(key, case, requests)
            self._adapt(case, sample)
            enough = sample.block_ns / 1e9 > seconds / 4 or requests * 4 > case.max_requests
            if enough or requests >= PROBE_REQUESTS << 10:
                break
            requests *= 4
        self.ticker.advance(case)

    def _adapt(self, case: Case, sample: Sample) -> None:
        """Make blocks as long as they should be, by the fastest block so far: what disturbed others is not theirs."""
        each = sample.block_ns / 1e9 / sample.requests
        case.fastest = min(each, case.fastest)
        wanted = int((case.seconds or self.options.seconds) / case.fastest)
        case.requests = max(min(wanted, case.max_requests), min(MIN_REQUESTS, case.max_requests))

    def _counters(self, case: Case, wire: bool) -> dict[str, float]:
        """Return what the DM layer of all hosts and the transports of this case's processes have counted so far."""
        if not case.traffic:
            return {}
        total: dict[str, float] = {}
        if case.gauges is not None:
            total |= case.gauges()
        for host in self._device.hosts():
            for name, value in host["counters"].items():
                total[name] = total.get(name, 0) + value
        for name in (*case.clients, *case.processes) if wire else ():
            total.setdefault("sent_bytes", 0)
            peer = self.on.peers.get(name)
            if peer is not None:
                sent = peer.call(traffic)
                total["sent_bytes"] += sent["bytes_sent"] + sent["tcp_bytes_sent"]
                for extra in ("sleeps", "bells_rung"):
                    total[extra] = total.get(extra, 0) + sent[extra]
        return total

    def _block(self, key: str, case: Case, requests: int, wire: bool = False) -> Sample:
        """Run one block; wire: ask every process what it has sent, which takes longer than some blocks."""
        if case.before is not None:
            case.before()
        pids = {name: self.on.pids[name] for name in case.processes}
        if case.pids is not None:
            pids |= case.pids()
        counted = self._counters(case, wire)
        share = -(-requests // len(case.clients))
        peers = [self.on.peers[client] for client in case.clients]
        before = clocks(pids)
        for peer in peers:
            peer.begin(blocks.run, key, share)
        try:
            taken: list[Taken] = [peer.result(PATIENCE_SECONDS) for peer in peers]
        except PeerFailed as error:
            raise PeerFailed(f"{case.label}, {self.place}: {error}") from None
        time.sleep(SETTLE_SECONDS)
        after = clocks(pids)
        counters = {
            name: value - counted.get(name, 0) for name, value in self._counters(case, wire).items()
        }
        counters["minor_faults"] = sum(one.minor_faults for one in taken)
        for one in taken:
            for name, value in one.counts.items():
                counters[name] = counters.get(name, 0) + value
        cpu: dict[str, float] = {
            name: after[name] - before[name] for name in pids if name in before and name in after
        }
        for client, one in zip(case.clients, taken, strict=True):
            cpu[client] = one.cpu_ns
        block_ns = max(one.end_ns for one in taken) - min(one.begin_ns for one in taken)
        return Sample(
            share * len(taken),
            counters.pop("timed_ns", 0) or block_ns,
            cpu,
            counters,
            merged(one.histogram for one in taken),
            block_ns,
        )


def merged(encoded: Iterable[bytes]) -> bytes:
    """Return several histograms as one."""
    each = [one for one in encoded if one]
    if len(each) <= 1:
        return each[0] if each else b""
    total = blocks.histogram()
    for one in each:
        total.decode_and_add(one)
    return bytes(total.encode())


def clocks(pids: Mapping[str, int]) -> dict[str, float]:
    """Return the CPU time in ns of processes so far; those that have ended are left out."""
    found = {}
    for name, pid in pids.items():
        with contextlib.suppress(OSError):
            found[name] = float(time.clock_gettime_ns(~pid << 3 | 2))
    return found


_families: dict[int, tuple[float, dict[str, int]]] = {}


def family(pid: int) -> dict[str, int]:
    """Return a process and all that descend from it, by name and id; as of a few seconds ago at most."""
    known = _families.get(pid)
    if known is not None and time.monotonic() - known[0] < FAMILY_SECONDS:
        return known[1]
    found = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(pid)
        for process in (top, *top.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                found[f"{process.name()}-{process.pid}"] = process.pid
    _families[pid] = time.monotonic(), found
    return found


def pin_processes(pids: Iterable[int], cpu: int | None) -> None:
    """Put every thread of processes on one CPU; None: on any."""
    cpus = range(os.cpu_count() or 1) if cpu is None else {cpu}
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            for thread in psutil.Process(pid).threads():
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(thread.id, cpus)


@contextlib.contextmanager
def running(
    options: Options, ticker: Ticker | None = None, size: int = 512 << 20, **geometry: Any
) -> Iterator[Runner]:
    """Run a stage and a runner on it; geometry: more of its device."""
    with rpc_stage.stage(TINY_DEVICE if options.tiny else size, **geometry) as on:
        runner = Runner(on, options, ticker)
        try:
            yield runner
        finally:
            runner.close()


def facts() -> dict[str, Any]:
    """Return what somebody needs who compares two runs."""
    return machine.facts()
