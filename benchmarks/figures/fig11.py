"""Fig 11: the social network, most of whose services hand on what others have written (examples/social_network).

60 % of the requests read a home timeline, 30 % a user timeline, 10 % compose a post. What comes back from a read passes the
timeline's service, php-fpm, proxy and load balancer unread. Profiles: *original*, DeathStarBench's, with posts of less than 1 KB; *heavy*,
posts of 3 KB and ten of them in each read; *media*, 32 KiB of picture in each post, which is ours.

The network runs twice at the same time, each service a process: on hosts with the pool for `value` and `cxl`, on hosts that use a memory
server for `net`. Both are filled with the same users and posts, and checked before anything is measured.

First each variant makes as many requests as it can, 8 at a time. Then all make requests on schedule (an open loop), at the same rates:
shares of the largest of those capacities. A rate is *held* if the 99th percentile of the latencies stays below BOUND times that of by
value at the lowest rate, and requests were done at 99 % of the rate at which they were offered, once that percentile has passed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from ..rpc_stage import Stage
from . import net, plots
from .posts import (
    bytes_forwarded,
    fill_network,
    requests_block,
    start_process,
    stop_process,
    why_not,
)
from .runner import Case, Options, Runner, Ticker, running
from .summary import Point, Points, bar, point

NAME = "fig11"
TITLE = "Fig 11: a social network"
CLAIMS = (
    "3.1 x the request rate of by value, 2.5 x lower mean latency, lower tails at equal rates (over the network; with CXL it was not measured)",
)
REMARKS = (
    "To fit into the time, points are short: half a second for each rate and round, no warm-up but the capacity blocks before them, four "
    "rates, 200 of the graph's 962 users. So the 99th percentile of a round rests on a few to a dozen requests, and the highest rate held is "
    "one of four: ratios of such rates go in steps, and one step is no difference. Capacities, CPU time and bytes are the firmer figures. "
    "`make social` runs one profile over all users for as long as it is told to.",
)
VARIANTS = ("value", "net", "cxl")
"""To have another one measured: a class in examples/social_network/variants.py, and its name here."""
BY_REF = ("net", "cxl")
MORE_VARIANTS = ("cxl-ref", "cxl-posts")  # by reference however small; capacity only
PROFILES = ("original", "heavy", "media")
QUICK_PROFILES, QUICK_TRANSPORTS = ("original", "heavy"), ("tcp",)
RATED = ("original", "heavy")  # those with rates, not capacity alone
SHARES = (0.1, 0.5, 0.7, 0.9)
QUICK_SHARES = (0.1, 0.5, 0.8)
EQUAL_SHARE = 0.5  # of the smaller capacity: where mean latencies are compared
BOUND = 10.0
HELD = 0.99
SECONDS, QUICK_SECONDS = 0.5, 0.25
USERS, QUICK_USERS = 200, 100
CLIENT = "client"
HEIGHT = 7.6
DEVICE_BYTES = 512 << 20

# ---------------------------------------------------------------- measuring


def start_network(on: Stage | net.NetFabric, options: Options, transport: str) -> tuple[str, ...]:
    """Start client and services, each in a process; return the names of the services' processes."""
    from examples.social_network import roles

    names = roles.process_names(compact=options.quick)
    for name in reversed(names):
        on.start(name, start_process, transport)
    on.start(CLIENT)
    return names


def case(
    runner: Runner,
    services: Sequence[str],
    variant: str,
    profile: str,
    transport: str,
    place: str,
    share: float,
    rate: float,
    there: net.NetFabric | None,
) -> Case:
    """Return one point; rate 0: as many requests as possible."""
    from examples.social_network.roles import MOVERS

    users = QUICK_USERS if runner.options.quick else USERS
    at_server = variant in net.VARIANTS
    prefix = net.PREFIX if at_server else ""

    def gauges() -> dict[str, float]:
        return {
            f"bytes_{name}": float(runner.on.peers[f"{prefix}{name}"].call(bytes_forwarded))
            for name in MOVERS
        }

    seconds = runner.options.seconds
    if not runner.options.tiny:
        seconds = QUICK_SECONDS if runner.options.quick else SECONDS
    return Case(
        variant,
        "fresh",
        {"profile": profile, "transport": transport, "place": place, "share": share, "rate": rate},
        (f"{prefix}{CLIENT}",),
        requests_block,
        {
            "variant": variant,
            "profile": profile,
            "users": users,
            "transport": transport,
            "rate": rate,
        },
        tuple(f"{prefix}{name}" for name in (*services, *(() if at_server else ("coordinator",)))),
        pids=net.told(there).pids if at_server else None,
        seconds=seconds,
        gauges=gauges,
    )


def measure(
    runner: Runner,
    services: Sequence[str],
    profile: str,
    transport: str,
    there: net.NetFabric | None,
) -> list[Point]:
    """Measure one profile, all processes where the runner has put them."""
    options, place = runner.options, runner.place or "free"
    which = [
        name
        for name in (*VARIANTS, *(() if options.quick else MORE_VARIANTS))
        if options.wants(name)
    ]

    def cases(names: Sequence[str], share: float, rate: float) -> list[Case]:
        return [
            case(runner, services, name, profile, transport, place, share, rate, there)
            for name in names
        ]

    told = f"{profile}, {transport}, {place}"
    found = [point(series) for series in runner.measure(cases(which, 0.0, 0.0), told)]
    if profile in RATED:
        names = [name for name in which if name in VARIANTS]
        most = max(one["per_second"]["median"] for one in found if one["variant"] in names)
        shares = QUICK_SHARES[1:2] if options.tiny else QUICK_SHARES if options.quick else SHARES
        rated = [one for share in shares for one in cases(names, share, share * most)]
        found += map(point, runner.measure(rated, f"rates: {told}"))
    return found


def run(options: Options, ticker: Ticker) -> dict[str, Any]:
    """Measure."""
    if reason := why_not():
        return {"points": [], "bars": [], "skipped": {"social network": reason}}
    found: list[Point] = []
    profiles: Sequence[str] = PROFILES
    transports: Sequence[str] = options.transports
    if options.tiny:
        profiles = PROFILES[1:2]
    elif options.quick:
        profiles = QUICK_PROFILES
        transports = [one for one in transports if one in QUICK_TRANSPORTS] or transports
    users = QUICK_USERS if options.quick else USERS
    for transport, profile in itertools.product(transports, profiles):
        with running(options, ticker, DEVICE_BYTES) as runner, net.if_wanted(runner) as there:
            services: tuple[str, ...] = ()
            for on, prefix in ((runner.on, ""), (there, net.PREFIX)):
                if on is not None:
                    services = start_network(on, options, transport)
                    runner.on.peers[f"{prefix}{CLIENT}"].call(fill_network, profile, users)
            for place in options.places:
                runner.pin(place)
                found += measure(runner, services, profile, transport, there)
            for prefix in ("", net.PREFIX):
                for name in services:
                    if (peer := runner.on.peers.get(f"{prefix}{name}")) is not None:
                        peer.call(stop_process)
    points = Points(found)
    return {
        "points": found,
        "bars": bars(points),
        "headline": headline(points),
        "tables": [rates_table(points)],
    }


# ---------------------------------------------------------------- what came of it


def _where(points: Points) -> list[dict[str, Any]]:
    return [
        {"profile": profile, "transport": transport, "place": place}
        for profile in PROFILES
        for transport in points.values("transport")
        for place in points.values("place")
        if points.select(profile=profile, transport=transport, place=place)
    ]


def bound_ms(points: Points, **where: Any) -> float:
    """Return what the 99th percentile has to stay below, in ms; 0: there are no rates."""
    shares = [share for share in points.values("share", **where) if share]
    first = points.one(variant="value", share=shares[0], **where) if shares else None
    return BOUND * float(first["latency_us"]["p99"]) / 1e3 if first else 0.0


def held(one: Point, bound: float) -> bool:
    """Say whether a point's rate was held."""
    if one["each"].get("aborted") or one["latency_us"]["p99"] / 1e3 > bound:
        return False
    requests = one["requests_per_block"]
    scheduled_ms = one["each"]["scheduled_ns"] * requests / 1e6
    took_ms = requests * 1e3 / one["per_second"]["median"]
    return bool(took_ms <= scheduled_ms / HELD + bound / BOUND)


def highest_rate(points: Points, variant: str, **where: Any) -> float | None:
    """Return the highest rate that a variant held; 0: none; None: it was not measured."""
    rated = [one for one in points.select(variant=variant, **where) if one["params"]["share"]]
    bound = bound_ms(points, **where)
    if not rated or not bound:
        return None
    return max((one["params"]["rate"] for one in rated if held(one, bound)), default=0.0)


def equal_share(points: Points, **where: Any) -> float | None:
    """Return the share at which latencies are compared: the highest up to EQUAL_SHARE."""
    shares = [share for share in points.values("share", **where) if 0 < share <= EQUAL_SHARE]
    return shares[-1] if shares else None


def rates_table(points: Points) -> dict[str, Any]:
    """Return capacity, highest rate held, bound and CPU time for each variant."""
    rows = []
    for where in _where(points):
        for variant in (*VARIANTS, *MORE_VARIANTS):
            one = points.one(variant=variant, share=0.0, **where)
            if one is None:
                continue
            rows.append(
                (
                    f"{variant}, {', '.join(where.values())}",
                    one["per_second"]["median"],
                    highest_rate(points, variant, **where),
                    bound_ms(points, **where) or None,
                    one["cpu_us"]["median"] / 1e6,
                    one["each"].get("bytes_proxy", 0.0),
                )
            )
    head = ["", "capacity, 1/s", "highest rate held, 1/s", "p99 at most, ms", "CPU s per request", "bytes through proxy"]  # fmt: skip
    return {"title": "rates", "head": head, "rows": rows}


def bars(points: Points) -> list[dict[str, Any]]:
    """Return the bars of this figure."""
    made = []
    for where in _where(points):
        limit = {"original": 0.95, "heavy": 2.0}.get(where["profile"])
        if limit is None:
            continue
        names = [name for name in BY_REF if points.one(variant=name, share=0.0, **where)]
        if not names or points.one(variant="value", share=0.0, **where) is None:
            continue
        if where["profile"] == "heavy":
            # Asked of the better one, whichever that is at what the bar is about.
            names = [max(names, key=lambda name: _standing(points, name, where))]
        for name in names:
            made += _bars_of(points, name, where, limit)
    return made


def _standing(points: Points, name: str, where: dict[str, Any]) -> tuple[float, float]:
    capacity = points.one(variant=name, share=0.0, **where)
    assert capacity is not None
    return highest_rate(points, name, **where) or 0.0, capacity["per_second"]["median"]


def _passing(points: Points, name: str, where: dict[str, Any]) -> str:
    """Say what passes the proxy: as much as by value, if lists of this profile are below the threshold."""
    both = [points.one(variant=one, share=0.0, **where) for one in (name, "value")]
    ours, value = (one["each"].get("bytes_proxy", 0.0) if one else 0.0 for one in both)
    return f"{ours:,.0f} bytes pass the proxy, by value {value:,.0f}"


def _bars_of(
    points: Points, name: str, where: dict[str, Any], limit: float
) -> list[dict[str, Any]]:
    """Return the bars of a variant."""
    profile, told = where["profile"], f"{where['transport']}, {where['place']}"
    value, ours = {"variant": "value"}, {"variant": name}
    says = name if profile == "original" else f"the better of {' and '.join(BY_REF)}, {name},"
    made = []
    capacity = points.ratio("per_second", ours, value, share=0.0, **where)
    cpu = points.ratio("cpu_us", value, ours, share=0.0, **where)
    note = (
        f"CPU time of a request {cpu['median']:.3g} x lower; {_passing(points, name, where)}"
        if cpu
        else ""
    )
    rates = [highest_rate(points, one, **where) for one in ("value", name)]
    if rates[0]:
        ratio = (rates[1] or 0.0) / rates[0]
        what = f"{profile}, {told}: highest rate held by {says} against value"
        made.append(bar(what, ratio, limit, note=note))
    what = f"{profile}, {told}: capacity of {says} against value"
    made.append(bar(what, capacity, limit, note=note))
    share = equal_share(points, **where)
    if share is None:
        return made
    for statistic in ("mean_us", "p99_us"):
        found = points.ratio(statistic, value, ours, share=share, **where)
        if found is not None:
            made.append(
                bar(
                    f"{profile}, {told}: {statistic[:-3]} latency of value against {says} "
                    f"at {share:.0%} of the largest capacity",
                    found,
                    1.0 if profile == "heavy" else 0.95,
                )
            )
    return made


def headline(points: Points) -> str:
    """Return what was measured, in one sentence."""
    told = []
    place = plots.preferred(points.values("place"), "one CPU")
    for where, name in itertools.product(_where(points), BY_REF):
        found = points.ratio(
            "per_second", {"variant": name}, {"variant": "value"}, share=0.0, **where
        )
        if found and where["place"] == place:
            told.append(
                f"{found['median']:.2g} x ({name}, {where['profile']}, {where['transport']})"
            )
    return f"requests per second by Ref against by value: {', '.join(told)}" if told else ""


def draw(result: dict[str, Any], figure: Any) -> None:
    """Plot mean and tail latency against the rate, for each profile."""
    points = Points(result["points"])
    if not points.points:
        figure.text(0.5, 0.5, "not measured: " + ", ".join(result["skipped"].values()), ha="center")
        return
    place = plots.preferred(points.values("place"), "one CPU")
    where = [one for one in _where(points) if one["place"] == place and one["profile"] in RATED]
    axes = figure.subplots(2, max(len(where), 1), squeeze=False)
    for column, one in enumerate(where):
        rated = Points([p for p in points.select(**one) if p["params"]["share"]])
        for row, what in enumerate(("mean", "p99")):
            ax = axes[row][column]
            plots.lines(ax, rated, "rate", _milliseconds(what), {})
            plots.log_y(ax)
            ax.set_xlabel("requests per s")
            ax.set_ylabel(f"{what} latency, ms")
            ax.set_title(f"{one['profile']}, {one['transport']}, {place}", fontsize=8)
    plots.legend(figure, axes)


def _milliseconds(what: str) -> Any:
    def read(one: Point) -> tuple[float, float, float] | None:
        rounds = sorted(one["rounds"].get(f"{what}_us", ()))
        if not rounds or one["each"].get("aborted"):
            return None
        return rounds[len(rounds) // 2] / 1e3, rounds[0] / 1e3, rounds[-1] / 1e3

    return read
