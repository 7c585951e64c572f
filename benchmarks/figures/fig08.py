"""Fig 8: a block is sent, and the receiver stores to a share of it. Copy-on-write against systems that always copy.

The caller sends a block of 32 KiB or 1 MiB; the callee stores to the first bytes of each of so many of its pages, in order, and
answers with a sum over all pages, which the caller checks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from . import plots
from .runner import Case, Options, Runner, Ticker, running
from .summary import Point, Points, bar, bytes_text, point
from .variants import REGISTRY
from .variants.base import Parties, Writing
from .variants.work import PAGE

NAME = "fig08"
TITLE = "Fig 8: a block of which the receiver writes a share"
CLAIMS = (
    "up to 62 x the throughput of Ray (CXL), up to 315 x lower latency; Spark is slower than Ray",
    "over the network 5.6 x the throughput of Ray and 21.6 x that of Spark, up to 34.2 x lower latency than Ray",
    "the cost of copy-on-write grows with the share that is written; that of Ray and Spark hardly changes",
)
SMALL, LARGE = 32 << 10, 1 << 20
SHARES = (0.0, 12.5, 50.0, 75.0, 100.0)
WINDOW = 16
SPARK_SECONDS, SPARK_REQUESTS = 0.4, 4
RAY_SECONDS = 0.2

# Who is measured in which mode, by block and transport. Clusters and what is done by hand bring their own transport.
EVERYONE = (
    ("value", "fresh"),
    ("cxl", "fresh"),
    ("cxl", "shared"),
    ("cxl-copy", "shared"),
    ("net", "fresh"),
    ("store", "fresh"),
    ("shm", "fresh"),
    ("ray", "fresh"),
    ("ray-cg", "fresh"),
)
RING_ONLY = (
    ("cxl", "pre-shared"),
    ("cxl-1", "shared"),
    ("cxl-copy", "pre-shared"),
    ("net", "pre-shared"),
    ("net-copy", "pre-shared"),
    ("shm", "pre-shared"),
    ("spark", "fresh"),
)
PIPELINED = ("value", "cxl", "cxl-copy", "net", "shm", "ray", "ray-cg")
IN_ORDER = ("cxl", "shared")


def lines(size: int, transport: str, options: Options) -> list[tuple[str, str]]:
    """Return (variant, mode) of what is measured with one size over one transport."""
    wanted = list(EVERYONE)
    if transport == "ring":
        wanted += RING_ONLY
    if options.quick:
        wanted = [line for line in wanted if line[0] not in ("spark", "cxl-1")]
        if transport == "tcp" or size == LARGE:
            wanted = [line for line in wanted if not line[0].startswith("ray")]
        if options.tiny or size == LARGE:
            wanted = [line for line in wanted if line[1] != "pre-shared"]
    return [line for line in wanted if options.wants(line[0])]


def shares(options: Options) -> tuple[float, ...]:
    """Return the percentages of pages that are written."""
    return (0.0, 100.0) if options.quick else SHARES


def sizes(transport: str, options: Options) -> tuple[int, ...]:
    """Return the sizes of blocks."""
    one = options.tiny or (options.quick and transport != options.transports[0])
    return (SMALL,) if one else (SMALL, LARGE)


@contextlib.contextmanager
def parties(
    runner: Runner, names: Sequence[str], skipped: dict[str, str]
) -> Iterator[dict[str, Parties]]:
    """Start those variants that can be had, and say why the others cannot; stop what they started."""
    started: dict[str, Parties] = {}
    try:
        for name in names:
            variant = REGISTRY[name]
            assert isinstance(variant, Writing)
            if reason := variant.why_not():
                skipped[name] = reason
            else:
                started[name] = variant.start(runner)
        yield started
    finally:
        for one in started.values():
            if one.stop is not None:
                one.stop()


def case(who: Parties, variant: str, mode: str, params: dict[str, Any], transport: str) -> Case:
    """Return one point: a share of a block, sent by a variant."""
    pages = round(params["block"] // PAGE * params["share"] / 100)
    arguments = who.arguments | {
        "mode": mode,
        "size": params["block"],
        "pages": pages,
        "nbytes": params["stored"],
        "window": params["window"],
    }
    if who.over_rpc:
        arguments["transport"] = transport
    made = Case(
        variant,
        mode,
        {**params, "pages": pages, "transport": transport},
        (who.client,),
        who.factory,
        arguments,
        who.processes,
        who.pids,
        traffic=who.over_rpc,
    )
    if variant == "spark":
        made.seconds, made.max_requests = SPARK_SECONDS, SPARK_REQUESTS
    elif variant.startswith("ray"):
        made.seconds = RAY_SECONDS
    return made


def cases(
    who: dict[str, Parties], size: int, transport: str, place: str, options: Options
) -> list[Case]:
    """Return all points with one size over one transport."""
    base = {"block": size, "place": place, "stored": PAGE, "window": 1}
    made = [
        case(who[variant], variant, mode, base | {"share": share}, transport)
        for variant, mode in lines(size, transport, options)
        if variant in who
        for share in shares(options)
        if not (variant == "spark" and (share not in (0.0, 100.0) or place != "free"))
    ]
    if size == SMALL and not options.tiny:
        made += [
            case(
                who[name],
                name,
                "fresh" if name != "cxl-copy" else "shared",
                base | {"share": share, "window": WINDOW},
                transport,
            )
            for name in PIPELINED
            if name in who and (transport == "ring" or name in ("value", "cxl", "net", "ray"))
            for share in (0.0, 100.0)
        ]
        if transport == "ring":
            made += [
                case(who[name], name, mode, base | {"share": share, "stored": 4}, transport)
                for name, mode in (("cxl", "shared"), ("shm", "fresh"))
                if name in who
                for share in (50.0, 100.0)
            ]
    return made


def run(options: Options, ticker: Ticker) -> dict[str, Any]:
    """Measure."""
    names = list(dict.fromkeys(name for name, _ in (*EVERYONE, *RING_ONLY)))
    wanted = {
        name
        for size in (SMALL, LARGE)
        for transport in options.transports
        for name, _ in lines(size, transport, options)
    }
    skipped: dict[str, str] = {}
    found: list[Point] = []
    chosen = [name for name in names if name in wanted]
    with running(options, ticker) as runner, parties(runner, chosen, skipped) as who:
        for place in options.places:
            runner.pin(place)
            for transport in options.transports:
                for size in sizes(transport, options):
                    what = f"{bytes_text(size)}, {transport}, {place}"
                    series = runner.measure(cases(who, size, transport, place, options), what)
                    found += map(point, series)
    points = Points(found)
    return {
        "points": found,
        "bars": bars(points),
        "skipped": skipped,
        "headline": headline(points),
    }


# ---------------------------------------------------------------- what came of it


def _worst(points: Points, other: str, size: int, mode: str, **where: Any) -> Any:
    """Return (spread, share) of the share at which `cxl` does worst against another."""
    found = []
    for share in points.values("share", **where):
        which = dict(block=size, share=share, stored=PAGE, window=1, **where)
        one = points.ratio(
            "p50_us", {"variant": other, "mode": "fresh"}, {"variant": "cxl", "mode": mode}, **which
        )
        if one is not None:
            found.append((one["median"], share, one))
    if not found:
        return None, None
    worst = min(found, key=lambda item: item[:2])
    return worst[2], worst[1]


def bars(points: Points) -> list[dict[str, Any]]:
    """Return the bars of this figure."""
    made = []
    for place in points.values("place"):
        for transport in points.values("transport", place=place):
            where = {"place": place, "transport": transport}
            told = f"{'rings' if transport == 'ring' else 'TCP'}, {place}"
            made += _against_ray(points, where, told)
            made += _of_servers(points, where, told)
            for other in ("store", "shm"):
                made += _against(points, other, where, told)
    for one in points.select(stored=PAGE, window=1, mode="shared", transport="ring"):
        if one["variant"] in ("cxl", "cxl-1"):
            copied, pages = one["each"].get("frames_copied", 0.0), one["params"]["pages"]
            how = "copy_around=1" if one["variant"] == "cxl-1" else "as shipped"
            made.append(
                bar(
                    f"frames copied when {one['params']['share']:g} % of {bytes_text(one['params']['block'])} "
                    f"are written, {how}, {one['params']['place']}: off {pages} by",
                    abs(copied - pages),
                    0,
                    at_most=True,
                    unit="frames",
                )
            )
    return made


def _against_ray(points: Points, where: dict[str, Any], told: str) -> list[dict[str, Any]]:
    which = {"block": SMALL, "stored": PAGE, **where}
    fresh, shared = ({"variant": "cxl", "mode": mode} for mode in ("fresh", "shared"))
    ray, graph = ({"variant": name, "mode": "fresh"} for name in ("ray", "ray-cg"))
    asked = (
        ("0 % written: latency of Ray against ours", ray, fresh, 0.0, 100),
        ("100 % written, shared: latency of Ray against ours", ray, shared, 100.0, 25),
        (
            "100 % written, shared: latency of a compiled graph against ours",
            graph,
            shared,
            100.0,
            8,
        ),
    )
    made = [
        bar(f"32 KiB, {what}, {told}", found, limit)
        for what, over, under, share, limit in asked
        if (found := points.ratio("p50_us", over, under, share=share, window=1, **which))
    ]
    found = points.ratio("per_second", fresh, ray, share=0.0, window=WINDOW, **which)
    if found:
        made.append(
            bar(
                f"32 KiB, {WINDOW} under way, 0 % written: throughput against Ray's, {told}",
                found,
                62,
            )
        )
    return made


def _of_servers(points: Points, where: dict[str, Any], told: str) -> list[dict[str, Any]]:
    """Return what is asked of `net`: with nothing written, as Ray's and Spark's times hardly depend on it."""
    which = {"block": SMALL, "stored": PAGE, "share": 0.0, **where}
    ours, kept = ({"variant": "net", "mode": mode} for mode in ("fresh", "pre-shared"))
    ray, spark = ({"variant": name, "mode": "fresh"} for name in ("ray", "spark"))
    made = []
    for what, rounds, over, under, window, limit in (
        ("latency of Ray against", "p50_us", ray, ours, 1, 34),
        (f"throughput against Ray's, {WINDOW} under way,", "per_second", ours, ray, WINDOW, 5.6),
        ("throughput against Spark's, one under way,", "per_second", ours, spark, 1, 21.6),
    ):
        found = points.ratio(rounds, over, under, window=window, **which)
        if found is None:
            continue
        note = ""
        more = points.ratio("p50_us", ray, kept, window=1, **which) if rounds == "p50_us" else None
        if more is not None:
            note = f"with a block that was put there before {more['median']:.3g} x"
        made.append(
            bar(f"32 KiB, 0 % written: {what} a memory server, {told}", found, limit, note=note)
        )
    return made


def _against(points: Points, other: str, where: dict[str, Any], told: str) -> list[dict[str, Any]]:
    says = {"store": "an object store", "shm": "shared memory by hand"}[other]
    made = []
    for size in (SMALL, LARGE):
        worst, share = _worst(points, other, size, "fresh", **where)
        if worst is None:
            continue
        kept, kept_share = _worst(points, other, size, "shared", **where)
        note = f"at {share:g} % written"
        if kept is not None:
            note += (
                f"; with a block that its sender keeps {kept['median']:.2g} x, at {kept_share:g} %"
            )
        made.append(
            bar(
                f"{bytes_text(size)}: latency of {says} against ours, worst share, {told}",
                worst,
                1.0,
                note=note,
            )
        )
        if size == LARGE:
            found = points.ratio(
                "p50_us",
                {"variant": other, "mode": "fresh"},
                {"variant": "cxl", "mode": "fresh"},
                block=size,
                share=0.0,
                stored=PAGE,
                window=1,
                **where,
            )
            made.append(
                bar(f"1 MiB, 0 % written: latency of {says} against ours, {told}", found, 2)
            )
    return made


def headline(points: Points) -> str:
    """Return what was measured, in one sentence."""
    place = plots.preferred(points.values("place"), "one CPU")
    where = {"place": place, "transport": "ring", "block": SMALL, "stored": PAGE, "window": 1}
    told = []
    for other, says in (("ray", "Ray"), ("ray-cg", "a compiled graph of Ray"), ("store", "an object store"),
                        ("shm", "shared memory by hand")):  # fmt: skip
        each = [
            points.ratio(
                "p50_us", {"variant": other, "mode": "fresh"}, {"variant": "cxl", "mode": mode},
                share=share, **where,
            )
            for mode, share in (("fresh", 0.0), ("shared", 100.0))
        ]  # fmt: skip
        if each[0] and each[1]:
            told.append(
                f"{says} takes {each[0]['median']:.3g} and {each[1]['median']:.3g} x as long"
            )
    if not told:
        return ""
    return f"32 KiB, {place}, with nothing written, and with all of a shared block written: {'; '.join(told)}"


# What is drawn: the ways of the library in one row, what others do in the next.
_OURS = ("value", "cxl", "cxl-1", "cxl-copy", "net", "net-copy")
_OTHERS = ("cxl", "store", "shm", "ray", "ray-cg", "spark")
HEIGHT = 9.4


def draw(result: dict[str, Any], figure: Any) -> None:
    """Plot latency against the share that is written, both sizes; and what everybody's requests per second come to."""
    points = Points(result["points"])
    place = plots.preferred(points.values("place"), "one CPU")
    sizes = points.values("block")
    axes = figure.subplots(3, len(sizes), squeeze=False)
    letters = iter("abcdef")
    for row, (variants, modes, says) in enumerate(
        ((_OURS, None, "ways of this library"), (_OTHERS, ("fresh", "shared"), "and others"))
    ):
        for column, size in enumerate(sizes):
            ax = axes[row][column]
            chosen = {
                "block": size, "place": place, "transport": "ring", "stored": PAGE, "window": 1,
            }  # fmt: skip
            plots.lines(ax, points, "share", "latency", chosen, modes, variants)
            plots.log_y(ax)
            ax.set_xlabel("share of pages written, %")
            ax.set_ylabel("median latency, us")
            ax.set_title(f"({next(letters)}) {bytes_text(size)}, {says}, {place}")
    where = plots.preferred(points.values("place"), "free")  # where Spark is measured
    for column, size in enumerate(sizes):
        _draw_rates(axes[2][column], points, size, where)
        axes[2][column].set_title(f"({next(letters)}) {bytes_text(size)}, nothing written, {where}")
    plots.legend(figure, axes)


def _draw_rates(ax: Any, points: Points, size: int, place: str) -> None:
    """Draw a bar for the requests per second of everybody, one under way."""
    which = {
        "block": size, "place": place, "transport": "ring", "stored": PAGE, "window": 1,
        "mode": "fresh", "share": 0.0,
    }  # fmt: skip
    found = [
        (name, one) for name in REGISTRY if (one := points.one(variant=name, **which)) is not None
    ]
    for i, (name, one) in enumerate(found):
        rate = one["per_second"]
        low, high = rate["median"] - rate["min"], rate["max"] - rate["median"]
        ax.bar(i, rate["median"], 0.7, color=REGISTRY[name].colour, yerr=[[low], [high]], capsize=2)
    ax.set_xticks(range(len(found)), [name for name, _ in found])
    plots.log_y(ax)
    ax.set_ylabel("requests per second")
