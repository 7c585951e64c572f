"""Calls of services with an array as argument, for the figures about what stands between a client and a worker."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

import dmrpc_cxl

from ..rpc_stage import client_of
from .blocks import Block, one_by_one, windowed
from .net_blocks import Resident

COLD_BYTES = 32 << 20  # ordinary arrays that take turns have so many bytes together
MOST_ARRAYS = 256

Array = np.ndarray[Any, np.dtype[np.float32]]


@functools.cache
def arrays(size: int) -> tuple[Array, ...]:
    """Return ordinary arrays to send in turn, each of one value; blocks of one process share them."""
    number = min(max(COLD_BYTES // size, 4), MOST_ARRAYS)
    return tuple(np.full(size // 4, i % 7 + 1, "f4") for i in range(number))


def total_block(
    host: Any,
    service: str,
    transport: str,
    transfer: str,
    mode: str,
    size: int,
    window: int = 1,
    method: str = "total",
    *,
    eager: bool = False,
) -> Block:
    """Return a block of calls of a method that is given an array, and returns its sum.

    Modes. *fresh*: ordinary arrays in turn. *pre-shared*: one array that lies in DM, written once. *shared*: an array in DM that is
    made and written for each call. With `eager`, which is for memory servers and *pre-shared*, each call has a copy of that array.
    """
    client = client_of(host, service, transport).using(transfer=transfer)
    call = getattr(client if window == 1 else client.future, method)
    made = list(arrays(size))
    resident = Resident(host, made[0]) if eager else None
    if mode == "pre-shared":
        made = made[:1] if eager else [host.array(made[0])]
    sent: Iterator[Array] = itertools.cycle(made)
    sums = itertools.cycle([float(array[0]) * array.size for array in made])

    def request() -> Any:
        if resident is not None:
            return call(dmrpc_cxl.move(resident.copy()))
        array = next(sent)
        if mode == "shared":
            array = host.array(array)
        return call(array)

    def expected() -> float:
        return next(sums)

    block = one_by_one(request, expected) if window == 1 else windowed(request, expected, window)

    def close() -> None:
        made.clear()
        if resident is not None:
            resident.close()

    block.close = close
    return block
