"""Does transfer="auto" choose well? Against each forced mode, over sizes, sources and transports.

Compared is the median call of each block: blocks are short, and what else runs on the machine hits some of them.
"""

from __future__ import annotations

from typing import Any

import dmrpc_cxl

from .machine import bar, median
from .rpc_stage import PLACES, Load, Stage, measure, medians, ratios, serve, stage

SIZES = tuple(64 << shift for shift in range(0, 17, 2))  # 64 B to 4 MiB
MODES = ("auto", "value", "ref")
ROUNDS = 5
BLOCK_NS = 10_000_000  # calls per block are chosen for this


def _calls(size: int) -> int:
    """Return how many calls make a block: a call takes some 50 us, and 1 us for 2 KiB."""
    return max(8, BLOCK_NS // (50_000 + size // 2))


def _threshold(host: dmrpc_cxl.Host) -> int:
    return host.threshold


def _worst(on: Stage, source: str, transport: str, where: str) -> dict[str, Any]:
    loads = [
        Load("worker", "total", size, source, mode, transport, _calls(size))
        for size in SIZES
        for mode in MODES
    ]
    samples = on.peers["client"].call(measure, loads, on.pids, ROUNDS)
    worst: dict[str, Any] = {}
    figures = {}
    for i, size in enumerate(SIZES):
        auto, value, ref = (medians(one) for one in samples[3 * i : 3 * i + 3])
        better = min(value, ref, key=median)
        ratio = ratios(auto, better) | {
            "at": size,
            "better": "value" if better is value else "ref",
        }
        if not worst or ratio["median"] > worst["median"]:
            worst = ratio
        name = (
            f"{size}" if size < 1024 else f"{size >> 10}k" if size < 1 << 20 else f"{size >> 20}M"
        )
        figures[name] = "/".join(f"{median(one) / 1e3:.0f}" for one in (auto, value, ref))
    return bar(
        f'transfer="auto" against the better of "value" and "ref", {source}, '
        f"{'rings' if transport == 'auto' else 'TCP'}, {where}: worst size",
        worst.pop("median"),
        1.15,
        at_most=True,
        **worst,
        us_auto_value_ref=" ".join(f"{name} {text}" for name, text in figures.items()),
    )


def threshold() -> list[dict[str, Any]]:
    """Sizes from 64 B to 4 MiB, ordinary arrays and one in DM, rings and TCP."""
    lines = []
    with stage() as on:
        on.start("worker", serve)
        client = on.start("client")
        nbytes = client.call(_threshold)
        for where, cpu in PLACES:
            on.pin(cpu)
            for transport in ("auto", "tcp"):
                for source in ("fresh", "dm"):
                    lines.append(_worst(on, source, transport, where) | {"threshold": nbytes})
    return lines
