"""Why bars are missed: what stands in the way, said with what was measured. Nothing here measures.

Each function gets the points of its figure and returns sentences; where a point is missing that a sentence needs, it is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .summary import Points

PAGE = 4096
SMALL, LARGE = 32 << 10, 1 << 20

Reasons = list[str]


def _us(points: Points, what: str = "p50", **which: Any) -> float | None:
    """Return a latency, or with "cpu" the CPU time of a request, in us."""
    one = points.one(**which)
    if one is None:
        return None
    found = one["cpu_us"]["median"] if what == "cpu" else one["latency_us"].get(what)
    return None if found is None else float(found)


def _place(points: Points) -> str:
    places = points.values("place")
    return "one CPU" if "one CPU" in places else str(places[0])


def _fig05(points: Points) -> Reasons:
    return [
        "What is missed by Ref is the sum over all processes. A service in between itself takes about the same at every size, as the "
        "notes say: it never touches the data. The rest is what one more process on the same CPUs does to the caches and the branch "
        "predictors of the others, and, where they are free, spinning: who waits looks at its ring for up to 100 us before it sleeps, so "
        "its CPU time follows the time in which others work. With 4 MiB that rest is a percent or two of what the sum of the array costs.",
        "A memory server: the bytes go there and from there to the last service through the kernel, whatever is in between. By value over "
        "rings they never go through the kernel, so it takes many calls in a row before the server has paid; over TCP, two to four.",
    ]


def _fig07(points: Points) -> Reasons:
    place = _place(points)
    found = [
        _us(points, variant=variant, mode="fresh", size=256 << 10, place=place)
        for variant in ("cxl", "cxl-copy")
    ]
    if None in found:
        return []
    ours, copied = found
    return [
        "The *fresh* lines are a buffer's whole life: made, shared while its creator keeps it, Ref and buffer dropped. To share it is to "
        "write-protect its pages, and before the frames are used for something else that has to be undone; both are work of the kernel "
        f"for each page and a flush of the TLB ({ours:.3g} us against {copied:.3g} us for an eager copy of 256 KiB, {place}). Copying "
        "into frames that are warm is cheaper than that. So the RPC layer copies what is sent once and not kept, and shares what was "
        "shared before or is kept.",
    ]


def _fig08(points: Points) -> Reasons:
    place = _place(points)
    here: dict[str, Any] = {
        "share": 0.0,
        "stored": PAGE,
        "window": 1,
        "place": place,
        "transport": "ring",
    }
    fresh: dict[str, Any] = {"mode": "fresh", **here}
    told: Reasons = []
    ours, by_value, by_hand, ray, graph, store = (
        _us(points, variant=name, block=SMALL, **fresh)
        for name in ("cxl", "value", "shm", "ray", "ray-cg", "store")
    )
    if ours and by_value and by_hand:
        told.append(
            f"A call with 32 KiB by Ref takes {ours:.3g} us at the median ({place}, rings), by value {by_value:.3g} us; writing the block into "
            f"shared memory by hand, eight bytes over a socket and the private copy take {by_hand:.3g} us in all. What is left of a call "
            "when its data is taken away is a Python client and a Python server, each with an interpreter that has gone cold in the "
            "caches: names, types, deadlines and errors are looked after there. The hand-written program has none of these, one client, one "
            "buffer, and loses the isolation if a second sender comes. At 1 MiB both copy once or twice and by hand the copies go into "
            "the same warm memory each time, while a Ref's frames have come back from somebody else."
        )
    if ours and ray:
        told.append(
            f"Ray takes {ray:.4g} us: 100 x would need {ray / 100:.3g} us for a call, "
            "25 x with all pages written "
            f"{ray / 25:.3g} us, of which eight copy-on-write faults take more than 60 us."
        )
    if graph and ours:
        told.append(
            f"A compiled graph takes {graph:.3g} us: it is shared memory by hand as well, one writer and one reader that are "
            "set up before, and nothing else can be called. 8 x would need less than a wake-up of another process."
        )
    if store and ours:
        told.append(
            "The object store copies once, into the store, as we copy once, into frames; with nothing written nobody copies twice. What "
            "it takes longer are its requests to the process that keeps the table, and at 1 MiB the copy is most of either."
        )
    told.append(
        "As shipped, a store to the page behind the one that was stored to before is taken for the beginning of a loop, and 8, then 256 "
        "pages are copied at once (decision 0004): so `cxl` copies more frames than are written where the stores go in order and "
        "then stop. `copy_around=1` copies exactly what is written, a fault for each page."
    )
    told.append(
        "A memory server is asked twice by each call, to take the bytes and to give them: that many times through the kernel, which by "
        "itself leaves no room below a thirty-fourth of what Ray takes. Spark takes a tenth of a second for a request, so it is measured at two shares and in one place only."
    )
    return told


def _fig10(points: Points) -> Reasons:
    place = _place(points)
    which: dict[str, Any] = {
        "mode": "fresh",
        "size": LARGE,
        "window": 4,
        "place": place,
        "transport": "ring",
    }
    told: Reasons = []
    found = [
        _us(points, "cpu", variant=variant, work=work, **which)
        for variant in ("value", "cxl")
        for work in ("none", "light")
    ]
    if None not in found:
        value, value_light, ours, ours_light = (float(one or 0) for one in found)
        told.append(
            f"Work *light* takes more CPU time than moving the picture: at 1 MiB {ours_light:,.0f} us of a request by Ref, of which all "
            f"but {ours:,.0f} us are the work itself (by value {value_light:,.0f} and {value:,.0f} us; rings, {place}). If moving it cost "
            f"nothing at all, by Ref would be {value_light / max(ours_light - ours, 1):.2g} x as fast as by value."
        )
        told.append(
            f"At 1 MiB over rings, no work: by value {value:,.0f} us of CPU, by Ref {ours:,.0f} us. Of the latter the client's copy into frames and "
            "the worker's look at every byte are about half, and they are the same by value; the rest are five calls."
        )
    told.append(
        "At 4 KiB and 64 KiB `cxl` sends by value as well, over the same services: both lines are the same program, and differ by noise "
        "alone. A bar of exactly 1 x is then missed every other time. A 99.9th percentile of a round rests on a request or two."
    )
    told.append(
        "A memory server costs by value's way twice: the picture goes to it and from it over TCP. It gains when more than two hops over "
        "TCP are saved, so with fresh pictures only where the copies of those hops cost more than its own two."
    )
    return told


def _fig11(points: Points) -> Reasons:
    place = _place(points)
    which: dict[str, Any] = {
        "variant": "value",
        "profile": "heavy",
        "share": 0.0,
        "place": place,
        "transport": "ring",
    }
    one = points.one(**which)
    if one is None:
        return []
    cpu = one["cpu_us"]["median"]
    proxy = one["each"].get("bytes_proxy", 0.0)
    return [
        f"A request of the heavy profile takes {cpu:,.0f} us of CPU by value (rings, {place}), and {proxy:,.0f} bytes pass each data mover. To copy "
        f"those into a ring and out of it takes {proxy / 10e3:.1f} us at 10 GB/s, so five movers together some {5 * proxy / 10e3:.0f} us, or "
        f"{5 * proxy / 10e3 / cpu:.0%} of the request: if moving the lists cost nothing, the rate would be that much higher and no more. What "
        "costs are the services: dictionaries, text, msgpack, in Python. In the paper they are C++ over a network. Of media posts, with "
        "32 KiB of picture each, which is our addition, enough is moved for by Ref to gain.",
        "`net` and `cxl` send lists below their thresholds by value: for them the original profile is by value's program, but that posts "
        "are kept at a memory server for `net`. Rates are held or not in steps, so 0.78 x is one step.",
    ]


def _fig12(points: Points) -> Reasons:
    return [
        "Charged to the DM layer: in (a) each copied page is 128 lines, eight at once, so 16 waits of 190 ns, 3 us for 4 KiB, on top of "
        "what copying them takes here; one at a time it is 24 us. In (b) a picture of 1 MiB that the RPC layer copies into DM is 16,384 "
        "lines, eight at once: 390 us more for a request that takes less than that without. The paper's machine loads and stores with "
        "many more lines under way and a prefetcher behind them; its pictures stay in caches that this model does not have. So this is an "
        "upper bound for programs that touch each byte once, and *all*, which charges the reading as well, is one more so.",
    ]


_OF: dict[str, Callable[[Points], Reasons]] = {
    "fig05": _fig05,
    "fig07": _fig07,
    "fig08": _fig08,
    "fig10": _fig10,
    "fig11": _fig11,
    "fig12": _fig12,
}


def of(result: dict[str, Any]) -> Reasons:
    """Return why bars of a figure are missed; nothing if none is."""
    if all(one["met"] is not False for one in result["bars"]) or result["figure"] not in _OF:
        return []
    return _OF[result["figure"]](Points(result["points"]))
