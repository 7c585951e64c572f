"""What crashes cost those who live: a host that is killed with 1 GiB, a coordinator that is killed under load.

`python -m benchmarks.crash_recovery`; also part of `make bench`.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import dmrpc_cxl
from dmrpc_cxl.coordinator.client import Client
from dmrpc_cxl.fabric import device

from .machine import bar, median
from .peers import Peer

GIB = 1 << 30
MIB = 1 << 20
PAGE = 4096
ARGUMENT = 64 * 1024
RUNS = 3
KILLS = 5
ALONE_SECONDS = 1.0


class Served:
    """A device and its coordinator, which may be killed and started again."""

    def __init__(self, size: int) -> None:
        self.name = f"dmrpc-bench-{os.getpid()}"
        device.create(self.name, size=size, overwrite=True)
        self.device = device.open(self.name)
        self.start()

    def start(self) -> float:
        """Start a coordinator; return the seconds until it serves."""
        began = time.perf_counter()
        ready, write = os.pipe()
        self.coordinator = subprocess.Popen(
            [
                *(sys.executable, "-m", "dmrpc_cxl.coordinator", self.name),
                *("--ready-fd", str(write), "--log-level", "error"),
            ],
            pass_fds=[write],
        )
        os.close(write)
        with os.fdopen(ready, "rb") as pipe:
            if not pipe.readline():
                raise RuntimeError("the coordinator did not start; its message is above")
        return time.perf_counter() - began

    def stats(self) -> dict[str, Any]:
        with Client.of(self.device) as client:
            return client.stats()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.coordinator.terminate()
        self.coordinator.wait()
        self.device.close()
        device.remove(self.name, force=True)


# ---------------------------------------------------------------- in the hosts

_kept: list[Any] = []


class Sum:
    """What the survivors call."""

    def first(self, values: Any) -> int:
        """Read one byte of what came by Ref."""
        return int(values[0])


def serve(host: dmrpc_cxl.Host, name: str) -> None:
    _kept.append(host.serve(Sum(), name=name))


def hold(host: dmrpc_cxl.Host, size: int) -> None:
    """Allocate `size` bytes and store to each page."""
    array = host.zeros(size, "u1")
    array[::PAGE] = 1
    _kept.append(array)


def hold_scattered(host: dmrpc_cxl.Host, size: int) -> None:
    """Keep every other page of `size` bytes: the pool gets as many runs as it can have."""
    pages = [host.ralloc(PAGE) for _ in range(size // PAGE)]
    _kept.append(pages[::2])
    del pages[1::2]


def let_go(host: dmrpc_cxl.Host) -> None:
    _kept.clear()


def call_for(host: dmrpc_cxl.Host, service: str, seconds: float) -> list[float]:
    """Call as fast as possible for so long; return when each call ended."""
    client: Any = host.connect(service)
    array = host.zeros(ARGUMENT, "u1")
    ends: list[float] = []
    give_up = time.perf_counter() + seconds
    while not ends or ends[-1] < give_up:
        client.first(array)
        ends.append(time.perf_counter())
    client.close()
    return ends


def rate(ends: list[float], begin: float, end: float) -> float:
    """Return the calls per second that ended between two times."""
    return sum(begin <= at < end for at in ends) / (end - begin)


def _cpu_seconds(pid: int) -> float:
    return time.clock_gettime(_clock_of(pid))


def _clock_of(pid: int) -> int:
    return (~pid << 3) | 2  # clock_getcpuclockid(3)


def _until(true: Callable[[], bool]) -> float:
    give_up = time.perf_counter() + 60
    while not true():
        if time.perf_counter() > give_up:
            raise RuntimeError("did not come true within 60 s")
        time.sleep(0.0005)
    return time.perf_counter()


# ---------------------------------------------------------------- a host is killed


def host_killed() -> list[dict[str, Any]]:
    """Kill a host that holds 1 GiB while two others call each other."""
    work, native, walls, longest = [], [], [], []
    losses, during, exits = [], [], []
    with Served(2 * GIB) as served:
        server = Peer(served.name)
        server.call(serve, "sum")
        caller = Peer(served.name)
        for _ in range(KILLS):
            victim = Peer(served.name)
            victim.call(hold, GIB)
            caller.begin(call_for, "sum", 2 * ALONE_SECONDS)
            time.sleep(ALONE_SECONDS)
            pid, cpu = served.coordinator.pid, _cpu_seconds(served.coordinator.pid)
            killed = time.perf_counter()
            os.kill(victim.pid, signal.SIGKILL)
            gone = _until(lambda: served.device.host(3)["state"] == 0)
            work.append((_cpu_seconds(pid) - cpu) * 1e3)
            walls.append((gone - killed) * 1e3)
            report = served.stats()["reclaims"][-1]
            native.append(report["report"]["duration_ns"] / 1e6)
            ends = caller.result()
            # The kernel takes the dead process apart before anybody hears of its end: that is not ours.
            reclaim = gone - report["seconds"]
            before = rate(ends, killed - 0.8 * ALONE_SECONDS, killed)
            losses.append(100 * (1 - rate(ends, killed, killed + 0.5) / before))
            during.append(100 * (1 - rate(ends, reclaim, max(gone, reclaim + 0.02)) / before))
            exits.append(100 * (1 - rate(ends, killed, reclaim) / before))
            near = [at for at in ends if killed - 0.05 <= at <= gone + 0.05]
            longest.append(1e3 * max(b - a for a, b in itertools.pairwise(near)))
        caller.leave()
        server.call(end)
        server.leave()
    return [
        bar(
            "reclaim of a killed host's 1 GiB, coordinator's CPU time",
            median(work),
            100,
            at_most=True,
            unit="ms",
            native_ms=median(native),
            kill_to_slot_free_ms=median(walls),
        ),
        bar(
            "calls of survivors in the half second after the kill, loss of rate",
            median(losses),
            10,
            at_most=True,
            unit="%",
            while_reclaimed=median(during),
            while_the_kernel_ends_the_process=median(exits),
            longest_gap_ms=median(longest),
        ),
    ]


def end(host: dmrpc_cxl.Host) -> None:
    for service in _kept:
        service.stop()
    _kept.clear()


# ---------------------------------------------------------------- the coordinator is killed


def _restart(size: int, load: Callable[..., None]) -> tuple[float, float]:
    """Kill and restart under load; return recovery and process start to serving, in ms."""
    recoveries, walls = [], []
    with Served(size) as served:
        holder = Peer(served.name)
        holder.call(load, size // 2)
        host = dmrpc_cxl.attach(served.name, low=64)
        _kept.append(host.ralloc(16 * PAGE))
        stop = threading.Event()
        failed: list[BaseException] = []

        def allocate() -> None:
            try:
                while not stop.is_set():
                    buffer = host.ralloc(4 * PAGE)
                    host.create_ref(buffer, move=True).drop()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=allocate)
        thread.start()
        for _ in range(RUNS):
            served.coordinator.kill()
            served.coordinator.wait()
            walls.append(served.start() * 1e3)
            recoveries.append(served.stats()["recovery_s"] * 1e3)
        stop.set()
        thread.join()
        if failed:
            raise failed[0]
        _kept.clear()
        host.detach()
        holder.call(let_go)
        holder.leave()
    return median(recoveries), median(walls)


def coordinator_killed() -> list[dict[str, Any]]:
    """Kill and restart the coordinator while a host works with its own frames."""
    lines = []
    for text, load in (("pool in one piece", hold), ("pool in single frames", hold_scattered)):
        small, wall = _restart(GIB, load)
        large, _ = _restart(4 * GIB, load)
        lines += [
            bar(
                f"recovery of a coordinator, 1 GiB of 4 KiB frames, {text}",
                small,
                250,
                at_most=True,
                unit="ms",
                process_start_to_serving_ms=wall,
            ),
            bar(
                f"recovery per GiB, 4 GiB, {text}",
                large / 4,
                250,
                at_most=True,
                unit="ms",
                against_1_gib=large / small,
            ),
        ]
    return lines


def scrubbing() -> list[dict[str, Any]]:
    """Measure the share of a CPU that the scrubber takes, with hosts at work."""
    with Served(GIB) as served:
        holder = Peer(served.name)
        holder.call(hold, GIB // 2)
        with Client.of(served.device) as client:
            client.check()
        before = served.stats()["scrubber"]
        began, cpu = time.perf_counter(), _cpu_seconds(served.coordinator.pid)
        time.sleep(12)  # longer than the interval between looks
        took = time.perf_counter() - began
        share = 100 * (_cpu_seconds(served.coordinator.pid) - cpu) / took
        done = served.stats()["scrubber"]
        holder.call(let_go)
        holder.leave()
    return [
        bar(
            "scrubber, share of one CPU while it looks",
            100 * done["cpu_s"] / max(done["wall_s"], 1e-9),
            1,
            at_most=True,
            unit="%",
            of_the_coordinator_in_all=share,
            looks=done["looks"] - before["looks"],
        )
    ]


def main() -> None:
    """Measure all of it and print."""
    for experiment in (host_killed, coordinator_killed, scrubbing):
        for line in experiment():
            print({k: round(v, 2) if isinstance(v, float) else v for k, v in line.items()})


if __name__ == "__main__":
    main()
