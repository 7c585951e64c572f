"""A block of requests, in the process that sends them: made once, run many times.

The process keeps its blocks by key, so that the runner can have them take turns. Requests are timed one by one where that
means something; their results are checked after the clock has stopped.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hdrh.histogram import HdrHistogram

from ..machine import quiet
from ..rpc_stage import SETTLE_SECONDS

LONGEST_NS = 3600 * 10**9
DIGITS = 3  # significant digits that a histogram keeps


def _nothing() -> None:
    """Do nothing."""


@dataclass
class Block:
    """Requests that can be made any number of times.

    Attributes:
        run: makes n requests; returns the ns of each, or nothing where single ones are not timed.
        check: raises AssertionError unless all results since the last time were right.
        close: lets go of what the block holds.
        before: called before every block, outside of what is timed.
        counts: what the block itself counted in the last run, by name; "timed_ns": how long the run was, if not all of it counts.
    """

    run: Callable[[int], Sequence[int]]
    check: Callable[[], None] = _nothing
    close: Callable[[], None] = _nothing
    before: Callable[[int], None] = lambda n: None
    counts: dict[str, float] = field(default_factory=dict)


@dataclass
class Taken:
    """What one run of a block took, as the process that sent its requests saw it."""

    requests: int
    begin_ns: int  # on the clock that all processes of a machine share
    end_ns: int
    cpu_ns: int  # of this process, user and system, all threads
    minor_faults: int
    histogram: bytes  # of ns, encoded; empty when requests were not timed one by one
    counts: dict[str, float]


_blocks: dict[str, Block] = {}


def histogram() -> HdrHistogram:
    """Return an empty histogram of ns."""
    return HdrHistogram(1, LONGEST_NS, DIGITS)


def make(host: Any, key: str, factory: Callable[..., Block], arguments: dict[str, Any]) -> None:
    """Make a block in this process: factory(host, **arguments)."""
    _blocks[key] = factory(host, **arguments)
    gc.freeze()  # what is there now is there to stay: looking through all of it takes longer than a block


def forget(host: Any, keys: Sequence[str]) -> None:
    """Close blocks."""
    for key in keys:
        _blocks.pop(key).close()


def run(host: Any, key: str, requests: int) -> Taken:
    """Run a block once, and check it."""
    block = _blocks[key]
    block.counts.clear()
    block.before(requests)
    with quiet():
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cpu = time.process_time_ns()
        begin = time.perf_counter_ns()
        latencies = block.run(requests)
        end = time.perf_counter_ns()
        time.sleep(SETTLE_SECONDS)  # what other threads do behind a reply belongs to the request
        cpu = time.process_time_ns() - cpu
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - usage.ru_minflt
    block.check()
    encoded = b""
    if len(latencies):
        taken = histogram()
        for ns in latencies:
            taken.record_value(int(ns))
        encoded = taken.encode()
    return Taken(requests, begin, end, cpu, faults, encoded, dict(block.counts))


def one_by_one(
    request: Callable[[], Any], expected: Callable[[], Any], results: list[Any] | None = None
) -> Block:
    """Return a block that makes one request after the other.

    Args:
        request: makes one and returns its result.
        expected: what the next result has to be; called afterwards, in the same order.
    """
    kept: list[Any] = []
    now = time.perf_counter_ns

    def run_them(n: int) -> list[int]:
        latencies = [0] * n
        for i in range(n):
            begin = now()
            kept.append(request())
            latencies[i] = now() - begin
        return latencies

    return Block(run_them, lambda: compare(kept, expected))


def windowed(start: Callable[[], Any], expected: Callable[[], Any], window: int) -> Block:
    """Return a block that keeps `window` requests under way; start() sends one and returns its future."""
    kept: list[Any] = []
    now = time.perf_counter_ns

    def run_them(n: int) -> list[int]:
        latencies = [0] * n
        under_way: list[tuple[int, int, Any]] = []
        done = 0
        for i in range(n):
            if len(under_way) == window:
                j, begin, future = under_way.pop(0)
                kept.append(future.result())
                latencies[j] = now() - begin
                done += 1
            under_way.append((i, now(), start()))
        for j, begin, future in under_way:
            kept.append(future.result())
            latencies[j] = now() - begin
        return latencies

    return Block(run_them, lambda: compare(kept, expected))


def compare(results: list[Any], expected: Callable[[], Any]) -> None:
    """Compare results with what is expected, one by one, and forget them."""
    for i, result in enumerate(results):
        wanted = expected()
        if result != wanted:
            raise AssertionError(f"result {i} of {len(results)} is {result!r}, not {wanted!r}")
    results.clear()
