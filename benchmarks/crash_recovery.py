"""What crashes cost those who live: a host that is killed with 1 GiB, a coordinator that is killed under load.

`python -m benchmarks.crash_recovery`; also part of `make bench`. What a dying host costs others is in crash_survivors.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import dmrpc_cxl
from dmrpc_cxl.coordinator.client import Client

from .crash_served import GIB, PAGE, Served, cpu_seconds
from .crash_survivors import survivors
from .machine import bar, median
from .peers import Peer

RUNS = 3


# ---------------------------------------------------------------- in the hosts

_kept: list[Any] = []


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
    """Free all that is held."""
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
        began, cpu = time.perf_counter(), cpu_seconds(served.coordinator.pid)
        time.sleep(12)  # longer than the interval between looks
        took = time.perf_counter() - began
        share = 100 * (cpu_seconds(served.coordinator.pid) - cpu) / took
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
    for experiment in (survivors, coordinator_killed, scrubbing):
        for line in experiment():
            print({k: round(v, 2) if isinstance(v, float) else v for k, v in line.items()})


if __name__ == "__main__":
    main()
