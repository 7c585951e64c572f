"""rread and rwrite against Redis GET and SET of the same size, over loopback TCP: one outstanding, and pipelined.

Redis is served without persistence, and spoken to by redis-py with hiredis over one connection that it keeps. Both sides are
single-threaded servers, and both clients are in this process.
"""

from __future__ import annotations

import os
from typing import Any

import dmrpc_net

from .machine import bar, median
from .net_stage import batches, memory_server, one_by_one, pin, redis_server
from .rpc_stage import PLACES, Block, Sample, alternate, ratios, walls

SIZES = (4 << 10, 32 << 10, 256 << 10)
BARS = {4 << 10: 1.0, 32 << 10: 1.0, 256 << 10: 1.5}
ROUNDS = 9
WINDOW = 16
SPOTS = 4  # ranges, or keys, that take turns
BLOCK_NS = 30_000_000


def _calls(size: int) -> int:
    return max(8 * WINDOW, BLOCK_NS // (30_000 + size) // WINDOW * WINDOW)


def _ours(client: dmrpc_net.Client, size: int) -> dict[str, Block]:
    data = os.urandom(size)
    into = [bytearray(size) for _ in range(WINDOW)]
    spots = [client.ralloc(size) for _ in range(SPOTS)]  # stay until the client leaves
    for spot in spots:
        client.rwrite(spot, data)

    def write(i: int) -> None:
        client.rwrite(spots[i % SPOTS], data)

    def read(i: int) -> None:
        client.rread(spots[i % SPOTS], into[0])

    def writes(numbers: range) -> None:
        with client.pipeline() as p:
            for i in numbers:
                p.rwrite(spots[i % SPOTS], data)

    def reads(numbers: range) -> None:
        with client.pipeline() as p:
            for i in numbers:
                p.rread(spots[i % SPOTS], into[i % WINDOW])

    calls = _calls(size)
    return {
        "write": one_by_one(write, calls),
        "read": one_by_one(read, calls),
        "writes": batches(writes, calls, WINDOW),
        "reads": batches(reads, calls, WINDOW),
    }


def _theirs(redis: Any, size: int) -> dict[str, Block]:
    data = os.urandom(size)
    keys = [b"spot-%d" % i for i in range(SPOTS)]
    for key in keys:
        redis.set(key, data)

    def write(i: int) -> None:
        redis.set(keys[i % SPOTS], data)

    def read(i: int) -> None:
        redis.get(keys[i % SPOTS])

    def writes(numbers: range) -> None:
        pipeline = redis.pipeline(transaction=False)
        for i in numbers:
            pipeline.set(keys[i % SPOTS], data)
        pipeline.execute()

    def reads(numbers: range) -> None:
        pipeline = redis.pipeline(transaction=False)
        for i in numbers:
            pipeline.get(keys[i % SPOTS])
        pipeline.execute()

    calls = _calls(size)
    return {
        "write": one_by_one(write, calls),
        "read": one_by_one(read, calls),
        "writes": batches(writes, calls, WINDOW),
        "reads": batches(reads, calls, WINDOW),
    }


WHAT = {
    "write": "rwrite against SET, one outstanding",
    "read": "rread against GET, one outstanding",
    "writes": f"rwrite against SET, pipelines of {WINDOW}",
    "reads": f"rread against GET, pipelines of {WINDOW}",
}


def _line(
    what: str, size: int, where: str, ours: list[Sample], theirs: list[Sample]
) -> dict[str, Any]:
    found = ratios(walls(theirs), walls(ours))
    cpu = {
        name: median([sample.cpu_ns["client"] + sample.cpu_ns[server] for sample in samples])
        for name, samples, server in (("ours", ours, "server"), ("redis", theirs, "redis"))
    }
    return bar(
        f"{WHAT[what]}, {size >> 10} KiB, {where}: how many times faster",
        found.pop("median"),
        BARS[size],
        at_most=False,
        **found,
        ours_us=median(walls(ours)) / 1e3,
        redis_us=median(walls(theirs)) / 1e3,
        cpu_ours_us=cpu["ours"] / 1e3,
        cpu_redis_us=cpu["redis"] / 1e3,
        cpu_times_less=cpu["redis"] / cpu["ours"],
    )


def against_redis() -> list[dict[str, Any]]:
    """Sizes of 4, 32 and 256 KiB, on one CPU and free."""
    import redis

    lines = []
    with memory_server() as (client, server), redis_server() as (port, other):
        pids = {"client": os.getpid(), "server": server, "redis": other}
        peer = redis.Redis(port=port, single_connection_client=True)
        try:
            for where, cpu in PLACES:
                pin(pids, cpu)
                for size in SIZES:
                    blocks = {f"ours {name}": block for name, block in _ours(client, size).items()}
                    blocks |= {
                        f"redis {name}": block for name, block in _theirs(peer, size).items()
                    }
                    found = alternate(blocks, pids, ROUNDS)
                    lines += [
                        _line(what, size, where, found[f"ours {what}"], found[f"redis {what}"])
                        for what in WHAT
                    ]
        finally:
            pin(pids, None)
            peer.close()
    return lines
