"""What looking up addresses takes of an access to a memory server.

The look-ups are timed inside one server (--time-translation), less what looking at the clock takes; whole accesses are timed at the
client of another server that does without. An access is a round trip over loopback TCP.
"""

from __future__ import annotations

import os
from typing import Any

import dmrpc_net

from .machine import bar, median
from .net_stage import memory_server, one_by_one
from .rpc_stage import Block, alternate

SIZES = (4 << 10, 32 << 10, 256 << 10)
BARS = {4 << 10: 0.02}
ROUNDS = 5
CALLS = 400
REGION = 64 << 20


def _reads(client: dmrpc_net.Client, size: int) -> Block:
    region = client.ralloc(REGION)
    client.rwrite(region, os.urandom(1 << 20) * (REGION >> 20))
    into = bytearray(size)
    # A stride that meets every page of the region before it meets one twice.
    spots = [region + i * 7919 * 4096 % (REGION - size) // 4096 * 4096 for i in range(CALLS)]

    def read(i: int) -> None:
        client.rread(spots[i], into)

    return one_by_one(read, CALLS)


def translation() -> list[dict[str, Any]]:
    """Rread of 4, 32 and 256 KiB: nanoseconds of translation, and their share."""
    lines = []
    with memory_server("--time-translation") as (timing, server), memory_server() as (plain, other):
        pids = {"client": os.getpid(), "timing": server, "plain": other}
        for size in SIZES:
            blocks = {"timing": _reads(timing, size), "plain": _reads(plain, size)}
            alternate(blocks, pids, 1)
            before = timing.stats()
            found = alternate(blocks, pids, ROUNDS, warm=0)
            after = timing.stats()
            accesses = CALLS * ROUNDS
            ns = (after["translation_ns"] - before["translation_ns"]) / accesses
            access_ns = median([sample.p50_ns for sample in found["plain"]])
            lines.append(
                bar(
                    f"translation, share of an rread of {size >> 10} KiB",
                    ns / access_ns,
                    BARS.get(size, 0.02),
                    at_most=True,
                    unit="",
                    translation_ns=ns,
                    access_us=access_ns / 1e3,
                )
            )
    return lines
