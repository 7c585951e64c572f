"""What is made of samples: ratios within rounds and their spread, slopes, percentiles. Nothing here measures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from . import blocks
from .runner import Sample, Series

PERCENTILES = (50, 90, 99, 99.5, 99.9)

Point = dict[str, Any]
"""A series as it is written to JSON: variant, mode, params, and figures of its rounds."""


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {
        "median": float(statistics.median(values)),
        "min": float(min(values)),
        "max": float(max(values)),
    }


def ratio(over: Sequence[float], under: Sequence[float]) -> dict[str, float]:
    """Return the spread of the ratios within rounds: each round has one value of either side.

    Raises:
        ValueError: the sides have not the same rounds.
    """
    if len(over) != len(under) or not over:
        raise ValueError(f"{len(over)} rounds against {len(under)}")
    return spread([a / b for a, b in zip(over, under, strict=True)])


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Return what one more x adds to y: the slope of the least-squares line."""
    if len(xs) < 2:
        raise ValueError("a slope needs two points")
    return float(np.polyfit(np.asarray(xs, float), np.asarray(ys, float), 1)[0])


def slopes(xs: Sequence[float], rounds: Sequence[Sequence[float]]) -> list[float]:
    """Return the slope in each round; rounds[i] holds the values of point i, one for each round."""
    return [slope(xs, [values[r] for values in rounds]) for r in range(len(rounds[0]))]


def latencies(samples: Iterable[Sample]) -> dict[str, float]:
    """Return mean and percentiles in us over all blocks together; nothing if single requests were not timed."""
    total = blocks.histogram()
    for sample in samples:
        if sample.histogram:
            total.decode_and_add(sample.histogram)
    if not total.get_total_count():
        return {}
    found = {"mean": total.get_mean_value() / 1e3}
    for percentile in PERCENTILES:
        found[f"p{percentile:g}"] = total.get_value_at_percentile(percentile) / 1e3
    return found


def latency_of(sample: Sample, percentile: float) -> float:
    """Return a percentile of one block's latencies in us."""
    one = blocks.histogram()
    one.decode_and_add(sample.histogram)
    return float(one.get_value_at_percentile(percentile)) / 1e3


def point(series: Series) -> Point:
    """Return a series as plain values."""
    samples, case = series.samples, series.case
    made: Point = {
        "variant": case.variant,
        "mode": case.mode,
        "params": dict(case.params),
        "requests_per_block": case.requests,
        "per_second": spread([sample.per_second for sample in samples]),
        "cpu_us": spread([sample.cpu_us for sample in samples]),
        "latency_us": latencies(samples),
        "cpu_us_by_process": {
            name: statistics.median(
                sample.cpu_ns.get(name, 0.0) / sample.requests / 1e3 for sample in samples
            )
            for name in samples[0].cpu_ns
        },
        "each": {
            name: statistics.median(
                sample.each(name) for sample in samples if name in sample.counters
            )
            for name in dict.fromkeys(name for sample in samples for name in sample.counters)
            if any(sample.counters.get(name) for sample in samples)
        },
        "rounds": {
            "per_second": [sample.per_second for sample in samples],
            "cpu_us": [sample.cpu_us for sample in samples],
        },
    }
    if samples[0].histogram:
        each = [blocks.histogram() for _ in samples]
        for one, sample in zip(each, samples, strict=True):
            one.decode_and_add(sample.histogram)
        for name, get in _STATISTICS.items():
            made["rounds"][name] = [get(one) / 1e3 for one in each]
    return made


_STATISTICS: dict[str, Callable[[Any], float]] = {
    "mean_us": lambda one: one.get_mean_value(),
    "p50_us": lambda one: one.get_value_at_percentile(50),
    "p99_us": lambda one: one.get_value_at_percentile(99),
    "p99.9_us": lambda one: one.get_value_at_percentile(99.9),
}


class Points:
    """Points of one figure, looked up by what they are."""

    def __init__(self, points: Sequence[Point]) -> None:
        self.points = list(points)

    def select(self, **wanted: Any) -> list[Point]:
        """Return the points whose variant, mode and params are as wanted; leave out what does not matter."""
        return [one for one in self.points if all(_get(one, k) == v for k, v in wanted.items())]

    def one(self, **wanted: Any) -> Point | None:
        """Return the only point that is as wanted, or None; raise LookupError if there are several."""
        found = self.select(**wanted)
        if len(found) > 1:
            raise LookupError(f"{len(found)} points are {wanted}")
        return found[0] if found else None

    def values(self, what: str, **wanted: Any) -> list[Any]:
        """Return the sorted values of one param among the points that are as wanted."""
        found = {_get(one, what) for one in self.select(**wanted)}
        return sorted(value for value in found if value is not None)

    def ratio(
        self, rounds: str, over: dict[str, Any], under: dict[str, Any], **both: Any
    ) -> dict[str, float] | None:
        """Return the spread of the ratios of two points within rounds; None if one was not measured."""
        a, b = self.one(**over, **both), self.one(**under, **both)
        if a is None or b is None:
            return None
        return ratio(a["rounds"][rounds], b["rounds"][rounds])


def _get(one: Point, what: str) -> Any:
    return one[what] if what in ("variant", "mode") else one["params"].get(what)


def bar(
    what: str,
    found: dict[str, float] | float | None,
    limit: float,
    *,
    at_most: bool = False,
    unit: str = "x",
    note: str = "",
    resolved: bool = True,
) -> dict[str, Any]:
    """Return one bar: what was measured against what was asked for.

    Args:
        found: None: not measured.
        resolved: False: what was measured is less than its noise, so it is neither met nor missed.
    """
    measured = found["median"] if isinstance(found, dict) else found
    met = None
    if measured is not None and resolved:
        met = measured <= limit if at_most else measured >= limit
    return {
        "what": what,
        "measured": measured,
        "spread": [found["min"], found["max"]] if isinstance(found, dict) else None,
        "bar": limit,
        "at_most": at_most,
        "unit": unit,
        "met": met,
        "note": note,
    }


def bytes_text(nbytes: int) -> str:
    """Return a size for people: 4 KiB, 1 MiB."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= size and nbytes % size == 0:
            return f"{nbytes // size} {unit}"
    return f"{nbytes} B"
