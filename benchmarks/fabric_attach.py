"""What attaching costs, in time and in page tables."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter_ns as now
from typing import Any

import dmrpc_cxl

from .machine import bar, median
from .peers import fabric

GIB = 1 << 30


def _page_table_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmPTE:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmPTE")


def _measure(size: int) -> tuple[float, float]:
    times, tables = [], []
    with fabric(size) as name:
        dmrpc_cxl.attach(
            name
        ).detach()  # the first host of an entry also pays for its page table in the device
        for _ in range(5):
            before = _page_table_bytes()
            t0 = now()
            host = dmrpc_cxl.attach(name)
            times.append((now() - t0) / 1e6)
            tables.append(float(_page_table_bytes() - before))
            host.detach()
    return median(times), median(tables)


def attach() -> list[dict[str, Any]]:
    """Attach to fabrics of 1 GiB and 8 GiB."""
    small, small_tables = _measure(GIB)
    large, large_tables = _measure(8 * GIB)
    return [
        bar(
            "attach to 1 GiB, per GiB",
            small,
            60,
            at_most=True,
            unit="ms",
            page_tables_mib=small_tables / 2**20,
        ),
        bar(
            "attach to 8 GiB, per GiB",
            large / 8,
            60,
            at_most=True,
            unit="ms",
            ms=large,
            page_tables_mib=large_tables / 2**20,
        ),
        bar("attach: 8 GiB against 1 GiB", large / small, 8.8, at_most=True),
    ]
