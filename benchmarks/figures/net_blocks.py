"""Blocks of calls of a memory server's client: accesses and single calls for E0, create_ref for Fig 7, eager copies for the others.

They run in processes whose hosts use a memory server, and speak to it as whoever wants ranges and addresses does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

import dmrpc_net

from .blocks import Block

WINDOW = 32
GROUP_BYTES = 128 << 20  # of Refs that are alive at once, at most, if each has pages of its own
MOST_AT_ONCE = 512
PAGE = 4096
STRIDE = 7919 * PAGE  # accesses meet every page of the region before they meet one twice

_regions: dict[int, int] = {}
_Scalar = TypeVar("_Scalar", bound=np.generic)


def region_of(client: dmrpc_net.Client, room: int) -> int:
    """Return the address of a region, all of it written; blocks of one process share it."""
    if room not in _regions:
        _regions[room] = client.ralloc(room)
        data: Any = np.ones(min(room, 1 << 20), "u1")
        for at in range(0, room, data.nbytes):
            client.rwrite(_regions[room] + at, data)
    return _regions[room]


class Resident(Generic[_Scalar]):
    """An array at a memory server, written once; copy() has the server make a copy, as it does for `net-copy`."""

    def __init__(self, host: Any, array: npt.NDArray[_Scalar]) -> None:
        self._memory = host.memory
        self._like = array.dtype, array.shape
        self._nbytes = array.nbytes
        self._address = self._memory.client.ralloc(array.nbytes)
        self._memory.client.rwrite(self._address, array)

    def copy(self) -> npt.NDArray[_Scalar]:
        """Return an array that has the copy when it is looked at; sent, it goes by Ref."""
        client = self._memory.client
        ref = client.create_ref(self._address, self._nbytes, copy=True)
        made: npt.NDArray[_Scalar] = self._memory.show(ref).numpy(*self._like)
        return made

    def close(self) -> None:
        """Free it."""
        self._memory.client.rfree(self._address)


# ---------------------------------------------------------------- create_ref


def refs_block(host: Any, mode: str, size: int, region: int, *, copy: bool) -> Block:
    """Return a block of create_refs, walking through a region; mode *pipelined*: WINDOW of them under way."""
    client: dmrpc_net.Client = host.memory.client
    base = region_of(client, region)
    places = max(region // size, 1)
    at_once = max(min(MOST_AT_ONCE, GROUP_BYTES // size), 1)
    turn = 0
    counts: dict[str, float] = {}
    now = time.perf_counter_ns

    def next_address() -> int:
        nonlocal turn
        turn = (turn + 1) % places
        return base + turn * size

    def one_by_one(n: int, refs: list[Any]) -> list[int]:
        latencies = []
        for _ in range(n):
            address = next_address()
            begin = now()
            refs.append(client.create_ref(address, size, copy=copy))
            latencies.append(now() - begin)
        return latencies

    def pipelined(n: int, refs: list[Any]) -> list[int]:
        under_way: list[Any] = []
        begin = now()
        with client.pipeline() as pipeline:
            for i in range(n):
                if i >= WINDOW:
                    refs.append(under_way[i - WINDOW].result())
                under_way.append(pipeline.create_ref(next_address(), size, copy=copy))
        taken = now() - begin
        refs += [call.result() for call in under_way[-WINDOW:]]
        return [taken]

    def run(n: int) -> list[int]:
        found: list[int] = []
        left = n
        while left:
            group = min(left, at_once)
            refs: list[Any] = []
            found += (pipelined if mode == "pipelined" else one_by_one)(group, refs)
            if len(refs) != group or any(ref.nbytes != size for ref in refs):
                raise AssertionError("a Ref is not what it should be")
            refs.clear()
            client.ping()  # behind the drops: their time is nobody's
            left -= group
        counts["timed_ns"] = sum(found)
        counts["traffic_bytes"] = n * (2 * size if copy else 4 * -(-size // PAGE))
        return [] if mode == "pipelined" else found

    return Block(run, counts=counts)


# ---------------------------------------------------------------- accesses and calls


def access_block(host: Any, what: str, size: int, room: int) -> Block:
    """Return a block of rreads or rwrites, one outstanding, that walk through a region."""
    client: dmrpc_net.Client = host.memory.client
    base = region_of(client, room)
    pages = (room - size) // PAGE + 1
    data: Any = np.ones(size, "u1")
    into: Any = np.zeros(size, "u1")
    turn = 0
    now = time.perf_counter_ns

    def run(n: int) -> list[int]:
        nonlocal turn
        latencies = [0] * n
        into[:] = 0
        for i in range(n):
            turn += 1
            address = base + turn * STRIDE // PAGE % pages * PAGE
            begin = now()
            if what == "rread":
                client.rread(address, into)
            else:
                client.rwrite(address, data)
            latencies[i] = now() - begin
        if what == "rwrite":
            client.rread(address, into)
        return latencies

    def check() -> None:
        assert into.all(), "what was read is wrong"

    return Block(run, check)


def _calls(client: dmrpc_net.Client, size: int) -> dict[str, tuple[Any, Any]]:
    """Return for each call what is done before the clock starts, and the call, which is given that."""
    data: Any = np.ones(size, "u1")
    into: Any = np.zeros(size, "u1")
    kept = client.ralloc(size)
    client.rwrite(kept, data)

    def written() -> int:
        address = client.ralloc(size)
        client.rwrite(address, data)
        return address

    def shared() -> Any:
        return client.create_ref(kept, size)

    return {
        "ralloc": (lambda: None, lambda _: client.ralloc(size)),
        "rfree": (written, client.rfree),
        "create_ref": (lambda: kept, lambda address: client.create_ref(address, size)),
        "create_ref, copying": (
            lambda: kept,
            lambda address: client.create_ref(address, size, copy=True),
        ),
        "clone": (shared, client.clone_ref),
        "drop": (shared, client.drop_ref),
        "map_ref": (shared, client.map_ref),
        "put": (lambda: data, client.put),
        "get": (shared, lambda ref: client.get(ref, into)),
    }


CALLS = (
    "ralloc", "rfree", "create_ref", "create_ref, copying", "clone", "drop", "map_ref", "put", "get",
)  # fmt: skip
GIVES_AN_ADDRESS = ("ralloc", "map_ref")


def call_block(host: Any, call: str, size: int) -> Block:
    """Return a block of one call, timed by itself, one outstanding."""
    client: dmrpc_net.Client = host.memory.client
    prepare: Callable[[], Any]
    prepare, timed = _calls(client, size)[call]
    now = time.perf_counter_ns

    def run(n: int) -> list[int]:
        latencies = [0] * n
        for i in range(n):
            made = prepare()
            begin = now()
            result = timed(made)
            latencies[i] = now() - begin
            if call in GIVES_AN_ADDRESS:
                client.rfree(result)
            del made, result
        return latencies

    return Block(run)
