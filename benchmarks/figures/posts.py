"""Blocks of requests to examples/social_network, and its services: what Fig 11 does in its processes."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from typing import Any

from .blocks import Block

PACKAGE = "examples.social_network"
REQUESTS = 2000
WINDOW = 8
WAYS = {"net": "cxl"}
"""How a variant is called in examples/social_network, where hosts over memory servers run the same programs."""

_processes: list[Any] = []
_numbers = itertools.count(1)


def why_not() -> str:
    """Say why it cannot be measured here; nothing if it can."""
    if importlib.util.find_spec(PACKAGE) is None:
        return "examples/social_network is not there"
    return ""


def start_process(host: Any, name: str, transport: str) -> None:
    """Start the services of one process; what they keep is in memory."""
    from examples.social_network import roles

    how: Any = transport
    _processes.append(roles.start(host, name, transport=how))


def stop_process(host: Any) -> None:
    """End them."""
    while _processes:
        _processes.pop().stop()


def bytes_forwarded(host: Any) -> int:
    """Return what this process has passed on."""
    return int(_processes[0].account().bytes_forwarded)


def fill_network(host: Any, profile: str, users: int) -> int:
    """Have the services keep users, followers and posts; check that they do what they are for."""
    from examples.social_network import checks, fill, graph, load, profiles, storage
    from examples.social_network.variants import VARIANTS as ways

    writer = profiles.Writer(profiles.PROFILES[profile], users)
    edges = graph.part_of(graph.default(), users)
    nr_posts = fill.fill(host, edges, users, writer)
    generators = {name: load.Generator(host, name) for name in ways}
    client: Any = host.connect("post-storage", storage.PostStorage)
    with client as posts:
        checks.check_all(host, generators, writer, posts, range(3))
    for one in generators.values():
        one.close()
    return nr_posts


def requests_block(
    host: Any, variant: str, profile: str, users: int, transport: str, rate: float
) -> Block:
    """Return a block of requests; rate 0: WINDOW at a time."""
    from examples.social_network import load, profiles

    how: Any = transport
    way = WAYS.get(variant, variant)
    generator = load.Generator(host, way, transport=how)
    seed = next(_numbers)
    writer = profiles.Writer(profiles.PROFILES[profile], users, seed)
    requests = [writer.request(i, way) for i in range(REQUESTS)]
    counts: dict[str, float] = {}

    def run(n: int) -> Sequence[int]:
        if rate:
            tally = generator.open_loop(
                requests, rate, count=n, warm_up=0.0, seed=seed * 1000 + len(requests)
            )
        else:
            tally = generator.closed_loop(requests, count=n, window=WINDOW, warm_up=0.0)
        if tally.errors or tally.done != tally.offered:
            raise AssertionError(f"of {tally.offered} requests {dict(tally.errors)} failed")
        counts["timed_ns"] = tally.seconds * 1e9
        counts["scheduled_ns"] = tally.scheduled_seconds * 1e9
        counts["aborted"] = float(tally.aborted) * n
        counts["late_ns"] = float(tally.lag.get_mean_value()) * n
        counts["posts"] = tally.nr_posts
        return tally.each_ns

    return Block(run, close=generator.close, counts=counts)
