"""What copy-on-write costs, against the kernel's own and against memcpy."""

from __future__ import annotations

import mmap
import os
from time import perf_counter_ns as now
from typing import Any

import numpy as np

import dmrpc_cxl

from .machine import bar, median, pinned, quiet
from .peers import fabric

MIB = 1 << 20
CPU = 0


def single_fault() -> list[dict[str, Any]]:
    """One store to a shared page, at random, everything on one CPU, against MAP_PRIVATE of the device file."""
    ours: list[float] = []
    kernel: list[float] = []
    with pinned(CPU), fabric(256 * MIB) as name, dmrpc_cxl.attach(name) as host:
        keep = host.array(np.ones(32 * MIB, "u1"))
        device = os.open(f"/dev/shm/{name}", os.O_RDWR)
        order = np.random.default_rng(1).permutation(8192)[:2000] * 4096
        for _ in range(3):
            private = mmap.mmap(device, 32 * MIB, mmap.MAP_PRIVATE, offset=host_data_offset(name))
            theirs = np.frombuffer(private, "u1")
            mapped = host.map_ref(host.create_ref(keep))
            mine = mapped.numpy()
            mine[::4096].sum(), theirs[::4096].sum()
            with quiet():
                for at in order:
                    t0 = now()
                    mine[at] = 2
                    t1 = now()
                    theirs[at] = 2
                    t2 = now()
                    ours.append(t1 - t0)
                    kernel.append(t2 - t1)
            del mine, theirs
            mapped.free()
            private.close()
        stats = host.stats()
        os.close(device)
        del keep
    return [
        bar(
            "one-page copy-on-write fault against the kernel's (MAP_PRIVATE), one CPU, p50",
            median(ours) / median(kernel),
            10,
            at_most=True,
            ours_us=median(ours) / 1e3,
            kernel_us=median(kernel) / 1e3,
            p99_us=float(np.percentile(ours, 99)) / 1e3,
            in_handler_us=stats["handler_ns"] / max(stats["wp_faults"], 1) / 1e3,
            frames_copied=stats["frames_copied"],
        )
    ]


def host_data_offset(name: str) -> int:
    """Return where the frames start in the device file."""
    from dmrpc_cxl.fabric import device

    with device.open(name, writable=False) as opened:
        return int(opened.superblock["data_off"])


def overwrite() -> list[dict[str, Any]]:
    """Overwrite all of a shared mapping of 1 MiB once, against memcpy of 1 MiB between private buffers."""
    lines = []
    for cpu, where in ((CPU, "one CPU"), (None, "free")):
        ours: list[float] = []
        copies: list[float] = []
        with pinned(cpu), fabric(512 * MIB) as name, dmrpc_cxl.attach(name) as host:
            arrays = [host.array(np.full(MIB, i, "u1")) for i in range(16)]
            data = np.full(MIB, 7, "u1")
            private = np.zeros((32, MIB), "u1")
            before = host.stats()
            with quiet():
                for i in range(320):
                    mapped = host.map_ref(host.create_ref(arrays[i % 16]))
                    mine = mapped.numpy()
                    mine[::512].sum(), private[i % 32][::512].sum()
                    for timed, target in ((ours, mine), (copies, private[i % 32]))[
                        :: 1 - i % 2 * 2
                    ]:
                        t0 = now()
                        target[:] = data
                        timed.append(now() - t0)
                    del mine, target
                    mapped.free()
            after = host.stats()
            del arrays
        lines.append(
            bar(
                f"overwriting a shared 1 MiB mapping against memcpy of 1 MiB, {where}",
                median(ours[20:]) / median(copies[20:]),
                4,
                at_most=True,
                ours_us=median(ours[20:]) / 1e3,
                memcpy_us=median(copies[20:]) / 1e3,
                faults_each=(after["wp_faults"] - before["wp_faults"]) / 320,
                frames_each=(after["frames_copied"] - before["frames_copied"]) / 320,
            )
        )
    return lines


def read_shared() -> list[dict[str, Any]]:
    """Read all of a freshly mapped shared Ref of 1 MiB in the steady state, against private memory."""
    ours: list[float] = []
    private_times: list[float] = []
    with pinned(CPU), fabric(512 * MIB) as name, dmrpc_cxl.attach(name) as host:
        arrays = [host.array(np.full(MIB // 8, i, "u8")) for i in range(16)]
        private = np.ones((16, MIB // 8), "u8")
        with quiet():
            for i in range(640):
                mapped = host.map_ref(host.create_ref(arrays[i % 16]))
                mine = mapped.numpy("u8")
                for timed, source in ((ours, mine), (private_times, private[i % 16]))[
                    :: 1 - i % 2 * 2
                ]:
                    t0 = now()
                    source.sum()
                    timed.append(now() - t0)
                del mine, source
                mapped.free()
        del arrays
    return [
        bar(
            "reading a freshly mapped shared Ref of 1 MiB against private memory",
            median(ours[40:]) / median(private_times[40:]),
            1.2,
            at_most=True,
            shared_us=median(ours[40:]) / 1e3,
            private_us=median(private_times[40:]) / 1e3,
        )
    ]
