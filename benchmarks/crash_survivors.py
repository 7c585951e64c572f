"""What those who live lose when a host dies that holds 1 GiB: rates of calls before, meanwhile and after, in one run.

A process that dies is taken apart by the kernel, page by page, before anybody hears of its end; and a machine that does other
things as well loses calls at any moment. So the same is measured of a *stranger*, which maps as many pages of a file in
shared memory and has nothing to do with the fabric, and of half seconds in which nobody dies.
"""

from __future__ import annotations

import itertools
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any

import dmrpc_cxl

from .crash_served import GIB, PAGE, Served, cpu_seconds, until
from .machine import bar, median
from .peers import Peer

ARGUMENT = 64 * 1024
DEATHS = 7  # of each kind
ALONE_SECONDS = 1.0
AFTER_SECONDS = 0.5
NOBODY_SECONDS = 0.03  # what counts as "until gone" where nobody dies

STRANGER = """
import mmap, sys, tempfile
size = int(sys.argv[1])
file = tempfile.TemporaryFile(dir="/dev/shm")
file.truncate(size)
maps = [mmap.mmap(file.fileno(), size) for _ in range(2)]
for page in range(0, size, 4096):
    maps[0][page] = 1
    maps[1][page]
print("ready", flush=True)
sys.stdin.read()
"""

_kept: list[Any] = []


class Sum:
    """What the survivors call."""

    def first(self, values: Any) -> int:
        """Read one byte of what came by Ref."""
        return int(values[0])


def serve(host: dmrpc_cxl.Host, name: str) -> None:
    """Serve Sum."""
    _kept.append(host.serve(Sum(), name=name))


def end(host: dmrpc_cxl.Host) -> None:
    """Stop serving."""
    for service in _kept:
        service.stop()
    _kept.clear()


def hold(host: dmrpc_cxl.Host, size: int) -> None:
    """Allocate `size` bytes and store to each page."""
    array = host.zeros(size, "u1")
    array[::PAGE] = 1
    _kept.append(array)


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


class Losses:
    """What the survivors lost at the deaths of one kind, in percent of their rate before."""

    def __init__(self) -> None:
        self.after: list[float] = []
        self.until_gone: list[float] = []
        self.reclaiming: list[float] = []
        self.gone_ms: list[float] = []
        self.longest_ms: list[float] = []

    def add(self, ends: list[float], killed: float, gone: float, reclaim: float | None) -> None:
        """Take the times of one death: from the signal to the end, and when the coordinator took over."""
        before = rate(ends, killed - 0.8 * ALONE_SECONDS, killed)

        def loss(begin: float, until: float) -> float:
            return 100 * (1 - rate(ends, begin, until) / before)

        self.after.append(loss(killed, killed + AFTER_SECONDS))
        self.until_gone.append(loss(killed, gone if reclaim is None else reclaim))
        if reclaim is not None:
            self.reclaiming.append(loss(reclaim, max(gone, reclaim + 0.01)))
        self.gone_ms.append(1e3 * (gone - killed))
        near = [at for at in ends if killed - 0.05 <= at <= gone + 0.05]
        self.longest_ms.append(1e3 * max(b - a for a, b in itertools.pairwise(near)))


def _gone(pid: int) -> float:
    """Wait until a process that was killed has ended."""
    pidfd = os.pidfd_open(pid)
    try:
        select.select([pidfd], [], [])
        return time.perf_counter()
    finally:
        os.close(pidfd)


def survivors() -> list[dict[str, Any]]:
    """Kill a host that holds 1 GiB while two others call each other; and a stranger, and nobody."""
    work, native = [], []
    kinds = {"a host": Losses(), "a stranger": Losses(), "nobody": Losses()}
    with Served(2 * GIB) as served:
        server = Peer(served.name)
        server.call(serve, "sum")
        caller = Peer(served.name)
        for _, kind in itertools.product(range(DEATHS), kinds):
            victim = stranger = None
            if kind == "a host":
                victim = Peer(served.name)
                victim.call(hold, GIB)
            elif kind == "a stranger":
                command = [sys.executable, "-c", STRANGER, str(GIB)]
                stranger = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                assert stranger.stdout is not None
                stranger.stdout.readline()
            caller.begin(call_for, "sum", ALONE_SECONDS + 2 * AFTER_SECONDS)
            time.sleep(ALONE_SECONDS)
            coordinator, reclaim = served.coordinator.pid, None
            cpu = cpu_seconds(coordinator)
            killed = time.perf_counter()
            if victim is not None:
                os.kill(victim.pid, signal.SIGKILL)
                gone = until(lambda: served.device.host(3)["state"] == 0)
                work.append((cpu_seconds(coordinator) - cpu) * 1e3)
            elif stranger is not None:
                os.kill(stranger.pid, signal.SIGKILL)
                gone = _gone(stranger.pid)
                stranger.communicate()
            else:
                gone = killed + NOBODY_SECONDS
            ends = caller.result()
            if victim is not None:
                report = served.stats()["reclaims"][-1]
                native.append(report["report"]["duration_ns"] / 1e6)
                reclaim = gone - report["seconds"]
            kinds[kind].add(ends, killed, gone, reclaim)
        caller.leave()
        server.call(end)
        server.leave()
    host, stranger_losses, nobody = kinds.values()
    return [
        bar(
            "reclaim of a killed host's 1 GiB, coordinator's CPU time",
            median(work),
            100,
            at_most=True,
            unit="ms",
            native_ms=median(native),
            kill_to_slot_free_ms=median(host.gone_ms),
        ),
        bar(
            "calls of survivors in the half second after the kill, loss of rate",
            median(host.after),
            10,
            at_most=True,
            unit="%",
            of_a_stranger=median(stranger_losses.after),
            nobody_killed=median(nobody.after),
            longest_gap_ms=median(host.longest_ms),
            longest_gap_nobody_killed_ms=median(nobody.longest_ms),
        ),
        bar(
            "calls of survivors while the coordinator reclaims, loss of rate",
            median(host.reclaiming),
            10,
            at_most=True,
            unit="%",
            while_the_kernel_ends_the_host=median(host.until_gone),
            while_the_kernel_ends_a_stranger=median(stranger_losses.until_gone),
            stranger_gone_ms=median(stranger_losses.gone_ms),
            nobody_killed=median(nobody.until_gone),
        ),
    ]
