"""Fig 10: the image pipeline, seven services of which the last looks at the picture (examples/image_pipeline).

Photographs as bitmaps go from a client through a firewall, a load balancer and one of two image processors to a transcoder or a
compressor, and results come back the same way. Over a memory server the same programs run in processes that have no pool. Work: *none* reads every byte and adds them up; *scale* makes a thumbnail, as the paper's
authors did; *light* is that, or zlib on its fastest level.

*pre-shared* in the pool: the last services have the pictures mapped. At a memory server they lie there, written once, and the
last service reads each from there, for each request, into memory that it has; with `net-copy` each request has a Ref to a copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from . import net, plots
from .pictures import pictures_block, start_service, why_not
from .runner import Case, Options, Runner, Ticker, running
from .summary import Point, Points, bar, bytes_text, point

NAME = "fig10"
TITLE = "Fig 10: seven services process pictures"
CLAIMS = (
    "8.3 x the throughput of by value (CXL; 4.2 x over the network); variants by reference gain with the size",
    "at 4 KB the mean latency is 1.7 x lower (CXL), tails are lower as well",
)
SIZES = (4 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
QUICK_SIZES = (4 << 10, 1 << 20, 4 << 20)
LATENCY_SIZES = (4 << 10, 64 << 10)
WINDOW = 4
LATENCY_SECONDS = 0.4  # of a block that is to have a 99.9th percentile
LINES = {
    "none": (
        ("value", "fresh"),
        ("cxl", "fresh"),
        ("cxl", "pre-shared"),
        ("cxl-copy", "fresh"),
        ("store", "fresh"),
        ("net", "fresh"),
        ("net", "pre-shared"),
        ("net-copy", "pre-shared"),
    ),
    "scale": (
        ("value", "fresh"),
        ("cxl", "fresh"),
        ("cxl", "pre-shared"),
        ("net", "fresh"),
        ("net", "pre-shared"),
    ),
    "light": (("value", "fresh"), ("cxl", "fresh"), ("net", "fresh")),
}
QUICK_LINES = {
    "none": (
        ("value", "fresh"),
        ("cxl", "fresh"),
        ("cxl", "pre-shared"),
        ("net", "fresh"),
        ("net", "pre-shared"),
        ("net-copy", "pre-shared"),
    ),
    "light": (("value", "fresh"), ("cxl", "fresh")),
}
CLIENT = "client"
HEIGHT = 7.6
DEVICE_BYTES = 512 << 20

# ---------------------------------------------------------------- measuring


def start_pipeline(
    runner: Runner, transport: str, *, store: bool, there: net.NetFabric | None = None
) -> tuple[str, ...]:
    """Start client and services, each in a process, also over a memory server; return the names of the services."""
    from examples.image_pipeline import roles

    names: tuple[str, ...] = roles.service_names(variants=("store",) if store else ())
    for name in reversed(names):
        runner.on.start(name, start_service, transport)
    runner.on.start(CLIENT)
    if there is not None:
        for name in reversed(roles.service_names()):
            there.start(name, start_service, transport)
        there.start(CLIENT)
    return names


def case(
    services: Sequence[str],
    variant: str,
    mode: str,
    transport: str,
    place: str,
    size: int,
    work: str,
    window: int,
    there: net.NetFabric | None = None,
    **more: Any,
) -> Case:
    """Return one point."""
    at_server = variant in net.VARIANTS
    prefix = net.PREFIX if at_server else ""
    return Case(
        variant,
        mode,
        {"size": size, "work": work, "window": window, "transport": transport, "place": place}
        | more,
        (f"{prefix}{CLIENT}",),
        pictures_block,
        {
            "variant": variant,
            "mode": mode,
            "transport": transport,
            "size": size,
            "work": work,
            "window": window,
        },
        tuple(f"{net.PREFIX}{name}" for name in services if name != "store")
        if at_server
        else (*services, "coordinator"),
        pids=net.told(there).pids if at_server else None,
        gauges=net.told(there).gauges if at_server else None,
    )


def _cases(
    services: Sequence[str],
    options: Options,
    transport: str,
    place: str,
    there: net.NetFabric | None,
) -> list[Case]:
    sizes = SIZES[1:2] if options.tiny else QUICK_SIZES if options.quick else SIZES
    lines = QUICK_LINES if options.quick else LINES
    made = []
    for work in ("none",) if options.tiny else lines:
        made += [
            case(services, variant, mode, transport, place, size, work, WINDOW, there)
            for variant, mode in lines[work]
            if options.wants(variant)
            for size in (sizes if work == "none" or not options.quick else sizes[-1:])
        ]
    for size in () if options.tiny else LATENCY_SIZES[:1] if options.quick else LATENCY_SIZES:
        for variant, mode in LINES["light"]:
            if options.wants(variant):
                one = case(services, variant, mode, transport, place, size, "none", 1, there)
                one.seconds = options.seconds if options.quick else LATENCY_SECONDS
                made.append(one)
    return made


def run(options: Options, ticker: Ticker) -> dict[str, Any]:
    """Measure."""
    if reason := why_not():
        return {"points": [], "bars": [], "skipped": {"image pipeline": reason}}
    found: list[Point] = []
    for transport in options.transports:
        with running(options, ticker, DEVICE_BYTES) as runner, net.if_wanted(runner) as there:
            services = start_pipeline(runner, transport, store=not options.quick, there=there)
            for place in options.places:
                runner.pin(place)
                cases = _cases(services, options, transport, place, there)
                found += map(point, runner.measure(cases, f"{transport}, {place}"))
    points = Points(found)
    return {"points": found, "bars": bars(points), "headline": headline(points)}


def under_latency(options: Options, ticker: Ticker) -> tuple[list[Point], str]:
    """Measure the pipeline while all hosts emulate slower devices: for Fig 12; or say why not."""
    from .fig12 import CHARGED, EXTRA_NS, OVERLAPS, QUICK_EXTRA_NS, emulate

    if (reason := why_not()) or options.tiny:
        return [], reason or "left out"
    found: list[Point] = []
    place = options.places[0]
    with running(options, ticker, DEVICE_BYTES) as runner:
        services = start_pipeline(runner, "ring", store=False)
        runner.pin(place)
        cases = []
        for extra_ns in QUICK_EXTRA_NS if options.quick else EXTRA_NS:

            def slow_down(extra_ns: int = extra_ns) -> None:
                for name in (CLIENT, *services):
                    runner.on.peers[name].call(emulate, extra_ns, OVERLAPS[0])

            for size, charged in itertools.product((256 << 10, 1 << 20), CHARGED):
                one = case(
                    services, "cxl", "fresh", "ring", place, size, "none", WINDOW,
                    extra_ns=extra_ns, overlap=OVERLAPS[0], charged=charged, panel="b",
                )  # fmt: skip
                one.arguments["charged"] = charged == "all"
                one.before = slow_down
                cases.append(one)
        found += map(point, runner.measure(cases, f"pictures, {place}"))
    return found, ""


# ---------------------------------------------------------------- what came of it

_ASKED = (
    ("tcp", 1 << 20, 4.0),
    ("tcp", 4 << 20, 8.3),
    ("ring", 1 << 20, 3.0),
    ("ring", 4 << 10, 0.9),
    ("tcp", 4 << 10, 0.9),
)
_ASKED_OF_SERVERS = (("fresh", 1.3), ("pre-shared", 3.0))
_ASKED_SIZES = (1 << 20, 4 << 20)


def bars(points: Points) -> list[dict[str, Any]]:
    """Return the bars of this figure."""
    made = []
    value, ours = ({"variant": name, "mode": "fresh"} for name in ("value", "cxl"))
    for place in points.values("place"):
        for transport, size, limit in _ASKED:
            for work in ("none", "scale", "light"):
                which = dict(size=size, work=work, window=WINDOW, transport=transport, place=place)
                found = points.ratio("per_second", ours, value, **which)
                if found is None:
                    continue
                cpu = points.ratio("cpu_us", value, ours, **which)
                assert cpu is not None
                alike = _alike(points, which)
                made.append(
                    bar(
                        f"{bytes_text(size)}, {'rings' if transport == 'ring' else 'TCP'}, work {work}, {place}: throughput "
                        "by Ref against by value",
                        found,
                        limit,
                        note=f"CPU time {cpu['median']:.3g} x lower{alike and '; '}{alike}",
                    )
                )
        made += _of_servers(points, place)
        for transport in points.values("transport", place=place):
            for size in LATENCY_SIZES:
                which = dict(size=size, work="none", window=1, transport=transport, place=place)
                for what in ("mean_us", "p99_us", "p99.9_us"):
                    found = points.ratio(what, value, ours, **which)
                    if found is not None:
                        made.append(
                            bar(
                                f"{bytes_text(size)}, {'rings' if transport == 'ring' else 'TCP'}, {place}: {what[:-3]} latency "
                                "by value against by Ref",
                                found,
                                1.0,
                                note=_alike(points, which),
                            )
                        )
    return made


def _alike(points: Points, which: dict[str, Any]) -> str:
    """Say so when `cxl` has sent by value as well."""
    one = points.one(variant="cxl", mode="fresh", **which)
    sent_by_ref = one is None or one["each"].get("bytes_referenced", 0.0) > 0
    return "" if sent_by_ref else "`cxl` sends this by value too: noise"


def _of_servers(points: Points, place: str) -> list[dict[str, Any]]:
    """Return what is asked of `net`, over TCP."""
    made = []
    value = {"variant": "value", "mode": "fresh"}
    for mode, limit in _ASKED_OF_SERVERS:
        ours = {"variant": "net", "mode": mode}
        for work in ("none", "scale"):
            for size in _ASKED_SIZES:
                which = dict(size=size, work=work, window=WINDOW, transport="tcp", place=place)
                found = points.ratio("per_second", ours, value, **which)
                cpu = points.ratio("cpu_us", value, ours, **which)
                if found is None or cpu is None:
                    continue
                made.append(
                    bar(
                        f"{bytes_text(size)}, TCP, work {work}, {place}: throughput over a memory server against by value, {mode}",
                        found,
                        limit,
                        note=f"CPU time {cpu['median']:.3g} x lower",
                    )
                )
    return made


def headline(points: Points) -> str:
    """Return what was measured, in one sentence."""
    place = plots.preferred(points.values("place"), "one CPU")
    told = []
    for transport in points.values("transport", place=place):
        sizes = points.values("size", transport=transport)
        which = dict(size=sizes[-1], work="none", window=WINDOW, transport=transport, place=place)
        for variant, says in (("cxl", ""), ("net", " and a memory server")):
            found = points.ratio(
                "per_second",
                {"variant": variant, "mode": "fresh"},
                {"variant": "value", "mode": "fresh"},
                **which,
            )
            if found:
                by = "rings" if transport == "ring" else "TCP"
                told.append(f"{found['median']:.2g} x over {by}{says}")
    return (
        f"throughput by Ref, {bytes_text(sizes[-1])}, no work, {place}: {', '.join(told)}"
        if told
        else ""
    )


def draw(result: dict[str, Any], figure: Any) -> None:
    """Plot throughput against the size, its ratio to by value, and latencies at 4 KiB."""
    points = Points(result["points"])
    if not points.points:
        figure.text(0.5, 0.5, "not measured: " + ", ".join(result["skipped"].values()), ha="center")
        return
    place = plots.preferred(points.values("place"), "one CPU")
    transports = points.values("transport", place=place)
    axes = figure.subplots(len(transports), 3, squeeze=False)
    for row, transport in enumerate(transports):
        told = f"{'rings' if transport == 'ring' else 'TCP'}, {place}"
        chosen = {"work": "none", "window": WINDOW, "transport": transport, "place": place}
        ax = axes[row][0]
        plots.lines(ax, points, "size", _gigabits, chosen)
        plots.sizes_axis(ax, points.values("size"))
        plots.log_y(ax)
        ax.set_xlabel("size of a picture")
        ax.set_ylabel("Gb/s of pictures")
        ax.set_title(f"(a) no work, {told}")
        _draw_gain(axes[row][1], points, transport, place)
        axes[row][1].set_title(f"(a') gain by Ref, {told}")
        _draw_latencies(axes[row][2], points, transport, place)
        axes[row][2].set_title(f"(b) latency, {told}")
    plots.legend(figure, axes)


def _gigabits(one: Point) -> tuple[float, float, float]:
    scale = one["params"]["size"] * 8 / 1e9
    found = one["per_second"]
    return found["median"] * scale, found["min"] * scale, found["max"] * scale


def _draw_gain(ax: Any, points: Points, transport: str, place: str) -> None:
    for i, work in enumerate(LINES):
        chosen = {"work": work, "window": WINDOW, "transport": transport, "place": place}
        xs, ys = [], []
        for size in points.values("size", **chosen):
            found = points.ratio(
                "per_second",
                {"variant": "cxl", "mode": "fresh"},
                {"variant": "value", "mode": "fresh"},
                size=size,
                **chosen,
            )
            if found:
                xs.append(size)
                ys.append(found["median"])
        if xs:
            ax.plot(
                xs,
                ys,
                marker="osD"[i],
                color=("#222222", "#c51b7d", "#a6611a")[i],
                label=f"gain by Ref; work: {work}",
            )
    ax.axhline(1, color="#999999", linewidth=0.8)
    plots.sizes_axis(ax, points.values("size"))
    ax.set_ylim(bottom=0)
    ax.set_xlabel("size of a picture")
    ax.set_ylabel("throughput, 1 = by value")


def _draw_latencies(ax: Any, points: Points, transport: str, place: str) -> None:
    from .variants import REGISTRY

    names = ("mean", "p50", "p99", "p99.5", "p99.9")
    size = LATENCY_SIZES[0]
    for i, variant in enumerate(("value", "cxl", "net")):
        one = points.one(
            variant=variant,
            mode="fresh",
            size=size,
            work="none",
            window=1,
            transport=transport,
            place=place,
        )
        if one is not None:
            ax.bar(
                [x + 0.28 * (i - 1) for x in range(len(names))],
                [one["latency_us"][name] for name in names],
                0.26,
                color=REGISTRY[variant].colour,
            )
    ax.set_xticks(range(len(names)), names)
    ax.set_ylabel(f"latency at {bytes_text(size)}, us")
