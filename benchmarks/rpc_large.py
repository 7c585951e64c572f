"""Large arrays through three services in a row: what a page costs, beyond what the calls cost."""

from __future__ import annotations

from typing import Any

import numpy as np

import dmrpc_cxl

from .machine import bar, median
from .rpc_stage import (
    MIB,
    PLACES,
    Block,
    Sample,
    Stage,
    alternate,
    client_of,
    cpus,
    forward,
    serve,
    stage,
    walls,
)

PAGE = 4096
SIZES = (16 * MIB, 128 * MIB)
NR_READ = 64  # pages that the last service looks at
ROUNDS = 7
CALLS = {PAGE: 200, 16 * MIB: 50, 128 * MIB: 20}
MOVING, FORWARDED = "moving", "forwarded"

_arrays: dict[int, Any] = {}


class Last:
    """Reads some pages, or writes one."""

    def read(self, data: np.ndarray[Any, Any]) -> float:
        return float(data[:: max(data.size // NR_READ, 1)].sum())

    def write(self, data: np.ndarray[Any, Any]) -> float:
        data[data.size // 2] = 7
        return float(data[data.size // 2])


class Pass:
    """Passes an array on, and does not keep it."""

    def __init__(self, host: dmrpc_cxl.Host, backend: str) -> None:
        self._next = client_of(host, backend).using(transfer="ref")

    def read(self, data: np.ndarray[Any, Any]) -> float:
        return float(self._next.read(dmrpc_cxl.move(data)))

    def write(self, data: np.ndarray[Any, Any]) -> float:
        return float(self._next.write(dmrpc_cxl.move(data)))


def _serve_passing(host: dmrpc_cxl.Host, name: str, backend: str) -> None:
    serve(host, name, Pass, host, backend)


def _block(host: dmrpc_cxl.Host, service: str, method: str, size: int) -> Block:
    if size not in _arrays:
        _arrays[size] = host.array(np.ones(size // 4, "f4"))
    array = _arrays[size]
    call = getattr(client_of(host, service).using(transfer="ref"), method)
    calls = CALLS[size]
    wanted = 7.0 if method == "write" else float(len(array[:: max(array.size // NR_READ, 1)]))

    def run() -> tuple[list[int], list[Any]]:
        return [], [call(array) for _ in range(calls)]

    def check(results: list[Any]) -> None:
        if set(results) != {wanted} or array[array.size // 2] != 1:
            raise AssertionError(f"{service}.{method} of {size} bytes: {set(results)}")

    return Block(run, calls, check)


def _measure(
    host: dmrpc_cxl.Host, service: str, pids: dict[str, int], rounds: int
) -> dict[str, list[Sample]]:
    blocks = {
        f"{method} {size}": _block(host, service, method, size)
        for method in ("read", "write")
        for size in (PAGE, *SIZES)
    }
    return alternate(blocks, pids, rounds)


def _forget(host: dmrpc_cxl.Host) -> None:
    _arrays.clear()


def _per_page(large: list[float], small: list[float], size: int) -> list[float]:
    return [(a - b) / (size // PAGE) for a, b in zip(large, small, strict=True)]


def _lines(on: Stage, how: str, where: str) -> list[dict[str, Any]]:
    found = on.peers["client"].call(_measure, f"{how}-1", on.pids, ROUNDS)
    lines = []
    for method in ("read", "write"):
        small = found[f"{method} {PAGE}"]
        for size in SIZES:
            large = found[f"{method} {size}"]
            cpu = _per_page(cpus(large), cpus(small), size)
            wall = _per_page(walls(large), walls(small), size)
            lines.append(
                bar(
                    f"{size // MIB} MiB in DM through three services ({how}), the last "
                    f"{'reads 64 pages' if method == 'read' else 'writes one page'}, {where}: CPU per page",
                    median(cpu),
                    25,
                    at_most=True,
                    unit="ns",
                    min=min(cpu),
                    max=max(cpu),
                    wall_ns=median(wall),
                    whole_us=median(walls(large)) / 1e3,
                    one_page_us=median(walls(small)) / 1e3,
                    **{
                        f"{name}_ns": median(_per_page(cpus(large, name), cpus(small, name), size))
                        for name in ("client", f"{how}-1", f"{how}-2", "last")
                    },
                )
            )
    return lines


def large() -> list[dict[str, Any]]:
    """Arrays of 16 MiB and 128 MiB that lie in DM, shared with the call."""
    lines = []
    with stage(512 * MIB) as on:
        on.start("last", serve, Last)
        for how, start in ((MOVING, _serve_passing), (FORWARDED, forward)):
            on.start(f"{how}-2", start, "last")
            on.start(f"{how}-1", start, f"{how}-2")
        client = on.start("client")
        for where, cpu in PLACES:
            on.pin(cpu)
            for how in (MOVING, FORWARDED):
                lines += _lines(on, how, where)
        client.call(_forget)
    return lines
