"""Chains: client, load balancers in a row, a worker that sums an array. Each its own process."""

from __future__ import annotations

from typing import Any

import numpy as np

from .machine import bar, median
from .rpc_stage import (
    PLACES,
    Load,
    Sample,
    Stage,
    cpus,
    measure,
    ratios,
    stage,
    traffic,
    walls,
)

LENGTH = 7  # calls in a row
ROUNDS = 7
SMALL, LARGE = 4096, 4 << 20
SMALL_CALLS, LARGE_CALLS = 100, 50
MIB = 1 << 20


def _slope(per_length: list[float]) -> float:
    """Return what one more call adds: the least-squares slope over 1, 2, ... calls."""
    return float(np.polyfit(range(1, len(per_length) + 1), per_length, 1)[0])


def _forwarders(samples: Sample) -> float:
    return sum(ns for name, ns in samples.cpu_ns.items() if "forwarder" in name)


def _hops(on: Stage, names: list[str], source: str, where: str) -> dict[str, Any]:
    """Compare what a hop costs at two sizes: all lengths of both take turns in every round."""
    loads = [
        Load(name, size=size, source=source, calls=calls)
        for size, calls in ((SMALL, SMALL_CALLS), (LARGE, LARGE_CALLS))
        for name in names
    ]
    samples = on.peers["client"].call(measure, loads, on.pids, ROUNDS)
    small = [[cpus(one)[i] for one in samples[:LENGTH]] for i in range(ROUNDS)]
    large = [[cpus(one)[i] for one in samples[LENGTH:]] for i in range(ROUNDS)]
    found = ratios([_slope(one) for one in large], [_slope(one) for one in small])
    alone = [
        [median([_forwarders(sample) for sample in one]) for one in part]
        for part in (samples[:LENGTH], samples[LENGTH:])
    ]
    return bar(
        f"CPU per extra call of a chain at 4 MiB against 4 KiB, by Ref, {source}, {where}: off 1 by",
        abs(found["median"] - 1),
        0.10,
        at_most=True,
        unit="",
        ratio=found["median"],
        min=found["min"],
        max=found["max"],
        forwarders_alone=_slope(alone[1]) / _slope(alone[0]),
        hop_4k_us=median([_slope(one) for one in small]) / 1e3,
        hop_4m_us=median([_slope(one) for one in large]) / 1e3,
        one_call_4k_us=median([one[0] for one in small]) / 1e3,
        one_call_4m_us=median([one[0] for one in large]) / 1e3,
    )


def hops() -> list[dict[str, Any]]:
    """Compare what each further call of a chain costs at 4 KiB and at 4 MiB."""
    lines = []
    with stage() as on:
        names = on.chain("", LENGTH)
        on.start("client")
        for where, cpu in PLACES:
            on.pin(cpu)
            lines += [_hops(on, names, source, where) for source in ("dm", "fresh")]
    return lines


def _bytes_sent(on: Stage) -> int:
    return sum(peer.call(traffic)["bytes_sent"] for peer in on.peers.values())


def _against_value(
    on: Stage,
    name: str,
    source: str,
    transport: str,
    where: str,
    limits: tuple[float, float | None],
) -> list[dict[str, Any]]:
    by_value, by_ref = (
        Load(name, size=MIB, source=source, transfer=transfer, transport=transport, calls=calls)
        for transfer, calls in (("value", 10), ("ref", 50))
    )
    client = on.peers["client"]
    samples = client.call(measure, [by_value, by_ref], on.pids, ROUNDS)
    moved = []
    for load in (by_value, by_ref):
        before = _bytes_sent(on)
        client.call(measure, [load], on.pids, 1, 0)
        moved.append((_bytes_sent(on) - before) / load.calls)
    value, ref = samples
    over = "rings" if transport == "auto" else "TCP"
    what = (
        f"{LENGTH} calls in a row with 1 MiB ({source}), {over}, by Ref against by value, {where}"
    )
    rate = ratios(walls(value), walls(ref))
    beside = {
        "value_us": median(walls(value)) / 1e3,
        "ref_us": median(walls(ref)) / 1e3,
        "p99_value_us": median([one.p99_ns for one in value]) / 1e3,
        "p99_ref_us": median([one.p99_ns for one in ref]) / 1e3,
    }
    if transport == "auto":
        beside |= {"ring_bytes_value": moved[0], "ring_bytes_ref": moved[1]}
    lines = [
        bar(
            f"{what}: rate",
            rate.pop("median"),
            limits[0],
            at_most=False,
            **rate,
            **beside,
        )
    ]
    cpu = ratios(cpus(ref), cpus(value))
    if limits[1] is not None:
        lines.append(
            bar(
                f"{what}: CPU",
                cpu.pop("median"),
                limits[1],
                at_most=True,
                **cpu,
                value_cpu_us=median(cpus(value)) / 1e3,
                ref_cpu_us=median(cpus(ref)) / 1e3,
            )
        )
    else:
        lines[0]["cpu"] = cpu["median"]
    return lines


def against_value() -> list[dict[str, Any]]:
    """1 MiB through a chain of seven calls, by Ref and by value on the same connections."""
    lines = []
    with stage() as on:
        rings = on.chain("", LENGTH)[-1]
        on.start("client")
        for where, cpu in PLACES:
            on.pin(cpu)
            lines += _against_value(on, rings, "fresh", "auto", where, (5, 0.25))
            lines += _against_value(on, rings, "dm", "auto", where, (8, None))
    with stage() as on:
        tcp = on.chain("tcp-", LENGTH, "tcp")[-1]
        on.start("client")
        for where, cpu in PLACES:
            on.pin(cpu)
            lines += _against_value(on, tcp, "fresh", "tcp", where, (10, None))
    return lines
