"""create_ref at a memory server: copy-on-write against copying at once.

A region is walked through block by block, every page of it written before. The whole operation is timed: request, range look-up,
counts or copies, the Ref's record, answer. Rate: pipelines keep one server thread busy. Response time: one outstanding. Refs are
dropped outside of what is timed.
"""

from __future__ import annotations

import os
import time
from typing import Any

import dmrpc_net

from .machine import bar, median
from .net_stage import memory_server, pin
from .rpc_stage import PLACES, Block, Sample, alternate, ratios, walls

SIZES = tuple(4096 << shift for shift in range(0, 11))  # 4 KiB to 4 MiB
REGION = 64 << 20
ROUNDS = 5
WINDOW = 32
BYTES = 128 << 20  # copied in one block, at most: as many as there is room for


class _Walk:
    """create_refs over the region, one after the other."""

    def __init__(self, client: dmrpc_net.Client, region: int, size: int, *, copy: bool) -> None:
        self.client, self.region, self.size, self.copy = client, region, size, copy
        self.calls = max(WINDOW, min(512, BYTES // size) // WINDOW * WINDOW)
        self.at = 0
        self.refs: list[dmrpc_net.Ref] = []

    def _next(self) -> int:
        at = self.at
        self.at = (at + self.size) % REGION
        return self.region + at

    def one_by_one(self) -> tuple[list[int], list[Any]]:
        now = time.perf_counter_ns
        create_ref, size, copy = self.client.create_ref, self.size, self.copy
        latencies = []
        for _ in range(self.calls):
            address = self._next()
            begin = now()
            ref = create_ref(address, size, copy=copy)
            latencies.append(now() - begin)
            self.refs.append(ref)
        return latencies, []

    def pipelined(self) -> tuple[list[int], list[Any]]:
        size, copy = self.size, self.copy
        under_way: list[dmrpc_net.Call[dmrpc_net.Ref]] = []
        with self.client.pipeline() as p:
            for i in range(self.calls):
                if i >= WINDOW:
                    self.refs.append(under_way[i - WINDOW].result())
                under_way.append(p.create_ref(self._next(), size, copy=copy))
        self.refs += [call.result() for call in under_way[-WINDOW:]]
        return [], []

    def tidy(self, _: list[Any]) -> None:
        """Drop the Refs; outside of what is timed."""
        self.refs.clear()
        self.client.ping()


def _compared(client: dmrpc_net.Client, pids: dict[str, int], region: int) -> dict[int, Any]:
    found = {}
    for size in SIZES:
        blocks = {}
        for name, copy in (("share", False), ("copy", True)):
            walk = _Walk(client, region, size, copy=copy)
            blocks[f"{name} rate"] = Block(walk.pipelined, walk.calls, walk.tidy)
            walk = _Walk(client, region, size, copy=copy)
            blocks[f"{name} time"] = Block(walk.one_by_one, walk.calls, walk.tidy)
        found[size] = alternate(blocks, pids, ROUNDS)
    return found


def _times(samples: list[Sample]) -> list[float]:
    return [sample.p50_ns for sample in samples]


def _text(size: int) -> str:
    return f"{size >> 10}k" if size < 1 << 20 else f"{size >> 20}M"


def create_ref() -> list[dict[str, Any]]:
    """Sizes from 4 KiB to 4 MiB, on one CPU and free: the best ratio of each."""
    lines = []
    with memory_server() as (client, server):
        pids = {"client": os.getpid(), "server": server}
        region = client.ralloc(REGION)
        client.rwrite(region, os.urandom(1 << 20) * (REGION >> 20))
        try:
            for where, cpu in PLACES:
                pin(pids, cpu)
                found = _compared(client, pids, region)
                for kind, what, limit, values in (
                    ("rate", "rate, pipelined", 7.3, walls),
                    ("time", "response time, one outstanding", 5.2, _times),
                ):
                    each = {
                        size: ratios(values(one[f"copy {kind}"]), values(one[f"share {kind}"]))
                        for size, one in found.items()
                    }
                    best = max(SIZES, key=lambda size: each[size]["median"])
                    ratio = dict(each[best])
                    lines.append(
                        bar(
                            f"create_ref of a memory server against an eager copy: {what}, {where}, best size",
                            ratio.pop("median"),
                            limit,
                            at_most=False,
                            **ratio,
                            at=_text(best),
                            us_share_copy=" ".join(
                                f"{_text(size)} {median(values(one[f'share {kind}'])) / 1e3:.1f}/"
                                f"{median(values(one[f'copy {kind}'])) / 1e3:.1f}"
                                for size, one in found.items()
                            ),
                        )
                    )
        finally:
            pin(pids, None)
    return lines
