"""Processes for the benchmarks of the RPC layer, and how two of anything are compared between them.

A stage is a fabric with one process per service; all of them stay alive while variants take turns, block by block, in an
order that is shuffled in every round. A block is timed from inside the client's process. The CPU time of a process is what
its CPU clock says (user and system, all threads), read by the client for all processes before and after each block.
"""

from __future__ import annotations

import itertools
import os
import random
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import dmrpc_cxl
from dmrpc_cxl.fabric import device
from dmrpc_cxl.rpc import Forwarder, Server

from .machine import median, quiet
from .peers import Peer, running_fabric

MIB = 1 << 20
SEED = 1
PINNED_CPU = 0
LEAVE_SECONDS = 10.0
SETTLE_SECONDS = 0.002  # what a server does behind its reply belongs to the block as well
COLD_BYTES = 64 * MIB  # ordinary arrays that take turns have so many bytes together
COLD_ARRAYS = 512  # but are no more than this


# ---------------------------------------------------------------- services, and where they run


class Worker:
    """What stands at the end of every chain."""

    def empty(self) -> None:
        return None

    def take(self, data: np.ndarray[Any, Any]) -> None:
        """Look at nothing."""

    def total(self, data: np.ndarray[Any, Any]) -> float:
        return float(data.sum())


_here: dict[str, Server | Forwarder] = {}
_clients: dict[tuple[str, str], Any] = {}
_arrays: dict[tuple[int, str], list[np.ndarray[Any, Any]]] = {}


def serve(host: dmrpc_cxl.Host, name: str, service: type = Worker, *args: Any) -> None:
    """Serve an object of a class in this process; it is given what args say (host, if they say so)."""
    _here[name] = host.serve(service(*args), name=name)


def forward(host: dmrpc_cxl.Host, name: str, backend: str, transport: str = "auto") -> None:
    """Run a forwarder in this process."""
    _here[name] = Forwarder(host, name, [backend], transport=transport)  # type: ignore[arg-type]


def _tcp_bytes(sock: socket.socket) -> int:
    """Return the bytes that a TCP socket has sent and its peer acknowledged."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return int.from_bytes(info[120:128], "little")  # tcpi_bytes_acked, since Linux 4.1


def traffic(host: dmrpc_cxl.Host | None) -> dict[str, int]:
    """Return what this process counted: bytes sent over its rings and sockets, sleeps, bytes copied by faults."""
    channels: list[Any] = [c._link.connection.channel for c in _clients.values()]
    for end in _here.values():
        peers: dict[int, Any] = end._connections if isinstance(end, Server) else end._peers
        channels += [peer.channel for peer in list(peers.values())]
    rings = [channel.ring.stats() for channel in channels if channel.kind == "ring"]
    stats = host.stats() if host is not None else {"bytes_copied": 0}
    return {
        "bytes_sent": sum(ring["bytes_sent"] for ring in rings),
        "tcp_bytes_sent": sum(
            _tcp_bytes(channel.socket) for channel in channels if channel.kind == "tcp"
        ),
        "sleeps": sum(ring["sleeps"] for ring in rings),
        "bells_rung": sum(ring["bells_rung"] for ring in rings),
        "bytes_copied": stats.get("bytes_copied", 0),  # without the pool nothing is
    }


def end(host: dmrpc_cxl.Host) -> None:
    """Let go of everything in this process."""
    _arrays.clear()
    for client in _clients.values():
        client.close()
    _clients.clear()
    for server in _here.values():
        server.stop()
    _here.clear()


class Stage:
    """A fabric, a coordinator, and processes by name; pin() moves all of them."""

    def __init__(self, fabric: str, coordinator: int) -> None:
        self.fabric = fabric
        self.pids = {"coordinator": coordinator}
        self.peers: dict[str, Peer] = {}

    def start(
        self,
        name: str,
        function: Callable[..., Any] | None = None,
        *args: Any,
        attached: bool = True,
        **options: Any,
    ) -> Peer:
        """Start a process, attached with options, and have it run function(host, name, *args)."""
        peer = self.peers[name] = Peer(self.fabric if attached else None, **options)
        self.pids[name] = peer.pid
        if function is not None:
            peer.call(function, name, *args)
        return peer

    def chain(self, prefix: str, nr_calls: int, transport: str = "auto") -> list[str]:
        """Start a worker and forwarders in front of it; return the names to call for 1, 2, ... calls in a row."""
        names = [f"{prefix}worker"]
        self.start(names[0], serve)
        for i in range(1, nr_calls):
            names.append(f"{prefix}forwarder-{i}")
            self.start(names[-1], forward, names[-2], transport)
        return names

    def pin(self, cpu: int | None) -> None:
        """Put every thread of every process on one CPU; None: on any."""
        cpus = range(os.cpu_count() or 1) if cpu is None else {cpu}
        for pid in self.pids.values():
            for task in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(task.name), cpus)

    def leave(self) -> None:
        """End every process, clients first."""
        for peer in reversed(self.peers.values()):
            peer.call(end)
        for peer in reversed(self.peers.values()):
            peer.leave()


@contextmanager
def stage(size: int = 512 * MIB, **geometry: Any) -> Iterator[Stage]:
    """Run a stage; geometry: more of the device, as device.create() takes it."""
    with running_fabric(size, **geometry) as (name, pid):
        made = Stage(name, pid)
        try:
            yield made
        except BaseException:
            for peer in made.peers.values():
                peer.kill()
            raise
        made.leave()
        _expect_all_free(name)


def _expect_all_free(fabric: str) -> None:
    """Check that every frame is back and no Ref alive, now that everybody has left; the coordinator may still be at it."""
    give_up = time.monotonic() + LEAVE_SECONDS
    with device.open(fabric, writable=False) as opened:
        while True:
            audit = opened.audit()
            held = {what: audit[what] for what in ("in_use", "live_refs", "nr_violations")}
            if not any(held.values()):
                return
            if time.monotonic() > give_up:
                raise AssertionError(f"everybody has left {fabric}, and yet: {held}")
            time.sleep(SETTLE_SECONDS)


PLACES: tuple[tuple[str, int | None], ...] = (("one CPU", PINNED_CPU), ("free", None))


# ---------------------------------------------------------------- blocks, in the client's process


@dataclass
class Sample:
    """One block, per call."""

    wall_ns: float
    cpu_ns: dict[str, float]  # by process
    p50_ns: float = 0.0
    p99_ns: float = 0.0

    @property
    def total_cpu_ns(self) -> float:
        return sum(self.cpu_ns.values())


@dataclass(frozen=True)
class Load:
    """Calls to make: one argument or none, sent in a certain way."""

    service: str
    method: str = "total"
    size: int = 0  # bytes; 0: no argument
    source: str = "fresh"  # "dm": one array in DM, sent each time; "fresh": ordinary arrays in turn
    transfer: str = "ref"
    transport: str = "auto"
    calls: int = 100
    window: int = 1  # calls under way; 1: synchronous calls


@dataclass
class Block:
    """A load, made ready: run() returns the ns of each call and its result."""

    run: Callable[[], tuple[list[int], list[Any]]]
    calls: int
    check: Callable[[list[Any]], None] = field(default=lambda results: None)


def cpu_clocks(pids: dict[str, int]) -> dict[str, float]:
    """Return the CPU time in ns of processes so far."""
    return {name: time.clock_gettime_ns(~pid << 3 | 2) for name, pid in pids.items()}


def alternate(
    blocks: dict[str, Block], pids: dict[str, int], rounds: int, warm: int = 1
) -> dict[str, list[Sample]]:
    """Run every block once per round, in a new order each time."""
    samples: dict[str, list[Sample]] = {name: [] for name in blocks}
    order = list(blocks)
    shuffled = random.Random(SEED)
    for i in range(-warm, rounds):
        shuffled.shuffle(order)
        for name in order:
            block = blocks[name]
            with quiet():
                before = cpu_clocks(pids)
                begin = time.perf_counter_ns()
                latencies, results = block.run()
                wall = time.perf_counter_ns() - begin
                time.sleep(SETTLE_SECONDS)
                after = cpu_clocks(pids)
            block.check(results)
            del results
            n = block.calls
            sample = Sample(wall / n, {who: (after[who] - before[who]) / n for who in pids})
            if latencies:
                sample.p50_ns, sample.p99_ns = np.percentile(latencies, (50, 99)).tolist()
            if i >= 0:
                samples[name].append(sample)
    return samples


def _payload(host: dmrpc_cxl.Host, size: int, source: str) -> list[np.ndarray[Any, Any]]:
    key = (size, source)
    if key not in _arrays:
        nr = 1 if source == "dm" else min(max(COLD_BYTES // size, 4), COLD_ARRAYS)
        made = [np.full(size // 4, i % 7 + 1, "f4") for i in range(nr)]
        _arrays[key] = [host.array(array) for array in made] if source == "dm" else made
    return _arrays[key]


def client_of(host: dmrpc_cxl.Host, service: str, transport: str = "auto") -> Any:
    """Return this process's client of a service."""
    key = (service, transport)
    if key not in _clients:
        _clients[key] = host.connect(service, transport=transport)
    return _clients[key]


def prepare(host: dmrpc_cxl.Host, load: Load) -> Block:
    """Make a load ready: payload made, client connected."""
    client = client_of(host, load.service, load.transport).using(transfer=load.transfer)
    if not load.size:
        arguments: Iterator[tuple[Any, ...]] = itertools.repeat(())
    else:
        arrays = _payload(host, load.size, load.source)
        arguments = itertools.cycle([(array,) for array in arrays])
    expected = itertools.cycle(
        [float(array[0]) * array.size for array in _payload(host, load.size, load.source)]
        if load.size and load.method == "total"
        else [None]
    )
    calls = load.calls
    now = time.perf_counter_ns

    def one_by_one() -> tuple[list[int], list[Any]]:
        method = getattr(client, load.method)
        latencies, results = [0] * calls, [None] * calls
        for i in range(calls):
            given = next(arguments)
            begin = now()
            results[i] = method(*given)
            latencies[i] = now() - begin
        return latencies, results

    def pipelined() -> tuple[list[int], list[Any]]:
        method = getattr(client.future, load.method)
        futures: list[Any] = []
        results = []
        for i in range(calls):
            if i >= load.window:
                results.append(futures[i - load.window].result())
                futures[i - load.window] = None
            futures.append(method(*next(arguments)))
        results += [one.result() for one in futures if one is not None]
        return [], results

    def check(results: list[Any]) -> None:
        wanted = list(itertools.islice(expected, len(results)))
        if any(got != want for got, want in zip(results, wanted, strict=True)):
            raise AssertionError(f"{load}: wrong results")

    return Block(one_by_one if load.window == 1 else pipelined, calls, check)


def measure(
    host: dmrpc_cxl.Host, loads: Sequence[Load], pids: dict[str, int], rounds: int, warm: int = 1
) -> list[list[Sample]]:
    """Run loads in turn; return the samples of each."""
    blocks = {str(i): prepare(host, load) for i, load in enumerate(loads)}
    samples = alternate(blocks, pids, rounds, warm)
    return [samples[str(i)] for i in range(len(loads))]


# ---------------------------------------------------------------- ratios


def ratios(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum of the ratios within rounds."""
    each = [a / b for a, b in zip(over, under, strict=True)]
    return {"median": median(each), "min": min(each), "max": max(each)}


def walls(samples: Sequence[Sample]) -> list[float]:
    return [sample.wall_ns for sample in samples]


def medians(samples: Sequence[Sample]) -> list[float]:
    return [sample.p50_ns for sample in samples]


def cpus(samples: Sequence[Sample], *who: str) -> list[float]:
    """Return CPU ns per call, of some processes or of all."""
    if not who:
        return [sample.total_cpu_ns for sample in samples]
    return [sum(sample.cpu_ns[name] for name in who) for sample in samples]
