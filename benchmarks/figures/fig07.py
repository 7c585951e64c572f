"""Fig 7: making a Ref, with copy-on-write and with an eager copy.

One host makes Refs to its buffers, one after the other, walking through more memory than a cache holds. Timed is the whole operation:
looking the address up, protecting, counting, writing the Ref's entry. Refs are dropped between the timed parts.

*pre-shared*: the buffers were shared before, so their pages are protected already; what the paper measures. *first*: the buffer was
never shared. *fresh*: all that a buffer costs from ralloc to rfree is in the time, but for writing its data. *clone*: a second Ref to
what a Ref denotes, which is little more than counting.

At a memory server the same is asked of one server thread, copy-on-write against copying at once: *pre-shared* with one request
outstanding, *pipelined* with so many under way that the server is never idle. Response times have the round trip in them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from . import net, plots
from .blocks import Block
from .net_blocks import refs_block as net_refs_block
from .runner import Case, Options, Ticker, running
from .summary import Point, Points, bar, bytes_text, point

NAME = "fig07"
TITLE = "Fig 7: making a Ref, copy-on-write against an eager copy"
CLAIMS = (
    "copy-on-write makes Refs at up to 22.8 x the rate (CXL; 7.3 x over the network)",
    "response time is up to 63.6 x lower (CXL; 5.2 x over the network), with far less memory traffic",
)
SIZES = tuple(4096 << i for i in (0, 1, 2, 3, 4, 6, 8, 10))  # to 4 MiB
QUICK_SIZES = (4096, 32 << 10, 256 << 10, 4 << 20)
LINES = (
    ("cxl", "pre-shared"),
    ("cxl", "first"),
    ("cxl", "fresh"),
    ("cxl", "clone"),
    ("cxl-copy", "pre-shared"),
    ("cxl-copy", "fresh"),
    ("net", "pre-shared"),
    ("net", "pipelined"),
    ("net-copy", "pre-shared"),
    ("net-copy", "pipelined"),
)
REGION_BYTES = 64 << 20  # that is walked through
TINY_REGION_BYTES = 2 << 20
GROUP_BYTES = 64 << 10  # calls timed together: a look at the clock must not count
MOST_AT_ONCE = 16
CLIENT = "client"
MODES_SHOWN = {
    "traffic_bytes": ("pre-shared",),
    "latency": ("pre-shared", "first", "fresh", "clone"),
}
"""In a panel of the plot; others: all."""


class _Walk:
    """Buffers in DM, in turn, all written."""

    def __init__(self, host: Any, size: int, region: int) -> None:
        self.host = host
        self.size = size
        number = max(region // size, 2)
        self.arrays = [host.empty(size, "u1") for _ in range(number)]
        for array in self.arrays:
            array[:] = 1
        self._next = 0

    def next(self) -> Any:
        """Return the next buffer."""
        array = self.arrays[self._next]
        self._next = (self._next + 1) % len(self.arrays)
        return array


def eager(host: Any, array: Any) -> Any:
    """Copy a buffer, and make a Ref of the copy."""
    buffer = host.ralloc(array.nbytes, zero=False)
    copy = buffer.numpy()
    np.copyto(copy, array)
    del copy
    return host.create_ref(buffer, move=True)


def refs_block(host: Any, variant: str, mode: str, size: int, region: int) -> Block:
    """Return a block of create_refs; requests are calls."""
    group = 1 if mode in ("first", "fresh") else max(min(GROUP_BYTES // size, MOST_AT_ONCE), 1)
    create: Callable[[Any], Any] = host.create_ref
    if variant == "cxl-copy":

        def create(array: Any) -> Any:
            return eager(host, array)

    counts: dict[str, float] = {}
    now = time.perf_counter_ns
    if mode == "fresh":
        run = _whole_lives(host, create, size, counts)
    else:
        walk = _Walk(host, size, region)
        if mode == "pre-shared" and variant == "cxl":
            for array in walk.arrays:
                create(array)
        first = create(walk.next()) if mode == "clone" else None

        def run(n: int) -> list[int]:
            latencies = []
            total = 0
            for _ in range(-(-n // group)):
                if mode == "first":  # whose pages are not protected
                    array = host.empty(size, "u1")
                    array[::4096] = 1
                    chosen = [array]
                    del array
                else:
                    chosen = [walk.next() for _ in range(group)]
                refs: list[Any] = [None] * group
                begin = now()
                if first is not None:
                    for i in range(group):
                        refs[i] = first.clone()
                else:
                    for i, array in enumerate(chosen):
                        refs[i] = create(array)
                taken = now() - begin
                total += taken
                latencies += [taken // group] * group
                for ref in refs:
                    if ref.nbytes != size or not ref.drop():
                        raise AssertionError("a Ref is not what it should be")
                del chosen, refs, ref
            counts["timed_ns"] = total / len(latencies) * n
            return latencies[:n]

    def count(n: int) -> list[int]:
        found = run(n)
        copied = variant == "cxl-copy"
        counts["traffic_bytes"] = n * (2 * size if copied else 8 * -(-size // 4096))
        return found

    def close() -> None:
        if mode != "fresh":
            walk.arrays.clear()

    return Block(count, close=close, counts=counts)


def _whole_lives(
    host: Any, create: Callable[[Any], Any], size: int, counts: dict[str, float]
) -> Callable[[int], list[int]]:
    now = time.perf_counter_ns

    def run(n: int) -> list[int]:
        latencies = [0] * n
        for i in range(n):
            begin = now()
            array = host.empty(size, "u1")
            half = now()
            array[:] = 1
            written = now()
            ref = create(array)
            ref.drop()
            del array, ref
            latencies[i] = now() - written + half - begin
        counts["timed_ns"] = sum(latencies)
        return latencies

    return run


def run(options: Options, ticker: Ticker) -> dict[str, Any]:
    """Measure."""
    sizes = QUICK_SIZES[1:3] if options.tiny else QUICK_SIZES if options.quick else SIZES
    region = TINY_REGION_BYTES if options.tiny else REGION_BYTES
    found: list[Point] = []
    with running(options, ticker, 1 << 30) as runner, net.if_wanted(runner) as there:
        runner.on.start(CLIENT)
        if there is not None:
            there.start(CLIENT)
        for place in options.places:
            runner.pin(place)
            for size in sizes:
                cases = [
                    _case(there, variant, mode, size, place, region)
                    for variant, mode in LINES
                    if options.wants(variant)
                ]
                found += map(point, runner.measure(cases, f"{bytes_text(size)}, {place}"))
    points = Points(found)
    return {"points": found, "bars": bars(points), "headline": headline(points)}


def _case(
    there: net.NetFabric | None, variant: str, mode: str, size: int, place: str, region: int
) -> Case:
    params = {"size": size, "place": place}
    if variant not in net.VARIANTS:
        arguments = {"variant": variant, "mode": mode, "size": size, "region": region}
        return Case(variant, mode, params, (CLIENT,), refs_block, arguments, ("coordinator",))
    arguments = {"mode": mode, "size": size, "region": region, "copy": variant == "net-copy"}
    return Case(
        variant,
        mode,
        params,
        (f"{net.PREFIX}{CLIENT}",),
        net_refs_block,
        arguments,
        pids=net.told(there).pids,
        gauges=net.told(there).gauges,
    )


def _ratios(
    points: Points, what: str, mode: str, place: str, variant: str = "cxl"
) -> list[tuple[int, dict[str, float]]]:
    copy_mode = "pre-shared" if mode in ("first", "clone") else mode
    ours = {"variant": variant, "mode": mode}
    copied = {"variant": f"{variant}-copy", "mode": copy_mode}
    over, under = (ours, copied) if what == "per_second" else (copied, ours)
    found = []
    for size in points.values("size"):
        one = points.ratio(what, over, under, size=size, place=place)
        if one is not None:
            found.append((size, one))
    return found


def bars(points: Points) -> list[dict[str, Any]]:
    """Return the bars of this figure: for the complete operation, with its address bookkeeping and its Ref record.

    And for the whole lives of buffers that are made, shared and freed again, which is about more than it.
    """
    made = []
    for place in points.values("place"):
        for mode, says in (
            ("pre-shared", "shared before"),
            ("first", "never shared before"),
            ("fresh", "from ralloc to rfree"),
        ):
            above = [
                (size, one) for size, one in _ratios(points, "p50_us", mode, place) if size > 16384
            ]
            if above:
                size, worst = min(above, key=lambda item: item[1]["median"])
                made.append(
                    bar(
                        f"eager copy against create_ref above 16 KiB, worst size, {says}, {place}",
                        worst,
                        1,
                        note=f"at {bytes_text(size)}",
                    )
                )
        for variant, where, mode, what, limit, says in (
            ("cxl", "", "pre-shared", "per_second", 22.8, "rate"),
            ("cxl", "", "pre-shared", "p50_us", 63.6, "response time"),
            ("net", " at a memory server", "pipelined", "per_second", 7.3, "rate, pipelined"),
            ("net", " at a memory server", "pre-shared", "p50_us", 5.2, "response time"),
        ):
            found = _ratios(points, what, mode, place, variant)
            if found:
                size, best = max(found, key=lambda item: item[1]["median"])
                made.append(
                    bar(
                        f"create_ref{where} against an eager copy, best size, {says}, {place}",
                        best,
                        limit,
                        note=f"at {bytes_text(size)}",
                    )
                )
    return made


def headline(points: Points) -> str:
    """Return what was measured, in one sentence."""
    place = plots.preferred(points.values("place"), "one CPU")
    told = []
    for variant, mode, says in (
        ("cxl", "pre-shared", "in the pool"),
        ("net", "pipelined", "at a memory server"),
    ):
        rate = _ratios(points, "per_second", mode, place, variant)
        time_ = _ratios(points, "p50_us", "pre-shared", place, variant)
        if rate and time_:
            told.append(
                f"{says} up to {max(one['median'] for _, one in rate):.3g} x the rate and "
                f"{max(one['median'] for _, one in time_):.3g} x lower response time"
            )
    return f"{'; '.join(told)}; {place}" if told else ""


def draw(result: dict[str, Any], figure: Any) -> None:
    """Plot rate, response time and memory traffic against the size."""
    points = Points(result["points"])
    place = plots.preferred(points.values("place"), "one CPU")
    axes = figure.subplots(1, 3)
    for ax, (what, label, title) in zip(
        axes,
        (
            ("per_second", "Refs per second", "(a) rate"),
            ("latency", "median response time, us", "(b) response time"),
            ("traffic_bytes", "bytes moved for one Ref", "(c) memory traffic"),
        ),
        strict=True,
    ):
        modes = MODES_SHOWN.get(what)
        plots.lines(ax, points, "size", what, {"place": place}, modes)
        plots.sizes_axis(ax, points.values("size"))
        plots.log_y(ax)
        ax.set_xlabel("size of the region")
        ax.set_ylabel(label)
        ax.set_title(f"{title}, {place}")
    plots.legend(figure, axes)


HEIGHT = 4.6
