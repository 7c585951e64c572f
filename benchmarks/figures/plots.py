"""What all plots look like: the colours of variants, solid lines for fresh data, the claim beside what was measured."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .summary import Point, Points, bytes_text
from .variants import REGISTRY

DASHES = {
    "fresh": "-",
    "shared": "--",
    "pre-shared": ":",
    "first": "-.",
    "clone": (0, (6, 1.5, 1, 1.5, 1, 1.5)),
    "pipelined": "--",
}
WIDTH = 9.6  # inches, as the following
LINE = 0.17  # from a line of text to the next
LETTERS = 140  # of a line of text
LEGEND_LETTER, LEGEND_SAMPLE = 0.062, 0.55
LEGEND_ROWS = 2  # that the height of a figure allows for
INK, FAINT = "#222222", "#d9d9d9"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "dmrpc",
    "savefig.facecolor": "white",
}


def latency(one: Point) -> tuple[float, float, float]:
    """Return median latency in us, with the lowest and highest of the rounds."""
    rounds = one["rounds"].get("p50_us") or [1e6 / r for r in one["rounds"]["per_second"]]
    ordered = sorted(rounds)
    return ordered[len(ordered) // 2], ordered[0], ordered[-1]


def measured(one: Point, what: str) -> tuple[float, float, float] | None:
    """Return (value, lowest, highest) of a point; what: latency, per_second, cpu_us or a counter per request."""
    if what == "latency":
        return latency(one)
    if what in ("per_second", "cpu_us"):
        found = one[what]
        return found["median"], found["min"], found["max"]
    value = one["each"].get(what, 0.0)
    return value, value, value


def preferred(values: Sequence[Any], first: Any) -> Any:
    """Return a value if there is one like it, else any."""
    return first if first in values or not values else values[0]


def label(variant: str, mode: str) -> str:
    """Return how a line is called."""
    says = REGISTRY[variant].says if variant in REGISTRY else variant
    return says if mode == "fresh" else f"{says}; {mode}"


def lines(
    ax: Any,
    points: Points,
    x: str,
    y: str | Callable[[Point], tuple[float, float, float] | None],
    chosen: dict[str, Any],
    modes: Iterable[str] | None = None,
    variants: Iterable[str] | None = None,
) -> None:
    """Draw a line for each variant and mode among the chosen points, with the spread of the rounds as a band.

    Args:
        modes, variants: leave others out; None: none.
    """
    seen = dict.fromkeys((one["variant"], one["mode"]) for one in points.select(**chosen))
    order = list(REGISTRY)
    for variant, mode in sorted(seen, key=lambda line: (order.index(line[0]), line[1])):
        if modes is not None and mode not in modes:
            continue
        if variants is not None and variant not in variants:
            continue
        line = sorted(
            points.select(variant=variant, mode=mode, **chosen), key=lambda one: one["params"][x]
        )
        found = [
            (one["params"][x], value)
            for one in line
            if (value := measured(one, y) if isinstance(y, str) else y(one)) is not None
        ]
        if not found:
            continue
        kind = REGISTRY[variant]
        xs = [at for at, _ in found]
        ax.plot(
            xs,
            [value[0] for _, value in found],
            linestyle=DASHES.get(mode, "-"),
            color=kind.colour,
            marker=kind.marker,
            label=label(variant, mode),
        )
        ax.fill_between(
            xs,
            [value[1] for _, value in found],
            [value[2] for _, value in found],
            color=kind.colour,
            alpha=0.12,
            linewidth=0,
        )


def sizes_axis(ax: Any, sizes: Sequence[int]) -> None:
    """Make a logarithmic axis of sizes."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [bytes_text(size).replace("iB", "") for size in sizes], minor=False)
    ax.minorticks_off()
    ax.tick_params(axis="x", labelrotation=45 if len(sizes) > 6 else 0)


def log_y(ax: Any) -> None:
    """Make a logarithmic axis with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    few = high / low < 100
    ax.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _plain(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"


def legend(figure: Any, axes: Any) -> None:
    """Put one legend for all axes below them."""
    seen: dict[str, Any] = {}
    for ax in figure.axes:
        for handle, text in zip(*ax.get_legend_handles_labels(), strict=True):
            seen.setdefault(text, handle)
    figure.legend(
        seen.values(), seen.keys(), loc="outside lower center", ncols=_columns(list(seen))
    )


def _columns(labels: Sequence[str]) -> int:
    """Return in how many columns a legend has room beside each other."""
    widest = LEGEND_SAMPLE + LEGEND_LETTER * max(map(len, labels), default=1)
    return max(1, min(3, len(labels), int(WIDTH / widest)))


def bar_text(one: dict[str, Any]) -> str:
    """Return what was measured against its bar, in a few words."""
    if one["measured"] is None:
        return "not measured"
    sign = "≤" if one["at_most"] else "≥"
    state = {True: "met", False: "missed", None: "not resolved"}[one["met"]]
    return f"{one['measured']:.3g} {one['unit']} ({sign} {one['bar']:g} {one['unit']}: {state})"


def render(module: Any, result: dict[str, Any], path: Path) -> None:
    """Draw a figure with what the paper says and what was measured here, and write it as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        made(module, result, Figure).savefig(path)


def made(module: Any, result: dict[str, Any], figure_class: Any) -> Any:
    """Return a figure as matplotlib's, drawn: panels, legend, and below them as many lines of text as there are."""
    told = [(f"The paper: {claim}.", "#777777") for claim in module.CLAIMS]
    if headline := result.get("headline"):
        told.append((f"Here: {headline}.", INK))
    text = [
        (line, colour)
        for words, colour in told
        for line in textwrap.wrap(
            words.replace(" x", "\u00a0x"), LETTERS, subsequent_indent="      "
        )
    ]
    panels, below = getattr(module, "HEIGHT", 6.4) - 0.8, LINE * (len(text) + 0.5)
    figure = figure_class(figsize=(WIDTH, panels + below), layout="constrained", dpi=130)
    grid = figure.add_gridspec(2, 1, height_ratios=(panels, below))
    top, bottom = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
    module.draw(result, top)
    rows = sum(-(-len(one.get_texts()) // one._ncols) for one in top.legends)
    if rows > LEGEND_ROWS:  # panels keep their height
        panels += LINE * (rows - LEGEND_ROWS)
        figure.set_size_inches(WIDTH, panels + below)
        grid.set_height_ratios((panels, below))
    top.suptitle(result["title"], x=0.01, ha="left", fontsize=12, fontweight="bold")
    for i, (line, colour) in enumerate(text):
        at = 1 - LINE * (i + 0.25) / below
        bottom.text(0.01, at, line, va="top", fontsize=9, color=colour)
    return figure
