"""What a load balancer does for a call by Ref: as much for 4 MiB as for 4 KiB."""

from __future__ import annotations

from typing import Any

import dmrpc_cxl

from .machine import bar, median
from .rpc_stage import PLACES, Load, Stage, cpus, measure, ratios, stage
from .rpc_stage import _here as here

SIZES = (4096, 64 << 10, 1 << 20, 4 << 20)
ROUNDS = 9
CALLS = 300


def _forwarded(host: dmrpc_cxl.Host) -> tuple[int, int]:
    (forwarder,) = here.values()
    return forwarder.nr_forwarded, forwarder.bytes_forwarded  # type: ignore[union-attr]


def _bytes_per_call(on: Stage, load: Load) -> float:
    forwarder = on.peers["forwarder-1"]
    calls, nbytes = forwarder.call(_forwarded)
    on.peers["client"].call(measure, [load], on.pids, 1, 0)
    calls_after, nbytes_after = forwarder.call(_forwarded)
    return (nbytes_after - nbytes) / (calls_after - calls)


def forwarder() -> list[dict[str, Any]]:
    """Bytes and CPU of the forwarder's process per call by Ref, 4 KiB to 4 MiB."""
    lines = []
    with stage() as on:
        name = on.chain("", 2)[-1]
        on.start("client")
        moved: dict[int, float] = {}
        for where, cpu in PLACES:
            on.pin(cpu)
            for source in ("dm", "fresh"):
                loads = [
                    Load(
                        name,
                        "take",
                        size,
                        source,
                        calls=CALLS // 5 if source == "fresh" and size > SIZES[1] else CALLS,
                    )
                    for size in SIZES
                ]
                found = on.peers["client"].call(measure, loads, on.pids, ROUNDS)
                if not moved:
                    moved = {load.size: _bytes_per_call(on, load) for load in loads}
                busy = {
                    load.size: cpus(one, "forwarder-1")
                    for load, one in zip(loads, found, strict=True)
                }
                worst = max(
                    (ratios(busy[size], busy[SIZES[0]]) for size in SIZES[1:]),
                    key=lambda ratio: abs(ratio["median"] - 1),
                )
                lines.append(
                    bar(
                        f"CPU of a forwarder per call by Ref, up to 4 MiB against 4 KiB, {source}, {where}: off 1 by",
                        abs(worst["median"] - 1),
                        0.10,
                        at_most=True,
                        unit="",
                        ratio=worst["median"],
                        min=worst["min"],
                        max=worst["max"],
                        **{f"us_{size >> 10}k": median(busy[size]) / 1e3 for size in SIZES},
                    )
                )
        lines.append(
            bar(
                "bytes passed on by a forwarder per call by Ref, 4 MiB against 4 KiB: off 1 by",
                abs(max(moved.values()) / min(moved.values()) - 1),
                0.10,
                at_most=True,
                unit="",
                **{f"bytes_{size >> 10}k": nbytes for size, nbytes in moved.items()},
            )
        )
    return lines
