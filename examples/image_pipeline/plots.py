"""The plots of the report, each as the text of an SVG file. matplotlib, without a display."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .measure import Cost
from .photographs import name_of
from .work import Work

COLOURS = {"value": "#6b7280", "cxl": "#d9480f", "cxl-copy": "#e8a33d", "store": "#1971c2"}
_OTHERS = ("#2f9e44", "#7048e8", "#c2255c", "#0c8599")
_HOSTS = (
    "#495057", "#1971c2", "#4dabf7", "#12b886", "#63e6be", "#f59f00", "#e8590c", "#c2255c", "#862e9c",
)  # fmt: skip
_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e9ecef",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",
}


def colour_of(name: str) -> str:
    """Return the colour of a variant, the same in all plots."""
    return COLOURS.get(name) or _OTHERS[sum(name.encode()) % len(_OTHERS)]


def _axes(width: float = 7.0, height: float = 3.6) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure) -> bytes:
    with io.BytesIO() as written:
        figure.savefig(written, format="svg", metadata={"Date": None})
        return written.getvalue()


@mpl.rc_context(_STYLE)
def latencies(costs: Mapping[str, Cost]) -> bytes:
    """Draw which share of the requests ended within which time."""
    figure, axes = _axes()
    for name, cost in costs.items():
        ms = np.sort(cost.tally.latencies_ns) / 1e6
        share = np.arange(1, len(ms) + 1) / len(ms) * 100
        axes.step(ms, share, where="post", color=colour_of(name), label=name)
    axes.set(xscale="log", xlabel="latency, ms", ylabel="requests, %", ylim=(0, 101))
    axes.legend(loc="lower right")
    return _svg(figure)


@mpl.rc_context(_STYLE)
def cpu(costs: Mapping[str, Cost]) -> bytes:
    """Draw the CPU time for a picture, a bar for each variant, divided by process."""
    figure, axes = _axes(height=1.2 + 0.55 * len(costs))
    left = np.zeros(len(costs))
    for host, colour in zip(next(iter(costs.values())).cpu_ns, _HOSTS, strict=False):
        ms = np.array([cost.cpu_ms(host) for cost in costs.values()])
        axes.barh(list(costs), ms, left=left, color=colour, label=host, height=0.6)
        left += ms
    axes.invert_yaxis()
    axes.set(xlabel="CPU time for a picture, ms")
    axes.legend(ncols=1, bbox_to_anchor=(1.01, 1), loc="upper left", fontsize=8)
    return _svg(figure)


@mpl.rc_context(_STYLE)
def throughput(sizes: Mapping[str, Mapping[int, Cost]]) -> bytes:
    """Draw the throughput against the size of the pictures."""
    figure, axes = _axes()
    for name, points in sizes.items():
        gbit = [cost.bits_per_second / 1e9 for cost in points.values()]
        axes.plot(list(points), gbit, "o-", color=colour_of(name), label=name)
    ticks = list(next(iter(sizes.values())))
    axes.set(xscale="log", yscale="log", xlabel="size of a bitmap", ylabel="payload, Gbit/s")
    axes.set_xticks(ticks, [f"{name_of(nominal)}B" for nominal in ticks], minor=False)
    axes.minorticks_off()
    axes.legend(loc="upper left")
    return _svg(figure)


@mpl.rc_context(_STYLE)
def works(series: Mapping[str, Mapping[Work, Cost]]) -> bytes:
    """Draw the rate for each amount of work."""
    figure, axes = _axes()
    names = list(next(iter(series.values())))
    width = 0.8 / len(series)
    for place, (variant, points) in enumerate(series.items()):
        at = np.arange(len(names)) + (place - (len(series) - 1) / 2) * width
        bars = axes.bar(at, [cost.per_second for cost in points.values()], width * 0.92,
                        color=colour_of(variant), label=variant)  # fmt: skip
        axes.bar_label(bars, fmt="%.0f", fontsize=8, padding=1)
    axes.set_xticks(range(len(names)), names)
    axes.grid(visible=False, axis="x")
    axes.set(ylabel="pictures per second")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.02), ncols=len(series))
    return _svg(figure)
