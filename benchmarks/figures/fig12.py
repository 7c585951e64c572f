"""Fig 12: what becomes of the figures when the device is slower. Modelled: see dmrpc_cxl/latency.py.

(a) The receiver of a shared block of 32 KiB stores to some of its pages, all hosts with the same model. (b) The image pipeline.

Charged is what the DM layer sees: *DM layer*. In lines called *all*, programs also say what they themselves read and write in DM, which
the model cannot know: an upper bound, for real caches would have kept some of it.

The x axis is what a cache line takes longer than in this machine's memory. The paper compares 265 ns with 75 ns: 190 ns more.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dmrpc_cxl.fabric import numa

from ..rpc_stage import serve
from . import fig10, plots
from .runner import Case, Options, Runner, Ticker, running
from .summary import Point, Points, bar, point, ratio
from .variants.rpc import Writer, write_block
from .variants.work import PAGE, overwrite

NAME = "fig12"
TITLE = "Fig 12: sensitivity to the latency of the device (modelled)"
CLAIMS = ("throughput drops only slightly as the latency grows from 75 ns to 265 ns and beyond",)
REMARKS = (
    "The model has the DM layer wait for each cache line that it reads, writes, copies or zeroes itself. It cannot know what programs load "
    "and store through their mappings, which the machine does at its own speed, nor what caches would have kept of slower memory, nor how "
    "a slower link behaves when several hosts use it at once. *all*: programs say what they read and write, as if no cache kept any of it.",
    "Where a machine has memory on a second node, (a) is also measured with the device on that node, and nothing modelled.",
    "(a) is measured in both places, over rings, since what is charged does not depend on the transport; (b) over rings, in the first place.",
)
EXTRA_NS = (0, 50, 190, 265, 400)
QUICK_EXTRA_NS = (0, 190)
PAPERS_NS = 190
BAR = 0.8
BLOCK = 32 << 10
PAGES = (0, 1, 4, 8)
QUICK_PAGES = (1, 8)
OVERLAPS = (8, 1)
CHARGED = ("DM layer", "all")
CLIENT = "client"
WRITERS = {"DM layer": "plain-writer", "all": "charging-writer"}
HEIGHT = 4.8


class ChargingWriter:
    """Stores to a share of blocks, and says so to the model."""

    def __init__(self, host: Any) -> None:
        self._host = host

    def write(self, block: np.ndarray[Any, Any], pages: int, nbytes: int, value: int) -> int:
        found = overwrite(block, pages, nbytes, value)
        self._host.charge(pages * nbytes + 64 * (block.nbytes // PAGE))
        return found


def _serve(host: Any, name: str) -> None:
    serve(host, name, ChargingWriter, host)


def emulate(host: Any, extra_ns: int, overlap: int) -> float:
    """Have this process's host emulate so much more latency; return the model's error."""
    if extra_ns == 0:
        host.emulate_latency(None)
        return 0.0
    found = host.emulate_latency(f"+{extra_ns}ns", overlap=overlap)
    return float(found.error)


def error_of(runner: Runner, extra_ns: int) -> float:
    """Return the model's own error, as the client's process measures it now."""
    found = runner.on.peers[CLIENT].call(emulate, extra_ns, 1)
    runner.on.peers[CLIENT].call(emulate, 0, 1)
    return float(found)


def local_ns(host: Any) -> float:
    """Return the latency of this machine's memory, as the model measures it."""
    found = float(host.emulate_latency("+1ns").local_ns)
    host.emulate_latency(None)
    return found


def _tables(local: float, errors: dict[int, float]) -> list[dict[str, Any]]:
    extra = sorted(errors)
    return [
        {
            "title": "the model",
            "head": ["", *(f"+{ns} ns" for ns in extra)],
            "rows": [
                ["latency that is emulated, ns", *(local + ns for ns in extra)],
                [
                    "charges take longer than what they charge, %",
                    *(100 * errors[ns] for ns in extra),
                ],
            ],
        }
    ]


def _start(runner: Runner) -> None:
    runner.on.start(CLIENT)
    runner.on.start(WRITERS["DM layer"], serve, Writer)
    runner.on.start(WRITERS["all"], _serve)


def far_node() -> int | None:
    """Return a node whose memory is not the CPUs' own, where this machine has one."""
    nodes = numa.nodes_with_memory()
    return nodes[-1] if len(nodes) > 1 else None


def bound_to(node: int, options: Options, ticker: Ticker) -> list[Point]:
    """Measure (a) on a device that is made of a node's memory: nothing is modelled. In a run of its own."""
    found: list[Point] = []
    with running(options, ticker, numa_node=node) as runner:
        _start(runner)
        for place in options.places:
            runner.pin(place)
            cases = [
                case
                for case in _cases(runner, options, place)
                if case.params["extra_ns"] == 0 and case.params["charged"] == CHARGED[0]
            ]
            found += map(point, runner.measure(cases, f"node {node}, {place}"))
    return found


def _bound_bars(points: Points, bound: Points, node: int | None) -> list[dict[str, Any]]:
    made = []
    for place in bound.values("place"):
        each = [
            (ratio(one["rounds"]["per_second"], base["rounds"]["per_second"]), one)
            for one in bound.select(place=place)
            if (base := points.one(variant="cxl", **one["params"])) is not None
        ]
        if each:
            worst, one = min(each, key=lambda item: item[0]["median"])
            what = f"writing a share of 32 KiB, device on node {node}, not modelled, {place}: throughput against this node, worst point"
            made.append(bar(what, worst, BAR, note=f"pages {one['params']['pages']}"))
    return made


def _cases(runner: Runner, options: Options, place: str) -> list[Case]:
    peers = [runner.on.peers[name] for name in (CLIENT, *WRITERS.values())]

    def slow_down(extra_ns: int, overlap: int) -> None:
        for peer in peers:
            peer.call(emulate, extra_ns, overlap)

    points = [
        (extra_ns, overlap, charged, pages)
        for extra_ns in (QUICK_EXTRA_NS if options.quick else EXTRA_NS)
        for overlap in OVERLAPS
        for charged in CHARGED
        for pages in (QUICK_PAGES if options.quick else PAGES)
        if overlap == OVERLAPS[0] or (extra_ns == PAPERS_NS and charged == CHARGED[0])
    ]
    return [
        Case(
            "cxl",
            "shared",
            {
                "extra_ns": extra_ns, "overlap": overlap, "charged": charged, "pages": pages,
                "place": place, "panel": "a",
            },
            (CLIENT,),
            write_block,
            {
                "service": WRITERS[charged], "transport": "ring", "transfer": "ref", "mode": "shared",
                "size": BLOCK, "pages": pages, "nbytes": PAGE, "charged": charged == "all",
            },
            (*WRITERS.values(), "coordinator"),
            before=lambda e=extra_ns, o=overlap: slow_down(e, o),  # type: ignore[misc]
        )
        for extra_ns, overlap, charged, pages in points
    ]  # fmt: skip


def run(options: Options, ticker: Ticker) -> dict[str, Any]:
    """Measure."""
    found: list[Point] = []
    with running(options, ticker) as runner:
        _start(runner)
        for place in options.places:
            runner.pin(place)
            found += map(point, runner.measure(_cases(runner, options, place), f"writes, {place}"))
        errors = {extra: error_of(runner, extra) for extra in EXTRA_NS if extra}
        local = runner.on.peers[CLIENT].call(local_ns)
    node = far_node()
    bound = bound_to(node, options, ticker) if node is not None else []
    skipped = {}
    pictures, why_not = fig10.under_latency(options, ticker)
    if why_not:
        skipped["image pipeline"] = why_not
    found += pictures
    points = Points(found)
    return {
        "points": found,
        "bars": bars(points) + _bound_bars(points, Points(bound), node),
        "skipped": skipped,
        "headline": headline(points, errors),
        "model_errors": errors,
        "tables": _tables(local, errors),
        "bound_to_node": bound,
    }


def normalised(points: Points, one: Point) -> dict[str, float] | None:
    """Return the spread of a point's throughput against the same without the model."""
    params = {**one["params"], "extra_ns": 0, "overlap": OVERLAPS[0]}
    base = points.one(variant=one["variant"], mode=one["mode"], **params)
    return base and ratio(one["rounds"]["per_second"], base["rounds"]["per_second"])


def bars(points: Points) -> list[dict[str, Any]]:
    """Return the bars of this figure."""
    made = []
    for place in points.values("place"):
        for panel, says in (("a", "writing a share of 32 KiB"), ("b", "image pipeline")):
            for charged in CHARGED:
                for overlap in OVERLAPS:
                    which = {"panel": panel, "place": place, "charged": charged, "overlap": overlap}
                    made += _bar(
                        points, f"{says}, charged: {charged}, {overlap} at once, {place}", which
                    )
    return made


def _bar(points: Points, says: str, which: dict[str, Any]) -> list[dict[str, Any]]:
    found = [
        (one, share)
        for one in points.select(extra_ns=PAPERS_NS, variant="cxl", **which)
        if (share := normalised(points, one)) is not None
    ]
    if not found:
        return []
    one, worst = min(found, key=lambda item: item[1]["median"])
    note = ", ".join(f"{k} {v}" for k, v in one["params"].items() if k in ("pages", "size", "work"))
    return [
        bar(
            f"{says}: throughput at {PAPERS_NS} ns more against none, worst point",
            worst,
            BAR,
            note=note,
        )
    ]


def headline(points: Points, errors: dict[int, float]) -> str:
    """Return what was measured, in one sentence."""
    found = [
        one["measured"]
        for one in bars(points)
        if f"charged: {CHARGED[0]}, {OVERLAPS[0]} at once" in one["what"]
    ]
    if not found:
        return ""
    return (
        f"with {PAPERS_NS} ns more for a line of what the DM layer touches, {min(found):.2f} of the throughput at the worst point; "
        f"the model's own error at {PAPERS_NS} ns is {errors[PAPERS_NS]:+.1%}"
    )


def draw(result: dict[str, Any], figure: Any) -> None:
    """Plot throughput, as a share of that without the model, against the added latency."""
    points = Points(result["points"])
    place = plots.preferred(points.values("place"), "one CPU")
    panels = points.values("panel")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, panel in zip(axes, panels, strict=True):
        _draw_panel(ax, points, panel, place)
    axes[0].set_title(f"(a) stores to pages of a block of 32 KiB, {place}")
    if len(panels) > 1:
        axes[1].set_title(f"(b) image pipeline, {place}")
    plots.legend(figure, axes)


def _draw_panel(ax: Any, points: Points, panel: str, place: str) -> None:
    what = "pages" if panel == "a" else "size"
    for charged in CHARGED:
        for i, value in enumerate(points.values(what, panel=panel, variant="cxl")):
            line = sorted(
                points.select(
                    panel=panel, place=place, overlap=OVERLAPS[0], variant="cxl", charged=charged,
                    **{what: value},
                ),
                key=lambda one: one["params"]["extra_ns"],
            )  # fmt: skip
            shares = [share for one in line if (share := normalised(points, one)) is not None]
            colour = f"C{i}" if panel == "a" else f"C{i + 5}"
            told = (
                f"{value} page{'s' * (value != 1)} written"
                if panel == "a"
                else f"pictures of {value >> 10} KiB"
            )
            ax.plot(
                [one["params"]["extra_ns"] for one in line],
                [share["median"] for share in shares],
                marker="o",
                linestyle="-" if charged == CHARGED[0] else ":",
                color=colour,
                label=f"{told}; charged: {charged}",
            )
            ax.fill_between(
                [one["params"]["extra_ns"] for one in line],
                [share["min"] for share in shares],
                [share["max"] for share in shares],
                color=colour,
                alpha=0.1,
                linewidth=0,
            )
    ax.axvline(PAPERS_NS, color="#999999", linewidth=0.8, linestyle=":")
    ax.axhline(BAR, color="#999999", linewidth=0.8, linestyle=":")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("ns that a cache line takes longer")
    ax.set_ylabel("throughput, 1 = without the model")
