"""The CPU clocks of all processes of a fabric: user and system, all threads."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence

from dmrpc_cxl.fabric import device


def process_ids(fabric: str, first: Sequence[str] = ()) -> dict[str, int]:
    """Return the processes of a fabric by name, coordinator and memory servers included; those named first stand first."""
    with device.open(fabric, writable=False) as opened:
        pids = {entry["name"]: int(entry["pid"]) for entry in opened.hosts()}
        pids["coordinator"] = int(opened.superblock["coordinator_pid"])
    servers = os.environ.get("DMRPC_MEMORY_PIDS", "").split(",")
    pids |= {f"memory-{i}": int(pid) for i, pid in enumerate(servers) if pid}
    chosen = [name for name in first if name in pids]
    return {name: pids[name] for name in (*chosen, *sorted(pids.keys() - {*chosen}))}


def cpu_ns(pids: Mapping[str, int]) -> Counter[str]:
    """Return the CPU time of processes so far."""
    # The id of a process's CPU clock is made of its pid: see clock_getcpuclockid(3).
    return Counter({name: time.clock_gettime_ns(~pid << 3 | 2) for name, pid in pids.items()})
