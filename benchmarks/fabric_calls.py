"""What the calls of Table II cost between two host processes."""

from __future__ import annotations

import gc
from time import perf_counter_ns as now
from typing import Any

import numpy as np

import dmrpc_cxl

from .machine import bar, median, minor_faults, pinned, quiet
from .peers import Peer, fabric

IN_FLIGHT = 64
ROUNDS = 200
MIB = 1 << 20
NR_BUFFERS = 16
COUNTED = ("syscalls", "wp_faults", "missing_faults", "coordinator_round_trips")


def produce(host: dmrpc_cxl.Host, size: int, touch: bool) -> tuple[list[bytes], list[float], int]:
    """Allocate and move away IN_FLIGHT buffers; return Refs, ns of each call, minor faults inside the calls."""
    gc.disable()
    buffers: list[Any] = [None] * IN_FLIGHT
    f0 = minor_faults()
    t0 = now()
    for i in range(IN_FLIGHT):
        buffers[i] = host.ralloc(size, zero=False)
    t1 = now()
    f1 = minor_faults()
    if touch:
        for buffer in buffers:
            buffer.numpy()[::4096] = 1
    refs: list[Any] = [None] * IN_FLIGHT
    f2 = minor_faults()
    t2 = now()
    for i in range(IN_FLIGHT):
        refs[i] = host.create_ref(buffers[i], move=True)
    t3 = now()
    f3 = minor_faults()
    wires = [ref.to_bytes() for ref in refs]
    return wires, [(t1 - t0) / IN_FLIGHT, (t3 - t2) / IN_FLIGHT], f1 - f0 + f3 - f2


def consume(host: dmrpc_cxl.Host, wires: list[bytes]) -> tuple[list[float], int]:
    """Map and free; return ns of each call, minor faults inside the calls."""
    gc.disable()
    buffers: list[Any] = [None] * len(wires)
    f0 = minor_faults()
    t0 = now()
    for i, wire in enumerate(wires):
        buffers[i] = host.map_ref(wire)
    t1 = now()
    for buffer in buffers:
        host.rfree(buffer)
    t2 = now()
    f1 = minor_faults()
    return [(t1 - t0) / len(wires), (t2 - t1) / len(wires)], f1 - f0


def counters(host: dmrpc_cxl.Host) -> dict[str, int]:
    """Return the counters that must stand still in the steady state."""
    stats = host.stats()
    return {name: stats[name] for name in COUNTED}


def copy_times(host: dmrpc_cxl.Host, size: int, rotate: int) -> float:
    """Return ns of one memcpy of size bytes, over `rotate` pairs of buffers in turn."""
    source = np.ones((rotate, size), "u1")
    target = np.zeros((rotate, size + 4096), "u1")[:, :size]
    t0 = now()
    np.copyto(target, source)
    return (now() - t0) / rotate


def _steady(cpu: int | None) -> list[dict[str, Any]]:
    where = "free" if cpu is None else "one CPU"
    lines = []
    totals = {}
    with pinned(cpu), fabric(512 * MIB) as name:
        one, two = Peer(name), Peer(name)
        for size in (32768, MIB):
            times: list[list[float]] = []
            copies: list[float] = []
            cold: list[float] = []
            faults = 0
            before = [one.call(counters), two.call(counters)]
            for i in range(-100, ROUNDS):
                a, b = (one, two) if i % 2 else (two, one)
                if i == 0:
                    before, faults = [one.call(counters), two.call(counters)], 0
                    times.clear()
                    copies.clear()
                wires, made, f = a.call(produce, size, True)
                used, g = b.call(consume, wires)
                times.append(made + used)
                faults += f + g
                if i % 10 == 0:
                    copies.append(a.call(copy_times, 32768, IN_FLIGHT))
                    cold.append(a.call(copy_times, 32768, 8 * IN_FLIGHT))
            after = [one.call(counters), two.call(counters)]
            moved = {
                n: sum(y[n] - x[n] for x, y in zip(before, after, strict=True)) for n in COUNTED
            }
            calls = np.median(np.array(times), axis=0)
            totals[size] = float(calls.sum())
            lines.append(
                bar(
                    f"steady state, {size >> 10} KiB, {where}: faults and system calls, "
                    f"{4 * IN_FLIGHT * ROUNDS} calls",
                    sum(moved.values()) + faults,
                    0,
                    at_most=True,
                    unit="",
                    **moved,
                    minor_faults=faults,
                )
            )
            if size == 32768:
                copy = median(copies)
                lines.append(
                    bar(
                        f"four calls at 32 KiB against one memcpy of 32 KiB, {where}",
                        totals[size] / copy,
                        1.25,
                        at_most=True,
                        four_calls_ns=totals[size],
                        memcpy_ns=copy,
                        memcpy_from_memory_ns=median(cold),
                        **dict(
                            zip(
                                ("ralloc", "create_ref", "map_ref", "rfree"),
                                map(float, calls),
                                strict=True,
                            )
                        ),
                    )
                )
        one.leave()
        two.leave()
    lines.append(
        bar(
            f"four calls at 1 MiB against 32 KiB, {where}",
            totals[MIB] / totals[32768],
            3,
            at_most=True,
            four_calls_ns=totals[MIB],
        )
    )
    return lines


def steady_state() -> list[dict[str, Any]]:
    """ralloc, create_ref(move), map_ref, rfree between two hosts that take turns."""
    return _steady(0) + _steady(None)


def create_ref() -> list[dict[str, Any]]:
    """Sharing 1 MiB against copying it, over 16 different buffers in turn."""
    first, again, eager = [], [], []
    with pinned(0), fabric(512 * MIB) as name, dmrpc_cxl.attach(name) as host:
        long_lived = [host.array(np.full(MIB, i, "u1")) for i in range(NR_BUFFERS)]
        for array in long_lived:
            host.create_ref(array)
        for _ in range(100):
            fresh = [host.ralloc(MIB, zero=False) for _ in range(NR_BUFFERS)]
            for buffer in fresh:
                buffer.numpy()[::4096] = 1
            with quiet():
                t0 = now()
                refs = [host.create_ref(buffer) for buffer in fresh]
                t1 = now()
            first.append((t1 - t0) / NR_BUFFERS)
            del refs, fresh, buffer
            with quiet():
                t0 = now()
                refs = [host.create_ref(array) for array in long_lived]
                t1 = now()
            again.append((t1 - t0) / NR_BUFFERS)
            del refs
            refs = []
            with quiet():
                t0 = now()
                for array in long_lived:
                    copy = host.ralloc(MIB, zero=False)
                    copy.numpy()[:] = array
                    refs.append(host.create_ref(copy, move=True))
                t1 = now()
            eager.append((t1 - t0) / NR_BUFFERS)
            del refs, copy
        del long_lived, array
    copied = median(eager)
    return [
        bar(
            "create_ref (sharing) of 1 MiB against an eager copy, first time: rate",
            copied / median(first),
            4,
            at_most=False,
            share_ns=median(first),
            copy_ns=copied,
        ),
        bar(
            "create_ref (sharing) of 1 MiB against an eager copy, shared already: rate",
            copied / median(again),
            50,
            at_most=False,
            share_ns=median(again),
            copy_ns=copied,
        ),
    ]


def _send(host: dmrpc_cxl.Host, nr: int) -> list[bytes]:
    refs = [host.create_ref(host.ralloc(8 * 4096, zero=False), move=True) for _ in range(nr)]
    return [ref.to_bytes() for ref in refs]


def _free(host: dmrpc_cxl.Host, wires: list[bytes]) -> None:
    for wire in wires:
        host.rfree(host.map_ref(wire))


def _round_trips(host: dmrpc_cxl.Host) -> int:
    return host.stats()["coordinator_round_trips"]


def circulate() -> list[dict[str, Any]]:
    """Make 100,000 allocations of 8 pages that one host makes and the other frees.

    One way, every frame goes round by the coordinator; in turns, hardly any does.
    """
    allocations, batch = 100_000, 100
    lines = []
    for what, turns in (("one way", False), ("in turns", True)):
        with fabric(512 * MIB) as name:
            one, two = Peer(name), Peer(name)
            t0 = now()
            for i in range(allocations // batch):
                a, b = (two, one) if turns and i % 2 else (one, two)
                b.call(_free, a.call(_send, batch))
            seconds = (now() - t0) / 1e9
            trips = one.call(_round_trips) + two.call(_round_trips)
            one.leave()
            two.leave()
        lines.append(
            bar(
                f"allocations per coordinator round trip, {what}",
                allocations / max(trips, 1),
                50,
                at_most=False,
                unit="",
                round_trips=trips,
                seconds=seconds,
            )
        )
    return lines
