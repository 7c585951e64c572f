"""E0: what raw accesses and single calls cost. These constants explain the figures.

Accesses: copying into and out of DM by plain stores and loads, beside the same for private memory. Calls: those of the paper's table
and what else a Ref can do, each timed by itself in one host. Faults: the first store to a page.

At a memory server an access is a round trip over loopback TCP, one outstanding. What looking up addresses takes of it is timed inside a
second server (--time-translation), less what looking at the clock takes; the accesses that it is compared with are those of the
first server, which does without.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from . import net, net_blocks, plots
from .blocks import Block
from .runner import Case, Options, Runner, Ticker, running
from .summary import Point, Points, bar, bytes_text, point, spread

NAME = "e0"
TITLE = "E0: what accesses and calls cost"
CLAIMS = ("translating addresses in software takes 0.17 % of an access over the network",)
ACCESS_SIZES = (64, 1024, 4 << 10, 32 << 10, 256 << 10, 1 << 20, 4 << 20)
CALL_SIZES = (4 << 10, 32 << 10, 256 << 10, 1 << 20)
CLIENT, TIMING_CLIENT = "client", "timing-client"
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
TRANSLATION_BAR, TRANSLATION_SIZE = 0.02, 4096
NET_ACCESSES = ("rwrite", "rread")
TIMED = "rread, look-ups timed"
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
        accesses, calls = (4 << 10, 1 << 20), CALL_SIZES[1::2]
    if options.tiny:
        accesses, calls = (4096,), (32 << 10,)
    room = TINY_WORKING_BYTES if options.tiny else WORKING_BYTES
    found: list[Point] = []
    with running(options, ticker) as runner:
        runner.on.start(CLIENT)
        for place in options.places[:1] if options.wants("cxl") else ():
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
        if options.wants("net"):
            found += _at_servers(runner, options, accesses, calls, room)
    points = Points(found)
    return {
        "points": found,
        "bars": bars(points),
        "headline": headline(points),
        "tables": tables(points),
    }


def _at_servers(
    runner: Runner,
    options: Options,
    accesses: tuple[int, ...],
    calls: tuple[int, ...],
    room: int,
) -> list[Point]:
    """Measure accesses and calls at a memory server, and the look-ups of another."""
    found: list[Point] = []
    place = options.places[0]
    with net.net_fabric(runner) as there, net.timing_server(runner) as timing:
        there.start(CLIENT)
        timing.start(TIMING_CLIENT)
        runner.pin(place)

        def case(mode: str, size: int, kind: str, at: net.NetFabric, name: str, **how: Any) -> Case:
            factory = net_blocks.call_block if kind == "call" else net_blocks.access_block
            return Case(
                "net",
                mode,
                {"size": size, "place": place, "kind": kind},
                (f"{net.PREFIX}{name}",),
                factory,
                {"size": size} | how,
                pids=at.pids,
                gauges=at.gauges,
                max_requests=1000 if kind == "call" else 20_000,
            )

        cases = []
        for size in accesses:
            where: dict[str, Any] = {
                "size": size, "kind": "access", "room": max(room, 2 * size),
            }  # fmt: skip
            cases += [
                case(what, at=there, name=CLIENT, what=what, **where) for what in NET_ACCESSES
            ]
            cases.append(case(TIMED, at=timing, name=TIMING_CLIENT, what="rread", **where))
        found += map(point, runner.measure(cases, f"accesses at a server, {place}"))
        cases = [
            case(call, size, "call", there, CLIENT, call=call)
            for call in net_blocks.CALLS
            for size in calls
        ]
        found += map(point, runner.measure(cases, f"calls to a server, {place}"))
    return found


def translation(points: Points, size: int) -> tuple[float, dict[str, float]] | None:
    """Return the ns that looking up addresses takes of an rread, and their share of it; None: it was not measured."""
    timed = points.one(variant="net", mode=TIMED, size=size, kind="access")
    plain = points.one(variant="net", mode="rread", size=size, kind="access")
    if timed is None or plain is None:
        return None
    ns = float(timed["each"].get("translation_ns", 0.0))
    return ns, spread([ns / 1e3 / us for us in plain["rounds"]["p50_us"]])


def bars(points: Points) -> list[dict[str, Any]]:
    """Return the bar of the translation."""
    found = translation(points, TRANSLATION_SIZE)
    if found is None:
        return []
    ns, share = found
    return [
        bar(
            f"translation at a memory server, share of an rread of {bytes_text(TRANSLATION_SIZE)}",
            share,
            TRANSLATION_BAR,
            at_most=True,
            unit="",
            note=f"{ns:.3g} ns; the paper has 0.0017",
        )
    ]


def translation_table(points: Points) -> dict[str, Any]:
    """Return what translation takes, for each size."""
    sizes = points.values("size", variant="net", mode=TIMED)
    found = [translation(points, size) for size in sizes]
    rows: list[list[Any]] = [
        ["ns for the look-ups", *(one and one[0] for one in found)],
        ["share of the rread, %", *(one and 100 * one[1]["median"] for one in found)],
    ]
    return {"title": "translation", "head": ["", *map(bytes_text, sizes)], "rows": rows}


def _us(points: Points, **which: Any) -> float | None:
    one = points.one(**which)
    return None if one is None else one["latency_us"]["p50"]


def tables(points: Points) -> list[dict[str, Any]]:
    """Return the two tables, as a report shows them."""
    made = []
    for variant, kind, title in (
        ("cxl", "access", "us for one access"),
        ("cxl", "call", "us for one call"),
        ("net", "access", "us for one access at a memory server"),
        ("net", "call", "us for one call to a memory server"),
    ):
        which: dict[str, Any] = {"variant": variant, "kind": kind}
        sizes = points.values("size", **which)
        rows = [
            [mode, *(_us(points, mode=mode, size=size, **which) for size in sizes)]
            for mode in dict.fromkeys(one["mode"] for one in points.select(**which))
            if mode != TIMED
        ]
        if rows:
            made.append({"title": title, "head": ["", *map(bytes_text, sizes)], "rows": rows})
    if points.select(mode=TIMED):
        made.append(translation_table(points))
    return made


def headline(points: Points) -> str:
    """Return what was measured, in one sentence."""
    sizes = points.values("size", kind="access", variant="cxl")
    if not sizes:
        return ""
    size = sizes[-1]
    private, shared = (
        _us(points, mode=f"read, {where}", size=size, kind="access") for where in (PRIVATE, SHARED)
    )
    assert private is not None
    assert shared is not None
    told = f"reading {bytes_text(size)} of a shared mapping takes {shared / private:.2g} x as long as reading private memory"
    if (found := translation(points, TRANSLATION_SIZE)) is not None:
        told += f"; there the MMU translates; at a memory server it takes {100 * found[1]['median']:.2g} % of an rread of 4 KiB"
    return told


def draw(result: dict[str, Any], figure: Any) -> None:
    """Plot accesses and calls against the size."""
    points = Points(result["points"])
    axes = figure.subplots(2, 2).flat
    for ax, letter, (kind, at_server) in zip(
        axes,
        "abcd",
        (("access", False), ("access", True), ("call", False), ("call", True)),
        strict=True,
    ):
        drawn = dict.fromkeys(
            (one["variant"], one["mode"])
            for one in points.select(kind=kind)
            if (one["variant"] == "net") == at_server and one["mode"] != TIMED
        )
        sizes = points.values("size", kind=kind)
        for i, (variant, mode) in enumerate(drawn):
            ax.plot(
                sizes,
                [_us(points, variant=variant, mode=mode, size=size, kind=kind) for size in sizes],
                color=f"C{i % 10}",
                marker="osv^DPX*<>ph"[i % 12],
                linestyle="--" if PRIVATE in mode or i >= 10 else "-",
                label=mode,
            )
        plots.sizes_axis(ax, sizes)
        if drawn:
            plots.log_y(ax)
            ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
        ax.set_xlabel("bytes")
        ax.set_ylabel("median, us")
        what = "accesses" if kind == "access" else "calls"
        ax.set_title(f"({letter}) {what}, {'memory server' if at_server else 'pool'}")
