"""E0: what raw accesses and single calls cost. These constants explain the figures.

Accesses: copying into and out of DM by plain stores and loads, beside the same for private memory. Calls: those of the paper's table
and what else a Ref can do, each timed by itself in one host. Faults: the first store to a page.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from . import plots
from .blocks import Block
from .runner import Case, Options, Ticker, running
from .summary import Point, Points, bytes_text, point

NAME = "e0"
TITLE = "E0: what accesses and calls cost"
CLAIMS = (
    "translating addresses in software takes 0.17 % of an access over the network; here the MMU does it",
)
ACCESS_SIZES = (64, 1024, 4 << 10, 32 << 10, 256 << 10, 1 << 20, 4 << 20)
CALL_SIZES = (4 << 10, 32 << 10, 256 << 10, 1 << 20, 4 << 20)
CLIENT = "client"
PRIVATE, OWNED, SHARED = "private memory", "own buffer", "shared mapping"
ACCESSES = (
    ("write", PRIVATE),
    ("write", OWNED),
    ("read", PRIVATE),
    ("read", OWNED),
    ("read", SHARED),
)
WORKING_BYTES = 16 << 20  # of memory that accesses walk through
TINY_WORKING_BYTES = 1 << 20
SMALL_GROUP = 64  # of accesses that are timed together
HEIGHT = 5.8


def access_block(host: Any, what: str, where: str, size: int, room: int) -> Block:
    """Return a block of copies into or out of some memory."""
    if where == PRIVATE:
        memory = np.ones(room, "u1")
    elif where == OWNED:
        memory = host.array(np.ones(room, "u1"))
    else:
        source = host.array(np.ones(room, "u1"))
        memory = host.map_ref(host.create_ref(source)).numpy()
        del source
    keep = [memory]
    other = np.zeros(size, "u1")
    stride = max(size, 4096) if size < 4096 else size
    places = [memory[at : at + size] for at in range(0, room - size + 1, stride)]
    group = SMALL_GROUP if size <= 4096 else 1
    now = time.perf_counter_ns
    at = 0
    del memory

    def run(n: int) -> list[int]:
        nonlocal at
        latencies: list[int] = []
        copyto = np.copyto
        while len(latencies) < n:
            chosen = [places[(at + i) % len(places)] for i in range(group)]
            at += group
            if what == "write":
                begin = now()
                for place in chosen:
                    copyto(place, other)
                taken = now() - begin
            else:
                begin = now()
                for place in chosen:
                    copyto(other, place)
                taken = now() - begin
            latencies += [taken // group] * group
        return latencies[:n]

    def check() -> None:
        wanted = 0 if what == "write" else 1
        assert int(other[0]) == wanted, "what was read is wrong"

    def close() -> None:
        places.clear()
        keep.clear()

    return Block(run, check, close)


# ---------------------------------------------------------------- calls

Prepare = Callable[[], Any]
Timed = Callable[[Any], Any]


def _written(host: Any, size: int) -> Any:
    buffer = host.ralloc(size, zero=False)
    buffer.numpy()[::4096] = 1
    return buffer


def _calls(host: Any, size: int) -> dict[str, tuple[Prepare, Timed]]:
    """Return for each call what is done before the clock starts, and the call."""
    kept = host.array(np.ones(size, "u1"))
    host.create_ref(kept).drop()  # its pages are protected from now on

    def moved() -> Any:
        return host.create_ref(_written(host, size), move=True)

    def shared() -> Any:
        return host.create_ref(kept)

    def stored_first(view: Any) -> Any:
        view[0] = 2
        return view

    return {
        "ralloc": (lambda: None, lambda _: host.ralloc(size, zero=False)),
        "rfree": (lambda: _written(host, size), lambda buffer: buffer.free()),
        "create_ref, first": (lambda: _written(host, size), host.create_ref),
        "create_ref, again": (lambda: kept, host.create_ref),
        "create_ref, moving": (
            lambda: _written(host, size),
            lambda buffer: host.create_ref(buffer, move=True),
        ),
        "clone": (shared, lambda ref: ref.clone()),
        "drop": (shared, lambda ref: ref.drop()),
        "map_ref, exclusive": (moved, host.map_ref),
        "map_ref, shared": (shared, host.map_ref),
        "view_ref": (moved, host.view_ref),
        "map_ref, copying": (shared, lambda ref: host.map_ref(ref, copy=True)),
        "first store, shared": (lambda: host.map_ref(shared()).numpy(), stored_first),
    }


CALLS = (
    "ralloc", "rfree", "create_ref, first", "create_ref, again", "create_ref, moving", "clone", "drop",
    "map_ref, exclusive", "map_ref, shared", "view_ref", "map_ref, copying", "first store, shared",
)  # fmt: skip


def call_block(host: Any, call: str, size: int) -> Block:
    """Return a block of one call, timed by itself."""
    prepare, timed = _calls(host, size)[call]
    now = time.perf_counter_ns

    def run(n: int) -> list[int]:
        latencies = [0] * n
        for i in range(n):
            made = prepare()
            begin = now()
            result = timed(made)
            latencies[i] = now() - begin
            del made, result
        return latencies

    return Block(run)


def run(options: Options, ticker: Ticker) -> dict[str, Any]:
    """Measure."""
    accesses: tuple[int, ...] = ACCESS_SIZES
    calls: tuple[int, ...] = CALL_SIZES
    if options.quick:
        accesses, calls = ACCESS_SIZES[2::2], CALL_SIZES[1::2]
    if options.tiny:
        accesses, calls = (4096,), (32 << 10,)
    room = TINY_WORKING_BYTES if options.tiny else WORKING_BYTES
    found: list[Point] = []
    with running(options, ticker) as runner:
        runner.on.start(CLIENT)
        for place in options.places[:1]:
            runner.pin(place)
            cases = [
                Case(
                    "cxl",
                    f"{what}, {where}",
                    {"size": size, "place": place, "kind": "access"},
                    (CLIENT,),
                    access_block,
                    {
                        "what": what,
                        "where": where,
                        "size": size,
                        "room": max(room, 2 * size),
                    },
                )
                for what, where in ACCESSES
                for size in accesses
            ]
            found += map(point, runner.measure(cases, f"accesses, {place}"))
            cases = [
                Case(
                    "cxl",
                    call,
                    {"size": size, "place": place, "kind": "call"},
                    (CLIENT,),
                    call_block,
                    {"call": call, "size": size},
                    max_requests=1000,
                )
                for call in CALLS
                for size in calls
            ]
            found += map(point, runner.measure(cases, f"calls, {place}"))
    points = Points(found)
    return {"points": found, "bars": [], "headline": headline(points), "tables": tables(points)}


def _us(points: Points, **which: Any) -> float | None:
    one = points.one(**which)
    return None if one is None else one["latency_us"]["p50"]


def tables(points: Points) -> list[dict[str, Any]]:
    """Return the two tables, as a report shows them."""
    made = []
    for kind, title in (("access", "us for one access"), ("call", "us for one call")):
        sizes = points.values("size", kind=kind)
        rows = [
            [mode, *(_us(points, mode=mode, size=size, kind=kind) for size in sizes)]
            for mode in dict.fromkeys(one["mode"] for one in points.select(kind=kind))
        ]
        made.append({"title": title, "head": ["", *map(bytes_text, sizes)], "rows": rows})
    return made


def headline(points: Points) -> str:
    """Return what was measured, in one sentence."""
    sizes = points.values("size", kind="access")
    if not sizes:
        return ""
    size = sizes[-1]
    private, shared = (
        _us(points, mode=f"read, {where}", size=size, kind="access") for where in (PRIVATE, SHARED)
    )
    assert private is not None
    assert shared is not None
    return f"reading {bytes_text(size)} of a shared mapping takes {shared / private:.2g} x as long as reading private memory"


def draw(result: dict[str, Any], figure: Any) -> None:
    """Plot accesses and calls against the size."""
    points = Points(result["points"])
    left, right = figure.subplots(1, 2)
    for ax, kind, title in ((left, "access", "(a) accesses"), (right, "call", "(b) calls")):
        modes = list(dict.fromkeys(one["mode"] for one in points.select(kind=kind)))
        sizes = points.values("size", kind=kind)
        for i, mode in enumerate(modes):
            ax.plot(
                sizes,
                [_us(points, mode=mode, size=size, kind=kind) for size in sizes],
                color=f"C{i % 10}",
                marker="osv^DPX*<>ph"[i % 12],
                linestyle="--" if PRIVATE in mode else "-",
                label=mode,
            )
        plots.sizes_axis(ax, sizes)
        plots.log_y(ax)
        ax.set_xlabel("bytes")
        ax.set_ylabel("median, us")
        ax.set_title(title)
        ax.legend(
            fontsize=7,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
            ncols=2 if kind == "access" else 3,
        )
