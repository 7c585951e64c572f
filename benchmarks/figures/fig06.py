"""Fig 6: a load balancer. What a process costs that only forwards.

Three clients with four calls under way each, a load balancer, three workers that sum an array. The balancer gives a call to the worker
with the fewest; it reads headers only. Over a memory server they are the same, in processes that have no pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dmrpc_cxl
from dmrpc_cxl.rpc import Forwarder

from ..rpc_stage import _here as here
from ..rpc_stage import serve
from . import net, plots
from .calls import total_block
from .runner import Case, Options, Runner, Ticker, running
from .summary import Point, Points, bar, bytes_text, point
from .variants import REGISTRY

NAME = "fig06"
TITLE = "Fig 6: a load balancer"
CLAIMS = (
    "by reference has the highest rate of requests and the least memory traffic in the balancer, at all sizes",
)
PARTIES = 3
WINDOW = 4
SIZES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)
QUICK_SIZES = (4 << 10, 1 << 20)
LINES = (
    ("value", "fresh"),
    ("cxl", "fresh"),
    ("cxl", "pre-shared"),
    ("net", "fresh"),
    ("net", "pre-shared"),
    ("net-copy", "pre-shared"),
)
FLAT_BAR = 0.10
HEIGHT = 7.0


def _balance(host: dmrpc_cxl.Host, name: str, backends: list[str], transport: str) -> None:
    here[name] = Forwarder(host, name, backends, transport=transport)  # type: ignore[arg-type]


def _passed(host: dmrpc_cxl.Host) -> dict[str, float]:
    (balancer,) = here.values()
    assert isinstance(balancer, Forwarder)
    return {"balancer_bytes": 2.0 * balancer.bytes_forwarded}  # each comes in and goes out


def run(options: Options, ticker: Ticker) -> dict[str, Any]:
    """Measure."""
    sizes = QUICK_SIZES[:2] if options.tiny else QUICK_SIZES if options.quick else SIZES
    found: list[Point] = []
    parties = 1 if options.tiny else PARTIES
    clients = tuple(f"client-{i}" for i in range(1, parties + 1))
    workers = tuple(f"worker-{i}" for i in range(1, parties + 1))
    with running(options, ticker) as runner, net.if_wanted(runner) as there:
        for on in (runner.on, there):
            if on is None:
                continue
            for name in workers:
                on.start(name, serve)
            for transport in options.transports:
                how = "auto" if transport == "ring" else transport
                on.start(f"balancer-{transport}", _balance, list(workers), how)
            for name in clients:
                on.start(name)
        for place in options.places:
            runner.pin(place)
            for transport in options.transports:
                cases = [
                    _case(runner, there, variant, mode, size, transport, clients, workers)
                    for variant, mode in LINES
                    if options.wants(variant)
                    for size in sizes
                ]
                found += map(point, runner.measure(cases, f"{transport}, {place}"))
    points = Points(found)
    return {"points": found, "bars": bars(points), "headline": headline(points)}


def _case(
    runner: Runner,
    there: net.NetFabric | None,
    variant: str,
    mode: str,
    size: int,
    transport: str,
    clients: Sequence[str],
    workers: Sequence[str],
) -> Case:
    at_server = variant in net.VARIANTS
    prefix = net.PREFIX if at_server else ""
    balancer = f"balancer-{transport}"
    peer = runner.on.peers[f"{prefix}{balancer}"]

    def passed() -> dict[str, float]:
        found: dict[str, float] = peer.call(_passed)
        return found

    return Case(
        variant,
        mode,
        {"size": size, "transport": transport, "place": runner.place},
        tuple(f"{prefix}{name}" for name in clients),
        total_block,
        {
            "service": balancer,
            "transport": "auto" if transport == "ring" else transport,
            "transfer": REGISTRY[variant].transfer,
            "mode": mode,
            "size": size,
            "window": WINDOW,
            "eager": variant == "net-copy",
        },
        (
            *(f"{prefix}{name}" for name in (balancer, *workers)),
            *(() if at_server else ("coordinator",)),
        ),
        pids=net.told(there).pids if at_server else None,
        gauges=passed,
    )


def balancer_cpu(one: Point) -> float:
    """Return the CPU time of the balancer per request in us."""
    return sum(us for name, us in one["cpu_us_by_process"].items() if "balancer" in name)


def told_cpu(line: list[Point]) -> str:
    """Return the CPU time of the balancer at the smallest and the largest size."""
    each = {one["params"]["size"]: balancer_cpu(one) for one in line}
    return ", ".join(
        f"{each[size]:.3g} us at {bytes_text(size)}" for size in (min(each), max(each))
    )


def bars(points: Points) -> list[dict[str, Any]]:
    """Return what is asked of this figure."""
    made = []
    for place in points.values("place"):
        for transport in points.values("transport", place=place):
            where = {"place": place, "transport": transport}
            told = f"{'rings' if transport == 'ring' else 'TCP'}, {place}"
            for variant, mode in LINES[1:5]:
                line = points.select(variant=variant, mode=mode, **where)
                if len(line) < 2:
                    continue
                nbytes = [one["each"]["balancer_bytes"] for one in line]
                made.append(
                    bar(
                        f"bytes through the balancer for a call {REGISTRY[variant].says}, {mode}, all sizes, {told}: "
                        "largest against smallest",
                        max(nbytes) / min(nbytes),
                        1 + FLAT_BAR,
                        at_most=True,
                        note=f"CPU of the balancer {told_cpu(line)}",
                    )
                )
    return made


def headline(points: Points) -> str:
    """Return what was measured, in one sentence."""
    place = plots.preferred(points.values("place"), "one CPU")
    for transport in points.values("transport", place=place):
        size = points.values("size")[-1]
        where = {"size": size, "place": place, "transport": transport}
        value, ours = (points.one(variant=v, mode="fresh", **where) for v in ("value", "cxl"))
        there = points.one(variant="net", mode="fresh", **where)
        if value and ours:
            by_server = f", {balancer_cpu(there):.3g} us over a memory server" if there else ""
            return (
                f"{bytes_text(size)} takes the balancer {balancer_cpu(value):.3g} us and "
                f"{value['each']['balancer_bytes'] / 1e3:,.0f} kB by value, {balancer_cpu(ours):.3g} us and "
                f"{ours['each']['balancer_bytes'] / 1e3:.2g} kB by Ref{by_server} ({transport}, {place})"
            )
    return ""


def draw(result: dict[str, Any], figure: Any) -> None:
    """Plot rate, bytes and CPU of the balancer against the size, for both transports."""
    points = Points(result["points"])
    place = plots.preferred(points.values("place"), "one CPU")
    transports = points.values("transport", place=place)
    axes = figure.subplots(len(transports), 3, squeeze=False)

    def cpu(one: Point) -> tuple[float, float, float]:
        value = balancer_cpu(one)
        return value, value, value

    for row, transport in enumerate(transports):
        chosen = {"place": place, "transport": transport}
        columns: tuple[tuple[Any, str], ...] = (
            ("per_second", "calls per second"),
            ("balancer_bytes", "bytes through the balancer for a call"),
            (cpu, "CPU of the balancer for a call, us"),
        )
        for column, (what, label) in enumerate(columns):
            ax = axes[row][column]
            plots.lines(ax, points, "size", what, chosen)
            plots.sizes_axis(ax, points.values("size"))
            plots.log_y(ax)
            ax.set_xlabel("size of the array")
            ax.set_ylabel(label)
            ax.set_title(f"({'abc'[column]}) {'rings' if transport == 'ring' else 'TCP'}, {place}")
    plots.legend(figure, axes)
