"""Fig 5: a chain of calls. What another service in between costs, by value and by Ref.

A client calls a service that calls the next one, and so on; the last one sums an array. In between are forwarders, which read
headers only. Each is a process. Over a memory server the services are the same, in processes that have no pool.
"""

from __future__ import annotations

import statistics
from typing import Any

from . import net, plots
from .calls import total_block
from .runner import Case, Options, Runner, Ticker, running
from .summary import Point, Points, bar, bytes_text, point, ratio, slopes, spread
from .variants import REGISTRY

NAME = "fig05"
TITLE = "Fig 5: a chain of calls"
CLAIMS = (
    "by reference (CXL) is best throughout, and nearly flat in the number of calls, while by value falls",
    "its latency is lower than by value for more than one call",
    "by reference over the network is better than by value for more than one call, and nearly flat as well",
)
LONGEST = 6
SIZES = (4 << 10, 64 << 10, 1 << 20, 4 << 20)
QUICK_SIZES = (4 << 10, 1 << 20)
WINDOW, WINDOW_SIZES = 8, (4 << 10, 1 << 20)
LINES = (
    ("value", "fresh"),
    ("cxl", "fresh"),
    ("cxl", "pre-shared"),
    ("net", "fresh"),
    ("net", "pre-shared"),
    ("net-copy", "pre-shared"),
)
SLOPE_BAR = 0.10
# What one more call costs is a hundredth of what a sum of 4 MiB costs: to tell it, more and longer blocks, of the ends only.
SLOPES, SLOPE_ROUNDS, SLOPE_SECONDS = "slopes", 15, 0.15
HEIGHT = 8.4


def lengths(options: Options) -> tuple[int, ...]:
    """Return how many calls in a row are measured."""
    return (1, 2) if options.tiny else (1, 3, 6) if options.quick else (1, 2, 4, LONGEST)


def _names(transport: str, longest: int) -> list[str]:
    prefix = "" if transport == "ring" else f"{transport}-"
    return [f"{prefix}worker", *(f"{prefix}forwarder-{i}" for i in range(1, longest))]


def lines(options: Options) -> list[tuple[str, str]]:
    """Return (variant, mode) of what is measured."""
    return [
        line
        for line in LINES
        if options.wants(line[0])
        and not (options.quick and line[0] == "net-copy" and not options.tiny)
    ]


def _cases(
    options: Options,
    transport: str,
    place: str,
    sizes: tuple[int, ...],
    windows: tuple[int, ...],
    there: net.NetFabric | None,
) -> list[Case]:
    hops = lengths(options)
    names = _names(transport, max(hops))
    made = []
    for variant, mode in lines(options):
        for size in sizes:
            for window in windows if size in WINDOW_SIZES and mode == "fresh" else (1,):
                # Eager copies are made before the first call: how many follow is not their matter.
                for n in hops if window == 1 and variant != "net-copy" else (hops[0], hops[-1]):
                    params = {"hops": n, "size": size, "window": window}
                    where = {"transport": transport, "place": place}
                    made.append(_case(variant, mode, params | where, names, there))
    return made


def _case(
    variant: str,
    mode: str,
    params: dict[str, Any],
    names: list[str],
    there: net.NetFabric | None = None,
) -> Case:
    at_server = variant in net.VARIANTS
    prefix = net.PREFIX if at_server else ""
    n = params["hops"]
    arguments = {
        "service": names[n - 1],
        "transport": "tcp" if params["transport"] == "tcp" else "auto",
        "transfer": REGISTRY[variant].transfer,
        "mode": mode,
        "size": params["size"],
        "window": params["window"],
        "eager": variant == "net-copy",
    }
    return Case(
        variant,
        mode,
        params,
        (f"{prefix}client",),
        total_block,
        arguments,
        tuple(f"{prefix}{name}" for name in (*names[:n], *(() if at_server else ("coordinator",)))),
        pids=net.told(there).pids if at_server else None,
    )


def _slope_cases(
    options: Options, transport: str, place: str, sizes: tuple[int, ...]
) -> list[Case]:
    """Return the shortest and the longest chain by Ref, for the bar on what one more call costs."""
    hops = lengths(options)
    names = _names(transport, max(hops))
    where = {"transport": transport, "place": place, "panel": SLOPES}
    made = [
        _case("cxl", mode, {"hops": n, "size": size, "window": 1} | where, names)
        for variant, mode in lines(options)
        if variant == "cxl"
        for size in sizes
        for n in (hops[0], hops[-1])
    ]
    for one in made:
        one.seconds = SLOPE_SECONDS
    return made


def run(options: Options, ticker: Ticker) -> dict[str, Any]:
    """Measure."""
    sizes = QUICK_SIZES[:2] if options.tiny else QUICK_SIZES if options.quick else SIZES
    found: list[Point] = []
    with running(options, ticker) as runner, net.if_wanted(runner) as there:
        longest = max(lengths(options))
        for on in (runner.on, there):
            if on is None:
                continue
            for transport in options.transports:
                on.chain(
                    "" if transport == "ring" else f"{transport}-",
                    longest,
                    "auto" if transport == "ring" else "tcp",
                )
            on.start("client")
        for place in options.places:
            runner.pin(place)
            for transport in options.transports:
                found += _measure(runner, options, transport, place, sizes, there)
    points = Points(found)
    return {
        "points": found,
        "bars": bars(points),
        "headline": headline(points),
        "slopes": slope_table(points),
    }


def _measure(
    runner: Runner,
    options: Options,
    transport: str,
    place: str,
    sizes: tuple[int, ...],
    there: net.NetFabric | None,
) -> list[Point]:
    windows = (1,) if options.quick else (1, WINDOW)
    # The slopes of all sizes are compared with each other, so all of them take turns.
    cases = _cases(options, transport, place, sizes, windows, there)
    found = runner.measure(cases, f"{transport}, {place}")
    if not options.quick:
        more = _slope_cases(options, transport, place, sizes)
        found += runner.measure(more, f"slopes, {transport}, {place}", SLOPE_ROUNDS)
    return [point(series) for series in found]


# ---------------------------------------------------------------- what came of it


def _slopes(points: Points, variant: str, mode: str, size: int, **where: Any) -> list[float] | None:
    which = dict(variant=variant, mode=mode, size=size, window=1, **where)
    line = points.select(panel=SLOPES, **which) or points.select(panel=None, **which)
    line.sort(key=lambda one: one["params"]["hops"])
    if len(line) < 2:
        return None
    hops = [one["params"]["hops"] for one in line]
    return slopes(hops, [one["rounds"]["cpu_us"] for one in line])


def _between(points: Points, variant: str, mode: str, size: int, **where: Any) -> float | None:
    """Return the CPU time in us of one service in between itself, in the longest chain."""
    which = dict(variant=variant, mode=mode, size=size, window=1, **where)
    line = points.select(panel=SLOPES, **which) or points.select(panel=None, **which)
    longest = max(line, key=lambda one: one["params"]["hops"], default=None)
    if longest is None or longest["params"]["hops"] < 2:
        return None
    each = [us for name, us in longest["cpu_us_by_process"].items() if "forwarder" in name]
    return sum(each) / len(each)


def _places(points: Points) -> list[tuple[str, str]]:
    return [
        (transport, place)
        for transport in points.values("transport")
        for place in points.values("place", transport=transport)
    ]


def slope_table(points: Points) -> list[dict[str, Any]]:
    """Return what one more call costs in CPU time, for each line and size."""
    return [
        {
            "variant": variant,
            "mode": mode,
            "transport": transport,
            "place": place,
            "size": size,
            **spread(found),
        }
        for transport, place in _places(points)
        for variant, mode in LINES
        for size in points.values("size")
        if (found := _slopes(points, variant, mode, size, transport=transport, place=place))
    ]


def bars(points: Points) -> list[dict[str, Any]]:
    """Return the bars of this figure."""
    made = []
    for transport, place in _places(points):
        where = {"transport": transport, "place": place}
        told = f"{'rings' if transport == 'ring' else 'TCP'}, {place}"
        for variant, mode in (("cxl", "fresh"), ("cxl", "pre-shared")):
            sizes = points.values("size")
            each = {size: _slopes(points, variant, mode, size, **where) for size in sizes}
            base = each.get(sizes[0])
            if base is None:
                continue
            off = {
                size: ratio(found, base)
                for size, found in each.items()
                if found is not None and size != sizes[0]
            }
            size, worst = max(off.items(), key=lambda item: abs(item[1]["median"] - 1))
            # Of medians: a single round's slope at 4 MiB hangs on a hundredth of what the sum costs.
            between = ", ".join(
                f"{one:.3g} us at {bytes_text(s)}"
                for s in sizes
                if (one := _between(points, "cxl", mode, s, **where)) is not None
            )
            ratios = {s: statistics.median(each[s] or ()) / statistics.median(base) for s in off}
            at, most = max(ratios.items(), key=lambda item: abs(item[1] - 1))
            made.append(
                bar(
                    f"CPU of one more call by Ref, {bytes_text(sizes[0])} to {bytes_text(sizes[-1])}, "
                    f"{mode}, {told}: off 1 by",
                    abs(most - 1),
                    SLOPE_BAR,
                    at_most=True,
                    unit="",
                    note=f"{most:.3g} at {bytes_text(at)}; of rounds {worst['min']:.2g} to {worst['max']:.2g} at "
                    f"{bytes_text(size)}; {statistics.median(base):.3g} us at {bytes_text(sizes[0])}; "
                    f"of that, the service in between itself: {between}",
                )
            )
        made += _of_servers(points, where, told)
    return made


def _of_servers(points: Points, where: dict[str, Any], told: str) -> list[dict[str, Any]]:
    """Return what the paper's claims about `net` come to: nearly flat against by value, better for more than one call."""
    made: list[dict[str, Any]] = []
    size = points.values("size")[-1]
    value = _slopes(points, "value", "fresh", size, **where)
    ours = _slopes(points, "net", "fresh", size, **where)
    if not value or not ours:
        return made
    # Of medians: what one more call costs by Ref is a hundredth of what the server and the sum cost.
    each = statistics.median(ours), statistics.median(value)
    made.append(
        bar(
            f"CPU of one more call over a memory server against by value, {bytes_text(size)}, fresh, {told}",
            each[0] / each[1],
            SLOPE_BAR,
            at_most=True,
            resolved=each[0] > 0,
            note=f"{each[0]:.3g} us against {each[1]:.4g} us",
        )
    )
    hops = points.values("hops", variant="net", **where)
    found = {
        n: points.ratio(
            "per_second",
            {"variant": "net"},
            {"variant": "value"},
            hops=n, mode="fresh", size=size, window=1, **where,
        )
        for n in hops
    }  # fmt: skip
    told_each = ", ".join(f"{one['median']:.3g} x with {n}" for n, one in found.items() if one)
    for n in hops:
        if n > 1:
            what = f"throughput over a memory server against by value, {bytes_text(size)}, fresh, {n} calls in a row, {told}"
            made.append(bar(what, found[n], 1.0, note=told_each))
            break
    return made


def _told(found: list[float]) -> str:
    median = statistics.median(found)
    return f"{median:.3g} us" if median > 0 else "less than can be told"


def headline(points: Points) -> str:
    """Return what was measured, in one sentence."""
    for transport, place in _places(points):
        where = {"transport": transport, "place": place}
        size = points.values("size")[-1]
        ours = _slopes(points, "cxl", "fresh", size, **where)
        value = _slopes(points, "value", "fresh", size, **where)
        if ours and value:
            there = _slopes(points, "net", "fresh", size, **where)
            by_server = f", {_told(there)} over a memory server" if there else ""
            return (
                f"one more call with {bytes_text(size)} costs {_told(ours)} of CPU by Ref{by_server} and "
                f"{statistics.median(value):.4g} us by value ({transport}, {place})"
            )
    return ""


def draw(result: dict[str, Any], figure: Any) -> None:
    """Plot throughput and latency against the number of calls, and what one more call costs against the size."""
    points = Points(result["points"])
    transport, place = _places(points)[0]
    where = {"transport": transport, "place": place}
    sizes = points.values("size")
    shown = [sizes[0], plots.preferred(sizes, 1 << 20)] if len(sizes) > 1 else sizes
    axes = figure.subplots(2, 3, squeeze=False)
    for row, size in enumerate(shown):
        chosen = {"size": size, "window": 1, "panel": None, **where}
        for column, (what, label) in enumerate(
            (("per_second", "calls per second"), ("latency", "median latency, us"))
        ):
            ax = axes[row][column]
            plots.lines(ax, points, "hops", what, chosen)
            ax.set_xlabel("calls in a row")
            ax.set_ylabel(label)
            ax.set_ylim(bottom=0)
            ax.set_title(
                f"({'abde'[2 * row + column]}) {bytes_text(size)}, {'rings' if transport == 'ring' else 'TCP'}, {place}"
            )
    for row, (transport, place) in enumerate(_slope_places(points)):
        _draw_slopes(axes[row][2], result["slopes"], transport, place, sizes)
        axes[row][2].set_title(
            f"({'cf'[row]}) {'rings' if transport == 'ring' else 'TCP'}, {place}"
        )
    plots.legend(figure, axes)


def _slope_places(points: Points) -> list[tuple[str, str]]:
    places = _places(points)
    first = places[0]
    other = next((one for one in places if one[0] != first[0]), places[-1])
    return [first, other]


def _draw_slopes(
    ax: Any, table: list[dict[str, Any]], transport: str, place: str, sizes: list[int]
) -> None:
    for variant, mode in LINES:
        line = [
            one
            for one in table
            if (one["variant"], one["mode"], one["transport"], one["place"])
            == (variant, mode, transport, place)
        ]
        if line:
            kind = REGISTRY[variant]
            medians = [one["median"] for one in line]
            ax.errorbar(
                [one["size"] for one in line],
                medians,
                [
                    [median - one["min"] for median, one in zip(medians, line, strict=True)],
                    [one["max"] - median for median, one in zip(medians, line, strict=True)],
                ],
                elinewidth=0.8,
                capsize=2,
                linestyle=plots.DASHES[mode],
                color=kind.colour,
                marker=kind.marker,
                label=plots.label(variant, mode),
            )
    plots.sizes_axis(ax, sizes)
    ax.set_yscale("symlog", linthresh=100)  # what cannot be told from noise may be below zero
    ax.axhline(0, color="#999999", linewidth=0.8)
    ax.set_xlabel("size of the array")
    ax.set_ylabel("CPU of one more call, us")
