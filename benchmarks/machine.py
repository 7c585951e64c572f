"""What the machine did and is: facts, counters, quiet timing."""

from __future__ import annotations

import gc
import os
import platform
import resource
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


def facts() -> dict[str, Any]:
    """Return what somebody needs who compares two runs."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "shmem_huge": Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text().strip(),
    }


@contextmanager
def pinned(cpu: int | None) -> Iterator[None]:
    """Run on one CPU, threads and children started inside included; None leaves the choice to the kernel."""
    before = os.sched_getaffinity(0)
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the garbage collector out of what is timed."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def minor_faults() -> int:
    """Return the minor faults of this process so far, all threads."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def median(values: list[float]) -> float:
    """Return the median."""
    return float(statistics.median(values))


def spread(values: list[float]) -> dict[str, float]:
    """Return minimum, quartiles and maximum."""
    q1, q2, q3 = statistics.quantiles(values, n=4)
    return {
        "min": min(values),
        "q1": q1,
        "median": q2,
        "q3": q3,
        "max": max(values),
        "n": len(values),
    }


def bar(
    what: str, measured: float, limit: float, *, at_most: bool, unit: Any = "x", **beside: Any
) -> dict[str, Any]:
    """One line of the report: a measured value against its bar."""
    met = measured <= limit if at_most else measured >= limit
    return {
        "what": what,
        "measured": measured,
        "bar": limit,
        "at_most": at_most,
        "unit": unit,
        "met": met,
    } | beside
